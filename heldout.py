"""Held-out text: how well a model predicts it, the same figures for a run under way and for a finished model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from data import IGNORE, Batch, micro_batches
from distributed import World, total
from model import GPT
from routing import mean_stats, routed_by


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
    nats, count, size, *routed = total(sums, world).tolist()
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
