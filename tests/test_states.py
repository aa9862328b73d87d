"""Hidden states in files, one after another, large enough that they are written past the page cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from g2kit.formats.errors import ConflictError
from g2kit.quant.states import States


@pytest.mark.parametrize("keep", [False, True])
def test_every_file_keeps_its_own_rows(tmp_path: Path, keep: bool) -> None:
    """A closed file's descriptor is the next one's: nothing may be written to the file before."""
    rows, width = 2048, 512  # 4 MiB
    last: States | None = None
    for i in range(4):
        states = States(tmp_path / f"{i}", rows, width, keep=keep, create=True)
        states.write(0, torch.full((rows, width), float(i)))
        states.sync()
        if last is not None:
            last.path.unlink()
            last.close()
        last = states
        assert float(states.read(0, rows).min()) == float(states.read(0, rows).max()) == i
        assert (tmp_path / f"{i}").read_bytes() == torch.full(
            (rows, width), float(i)
        ).numpy().tobytes()
    assert last is not None
    last.close()
    last.close()
    again = States(tmp_path / "3", rows, width, keep=keep, create=False)
    assert float(again.read(5, 6).sum()) == 3 * width
    again.close()
    with pytest.raises(ConflictError, match="have 4194304 bytes, expected 2097152"):
        States(tmp_path / "3", rows // 2, width, keep=keep, create=False)
