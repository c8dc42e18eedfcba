"""What the recipe's sections are made of."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

CONFIGS_DIR = Path(__file__).resolve().parents[2] / "configs"
DATA_DIR = Path(__file__).resolve().parents[2] / "data"

Dtype = Literal["auto", "float32", "float64", "bfloat16", "float16"]


class Section(BaseModel):
    """A part of the recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def base_url(text: str) -> str:
    """A server's base URL as it is.

    Raises:
        ValueError: it is none, such as localhost:8000, which clients take for something else than a server.
    """
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text!r} is no base URL; allowed: http://… or https://…, e.g. http://localhost:8000/v1")
    return text


def nearest(word: str, allowed: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
