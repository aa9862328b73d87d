"""One small conversion that exercises all of output.py, and what its result must be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from g2kit.formats import manifest as mf
from g2kit.formats.base import Chunk, ContainerPlan, Crc32Patch, FilePlan, Slot
from g2kit.formats.output import Output

from .plan_writer import materialise, random_array

F32, U8 = np.dtype("<f4"), np.dtype("u1")
PLAN_HASH = {"source": "g2:sha256:00", "dtype": "keep", "tool": "0.1.0"}
EXTRA = {"config.json": b'{"a": 1}\n'}
MANIFEST = mf.Manifest(
    tool_version="0.1.0",
    format="test",
    layout="test",
    dtype="f32",
    source_fingerprint="g2:sha256:" + "0" * 64,
    tensors={},
    files={},
)
SLOTS = (
    Slot("crc", F32, (6, 5)),
    Slot("grid", F32, (5, 7)),
    Slot("bytes", U8, (300,)),
    Slot("scalar", F32, ()),
    Slot("none", F32, (0, 3)),
)
PLAN = ContainerPlan(
    files=(
        FilePlan("a.bin", 400, ((0, b"HEAD" + bytes(8)), (390, b"END"))),
        FilePlan("sub/grid/b.bin", 3 * 4 * 16),
        FilePlan("sub/grid/c.bin", 3 * 4 * 16 + 1, ((192, b"!"),)),
        FilePlan("empty", 0),
        FilePlan("d.bin", 304),
    ),
    chunks={
        "crc": (Chunk((0, 0), (6, 5), "a.bin", 100),),
        # chunks of 3 x 4 that reach past the array's edge, two per file
        "grid": (
            Chunk((0, 0), (3, 4), "sub/grid/b.bin", 0),
            Chunk((0, 4), (3, 4), "sub/grid/b.bin", 64),
            Chunk((3, 0), (3, 4), "sub/grid/c.bin", 64),
            Chunk((3, 4), (3, 4), "sub/grid/c.bin", 0),
        ),
        "bytes": (Chunk((0,), (300,), "d.bin", 4),),
        "scalar": (Chunk((), (), "d.bin", 0),),
        "none": (Chunk((0, 0), (0, 3), "d.bin", 0),),
    },
    crc32=(Crc32Patch("crc", "a.bin", (6, 380)), Crc32Patch("none", "a.bin", (240,))),
)
ARRAYS = {s.name: random_array(k, s.dtype, s.shape) for k, s in enumerate(SLOTS)}
ONE_FILE = ContainerPlan((FilePlan("x", 304),), {"bytes": (Chunk((0,), (300,), "x", 2),)})


class Case:
    """What is written, and how: a directory or a single file, fresh or over an older output."""

    def __init__(self, *, single: bool = False, overwrite: bool = False, seed: int = 0) -> None:
        self.single, self.overwrite = single, overwrite
        self.plan = ONE_FILE if single else PLAN
        self.slots = [s for s in SLOTS if s.name in self.plan.chunks]
        self.arrays = {s.name: np.roll(ARRAYS[s.name], seed) for s in self.slots}
        self.plan_hash = PLAN_HASH | {"seed": str(seed)}

    def output(self, dst: Path, **options: Any) -> Output:
        options = {"background": False, "sync_bytes": 1, "overwrite": self.overwrite} | options
        if self.single:
            options |= {"single_file": "x"}
        else:
            options = {"extra": EXTRA} | options
        return Output(dst, self.plan, self.slots, self.plan_hash, **options)

    def run(
        self, dst: Path, between: Callable[[str], None] = lambda unit: None, **options: Any
    ) -> Output:
        """Convert; ``between`` is called before each unit."""
        with self.output(dst, **options) as out:
            for slot in self.slots:
                if slot.name in out.done:
                    assert out.done[slot.name] == {"rows": list(slot.shape)}
                    continue
                between(slot.name)
                for start, part in pieces(self.arrays[slot.name]):
                    out.write(slot.name, start, part)
                out.complete(slot.name, {"rows": list(slot.shape)})
            between("finish")
            out.finish(MANIFEST)
        return out

    def expected(self, directory: Path) -> dict[str, bytes]:
        """Every output file without the manifest, by a writer that shares no code."""
        materialise(self.plan, self.arrays, directory)
        for name, data in {} if self.single else EXTRA.items():
            (directory / name).write_bytes(data)
        return snapshot(directory)


def pieces(array: np.ndarray) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """The array in two boxes, the second half first."""
    if array.ndim == 0:
        return [((), array)]
    half, rest = len(array) // 2, (0,) * (array.ndim - 1)
    return [((half, *rest), array[half:]), ((0, *rest), array[:half])]


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file below ``root``, or the file itself."""
    if root.is_file():
        return {root.name: root.read_bytes()}
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }


def assert_sound(dst: Path) -> None:
    """Nothing at a final name fails its manifest."""
    if dst.is_dir():
        mf.check_files(dst, mf.load(dst / mf.NAME))
    elif (beside := dst.with_name(f"{dst.name}.{mf.NAME}")).exists():
        mf.check_files(dst, mf.load(beside))
