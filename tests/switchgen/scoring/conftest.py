"""The measuring script's tables and functions: the tests and the printed figures come from one place."""

from __future__ import annotations

from types import ModuleType

import pytest
from script_modules import load_script


@pytest.fixture(scope="session")
def measure() -> ModuleType:
    """scripts/measure_scoring.py as a module."""
    return load_script("measure_scoring")
