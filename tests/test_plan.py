"""Before the first step: the bytes that are announced are those that are there, and a step is cut so that it fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

import plan
import train
from config import load_config
from distributed import World
from lora import LoraConfig, apply_lora

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_state_are_counted_to_the_byte(optimizer: str, rank: int):
    """The estimate once counted moments of every weight, of which an adapter trains one in twenty."""
    cfg = replace(load_config([], "train").train, optimizer=optimizer, seq_len=16, batch_tokens=64)
    model = tiny.model().train()
    apply_lora(model, LoraConfig(rank=rank))
    optimizers = train.Optimizers(train.parameter_groups(model, cfg), cfg)
    ids = torch.randint(97, (4, 17))
    model(ids[:, :-1], ids[:, 1:]).loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizers.step(torch.tensor(0.0))
    state = sum(t.nbytes for t in optimizers.state().values() if t.dim())  # each step count is four bytes more
    found = plan.memory_estimate(model, cfg, rows=4)
    assert found["weights"] == sum(p.nbytes for p in model.parameters())
    assert found["gradients"] == gradients
    assert found["optimizer"] == state
    shared = plan.memory_estimate(model, cfg, rows=4, shards=2)
    assert shared["optimizer"] == state / 2
    assert shared["activations"] == found["activations"]  # each rank has rows of its own


def test_activations_grow_with_the_rows_and_shrink_when_recomputed():
    cfg, model = load_config([], "train").train, tiny.model()
    one, four = (plan.memory_estimate(model, cfg, rows)["activations"] for rows in (1, 4))
    assert four == 4 * one
    assert plan.memory_estimate(model, replace(cfg, checkpoint_activations=True), 4)["activations"] < four / 1.5


@pytest.mark.parametrize("rows", [16, 4, 1])
def test_the_micro_batch_is_the_largest_share_that_fits(rows: int, monkeypatch: pytest.MonkeyPatch):
    cfg, model = load_config(["--batch_tokens=2048", "--seq_len=128"], "train"), tiny.model(max_position_embeddings=128)
    enough = sum(plan.memory_estimate(model, cfg.train, rows).values()) / 0.8
    monkeypatch.setattr(plan, "free_memory", lambda device: enough + 1)
    found = plan.micro_rows(cfg, model, cfg.train, ALONE)
    assert cfg.train.rows % found == 0
    assert found == rows
    asked = replace(cfg.train, micro_batch=3)
    assert plan.micro_rows(cfg, model, asked, ALONE) == 3
