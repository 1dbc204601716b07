"""Before the first step: does a run fit into memory, how is a step cut into micro-batches, what is about to happen."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from model import GPT, ModelConfig, logits_per_chunk
from nanoqwen.config import (
    Config,
    FinetuneConfig,
    TrainConfig,
    check,
    check_context,
    load_config,
    preset_names,
    rate_from_scratch,
)
from nanoqwen.distributed import World, all_reduce_min, pick_device, pick_dtype
from nanoqwen.errors import ConfigError, say, warn
from nanoqwen.files import read_json_or_empty
from nanoqwen.flops import flops_per_token
from nanoqwen.log import Peak, Speed
from nanoqwen.lora import LoraConfig, apply_lora, keep_frozen_in
from nanoqwen.optim import parameter_groups
from nanoqwen.routing import RoutingConfig, build_model
from nanoqwen.runfolder import recorded_base
from nanoqwen.tokenizer import Tokenizer, load_tokenizer
from nanoqwen.weights import config_of, is_adapter, path_exists, read_adapter, resolve, stored_dtype

CPU_MICRO_TOKENS = 4_096  # tokens per forward at most: more do not fit into a CPU's caches ...
GPU_MICRO_TOKENS = 65_536  # ... and make a GPU no busier
MEMORY = Path("/proc/meminfo")
MIN_SAVING = 0.95  # a suggestion leaves at most this fraction of the memory needed before it
USABLE_SHARE = 0.8  # of the free memory is planned with
PUBLISHED_RATE, ADAPTER_RATE = 2e-5, 2e-4  # for weights that others have trained: in full, through adapters
NEW_ROUTER_RATE = 1e-3  # of routers that are new beside such weights
TOO_HIGH = 5  # times the rate of `auto` breaks most models (SmolLM2-135M-Instruct at 100 times: gone in 14 steps)
MOST_EPOCHS = 40  # after which repeated text teaches nothing (arXiv 2305.16264)
USUAL_MFU = 0.4  # with which a time is estimated
VOCAB_MULTIPLE = 128  # of which GPUs like the rows of a matrix
HEAP = 0.2  # measured: holes in the C library's heap between tensors that come and go, as a fraction of these


# --- what `auto` stands for -------------------------------------------------------------------------------------------


def shape_of_source(source: str | Path) -> ModelConfig:
    """The shape of a source; of an adapter that of its base."""
    folder = resolve(source)
    return shape_of_source(read_adapter(folder).base) if is_adapter(folder) else config_of(folder)


def model_shape(cfg: Config, tokenizer: Tokenizer | None = None) -> ModelConfig:
    """The shape of `model`, with a vocabulary for the tokenizer: the given one, else that of the configuration."""
    if cfg.model.vocab_size != "auto":
        return cfg.model
    ids = (tokenizer or load_tokenizer(cfg.data.tokenizer)).n_vocab
    return replace(cfg.model, vocab_size=-(-ids // VOCAB_MULTIPLE) * VOCAB_MULTIPLE)


def trained_here(source: str | Path) -> bool:
    """Whether all that these weights know comes from runs of this program, as their run folders say."""
    recorded = read_json_or_empty(resolve(source) / "state.json").get("config")
    if not isinstance(recorded, dict):
        return False
    base = recorded_base(recorded)
    return base is None or (path_exists(base) and trained_here(base))


def auto_rate(cfg: Config, loop: TrainConfig) -> float:
    """From scratch by width; half of that for a base from such a run; for published weights what is usual there."""
    if loop.base_ckpt is None:
        return rate_from_scratch(cfg.model.hidden_size)
    if trained_here(loop.base_ckpt):
        return rate_from_scratch(shape_of_source(loop.base_ckpt).hidden_size) / 2
    return ADAPTER_RATE if cfg.lora.rank else PUBLISHED_RATE


def base_dtype(cfg: Config, source: str | Path | None, computed: torch.dtype) -> torch.dtype:
    """Of the frozen matrices beside adapters. `auto`: as stored, where they are computed in that type and need no copy;
    without a source as published weights are. Ranks of fsdp gather weights of one type: fp32, as the adapters."""
    if not cfg.lora.rank:
        return torch.float32
    if cfg.lora.base != "auto":
        asked = getattr(torch, cfg.lora.base)
        if asked not in (torch.float32, computed):
            raise ConfigError(f"lora.base {cfg.lora.base}: expected float32 or run.dtype, got {computed}")
        return asked
    stored = computed if source is None else stored_dtype(source)
    return computed if stored == computed and cfg.run.parallel != "fsdp" else torch.float32


def settle(cfg: Config, section: str) -> Config:
    """The configuration of a script that trains, with its rates as numbers."""
    loop = getattr(cfg, section)
    if loop.base_ckpt is not None and cfg.routing.kind != "dense" and not trained_here(loop.base_ckpt):
        rates = {name: getattr(cfg.routing, name) or NEW_ROUTER_RATE for name in ("prior_lr", "mod_lr")}
        cfg = replace(cfg, routing=replace(cfg.routing, **rates))
    return replace(cfg, **{section: replace(loop, lr=auto_rate(cfg, loop))}) if loop.lr == "auto" else cfg


# --- bytes of each kind -----------------------------------------------------------------------------------------------


class Forward(NamedTuple):
    """What decides the memory of a forward, beside the model."""

    dtype: torch.dtype = torch.float32  # of the computation
    head: nn.Module | None = None  # trained beside the model
    target_fraction: float = 1.0  # of the positions that have a target: others get no logits
    isolated: bool = False  # documents of a row do not see each other, which takes a mask


def memory_estimate(
    model: GPT,
    train: TrainConfig,
    rows: int,
    forward: Forward = Forward(),  # noqa: B008
    shards: int = 1,
    *,
    accumulated: bool = False,
    bucketed: bool = False,
    device: str = "cpu",
) -> dict[str, float]:
    """Bytes on one device: weights, gradients and optimizer state, activations and logits of one micro-batch.

    Measured with torch's own kernels, not compiled; a compiler keeps less.

    model     its shape and which of its parameters train; it may be on the meta device
    rows      of a micro-batch; the three streams of a triplet are in rows like any other document
    shards    ranks among which weights, gradients and state are sharded
    accumulated  a step has several micro-batches, between which gradients are not sharded
    bucketed  gradients travel in buckets, which are a second copy of them
    device    its type
    """
    groups = parameter_groups(model, train, forward.head)
    sizes = {kind: sum(p.numel() for p in members.values()) for kind, members in groups.items()}
    trained, muon = sum(sizes.values()), sizes.get("muon", 0)
    head = sum(p.numel() for p in forward.head.parameters()) if forward.head is not None else 0
    activations = activation_bytes(model, train, rows, forward)
    logits = logit_bytes(model, train, rows, forward, device)
    in_flight = backward_bytes(model, train, rows, forward)
    # The gradients of the layers come as their activations go, so they fill holes in the heap.
    weights = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.requires_grad)
    holes = HEAP * (activations + in_flight + logits) - min(activations + in_flight, 4 * weights / shards)
    return {
        "weights": (sum(p.nbytes for p in model.parameters()) + 4 * head) / shards,
        "gradients": 4 * trained / (1 if accumulated else shards) * (2 if bucketed else 1),
        "gathered": gathered_bytes(model) if shards > 1 else 0.0,
        "optimizer": (8 * (trained - muon) + 4 * muon) / shards,
        "copies": copied_bytes(model, train, forward),
        "activations": activations,
        "logits": logits,
        "passing": in_flight + (max(0.0, holes) if device == "cpu" else 0.0),
    }


def layer_bytes(m: ModelConfig, seq_len: int, forward: Forward) -> float:
    """Kept for the backward of one layer and token.

    Two norms with their inputs, in fp32 whatever is computed in, and their outputs (6 E; half precision copies 2 E of
    them), q k v before and after the rotation, the attention's output, and the MLP's gate, up, silu and product.
    """
    q_size, kv_size = m.num_attention_heads * m.head_size, m.num_key_value_heads * m.head_size
    width = forward.dtype.itemsize
    layer = 4 * 4 * m.hidden_size + width * ((4 if width < 4 else 2) * m.hidden_size)
    layer += width * (3 * q_size + 4 * kv_size + 4 * m.intermediate_size)
    return layer + (width * seq_len if forward.isolated else 0)  # a row of the mask, which each layer keeps as numbers


def activation_bytes(model: GPT, train: TrainConfig, rows: int, forward: Forward) -> float:
    """Kept for the backward by all layers, of one micro-batch."""
    m, layer, layers = model.cfg, layer_bytes(model.cfg, train.seq_len, forward), float(model.cfg.num_hidden_layers)
    if model.routing is not None:  # of a routed layer the fraction that it computes, gathered and put back (4 E) ...
        fraction, surprise = model.routing.share, 0 if model.routing.kind == "mod" else 6
        # ... and, over all tokens, its output and what surprise is made of: updates, expected updates, differences
        around = 4 * (4 * fraction + 1 + surprise) * m.hidden_size / layer
        layers += len(model.routers) * (fraction + around - 1)
    kept = 4 * m.hidden_size * m.num_hidden_layers + layer if train.checkpoint_activations else layer * layers
    return rows * train.seq_len * kept


def backward_bytes(model: GPT, train: TrainConfig, rows: int, forward: Forward) -> float:
    """Gradients in flight in the backward of one layer."""
    m = model.cfg
    return rows * train.seq_len * (forward.dtype.itemsize * 4 * m.intermediate_size + 4 * 2 * m.hidden_size)


def logit_bytes(model: GPT, train: TrainConfig, rows: int, forward: Forward, device: str) -> float:
    """Logits of one chunk and their softmax in fp32, which becomes their gradient; of half precision logits, a copy."""
    logits = forward.target_fraction * rows * train.seq_len * model.cfg.vocab_size
    return (8 if forward.dtype.itemsize == 4 else 10) * min(logits, logits_per_chunk(torch.device(device)))


def copied_bytes(model: GPT, train: TrainConfig, forward: Forward) -> float:
    """Copies of weights in half precision, which autocast keeps until the backward."""
    m, width = model.cfg, forward.dtype.itemsize
    if width >= 4:
        return 0.0
    linear = [module.weight for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    copied = sum(weight.numel() for weight in linear if weight.dtype == torch.float32)
    per_pass = copied / (m.num_hidden_layers if train.checkpoint_activations else 1)
    head = model.get_output_embeddings().weight
    return width * (per_pass + (head.numel() if head.dtype == torch.float32 else 0))


def gathered_bytes(model: GPT) -> float:
    """Shards are whole while they are used: what is outside of the layers all the time, of these one and the next."""
    inside = sum(p.numel() for p in model.model.layers.parameters())
    outside = sum(p.numel() for p in model.parameters()) - inside
    return 4.0 * (outside + 2 * inside / model.cfg.num_hidden_layers)


def cache_bytes(model: GPT, tokens: int, dtype: torch.dtype) -> float:
    """Of the cache of one row; of routed layers the fraction that they compute, its slots, and a note on each token."""
    m, routing = model.cfg, model.routing
    layer = 2.0 * m.num_key_value_heads * m.head_size * dtype.itemsize * tokens
    if routing is None:
        return layer * m.num_hidden_layers
    history = 4 * (2 if routing.kind == "dtf" else 1) * tokens
    routed_layer = routing.share * (layer + 4 * tokens) + history
    return layer * (m.num_hidden_layers - len(model.routers)) + routed_layer * len(model.routers)


def free_memory(device: torch.device) -> float:
    """Bytes that a process can still have on a device; on the CPU, and where it cannot be asked, the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    if MEMORY.exists():  # Linux: with what its caches would give back
        available = re.search(r"^MemAvailable: +(\d+) kB", MEMORY.read_text(), re.MULTILINE)
        return 1024.0 * int(available[1]) if available else math.inf
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


