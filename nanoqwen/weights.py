"""Weights on disk: read the folders of published models, write folders that other tools load.

A source is a Hugging Face folder (one file or sharded), a checkpoint or run folder of this project, a hub id, or a GGUF
file. A folder may hold an adapter (PEFT's LoRA) instead of a model; it names its base, which is loaded with it.
Weights are safetensors; a pickle is read only through torch's `weights_only=True`, which runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model import GPT, ModelConfig
from nanoqwen import gguf_reader, lora
from nanoqwen.errors import CheckpointError, ConfigError, DataError, LoraError, warn
from nanoqwen.files import json_bytes, new_folder, read_json
from nanoqwen.hf_format import OWN_TYPE, config_from_hf, config_to_hf, from_hf, model_type, routing_from_hf, to_hf
from nanoqwen.lora import LoraConfig, apply_lora, load_lora, lora_state, merge_lora
from nanoqwen.routing import RoutingConfig, build_model, make_routers, routed_layers
from nanoqwen.sources import ADAPTER_CONFIG, HUB_ID, is_adapter, is_gguf, path_exists, resolve
from nanoqwen.tokenizer import Tokenizer, load_tokenizer

MOST_LISTED = 20  # tensors that a message names
READ_BYTES = 2**26  # weights are read in chunks of 64 MiB, so that a load needs little more memory than the model
SHARD_BYTES = 5 * 10**9  # size above which exported weights are split into several files, as transformers does
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # PEFT's name
# What we record about an adapter's base beside its name, in a file of its own: PEFT warns about unknown keys.
BASE_RECORD = "base.json"
PRUNED_TIMES = 20  # that a reader of a run under way tries the next checkpoint


# --- reading ----------------------------------------------------------------------------------------------------------


def config_of(source: str | Path) -> ModelConfig:
    """The shape of a source; nothing else of it is read."""
    folder = resolve(source)
    return _config(folder, _hf_config(folder))


def _hf_config(folder: Path) -> dict[str, Any]:
    return gguf_reader.hf_config(folder) if is_gguf(folder) else read_json(folder / "config.json")


def _config(folder: Path, hf: dict[str, Any]) -> ModelConfig:
    try:
        return config_from_hf(hf)
    except CheckpointError as error:
        if is_gguf(folder):
            raise CheckpointError(f"{folder}: {str(error).removeprefix('config.json: ')}") from None
        raise


def weight_files(folder: Path) -> list[Path]:
    if is_gguf(folder):
        return [folder]
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            names = weight_map.values() if isinstance(weight_map, dict) else [None]
            if not names or not all(isinstance(file, str) and Path(file).name == file for file in names):
                raise CheckpointError(f"{index}: weight_map: expected names of files in the same folder")
            files = [folder / file for file in sorted(set(names))]
        elif (folder / name).is_file():
            files = [folder / name]
        else:
            continue
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{folder}: missing weight files: {', '.join(missing)}")
        return files
    raise CheckpointError(f"{folder}: no model.safetensors, model.safetensors.index.json or pytorch_model.bin")


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """What safetensors' `safe_open` returns; a CheckpointError if the file is damaged. Its tensors are memory maps."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {str(error).splitlines()[0]}") from None


def safetensors_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype, as safetensors spells it, and shape of each tensor in a file; no weights are read."""
    with open_safetensors(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in slices.items()}


def stored_dtype(source: str | Path) -> torch.dtype:
    """The widest type of a source's numbers; of an adapter fp32, since it is merged into its base."""
    folder = resolve(source)
    if is_adapter(folder):
        return torch.float32
    dtypes = {meta.dtype for file in weight_files(folder) for _, meta, _ in _tensors(file) if meta.is_floating_point()}
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)


