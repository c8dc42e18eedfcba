"""Files that outlive a kill: written as a whole or not at all, shards of finished lines, and locks.

The system's refusals (a full disk, missing rights, no locks) end as messages that say where and what to do.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any

from switchgen.errors import DataError, SwitchgenError

logger = logging.getLogger("switchgen")

_SYNC_SECONDS = 2.0
_LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
_REFUSALS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG,
    errno.EDQUOT, errno.EFBIG,
}  # fmt: skip


class StorageError(SwitchgenError):
    """A file cannot be written or read: full disk, missing rights, another run at work."""


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn the system's refusals into messages that say where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageError(
                f"{path}: the disk is full. What is finished is kept; make room and start the same command again"
            ) from None
        if error.errno in _REFUSALS:
            raise StorageError(
                f"{path}: cannot be written ({error.strerror}); allowed: a path in a folder that you may write to"
            ) from None
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that it is either there as a whole or not at all."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(part, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def json_line(record: Mapping[str, Any]) -> bytes:
    """A record as one line of a JSONL file, also for readers that take U+0085, U+2028 and U+2029 for line breaks."""
    text = json.dumps(record, ensure_ascii=False)
    return text.translate(_LINE_BREAKS).encode() + b"\n"


@contextmanager
def finished_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block has succeeded; an older one is replaced."""
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    with storage(path):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        # A power cut must not leave the name without what the files hold.
        for file in part.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        # Two renames: no kill falls into the time that deleting a large folder takes.
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
        shutil.rmtree(old, ignore_errors=True)


class Shard:
    """An append-only JSONL file of finished work.

    A line counts once its line break is there; a torn last line is cut off when the shard is opened again. Lines go
    to the system at once (a killed process loses nothing) and to the disk every two seconds (a power cut loses
    little).
    """

    def __init__(self, path: Path, *, key: str = "id") -> None:
        self.path = path
        self.done: set[str] = set()
        with storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream: FileIO = open(path, "ab", buffering=0)  # noqa: SIM115
            raw = path.read_bytes()
            whole = raw.rfind(b"\n") + 1
            if whole < len(raw):
                logger.warning("%s: the last line was cut off by a kill; its work is done again", path)
                self._stream.truncate(whole)
        for number, line in enumerate(raw[:whole].splitlines(), start=1):
            try:
                self.done.add(str(json.loads(line)[key]))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
                self._stream.close()
                raise DataError(
                    f"{path}, line {number}: not a finished record with {key!r}: {line[:80]!r}; delete the line (its "
                    "work is done again) or the file"
                ) from None
        self._key = key
        self._synced = time.monotonic()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one finished record; after this call a kill does not lose it."""
        line = json_line(record)
        start = self._stream.seek(0, os.SEEK_END)
        with storage(self.path):
            try:
                written = 0
                while written < len(line):
                    written += self._stream.write(line[written:]) or 0
            except OSError:
                self._stream.truncate(start)
                raise
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._stream.fileno())
                self._synced = time.monotonic()
        self.done.add(str(record[self._key]))

    def close(self) -> None:
        """Bring everything to the disk."""
        with storage(self.path):
            if not self._stream.closed:
                os.fsync(self._stream.fileno())
                self._stream.close()

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hold(stream: IO[str], mode: int, folder: Path) -> None:
    """Lock an open file of a folder; the system lets go when the process ends, however it ends.

    Args:
        mode: of `fcntl.flock`.

    Raises:
        BlockingIOError: another process holds it, and the mode says not to wait.
        StorageError: the file system knows no locks.
    """
    try:
        fcntl.flock(stream, mode)
    except BlockingIOError:
        raise
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be locked ({error.strerror}); allowed: a --run-dir on a file system with locks (flock)"
        ) from None


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder for one run; the system releases it when the process ends, however it ends.

    Raises:
        StorageError: another process holds it.
    """
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / ".lock", "w")  # noqa: SIM115
    try:
        try:
            hold(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, folder)
        except BlockingIOError:
            raise StorageError(
                f"{folder}: another run is at work in this folder; wait for it, or use another --run-dir"
            ) from None
        yield
    finally:
        stream.close()
