"""How weights move: the group of each parameter, the optimizers, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanoqwen.config import TrainConfig
from nanoqwen.distributed import shard_like
from nanoqwen.routing import RoutingConfig

# Router modules, by one component of a parameter's name, and the group of their parameters.
ROUTER_GROUPS = {
    "causal_router": "causal",
    "mod_router": "mod",
    "surprise_router": "surprise",
    "prior_ffn": "prior",
    "transition_net": "prior",
}
GROUPS = ("muon", "decay", "plain", "prior", "prior_norm", "surprise", "mod", "causal")
# Groups with weight decay. The others have none: it would drag a router's offsets to zero.
DECAYING = ("decay", "prior")


def parameter_groups(
    model: nn.Module, cfg: TrainConfig, head: nn.Module | None = None
) -> dict[str, dict[str, nn.Parameter]]:
    """Each trainable parameter in one group: muon (hidden matrices), decay (other matrices), plain (vectors), and
    those of routers, which have learning rates of their own.

    head: trained beside the model; its names begin with `head.`
    """
    groups: dict[str, dict[str, nn.Parameter]] = {kind: {} for kind in GROUPS}
    of_head = head.named_parameters(prefix="head") if head is not None else ()
    for name, parameter in (*model.named_parameters(), *of_head):
        if parameter.requires_grad:
            groups[_group_of(name, parameter, cfg)][name] = parameter
    return {kind: members for kind, members in groups.items() if members}


def _group_of(name: str, parameter: nn.Parameter, cfg: TrainConfig) -> str:
    for component in name.split("."):
        if group := ROUTER_GROUPS.get(component):
            return "prior_norm" if group == "prior" and parameter.dim() < 2 else group
    if parameter.dim() < 2:
        return "plain"
    return "muon" if ".layers." in name and cfg.optimizer == "muon" else "decay"


def rate_scales(cfg: TrainConfig, routing: RoutingConfig | None) -> dict[str, float]:
    """Factors on the learning rate of the loop, for groups that have another."""
    if routing is None:
        return {}
    own = {"causal": routing.causal_lr, "surprise": routing.surprise_lr, "mod": routing.mod_lr}
    own |= {"prior": routing.prior_lr, "prior_norm": routing.prior_lr}
    return {kind: rate / cfg.lr for kind, rate in own.items() if rate is not None}


class Optimizers:
    """AdamW, and Muon for the hidden matrices; one learning rate for all but routers. State is saved by name."""

    def __init__(
        self, groups: dict[str, dict[str, nn.Parameter]], cfg: TrainConfig, routing: RoutingConfig | None = None
    ):
        self.names = {p: name for members in groups.values() for name, p in members.items()}
        scales = rate_scales(cfg, routing)
        adamw = [
            {
                "params": list(groups[kind].values()),
                "weight_decay": cfg.weight_decay if kind in DECAYING else 0.0,
                "scale": scales.get(kind, 1.0),
            }
            for kind in GROUPS
            if kind in groups and kind != "muon"
        ]
        self.members: list[torch.optim.Optimizer] = []
        if adamw:  # adapters alone are all Muon's
            betas = (cfg.beta1, cfg.beta2)
            self.members.append(torch.optim.AdamW(adamw, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True))
        if "muon" in groups:
            matrices = list(groups["muon"].values())
            # With this rule a Muon step is as long as one of AdamW, so that one rate serves both (arXiv 2502.16982).
            muon = torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw")
            self.members.append(muon)

    def set_rate(self, rate: float) -> None:
        for optimizer in self.members:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("scale", 1.0)

    def step(self, skip: Tensor) -> None:
        """Move the weights, unless the flag `skip` (0 or 1, fp32) is set: then weights, moments and counts all stay."""
        for optimizer in self.members:
            # The fused kernel's own switch, which torch's GradScaler sets too: no host sync. Muon has none; whether the
            # kernel of Apple GPUs heeds it has not been seen on one.
            if isinstance(optimizer, torch.optim.AdamW) and skip.device.type != "mps":
                optimizer.found_inf, optimizer.grad_scale = skip, None
                optimizer.step()
            elif not skip.item():
                optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.members:
            optimizer.zero_grad(set_to_none=True)

    def idle(self) -> list[str]:
        """Parameters that have never had a gradient: trainable by name only."""
        moved = {p for optimizer in self.members for p in optimizer.state}
        return [name for p, name in self.names.items() if p not in moved]

    def state(self) -> dict[str, Tensor]:
        """PARAMETER.key -> tensor."""
        return {
            f"{self.names[p]}.{key}": value
            for optimizer in self.members
            for p, entry in optimizer.state.items()
            for key, value in entry.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`; a ValueError names a tensor that is missing, unexpected or of another shape."""
        rest = dict(state)
        for optimizer in self.members:
            muon = isinstance(optimizer, torch.optim.Muon)
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                keys = ("momentum_buffer",) if muon else ("step", "exp_avg", "exp_avg_sq")
                entry = {key: rest.pop(f"{self.names[p]}.{key}", None) for key in keys}
                for key, t in entry.items():
                    shape, dtype = ((), torch.float32) if key == "step" else (tuple(p.shape), p.dtype)
                    if t is None or tuple(t.shape) != shape or t.dtype != dtype:
                        got = "nothing" if t is None else f"{tuple(t.shape)} {t.dtype}"
                        raise ValueError(f"optimizer state {self.names[p]}.{key}: expected {shape} {dtype}, got {got}")
                # AdamW keeps its step count beside the parameters in fp32, also on a device.
                optimizer.state[p] = {
                    key: t.to(p.device) if key == "step" else shard_like(t, p) for key, t in entry.items()
                }
        if rest:
            raise ValueError(f"optimizer state: unexpected {', '.join(sorted(rest)[:5])}")


