"""g2quant given what it cannot use: the message names it, the exit code is the documented one, nothing is left behind."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from g2kit.convert.open import open_checkpoint
from g2kit.formats import safetensors
from g2kit.formats.errors import ChecksumError, ConflictError, G2Error
from g2kit.model import canonical
from g2kit.model.sample import sample_dir
from g2kit.outputs import _claim
from g2kit.quant import quantize
from g2kit.quant.cli import g2quant
from g2kit.quant.export_codes import export_codes
from g2kit.quant.gather import gather_moments
from g2kit.quant.measure import sensitivity
from g2kit.quant.plan import require_destination
from g2kit.quant.work import Work
from g2kit.terminal import run_cli

DATA = Path(__file__).parent / "data" / "hf_sharded"
Q0 = canonical.Q.format(i=0)
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    file = tmp_path / "ids.npy"
    np.save(file, np.random.default_rng(0).integers(3, 500, (8, 20)).astype(np.int32))
    return file


def refused(
    capsys: Capture, *args: Any, src: Path = DATA, dst: Path, command: tuple[str, ...] = ()
) -> tuple[int, dict[str, Any]]:
    """Exit code and error of a command that must fail and leave everything as it was."""
    there = sorted(p for p in dst.parent.iterdir()) if dst.parent.is_dir() else None
    given = [*command, str(src), str(dst), *map(str, args), "--json"]
    if not command:
        given += ["--group-size", "32"] * ("--group-size" not in args and "--format" not in args)
    code = run_cli(g2quant, given)
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert code
    assert err.count("\n") <= 3, err
    assert error["fix"]
    assert there is None or sorted(dst.parent.iterdir()) == there
    return code, error


# ---------------------------------------------------------------- calibration


def npy(array: Any, **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.save(folder / "c.npy", array, **options)
        return folder / "c.npy"

    return write


def text(content: bytes, name: str = "c.txt") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def rows(at: tuple[int, int] | None = None, value: int = 0) -> np.ndarray:
    """Eight sequences of 20 ids with a BOS, one id changed."""
    ids = np.full((8, 20), 300, np.int32)
    ids[:, 0] = 2
    if at is not None:
        ids[at] = value
    return ids


CALIBRATION = {
    "float": (npy(rows().astype(np.float32)), 3, "whole numbers"),
    "bool": (npy(rows() > 5), 3, "whole numbers"),
    "complex": (npy(rows().astype(np.complex64)), 3, "whole numbers"),
    "three axes": (npy(rows()[None]), 3, "found int32 [1, 8, 20]"),
    "no axis": (npy(np.int32(7)), 3, "found int32 []"),
    "no ids": (npy(np.zeros(0, np.int32)), 3, "found int32 [0]"),
    "no sequences": (npy(np.zeros((0, 20), np.int32)), 3, "found int32 [0, 20]"),
    "empty sequences": (npy(np.zeros((5, 0), np.int64)), 3, "found int64 [5, 0]"),
    "below": (npy(rows((3, 4), -1)), 2, "run from -1 to"),
    "beyond": (npy(rows((3, 4), 512)), 2, "to 512; the vocabulary has 512"),
    "too large": (npy(np.full((4, 20), 2**63, np.uint64)), 3, "is in no vocabulary"),
    "BOS twice": (npy(rows((6, 1), 2)), 2, "sequence 6 has BOS (id 2) at positions [0, 1]"),
    "BOS missing": (npy(rows((5, 0), 300)), 2, "sequence 5 has BOS (id 2) nowhere"),
    "padded": (npy(rows((7, 19), 0)), 2, "sequence 7 is padded (id 0)"),
    "padded in front": (npy(np.roll(rows((7, 19), 0), 1, 1)), 2, "at positions [1]"),
    "short sequences": (npy(rows()[:, :7]), 2, "7 tokens, fewer than 8"),
    "long sequences": (npy(np.tile(rows()[:, 1:], 40)), 2, "the model's context is"),
    "one sequence": (npy(rows()[:1]), 2, "at least 2 are needed"),
    "short stream": (npy(rows()[0, 1:]), 2, "too few for two sequences"),
    "pickle": (npy(np.array([{}], object), allow_pickle=True), 3, "not a NumPy array"),
    "cut": (lambda p: cut(npy(rows())(p), 100), 3, "not a NumPy array"),
    "nothing.npy": (text(b"", "c.npy"), 2, "it is empty"),
    "archive": (lambda p: archive(p), 3, "an archive of several"),
    "nothing": (text(b""), 2, "it is empty"),
    "blank": (text(b" \n\t\n"), 2, "no text"),
    "not UTF-8": (text(b"abc\xff"), 3, "not UTF-8 at byte 3"),
    "nothing.jsonl": (text(b"", "c.jsonl"), 2, "it is empty"),
    "no object": (text(b'{"text": "a"}\n[1]\n', "c.jsonl"), 3, "c.jsonl:2"),
    "broken line": (text(b'{"text": "a"}\n\n{"text": "a\n', "c.jsonl"), 3, "c.jsonl:3"),
    "half a character": (text(b'{"text": "\xc3"}', "c.jsonl"), 3, "not UTF-8 at byte 10"),
}


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def archive(folder: Path) -> Path:
    np.savez(folder / "c.npz", rows())
    return (folder / "c.npz").rename(folder / "c.npy")


@pytest.mark.parametrize("kind", CALIBRATION)
def test_calibration_is_judged_before_weights_are_read(
    kind: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from g2kit.convert import digest

    monkeypatch.setattr(digest, "digests", lambda *a, **k: pytest.fail("weights were read"))
    make, code, says = CALIBRATION[kind]
    (tmp_path / "c").mkdir()
    file = make(tmp_path / "c")
    src = DATA if file.suffix == ".npy" else sample_dir()  # text needs its tokenizer
    found, error = refused(capsys, "--calibration", file, src=src, dst=tmp_path / "out")
    assert (found, says in f"{error['file']} {error['message']}") == (code, True), error
    assert str(file) in error["file"]


def test_calibration_that_is_no_file(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "dir").mkdir()
    for name, status, says in (("none.txt", 3, "no such file"), ("dir", 4, "a directory")):
        code, error = refused(capsys, "--calibration", tmp_path / name, dst=tmp_path / "out")
        assert (code, says in error["message"]) == (status, True), error


# ---------------------------------------------------------------- schemes and formats

SCHEMES = (
    (["--group-size", "128"], "group size 128 does not divide in_features 64", "32 or 64 or -1"),
    (["--group-size", "48"], "group size 48 is not supported", "(32, 64, 128, -1)"),
    (["--group-size", "32", "--bits", "5"], "5 bits are not supported", "(8, 4, 3, 2)"),
    (["--format", "awq", "--group-size", "32", "--bits", "3"], "4 bits only", "compressed-tensors or gptq or mlx"),
    (["--format", "mlx", "--group-size", "-1"], "groups are 32, 64, 128", "compressed-tensors or gptq or awq"),
    (["--format", "torch-int8", "--group-size", "32", "--bits", "8"], "(group size -1)", "compressed-tensors"),
    (["--format", "torch-int8", "--group-size", "-1"], "8 bits only", "compressed-tensors or gptq or awq"),
    (["--format", "torch-int8", "--group-size", "32"], "8 bits only", "--bits 8 --group-size -1 --sym, which torch-int8"),
    (["--format", "awq", "--group-size", "32", "--bits", "3"], "4 bits only", "or --bits 4 --group-size 32 --sym"),
    (["--format", "int-quantized", "--group-size", "-1", "--bits", "8", "--asym"], "no zeros", "compressed-tensors"),
    (["--format", "gguf-q4_k"], "do not divide into blocks", "gguf-q8_0, gguf-q4_0, gguf-q4_1"),
)  # fmt: skip


@pytest.mark.parametrize(("options", "says", "able"), SCHEMES, ids=lambda v: str(v)[:40])
def test_what_does_not_fit_names_what_does(
    options: list[str], says: str, able: str, ids: Path, tmp_path: Path, capsys: Capture
) -> None:
    code, error = refused(capsys, "--calibration", ids, *options, dst=tmp_path / "out")
    assert code == 2
    assert says in error["message"]
    assert able in error["fix"]


@pytest.mark.parametrize(
    "option", [["--bits", "8"], ["--group-size", "128"], ["--asym"], ["--max-shard-size", "1GB"]]
)
def test_what_a_gguf_type_decides_is_not_silently_ignored(
    option: list[str], ids: Path, tmp_path: Path, capsys: Capture
) -> None:
    args = ["--calibration", ids, "--format", "gguf-q4_0", *option]
    code, error = refused(capsys, *args, dst=tmp_path / "out")
    assert code == 2
    assert option[0].removeprefix("--a") in error["message"] + error["fix"]


# ---------------------------------------------------------------- weights


def changed(folder: Path, name: str, change: Callable[[np.ndarray], None]) -> Path:
    """A copy of the model with one tensor changed."""
    shutil.copytree(DATA, folder)
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with closing(safetensors.open_source(folder / files[name])) as source:
        arrays = {n: np.array(t.read()) for n, t in source.tensors.items()}
    change(arrays[name])
    from safetensors.numpy import save_file

    save_file(arrays, folder / files[name], metadata={"format": "pt"})
    return folder


def put(value: float, at: Any) -> Callable[[np.ndarray], None]:
    def change(x: np.ndarray) -> None:
        x[at] = value

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [Q0, canonical.DOWN.format(i=3), canonical.FINAL_NORM, canonical.INPUT_NORM.format(i=2),
     canonical.EMBED],
)  # fmt: skip
def test_a_weight_that_is_not_finite_is_named_and_nothing_written(
    name: str, value: float, ids: Path, tmp_path: Path, capsys: Capture
) -> None:
    # the last row of the embedding: a token that calibration does not have
    src = changed(tmp_path / "src", name, put(value, -1))
    args = ["--calibration", ids, "--method", "rtn", "--group-size", "32"]
    code, error = refused(capsys, *args, src=src, dst=tmp_path / "out")
    assert (code, error["code"], error["tensor"]) == (3, "E_NONFINITE", name)


def test_activations_that_overflow_name_the_block(
    ids: Path, tmp_path: Path, capsys: Capture
) -> None:
    name = canonical.UP.format(i=1)
    src = changed(tmp_path / "src", name, lambda x: np.copyto(x, bfloat16(3e38)))
    code, error = refused(capsys, "--calibration", ids, src=src, dst=tmp_path / "out")
    assert (code, error["code"]) == (3, "E_NONFINITE")
    assert "layers.1." in error["tensor"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    choices = ("4g32", "8g32")
    return sensitivity(DATA, calibration=rows(), choices=choices, measure="block", method="rtn")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(source="x"), "what was measured is not said"),
        (lambda d: d.update(choices=[1]), "what was measured is not said"),
        (lambda d: d.pop("choices"), "what was measured is not said"),
        (lambda d: d["linears"][Q0]["choices"]["int4 g32 sym"].update(kl=1e308), "a KL"),
    ],
)
def test_sensitivities_that_are_damaged(
    change: Callable[[Any], Any], says: str, measured: dict[str, Any], ids: Path, tmp_path: Path,
    capsys: Capture,
) -> None:  # fmt: skip
    document = json.loads(json.dumps(measured))
    change(document)
    file = tmp_path / "s.json"
    file.write_text(json.dumps(document))
    args = ("--target-bpw", "5", "--choices", "4g32,8g32", "--calibration", ids, "--dry-run")
    code = run_cli(
        g2quant, [str(DATA), str(tmp_path / "o"), *map(str, args), "--sensitivity", str(file)]
    )
    assert code == 3
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: (p / "layer-1-0.npy").unlink(),
        lambda p: cut(p / "layer-1-0.npy", 200),
        lambda p: cut(p / "layer-1-0.npy", 3),
        lambda p: np.save(p / "layer-1-0.npy", np.zeros(9)),
        lambda p: flipped(p / "layer-1-0.npy", 200),
        lambda p: cut(p / "units.npz", 300),
        lambda p: np.savez(p / "units.npz", **{"0-0": np.zeros(3)}),
        lambda p: flipped(p / "units.npz", 100),
    ],
)
def test_moments_that_are_damaged(
    damage: Callable[[Path], Any], gathered: Path, tmp_path: Path, capsys: Capture
) -> None:
    moments = Path(shutil.copytree(gathered, tmp_path / "m"))
    damage(moments)
    code, _ = refused(capsys, "--moments", moments, dst=tmp_path / "out")
    assert code == 3


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moments") / "m"
    gather_moments(DATA, out, calibration=rows())
    return out


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------- files of the user


@pytest.mark.parametrize("option", ["--report", "--html", "--card", "--imatrix-out"])
@pytest.mark.parametrize(
    "name", ["ids.npy", "src/config.json", "src/model-00001-of-00004.safetensors"]
)
def test_no_output_replaces_an_input(
    option: str, name: str, ids: Path, tmp_path: Path, capsys: Capture
) -> None:
    src = Path(shutil.copytree(DATA, tmp_path / "src"))
    before = (tmp_path / name).read_bytes()
    args = ("--calibration", ids, option, tmp_path / name, "--overwrite")
    code, error = refused(capsys, *args, src=src, dst=tmp_path / "out")
    assert code in (5, 7)
    assert "input" in error["message"] or "checkpoint" in error["message"]
    assert (tmp_path / name).read_bytes() == before


def test_a_destination_is_no_input(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"mine")
    with (
        open_checkpoint(DATA) as source,
        pytest.raises(ConflictError, match="is the same as the input"),
    ):
        require_destination(file, "gguf-q4_0", source, overwrite=True, inputs=[file])


def test_a_sensitivity_does_not_replace_its_text(
    ids: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = ids.read_bytes()
    code = run_cli(
        g2quant, ["sensitivity", str(DATA), "--calibration", str(ids), "--output", str(ids)]
    )
    assert (code, ids.read_bytes()) == (5, before)
    assert "is an input" in capsys.readouterr().err


def test_two_outputs_are_two_files(ids: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "m.dat"
    args = ("--calibration", ids, "--imatrix-out", out, "--report", out)
    code, error = refused(capsys, *args, dst=tmp_path / "out")
    assert code == 2
    assert "--imatrix-out and --report name the same file" in error["message"]


def test_an_importance_matrix_writes_through_no_link(ids: Path, tmp_path: Path) -> None:
    """A link under the temporary name a version before had."""
    victim = tmp_path / "model"
    victim.write_bytes(b"weights")
    (tmp_path / "m.dat.partial").symlink_to(victim)
    small(tmp_path / "out", np.load(ids), imatrix_out=tmp_path / "m.dat")
    assert victim.read_bytes() == b"weights"
    assert not (tmp_path / "m.dat").is_symlink()


def test_a_report_does_not_take_a_streams_place() -> None:
    """Such as /dev/stdout, that leads to a file: a link that the whole machine would lose."""
    with tempfile.TemporaryFile() as f:
        assert _claim(Path(f"/proc/self/fd/{f.fileno()}")) is None


# ---------------------------------------------------------------- interrupted


def small(dst: Path, ids: Any, src: Path = DATA, **options: Any) -> dict[str, Any]:
    given = {"group_size": 32, "calibration": ids, "samples": 6, "method": "rtn"} | options
    return quantize(src, dst, **given)


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


class Killed(BaseException):
    """The process is gone."""


class Killer:
    """Kills this process, as far as files can tell, at the N-th call that opens, renames or removes something."""

    EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})

    def __init__(self) -> None:
        self.root, self.at, self.seen = "", -1, 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.at < 0 or event not in self.EVENTS or not str(args[0]).startswith(self.root):
            return
        self.seen += 1
        if self.seen > self.at:
            raise Killed

    @contextmanager
    def after(self, calls: int, root: Path) -> Iterator[None]:
        self.root, self.at, self.seen = str(root), calls, 0
        try:
            yield
        finally:
            self.at = -1
            gc.collect()
            for fd in Path("/proc/self/fd").iterdir():  # the kernel does that for the dead
                with suppress(OSError):
                    if str(fd.readlink()).startswith(self.root):
                        os.close(int(fd.name))


@pytest.fixture(scope="module")
def killer() -> Killer:
    found = Killer()
    sys.addaudithook(found)  # stays until Python ends, but does nothing
    return found


def killed_and_resumed(
    killer: Killer, folder: Path, ids: np.ndarray, whole: dict[str, bytes], at: int, **options: Any
) -> bool:
    """Kill a run at a call, let the same run finish; False where it ended before."""
    dst = folder / f"at-{at}"
    dst.mkdir()
    if "keep_codes" in options:
        options["keep_codes"] = dst / "codes"
    killed = True
    with suppress(Killed), killer.after(at, dst):
        small(dst / "out", ids, **options)
        killed = False
    if killed and (dst / "out").exists():  # all was done but to clear up
        with pytest.raises(ConflictError, match=r"work of an interrupted run|exists"):
            small(dst / "out", ids, **options)
        assert files(dst / "out") == whole, at
        small(dst / "out", ids, overwrite=True, **options)
    elif killed:
        small(dst / "out", ids, **options)
    assert files(dst / "out") == whole, at
    assert {p.name for p in dst.iterdir()} <= {"out", "codes"}, at
    shutil.rmtree(dst)
    return killed


def test_killed_at_a_call_it_goes_on_to_the_same_bytes(
    killer: Killer, ids: Path, tmp_path: Path
) -> None:
    array = np.load(ids)
    small(tmp_path / "whole", array)
    assert killed_and_resumed(killer, tmp_path, array, files(tmp_path / "whole"), 38)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "gptq"}, {"keep_codes": True}, {"format": "gguf-q4_0"}, {"recover": "scales"}],
    ids=str,
)
def test_killed_at_every_call(
    options: dict[str, Any], killer: Killer, ids: Path, tmp_path: Path
) -> None:
    array = np.load(ids)
    plain = {k: v for k, v in options.items() if k != "keep_codes"}
    small(tmp_path / "whole", array, **plain)
    whole, at = files(tmp_path / "whole"), 0
    while killed_and_resumed(killer, tmp_path, array, whole, at, **options):
        at += 1
    assert at > 100


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 3}, "the scheme was int4 g32 sym, now int3 g32 sym"),
    "groups": ({"group_size": 64}, "the scheme was int4 g32 sym, now int4 g64 sym"),
    "zeros": ({"symmetric": False}, "the scheme was int4 g32 sym, now int4 g32 asym"),
    "method": ({"method": "gptq"}, "--method was rtn, now gptq"),
    "gathering": ({"sequential": False}, "--sequential was True, now False"),
    "samples": ({"samples": 5}, "the calibration's ids was"),
    "held out": ({"held_out": 0.4}, "the calibration's ids was"),
    "ids": ({"calibration": rows()}, "the calibration's ids was"),
    "self": ({"calibration": "self", "seq_len": 16}, "--calibration was not set, now self"),
    "gguf": ({"format": "gguf-q4_0"}, "the scheme was int4 g32 sym, now Q4_0"),
    "weights": ({"src": Q0}, "the source's weights was g2:sha256:"),
    "config": ({"src": "rope_theta"}, "rope_theta was 10000.0, now 20000.0"),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, killer: Killer) -> Path:
    """A run that was killed before it had written anything."""
    folder = tmp_path_factory.mktemp("interrupted")
    ids = np.random.default_rng(0).integers(3, 500, (8, 20)).astype(np.int32)
    from g2kit.quant import export

    old = export.export

    def dead(*args: Any, **options: Any) -> None:
        raise Killed

    export.export = dead  # type: ignore[assignment]
    try:
        with pytest.raises(Killed):
            small(folder / "out", ids)
    finally:
        export.export = old
    return folder


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_run_does_not_go_on_with_another_ones_work(
    kind: str, interrupted: Path, tmp_path: Path
) -> None:
    options, says = CHANGES[kind]
    options = {"calibration": np.random.default_rng(0).integers(3, 500, (8, 20))} | options
    src = options.pop("src", None)
    if src == Q0:
        options["src"] = changed(tmp_path / "src", Q0, put(0.125, (0, 0)))
    elif src is not None:
        shutil.copytree(DATA, tmp_path / "src")
        config = json.loads((DATA / "config.json").read_text()) | {src: 20000.0}
        config.pop("rope_parameters", None)
        (tmp_path / "src" / "config.json").write_text(json.dumps(config))
        options["src"] = tmp_path / "src"
    before = files(interrupted / "out.quantizing")
    with pytest.raises(ConflictError) as e:
        small(interrupted / "out", options.pop("calibration"), **options)
    assert e.value.exit_code == 7
    assert says in str(e.value)
    assert "--no-resume" in str(e.value)
    assert files(interrupted / "out.quantizing") == before


def test_damaged_work_is_not_continued(interrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(interrupted / "out.quantizing", tmp_path / "out.quantizing")
    ids = np.random.default_rng(0).integers(3, 500, (8, 20))
    for name in ("calibration.npy", "layer-2.npz", "states-4.bin"):
        file = tmp_path / "out.quantizing" / name
        whole = file.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for damaged in (b"", whole[:60], whole[:middle], flipped):
            file.write_bytes(damaged)
            with pytest.raises(ConflictError, match=r"damaged|hidden states"):
                small(tmp_path / "out", ids)
        file.write_bytes(whole)
    report = small(tmp_path / "out", ids)
    assert report["resumed_blocks"] == 4


@pytest.mark.slow
def test_kill_9(tmp_path: Path, ids: Path) -> None:
    """The real thing, once: between the codes of two blocks."""
    args = [str(DATA), str(tmp_path / "out"), "--group-size", "32", "--calibration", str(ids),
            "--samples", "6", "--method", "rtn", "-q"]  # fmt: skip
    script = (
        "import sys, os\nfrom g2kit.quant import cli\nfrom g2kit.terminal import run_cli\n"
        "def hook(event, args):\n"
        "    if event == 'os.rename' and 'layer-1.npz' in str(args[0]): os.kill(os.getpid(), 9)\n"
        "sys.addaudithook(hook)\nrun_cli(cli.g2quant, sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *args], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "out.quantizing" / "layer-1.npz.new").is_file()
    assert run_cli(g2quant, args) == 0
    small(tmp_path / "whole", ids)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# ---------------------------------------------------------------- disks


def test_a_destination_that_takes_no_files(ids: Path, capsys: Capture) -> None:
    args = ["--calibration", ids, "--group-size", "32"]
    code, error = refused(capsys, *args, dst=Path("/sys/kernel/out"))
    assert code == 4
    assert "/sys/kernel/out" in error["file"]


def test_a_parent_that_is_not_there(ids: Path, tmp_path: Path, capsys: Capture) -> None:
    code, error = refused(capsys, "--calibration", ids, dst=tmp_path / "a" / "out")
    assert code == 4
    assert str(tmp_path / "a") in error["file"]


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """A limit on the size of files stands for a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [3_000, 60_000])
def test_a_full_disk_keeps_what_is_done(
    limit: int, ids: Path, tmp_path: Path, capsys: Capture
) -> None:
    args = [str(DATA), str(tmp_path / "out"), "--group-size", "32", "--calibration", str(ids),
            "--samples", "6", "--method", "rtn"]  # fmt: skip
    with largest_file(limit):
        code = run_cli(g2quant, [*args, "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert (code, error["code"]) == (4, "E_SPACE"), error
    assert not (tmp_path / "out").exists()
    assert run_cli(g2quant, [*args, "-q"]) == 0
    small(tmp_path / "whole", ids)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# ---------------------------------------------------------------- codes


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes of 4 bits in groups of 32, and of 8 bits by row."""
    folder = tmp_path_factory.mktemp("kept")
    ids = np.random.default_rng(0).integers(3, 500, (8, 20)).astype(np.int32)
    small(folder / "ct", ids, keep_codes=folder / "codes")
    small(folder / "ct8", ids, bits=8, group_size=-1, keep_codes=folder / "codes8")
    small(folder / "ct832", ids, bits=8, keep_codes=folder / "codes832")
    return folder


EXPORTS = [
    *(("codes", f) for f in ("compressed-tensors", "gptq", "awq", "mlx", "gguf-q4_0")),
    *(("codes8", f) for f in ("compressed-tensors", "int-quantized", "gptq", "torch-int8")),
    ("codes832", "gguf-q8_0"), ("codes832", "mlx"),
]  # fmt: skip


@pytest.mark.parametrize(("codes", "format"), EXPORTS)
def test_one_codes_directory_goes_into_every_format_that_holds_it(
    codes: str, format: str, kept: Path, tmp_path: Path
) -> None:
    suffix = ".gguf" if format.startswith("gguf") else ""
    dst = tmp_path / f"out{suffix}"
    report = export_codes(kept / codes, DATA, dst, format=format)
    with (
        open_checkpoint(kept / codes.replace("codes", "ct")) as a,
        open_checkpoint(dst, config=a.config) as b,
    ):
        assert (
            report["source_fingerprint"]
            == json.loads(
                (kept / codes.replace("codes", "ct") / "g2kit.manifest.json").read_text()
            )["source_fingerprint"]
        )
        for name in canonical.linears(a.tensors):
            assert np.array_equal(a.tensors[name].read(), b.tensors[name].read()), name


@pytest.mark.parametrize(
    ("codes", "format", "able"),
    [("codes", "gguf-q8_0", "gguf-q4_0"), ("codes8", "gguf-q8_0", "int8 g32 sym (Q8_0)"),
     ("codes", "torch-int8", "compressed-tensors"), ("codes8", "awq", "compressed-tensors")],
)  # fmt: skip
def test_codes_that_a_format_cannot_hold(
    codes: str, format: str, able: str, kept: Path, tmp_path: Path, capsys: Capture
) -> None:
    code, error = refused(
        capsys, "--source", DATA, "--format", format, src=kept / codes, dst=tmp_path / "out.gguf",
        command=("export",),
    )  # fmt: skip
    assert code == 2
    assert able in error["fix"]


DAMAGES = (
    "flip a code",
    "flip a scale",
    "cut",
    "append",
    "no weights",
    "no manifest",
    "no description",
    "description",
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_codes_are_not_exported(
    damage: str, kept: Path, tmp_path: Path, capsys: Capture
) -> None:
    codes = tmp_path / "codes"
    shutil.copytree(kept / "codes", codes)
    weights, about = codes / "codes.safetensors", codes / "g2kit.codes.json"
    data = bytearray(weights.read_bytes())
    if damage == "flip a code":
        data[-3] ^= 1
    elif damage == "flip a scale":
        data[len(data) // 2] ^= 1
    elif damage == "cut":
        del data[-10:]
    elif damage == "append":
        data += b"x"
    elif damage == "no manifest":
        (codes / "g2kit.manifest.json").unlink()
    elif damage == "no description":
        about.unlink()
    elif damage == "description":
        about.write_text(about.read_text().replace('"bits": 4', '"bits": 3', 1))
    weights.write_bytes(data)
    if damage == "no weights":
        weights.unlink()
    code, error = refused(
        capsys, "--source", DATA, src=codes, dst=tmp_path / "out", command=("export",)
    )
    assert code == 3
    assert str(codes) in error["file"]


def test_a_quantized_checkpoint_with_a_damaged_code_is_not_exported(
    kept: Path, tmp_path: Path
) -> None:
    shutil.copytree(kept / "ct", tmp_path / "ct")
    file = tmp_path / "ct" / "model.safetensors"
    with closing(safetensors.open_source(file)) as source:
        prefix = Q0.removesuffix("weight")
        tensor = source.tensors[f"{prefix}weight_packed"]
        at = file.read_bytes().find(np.ascontiguousarray(tensor.read()).tobytes())
    data = bytearray(file.read_bytes())
    data[at + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumError, match="manifest") as e:
        export_codes(tmp_path / "ct", tmp_path / "ct", tmp_path / "out", format="gptq")
    assert e.value.tensor == Q0
    assert not (tmp_path / "out").exists()


def test_codes_of_other_weights(kept: Path, tmp_path: Path) -> None:
    src = changed(tmp_path / "src", Q0, put(0.125, (0, 0)))
    for format in ("gptq", "gguf-q4_0"):
        with pytest.raises(ConflictError, match="made from other weights"):
            export_codes(kept / "codes", src, tmp_path / "out", format=format)
        assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_a_place_for_codes_that_is_taken_is_refused_before_work(
    kept: Path, ids: Path, tmp_path: Path, capsys: Capture
) -> None:
    args = ["--calibration", ids, "--group-size", "64", "--keep-codes", kept / "codes"]
    code, error = refused(capsys, *args, dst=tmp_path / "out")
    assert (code, error["code"]) == (7, "E_EXISTS")
    assert error["file"] == str(kept / "codes")


@pytest.mark.slow
def test_codes_left_by_a_killed_run_are_not_mixed_with_others(
    killer: Killer, ids: Path, tmp_path: Path
) -> None:
    """Half-written codes of one calibration, then the same place for another's."""
    array = np.load(ids)
    small(tmp_path / "a", array, keep_codes=tmp_path / "want", seed=1)
    with suppress(Killed), killer.after(6, tmp_path / "codes"):
        small(tmp_path / "b", array[::-1].copy() + 1, keep_codes=tmp_path / "codes")
    shutil.rmtree(tmp_path / "b.quantizing", ignore_errors=True)
    small(tmp_path / "c", array, keep_codes=tmp_path / "codes", overwrite=True)
    assert files(tmp_path / "codes") == files(tmp_path / "want")


def test_errors_of_all_kinds_are_g2errors(tmp_path: Path) -> None:
    for bad in (
        {"bits": "4"},
        {"group_size": 32.0},
        {"samples": 1.5},
        {"seq_len": "x"},
        {"held_out": "x"},
    ):
        with pytest.raises((G2Error, TypeError)):
            small(tmp_path / "out", np.ones((8, 20), np.int32) * 3, **bad)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["calibration.npy", "states-1.bin", "layer-0.npz"])
def test_work_that_is_gone_says_to_start_afresh(
    name: str, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Work.finish_layer

    def stopped(self: Work, layer: int, *args: Any, **more: Any) -> None:
        finish(self, layer, *args, **more)
        raise Killed

    with monkeypatch.context() as m, suppress(Killed):
        m.setattr(Work, "finish_layer", stopped)
        small(tmp_path / "out", ids)
    (tmp_path / "out.quantizing" / name).unlink()
    with pytest.raises(ConflictError) as error:
        small(tmp_path / "out", ids)
    assert "--no-resume" in (error.value.fix or "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["codes", "codes/x"])
def test_an_export_does_not_replace_the_codes(place: str, tmp_path: Path) -> None:
    codes = tmp_path / "codes"
    quantize(DATA, tmp_path / "out", group_size=32, calibration="none", keep_codes=codes)
    before = files(codes)
    with pytest.raises(ConflictError, match="the input"):
        export_codes(codes, DATA, tmp_path / place, overwrite=True)
    assert files(codes) == before