Reader = Callable[[torch.dtype | None, torch.device], Tensor]
_FLOAT_NUMBERS = "floating-point numbers of 16, 32 or 64 bits"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _tensors(file: Path) -> Iterator[tuple[str, Tensor, Reader]]:
    """(name, meta tensor, function that reads it) of every tensor in a file; no weights are read yet."""
    if is_gguf(file):
        yield from gguf_reader.tensors(file)
        return
    if file.suffix != ".safetensors":
        for name, tensor in _load_pickle(file).items():
            yield name, torch.empty_like(tensor, device="meta"), partial(_copy, tensor)
        return
    for name, (dtype, shape) in safetensors_header(file).items():
        # Anything but a float becomes an int here, and is refused by name later.
        meta = torch.empty(shape, dtype=_FLOATS.get(dtype, torch.int8), device="meta")
        yield name, meta, partial(_read_tensor, file, name, meta.shape)


def _copy(tensor: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    return tensor.to(device, dtype, copy=True)


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a GPT-2-era file. torch refuses anything but plain tensors, without running it."""
    try:
        # torch before 1.6 wrote no zip files, and only those can be mapped.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # the refusals of torch's unpickler have no common class
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file}: refused, not readable as plain tensors: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{file}: refused, expected a dictionary of tensors")
    return state


def _read_tensor(file: Path, name: str, shape: torch.Size, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """A copy of one stored tensor, because a file that shrinks under a memory map kills the process that reads it.

    It is read in chunks, each through a map of its own: the pages of a map count as memory until it is closed.
    """
    rows = max(1, READ_BYTES // (4 * max(1, shape[1:].numel())))
    if not shape or shape[0] <= rows:
        with safe_open(file, framework="pt") as opened:
            return _copy(opened.get_tensor(name), dtype, device)
    out = None
    for start in range(0, shape[0], rows):
        with safe_open(file, framework="pt") as opened:
            chunk = opened.get_slice(name)[start : start + rows]
            if out is None:
                out = torch.empty(shape, dtype=dtype or chunk.dtype, device=device)
            out[start : start + rows] = chunk
            del chunk
    return out


def load_model(
    source: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    merge: bool = True,
    routing: RoutingConfig | None = None,
    allow_mismatch: bool = False,
) -> tuple[GPT, Tokenizer | None]:
    """(model in eval mode, its tokenizer or None if the folder has none). dtype None: as stored.

    Missing, unexpected or mis-shaped tensors, or the tokenizer of another model, are a CheckpointError that lists
    them; with `allow_mismatch` they are a warning, and missing weights keep their random initial values.
    The source may be an adapter: it is merged into its base, or with merge=False kept apart, ready to train.
    With `routing` a dense source gets new routers, drawn from torch's generator, and nothing else may be missing.
    Routers stay in fp32 whatever the dtype: scores that round to equal ones would select by position.
    """
    for _ in range(PRUNED_TIMES):
        folder = resolve(source)
        try:
            return _load(folder, torch.device(device), dtype, merge, routing, allow_mismatch)
        except (CheckpointError, OSError, RuntimeError):  # as libraries say that a file is gone
            if folder.exists():
                raise  # else a run that goes on has deleted it while it was read: on to its next one
    raise CheckpointError(f"{source}: each checkpoint was deleted while it was read")


def _load(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    merge: bool,
    routing: RoutingConfig | None,
    allow_mismatch: bool,
) -> tuple[GPT, Tokenizer | None]:
    if is_adapter(folder):
        return _load_adapted(folder, device, dtype, merge, allow_mismatch)
    hf = _hf_config(folder)
    cfg, stored_routing = _config(folder, hf), routing_from_hf(hf)
    routing = _choose_routing(folder, cfg, stored_routing, routing)
    with torch.device("meta"):
        model = build_model(cfg, routing)
    new_routers = {} if stored_routing else make_routers(cfg, routing).state_dict(prefix="routers.")
    state, problems = _read_state(folder, hf["model_type"], model, dtype, device, new_routers)
    tokenizer = _read_tokenizer(folder, hf, cfg, problems)
    _report_problems(folder, problems, allow_mismatch, "loads what fits")
    dtypes = {tensor.dtype for name, tensor in state.items() if not name.startswith("routers.")}
    if len(dtypes) > 1:  # as stored, but all alike: half a layer in bf16 cannot be computed
        widest = max(dtypes, key=lambda kind: kind.itemsize)
        state = {name: tensor.to(widest) for name, tensor in state.items()}
    if len(state) < len(model.state_dict()):
        initial = build_model(cfg, routing)
        initial = initial.to(device=device, dtype=next(iter(state.values())).dtype if state else dtype).state_dict()
        state = {name: state.get(name, tensor) for name, tensor in initial.items()}
    model.load_state_dict(state, strict=True, assign=True)
    model.routers.float()
    return model.requires_grad_(True).eval(), tokenizer


def _report_problems(folder: Path, problems: list[str], allow_mismatch: bool, effect: str) -> None:
    if problems and not allow_mismatch:
        raise CheckpointError(f"{folder}: does not fit: {'; '.join(problems)} (--allow_mismatch {effect})")
    for problem in problems:
        warn(f"{folder}: {problem}")


def _choose_routing(
    folder: Path, cfg: ModelConfig, stored: RoutingConfig | None, requested: RoutingConfig | None
) -> RoutingConfig:
    """The routing of the source, or the requested one if the source is dense or routed in the same way."""
    if requested is None or requested.kind == "dense":
        return stored or RoutingConfig()
    try:
        here, there = (
            (r.kind, routed_layers(cfg, r), r.prior_factor, r.beta_mode == "learned", r.normalise)
            for r in (requested, stored or requested)
        )
    except ValueError as error:
        raise ConfigError(f"routing.kind {requested.kind}: {error}") from None
    if here != there:
        names = "(kind, layers, prior_factor, betas learned, normalise)"
        raise ConfigError(f"routing: {folder} has {names} {there}, got {here}")
    return requested


def _read_state(
    folder: Path,
    kind: str,
    model: GPT,
    dtype: torch.dtype | None,
    device: torch.device,
    new_routers: dict[str, Tensor],
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors that fit the model, problems). The source must not have tensors under the names of `new_routers`."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in new_routers}
    state: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in new_routers.items()}
    seen: set[str] = set()
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "twice": [], "mis-shaped": []}
    read_tied_head = None
    for file in weight_files(folder):
        for stored, meta, read in _tensors(file):
            if stored == "lm_head.weight" and stored not in expected:
                read_tied_head = read  # stored twice although tied: it must be the same matrix
                continue
            parts = _parts(kind, stored, meta)
            if not seen.isdisjoint(parts):
                problems["twice"].append(stored)
            seen.update(parts)
            if not parts.keys() <= expected.keys():
                problems["unexpected"].append(stored)
            elif wrong := [name for name, part in parts.items() if part.shape != expected[name]]:
                problems["mis-shaped"] += [
                    f"{name} {tuple(parts[name].shape)} instead of {tuple(expected[name])}" for name in wrong
                ]
            elif parts and not meta.is_floating_point():
                problems["mis-shaped"].append(f"{stored}, which does not hold {_FLOAT_NUMBERS}")
            elif parts:
                tensor = read(None if stored.startswith("routers.") else dtype, device)
                state.update((name, part.contiguous()) for name, part in from_hf(kind, stored, tensor))
    embedding = state.get("model.embed_tokens.weight")
    if read_tied_head and embedding is not None and not torch.equal(read_tied_head(dtype, device), embedding):
        text = "lm_head.weight, which differs from the embedding although tie_word_embeddings is true"
        problems["mis-shaped"].append(text)
    problems["missing"] = [name for name in expected if name not in seen]
    return state, [f"{problem}: {_listed(names)}" for problem, names in problems.items() if names]


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_LISTED
    return ", ".join(names[:MOST_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def _parts(kind: str, stored: str, meta: Tensor) -> dict[str, Tensor]:
    """Our tensors for a stored one. One that cannot be split keeps its name, and is reported as unexpected."""
    try:
        return dict(from_hf(kind, stored, meta))
    except (RuntimeError, ValueError):
        return {stored: meta}


def _read_tokenizer(folder: Path, hf: dict[str, Any], cfg: ModelConfig, problems: list[str]) -> Tokenizer | None:
    if not (gguf_reader.has_tokenizer(folder) if is_gguf(folder) else (folder / "tokenizer.json").is_file()):
        return None
    try:
        tokenizer = load_tokenizer(folder)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    if tokenizer.n_vocab > cfg.vocab_size:
        problems.append(f"tokenizer: its ids go up to {tokenizer.n_vocab - 1}, the model has {cfg.vocab_size}")
    recorded = str(hf.get("tokenizer_hash") or tokenizer.hash)
    if recorded != tokenizer.hash:
        problems.append(f"tokenizer: the model was trained with {recorded[:12]}, the folder has {tokenizer.hash[:12]}")
    return tokenizer


# --- adapters ---------------------------------------------------------------------------------------------------------


class Adapter(NamedTuple):
    """The contents of an adapter folder."""

    config: LoraConfig
    base: str  # folder or hub id, as PEFT understands it
    base_hash: str | None  # of the weights that it was trained on; None: not recorded (PEFT)
    tensors: dict[str, Tensor]  # under our names, on the CPU, as stored
    tied: bool  # an embedding among them is the head as well
    tokenizer_hash: str | None
    routing: RoutingConfig | None = None  # of the model, whose base may be dense


def read_adapter(folder: str | Path) -> Adapter:
    """An adapter written here or by PEFT; refused if a part of it would be computed differently here, or not at all."""
    folder = Path(folder)
    path = folder / ADAPTER_CONFIG
    hf = read_json(path)
    try:
        cfg = lora.from_peft(hf)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    base = hf.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{path}: base_model_name_or_path: expected a folder or hub id, got {base!r}")
    record = read_json(folder / BASE_RECORD) if (folder / BASE_RECORD).exists() else {}
    if not all(isinstance(record.get(key, ""), str) for key in ("sha256", "folder", "tokenizer_hash")):
        raise CheckpointError(f"{folder / BASE_RECORD}: expected strings, got {record}")
    if record.get("folder") and not path_exists(base) and path_exists(folder / record["folder"]):
        base = os.path.normpath(folder / record["folder"])  # base and adapter were moved together
    tensors = _read_adapter_tensors(folder, cfg)
    tied = hf.get("ensure_weight_tying") is True
    routing = routing_from_hf({"model_type": OWN_TYPE, "routing": record.get("routing")})
    return Adapter(cfg, base, record.get("sha256"), tensors, tied, record.get("tokenizer_hash"), routing)


def _read_adapter_tensors(folder: Path, cfg: LoraConfig) -> dict[str, Tensor]:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        pickled = "; adapter_model.bin is a pickle, which is not read" * (folder / "adapter_model.bin").exists()
        raise CheckpointError(f"{folder}: no {ADAPTER_WEIGHTS}{pickled}")
    tensors: dict[str, Tensor] = {}
    for stored, meta, read in _tensors(file):
        try:
            name = lora.from_peft_name(stored)
        except LoraError as error:
            raise CheckpointError(f"{file}: {error}") from None
        if not meta.is_floating_point():
            raise CheckpointError(f"{file}: {stored}: expected {_FLOAT_NUMBERS}")
        if name.endswith(".lora_A") and meta.shape[:1] != (cfg.rank,):  # before a wrong rank allocates anything
            raise CheckpointError(f"{file}: {stored}: expected {cfg.rank} rows as r says, got {tuple(meta.shape)}")
        tensors[name] = read(None, torch.device("cpu"))
    return tensors


def _load_adapted(
    folder: Path, device: torch.device, dtype: torch.dtype | None, merge: bool, allow_mismatch: bool
) -> tuple[GPT, Tokenizer | None]:
    adapter = read_adapter(folder)
    try:
        base = resolve(adapter.base)
        _expect_model(base)
        problems = _base_problems(adapter, base)
        model, tokenizer = load_model(base, device, dtype, routing=adapter.routing, allow_mismatch=allow_mismatch)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path: {error}") from None
    own = _read_tokenizer(folder, {"tokenizer_hash": adapter.tokenizer_hash}, model.cfg, problems)
    if own is not None and tokenizer is not None and own.hash == tokenizer.hash:
        own.stop_ids |= tokenizer.stop_ids  # PEFT's folders have no generation_config.json
    tokenizer = own or tokenizer
    _report_problems(folder, problems, allow_mismatch, "loads it all the same")
    cfg, tensors = _untie_head(model, adapter)
    try:
        with torch.random.fork_rng(devices=[]):  # the initial values of A are replaced
            apply_lora(model, cfg)
        load_lora(model, tensors)
    except LoraError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if merge:
        merge_lora(model)
    return model.eval(), tokenizer


def _expect_model(base: Path) -> None:
    if is_adapter(base):
        raise CheckpointError(f"{base}: is an adapter itself: `checkpoint.py export --merge` makes a model of it")


def _base_problems(adapter: Adapter, base: Path) -> list[str]:
    if adapter.base_hash is None or (base_hash := hash_weights(base)) == adapter.base_hash:
        return []
    return [f"base: trained on weights with hash {adapter.base_hash[:12]}, {base} has {base_hash[:12]}"]


def _untie_head(model: GPT, adapter: Adapter) -> tuple[LoraConfig, dict[str, Tensor]]:
    """PEFT trains a tied head and its embedding apart unless configured otherwise; then untie them here too.

    Returns the adapter's configuration and tensors, without the head if it stays tied.
    """
    head, embedding = (adapter.tensors.get(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    if model.lm_head is not None or (head is None and embedding is None):
        return adapter.config, adapter.tensors
    both = head is not None and embedding is not None
    alike = both and head.dtype == embedding.dtype and torch.equal(head, embedding)
    if alike or (adapter.tied and head is None):
        names = tuple(name for name in adapter.config.modules_to_save if name != "lm_head")
        tensors = {name: tensor for name, tensor in adapter.tensors.items() if name != "lm_head.weight"}
        return replace(adapter.config, modules_to_save=names), tensors
    shared = model.model.embed_tokens.weight
    with torch.device("meta"):
        model.lm_head = nn.Linear(model.cfg.hidden_size, model.cfg.vocab_size, bias=False)
    model.lm_head.weight = nn.Parameter(shared.detach().clone())
    model.cfg = replace(model.cfg, tie_word_embeddings=False)
    return adapter.config, adapter.tensors


def hash_weights(source: str | Path) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a source's tensors as stored, in whichever files."""
    folder = resolve(source)
    _expect_model(folder)
    readers = {name: read for file in weight_files(folder) for name, _, read in _tensors(file)}
    sha = hashlib.sha256()
    for name in sorted(readers):
        hash_tensor(sha, [name], readers[name](None, torch.device("cpu")))
    return sha.hexdigest()


def hash_tensor(sha: Any, names: list[str], tensor: Tensor) -> None:
    sha.update(json.dumps([*names, str(tensor.dtype), list(tensor.shape)]).encode())
    sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy())


