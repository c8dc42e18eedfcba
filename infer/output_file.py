"""The output file of `switchgen infer`: put together from finished rows, whole, in input order, never over another's.

The work folder of an output notes the hash of every output file that was made from its rows. A file that is there and
is not among them is somebody else's (or was edited), and stays.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from switchgen.errors import ConfigError
from switchgen.files import json_line, storage, write_json
from switchgen.rundir import Run
from switchgen.trace import Query


def work_folder(run: Run, output: Path) -> Path:
    """Where the finished rows of an output file are kept: RUN/infer/<name>-<hash of its path>."""
    path = str(output.resolve())
    return run.dir / "infer" / f"{output.stem[:40]}-{hashlib.blake2b(path.encode(), digest_size=4).hexdigest()}"


def check_place(output: Path) -> None:
    """See that a file can be written here.

    Raises:
        ConfigError: it is a folder. StorageError: missing rights, a parent that is no folder, a full disk.
    """
    if output.is_dir():
        raise ConfigError(f"{output}: is a folder; --output names a file")
    with storage(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = output.with_name(f".{output.name}.{os.getpid()}.probe")
        probe.touch()
        probe.unlink()


def check_ours(output: Path, folder: Path, *, streamed: bool) -> None:
    """See that an output file that is there already is one that was made from this work folder.

    Args:
        streamed: lines went straight to the output; its hash is noted nowhere.

    Raises:
        ConfigError: it is not.
    """
    if not output.exists():
        return
    if not (folder / "stage.json").is_file():
        raise ConfigError(
            f"{output}: exists, and was not made in the run folder {folder.parents[1]}; nothing was overwritten. Use "
            "another --output, delete the file, or use the --run-dir it was made with"
        )
    if not streamed and _hash(output) not in _noted(folder):
        raise ConfigError(
            f"{output}: exists, and is not (or no longer) what was written there; nothing was overwritten. Use another "
            "--output, or delete the file: it is put together again from the finished rows"
        )


def output_line(query: Query, record: dict[str, Any]) -> dict[str, Any]:
    """A line of the output: the input's fields, then the response's."""
    return {**query.fields, **{key: value for key, value in record.items() if key != "id"}}


def assemble(output: Path, folder: Path, rows: Path, offsets: dict[str, int], queries: Sequence[Query]) -> None:
    """Write the output file in input order, as a whole or not at all.

    Args:
        rows: the shard of finished rows.
        offsets: where in it each row's line begins, in bytes.
    """
    part = output.with_name(f".{output.name}.part")
    digest = hashlib.blake2b(digest_size=16)
    with storage(output):
        try:
            with open(rows, "rb") as source, open(part, "wb") as stream:
                for query in queries:
                    source.seek(offsets[query.id])
                    line = json_line(output_line(query, json.loads(source.readline())))
                    digest.update(line)
                    stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            if output.exists() and _hash(output) == digest.hexdigest():
                return
            # Noted before the file appears: a kill in between must not make it a stranger's.
            write_json(folder / "output.json", {"schema": 1, "hashes": [*_noted(folder), digest.hexdigest()]})
            check_ours(output, folder, streamed=False)
            os.replace(part, output)
        finally:
            part.unlink(missing_ok=True)


def shard_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset in bytes, record) of each line of a shard."""
    offset = 0
    with storage(path), open(path, "rb") as stream:
        for line in stream:
            yield offset, json.loads(line)
            offset += len(line)


def _noted(folder: Path) -> list[str]:
    path = folder / "output.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["hashes"]) if path.is_file() else []


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with storage(path), open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
