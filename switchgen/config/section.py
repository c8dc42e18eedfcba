"""What the recipe's sections are made of."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

CONFIGS_DIR = Path(__file__).resolve().parents[2] / "configs"
DATA_DIR = Path(__file__).resolve().parents[2] / "data"

Dtype = Literal["auto", "float32", "float64", "bfloat16", "float16"]


class Section(BaseModel):
    """A part of the recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def nearest(word: str, allowed: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
