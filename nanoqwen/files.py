"""Files that are whole or not there: JSON, atomic writes, durable folders, locks, hashes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from nanoqwen.errors import BusyError, CheckpointError, DiskError, UserError

FOLDER_MODE, FILE_MODE = 0o755, 0o644  # less what the umask takes
READ_BYTES = 2**20
TEMPORARY = ".tmp-"  # unfinished


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(path: Path, error: type[UserError] = CheckpointError) -> dict[str, Any]:
    """The object of a file; what is missing, torn or another value is an error of this kind."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise error(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path}: not readable JSON: {reason}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json_if_any(path: Path) -> dict[str, Any]:
    """The object of a file; empty where there is none that is legible."""
    try:
        return read_json(path)
    except CheckpointError:
        return {}


def json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# --- one at a time ----------------------------------------------------------------------------------------------------


@contextmanager
def lock(file: Path, busy: str | None = None) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when the process ends, however it ends.

    busy: what to say where another process holds it; None: wait for it
    """
    with disk_errors(file.parent):
        make_folder(file.parent)
        held = [os.open(file, os.O_RDWR | os.O_CREAT, FILE_MODE)]
    # A forked worker would hold the lock as well, and could outlive us.
    os.register_at_fork(after_in_child=lambda: held and os.close(held.pop()))
    try:
        with disk_errors(file):
            try:
                fcntl.flock(held[0], fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError:
                raise BusyError(busy) from None
        yield
    finally:
        if held:
            os.close(held.pop())


# --- durable files ----------------------------------------------------------------------------------------------------


@contextmanager
def disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """What the disk refuses, as one line; libraries turn a full disk into exceptions of their own kinds."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:
        said = re.search(r"[^:(]*(?=\(os error \d+\))|No space left on device|Disk quota exceeded", str(error))
        if not isinstance(error, OSError) and not said:
            raise
        reason = error.strerror or str(error) if isinstance(error, OSError) else said[0].strip()
        exists = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = f"free are {shutil.disk_usage(exists).free:,} bytes"
        raise DiskError(
            f"{path}: {reason}; needed {needed:,} bytes, {free}" if needed else f"{path}: {reason}"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """The old contents or the new ones, whatever happens in between."""
    unfinished = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    with disk_errors(path, len(data)):
        try:
            write_new(unfinished, data)
            os.rename(unfinished, path)
            sync(path.parent)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def write_new(path: Path, data: bytes) -> None:
    """A new file, durable."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE), "wb") as file:
        file.write(data)
        sync_open(file)


def sync_open(file: BinaryIO) -> None:
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    if not path.is_dir():
        make_folder(path.parent)
        try:
            path.mkdir(FOLDER_MODE)
        except FileExistsError:  # made by another process meanwhile; a file of that name is an error
            if not path.is_dir():
                raise


def sha256_of(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def plain_json(value: Any) -> Any:
    """As JSON has it: null for what is not finite, a number for a tensor of one, text for other kinds of value."""
    if isinstance(value, dict):
        return {str(name): plain_json(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(part) for part in value]
    value = value.item() if getattr(value, "shape", None) == () else value  # of numpy or torch
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
