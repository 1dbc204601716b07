"""A run folder: its lock, its checkpoints, and what it records about the run.

A checkpoint is built under a hidden name, synced, and renamed when it is complete, so a crash at any moment leaves
only complete checkpoints. Its manifest holds the SHA-256 of every file and is checked before anything else is read:
of 3,000 single flipped bits 2,996 went unnoticed by safetensors itself. Everything is safetensors or JSON.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model import GPT
from nanoqwen import files
from nanoqwen.config import Config, flatten, to_dict
from nanoqwen.errors import ConfigError, DiskError, FormatError, NonFiniteError, ResumeError, warn
from nanoqwen.files import (
    TEMPORARY,
    complete_or_absent,
    disk_errors,
    existing_parent,
    json_bytes,
    make_folder,
    read_json,
    read_json_or_empty,
    sha256_of,
    sync,
    write_atomic,
    write_new,
)
from nanoqwen.manifest import REPLACED, checkpoints, none_usable, problem_of
from nanoqwen.redact import redact, redact_command
from nanoqwen.tokenizer import Tokenizer
from nanoqwen.weights import CheckpointError, hash_tensor, open_safetensors, safetensors_header, write_folder

FORMAT = 2  # of a checkpoint; raised when an older program would misread a newer one
DIGEST_KEYS = ("step", "lr", "cursor", "rng")  # of state.json: with the tensors they determine how a run continues
FILES_PER_CHECKPOINT = 16  # a dozen, and some to spare
DELETED = ".del-"  # prefix of what is being deleted
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "tiktoken", "datasets")


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is created if it does not exist."""
    with files.lock(run / ".lock", busy=f"{run}: busy, another run is writing to this folder"):
        yield


# --- writing a checkpoint ---------------------------------------------------------------------------------------------


def save(
    run: Path,
    step: int,
    *,
    model: GPT | Callable[[Path], None],
    tokenizer: Tokenizer | None,
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    best: int | None = None,
) -> tuple[Path, str]:
    """(folder, digest) of a new checkpoint, which is durable when this returns; older ones are then pruned.

    `model` is the model, or a function that writes its files into a folder. `state` is JSON; the format, the step,
    the tokenizer's hash and the versions of the libraries are added to it. The caller holds the lock.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    tensors = [*optimizer.values(), *(model.state_dict().values() if isinstance(model, nn.Module) else ())]
    with disk_errors(final.parent, sum(tensor.nbytes for tensor in tensors)):
        with complete_or_absent(final) as folder:
            make_folder(folder)
            if isinstance(model, nn.Module):
                write_folder(model, tokenizer, folder)
            else:
                model(folder)
            save_file(_own_memory(optimizer), folder / "optimizer.safetensors", metadata={"format": "pt"})
            _write_state(folder, step, tokenizer, state)
            _refuse_non_finite(folder, step)
            _write_manifest(folder)
            new_digest = digest(folder)
            _move_aside(final)
        sync(final.parent)
    try:
        _prune(run, step, keep, best)
    except OSError as error:  # the new checkpoint is saved
        warn(f"{final.parent}: not pruned: {error.strerror or error}")
    return final, new_digest


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and contiguous. The writer refuses tensors that share memory, so these become copies."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        out[name] = tensor
    return out


def _write_state(folder: Path, step: int, tokenizer: Tokenizer | None, state: dict[str, Any]) -> None:
    state = {"versions": versions(), "tokenizer_hash": tokenizer.hash if tokenizer else None} | state
    state |= {"format": FORMAT, "step": step, "tensors": inventory(folder)}
    if _has_nan(state):
        raise NonFiniteError(f"step {step}: the state of the trainer holds a NaN; nothing was saved")
    write_new(folder / "state.json", json_bytes(state))


def _has_nan(value: Any) -> bool:
    """Infinity is allowed: the best loss before the first evaluation."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_has_nan, value))
    return isinstance(value, float) and math.isnan(value)


def _refuse_non_finite(folder: Path, step: int) -> None:
    """One NaN spreads to all weights within a step; saved, it would cause the last clean checkpoint to be deleted."""
    for part, name, tensor in _tensors(folder):
        if not torch.isfinite(tensor.float() if tensor.is_floating_point() else tensor).all():
            raise NonFiniteError(f"step {step}: {part} {name} is not finite; nothing was saved")


