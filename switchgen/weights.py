"""What a model folder holds, as a short hash: work is not gone on with after its models were trained anew."""

from __future__ import annotations

import hashlib
from pathlib import Path

from switchgen.config import CandidateConfig
from switchgen.errors import ModelError

_SUFFIXES = {".safetensors", ".bin", ".json", ".jinja", ".model"}
# Notes about a model, not the model.
_NOT_WEIGHTS = {"switchgen.json", "trainer_state.json", "README.json"}
_WHOLE_BYTES = 64 * 2**20
_NUM_BLOCKS = 256
_BLOCK_BYTES = 64 * 1024


def candidate_weights(config: CandidateConfig) -> str | list[str]:
    """`weights_hash` of a candidate's model, and of its adapter if it has one."""
    model = weights_hash(config.model, config.revision)
    return model if config.adapter is None else [model, weights_hash(config.adapter)]


def weights_hash(model: str, revision: str | None = None) -> str:
    """Hash of a local folder's weights, configuration and tokenizer; a hub name and its revision as they are.

    Files of more than 64 MiB are hashed by 256 blocks spread over them: training moves every weight, and 16 GB are not
    read to see that nothing moved.

    Raises:
        ModelError: a file cannot be read.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model if revision is None else f"{model}@{revision}"
    digest = hashlib.blake2b(digest_size=8)
    try:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in _SUFFIXES and path.name not in _NOT_WEIGHTS:
                size = path.stat().st_size
                digest.update(f"{path.name}\0{size}\0".encode())
                with open(path, "rb") as stream:
                    if size <= _WHOLE_BYTES:
                        digest.update(stream.read())
                        continue
                    for block in range(_NUM_BLOCKS):
                        stream.seek((size - _BLOCK_BYTES) * block // (_NUM_BLOCKS - 1))
                        digest.update(stream.read(_BLOCK_BYTES))
    except OSError as error:
        raise ModelError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()
