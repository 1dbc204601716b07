"""Held-out text: how well a model predicts it, the same figures for a run under way and for a finished model.

`evaluate` is what the loop of train.py calls: sums over all ranks. `measure` is for a finished model on one device: the
same figures, with standard errors, which need the loss of each row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from data import IGNORE, Batch, micro_batches, token_bytes
from model import GPT, LOGITS_PER_CHUNK
from nanoqwen.config import Config
from nanoqwen.distributed import World, all_reduce_sum, pick_device, pick_dtype
from nanoqwen.errors import ConfigError
from nanoqwen.routing import RoutingConfig, mean_stats, routed_by
from nanoqwen.tokenizer import Tokenizer
from nanoqwen.weights import CheckpointError, is_adapter, load_model, resolve

Section = TypeVar("Section")


def share_of(windows: list[Batch], world: World) -> list[Batch]:
    """A rank's windows. All ranks have equally many, because a sharded model runs on all of them or on none."""
    empty = windows[0]._replace(targets=torch.full_like(windows[0].targets, IGNORE))
    filled = [*windows, *[empty] * (-len(windows) % world.size)]
    return filled[world.rank :: world.size]


@torch.no_grad()
def evaluate(model: GPT, windows: list[Batch], bytes_of: Tensor, world: World, autocast: Any) -> dict[str, float]:
    """Validation loss in nats, perplexity and bits per byte, over a fixed list of windows shared among the ranks.

    Bits per byte: the bits of all targets, those that end documents and turns included, over the bytes of the text.
    """
    was_training = model.training
    model.eval()
    losses, counts, sizes = [], 0, 0
    figures: dict[str, Tensor] = {}  # of routers, summed over targets
    for window in share_of(windows, world):
        (micro,) = micro_batches(window, len(window.tokens), world.device)
        with autocast:
            out = model(micro.tokens, micro.targets, documents=micro.documents, at=micro.at)
        losses.append(out.loss.float())
        real = window.targets[window.targets != IGNORE]
        counts, sizes = counts + len(real), sizes + int(bytes_of[real].sum())
        for name, value in mean_stats(out.stats).items():
            if name.startswith("mean/"):
                figures[name] = figures.get(name, 0) + value * len(real)
    model.train(was_training)
    nats = torch.stack(losses).cpu().double().sum()  # an Apple GPU has no float64
    routed = torch.stack(list(figures.values())).tolist() if figures else []
    sums = torch.tensor([float(nats), counts, sizes, *routed], dtype=torch.float64)
    nats, count, size, *routed = all_reduce_sum(sums, world).tolist()
    loss = nats / count
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": nats / math.log(2) / max(1, size)}
    return result | {f"router/{name}": value / count for name, value in zip(figures, routed, strict=True)}


