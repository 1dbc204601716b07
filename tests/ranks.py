"""A program for two ranks: what a step of them must be, compared with the same step on one. Prints a line of JSON.

torchrun --nproc_per_node 2 tests/ranks.py OUT
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from torch import nn

import train
from data import Batch, micro_batches
from nanoqwen import distributed, optim
from nanoqwen.config import TrainConfig
from nanoqwen.distributed import World, full_tensor
from train import LanguageModeling, train_step

ROWS, LENGTH = 8, 12


def batch() -> Batch:
    """Rows with different numbers of targets, so that a mean of means would be another."""
    tokens = torch.randint(97, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, 1)
    for row in range(ROWS):
        targets[row, row + 2 :] = -100
    return Batch(tokens, targets, None)


def objective(dropout: float = 0.0) -> LanguageModeling:
    torch.manual_seed(0)
    return LanguageModeling(tiny.model(vocab_size=97, dropout=dropout).train(), {})


def poison_a_row(embedding: nn.Module, token: int) -> None:
    """Of its gradient, that of a token: under fsdp it lies on one of the ranks alone."""

    def hook(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        of_token = (arguments[0] == token)[..., None]
        output.register_hook(lambda gradient: gradient.masked_fill(of_token, float("nan")))

    embedding.register_forward_hook(hook)


def step(wrapped: nn.Module, world: World, poison: int | None = None) -> dict[str, torch.Tensor]:
    """One step of this rank's rows, a row a micro-batch; `poison`: the rank whose gradient is not a number."""
    inner = distributed.unwrap_model(wrapped)
    cfg = TrainConfig(lr=1e-2, weight_decay=0.0)
    optimizers = optim.Optimizers(optim.parameter_groups(inner.model, cfg), cfg)
    optimizers.set_rate(1e-2)
    mine = Batch(*(None if part is None else part[world.rank :: world.size] for part in batch()))
    if poison == world.rank:
        poison_a_row(inner.model.get_input_embeddings(), int(mine.tokens.min()))
    metrics = train_step(
        wrapped, optimizers, micro_batches(mine, 1, world.device), world,
        clip=1.0, scaler=torch.amp.GradScaler("cpu", enabled=False), autocast=nullcontext(),
    )  # fmt: skip
    return {name: float(metrics[name]) for name in ("loss", "grad_norm", "skipped", "targets")}


def weights(wrapped: nn.Module) -> dict[str, torch.Tensor]:
    inner = distributed.unwrap_model(wrapped)
    return {name: full_tensor(p).detach().clone() for name, p in inner.model.named_parameters()}


def furthest(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    return max(float((some[name] - others[name]).abs().max()) for name in others)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors.values())).hexdigest()


def main() -> None:
    world = distributed.start("cpu")
    alone, found = World(0, 0, 1, world.device), {}
    single = objective()
    expected = step(single, alone)
    for wrap in ("ddp", "fsdp"):
        wrapped = distributed.wrap_model(objective(), world, wrap)
        metrics = step(wrapped, world)
        found[f"{wrap}: furthest weight"] = furthest(weights(wrapped), weights(single))
        found[f"{wrap}: metrics"] = [metrics, expected]
        poisoned = distributed.wrap_model(objective(), world, wrap)
        before = weights(poisoned)
        found[f"{wrap}: skipped"] = step(poisoned, world, poison=1)["skipped"]
        found[f"{wrap}: moved by a NaN"] = furthest(weights(poisoned), before)
        found[f"{wrap}: digest"] = digest(weights(wrapped)) + digest(weights(poisoned))
    train.seed_step(5, 3, world.rank)
    found["drawn"] = torch.rand(3).tolist()
    found["asked on rank 1 alone"] = distributed.any_rank(world.rank == 1, world)
    everybody = [None] * world.size
    dist.all_gather_object(everybody, found)
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(everybody))
    distributed.stop(world)


if __name__ == "__main__":
    main()
