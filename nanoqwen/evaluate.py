"""Held-out text: how well a model predicts it, measured alike in a run and for a finished model.

`evaluate` is what the loop of train.py calls: sums over all ranks. `measure` is for a finished model on one device: the
same metrics with standard errors, which need the loss of each row.
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
from model import GPT, logits_per_chunk
from nanoqwen.config import Config
from nanoqwen.distributed import World, all_reduce_sum, pick_device, pick_dtype
from nanoqwen.errors import ConfigError
from nanoqwen.files import plain_json
from nanoqwen.quantize import quantize_model
from nanoqwen.routing import RoutingConfig, mean_stats, routing_mode
from nanoqwen.tokenizer import Tokenizer
from nanoqwen.weights import CheckpointError, is_adapter, load_model, resolve

Section = TypeVar("Section")


def windows_of_rank(windows: list[Batch], world: World) -> list[Batch]:
    """This rank's windows, padded with empty ones so that all ranks run equally many forwards (FSDP)."""
    empty = windows[0]._replace(targets=torch.full_like(windows[0].targets, IGNORE))
    filled = [*windows, *[empty] * (-len(windows) % world.size)]
    return filled[world.rank :: world.size]


@torch.no_grad()
def evaluate(model: GPT, windows: list[Batch], bytes_of: Tensor, world: World, autocast: Any) -> dict[str, float]:
    """Validation loss in nats per target, perplexity and bits per byte, over a fixed list of windows split among ranks.

    Bits per byte: the bits of all targets, those that end documents and turns included, over the bytes of the text.
    """
    was_training = model.training
    model.eval()
    losses, counts, sizes = [], 0, 0
    router_sums: dict[str, Tensor] = {}  # over targets
    for window in windows_of_rank(windows, world):
        (micro,) = micro_batches(window, len(window.tokens), world.device)
        with autocast:
            out = model(micro.tokens, micro.targets, documents=micro.documents, at=micro.at)
        losses.append(out.loss.float())
        real = window.targets[window.targets != IGNORE]
        counts, sizes = counts + len(real), sizes + int(bytes_of[real].sum())
        for name, value in mean_stats(out.stats).items():
            if name.startswith("mean/"):
                router_sums[name] = router_sums.get(name, 0) + value * len(real)
    model.train(was_training)
    nats = torch.stack(losses).cpu().double().sum()  # an Apple GPU has no float64
    routed = torch.stack(list(router_sums.values())).tolist() if router_sums else []
    sums = torch.tensor([float(nats), counts, sizes, *routed], dtype=torch.float64)
    nats, count, size, *routed = all_reduce_sum(sums, world).tolist()
    loss = nats / count
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": nats / math.log(2) / max(1, size)}
    return result | {f"router/{name}": value / count for name, value in zip(router_sums, routed, strict=True)}


@torch.no_grad()
def calibrate(model: GPT, windows: list[Batch], tokens: int, device: torch.device, autocast: Any) -> None:
    """Set the thresholds of the causal routers, layer by layer, on the first windows: the same on all ranks.

    With them the fraction of tokens that is computed is the capacity; the loss plays no part.
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
    with routing_mode(model, "calibrate"), autocast:  # no logits are needed; the targets say which tokens are padding
        model(ids, targets, documents=documents, at=torch.empty(0, dtype=torch.long, device=device))
    model.train(was_training)


def evaluate_routed(
    model: GPT, windows: list[Batch], bytes_of: Tensor, world: World, autocast: Any
) -> dict[str, float]:
    """`evaluate`; of a routed model causally, as at inference, and also with top-k, as in training: non-causal."""
    if model.routing is None:
        return evaluate(model, windows, bytes_of, world, autocast)
    if model.routing.calibrate_tokens:
        calibrate(model, windows, model.routing.calibrate_tokens, world.device, autocast)
    result = evaluate(model, windows, bytes_of, world, autocast)
    result["used"] = result.pop("router/mean/selected_fraction")
    with routing_mode(model, "topk"):
        topk = evaluate(model, windows, bytes_of, world, autocast)
    for name in ("loss", "perplexity"):
        result |= {f"{name}_causal": result[name], f"{name}_topk": topk[name]}
    thresholds = {f"router/{n}/threshold": float(r.causal_router.threshold) for n, r in model.routers.items()}
    return result | {name: value for name, value in topk.items() if name.startswith("router/")} | thresholds


# --- a finished model -------------------------------------------------------------------------------------------------


class LoadedModel(NamedTuple):
    """A model to be measured, computed as the runs of this project compute: weights as stored, under autocast."""

    folder: Path
    model: GPT
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype  # of the computation
    autocast: Any


def load_for_eval(cfg: Config) -> LoadedModel:
    """The model of `eval.ckpt`; an adapter beside its base, as while it was trained: merging would round it."""
    folder = source_folder(cfg)
    device = pick_device(cfg.run.device)
    dtype, _ = pick_dtype(cfg.run.dtype, device)
    rounded = cfg.eval.weights != "auto"
    options = {"dtype": torch.float32, "merge": rounded} if is_adapter(folder) else {}
    model, tokenizer = load_model(folder, device, **options)
    if tokenizer is None:
        raise ConfigError(f"eval.ckpt: expected a model with a tokenizer, {folder} has none")
    single = dtype == torch.float32
    autocast = nullcontext() if single else torch.autocast(device.type, dtype)
    model = model.float() if single else model
    if rounded:
        quantize_model(model, cfg.eval.weights)
    return LoadedModel(folder, model, tokenizer, device, dtype, autocast)


def source_folder(cfg: Config) -> Path:
    if cfg.eval.ckpt is None:
        raise ConfigError("eval.ckpt: expected a run, a checkpoint or a Hugging Face folder, got nothing")
    return resolve(cfg.eval.ckpt)


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint is in, where it is in one."""
    folder = checkpoint if len(checkpoint.parents) > 1 else checkpoint.resolve()
    return folder.parents[1] if folder.parent.name == "checkpoints" else None