@torch.no_grad()
def calibrate(model: GPT, windows: list[Batch], tokens: int, device: torch.device, autocast: Any) -> None:
    """Set the thresholds of the causal routers, one layer after the other, on the first windows: the same on all ranks.

    With them the share of tokens that is computed is the capacity; the loss has no part in it.
    """
    length = windows[0].tokens.shape[1]
    rows = max(1, tokens // length)
    first = [torch.cat(list(parts))[:rows] for parts in zip(*(w[:2] for w in windows), strict=True)]
    documents = None
    if windows[0].documents is not None:
        documents = torch.cat([window.documents for window in windows])[:rows].to(device)
    ids, targets = (t.to(device) for t in first)
    was_training = model.training
    model.eval()
    with routed_by(model, "calibrate"), autocast:  # no logits are needed, but to know which tokens are padding
        model(ids, targets, documents=documents, at=torch.empty(0, dtype=torch.long, device=device))
    model.train(was_training)


def evaluate_routed(
    model: GPT, windows: list[Batch], bytes_of: Tensor, world: World, autocast: Any
) -> dict[str, float]:
    """`evaluate`; of a model with routers as it is used, and beside it as it trains, which looks ahead."""
    if model.routing is None:
        return evaluate(model, windows, bytes_of, world, autocast)
    if model.routing.calibrate_tokens:
        calibrate(model, windows, model.routing.calibrate_tokens, world.device, autocast)
    result = evaluate(model, windows, bytes_of, world, autocast)
    result["used"] = result.pop("router/mean/selected_fraction")
    with routed_by(model, "topk"):
        topk = evaluate(model, windows, bytes_of, world, autocast)
    for name in ("loss", "perplexity"):
        result |= {f"{name}_causal": result[name], f"{name}_topk": topk[name]}
    thresholds = {f"router/{n}/threshold": float(r.causal_router.threshold) for n, r in model.routers.items()}
    return result | {name: value for name, value in topk.items() if name.startswith("router/")} | thresholds


# --- a finished model -------------------------------------------------------------------------------------------------


class Finished(NamedTuple):
    """A model to be measured, computed as the runs of this project compute: weights as stored, under autocast."""

    folder: Path
    model: GPT
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype  # of the computation
    autocast: Any


def open_finished(cfg: Config) -> Finished:
    """The model of `eval.ckpt`; an adapter beside its base, as while it was trained: merging would round it."""
    folder = source_folder(cfg)
    device = pick_device(cfg.run.device)
    dtype, _ = pick_dtype(cfg.run.dtype, device)
    how = {"dtype": torch.float32, "merge": False} if is_adapter(folder) else {}
    model, tokenizer = load_model(folder, device, **how)
    if tokenizer is None:
        raise ConfigError(f"eval.ckpt: expected a model with a tokenizer, {folder} has none")
    plain = dtype == torch.float32
    autocast = nullcontext() if plain else torch.autocast(device.type, dtype)
    return Finished(folder, model.float() if plain else model, tokenizer, device, dtype, autocast)


def source_folder(cfg: Config) -> Path:
    if cfg.eval.ckpt is None:
        raise ConfigError("eval.ckpt: expected a run, a checkpoint or a Hugging Face folder, got nothing")
    return resolve(cfg.eval.ckpt)


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint is in, where it is in one."""
    folder = checkpoint if len(checkpoint.parents) > 1 else checkpoint.resolve()
    return folder.parents[1] if folder.parent.name == "checkpoints" else None


def figures_file(cfg: Config, folder: Path, name: str) -> Path:
    """Where figures go: the file that is named, else one in the run folder of a checkpoint, else in this folder."""
    path = (run_of(folder) or Path()) / name if cfg.eval.output is None else Path(cfg.eval.output)
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"eval.output: expected a file in a folder that exists, got {path}")
    return path


def json_text(value: Any) -> bytes:
    """With null for what is not finite, as in metrics.jsonl, and a word for what JSON has no form of."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {str(name): plain(each) for name, each in part.items()}
        if isinstance(part, (list, tuple)):
            return [plain(each) for each in part]
        part = part.item() if getattr(part, "shape", None) == () else part  # a number of numpy or torch
        if isinstance(part, float):
            return part if math.isfinite(part) else None
        return part if part is None or isinstance(part, (bool, int, str)) else str(part)

    return json.dumps(plain(value), indent=1).encode()


class Scored(NamedTuple):
    """Of each target [N], in their order."""

    nats: Tensor
    greedy: Tensor  # whether no token was likelier
    stats: dict[str, Tensor]  # of routers


@torch.no_grad()
def token_losses(model: GPT, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Scored:
    """tokens, targets [B, T], IGNORE where nothing is asked. At most LOGITS_PER_CHUNK logits exist at a time."""
    at = (targets != IGNORE).flatten().nonzero().squeeze(1)
    # Told that no logits are wanted, the model makes none; from the targets its routers know what is padding.
    out = model(tokens, targets, documents=documents, at=at[:0])
    rows = max(1, LOGITS_PER_CHUNK // model.cfg.vocab_size)
    hidden, wanted = out.hidden.flatten(0, 1)[at], targets.flatten()[at]
    nats, greedy = [], []
    for part, ids in zip(hidden.split(rows), wanted.split(rows), strict=True):
        logits = model.logits(part)
        nats.append(F.cross_entropy(logits, ids, reduction="none"))
        greedy.append(logits.argmax(-1) == ids)
    return Scored(torch.cat(nats), torch.cat(greedy), out.stats)


class Estimate(NamedTuple):
    """A ratio of sums over rows, and its standard error; None where there is but one row."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


def ratio(over: Tensor, under: Tensor) -> Estimate:
    """sum(over) / sum(under) of rows [R], drawn as wholes: the residuals of rows say how far it may be off."""
    rows, value = len(over), float(over.sum() / under.sum().clamp(min=1))
    if rows < 2:
        return Estimate(value, None)
    residuals = over - value * under
    return Estimate(value, float((rows / (rows - 1) * residuals.square().sum()).sqrt() / under.sum().clamp(min=1)))


class Measured(NamedTuple):
    loss: Estimate  # nats per token
    perplexity: Estimate
    bits_per_byte: Estimate
    tokens: int  # that were predicted
    bytes: int  # of their text
    rows: int
    used: float | None  # share of the tokens that routed layers computed; None: no layer is routed


def measure(model: GPT, windows: Sequence[Batch], bytes_of: Tensor, device: torch.device, autocast: Any) -> Measured:
    """As `evaluate`, with standard errors over the rows of the windows."""
    sums, used = [], 0.0
    for window in windows:
        (micro,) = micro_batches(window, len(window.tokens), device)
        with autocast:
            found = token_losses(model, micro.tokens, micro.targets, micro.documents)
        kept = window.targets != IGNORE
        row_of = kept.nonzero()[:, 0]
        each = torch.stack((found.nats.cpu().double(), bytes_of[window.targets[kept]].double()), dim=1)
        per_row = torch.zeros(len(kept), 2, dtype=torch.float64).index_add(0, row_of, each)
        sums.append(torch.cat((per_row, kept.sum(1, keepdim=True)), dim=1))
        used += float(mean_stats(found.stats).get("mean/selected_fraction", 0.0)) * len(row_of)
    nats, sizes, counts = torch.cat(sums).unbind(1)
    tokens = int(counts.sum())
    loss, bits = ratio(nats, counts), ratio(nats / math.log(2), sizes)
    perplexity = math.exp(min(loss.value, 700))
    spread = None if loss.error is None else perplexity * loss.error
    share = used / tokens if model.routing else None
    return Measured(loss, Estimate(perplexity, spread), bits, tokens, int(sizes.sum()), len(nats), share)


def measure_finished(of: Finished, windows: list[Batch], calibrating: bool = False) -> dict[str, Measured]:
    """By name: `loss`; of a model with routers `loss_causal`, as it is used, and `loss_topk`, which looks ahead.

    Thresholds stay as they are stored unless asked for otherwise: then they are set here, and not kept.
    """
    if calibrating and of.model.routing is None:
        raise ConfigError(f"eval.calibrate: expected a model with routed layers, {of.folder} has none")
    if calibrating:
        tokens = of.model.routing.calibrate_tokens or RoutingConfig().calibrate_tokens
        calibrate(of.model, windows, tokens, of.device, of.autocast)
    asked = (windows, token_bytes(of.tokenizer), of.device, of.autocast)
    if of.model.routing is None:
        return {"loss": measure(of.model, *asked)}
    causal = measure(of.model, *asked)
    with routed_by(of.model, "topk"):
        return {"loss_causal": causal, "loss_topk": measure(of.model, *asked)}


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """The configuration of the run that wrote a checkpoint, by section; empty where there was none."""
    try:
        config = json.loads((folder / "state.json").read_bytes())["config"]
        return {name: dict(section) for name, section in config.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def section(run: dict[str, dict[str, Any]], name: str, kind: type[Section]) -> Section:
    """A section of a recorded configuration; a key that is younger than the run has its default."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in run.get(name, {}).items()}
    try:
        return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"state.json: config: {name}: {error}") from None
