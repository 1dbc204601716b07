"""Files that are complete or absent: JSON, locks, atomic writes, hashes."""

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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from nanoqwen.errors import BusyError, CheckpointError, DiskError, UserError

FOLDER_MODE, FILE_MODE = 0o755, 0o644  # less what the umask takes
TEMPORARY = ".tmp-"  # prefix of what is still being written


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(path: Path, error: type[UserError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in a file; an `error` if it is missing, damaged or holds another value."""
    if is_special(path):
        raise error(f"{path}: expected a file, found a pipe or device")
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise error(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path}: not readable JSON: {reason}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def is_special(path: Path) -> bool:
    """True for a pipe, socket or device: opening one may wait for its other end for ever."""
    return path.exists() and not (path.is_file() or path.is_dir())


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if it is missing or damaged."""
    try:
        return read_json(path)
    except CheckpointError:
        return {}


def json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# --- locks ------------------------------------------------------------------------------------------------------------


@contextmanager
def lock(file: Path, busy: str | None = None) -> Iterator[None]:
    """Hold a lock file; the system releases it when the process ends, however it ends.

    busy: message of the BusyError if another process holds it; None: wait for it
    """
    with disk_errors(file.parent):
        make_folder(file.parent)
        descriptors = [os.open(file, os.O_RDWR | os.O_CREAT, FILE_MODE)]
    # A forked worker would hold the lock as well, and could outlive us.
    os.register_at_fork(after_in_child=lambda: descriptors and os.close(descriptors.pop()))
    try:
        with disk_errors(file):
            try:
                fcntl.flock(descriptors[0], fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError:
                raise BusyError(busy) from None
        yield
    finally:
        if descriptors:
            os.close(descriptors.pop())


# --- durable files ----------------------------------------------------------------------------------------------------


@contextmanager
def disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn errors of the disk into a DiskError of one line; libraries raise exceptions of their own for a full disk.

    needed: bytes that are about to be written
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:
        message = re.search(r"[^:(]*(?=\(os error \d+\))|No space left on device|Disk quota exceeded", str(error))
        if not isinstance(error, OSError) and not message:
            raise
        reason = error.strerror or str(error) if isinstance(error, OSError) else message[0].strip()
        if needed:
            reason += f"; needed {needed:,} bytes, free are {shutil.disk_usage(existing_parent(path)).free:,} bytes"
        raise DiskError(f"{path}: {reason}") from error


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for a file or a folder: renamed to `path` after the block, deleted if it fails."""
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        yield temporary
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which then becomes `folder`, readable for all; a CheckpointError if that exists."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: expected a new or empty folder")
    with complete_or_absent(folder) as temporary:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir(0o700)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written: {error.strerror}") from None
        yield temporary
        temporary.chmod(FOLDER_MODE)
        for file in temporary.iterdir():
            file.chmod(FILE_MODE)  # safetensors' files are private


def write_atomic(path: Path, data: bytes) -> None:
    """A reader sees the old contents or the new ones, even after a crash."""
    with disk_errors(path, len(data)):
        with complete_or_absent(path) as temporary:
            write_new(temporary, data)
        sync(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that does not exist yet, and wait until it is on the disk."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE), "wb") as file:
        file.write(data)
        sync_open(file)


def sync_open(file: BinaryIO) -> None:
    """Wait until the contents of an open file are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """With its parents, which mkdir(parents=True) would let everybody write to where the umask is 0."""
    for folder in (*reversed(path.parents), path):
        folder.mkdir(FOLDER_MODE, exist_ok=True)


def sha256_of(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
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
