"""Triton kernels of one decoding step: five for a layer, where a compiler makes ten.

A step of one token a row reads each weight once and computes next to nothing: its floor is the time to read them. What
keeps it from there is the pause between kernels. Each of these begins to read its weights before the kernel ahead of it
is done (`OVERLAP`: programmatic dependent launch). Everything between the products stays in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from model import ModelConfig

MOST_ROWS = 8  # of a step; with more, products want tensor cores
MOST_SHARED = 16  # query heads of a key head


@triton.jit
def _linear(
    x, weight, bias, norm, residual, out, eps, outputs, rows,
    SIZE: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [rows, outputs] of x [rows, SIZE]: BLOCK outputs to a program, CHUNK inputs at a time."""
    n, k, m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, CHUNK), tl.arange(0, ROWS)
    tile, inside = weight + n[:, None] * SIZE + k[None, :], (n < outputs)[:, None]
    w = tl.load(tile, mask=inside & (k < SIZE)[None, :], other=0.0)
    up = tl.load(tile + outputs * SIZE, mask=inside & (k < SIZE)[None, :], other=0.0) if GATED else w
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()  # what other kernels write is read below this line only
    y = tl.zeros([ROWS, BLOCK, CHUNK], tl.float32)
    y_up = y
    squares = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in range(0, SIZE, CHUNK):
        here = k + start < SIZE
        xs = tl.load(x + m[:, None] * SIZE + start + k[None, :], mask=(m < rows)[:, None] & here[None, :], other=0.0)
        if norm is not None:  # the root mean square is divided out at the end
            squares += xs * xs
            xs *= tl.load(norm + start + k, mask=here, other=0.0).to(tl.float32)[None, :]
        y += w.to(tl.float32)[None, :, :] * xs[:, None, :]
        if GATED:
            y_up += up.to(tl.float32)[None, :, :] * xs[:, None, :]
        ahead = inside & (k + start + CHUNK < SIZE)[None, :]
        w = tl.load(tile + start + CHUNK, mask=ahead, other=0.0)
        if GATED:
            up = tl.load(tile + outputs * SIZE + start + CHUNK, mask=ahead, other=0.0)
    y = tl.sum(y, axis=2)
    if GATED:
        y_up = tl.sum(y_up, axis=2)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(squares, axis=1) / SIZE + eps)[:, None]
        y *= scale
        if GATED:
            y_up *= scale
    if bias is not None:
        y += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
        if GATED:
            y_up += tl.load(bias + outputs + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    if GATED:
        y = y * tl.sigmoid(y) * y_up
    place, real = m[:, None] * outputs + n[None, :], (m < rows)[:, None] & (n < outputs)[None, :]
    if residual is not None:
        y += tl.load(residual + place, mask=real, other=0.0)
    tl.store(out + place, y, mask=real)


@triton.jit
def _load_halves(place, half, mask):
    return tl.load(place, mask=mask, other=0.0), tl.load(place + half, mask=mask, other=0.0)


@triton.jit
def _halves(vectors, real, norm, eps, cos, sin, SIZE: tl.constexpr, HALF: tl.constexpr):
    """Both halves [G, HALF] of the vectors [SIZE] at `vectors`, normalised where there is a norm, and turned."""
    d = tl.arange(0, HALF)
    inside = real[:, None] & (d < SIZE // 2)[None, :]
    first, second = _load_halves(vectors[:, None] + d[None, :], SIZE // 2, inside)
    if norm is not None:
        squares = tl.sum(first * first + second * second, axis=1)
        scale = tl.rsqrt(squares / SIZE + eps)[:, None]
        first *= scale * tl.load(norm + d, mask=d < SIZE // 2, other=0.0).to(tl.float32)[None, :]
        second *= scale * tl.load(norm + SIZE // 2 + d, mask=d < SIZE // 2, other=0.0).to(tl.float32)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _saturated(x, LARGEST: tl.constexpr):
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def _store_halves(place, first, second, half, mask):
    tl.store(place, first, mask=mask)
    tl.store(place + half, second, mask=mask)


@triton.jit
def _store_part(part, largest, total, y1, y2, HALF: tl.constexpr):
    g, d = tl.arange(0, 16), tl.arange(0, HALF)
    block = 32 + g[:, None] * HALF + d[None, :]
    tl.store(part + g, largest)
    tl.store(part + 16 + g, total)
    tl.store(part + block, y1)
    tl.store(part + block + 16 * HALF, y2)


@triton.jit
def _sum_of_parts(parts, used, HALF: tl.constexpr):
    """Of `used` parts, each the largest score and the sum of weights [16] and both halves of the output [16, HALF]."""
    g, d = tl.arange(0, 16), tl.arange(0, HALF)
    largest, total = tl.full([16], float("-inf"), tl.float32), tl.zeros([16], tl.float32)
    y1, y2 = tl.zeros([16, HALF], tl.float32), tl.zeros([16, HALF], tl.float32)
    block = 32 + g[:, None] * HALF + d[None, :]
    for first in range(0, used, 8):
        some = first + tl.arange(0, 8) < used
        base, there = parts + (first + tl.arange(0, 8)) * (32 + 32 * HALF), some[:, None, None]
        heads, blocks = base[:, None] + g[None, :], base[:, None, None] + block[None, :, :]
        # Past the first level of cache, which may hold what was here in the layer before.
        theirs = tl.load(heads, mask=some[:, None], other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(heads + 16, mask=some[:, None], other=0.0, cache_modifier=".cg")
        more1 = tl.load(blocks, mask=there, other=0.0, cache_modifier=".cg")
        more2 = tl.load(blocks + 16 * HALF, mask=there, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(largest, tl.max(theirs, axis=0))
        shrink, weights = tl.exp(largest - higher), tl.exp(theirs - higher[None, :])
        largest, total = higher, total * shrink + tl.sum(totals * weights, axis=0)
        y1 = y1 * shrink[:, None] + tl.sum(more1 * weights[:, :, None], axis=0)
        y2 = y2 * shrink[:, None] + tl.sum(more2 * weights[:, :, None], axis=0)
    return y1, y2, total


@triton.jit
def _attention(
    qkv, q_norm, k_norm, cos_table, sin_table, slots, keys, values, parts, arrived, out, eps, capacity,
    HEADS: tl.constexpr, SHARED: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, LARGEST: tl.constexpr,
    SCALE: tl.constexpr, KEYS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token a row, over KEYS slots to a program: turn q and k, write k and v to their slot, attend.

    HEADS key heads, each shared by SHARED query heads. The last program of a row and head adds up the parts of all.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row)  # of the step before, like all keys and values but those of this slot
    g, d, at = tl.arange(0, 16), tl.arange(0, HALF), split * KEYS + tl.arange(0, KEYS)
    inside, half = d < SIZE // 2, SIZE // 2
    cached = (row * HEADS + head) * capacity * SIZE
    place = cached + at[:, None] * SIZE + d[None, :]
    old, new = (at < slot)[:, None] & inside[None, :], (at == slot)[:, None]
    ks1, ks2 = _load_halves(keys + place, half, old)
    vs1, vs2 = _load_halves(values + place, half, old)
    cos = tl.load(cos_table + slot * half + d, mask=inside, other=0.0)[None, :]
    sin = tl.load(sin_table + slot * half + d, mask=inside, other=0.0)[None, :]
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    if split * KEYS > slot:
        return
    dtype = keys.dtype.element_ty
    source, one = qkv + row * (SHARED + 2) * HEADS * SIZE, tl.arange(0, 1)
    q1, q2 = _halves(source + (head * SHARED + g) * SIZE, g < SHARED, q_norm, eps, cos, sin, SIZE, HALF)
    k1, k2 = _halves(source + (SHARED * HEADS + head + one) * SIZE, one == 0, k_norm, eps, cos, sin, SIZE, HALF)
    v1, v2 = _load_halves(source + ((SHARED + 1) * HEADS + head) * SIZE + d[None, :], half, inside[None, :])
    k1, k2 = _saturated(k1, LARGEST).to(dtype), _saturated(k2, LARGEST).to(dtype)
    v1, v2 = _saturated(v1, LARGEST).to(dtype), _saturated(v2, LARGEST).to(dtype)
    if slot < (split + 1) * KEYS:
        own = cached + slot * SIZE + d[None, :]
        _store_halves(keys + own, k1, k2, half, inside[None, :])
        _store_halves(values + own, v1, v2, half, inside[None, :])
    ks1, ks2 = tl.where(new, k1, ks1), tl.where(new, k2, ks2)
    vs1, vs2 = tl.where(new, v1, vs1), tl.where(new, v2, vs2)
    scores = tl.dot(q1.to(dtype), tl.trans(ks1), input_precision="ieee")
    scores = tl.dot(q2.to(dtype), tl.trans(ks2), scores, input_precision="ieee")
    scores = tl.where((at <= slot)[None, :], scores * SCALE, float("-inf"))
    largest = tl.max(scores, axis=1)
    p = tl.exp(scores - largest[:, None])
    total = tl.sum(p, axis=1)
    y1 = tl.dot(p.to(dtype), vs1, input_precision="ieee")
    y2 = tl.dot(p.to(dtype), vs2, input_precision="ieee")

    used = slot // KEYS + 1
    awaited = used - 1  # programs of this row and head that are not done
    if used > 1:
        parts += (row * HEADS + head) * tl.num_programs(2) * (32 + 32 * HALF)
        _store_part(parts + split * (32 + 32 * HALF), largest, total, y1, y2, HALF)
        tl.debug_barrier()  # all threads have written before one of them says so
        awaited -= tl.atomic_add(arrived + row * HEADS + head, 1)
        if awaited == 0:
            tl.store(arrived + row * HEADS + head, 0)
            y1, y2, total = _sum_of_parts(parts, used, HALF)
    place = ((row * HEADS + head) * SHARED + g[:, None]) * SIZE + d[None, :]
    real = (g < tl.where(awaited == 0, SHARED, 0))[:, None] & inside[None, :]
    _store_halves(out + place, y1 / total[:, None], y2 / total[:, None], half, real)


# --- what calls them --------------------------------------------------------------------------------------------------


def overlaps(device: torch.device) -> bool:
    """From Hopper on a kernel may begin before the one ahead of it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def tile_of(size: int, rows: int, gated: bool) -> tuple[int, int, int]:
    """(inputs, outputs, warps) of a program's tile: what was fastest of 14 on an H100, for one row and for eight."""
    if rows == 1:
        return (1024, 4, 4) if size <= 1024 else (2048, 2, 8)
    return (256 if gated else 512), max(1, 32 // rows), 4


def linear(
    x: Tensor, layer: nn.Linear, *, norm: Any = None, gated: bool = False, residual: Tensor | None = None
) -> Tensor:
    """fp32 [rows, N] of x [rows, K]: layer(norm(x)) + residual. Gated: silu of the first half times the second."""
    (rows, size), outputs = x.shape, layer.weight.shape[0] // (2 if gated else 1)
    out, padded = torch.empty(rows, outputs, device=x.device), power_of_two(rows)
    (chunk, block, warps), overlap = tile_of(size, padded, gated), overlaps(x.device)
    _linear[(triton.cdiv(outputs, block),)](
        x, layer.weight, getattr(layer, "bias", None), norm and norm.weight, residual, out, norm.eps if norm else 0.0,
        outputs, rows, SIZE=size, GATED=gated, ROWS=padded, BLOCK=block, CHUNK=chunk,
        OVERLAP=overlap, num_warps=warps, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out


def keys_per_program(capacity: int) -> int:
    return 128 if capacity <= 1024 else 256


class Attention:
    """A step's attention: what its programs share, and the call."""

    def __init__(self, rows: int, cfg: ModelConfig, capacity: int, slots: Tensor):
        self.heads, self.size, self.slots = cfg.num_key_value_heads, cfg.head_size, slots
        self.shared = cfg.num_attention_heads // self.heads
        self.half, self.keys = max(16, power_of_two(self.size // 2)), keys_per_program(capacity)
        self.programs = triton.cdiv(capacity, self.keys)
        part = (32 + 32 * self.half) * (self.programs > 1)
        self.parts = torch.empty(rows * self.heads * self.programs * part, device=slots.device)
        self.arrived = torch.zeros(rows * self.heads, dtype=torch.int32, device=slots.device)

    def __call__(
        self, qkv: Tensor, q_norm: nn.Module, k_norm: nn.Module, tables: tuple[Tensor, Tensor], keys: Tensor,
        values: Tensor,
    ) -> Tensor:  # fmt: skip
        """fp32 [rows, H x D] of qkv [rows, (H + 2 K) x D]; keys and values [rows, K, capacity, D] are written to."""
        rows, overlap = len(qkv), overlaps(qkv.device)
        out = torch.empty(rows, self.heads * self.shared * self.size, device=qkv.device)
        _attention[(rows, self.heads, self.programs)](
            qkv, getattr(q_norm, "weight", None), getattr(k_norm, "weight", None), *tables, self.slots, keys, values,
            self.parts, self.arrived, out, getattr(q_norm, "eps", 0.0), keys.shape[2],
            HEADS=self.heads, SHARED=self.shared, SIZE=self.size, HALF=self.half,
            LARGEST=torch.finfo(keys.dtype).max, SCALE=self.size**-0.5, KEYS=self.keys,
            OVERLAP=overlap, num_warps=4, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
        return out
