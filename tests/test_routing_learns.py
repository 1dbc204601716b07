"""Causal routers that have been trained: better than knowing the share alone, and with the share that was asked for."""

from __future__ import annotations

import sysconfig
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from data import Batch
from model import GPT, ModelConfig
from nanoqwen import optim
from nanoqwen.config import load_config
from nanoqwen.distributed import World
from nanoqwen.routing import RoutingConfig, build_model, mean_stats, penalty_weights, routing_mode

ALONE = World(0, 0, 1, torch.device("cpu"))
ROWS, LENGTH, HELD_OUT = 8, 96, 1024  # of a step; of a row in bytes; rows of each half of the held-out text


def text(*names: str) -> Tensor:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return torch.tensor(list(b"".join((folder / name).read_bytes() for name in names)))


def rows(data: Tensor, count: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(data) - LENGTH - 1, (count,), generator=generator)
    return torch.stack([data[start : start + LENGTH + 1] for start in starts])


def trained(kind: str, seed: int, steps: int, **more) -> GPT:
    """A model of 0.2 M parameters over bytes of Python's own source, by the steps of the real loop."""
    torch.manual_seed(seed)
    data, generator = (
        text("argparse.py", "inspect.py", "pathlib.py", "tarfile.py", "typing.py", "ast.py"),
        torch.Generator(),
    )
    generator.manual_seed(seed)
    cfg, routing = load_config(["--train.lr=3e-3"], "train").train, RoutingConfig(kind=kind, capacity=0.5, **more)
    shape = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    gpt = build_model(ModelConfig(vocab_size=256, hidden_size=64, intermediate_size=128, **shape), routing).train()
    objective = train.LanguageModeling(gpt, penalty_weights(routing))
    optimizers = optim.Optimizers(optim.parameter_groups(gpt, cfg), cfg, routing)
    how = {"clip": 1.0, "scaler": torch.amp.GradScaler("cpu", enabled=False), "autocast": nullcontext()}
    for step in range(steps):
        ids = rows(data, ROWS, generator)
        optimizers.set_rate(cfg.lr * min(1.0, (step + 1) / 20))
        train.train_step(objective, optimizers, [Batch(ids[:, :-1], ids[:, 1:], None)], ALONE, **how)
    return gpt.eval()


@torch.no_grad()
def held_out(gpt: GPT) -> tuple[dict[str, float], float]:
    """(statistics of the causal routers, share that they compute once calibrated on other held-out text)"""
    ids = rows(text("zipfile.py", "difflib.py"), 2 * HELD_OUT, torch.Generator().manual_seed(99))[:, :-1]
    with routing_mode(gpt, "calibrate"):
        gpt(ids[:HELD_OUT])
    used = mean_stats(gpt(ids[HELD_OUT:]).stats)["mean/selected_fraction"]
    return judged(gpt, ids[-256:]), float(used)


@torch.no_grad()
def judged(gpt: GPT, ids: Tensor) -> dict[str, float]:
    """Statistics of the causal routers beside the selection that they are to predict."""
    with routing_mode(gpt, "topk"):
        return {name: float(value) for name, value in mean_stats(gpt(ids).stats).items()}


def check(found: dict[str, float], used: float) -> None:
    assert found["mean/causal_bce"] < found["mean/causal_bce_baseline"]
    assert found["mean/causal_acc"] > found["mean/causal_acc_baseline"]
    assert used == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("kind", ["mod", "dtf", "tdtf"])
def test_the_causal_router_beats_its_base_rate(kind: str):
    """150 steps at ten times the default rate of the routers, which is for runs of a thousand steps and more."""
    check(*held_out(trained(kind, seed=0, steps=150, causal_lr=1e-2)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["mod", "dtf", "tdtf"])
def test_the_causal_router_beats_its_base_rate_at_the_default_rate(kind: str, seed: int):
    check(*held_out(trained(kind, seed=seed, steps=1000)))
