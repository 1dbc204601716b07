"""Low-rank adapters: small matrices are trained beside a model's frozen ones, and merged into them for use.

A target's output W x becomes W x + s B A x with A [R, in], B [out, R] and s = alpha / R, or alpha / sqrt(R) with
`rslora` (arXiv 2312.03732). B starts at zero, so that a fresh adapter changes nothing, to the bit. With `dora`
(arXiv 2402.09353) each row of W + s B A is also given a trained length. What is computed, and the names on disk, are
those of the PEFT library, so that adapters go both ways.

A key of the model keeps its name; A, B and the lengths are new keys beside the weight: `q_proj.lora_A`, ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Count, DropProbability, Positive, check_fields, require
from nanoqwen.errors import LoraError

SMALLEST_LENGTH = 1e-12  # of a row of zeros, under DoRA: what is divided by it is zero too


@dataclass(frozen=True)
class LoraConfig:
    rank: Count = 0  # 0: no adapters
    alpha: Positive = 16.0
    dropout: DropProbability = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rslora: bool = False
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    base: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        once = len(set(self.targets)) == len(self.targets) > 0
        require(once, "targets", "one name or more, each once", self.targets)
        once = len(set(self.modules_to_save)) == len(self.modules_to_save)
        require(once, "modules_to_save", "each name once", self.modules_to_save)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(nn.Linear):
    """A linear layer that takes over the weight and bias of another, and adds a trained low-rank update."""

    def __init__(self, base: nn.Linear, cfg: LoraConfig):
        nn.Module.__init__(self)  # not Linear's, which would allocate a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout, self.enabled = cfg.scale, cfg.dropout, True
        # Half precision would lose small updates. Drawn on the CPU, so that a seed means the same on every device.
        like = {"device": self.weight.device, "dtype": torch.promote_types(self.weight.dtype, torch.float32)}
        drawn = nn.init.kaiming_uniform_(torch.empty(cfg.rank, self.in_features), a=math.sqrt(5))
        self.lora_A = nn.Parameter(drawn.to(**like))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, cfg.rank, **like))
        self.lora_magnitude = nn.Parameter(_lengths(self.updated())) if cfg.dora else None
        self.train(base.training)

    @torch.no_grad()
    def updated(self) -> Tensor:
        """W + s B A [out, in], at least in fp32."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.addmm(self.weight.to(self.lora_A.dtype), self.lora_B, self.lora_A, alpha=self.scale)

    def merged(self) -> Tensor:
        """The weight of the plain layer that computes the same, in the dtype of the base."""
        weight = self.updated()
        if self.lora_magnitude is not None:
            weight *= (self.lora_magnitude.detach() / _lengths(weight))[:, None]
        return weight.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        y = super().forward(x)
        if not self.enabled:
            return y
        noisy = self.training and self.dropout > 0
        h = F.dropout(x, self.dropout) if noisy else x
        if h.dtype != self.lora_A.dtype and not torch.is_autocast_enabled(h.device.type):
            h = h.to(self.lora_A.dtype)
        update = F.linear(F.linear(h, self.lora_A) * self.scale, self.lora_B)
        if self.lora_magnitude is not None:  # the lengths of the rows count as constants, as in the paper's section 4.3
            stretch = self.lora_magnitude / _lengths(self.updated())
            plain = F.linear(h, self.weight.to(h.dtype)) if noisy else y if self.bias is None else y - self.bias
            update = (stretch - 1) * plain + stretch * update
        return (y + update).to(y.dtype)


def _lengths(weight: Tensor) -> Tensor:
    """[out, in] -> [out]"""
    return torch.linalg.vector_norm(weight, dim=1).clamp(min=SMALLEST_LENGTH)


# --- on a model -------------------------------------------------------------------------------------------------------


