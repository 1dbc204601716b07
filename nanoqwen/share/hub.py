"""What of an exported folder is uploaded, and the upload: all of it in one commit.

The token of the hub comes from HF_TOKEN or `hf auth login`, never from an option, and is written nowhere.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from nanoqwen.errors import CheckpointError, ConfigError, one_line
from nanoqwen.hf_format import OWN_TYPE
from nanoqwen.runfolder import SECRET_TEXT
from nanoqwen.share.card import on_hub, public
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


class Parcel(NamedTuple):
    """What goes to the hub, and what of the folder stays."""

    files: list[Path]
    left_out: list[str]

    def __str__(self) -> str:
        rows = [f"  {file.stat().st_size:>15,}  {file.name}" for file in self.files]
        total = f"  {sum(file.stat().st_size for file in self.files):>15,}  bytes in {len(self.files)} files"
        return "\n".join([*rows, total, *(f"  left out: {name}" for name in self.left_out)])


def parcel(folder: Path) -> Parcel:
    """The files of an exported folder that is complete; a CheckpointError says why another is not shared."""
    export_first = f"`python checkpoint.py export {shlex.quote(str(folder))} NEW_FOLDER` writes what can be shared"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected an exported folder, got none")
    if (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{folder}: is a run: {export_first}")
    names = sorted(path.name for path in folder.iterdir())
    if found := [name for name in names if name in _TRAINER]:
        raise CheckpointError(f"{folder}: is a checkpoint with the state of its trainer ({found[0]}): {export_first}")
    if found := [name for name in names if Path(name).suffix in _PICKLES]:
        raise CheckpointError(f"{folder}: {found[0]} is a pickle, which can hold code: {export_first}")
    if found := [name for name in names if name.startswith((".tmp-", ".del-"))]:
        raise CheckpointError(f"{folder}: {found[0]} is half of something: {export_first}")
    if is_adapter(folder):
        base = read_adapter(folder).base
        if not on_hub(base):
            named = f"--base OWNER/NAME with its id on the hub, or --merge: {export_first}"
            raise CheckpointError(
                f"{folder}: an adapter of a base in a folder of this machine is of no use there: {named}"
            )
        weights = {ADAPTER_WEIGHTS}
    else:
        load_model(folder)  # all of it is there, is readable and fits together
        weights = {file.name for file in weight_files(folder)}
    unused = {name for name in names if name.endswith(".safetensors")} - weights
    wanted = [name for name in names if SHARED.fullmatch(name) and name not in unused and (folder / name).is_file()]
    _refuse_secrets(folder, wanted)
    return Parcel([folder / name for name in wanted], [name for name in names if name not in wanted])


def _refuse_secrets(folder: Path, names: list[str]) -> None:
    texts = [name for name in names if name.endswith((".json", ".md", ".jinja"))]
    for name in set(texts) - {"tokenizer.json", "model.safetensors.index.json"}:  # any text may stand in a vocabulary
        if found := SECRET_TEXT.search((folder / name).read_text(encoding="utf-8", errors="replace")):
            raise CheckpointError(f"{folder / name}: looks as if it held a secret: {found[0][:4]}...")


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
    folder does not have are deleted: a stale model.safetensors would be loaded before newer pieces.
    """
    check_repository(repository)
    files = parcel(Path(folder)).files
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
            raise ConfigError(f"{repository}: --private: is there already, and public: make it private in its settings")
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        there = {entry.rfilename for entry in api.model_info(repository, revision=revision).siblings or ()}
        stale = sorted(name for name in there - {file.name for file in files} if _WEIGHTS.fullmatch(name))
        operations = [CommitOperationAdd(file.name, file) for file in files] + [CommitOperationDelete(n) for n in stale]
        done = api.create_commit(
            repository, operations, commit_message=message or "Upload the model", revision=revision
        )
    except ConfigError:
        raise
    except Exception as error:  # the hub's client raises a dozen kinds, network libraries more
        raise _refusal(repository, error, get_token() or "") from None
    return str(done.commit_url)


def check_repository(repository: str) -> None:
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"push: expected OWNER/NAME, got {repository!r}")


# What the person can mend. The rest is for later: no network, a hub that fails.
_REFUSED = {
    401: "the token is not accepted (`hf auth login`, or HF_TOKEN, with a token that may write)",
    403: "forbidden: expected a token that may write there, and an owner that is you or your organisation",
    404: "no such owner, repository or branch",
    409: "a conflict: the name is taken, or something else was pushed meanwhile",
}


def _refusal(repository: str, error: BaseException, token: str) -> Exception:
    """One line for what a hub or the way to it says no with; the token is not in it."""
    status = None
    while status is None and error is not None:  # what an upload fails with is wrapped
        status = getattr(getattr(error, "response", None), "status_code", None)
        error, last = error.__cause__, error
    if status in _REFUSED:
        return ConfigError(f"{repository}: the hub says {status}: {_REFUSED[status]}")
    reason = public(one_line(str(last).strip() or type(last).__name__))[:300]
    return CheckpointError(f"{repository}: not shared: {reason.replace(token, '***') if token else reason}")
