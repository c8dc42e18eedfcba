"""Hashes of model folders: what they hold counts, where and when it was written does not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from switchgen import weights
from switchgen.errors import ModelError
from switchgen.weights import weights_hash


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(300_000))
    (folder / "config.json").write_text("{}")
    return folder


def test_copies_and_notes_do_not_count(model: Path, tmp_path: Path) -> None:
    before = weights_hash(str(model))
    copy = shutil.copytree(model, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (0, 0))
    (copy / "README.md").write_text("about")
    (copy / "switchgen.json").write_text('{"seconds": 1}')
    (copy / "checkpoint-1").mkdir()
    assert weights_hash(str(copy)) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_content_counts(model: Path, name: str) -> None:
    before = weights_hash(str(model))
    raw = bytearray((model / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (model / name).write_bytes(raw)
    assert weights_hash(str(model)) != before


def test_names_and_sizes_count(model: Path) -> None:
    before = weights_hash(str(model))
    (model / "model.safetensors").rename(model / "other.safetensors")
    renamed = weights_hash(str(model))
    with open(model / "other.safetensors", "ab") as stream:
        stream.write(b"\0")
    assert len({before, renamed, weights_hash(str(model))}) == 3


def test_large_files_by_blocks_from_end_to_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(weights, "_NUM_BLOCKS", 4)
    monkeypatch.setattr(weights, "_BLOCK_BYTES", 1000)
    path = model / "model.safetensors"
    raw = path.read_bytes()
    seen = []
    for place in (0, len(raw) - 1, len(raw) // 2):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        seen.append(weights_hash(str(model)))
    path.write_bytes(raw)
    before = weights_hash(str(model))
    assert [after != before for after in seen] == [True, True, False]


def test_hub_names_stand_for_themselves() -> None:
    assert weights_hash("org/model") == "org/model"
    assert weights_hash("org/model", "abc") == "org/model@abc"


def test_files_that_cannot_be_read_are_named(model: Path) -> None:
    """As such: they used to be files that cannot be written, which nobody had tried."""
    (model / "notes.json").symlink_to("/proc/self/mem")
    with pytest.raises(ModelError, match="model: cannot be read"):
        weights_hash(str(model))
