"""Before the first step: whether it will fit, in how many pieces a step is cut, and what is about to happen."""

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

from model import GPT, LOGITS_PER_CHUNK, ModelConfig
from nanoqwen.config import Config, TrainConfig
from nanoqwen.distributed import World, least
from nanoqwen.errors import say
from nanoqwen.log import Peak
from nanoqwen.lora import LoraConfig, apply_lora
from nanoqwen.optim import parameter_groups
from nanoqwen.routing import RoutingConfig, build_model, flops_per_token

CPU_MICRO_TOKENS = 4_096  # tokens per forward at most: more do not fit into a CPU's caches ...
GPU_MICRO_TOKENS = 65_536  # ... and make a GPU no busier
MEMORY = Path("/proc/meminfo")
WORTHWHILE = 0.95  # of the memory, at most, that a change has to leave
ROOM = 0.8  # of the memory that is free is planned with
HEAP = 0.2  # measured: holes that the C library's heap has between tensors that come and go, as a share of these


def memory_estimate(
    model: GPT,
    train: TrainConfig,
    rows: int,
    shards: int = 1,
    *,
    accumulated: bool = False,
    bucketed: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head: nn.Module | None = None,
    targets: float = 1.0,
    isolated: bool = False,
) -> dict[str, float]:
    """Bytes on one device: fp32 weights, gradients and optimizer state, activations and logits of one micro-batch.

    Measured with torch's own kernels, not compiled; a compiler keeps less.

    model     its shape and which of its parameters train; it may be on the meta device
    rows      of a micro-batch; the three streams of a triplet are in rows like any other document
    shards    ranks among which weights, gradients and state are spread
    accumulated  a step has several micro-batches, between which gradients are not shared out
    bucketed  gradients travel in buckets, which are a second copy of them
    device    its type
    dtype     of the computation
    head      what is trained beside the model
    targets   share of the positions that have one: others get no logits
    isolated  documents of a row do not see each other, which takes a mask
    """
    m, tokens = model.cfg, rows * train.seq_len
    sizes = {kind: sum(p.numel() for p in ps.values()) for kind, ps in parameter_groups(model, train, head).items()}
    beside = sum(p.numel() for p in head.parameters()) if head is not None else 0
    trained, muon = sum(sizes.values()), sizes.get("muon", 0)
    q_size, kv_size = m.num_attention_heads * m.head_size, m.num_key_value_heads * m.head_size
    # Bytes kept for the backward of one layer and token: two norms with their inputs, in fp32 whatever is computed in,
    # and their outputs (6 E; half precision copies 2 E of them), q k v before and after the rotation, the attention's
    # output, and the MLP's gate, up, silu and product.
    width, half = dtype.itemsize, dtype.itemsize < 4
    layer = 4 * 4 * m.hidden_size + width * ((4 if half else 2) * m.hidden_size)
    layer += width * (3 * q_size + 4 * kv_size + 4 * m.intermediate_size)
    if isolated:
        layer += width * train.seq_len  # a row of the mask, which each layer keeps as numbers
    layers = float(m.num_hidden_layers)
    if model.routing is not None:  # of a routed layer the share that it computes, gathered and put back (4 E) ...
        share, surprise = model.routing.share, 0 if model.routing.kind == "mod" else 6
        # ... and, over all tokens, its output and what surprise is made of: updates, what is expected, how they differ
        around = 4 * (4 * share + 1 + surprise) * m.hidden_size / layer
        layers += len(model.routers) * (share + around - 1)
    kept = 4 * m.hidden_size * m.num_hidden_layers + layer if train.checkpoint_activations else layer * layers
    activations = tokens * kept
    in_flight = tokens * (width * 4 * m.intermediate_size + 4 * 2 * m.hidden_size)  # gradients in one layer's backward
    blocks = sum(module.weight.numel() for module in model.model.layers.modules() if isinstance(module, nn.Linear))
    copied = blocks / (m.num_hidden_layers if train.checkpoint_activations else 1) + m.vocab_size * m.hidden_size
    logits = 3 * 4 * min(targets * tokens * m.vocab_size, LOGITS_PER_CHUNK)  # logits, softmax and gradient
    # The gradients of the layers come as their activations go, so they fill such holes.
    weights = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.requires_grad)
    # Shards are whole while they are used: what is outside of the layers all the time, of these one and the next.
    inside = sum(p.numel() for p in model.model.layers.parameters())
    outside = sum(p.numel() for p in model.parameters()) - inside
    gathered = 4.0 * (outside + 2 * inside / m.num_hidden_layers) if shards > 1 else 0.0
    holes = HEAP * (activations + in_flight + logits) - min(activations + in_flight, 4 * weights / shards)
    return {
        "weights": 4 * (sum(p.numel() for p in model.parameters()) + beside) / shards,
        "gradients": 4 * trained / (1 if accumulated else shards) * (2 if bucketed else 1),
        "gathered": gathered,
        "optimizer": (8 * (trained - muon) + 4 * muon) / shards,
        "copies": width * copied if half else 0.0,  # of weights, which autocast keeps until the backward
        "activations": activations,
        "logits": logits,
        "passing": in_flight + (max(0.0, holes) if device == "cpu" else 0.0),
    }