# --- how a step is cut ------------------------------------------------------------------------------------------------


def rank_estimate(
    cfg: Config, model: GPT, train: TrainConfig, world: World, rows: int, forward: Forward
) -> dict[str, float]:
    """`memory_estimate` of one rank."""
    shards = world.size if cfg.run.parallel == "fsdp" else 1
    accumulated, bucketed = train.rows // world.size > rows, world.size > shards
    return memory_estimate(
        model, train, rows, forward, shards, accumulated=accumulated, bucketed=bucketed, device=world.device.type
    )


def largest_rows(
    cfg: Config, model: GPT, train: TrainConfig, world: World, forward: Forward, usable_bytes: float
) -> int:
    """Rows per forward: the largest divisor of a rank's rows that fits into memory, and on a CPU into its caches."""
    rank_rows = train.rows // world.size
    if train.micro_batch != "auto":
        return min(train.micro_batch, rank_rows)
    max_tokens = CPU_MICRO_TOKENS if world.device.type == "cpu" else GPU_MICRO_TOKENS
    fitting = [
        rows
        for rows in range(1, rank_rows + 1)
        if rank_rows % rows == 0
        and rows * train.seq_len <= max_tokens
        and sum(rank_estimate(cfg, model, train, world, rows, forward).values()) <= usable_bytes
    ]
    return max(fitting, default=1)


