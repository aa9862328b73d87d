"""A run kept in a directory, so that another machine can be compared with it when both are not in one place.

>>> from g2kit.verify.recording import compare_recording, open_recording, record  # doctest: +SKIP
>>> with open_runner("torch", checkpoint) as runner:  # here  # doctest: +SKIP
...     record(runner, probes, "gemma2-2b.rec", checkpoint=checkpoint, floor=floor)
>>> with open_recording("gemma2-2b.rec") as r, open_runner("jax", "gemma2-2b") as there:  # doctest: +SKIP
...     result = compare_recording(r, there)
...     floor = r.floor.plus(floor_there)  # for claim X1: thresholds are its multiples
"""

from __future__ import annotations

from .recording_compare import compare_recording
from .recording_pair import compare_recordings
from .recording_read import Recording, is_recording, open_recording
from .recording_schema import SCHEMA
from .recording_write import check_output, record

__all__ = [
    "SCHEMA",
    "Recording",
    "check_output",
    "compare_recording",
    "compare_recordings",
    "is_recording",
    "open_recording",
    "record",
]
