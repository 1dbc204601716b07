"""What contrastive fine-tuning minimises beside the task: representations of requests, and losses over them.

Letters in shapes: B rows, T tokens of a row, E hidden size, G triplets of a step, P size of a representation. A triplet
has three streams: benign, the same reworded, the same with an injected instruction. All of it is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

COLLAPSED = 0.95  # mean cosine between requests that have nothing in common: above this they all look alike


class ProjectionHead(nn.Module):
    """Pooled hidden states to unit vectors. It serves the training alone, and is left behind by an export."""

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        self.inner, self.norm = nn.Linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size)
        self.outer = nn.Linear(hidden_size, size)

    def forward(self, pooled: Tensor) -> Tensor:
        """[..., E] -> [..., P]"""
        return F.normalize(self.outer(F.gelu(self.norm(self.inner(pooled)))), dim=-1)


HEAD = "head.safetensors"  # in a checkpoint, beside the model


def load_head(folder: Path) -> ProjectionHead | None:
    """The head that was trained beside a model; None where there was none."""
    if not (folder / HEAD).is_file():
        return None
    tensors = {name.removeprefix("head."): tensor for name, tensor in load_file(folder / HEAD).items()}
    head = ProjectionHead(tensors["outer.weight"].shape[1], tensors["outer.weight"].shape[0])
    head.load_state_dict(tensors)
    return head


def pool(hidden: Tensor, streams: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means of hidden [B, T, E] over the tokens of each stream: [count, E], and how many tokens those are: [count].

    streams: [B, T] the number of the stream that a token counts for; below 0: for none
    """
    number = streams.flatten()
    number = torch.where(number < 0, count, number)  # one more, for the tokens that count for none
    sums = hidden.new_zeros(count + 1, hidden.shape[-1], dtype=torch.float32)
    sums = sums.index_add(0, number, hidden.flatten(0, 1).float())[:-1]
    sizes = torch.zeros(count + 1, device=hidden.device).index_add(0, number, torch.ones_like(number, dtype=sums.dtype))
    return sums / sizes[:-1, None].clamp(min=1), sizes[:-1]


def represent(head: Callable[[Tensor], Tensor], hidden: Tensor, streams: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Representations [count, P] of the streams in hidden [B, T, E], and which of them have text here: bool [count]."""
    with torch.autocast(hidden.device.type, enabled=False):
        pooled, sizes = pool(hidden, streams, count)
        return head(pooled), sizes > 0


# --- losses -----------------------------------------------------------------------------------------------------------
# Each of z [G, 3, P] (unit vectors), groups [G] and whole [G] (fp32, 1 where all three requests of a triplet have text;
# other triplets count nowhere). The result is a mean over the triplets that count.


def cosines(z: Tensor) -> tuple[Tensor, Tensor]:
    """(benign with its rewording, benign with its injection), [G] each"""
    return (z[:, 0] * z[:, 1]).sum(-1), (z[:, 0] * z[:, 2]).sum(-1)


def mean(values: Tensor, whole: Tensor) -> Tensor:
    return (values * whole).sum() / whole.sum().clamp(min=1)


def infonce(z: Tensor, groups: Tensor, whole: Tensor, temperature: float) -> Tensor:
    """How hard it is to tell the rewording of a request from its injection and from all requests of other groups.

    Cross-entropy over cosines / temperature (van den Oord and others 2018, arXiv 1807.03748): 0 or more, and the
    gradient of a cosine is at most 1 / temperature.
    """
    count = len(z)
    scores = z[:, 0] @ z.flatten(0, 1).T / temperature  # [G, 3 G]
    stream = torch.arange(3, device=z.device).repeat(count)
    same = groups[:, None] == groups.repeat_interleave(3)  # [G, 3 G]
    own = torch.eye(count, dtype=torch.bool, device=z.device).repeat_interleave(3, dim=1)
    choice = (own & (stream > 0)) | (~same & (whole > 0).repeat_interleave(3))
    scores = scores.masked_fill(~choice, torch.finfo(scores.dtype).min)
    positive = 3 * torch.arange(count, device=z.device) + 1
    return mean(F.cross_entropy(scores, positive, reduction="none"), whole)


def margin(z: Tensor, whole: Tensor, benign: float, injection: float) -> Tensor:
    """0 where each rewording is nearer than `benign` and each injection farther than `injection`."""
    near, far = cosines(z)
    return mean(F.relu(benign - near), whole) + mean(F.relu(far - injection), whole)


def linear(z: Tensor, whole: Tensor, temperature: float) -> Tensor:
    """The historical form, kept for comparison: it has no optimum inside, and goes on pulling where all is well."""
    near, far = cosines(z)
    return (mean(far, whole) - mean(near, whole)) / (2 * temperature)


@torch.no_grad()
def figures(z: Tensor, groups: Tensor, whole: Tensor) -> dict[str, Tensor]:
    """What is logged, in training and validation alike.

    | name                    | formula                                               | better |
    | ----------------------- | ----------------------------------------------------- | ------ |
    | contrast/stability      | mean cosine of a request with its rewording           | higher |
    | contrast/separation     | 1 - mean cosine of a request with its injection       | higher |
    | contrast/discrimination | stability + separation - 1                            | higher |
    | contrast/collapse       | mean cosine of benign requests of different groups    | lower, alarm above 0.95 |
    | contrast/rank           | n^2 / |Z Z'|^2 over all n representations: 1 .. min(n, P) | higher |
    | contrast/left_out       | triplets with a request of which no text is left      | 0      |

    The rank is the participation ratio of the squared singular values: n for n that are orthogonal ones, 1 for a
    single direction.
    """
    near, far = cosines(z)
    stability, closeness = mean(near, whole), mean(far, whole)
    other = (groups[:, None] != groups) * whole[:, None] * whole
    benign = z[:, 0] @ z[:, 0].T
    flat = (z * whole[:, None, None]).flatten(0, 1)
    count = 3 * whole.sum()
    return {
        "contrast/stability": stability,
        "contrast/separation": 1 - closeness,
        "contrast/discrimination": stability - closeness,
        "contrast/collapse": (benign * other).sum() / other.sum().clamp(min=1),
        "contrast/rank": count.square() / (flat @ flat.T).square().sum().clamp(min=1e-12),
        "contrast/left_out": (1 - whole).sum(),
    }


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of z, groups, whole


def loss_of(kind: str, temperature: float, margins: tuple[float, float]) -> Loss:
    """One of infonce, margin and linear, with its settings."""
    return {
        "infonce": lambda z, groups, whole: infonce(z, groups, whole, temperature),
        "margin": lambda z, groups, whole: margin(z, whole, *margins),
        "linear": lambda z, groups, whole: linear(z, whole, temperature),
    }[kind]
