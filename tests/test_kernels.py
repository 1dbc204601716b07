"""Our kernels beside the plain model, in Triton's interpreter: slow, on any machine that has the package."""

from __future__ import annotations

import os

import pytest
import tiny
import torch

from model import GPT
from nanoqwen.fast import FastGPT, kernels_for

os.environ.setdefault("TRITON_INTERPRET", "1" if not torch.cuda.is_available() else "0")
pytest.importorskip("triton")
from nanoqwen import kernels


@torch.no_grad()
def logits(model: GPT | FastGPT, counts: list[int], steps: list[torch.Tensor]) -> torch.Tensor:
    """Of each step behind prompts of `counts` tokens."""
    ids = torch.randint(97, (len(counts), max(counts)), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(len(counts), None, max(counts) + len(steps))
    model(ids, cache=cache, lengths=counts)
    return torch.cat([model(step, cache=cache).logits for step in steps], dim=1)


@pytest.mark.parametrize("counts", [[9], [9, 4, 2]])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mqa"])
def test_a_step_is_that_of_the_model(name: str, counts: list[int], monkeypatch: pytest.MonkeyPatch):
    """Biases or QK-norm, keys shared by two or four heads, rows of one program and of several."""
    monkeypatch.setattr("nanoqwen.fast.capture", lambda step: (lambda: result.copy_(step()), result := step()))
    monkeypatch.setattr("nanoqwen.fast.SMALLEST_CAPACITY", 8)
    monkeypatch.setattr(kernels, "keys_per_program", lambda capacity: 4)
    plain, twin = (make(tiny.model(name, num_hidden_layers=2)) for make in (lambda model: model, FastGPT))
    twin.static = True
    assert kernels_for(twin, len(counts)) is kernels
    steps = list(torch.randint(97, (len(counts), 2), generator=torch.Generator().manual_seed(1)).split(1, dim=1))
    torch.testing.assert_close(logits(twin, counts, steps), logits(plain, counts, steps), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("rows", "size", "outputs"), [(1, 2100, 9), (5, 700, 40)])
@pytest.mark.parametrize("gated", [False, True])
def test_a_product_of_any_shape(rows: int, size: int, outputs: int, gated: bool):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(size, outputs * (1 + gated)), torch.randn(rows, size)
    norm, residual = torch.nn.RMSNorm(size, eps=1e-6), torch.randn(rows, outputs)
    y = layer(norm(x))
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    ours = kernels.linear(x, layer, norm=norm, gated=gated, residual=residual)
    torch.testing.assert_close(ours, y + residual, rtol=1e-5, atol=1e-5)