def micro_rows(cfg: Config, model: GPT, train: TrainConfig, world: World, forward: Forward = Forward()) -> int:  # noqa: B008
    """Rows per forward, the same on all ranks, which have to come to each gradient together."""
    usable_bytes = USABLE_SHARE * free_memory(world.device)
    return all_reduce_min(largest_rows(cfg, model, train, world, forward, usable_bytes), world)


GROUP_NAMES = {
    "muon": "matrices by Muon", "plain": "without", "prior": "of priors", "prior_norm": "of their norms",
    "surprise": "of surprise", "mod": "of scores", "causal": "of causal routers",
}  # fmt: skip


def print_plan(
    cfg: Config, model: GPT, train: TrainConfig, world: World, batches: Any, rows: int, forward: Forward,
    dtype_reason: str, peak: Peak,
) -> None:  # fmt: skip
    """What is about to happen, in seven lines."""
    size, dtype = sum(p.numel() for p in model.parameters()), str(forward.dtype).removeprefix("torch.")
    names = GROUP_NAMES | {"decay": f"with weight decay {train.weight_decay:g}"}
    groups = ", ".join(
        f"{len(members)} tensors ({sum(p.numel() for p in members.values()) / 1e6:.2f} M) {names[kind]}"
        for kind, members in parameter_groups(model, train, forward.head).items()
    )
    estimate = rank_estimate(cfg, model, train, world, rows, forward)
    bytes_by_kind = ", ".join(f"{kind} {count / 1e6:.0f} MB" for kind, count in estimate.items() if count)
    needed, free = sum(estimate.values()) / 1e9, free_memory(world.device) / 1e9
    micros = -(-train.rows // world.size // rows)
    flops = flops_per_token(model.cfg, model.routing, train.seq_len)
    parallel = f", {cfg.run.parallel}" if world.size > 1 else ""
    tokens = train.steps * train.batch_tokens
    epochs = f"{batches.epoch(train.steps):.2f} epochs" if batches.steps_per_epoch else "streamed"
    routed = ""
    if r := model.routing:
        routed = f"; {r.kind}: layers {', '.join(model.routers)} compute {100 * r.share:g} % of the tokens"
    say(f"device     {world.device} x {world.size}{parallel}, {dtype} ({dtype_reason})")
    say(f"model      {size / 1e6:.2f} M parameters, {flops / 1e6:.1f} MFLOP a token{routed}")
    say(f"optimizer  {groups}")
    say(f"memory     {bytes_by_kind}: {needed:.2f} of {free:.1f} GB free")
    say(f"step       {train.batch_tokens:,} tokens: {train.rows} rows of {train.seq_len} in {micros} x {rows} a rank")
    say(f"plan       {train.steps} steps, {tokens / 1e6:.2f} M tokens, "
        f"{tokens / size:.2g} per parameter, {epochs}, {train.schedule}, at most {train.lr:g}")  # fmt: skip
    say(f"MFU        matrix FLOPs, causal attention (full in brackets), over the peak: {peak.origin}")
    for warning in doubts(cfg, train, size, batches):
        warn(warning)


def doubts(cfg: Config, train: TrainConfig, parameters: int, batches: Any) -> Iterator[str]:
    """Where a run cannot do what it is for."""
    usual, tokens = auto_rate(cfg, train), train.steps * train.batch_tokens
    if train.lr > TOO_HIGH * usual:
        origin = "a model of this width from scratch" if train.base_ckpt is None else f"weights from {train.base_ckpt}"
        yield f"lr {train.lr:g} is {train.lr / usual:.0f} times what is usual for {origin}, {usual:g} (--lr auto)"
    if train.base_ckpt is None and tokens < parameters:
        yield (
            f"{tokens / 1e6:.2f} M tokens for {parameters / 1e6:.0f} M parameters: such a model learns little; about "
            "20 tokens per parameter are usual (more steps, or a smaller --preset)"
        )
    epochs = batches.epoch(train.steps) if batches.steps_per_epoch and not isinstance(train, FinetuneConfig) else 0
    if epochs > MOST_EPOCHS:
        yield f"{epochs:.0f} passes over the text: after about {MOST_EPOCHS} it teaches nothing more (fewer steps)"


def print_cost(train: TrainConfig, speed: Speed, checkpoint_bytes: int, keep: int) -> None:
    """What the steps of a run would cost."""
    flops = train.steps * train.batch_tokens * speed.causal
    seconds = flops / speed.peak / USUAL_MFU if speed.peak else None
    time = f": {duration(seconds)} at {USUAL_MFU:.0%} MFU, beside evaluations" if seconds else ""
    say(f"cost       {flops:.2g} FLOP{time}; {keep + 1} checkpoints of {readable(checkpoint_bytes)} at most")


def duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


# --- a run that may never happen: `bench.py memory` -------------------------------------------------------------------


@lru_cache(maxsize=4)
def _on_meta(model_cfg: ModelConfig, routing: RoutingConfig, lora: LoraConfig | None, base: torch.dtype) -> GPT:
    """Shapes alone. Most suggestions leave the model as it is, and one of 3 B parameters takes a second to build."""
    with torch.device("meta"):
        model = build_model(model_cfg, routing)
        if lora is not None:
            apply_lora(model, lora)
            keep_frozen_in(model, base)
    return model


class PlannedRun(NamedTuple):
    """A run as it would be, on `world.size` devices with `free_bytes` each; nothing of it is allocated."""

    cfg: Config
    section: str  # train or finetune
    world: World
    dtype: torch.dtype
    free_bytes: float

    @property
    def loop(self) -> TrainConfig:
        return getattr(self.cfg, self.section)

    @property
    def adapted(self) -> bool:
        """Whether it could train adapters: it starts from weights."""
        return self.section == "finetune" or self.loop.base_ckpt is not None

    @property
    def model(self) -> GPT:
        base = base_dtype(self.cfg, self.loop.base_ckpt, self.dtype)
        return _on_meta(self.cfg.model, self.cfg.routing, self.cfg.lora if self.adapted else None, base)

    @property
    def forward(self) -> Forward:
        isolated = self.section == "finetune" or self.cfg.data.isolate_documents
        return Forward(self.dtype, isolated=isolated)

    @property
    def rows(self) -> int:
        usable_bytes = USABLE_SHARE * self.free_bytes
        return largest_rows(self.cfg, self.model, self.loop, self.world, self.forward, usable_bytes)

    def bytes(self) -> dict[str, float]:
        return rank_estimate(self.cfg, self.model, self.loop, self.world, self.rows, self.forward)

    @property
    def fits(self) -> bool:
        return sum(self.bytes().values()) <= USABLE_SHARE * self.free_bytes

    def changed(self, section: str, **values: Any) -> PlannedRun:
        return self._replace(cfg=replace(self.cfg, **{section: replace(getattr(self.cfg, section), **values)}))


def plan_run(cfg: Config, section: str, ranks: int, device_type: str | None, free_bytes: float | None) -> PlannedRun:
    """Refused for all that the run itself would be, but for a dtype that another device than this one may have.

    device_type, free_bytes: of a device that may not be here; None: of this machine's
    """
    if section == "finetune" and cfg.finetune.objective == "contrast":
        raise ConfigError("finetune.objective: expected sft, contrast is not planned here: a run prints its needs")
    source = getattr(cfg, section).base_ckpt
    cfg = replace(cfg, model=model_shape(cfg) if source is None else shape_of_source(source))
    check(replace(cfg, run=replace(cfg.run, dtype="auto")), ranks, getattr(cfg, section))
    check_context(getattr(cfg, section), cfg.model)
    device = pick_device(cfg.run.device)
    if device_type in (None, device.type):
        dtype = pick_dtype(cfg.run.dtype, device)[0]
    else:  # an absent device cannot be asked which dtype it is fast in
        device = torch.device(device_type)
        usual = torch.bfloat16 if device_type == "cuda" else torch.float32
        dtype = usual if cfg.run.dtype == "auto" else getattr(torch, cfg.run.dtype)
        if free_bytes is None:
            raise ConfigError(f"--fit: expected the memory of the {device_type} device that is not here, such as 24GB")
    free_bytes = free_memory(device) if free_bytes is None else free_bytes
    return PlannedRun(cfg, section, World(0, 0, ranks, device), dtype, free_bytes)


def _shorter(seq_len: int) -> Callable[[PlannedRun], PlannedRun]:
    def change(run: PlannedRun) -> PlannedRun:
        loop = run.loop
        divides = loop.batch_tokens % seq_len == 0 and loop.batch_tokens // seq_len % run.world.size == 0
        return run.changed(run.section, seq_len=seq_len) if divides and seq_len < loop.seq_len else run

    return change


def _sharded(ranks: int) -> Callable[[PlannedRun], PlannedRun]:
    def change(run: PlannedRun) -> PlannedRun:
        if run.loop.optimizer == "muon" or run.loop.rows % ranks or ranks < run.world.size:  # Muon needs whole matrices
            return run
        return run.changed("run", parallel="fsdp")._replace(world=replace(run.world, size=ranks))

    return change


def _adapters(run: PlannedRun) -> PlannedRun:
    return run.changed("lora", rank=run.cfg.lora.rank or 16) if run.adapted else run


def _recompute(run: PlannedRun) -> PlannedRun:
    return run.changed(run.section, checkpoint_activations=True)


# (option, its price, the change), the mildest first
CHANGES: list[tuple[str, str, Callable[[PlannedRun], PlannedRun]]] = [
    ("--{}.micro_batch 1", "the same run, in more pieces", lambda run: run.changed(run.section, micro_batch=1)),
    ("--{}.checkpoint_activations", "the same run, a third more arithmetic", _recompute),
    ("--lora.rank 16", "another run: adapters alone are trained", _adapters),
    *[(f"--{{}}.seq_len {n}", "another run: shorter rows", _shorter(n)) for n in (4096, 2048, 1024, 512, 256, 128)],
    *[(f"--run.parallel fsdp on {n} devices", "the same run, shared out", _sharded(n)) for n in (2, 4, 8, 16, 32, 64)],
]


def suggestions(run: PlannedRun) -> Iterator[tuple[str, str, PlannedRun]]:
    """(option, its price, the run with it and those before), of the changes that save enough for their price."""
    needed = sum(run.bytes().values())
    for option, price, change in CHANGES:
        changed = change(run)
        reduced = sum(changed.bytes().values())
        if reduced < MIN_SAVING * needed:
            run, needed = changed, reduced
            yield option.format(run.section), price, run


UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str) -> float:
    """Bytes in `24GB` or `24 GiB`."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMGT]i?B)", text)
    if size is None or size[2] not in UNITS:
        raise ConfigError(f"--fit: expected a size such as 24GB or 16GiB, got {text!r}")
    return float(size[1]) * UNITS[size[2]]


def readable(count: float) -> str:
    """Bytes with three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} bytes"


