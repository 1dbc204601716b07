"""What of an exported folder is uploaded, and the upload: all of it in one commit.

The token of the hub comes from HF_TOKEN or `hf auth login`, never from an option, and is written nowhere.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from nanoqwen.errors import CheckpointError, ConfigError, one_line
from nanoqwen.files import TEMPORARY
from nanoqwen.hf_format import OWN_TYPE
from nanoqwen.redact import SECRET_TEXT
from nanoqwen.runfolder import DELETED
from nanoqwen.share.card import is_hub_id, redact
from nanoqwen.weights import ADAPTER_WEIGHTS, BASE_RECORD, is_adapter, load_model, read_adapter, weight_files

# What an exported folder consists of. Anything else beside it stays here.
SHARED = re.compile(
    r"(generation_|tokenizer_|adapter_)?config\.json|tokenizer\.json|special_tokens_map\.json|chat_template\.jinja"
    r"|(adapter_)?model\.safetensors|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json"
    rf"|{re.escape(BASE_RECORD)}|README\.md|LICENSE(\.\w+)?|[\w.-]+\.gguf"
)
_WEIGHTS = re.compile(r"(adapter_)?(model|pytorch_model)\b.*\.(safetensors|bin|json)")  # stale ones would be loaded
_TRAINER = ("optimizer.safetensors", "state.json", "manifest.json")
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_REPOSITORY = re.compile(r"(?!.*(--|\.\.))\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


class UploadPlan(NamedTuple):
    """Which files of a folder are uploaded, and which names are left out."""

    files: list[Path]
    left_out: list[str]

    def __str__(self) -> str:
        rows = [f"  {file.stat().st_size:>15,}  {file.name}" for file in self.files]
        total = f"  {sum(file.stat().st_size for file in self.files):>15,}  bytes in {len(self.files)} files"
        return "\n".join([*rows, total, *(f"  left out: {name}" for name in self.left_out)])


def plan_upload(folder: Path) -> UploadPlan:
    """The files of an exported folder that is complete; a CheckpointError says why another is not shared."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected an exported folder, got none")
    names = sorted(path.name for path in folder.iterdir())
    if reason := _not_exported(names):
        command = f"`python checkpoint.py export {shlex.quote(str(folder))} NEW_FOLDER`"
        raise CheckpointError(f"{folder}: {reason}: {command} writes what can be shared")
    if is_adapter(folder):
        if not is_hub_id(read_adapter(folder).base):
            raise CheckpointError(
                f"{folder}: its base is a folder of this machine, so others cannot load this adapter: export it with "
                "--base OWNER/NAME (the id of its base on the hub) or with --merge"
            )
        weights = {ADAPTER_WEIGHTS}
    else:
        load_model(folder)  # an error unless all of it is there, is readable and fits together
        weights = {file.name for file in weight_files(folder)}
    unused = {name for name in names if name.endswith(".safetensors")} - weights
    shared = [name for name in names if SHARED.fullmatch(name) and name not in unused and (folder / name).is_file()]
    _refuse_secrets(folder, shared)
    return UploadPlan([folder / name for name in shared], [name for name in names if name not in shared])


def _not_exported(names: list[str]) -> str | None:
    """What tells that a folder with these names was not written by an export."""
    for name in names:
        if name == "checkpoints":
            return "is a run"
        if name in _TRAINER:
            return f"is a checkpoint with the state of its trainer ({name})"
        if Path(name).suffix in _PICKLES:
            return f"{name} is a pickle, which can hold code"
        if name.startswith((TEMPORARY, DELETED)):
            return f"{name} is incomplete"
    return None


def _refuse_secrets(folder: Path, names: list[str]) -> None:
    texts = [name for name in names if name.endswith((".json", ".md", ".jinja"))]
    for name in set(texts) - {"tokenizer.json", "model.safetensors.index.json"}:  # any text may stand in a vocabulary
        if secret := SECRET_TEXT.search((folder / name).read_text(encoding="utf-8", errors="replace")):
            raise CheckpointError(f"{folder / name}: seems to hold a secret: {secret[0][:4]}...")


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Upload an exported folder in one commit; returns the address of the commit.

    The repository, and the branch `revision`, are made where they are missing. Weights of an earlier upload that the
    folder does not have are deleted: a stale model.safetensors would be loaded instead of newer shards.
    """
    check_repository(repository)
    files = plan_upload(Path(folder)).files
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    except ImportError:
        raise CheckpointError("push needs huggingface_hub: pip install huggingface_hub") from None
    if get_token() is None:
        raise ConfigError("push: expected a token of the hub, got none: `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name=OWN_TYPE)
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise ConfigError(
                f"{repository}: --private: exists already, and is public: make it private in its settings"
            )
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        remote = {entry.rfilename for entry in api.model_info(repository, revision=revision).siblings or ()}
        stale = sorted(name for name in remote - {file.name for file in files} if _WEIGHTS.fullmatch(name))
        operations = [*(CommitOperationAdd(file.name, file) for file in files), *map(CommitOperationDelete, stale)]
        message = message or "Upload the model"
        commit = api.create_commit(repository, operations, commit_message=message, revision=revision)
    except ConfigError:
        raise
    except Exception as error:  # the hub's client raises a dozen kinds, network libraries more
        raise _upload_error(repository, error, get_token() or "") from None
    return str(commit.commit_url)


def check_repository(repository: str) -> None:
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"push: expected OWNER/NAME, got {repository!r}")


# What the user can mend. Other failures are temporary: no network, an error of the hub.
_REFUSALS = {
    401: "the token is not accepted (`hf auth login`, or HF_TOKEN, with a token that may write)",
    403: "forbidden: expected a token that may write there, and an owner that is you or your organisation",
    404: "no such owner, repository or branch",
    409: "a conflict: the name is taken, or something else was pushed meanwhile",
}


def _upload_error(repository: str, error: BaseException, token: str) -> Exception:
    """One line for what the hub or the network answered; it does not contain the token."""
    status = None
    while status is None and error is not None:  # the client wraps the error of a failed upload
        status = getattr(getattr(error, "response", None), "status_code", None)
        error, last = error.__cause__, error
    if status in _REFUSALS:
        return ConfigError(f"{repository}: the hub answers {status}: {_REFUSALS[status]}")
    reason = redact(one_line(str(last).strip() or type(last).__name__))[:300]
    return CheckpointError(f"{repository}: not shared: {reason.replace(token, '***') if token else reason}")