def _write_manifest(folder: Path) -> None:
    """Sync the files in the folder, then list them; the manifest comes last."""
    paths = sorted(folder.iterdir())
    mode = stat.S_IMODE((folder / "state.json").stat().st_mode)  # ours: FILE_MODE less what the umask takes
    for path in paths:
        path.chmod(mode)  # libraries write files that all may change, or that only their owner may read
        sync(path)
    entries = {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
    write_new(folder / "manifest.json", json_bytes({"files": entries}).rstrip())  # so that its last byte counts, too
    sync(folder)


def _move_aside(final: Path) -> None:
    """Rename an existing checkpoint, damaged or not; `newest_valid` still finds it if we are killed before the next."""
    if final.exists():
        replaced = final.with_name(REPLACED + final.name)
        if replaced.exists():  # left by a run that was killed right after the next line
            os.rename(replaced, _doomed_name(replaced))
        os.rename(final, replaced)


def _doomed_name(path: Path) -> Path:
    return path.with_name(f"{DELETED}{secrets.token_hex(8)}")


def _prune(run: Path, step: int, keep: int, best: int | None) -> None:
    """Keep the newest `keep` up to `step`, and the best.

    Later ones stay until the run reaches them: they are damaged, or the user has resumed from an earlier step.
    Only sizes are compared here: reading all checkpoints at each save would take longer than the save.
    """
    steps = {number: folder for number, folder in checkpoints(run) if folder.name.startswith("step-")}
    complete = [n for n in sorted(steps, reverse=True) if n < step and not problem_of(steps[n], hashes=False)]
    wanted = {best, *[step, *complete][: max(1, keep)]}
    _delete_all([*(steps[n] for n in steps if n < step and n not in wanted), *_leftovers(run)])


def delete_leftovers(run: Path, in_use: Path | None = None) -> None:
    """Delete what killed saves and deletions have left, except a checkpoint that is in use."""
    _delete_all(path for path in _leftovers(run) if path != in_use)


def _leftovers(run: Path) -> list[Path]:
    paths = [path for path in run.iterdir() if path.name.startswith(TEMPORARY) and path.is_file()]
    paths += run.glob(f"{DELETED}*")
    prefixes = (TEMPORARY, DELETED, REPLACED)
    return paths + [path for path in _listed(run / "checkpoints") if path.name.startswith(prefixes)]


def _delete_all(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            _delete(path)
        except OSError as error:
            warn(f"{path}: not deleted: {error.strerror or error}")


def _delete(path: Path) -> None:
    if path.is_file():
        path.unlink()
        return
    if not path.name.startswith(DELETED):  # half a checkpoint must not look like one
        path = path.rename(_doomed_name(path))
    shutil.rmtree(path)


def clear(run: Path) -> None:
    """Prepare the folder of an old run for a new one: delete its checkpoints, metrics and reports."""
    with disk_errors(run):
        if (run / "checkpoints").exists():
            _delete(run / "checkpoints")
        reports = ("heldout.json", "tasks.json", "injection.json")  # of eval.py, about the deleted checkpoints
        for name in ("metrics.jsonl", "samples.jsonl", "report.html", "wandb-id", *reports):
            (run / name).unlink(missing_ok=True)


# --- reading a checkpoint ---------------------------------------------------------------------------------------------


def verify(folder: Path) -> str:
    """The digest of a complete checkpoint (of a run folder: its newest); else a CheckpointError says what is wrong.

    Changes nothing. Files that nobody would load may lie beside those of the manifest.
    """
    if (folder / "checkpoints").is_dir():
        listed = checkpoints(folder)
        if not listed:
            raise CheckpointError(f"{folder}: no checkpoint under {folder / 'checkpoints'}")
        folder = listed[-1][1]
    if problem := problem_of(folder):
        raise CheckpointError(problem)
    state = read_state(folder)
    name = re.fullmatch(r"step-(\d{8,})", folder.name)
    if name and int(name[1]) != state["step"]:
        raise CheckpointError(f"{folder}: renamed, its state.json is of step {state['step']}")
    return _digest(folder, state)


def newest_valid(run: Path) -> Path | None:
    """The complete checkpoint of the highest step, with one warning for each damaged one after it.

    None means that there never was one. If all are damaged, a fresh start would hide the loss: a CheckpointError.
    """
    listed = checkpoints(run)
    for _, folder in reversed(listed):
        try:
            verify(folder)
        except FormatError:
            raise
        except CheckpointError as error:
            warn(f"damaged checkpoint ignored: {error}")
        else:
            return folder
    if listed:
        raise CheckpointError(f"{none_usable(run)} (another run folder starts afresh)")
    return None


def load_trainer_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(optimizer tensors, state) of a checkpoint, bitwise as saved. `verify` it first."""
    state = read_state(folder)
    # Copies: a file that shrinks under a memory map kills the process that reads it.
    return {name: tensor.clone() for part, name, tensor in _tensors(folder) if part == "optimizer"}, state


def digest(folder: Path) -> str:
    """SHA-256 over the sorted names, dtypes, shapes and bytes of all tensors, and DIGEST_KEYS of the state.

    Equal digests mean the same training state to the bit, wherever and by which version it was written.
    """
    return _digest(folder, read_state(folder))


def _digest(folder: Path, state: dict[str, Any]) -> str:
    sha = hashlib.sha256()
    for part, name, tensor in _tensors(folder):
        hash_tensor(sha, [part, name], tensor)
    sha.update(json.dumps([state.get(key) for key in DIGEST_KEYS], sort_keys=True).encode())
    return sha.hexdigest()


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def read_state(folder: Path) -> dict[str, Any]:
    """state.json, if this version understands it and the tensors beside it are those that were saved."""
    path = folder / "state.json"
    state = read_json(path)
    number = state.get("format")
    if type(number) is not int:
        raise FormatError(f"{path}: expected format {FORMAT}, got {'none' if number is None else repr(number)}")
    if number != FORMAT:
        writer = "a newer version; update this one" if number > FORMAT else "an older version; use that one"
        raise FormatError(f"{path}: expected format {FORMAT}, got {number}, written by {writer}")
    if type(state.get("step")) is not int or not isinstance(state.get("tensors"), dict):
        raise CheckpointError(f"{path}: expected a step and a table of tensors")
    recorded, present = state["tensors"], inventory(folder)
    wrong = [
        f"{name} (expected {recorded.get(name, 'nothing')}, got {present.get(name, 'nothing')})"
        for name in sorted({*recorded, *present})
        if recorded.get(name) != present.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{folder}: other tensors than were saved: {', '.join(wrong[:3])}{more}")
    return state


def recorded_base(config: dict[str, Any]) -> str | None:
    """What a run of this configuration, as its state.json has it, began from; None: from nothing."""
    bases = ((config.get(loop) or {}).get("base_ckpt") for loop in ("finetune", "train"))
    return next(filter(None, bases), None)


def inventory(folder: Path) -> dict[str, str]:
    """Dtype and shape of each tensor of a checkpoint, by "part: name"."""
    headers = {file: safetensors_header(file) for file in sorted(folder.glob("*.safetensors"))}
    return {
        f"{_part(file)}: {name}": f"{dtype} {shape}"
        for file, header in headers.items()
        for name, (dtype, shape) in header.items()
    }


def _tensors(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """(part, name, tensor), sorted; the tensors live in a memory map."""
    files = folder.glob("*.safetensors")
    rows = sorted((_part(file), name, file) for file in files for name in safetensors_header(file))
    for file, group in itertools.groupby(rows, key=lambda row: row[2]):
        with open_safetensors(file) as opened:
            for part, name, _ in group:
                yield part, name, opened.get_tensor(name)


def _part(file: Path) -> str:
    """ "model", "optimizer", ...: the shards of a model are one part of the checkpoint."""
    return re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)


# --- resuming a run ---------------------------------------------------------------------------------------------------

# May differ between a run and its continuation without a word: changes no weight by more than rounding does.
MAY_CHANGE_ON_RESUME = re.compile(
    r"run\.(device|timeout|dir|resume|overwrite|dry_run|keep|save_every|parallel|allow_change)|data\.(cache_dir|workers)"
    r"|\w+\.(micro_batch|checkpoint_activations|compile|eval_every|eval_tokens|log_every|sample_tokens|skip_limit)"
)
MATTERS_TO_PLATEAU = re.compile(r"\w+\.(eval_every|eval_tokens)")  # and to patience: both count evaluations


def starting_point(cfg: Config) -> Path | None:
    """The checkpoint to resume from: the one that run.resume names, else the newest whole one; None: start anew."""
    run, resume = Path(cfg.run.dir), cfg.run.resume
    if resume not in ("auto", "never", "must"):
        if not Path(resume).is_dir() or (Path(resume) / "checkpoints").is_dir():
            raise ResumeError(f"run.resume: expected auto, never, must or a checkpoint's folder, got {resume!r}")
        verify(Path(resume))
        return Path(resume)
    if resume == "never" and cfg.run.overwrite:
        return None
    newest = newest_valid(run)
    if newest is None and resume == "must":
        raise ResumeError(f"{run}: run.resume is must, but there is no checkpoint")
    if newest is not None and resume == "never":
        raise ConfigError(f"{run}: run.resume is never, but {newest.name} is there (--run.overwrite deletes it)")
    return newest


def refuse_changes(cfg: Config, old: dict[str, Any], sections: Iterable[str]) -> dict[str, list[Any]]:
    """Differences from the configuration `old` of the run to be resumed, {key: [old, new]}; refused unless allowed."""
    before, after = (flatten({name: values[name] for name in sections}) for values in (old, to_dict(cfg)))
    plateau = any(after.get(f"{name}.schedule") == "plateau" or after.get(f"{name}.patience") for name in sections)
    changed = {
        key: [before.get(key), value]
        for key, value in after.items()
        if value != before.get(key)
        and (not MAY_CHANGE_ON_RESUME.fullmatch(key) or (plateau and MATTERS_TO_PLATEAU.fullmatch(key)))
    }
    refused = [key for key in changed if key not in cfg.run.allow_change or key.startswith(("model.", "routing."))]
    if refused:
        listed = ", ".join(f"{key} {changed[key][0]!r} -> {changed[key][1]!r}" for key in refused)
        raise ConfigError(
            f"{cfg.run.dir}: this run was started otherwise: {listed} (--run.dir for a new run, --run.allow_change KEY)"
        )
    return changed


# --- the disk ---------------------------------------------------------------------------------------------------------


def check_disk(run: Path, bytes_needed: int, keep: int) -> None:
    """Refuse a run whose checkpoints, `bytes_needed` each, will not fit: `keep` of them and the one being written.

    The space of this run's existing checkpoints counts as free, since the new ones replace them.
    """
    exists = existing_parent(run)
    paths = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
    needed = (keep + 1) * bytes_needed
    free = shutil.disk_usage(exists).free + sum(path.stat().st_size for path in paths)
    if free < needed:
        raise DiskError(f"{run}: {keep + 1} checkpoints need {needed:,} bytes, free are {free:,}")
    disk = os.statvfs(exists)
    needed, free = (keep + 1) * FILES_PER_CHECKPOINT, disk.f_favail + len(paths)
    if disk.f_files and free < needed:  # f_files is 0 where the file system does not count
        raise DiskError(f"{run}: {keep + 1} checkpoints need {needed} files, free are {free} (inodes)")


# --- status and source ------------------------------------------------------------------------------------------------


def write_status(run: Path, status: str, code: int, reason: str) -> None:
    """Write status.json; only a warning if that fails, which must not hide the error that ended the run."""
    try:
        write_atomic(run / "status.json", json_bytes({"status": status, "code": code, "reason": redact(reason)}))
    except DiskError as error:
        warn(f"status not recorded: {error}")


def read_status(run: Path) -> str | None:
    """`running`, `done`, ...; None if status.json is missing or damaged."""
    return read_json_or_empty(run / "status.json").get("status")


def source_record() -> dict[str, Any]:
    """The code, its libraries, the platform and the command of this run."""
    changes = _git("diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv")
    return {
        "commit": (_git("rev-parse", "HEAD") or b"").decode().strip() or None,
        "changes": hashlib.sha256(changes).hexdigest() if changes else None,  # null: none, or no git
        "versions": versions(),
        "platform": platform.platform(),
        "command": redact_command(sys.argv),
    }


@functools.cache
def versions() -> dict[str, str | None]:
    """Of Python and the libraries; None: not installed."""
    numbers: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            numbers[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            numbers[name] = None
    return numbers


def _git(*arguments: str) -> bytes | None:
    """Output of git in this program's folder; None without git or a repository."""
    command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
    try:
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