def write_adapter(
    model: GPT,
    cfg: LoraConfig,
    base: str | Path,
    tokenizer: Tokenizer | None,
    folder: Path,
    *,
    base_hash: str | None = None,
    dtype: torch.dtype | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Fill an existing folder with a model's adapter, as PEFT loads it onto transformers' model of the same base.

    `base` is the folder or hub id that the model was loaded from, `base_hash` its `hash_weights` where the caller
    knows it already. Shapes whose layers transformers joins (GPT-2), or has no class for, keep our names: PEFT
    refuses those, and `export --merge` makes a model of them.

    state: the weights, where the model's own are sharded over several ranks
    """
    state = {name: tensor if state is None else state[name].detach() for name, tensor in lora_state(model).items()}
    tied = model.lm_head is None and "model.embed_tokens.weight" in state
    if tied:  # stored twice, as PEFT stores a tied pair
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    base_hash = base_hash or hash_weights(base)
    adapter = Adapter(cfg, str(base), base_hash, state, tied, None, model.routing)
    _fill_adapter_folder(folder, adapter, tokenizer, dtype)


def _fill_adapter_folder(
    folder: Path, adapter: Adapter, tokenizer: Tokenizer | None, dtype: torch.dtype | None
) -> None:
    base, record = adapter.base, {}
    if path_exists(base):
        where = resolve(base).resolve()
        base, record["folder"] = str(where), os.path.relpath(where, folder.resolve())
    if adapter.base_hash is not None:
        record["sha256"] = adapter.base_hash
    if adapter.routing is not None:
        record["routing"] = asdict(adapter.routing)
    if tokenizer is not None:
        tokenizer.save(folder)
        record["tokenizer_hash"] = tokenizer.hash
    tensors = {lora.to_peft_name(n): _to_cpu(n, t, dtype).contiguous() for n, t in adapter.tensors.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_bytes(json_bytes(lora.to_peft(adapter.config, base, tied=adapter.tied)))
    (folder / BASE_RECORD).write_bytes(json_bytes(record))


# --- writing ----------------------------------------------------------------------------------------------------------


def write_folder(
    model: GPT,
    tokenizer: Tokenizer | None,
    folder: Path,
    dtype: torch.dtype | None = None,
    state: dict[str, Tensor] | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Fill an existing folder with everything that transformers needs to load the model.

    state        the weights, where the model's own are sharded over several ranks
    shard_bytes  largest file of weights; None: SHARD_BYTES
    """
    if lora_state(model):
        raise ValueError("the model has adapters: merge_lora first, or write_adapter")
    kind = model_type(model)
    tensors = (model.state_dict() if state is None else state).items()
    state = to_hf(kind, {name: _to_cpu(name, t.detach(), dtype).contiguous() for name, t in tensors})
    stored = next(iter(state.values())).dtype
    _write_weights(state, folder, shard_bytes or SHARD_BYTES)
    hf = config_to_hf(model.cfg, stored, model.routing)
    if tokenizer is not None:
        hf |= {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.bos_id, "tokenizer_hash": tokenizer.hash}
        tokenizer.save(folder)
        generation = {"eos_token_id": sorted(tokenizer.stop_ids)}
        generation |= {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.eos_id}
        (folder / "generation_config.json").write_bytes(json_bytes(generation))
    (folder / "config.json").write_bytes(json_bytes(hf))


def _to_cpu(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In a dtype (None: its own); routers keep theirs."""
    return tensor.to("cpu", tensor.dtype if dtype is None or name.startswith("routers.") else dtype)


def _write_weights(state: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_bytes(json_bytes(index))


def export(
    model: GPT,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    *,
    shard_bytes: int | None = None,
    card: str | None = None,
) -> None:
    """Write a new folder, which appears under its name once it is complete.

    card: its README.md; None: only a note, if the model is routed
    """
    with new_folder(Path(folder)) as temporary:
        write_folder(model, tokenizer, temporary, dtype, shard_bytes=shard_bytes)
        if card is None and model.routing:
            card = f"# A model with routed layers\n\n{routing_note(model)}"
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")


def routing_note(model: GPT) -> str:
    return (
        f"Layers {', '.join(model.routers)} compute a fraction of the tokens (`{model.routing.kind}`; see `routing` in "
        "`config.json`); a causal router with a stored\nthreshold decides which. No class of transformers does that: "
        "computing all tokens there would be another model, with\nworse text. `python infer.py --ckpt FOLDER` and "
        "`load_model` of the program that wrote this folder load it.\n"
    )


def export_adapter(
    source: str | Path,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    *,
    base: str | None = None,
    describe: Callable[[GPT, Tokenizer | None], str] | None = None,
) -> None:
    """Write a new folder with the adapter of a source, after loading it onto its base.

    base      the id on the hub under which others find the base; None: the name that the adapter has for it
    describe  returns the README.md, given the model with its adapter and the tokenizer
    """
    adapter = read_adapter(resolve(source))
    if base is not None:
        if not HUB_ID.fullmatch(base) or path_exists(base):
            raise ConfigError(f"--base: expected an id on the hub (OWNER/NAME), got {base!r}")
        adapter = adapter._replace(base=base)
    model, tokenizer = load_model(source, merge=False)
    with new_folder(Path(folder)) as temporary:
        _fill_adapter_folder(temporary, adapter, tokenizer, dtype)
        if describe is not None:
            (temporary / "README.md").write_text(describe(model, tokenizer), encoding="utf-8")
