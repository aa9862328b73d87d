"""Parity across runners and devices: a model recorded by torch on the CPU in float32, verified by every other way to run it.

    python bench/hardware.py                       # the bundled sample
    python bench/hardware.py --size 2b             # random weights of a real shape
    python bench/hardware.py --size 2b --length 256  # 256 tokens; the profile has 4420 for this model

Rows: the jax runner in float32 and bfloat16, torch in bfloat16, transformers, and on a CUDA device torch in float32 (TF32
off) and bfloat16. A row whose runner or device is missing says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from sizes import PRESETS
from sources import make_source, random_ids

ROWS = (
    ("jax", "cpu", "float32"),
    ("jax", "cpu", "bfloat16"),
    ("torch", "cpu", "bfloat16"),
    ("transformers", "cpu", "float32"),
    ("torch", "cuda", "float32"),
    ("torch", "cuda", "bfloat16"),
)
COLUMNS = (
    "runner", "device", "dtype", "X1", "largest KL, nats", "allowed", "padding", "decoding",
    "seconds", "peak RSS, MiB",
)  # fmt: skip
CHECKS = ("P6/padding", "P8/decode")


def line(*cells: object) -> str:
    """A line of the table; cells that are left out are empty."""
    return "| " + " | ".join(map(str, [*cells, *[""] * (len(COLUMNS) - len(cells))])) + " |"


def g2verify(*args: str) -> subprocess.CompletedProcess[str]:
    """The command of this environment."""
    command = str(Path(sys.executable).with_name("g2verify"))
    return subprocess.run([command, *args], capture_output=True, text=True)


def row(recording: Path, model: Path, runner: str, device: str, dtype: str) -> str:
    """One comparison as a line of the table."""
    done = g2verify(
        "compare", str(recording), str(model), "--json", "--config", str(model),
        "--reference-embedding", str(model), "--cand-runner", runner, "--cand-dtype", dtype,
        "--cand-device", device,
    )  # fmt: skip
    said = json.loads(done.stdout)
    claims = {c["id"]: c for c in said["claims"]}
    if "X1" not in claims:
        return line(runner, device, dtype, "not run: " + said["summary"])
    largest = next(e for e in claims["X1"]["evidence"] if e["metric"] == "KL, maximum")
    values = {c["id"]: c["value"] for c in said["coverage"]["checks"]}
    return line(
        runner, device, dtype, claims["X1"]["verdict"],
        *(number(x) for x in (largest["value"], largest["threshold"], *map(values.get, CHECKS))),
        f"{said['run']['seconds']:.0f}", f"{said['run']['peak_rss_mib']:.0f}",
    )  # fmt: skip


def number(value: float | None) -> str:
    """A KL, or a dash for what was not measured."""
    return "–" if value is None else f"{value:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=PRESETS, help="random weights instead of the sample")
    parser.add_argument("--layers", type=int, help="this many layers instead of all")
    parser.add_argument("--profile", default="smoke", choices=("smoke", "ci", "full"))
    parser.add_argument(
        "--length", type=int, help="one sequence of so many random ids instead of the profile's"
    )
    parser.add_argument("--dir", type=Path, default=Path(__file__).parent / "data")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if args.size is None:
            from g2kit.model.sample import sample_dir

            model = sample_dir()
        else:
            name = f"{args.size}-{args.layers}" if args.layers else args.size
            root = args.dir.absolute() / name
            make_source(args.size, root, args.layers, "safetensors")
            model = root / "hf"
        recording = Path(work) / "recording"
        what = ["--profile", args.profile]
        if args.length:
            what = ["--tokens", str(random_ids(Path(work) / "ids.npy", args.length))]
        made = g2verify("record", str(model), str(recording), "--config", str(model), *what)
        if made.returncode:
            sys.exit(made.stderr)
        print(line(*COLUMNS))
        print("|" + "---|" * len(COLUMNS))
        for runner, device, dtype in ROWS:
            print(row(recording, model, runner, device, dtype), flush=True)


if __name__ == "__main__":
    main()
