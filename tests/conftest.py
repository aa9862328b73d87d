"""Shared by all tests: helper modules beside them are importable, hypothesis is deterministic."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")
