"""Which checkpoints a run has, and whether one is still what was written: who writes and who reads ask here alone."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache, lru_cache
from pathlib import Path

from nanoqwen.errors import CheckpointError, warn
from nanoqwen.files import read_json, sha256_of

REPLACED = ".old-"  # prefix of a checkpoint that is about to be replaced by a new one of its step
# Files that a program could load as a part of the checkpoint; a README or a picture does no harm.
LOADABLE = {".json", ".safetensors", ".bin", ".pt", ".pth", ".jinja", ".model", ".py", ".txt"}
OF_TRAINING = ("optimizer.safetensors",)  # two thirds of the bytes, read by nothing but a resume


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) by rising step; after a kill between two renames the only copy has the name of a replaced one.

    Nothing else under `checkpoints/` is one, whatever it holds: copies, and folders of other names, are the user's.
    """
    parent = run / "checkpoints"
    paths = parent.iterdir() if parent.is_dir() else ()
    names = {path: re.fullmatch(rf"({re.escape(REPLACED)})?step-(\d{{8,}})", path.name) for path in paths}
    rows = sorted((int(name[2]), not name[1], path) for path, name in names.items() if name)
    return [(step, path) for step, _, path in rows]


def problem_of(folder: Path, *, hashes: bool = True, unread: Collection[str] = ()) -> str | None:
    """What is wrong with the files of a checkpoint, compared with its manifest. Of `unread` files the size alone."""
    manifest = folder / "manifest.json"
    try:
        entries = read_json(manifest).get("files")
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            return f"{manifest}: expected a table of files"
        for name, entry in entries.items():
            file = folder / name
            if Path(name).name != name:
                return f"{manifest}: expected names of files in the same folder, got {name!r}"
            if not file.is_file():
                return f"{file}: missing"
            if file.stat().st_size != entry.get("size"):
                return f"{file}: expected {entry.get('size')} bytes, got {file.stat().st_size}"
            if hashes and name not in unread and sha256_of(file) != entry.get("sha256"):
                return f"{file}: changed since it was written (SHA-256)"
        for file in sorted(folder.iterdir()):
            if file.suffix in LOADABLE and file.name not in {*entries, manifest.name}:
                return f"{file}: not part of this checkpoint, but could be loaded with it"
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError) as error:  # ValueError: a NUL in a name
        return f"{folder}: not readable: {error}"
    return None


def none_usable(run: Path) -> str:
    return f"{run}: none of its {len(checkpoints(run))} checkpoints is usable"


# --- for readers of weights -------------------------------------------------------------------------------------------


def readable(folder: Path) -> Path:
    """The folder, if it is none of our checkpoints or what a reader loads of it is what was written."""
    if (folder / "manifest.json").is_file() and (problem := _problem_for_readers(folder)):
        raise CheckpointError(problem)
    return folder


def best_checkpoint(run: Path) -> Path:
    """The whole checkpoint with the lowest validation loss, as the newest has recorded it; damaged ones are passed over
    with a warning each."""
    listed = checkpoints(run)
    if not listed:
        raise CheckpointError(f"{run}: no checkpoint under {run / 'checkpoints'}")
    for _, newest in reversed(listed):
        if problem := problem_of(newest, hashes=False):
            _warn_once(problem)
            continue
        for folder in dict.fromkeys((_best_of(newest), newest)):
            if problem := _problem_for_readers(folder):
                _warn_once(problem)
            else:
                return folder
    raise CheckpointError(none_usable(run))


def _best_of(newest: Path) -> Path:
    """As its state.json says, which is of the trainer's: read with care, since only its size has been compared."""
    try:
        best = read_json(newest / "state.json").get("best")
    except CheckpointError:
        return newest
    step = best.get("step") if isinstance(best, dict) else None  # None: not evaluated yet
    folder = newest.with_name(f"step-{step:08d}") if isinstance(step, int) else newest
    return folder if folder.is_dir() else newest  # pruned by hand


def _problem_for_readers(folder: Path) -> str | None:
    """`problem_of`, once for each state of the files: a command asks for its source several times."""
    try:
        stamps = tuple((path.name, stat.st_size, stat.st_mtime_ns) for path in sorted(folder.iterdir())
                       if (stat := path.stat()))  # fmt: skip
    except OSError as error:
        return f"{folder}: not readable: {error}"
    return _problem_at(folder, stamps)


@lru_cache(maxsize=64)
def _problem_at(folder: Path, stamps: tuple) -> str | None:
    return problem_of(folder, unread=OF_TRAINING)


@cache
def _warn_once(problem: str) -> None:
    warn(f"damaged checkpoint ignored: {problem}")
