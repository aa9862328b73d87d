"""Conversions that are killed, run out of disk, or find their files changed: nothing half-made, and the rerun is identical."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_case import stopped_after, tree
from configs import small
from memory import checkpoint, random_weights

from g2kit.convert import convert
from g2kit.convert.api import convert_checkpoint
from g2kit.convert.plan import Options
from g2kit.formats.errors import FileIOError, G2Error, ResumeError, SpaceError
from g2kit.model.canonical import EMBED_PADDING

EXE = Path(sys.executable).with_name("g2conv")
KILLS = 30


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few megabytes, so that a run lasts long enough to be hit."""
    root = tmp_path_factory.mktemp("source") / "hf"
    config = small("gemma2-2b", layers=8, d=128, f=512, head_dim=32, vocab=2048)
    convert_checkpoint(checkpoint(config, random_weights(config, 1)), root, Options("safetensors"))
    return root


@pytest.mark.parametrize("to", [pytest.param("flax", marks=pytest.mark.slow), "torch"])
def test_killed_at_any_moment(to: str, source: Path, tmp_path: Path) -> None:
    """kill -9 at seeded random moments, over and over on the same destination, until a run gets through."""
    want = tmp_path / "want"
    began = time.monotonic()
    subprocess.run(
        [EXE, "convert", source, want, "--to", to, "-q"], check=True, stdout=subprocess.DEVNULL
    )
    whole = time.monotonic() - began
    before = tree(source)
    rng = random.Random(5)
    killed = 0
    for k in range(KILLS // 2):
        dst = tmp_path / f"dst{k}"
        for _ in range(2):
            child = subprocess.Popen(
                [EXE, "convert", source, dst, "--to", to, "-q"], stdout=subprocess.DEVNULL
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(rng.uniform(0.3, 1.0) * whole)
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                killed += 1
            child.wait()
            assert not dst.exists() or tree(dst) == tree(want), "never a half destination"
        subprocess.run(
            [EXE, "convert", source, dst, "--to", to, "-q", "--overwrite"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        assert tree(dst) == tree(want)
        assert not dst.with_name(dst.name + ".partial").exists()
    assert killed > KILLS // 4, "the moments were all too late to test anything"
    assert tree(source) == before


def damage(weights: Path) -> None:
    """Other values everywhere in a safetensors file."""
    data = bytearray(weights.read_bytes())
    header = int.from_bytes(data[:8], "little")
    for k in range(8 + header, len(data), 64):
        data[k] ^= 1
    weights.write_bytes(data)


def interrupt(
    source: Path, dst: Path, monkeypatch: pytest.MonkeyPatch, after: int = 20, **options: object
) -> None:
    """Stop a conversion after some tensors, as Ctrl-C does."""
    with stopped_after(after, monkeypatch), pytest.raises(KeyboardInterrupt):
        convert(source, dst, **{"to": "flax", **options})  # type: ignore[arg-type]
    assert dst.with_name(dst.name + ".partial").exists()


def test_a_resumed_run_keeps_what_was_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(source, tmp_path / "dst", monkeypatch)
    report = convert(source, tmp_path / "dst", to="flax")
    assert report["resumed_tensors"] >= 1
    convert(source, tmp_path / "want", to="flax")
    assert tree(tmp_path / "dst") == tree(tmp_path / "want")


def test_other_options_do_not_continue_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(source, tmp_path / "dst", monkeypatch)
    with pytest.raises(ResumeError, match=r"layout.*--no-resume") as e:
        convert(source, tmp_path / "dst", to="flax", layout="nested")
    assert "flat" in str(e.value)
    assert "nested" in str(e.value)
    convert(source, tmp_path / "dst", to="flax", layout="nested", resume=False)
    assert (tmp_path / "dst" / "layer_0.attn.q_einsum.w").exists()


def test_a_source_that_changed_is_noticed_by_its_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "src"
    convert(source, copy, to="safetensors")
    interrupt(copy, tmp_path / "dst", monkeypatch)
    weights = copy / "model.safetensors"
    os.utime(weights, ns=(1, 1))  # touched, not changed: continues
    interrupt(copy, tmp_path / "dst", monkeypatch, after=5)
    damage(weights)
    with pytest.raises(ResumeError, match="source changed"):
        convert(copy, tmp_path / "dst", to="flax")
    convert(copy, tmp_path / "dst", to="flax", resume=False)


def test_a_source_replaced_with_its_size_and_time_kept_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "src"
    convert(source, copy, to="safetensors")
    interrupt(copy, tmp_path / "dst", monkeypatch)
    weights = copy / "model.safetensors"
    before = weights.stat()
    damage(weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ResumeError, match=r"model\..*: the source changed.*--no-resume"):
        convert(copy, tmp_path / "dst", to="flax")


def test_padding_rows_that_changed_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are left out, and counted: a continued run must not report those of another file."""
    config = small("gemma2-2b", layers=8, d=128, f=512, head_dim=32, vocab=2048)
    weights = random_weights(config, 2, rows=2050)
    weights[EMBED_PADDING][0, 0] = 1
    options = {"drop_padding": True, "to": "safetensors"}
    for k, name in enumerate(("src", "other")):
        weights[EMBED_PADDING][1, 1] = k
        convert_checkpoint(checkpoint(config, weights), tmp_path / name, Options("flax"))
    interrupt(tmp_path / "src", tmp_path / "dst", monkeypatch, **options)
    (tmp_path / "src").rename(tmp_path / "first")
    (tmp_path / "other").rename(tmp_path / "src")
    with pytest.raises(ResumeError, match=r"embed.*: the source changed"):
        convert(tmp_path / "src", tmp_path / "dst", **options)  # type: ignore[arg-type]


def test_another_orientation_of_the_source_does_not_continue_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small("gemma2-2b", layers=8, d=128, f=128, head_dim=32, vocab=2048)
    src = tmp_path / "src"
    convert_checkpoint(checkpoint(config, random_weights(config, 1)), src, Options("flax"))
    interrupt(src, tmp_path / "dst", monkeypatch, to="safetensors", gating="df")
    with pytest.raises(ResumeError, match=r"--gating .*was df, now fd"):
        convert(src, tmp_path / "dst", to="safetensors", gating="fd")
    convert(src, tmp_path / "dst", to="safetensors", gating="df")


def test_a_source_that_changes_while_it_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from g2kit.convert import stream

    copy = tmp_path / "src"
    convert(source, copy, to="safetensors")
    real = stream.run_task

    def meddling(*args: object, **options: object) -> object:
        os.utime(copy / "model.safetensors", ns=(1, 1))
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "run_task", meddling)
    with pytest.raises(FileIOError, match="changed while it was read"):
        convert(copy, tmp_path / "dst", to="torch")
    assert not (tmp_path / "dst").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 3 MB."""
    root = tmp_path / "disk"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(root)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield root
    subprocess.run(["umount", str(root)], check=True)


def test_a_full_disk(source: Path, small_disk: Path) -> None:
    """Too small for the output: said beforehand, with both figures."""
    with pytest.raises(SpaceError, match=r"need .* have "):
        convert(source, small_disk / "dst", to="flax")
    assert list(small_disk.iterdir()) == []


def test_a_file_size_limit_names_the_option(source: Path, tmp_path: Path) -> None:
    command = f"ulimit -f 1000; exec {EXE} convert {source} {tmp_path / 'dst'} --to safetensors -q"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "error[E_SPACE]" in done.stderr
    assert "--max-shard-size" in done.stderr
    assert not (tmp_path / "dst").exists()


def test_two_writers_do_not_mix(source: Path, tmp_path: Path) -> None:
    command = [EXE, "convert", source, tmp_path / "dst", "--to", "flax", "--json"]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in "ab"
    ]
    ends = [(c.communicate(), c.returncode) for c in children]
    codes = sorted(code for _, code in ends)
    assert codes[0] == 0
    for (_, err), code in ends:
        assert code in (0, 7), err
        assert code == 0 or "error[E_LOCKED]" in err or "error[E_EXISTS]" in err
    (out, _), _ = next(e for e in ends if e[1] == 0)
    assert json.loads(out)["checked_tensors"] == json.loads(out)["checked_tensors"]
    convert(source, tmp_path / "want", to="flax")
    assert tree(tmp_path / "dst") == tree(tmp_path / "want")


def test_a_copy_that_reads_back_differently_is_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check itself: a writer that corrupts one byte is found out, and nothing reaches the destination."""
    from g2kit.formats.output import Output

    real = Output.write

    def faulty(self: Output, slot: str, start: tuple[int, ...], array: object) -> None:
        if slot == "model.norm.weight":
            array = array.copy()  # type: ignore[attr-defined]
            array.view("u1")[7] ^= 1  # type: ignore[attr-defined]
        real(self, slot, start, array)  # type: ignore[arg-type]

    monkeypatch.setattr(Output, "write", faulty)
    with pytest.raises(
        G2Error, match=r"1 of 90 tensors read back differently: model.norm.weight"
    ) as e:
        convert(source, tmp_path / "dst", to="safetensors")
    assert (e.value.code, e.value.exit_code) == ("E_PARITY", 1)
    assert list(tmp_path.iterdir()) == []