class Plateau:
    """Multiplies the rate by a factor when the validation loss has stopped falling."""

    def __init__(self, cfg: TrainConfig):
        self.cfg, self.scale, self.best, self.bad, self.cooldown = cfg, 1.0, math.inf, 0, 0

    def update(self, loss: float) -> None:
        """Torch's ReduceLROnPlateau: every evaluation cools down, a better one too, and none counts meanwhile."""
        self.bad += 1
        if loss < self.best * (1 - self.cfg.plateau_threshold):
            self.best, self.bad = loss, 0
        if self.cooldown:
            self.cooldown, self.bad = self.cooldown - 1, 0
        if self.bad > self.cfg.plateau_patience:
            self.scale = max(self.scale * self.cfg.plateau_factor, self.cfg.floor)
            self.bad, self.cooldown = 0, self.cfg.plateau_cooldown

    def state(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("scale", "best", "bad", "cooldown")}

    def load(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Pace(NamedTuple):
    """What the length of a run decides when it begins, and another length later leaves as it is."""

    steps: int  # over which a router's capacity and betas move
    warmup_steps: int


class Continued(NamedTuple):
    """Where a run of another length went on: the first step under the new schedule, and the rate just before it."""

    step: int
    rate: float


def continued_rate(step: int, cfg: TrainConfig, plateau_scale: float, since: Continued | None) -> float:
    """The rate of `lr_at`, or of a run of another length than it was begun with: the same fall from where its rate was.

    Warm-up, constant and plateau do not depend on the length, and stay as they are.
    """
    rate = lr_at(step, cfg, plateau_scale)
    if since is None or since.step < cfg.warmup_steps or cfg.schedule in ("constant", "plateau"):
        return rate
    bottom = cfg.lr * cfg.floor
    height = lr_at(since.step, cfg) - bottom
    return bottom + (since.rate - bottom) * ((rate - bottom) / height if height > 0 else 1.0)


def lr_at(step: int, cfg: TrainConfig, plateau_scale: float = 1.0) -> float:
    """The learning rate of a step: a linear warm-up, then the schedule, down to floor x lr at the last step."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - 1 - cfg.warmup_steps)
    if cfg.schedule == "plateau":
        return cfg.lr * plateau_scale
    if cfg.schedule == "constant":
        return cfg.lr
    if cfg.schedule == "cosine":
        height = (1 + math.cos(math.pi * done)) / 2
    elif cfg.schedule == "linear":
        height = 1 - done
    else:  # wsd: warm-up, stable, decay
        height = min(1.0, (1 - done) / cfg.decay_share) if cfg.decay_share else 1.0
    return cfg.lr * (cfg.floor + (1 - cfg.floor) * height)