def free_memory(device: torch.device) -> float:
    """Bytes that a process can still have on a device; on the CPU, and where it cannot be asked, the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    if MEMORY.exists():  # Linux: with what its caches would give back
        found = re.search(r"^MemAvailable: +(\d+) kB", MEMORY.read_text(), re.MULTILINE)
        return 1024.0 * int(found[1]) if found else math.inf
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def cache_bytes(model: GPT, tokens: int, dtype: torch.dtype) -> float:
    """Of the cache of one row; of routed layers the share that they compute, its places, and a note on each token."""
    m, routing = model.cfg, model.routing
    layer = 2.0 * m.num_key_value_heads * m.head_size * dtype.itemsize * tokens
    if routing is None:
        return layer * m.num_hidden_layers
    notes = 4 * (2 if routing.kind == "dtf" else 1) * tokens
    routed = routing.share * (layer + 4 * tokens) + notes
    return layer * (m.num_hidden_layers - len(model.routers)) + routed * len(model.routers)


def estimate_for(cfg: Config, model: GPT, train: TrainConfig, world: World, rows: int, **how: Any) -> dict[str, float]:
    """The estimate for a rank; `how` is what else `memory_estimate` wants to know."""
    shards = world.size if cfg.run.parallel == "fsdp" else 1
    how |= {"accumulated": train.rows // world.size > rows, "bucketed": world.size > shards}
    return memory_estimate(model, train, rows, shards, device=world.device.type, **how)


def largest_rows(cfg: Config, model: GPT, train: TrainConfig, world: World, room: float, **how: Any) -> int:
    """Rows per forward: the largest share of a rank's rows that needs at most `room` bytes, and fits a CPU's caches."""
    own = train.rows // world.size
    if train.micro_batch != "auto":
        return min(train.micro_batch, own)
    most = CPU_MICRO_TOKENS if world.device.type == "cpu" else GPU_MICRO_TOKENS
    fitting = [
        rows
        for rows in range(1, own + 1)
        if own % rows == 0
        and rows * train.seq_len <= most
        and sum(estimate_for(cfg, model, train, world, rows, **how).values()) <= room
    ]
    return max(fitting, default=1)


def micro_rows(cfg: Config, model: GPT, train: TrainConfig, world: World, **how: Any) -> int:
    """Rows per forward on all ranks, which have to come to each gradient together. `how` is as in `estimate_for`."""
    return least(largest_rows(cfg, model, train, world, ROOM * free_memory(world.device), **how), world)


def routed(model: GPT) -> str:
    """The end of the line about the model, where layers are routed."""
    cfg = model.routing
    if cfg is None:
        return ""
    layers = ", ".join(model.routers)
    return f"; {cfg.kind}: layers {layers} compute {100 * cfg.share:g} % of the tokens"


def announce(
    cfg: Config,
    train: TrainConfig,
    world: World,
    model: GPT,
    batches: Any,
    rows: int,
    precision: str,
    peak: Peak,
    **how: Any,
) -> None:
    """What is about to happen, in seven lines; `how` is as in `estimate_for`."""
    size = sum(p.numel() for p in model.parameters())
    estimate = estimate_for(cfg, model, train, world, rows, **how)
    groups = parameter_groups(model, train, how.get("head"))
    named = {"muon": "matrices by Muon", "decay": f"with weight decay {train.weight_decay:g}", "plain": "without"}
    named |= {"prior": "of priors", "prior_norm": "of their norms", "surprise": "of surprise", "mod": "of scores"}
    named |= {"causal": "of causal routers"}
    micro = -(-train.rows // world.size // rows)
    flops = flops_per_token(model.cfg, model.routing, train.seq_len)
    parallel = f", {cfg.run.parallel}" if world.size > 1 else ""
    tokens = train.steps * train.batch_tokens
    epochs = f"{batches.epoch(train.steps):.2f} epochs" if batches.steps_per_epoch else "streamed"
    say(f"device     {world.device} x {world.size}{parallel}, {precision}")
    say(f"model      {size / 1e6:.2f} M parameters, {flops / 1e6:.1f} MFLOP a token{routed(model)}")
    say("optimizer  " + ", ".join(f"{len(m)} tensors ({sum(p.numel() for p in m.values()) / 1e6:.2f} M) {named[k]}"
        for k, m in groups.items()))  # fmt: skip
    say("memory     " + ", ".join(f"{k} {v / 1e6:.0f} MB" for k, v in estimate.items() if v)
        + f": {sum(estimate.values()) / 1e9:.2f} of {free_memory(world.device) / 1e9:.1f} GB free")  # fmt: skip
    say(f"step       {train.batch_tokens:,} tokens: {train.rows} rows of {train.seq_len} in {micro} x {rows} a rank")
    say(f"plan       {train.steps} steps, {tokens / 1e6:.2f} M tokens, "
        f"{epochs}, {train.schedule}, at most {train.lr:g}")  # fmt: skip
    say(f"MFU        matrix FLOPs, causal attention (full in brackets), over the peak: {peak.origin}")


# --- a run that may never happen --------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _on_paper(model_cfg: ModelConfig, routing: RoutingConfig, lora: LoraConfig | None) -> GPT:
    """Shapes alone. Most changes leave the model as it is, and one of 3 B parameters takes a second to put up."""
    with torch.device("meta"):
        model = build_model(model_cfg, routing)
        if lora is not None:
            apply_lora(model, lora)
    return model


class Case(NamedTuple):
    """A run as it would be, on `world.size` devices of `room` bytes each; nothing of it is allocated."""

    cfg: Config
    section: str  # train or finetune
    world: World
    dtype: torch.dtype
    room: float

    @property
    def loop(self) -> TrainConfig:
        return getattr(self.cfg, self.section)

    @property
    def model(self) -> GPT:
        return _on_paper(self.cfg.model, self.cfg.routing, self.cfg.lora if self.section == "finetune" else None)

    @property
    def rows(self) -> int:
        return largest_rows(self.cfg, self.model, self.loop, self.world, ROOM * self.room, **self.how)

    @property
    def how(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "isolated": self.section == "finetune" or self.cfg.data.isolate_documents}

    def bytes(self) -> dict[str, float]:
        return estimate_for(self.cfg, self.model, self.loop, self.world, self.rows, **self.how)

    @property
    def fits(self) -> bool:
        return sum(self.bytes().values()) <= ROOM * self.room

    def changed(self, section: str, **values: Any) -> Case:
        return self._replace(cfg=replace(self.cfg, **{section: replace(getattr(self.cfg, section), **values)}))


def _shorter(seq_len: int) -> Callable[[Case], Case]:
    def change(case: Case) -> Case:
        whole = case.loop.batch_tokens % seq_len == 0 and case.loop.batch_tokens // seq_len % case.world.size == 0
        return case.changed(case.section, seq_len=seq_len) if whole and seq_len < case.loop.seq_len else case

    return change


def _shared(ranks: int) -> Callable[[Case], Case]:
    def change(case: Case) -> Case:
        if (
            case.loop.optimizer == "muon" or case.loop.rows % ranks or ranks < case.world.size
        ):  # Muon needs whole matrices
            return case
        return case.changed("run", parallel="fsdp")._replace(world=replace(case.world, size=ranks))

    return change


# (option, its price, the change), the mildest first
CHANGES: list[tuple[str, str, Callable[[Case], Case]]] = [
    ("--{}.micro_batch 1", "the same run, in more pieces", lambda case: case.changed(case.section, micro_batch=1)),
    (
        "--{}.checkpoint_activations",
        "the same run, a third more arithmetic",
        lambda case: case.changed(case.section, checkpoint_activations=True),
    ),
    (
        "--lora.rank 16",
        "another run: adapters alone are trained",
        lambda case: case.changed("lora", rank=case.cfg.lora.rank or 16) if case.section == "finetune" else case,
    ),
    *[(f"--{{}}.seq_len {n}", "another run: shorter rows", _shorter(n)) for n in (4096, 2048, 1024, 512, 256, 128)],
    *[(f"--run.parallel fsdp on {n} devices", "the same run, shared out", _shared(n)) for n in (2, 4, 8, 16, 32, 64)],
]


def easier(case: Case) -> Iterator[tuple[str, str, Case]]:
    """(option, its price, the case with it and those before), of the changes that save something worth its price."""
    needed = sum(case.bytes().values())
    for option, price, change in CHANGES:
        changed = change(case)
        less = sum(changed.bytes().values())
        if less < WORTHWHILE * needed:
            case, needed = changed, less
            yield option.format(case.section), price, case