def describe(run: PlannedRun) -> dict[str, Any]:
    """Print what a run needs on each device, and what to change until it fits; returns the same as numbers."""
    model, estimate, context = run.model, run.bytes(), run.model.cfg.context
    size, needed = sum(p.numel() for p in model.parameters()), sum(estimate.values())
    cache = cache_bytes(model, context, run.dtype)
    parallel = f", {run.cfg.run.parallel} on {run.world.size} devices" if run.world.size > 1 else ""
    print(f"{run.section}: {size / 1e6:.1f} M parameters, {str(run.dtype).removeprefix('torch.')}, "
          f"{run.loop.optimizer}, {run.rows} x {run.loop.seq_len} tokens in a forward, "
          f"{run.world.device.type}{parallel}")  # fmt: skip
    for kind, count in estimate.items():
        if count:
            print(f"  {kind:12} {readable(count):>10}")
    print(f"  {'in all':12} {readable(needed):>10}, which {'fits' if run.fits else 'does not fit'} into "
          f"{readable(run.free_bytes)}, of which {USABLE_SHARE:.0%} is planned with")  # fmt: skip
    print(f"generation: weights {readable(size * run.dtype.itemsize)}, cache {readable(cache / context)} a token, "
          f"{readable(cache)} for a row of {context:,}")  # fmt: skip
    numbers = {"parameters": size, "rows": run.rows, **estimate, "total": needed, "fits": run.fits, "cache": cache}
    return numbers if run.fits else numbers | {"until_it_fits": print_suggestions(run)}


def print_suggestions(run: PlannedRun) -> list[str]:
    """Print what to change, one after the other, until the run fits; returns the options, none if it never does."""
    print("each of these, with those above it:")
    options, changed = [], run
    for option, price, changed in suggestions(run):
        options.append(option)
        print(f"  {option:32} {readable(sum(changed.bytes().values())):>10}  {price}")
        if changed.fits:
            return options
    shapes = {name: load_config(["--preset", name], "train").model for name in preset_names()}
    smaller = [name for name, shape in shapes.items() if changed._replace(cfg=replace(changed.cfg, model=shape)).fits]
    print(f"no more to change: with all this --preset {smaller[-1]} fits" if smaller else "not even a tiny model fits")
    return []