def apply_lora(model: nn.Module, cfg: LoraConfig) -> None:
    """Put adapters beside the targets; they and `modules_to_save` are all that trains. Rank 0 changes nothing.

    A target is the last part of a module's name or more of it (`q_proj`, `layers.0.self_attn.q_proj`); a module to
    save is the end of one, as in PEFT: `norm` means every norm, `model.norm` the last.
    """
    if cfg.rank == 0:
        return
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise LoraError("the model has adapters already: merge_lora first")
    targets, saved = _targets(model, cfg.targets), _saved(model, cfg.modules_to_save)
    both = targets.keys() & saved.keys()
    if both:
        raise LoraError(f"lora.modules_to_save: {sorted(both)[0]} cannot be trained in full and be a target as well")
    model.requires_grad_(False)
    for name, module in targets.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(module, cfg))
    for module in saved.values():
        # In the CPU's memory: it is asked for by `without_lora` alone. No buffer, which would become a key on disk.
        place = "meta" if any(p.is_meta for _, p in _own(module)) else "cpu"
        module.before_lora = {name: p.detach().to(place, copy=True) for name, p in _own(module)}
        for _, parameter in _own(module):
            parameter.requires_grad_(True)


def keep_frozen_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Matrices that do not train in `dtype`. All else is fp32: what trains would lose small steps, vectors weigh
    nothing."""
    for parameter in model.parameters():
        frozen_matrix = parameter.dim() > 1 and not parameter.requires_grad
        parameter.data = parameter.data.to(dtype if frozen_matrix else torch.float32)


def _targets(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Linear layers of the decoder by name. The head is none: its weight is used without a call of its module."""
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and ".layers." in f".{n}"}
    for name in names:
        if not any(f".{full}".endswith(f".{name}") for full in linear):
            known = ", ".join(dict.fromkeys(full.rpartition(".")[2] for full in linear))
            raise LoraError(f"lora.targets: expected names of linear layers ({known}), got {name!r}")
    return {full: m for full, m in linear.items() if any(f".{full}".endswith(f".{name}") for name in names)}


def _saved(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """Modules with parameters of their own, by name, at or below those that are to be trained in full."""
    found: dict[str, nn.Module] = {}
    for name in names:
        roots = [
            full for full, m in model.named_modules() if full.endswith(name) and next(m.parameters(), None) is not None
        ]
        if not roots or not name:
            known = ", ".join(dict.fromkeys(n.rpartition(".")[2] for n, m in model.named_modules() if any(_own(m))))
            remedy = "; a tied head is embed_tokens" if name.endswith("lm_head") else ""
            raise LoraError(f"lora.modules_to_save: expected names of modules ({known}), got {name!r}{remedy}")
        for root in roots:
            below = model.get_submodule(root).named_modules(prefix=root)
            found |= {full: module for full, module in below if any(_own(module))}
    return found


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(recurse=False)


def merge_lora(model: nn.Module) -> None:
    """Back to plain layers whose weights hold the updates; the base's weights are gone. All parameters train again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, bias=False)
            module.weight.data.copy_(module.merged())
            plain.weight, plain.bias = module.weight, module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain.train(module.training))
        vars(module).pop("before_lora", None)
    model.requires_grad_(True)


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that an adapter consists of, under their names in the model: adapters and modules to save."""
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for own, parameter in _own(module):
            if own.startswith("lora_") or hasattr(module, "before_lora"):
                state[f"{name}.{own}"] = parameter.detach()
        if hasattr(module, "before_lora"):  # what is set rather than trained, such as a router's threshold
            state |= {f"{name}.{own}": buffer for own, buffer in module.named_buffers(recurse=False)}
    return state


@torch.no_grad()
def load_lora(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `lora_state`, on a model that has the same adapters. What does not fit is refused, all of it."""
    expected = lora_state(model)
    listed = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "mis-shaped": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in expected
            if name in state and state[name].shape != expected[name].shape
        ],
    }
    if problems := [f"{what}: {', '.join(names)}" for what, names in listed.items() if names]:
        raise LoraError(f"the adapter does not fit the model: {'; '.join(problems)}")
    for name, tensor in expected.items():
        tensor.copy_(state[name])


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The base model, bit for bit, within a `with`: as a reference, for instance. A backward belongs wholly inside."""
    layers = {m: m.enabled for m in model.modules() if isinstance(m, LoRALinear)}
    saved = [(p, m.before_lora[name]) for m in model.modules() if hasattr(m, "before_lora") for name, p in _own(m)]
    trained = [parameter.data for parameter, _ in saved]
    try:
        for layer in layers:
            layer.enabled = False
        for parameter, before in saved:
            parameter.data = before.to(parameter)
        yield
    finally:
        for layer, enabled in layers.items():
            layer.enabled = enabled
        for (parameter, _), data in zip(saved, trained, strict=True):
            parameter.data = data


# --- PEFT's format ----------------------------------------------------------------------------------------------------

_PREFIX = "base_model.model."
_SUFFIXES = {".lora_A": ".lora_A.weight", ".lora_B": ".lora_B.weight", ".lora_magnitude": ".lora_magnitude_vector"}

# Keys of an adapter_config.json that say nothing about what is computed.
_SILENT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "megatron_config"}
_SILENT |= {"peft_version", "qalora_group_size", "ensure_weight_tying", "loftq_config", "eva_config"}
# What may stand in others. Every other key must be absent or empty: it changes the computation, or may one day.
_ALLOWED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    # The other ways to initialise also change the base, which is then no longer the published one.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "revision": (None, "main"),
}
_READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora"}


