"""Where models and tokenizers come from: a run or its checkpoint, a Hugging Face folder, a GGUF file, a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from nanoqwen.errors import CheckpointError
from nanoqwen.manifest import best_checkpoint, readable

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME
TOKENIZER_FILES = ("*.json", "*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors", "pytorch_model*.bin")


def resolve(source: str | Path, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """The folder, or the GGUF file, that a source means. One of our checkpoints is compared with its manifest first.

    files: what is fetched of a hub id
    """
    try:
        return _resolve(Path(source), files)
    except OSError as error:  # a name too long, a folder that is not ours to read
        raise CheckpointError(f"{source}: {error.strerror}") from None


def _resolve(folder: Path, files: tuple[str, ...]) -> Path:
    if (folder / "checkpoints").is_dir():
        return best_checkpoint(folder)
    if (folder / "config.json").is_file() or is_adapter(folder) or is_gguf(folder):
        return readable(folder)
    if folder.exists():
        kinds = "a folder with a config.json or with checkpoints/, an adapter, or a .gguf file"
        raise CheckpointError(f"{folder}: expected {kinds}")
    if HUB_ID.fullmatch(str(folder)) and not is_gguf_name(folder):
        return _download(str(folder), files)
    raise CheckpointError(f"{folder}: no such folder, and not a hub id (OWNER/NAME)")


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def is_gguf_name(path: Path) -> bool:
    return path.suffix == ".gguf"


def is_gguf(path: Path) -> bool:
    return is_gguf_name(path) and path.is_file()


def path_exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name too long, a folder that is not ours to read
        return False


def _download(hub_id: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises a dozen kinds, network libraries more
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{hub_id}: no such folder, and the hub could not be read: {reason}") from None
