"""The contrastive objective of fine-tuning: representations of requests, InfoNCE over them, and what is logged.

Letters in shapes: B rows, T tokens of a row, E hidden size, G triplets of a step, P size of a representation. A triplet
has three streams: a benign request, its rewording, and the request with an injected instruction. All in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

COLLAPSED = 0.95  # mean cosine of unrelated requests above which the head maps all requests to one point


class ProjectionHead(nn.Module):
    """Pooled hidden states to unit vectors. Needed in training and for detection; an export drops it."""

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        self.inner, self.norm = nn.Linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size)
        self.outer = nn.Linear(hidden_size, size)

    def forward(self, pooled: Tensor) -> Tensor:
        """[..., E] -> [..., P]"""
        return F.normalize(self.outer(F.gelu(self.norm(self.inner(pooled)))), dim=-1)


HEAD = "head.safetensors"  # file of a checkpoint


def load_head(folder: Path) -> ProjectionHead | None:
    """The projection head of a checkpoint; None if it has none."""
    if not (folder / HEAD).is_file():
        return None
    tensors = {name.removeprefix("head."): tensor for name, tensor in load_file(folder / HEAD).items()}
    head = ProjectionHead(tensors["outer.weight"].shape[1], tensors["outer.weight"].shape[0])
    head.load_state_dict(tensors)
    return head


def pool(hidden: Tensor, streams: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(mean of hidden [B, T, E] over the tokens of each stream: [count, E], number of these tokens: [count])

    streams: [B, T] the stream that a token belongs to; negative: to none
    """
    index = streams.flatten()
    index = torch.where(index < 0, count, index)  # one more slot, for the tokens of no stream
    sums = hidden.new_zeros(count + 1, hidden.shape[-1], dtype=torch.float32)
    sums = sums.index_add(0, index, hidden.flatten(0, 1).float())[:-1]
    sizes = torch.zeros(count + 1, device=hidden.device).index_add(0, index, torch.ones_like(index, dtype=sums.dtype))
    return sums / sizes[:-1, None].clamp(min=1), sizes[:-1]


def represent(head: Callable[[Tensor], Tensor], hidden: Tensor, streams: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(representations [count, P] of the streams in hidden [B, T, E], bool [count]: which streams have tokens here)"""
    with torch.autocast(hidden.device.type, enabled=False):
        pooled, sizes = pool(hidden, streams, count)
        return head(pooled), sizes > 0


# --- the loss ---------------------------------------------------------------------------------------------------------
# z: [G, 3, P] unit vectors; groups: [G]; complete: [G] fp32, 1 where all three streams of a triplet have tokens. Only
# complete triplets count, as anchors and as negatives; results are means over them.


def cosines(z: Tensor) -> tuple[Tensor, Tensor]:
    """(of benign and rewording, of benign and injection), [G] each"""
    return (z[:, 0] * z[:, 1]).sum(-1), (z[:, 0] * z[:, 2]).sum(-1)


def mean(values: Tensor, complete: Tensor) -> Tensor:
    return (values * complete).sum() / complete.sum().clamp(min=1)


def infonce(z: Tensor, groups: Tensor, complete: Tensor, temperature: float) -> Tensor:
    """InfoNCE: the positive of a request is its rewording, negatives are its injection and all of other groups.

    Cross-entropy over cosines / temperature (van den Oord and others 2018, arXiv 1807.03748): 0 or more, and the
    gradient of a cosine is at most 1 / temperature.
    """
    count = len(z)
    logits = z[:, 0] @ z.flatten(0, 1).T / temperature  # [G, 3 G]
    stream = torch.arange(3, device=z.device).repeat(count)
    same_group = groups[:, None] == groups.repeat_interleave(3)  # [G, 3 G]
    own = torch.eye(count, dtype=torch.bool, device=z.device).repeat_interleave(3, dim=1)
    candidates = (own & (stream > 0)) | (~same_group & (complete > 0).repeat_interleave(3))
    logits = logits.masked_fill(~candidates, torch.finfo(logits.dtype).min)
    positives = 3 * torch.arange(count, device=z.device) + 1
    return mean(F.cross_entropy(logits, positives, reduction="none"), complete)


@torch.no_grad()
def contrast_metrics(z: Tensor, groups: Tensor, complete: Tensor) -> dict[str, Tensor]:
    """The metrics that are logged, in training and validation alike.

    | name                    | formula                                               | better |
    | ----------------------- | ----------------------------------------------------- | ------ |
    | contrast/stability      | mean cosine of a request with its rewording           | higher |
    | contrast/separation     | 1 - mean cosine of a request with its injection       | higher |
    | contrast/discrimination | stability + separation - 1                            | higher |
    | contrast/collapse       | mean cosine of benign requests of different groups    | lower, alarm above 0.95 |
    | contrast/rank           | n^2 / |Z Z'|^2 over all n representations: 1 .. min(n, P) | higher |
    | contrast/left_out       | triplets that are not complete                        | 0      |

    The rank is the participation ratio of the squared singular values: n for n orthogonal vectors, 1 for a single
    direction.
    """
    near, far = cosines(z)
    stability, closeness = mean(near, complete), mean(far, complete)
    unrelated = (groups[:, None] != groups) * complete[:, None] * complete
    benign = z[:, 0] @ z[:, 0].T
    vectors = (z * complete[:, None, None]).flatten(0, 1)
    count = 3 * complete.sum()
    return {
        "contrast/stability": stability,
        "contrast/separation": 1 - closeness,
        "contrast/discrimination": stability - closeness,
        "contrast/collapse": (benign * unrelated).sum() / unrelated.sum().clamp(min=1),
        "contrast/rank": count.square() / (vectors @ vectors.T).square().sum().clamp(min=1e-12),
        "contrast/left_out": (1 - complete).sum(),
    }