def to_peft(cfg: LoraConfig, base: str, *, tied: bool) -> dict[str, Any]:
    """The contents of an adapter_config.json. `tied`: the embedding is trained, and the head is the embedding."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": cfg.rank,
        "lora_alpha": int(cfg.alpha) if cfg.alpha == int(cfg.alpha) else cfg.alpha,
        "lora_dropout": cfg.dropout,
        "target_modules": list(cfg.targets),
        "modules_to_save": list(cfg.modules_to_save) or None,
        "use_rslora": cfg.rslora,
        "use_dora": cfg.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "ensure_weight_tying": tied,
    }


def from_peft(hf: dict[str, Any]) -> LoraConfig:
    """The inverse of `to_peft`; whatever would be computed differently here is refused."""
    for key, allowed in _ALLOWED.items():
        if hf.get(key) not in allowed:
            raise LoraError(f"{key}: expected {' or '.join(map(repr, allowed))}, got {_shown(hf.get(key))}")
    for key, value in hf.items():
        if value and key not in _SILENT | _READ | _ALLOWED.keys():
            raise LoraError(f"{key}: not supported, got {_shown(value)}")
    for key, kinds in {"r": int, "lora_alpha": (int, float), "lora_dropout": (int, float)}.items():
        if not isinstance(hf.get(key), kinds) or isinstance(hf[key], bool):
            raise LoraError(f"{key}: expected a number, got {_shown(hf.get(key))}")
    if hf["r"] < 1:
        raise LoraError(f"r: expected 1 or more, got {hf['r']}")
    return LoraConfig(
        rank=hf["r"],
        alpha=hf["lora_alpha"],
        dropout=hf["lora_dropout"],
        targets=_names(hf, "target_modules"),
        rslora=bool(hf.get("use_rslora")),
        dora=bool(hf.get("use_dora")),
        modules_to_save=_names(hf, "modules_to_save") if hf.get("modules_to_save") else (),
    )


def _names(hf: dict[str, Any], key: str) -> tuple[str, ...]:
    names = hf.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise LoraError(f"{key}: expected a list of names, got {_shown(names)}")
    return tuple(sorted(set(names)))  # PEFT writes a set, in any order


def _shown(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."


def to_peft_name(name: str) -> str:
    for ours, theirs in _SUFFIXES.items():
        if name.endswith(ours):
            return _PREFIX + name.removesuffix(ours) + theirs
    return _PREFIX + name


def from_peft_name(name: str) -> str:
    """The inverse of `to_peft_name`."""
    for ours, theirs in _SUFFIXES.items():
        if name.startswith(_PREFIX) and name.endswith(theirs):
            return name.removeprefix(_PREFIX).removesuffix(theirs) + ours
    ours = name.removeprefix(_PREFIX)
    if to_peft_name(ours) != name:
        raise LoraError(f"{name}: not the name of a tensor in PEFT's LoRA format")
    return ours
