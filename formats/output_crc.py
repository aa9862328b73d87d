"""Checksums that a plan leaves room for, filled in while the payload passes by."""

from __future__ import annotations

from collections.abc import Mapping

from .base import ContainerPlan, Crc32Patch, Slot
from .crc32 import PiecewiseCrc32
from .output_files import DataFiles

_BLOCK = 16 << 20


class Checksums:
    """CRC-32 of the slots that a plan's patches ask for. Thread-safe.

    Args:
        plan: checked by :func:`.output_ranges.check_plan`: such a slot lies in one chunk, whole.
        slots: by name.
        files: where payload and checksums are.
    """

    def __init__(self, plan: ContainerPlan, slots: Mapping[str, Slot], files: DataFiles) -> None:
        self._files = files
        self._patches: dict[str, list[Crc32Patch]] = {}
        for patch in plan.crc32:
            self._patches.setdefault(patch.slot, []).append(patch)
        self._chunks = {name: plan.chunks[name][0] for name in self._patches}
        self._sums = {name: PiecewiseCrc32(slots[name].nbytes) for name in self._patches}

    def update(self, slot: str, offset: int, data: memoryview) -> None:
        """Take bytes of ``slot`` that were written at the file's ``offset``."""
        if slot in self._sums:
            self._sums[slot].update(offset - self._chunks[slot].offset, data)
            self._store(slot)

    def finish(self) -> None:
        """Store what is missing; bytes an earlier run wrote are read back."""
        for slot, crc in self._sums.items():
            if all(
                self._files.has(p.file, o, o + 4) for p in self._patches[slot] for o in p.offsets
            ):
                continue
            chunk = self._chunks[slot]
            for start, stop in crc.gaps():
                for at in range(start, stop, _BLOCK):
                    part = memoryview(bytearray(min(_BLOCK, stop - at)))
                    self._files.read(chunk.file, part, chunk.offset + at)
                    crc.update(at, part)
            self._store(slot)

    def _store(self, slot: str) -> None:
        value = self._sums[slot].value
        if value is None:
            return
        data = memoryview(value.to_bytes(4, "little"))
        for patch in self._patches[slot]:
            for offset in patch.offsets:
                self._files.write(patch.file, data, offset)
