"""Shared by all tests: helper modules beside them are importable, hypothesis is deterministic."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample, recorded in little time; for reading, or to be copied."""
    from g2kit.model.sample import sample_dir
    from g2kit.verify.compare import record_model

    out = tmp_path_factory.mktemp("recording") / "r"
    record_model(sample_dir(), out, profile="smoke", floor=False)
    return out