def results_file(cfg: Config, folder: Path, name: str) -> Path:
    """Where results go: eval.output, else a file in the run folder of a checkpoint, else in this folder."""
    path = (run_of(folder) or Path()) / name if cfg.eval.output is None else Path(cfg.eval.output)
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"eval.output: expected a file in a folder that exists, got {path}")
    return path


def json_text(value: Any) -> bytes:
    return json.dumps(plain_json(value), indent=1).encode()


class Scored(NamedTuple):
    """Of each target [N], in their order."""

    nats: Tensor
    greedy: Tensor  # true where no token was likelier
    stats: dict[str, Tensor]  # of routers


@torch.no_grad()
def token_losses(model: GPT, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Scored:
    """tokens, targets [B, T], IGNORE where there is none. At most `logits_per_chunk` logits exist at a time."""
    at = (targets != IGNORE).flatten().nonzero().squeeze(1)
    # at[:0]: the model computes no logits; the targets tell its routers what is padding.
    out = model(tokens, targets, documents=documents, at=at[:0])
    rows = max(1, logits_per_chunk(tokens.device) // model.cfg.vocab_size)
    hidden, labels = out.hidden.flatten(0, 1)[at], targets.flatten()[at]
    nats, greedy = [], []
    for chunk, ids in zip(hidden.split(rows), labels.split(rows), strict=True):
        logits = model.logits(chunk)
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
    """sum(over) / sum(under) over rows [R]; its standard error comes from the residuals, as rows are sampled whole."""
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
    used: float | None  # fraction of the tokens that routed layers computed; None: no layer is routed


def measure(model: GPT, windows: Sequence[Batch], bytes_of: Tensor, device: torch.device, autocast: Any) -> Measured:
    """As `evaluate`, with standard errors over the rows of the windows."""
    sums, used = [], 0.0
    for window in windows:
        (micro,) = micro_batches(window, len(window.tokens), device)
        with autocast:
            losses = token_losses(model, micro.tokens, micro.targets, micro.documents)
        trained = window.targets != IGNORE
        row_of = trained.nonzero()[:, 0]
        per_target = torch.stack((losses.nats.cpu().double(), bytes_of[window.targets[trained]].double()), dim=1)
        per_row = torch.zeros(len(trained), 2, dtype=torch.float64).index_add(0, row_of, per_target)
        sums.append(torch.cat((per_row, trained.sum(1, keepdim=True)), dim=1))
        used += float(mean_stats(losses.stats).get("mean/selected_fraction", 0.0)) * len(row_of)
    nats, sizes, counts = torch.cat(sums).unbind(1)
    tokens = int(counts.sum())
    loss, bits = ratio(nats, counts), ratio(nats / math.log(2), sizes)
    perplexity = math.exp(min(loss.value, 700))
    error = None if loss.error is None else perplexity * loss.error
    fraction = used / tokens if model.routing else None
    return Measured(loss, Estimate(perplexity, error), bits, tokens, int(sizes.sum()), len(nats), fraction)


def evaluate_with_errors(of: LoadedModel, windows: list[Batch], calibrating: bool = False) -> dict[str, Measured]:
    """By name: `loss`; of a routed model `loss_causal`, as at inference, and `loss_topk`, which is non-causal.

    calibrating: set the thresholds of its routers on these windows first; they are not stored
    """
    if calibrating and of.model.routing is None:
        raise ConfigError(f"eval.calibrate: expected a model with routed layers, {of.folder} has none")
    if calibrating:
        tokens = of.model.routing.calibrate_tokens or RoutingConfig().calibrate_tokens
        calibrate(of.model, windows, tokens, of.device, of.autocast)
    text = (windows, token_bytes(of.tokenizer), of.device, of.autocast)
    measured = measure(of.model, *text)
    if of.model.routing is None:
        return {"loss": measured}
    with routing_mode(of.model, "topk"):
        return {"loss_causal": measured, "loss_topk": measure(of.model, *text)}


def recorded_config(folder: Path) -> dict[str, dict[str, Any]]:
    """The configuration of the run that wrote a checkpoint, by section; empty where there was none."""
    try:
        config = json.loads((folder / "state.json").read_bytes())["config"]
        return {name: dict(section) for name, section in config.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def section(run: dict[str, dict[str, Any]], name: str, kind: type[Section]) -> Section:
    """A section of a recorded configuration; keys that are not in it have their defaults."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in run.get(name, {}).items()}
    try:
        return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"state.json: config: {name}: {error}") from None
