"""Weights in 8 or 4 bits, for decoding: a model whose matrices are stored so and widened when they are used.

    quantize_model(model, "int8")       in place; the model computes as before, with rounded weights

int8 has a scale for each output; int4 a step and an offset for 32 inputs of an output, so that values which came from
such a grid (GGUF's Q4_1) stay where they are. Norms and biases stay. A quantised model is its own slow twin: each
product widens a few thousand rows at a time. cpu_kernels.py reads the codes themselves.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT

Kind = Literal["int8", "int4"]
GROUP = 32  # int4: inputs that share a step and an offset
NIBBLES = 8  # in 32 bits
ROWS = 4096  # widened at a time
LARGEST = torch.finfo(torch.float16).max
SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a group's range: to cut off its ends may be the smaller error


class Quantized(nn.Module):
    """A matrix [outputs, inputs] in few bits."""

    codes: Tensor

    def __init__(self, shape: torch.Size, dtype: torch.dtype):
        super().__init__()
        self.shape, self.dtype = shape, dtype  # of what it stands for

    def rows(self, start: int, end: int) -> Tensor:
        """fp32 [end - start, inputs]"""
        raise NotImplementedError

    def gather(self, ids: Tensor) -> Tensor:
        """fp32 [..., inputs] of some rows"""
        unique, place = ids.unique(return_inverse=True)
        return torch.cat([self.rows(row, row + 1) for row in unique.tolist()])[place]

    def weight(self) -> Tensor:
        return self.rows(0, self.shape[0]).to(self.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]"""
        chunks = range(0, self.shape[0], ROWS)
        return torch.cat([F.linear(x, self.rows(start, start + ROWS).to(x.dtype)) for start in chunks], dim=-1)


class Int8(Quantized):
    def __init__(self, weight: Tensor):
        super().__init__(weight.shape, weight.dtype)
        largest = weight.abs().amax(1, keepdim=True).float()
        scales = torch.where(largest > 0, largest / 127, 1.0)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for start in range(0, len(weight), ROWS):
            part = slice(start, start + ROWS)
            codes[part] = (weight[part].float() / scales[part]).round()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales[:, 0].contiguous())

    def rows(self, start: int, end: int) -> Tensor:
        return self.codes[start:end] * self.scales[start:end, None]


class Int4(Quantized):
    """Codes are packed for vectors of `lanes` floats: nibble j of number i of a block is input j * lanes + i of it."""

    def __init__(self, weight: Tensor, lanes: int = 8):
        super().__init__(weight.shape, weight.dtype)
        self.lanes, self.block = lanes, lanes * NIBBLES
        outputs, inputs = weight.shape
        blocks = -(-inputs // self.block)
        self.register_buffer("codes", torch.empty(outputs, blocks, lanes, dtype=torch.int32, device=weight.device))
        # Two fp16 numbers for each group, (offset, step) in the order of memory: one load for both.
        groups = blocks * self.block // GROUP
        self.register_buffer("grids", torch.empty(outputs, groups, dtype=torch.int32, device=weight.device))
        for start in range(0, outputs, ROWS):
            part = slice(start, start + ROWS)
            padded = F.pad(weight[part].float(), (0, blocks * self.block - inputs))
            codes, steps, offsets = fit_groups(padded)
            self.grids[part] = torch.stack([offsets, steps], dim=-1).view(torch.int32)[..., 0]
            self.codes[part] = (codes.view(-1, blocks, NIBBLES, lanes) << self._shifts()).sum(2, dtype=torch.int32)

    def _shifts(self) -> Tensor:
        return 4 * torch.arange(NIBBLES, dtype=torch.int32, device=self.codes.device)[:, None]

    def rows(self, start: int, end: int) -> Tensor:
        codes = (self.codes[start:end, :, None] >> self._shifts() & 15).flatten(1)
        offsets, steps = self.grids[start:end, :, None].view(torch.float16).float().unbind(-1)
        grouped = codes.unflatten(1, (-1, GROUP)) * steps[..., None] + offsets[..., None]
        return grouped.flatten(1)[:, : self.shape[1]]


def fit_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [outputs, inputs] of 0 to 15, fp16 steps, fp16 offsets [outputs, groups]) with the least squared error.

    Tried are the range of a group and parts of it; of each the grid is then fitted to the codes by least squares.
    """
    grouped = weight.unflatten(1, (-1, GROUP))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    best = None
    for share in SHRUNK:
        cut = (1 - share) / 2 * (high - low)
        step = (share * (high - low) / 15).clamp(min=1e-12)
        codes = ((grouped - low - cut) / step).round().clamp(0, 15)
        step, offset = _least_squares(codes, grouped)
        codes = ((grouped - offset.float()) / step.float().clamp(min=1e-12)).round().clamp(0, 15)
        error = (codes * step.float() + offset.float() - grouped).square().sum(-1, keepdim=True)
        if best is None:
            best = [error, codes, step, offset]
            continue
        better = error < best[0]
        best = [torch.where(better, new, old) for new, old in zip((error, codes, step, offset), best, strict=True)]
    _, codes, step, offset = best
    return codes.int().flatten(1), step[..., 0], offset[..., 0]


def _least_squares(codes: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 (step, offset) that bring step * codes + offset nearest to the values of each group."""
    mean_code, mean = codes.mean(-1, keepdim=True), values.mean(-1, keepdim=True)
    centred = codes - mean_code
    spread = centred.square().sum(-1, keepdim=True)
    step = (centred * values).sum(-1, keepdim=True) / spread.clamp(min=1e-12)
    step = step.clamp(max=LARGEST).half()
    return step, (mean - step.float() * mean_code).clamp(-LARGEST, LARGEST).half()


# --- modules ----------------------------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """In the place of an nn.Linear."""

    def __init__(self, matrix: Quantized, bias: Tensor | None):
        super().__init__()
        self.matrix, self.bias = matrix, bias

    @property
    def weight(self) -> Tensor:
        return self.matrix.weight()

    def forward(self, x: Tensor) -> Tensor:
        y = self.matrix.multiply(x)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(nn.Module):
    """In the place of an nn.Embedding that is the head, too."""

    def __init__(self, matrix: Quantized):
        super().__init__()
        self.matrix = matrix

    @property
    def weight(self) -> Tensor:
        return self.matrix.weight()

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.gather(ids).to(self.matrix.dtype)


def quantize(weight: Tensor, kind: Kind, lanes: int = 8) -> Quantized:
    return Int8(weight) if kind == "int8" else Int4(weight, lanes)


@torch.no_grad()
def quantize_model(model: GPT, kind: Kind, lanes: int = 8) -> GPT:
    """Replace the matrices of the layers and the head, one at a time; their floats are gone with them.

    The head is int8 for int4, too: it chooses among tens of thousands of ids, and errs most.
    """
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, QuantizedLinear(quantize(layer.weight, kind, lanes), layer.bias))
    if model.lm_head is None:
        model.model.embed_tokens = head = QuantizedEmbedding(Int8(model.model.embed_tokens.weight))
    else:
        model.lm_head = head = QuantizedLinear(Int8(model.lm_head.weight), None)
    model.logits = lambda hidden: head.matrix.multiply(hidden).float()  # without all of it in floats
    return model
