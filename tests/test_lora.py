"""Adapters, with PEFT as the judge: written here and loaded there, written there and loaded here, gradients and all."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import runs
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_parity import IDS, theirs
from torch import Tensor, nn

import checkpoint
import infer
from model import GPT, IGNORE
from nanoqwen import weights
from nanoqwen.config import load_config
from nanoqwen.errors import LoraError, run_script
from nanoqwen.lora import (
    LoraConfig,
    LoRALinear,
    apply_lora,
    from_peft,
    from_peft_name,
    load_lora,
    lora_state,
    merge_lora,
    to_peft,
    to_peft_name,
    without_lora,
)
from nanoqwen.optim import parameter_groups
from nanoqwen.tokenizer import load_tokenizer
from nanoqwen.weights import CheckpointError, export, hash_weights, load_model, read_adapter, write_adapter

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
]

PLAIN = LoraConfig(rank=4, alpha=8.0)
VARIANTS = {
    "plain": PLAIN,
    "rslora": replace(PLAIN, rslora=True),
    "dora": replace(PLAIN, dora=True),
    "attention": replace(PLAIN, targets=("q_proj", "v_proj")),
    "norm": replace(PLAIN, modules_to_save=("norm",)),
    "last-norm": replace(PLAIN, modules_to_save=("model.norm",)),
    "embedding": replace(PLAIN, modules_to_save=("embed_tokens",)),
    "mlp": replace(PLAIN, targets=("q_proj",), modules_to_save=("mlp", "embed_tokens"), dora=True),
}


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """What training would have left: every trainable parameter away from its first value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def adapted(cfg: LoraConfig = PLAIN, name: str = "qwen2", **overrides: Any) -> GPT:
    model = tiny.model(name, **overrides)
    apply_lora(model, cfg)
    return model


def logits(model: GPT, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def loss_of(model: GPT) -> Tensor:
    out = model(IDS, torch.cat((IDS[:, 1:], torch.full((2, 1), IGNORE)), dim=1))
    return out.loss / out.weight


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= 1e-5 * expected.abs().max())


def copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


# --- on a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
@pytest.mark.parametrize("variant", ["plain", "rslora", "dora"])
def test_a_fresh_adapter_changes_nothing_to_the_bit(name: str, variant: str):
    model = tiny.model(name)
    before, keys = logits(model), set(model.state_dict())
    targets = tuple(t for t in PLAIN.targets if t != "gate_proj" or model.cfg.mlp == "swiglu")
    apply_lora(model, replace(VARIANTS[variant], targets=targets))
    assert torch.equal(logits(model), before)
    added = set(model.state_dict()) - keys
    assert keys <= set(model.state_dict())  # siblings: no key of the model is renamed
    assert {key.rpartition(".")[2] for key in added} - {"lora_magnitude"} == {"lora_A", "lora_B"}
    assert set(lora_state(model)) == added
    assert len(added) == 3 * len(targets) * (3 if variant == "dora" else 2)


def test_the_base_keeps_its_parameter_objects_and_its_memory():
    model = tiny.model()
    before = dict(model.named_parameters())
    pointers = {name: p.data_ptr() for name, p in before.items()}
    apply_lora(model, PLAIN)
    after = dict(model.named_parameters())
    assert all(after[name] is p and p.data_ptr() == pointers[name] for name, p in before.items())


def test_the_first_values_are_pefts_and_follow_the_seed():
    torch.manual_seed(5)
    first = adapted()
    a = first.model.layers[0].mlp.down_proj.lora_A
    bound = 1 / a.shape[1] ** 0.5  # kaiming uniform with a = sqrt 5, of the inputs
    wide = LoRALinear(nn.Linear(4000, 2), replace(PLAIN, rank=64)).lora_A
    assert a.abs().max() <= bound
    assert abs(wide.std() * (3 * 4000) ** 0.5 - 1) < 0.01
    assert abs(wide.mean()) < 1e-4
    assert not first.model.layers[0].mlp.down_proj.lora_B.any()
    again, other = adapted(seed=0), adapted(seed=1)
    name = "model.layers.1.self_attn.q_proj.lora_A"
    assert torch.equal(lora_state(again)[name], lora_state(adapted(seed=0))[name])
    assert not torch.equal(lora_state(again)[name], lora_state(other)[name])


def test_rank_0_is_full_fine_tuning():
    model = tiny.model()
    apply_lora(model, LoraConfig())
    assert not lora_state(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_o02_only_the_adapter_is_trained_and_all_of_it(variant: str, optimizer: str):
    """C04: after one step each B has moved, after two each trained tensor has, and the base has not by one bit."""
    cfg = VARIANTS[variant]
    model = adapted(cfg).train()
    names = set(lora_state(model))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    train = load_config([f"--train.optimizer={optimizer}"], "train").train
    groups = parameter_groups(model, train)
    assert {name for members in groups.values() for name in members} == names
    assert all(p.dim() < 2 for p in groups.get("plain", {}).values())

    frozen = copies({n: t for n, t in model.state_dict().items() if n not in names})
    first = copies(lora_state(model))
    stepper = torch.optim.SGD([p for members in groups.values() for p in members.values()], lr=0.1)
    for step in (1, 2):
        loss_of(model).backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == names
        stepper.step()
        stepper.zero_grad()
        moved = {name for name, t in lora_state(model).items() if not torch.equal(t, first[name])}
        assert {name for name in names if name.endswith("lora_B")} <= moved
        assert step == 1 or moved == names
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "qwen2-untied"])
def test_p09_merged_is_unmerged_and_disabled_is_the_base(variant: str, name: str):
    model = tiny.model(name)
    base, plain = logits(model), [(n, type(m)) for n, m in model.named_modules()]
    apply_lora(model, VARIANTS[variant])
    shaken(model)
    with_adapter = logits(model)
    assert not close(with_adapter, base)
    with without_lora(model):
        assert torch.equal(logits(model), base)
        with without_lora(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), with_adapter)
    merge_lora(model)
    assert close(logits(model), with_adapter)
    assert [(n, type(m)) for n, m in model.named_modules()] == plain
    assert set(model.state_dict()) == set(tiny.model(name).state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert not lora_state(model)
    apply_lora(model, PLAIN)  # another adapter, on what the first has made
    assert close(logits(model), with_adapter)


def test_disabled_ends_with_the_block_also_when_it_fails():
    model = shaken(adapted(VARIANTS["embedding"]))
    expected = logits(model)
    with pytest.raises(KeyError), without_lora(model):
        raise KeyError
    assert torch.equal(logits(model), expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(lora_state(model))


def test_merging_rounds_once_in_half_precision():
    model = shaken(adapted(VARIANTS["dora"]))
    layer = model.model.layers[0].mlp.up_proj
    exact = layer.merged()
    half = LoRALinear(nn.Linear(32, 48).to(torch.bfloat16), VARIANTS["dora"])
    half.weight.data.copy_(layer.weight)
    load_lora(nn.ModuleDict({"x": half}), {f"x.{n}": t for n, t in layer.named_parameters() if "lora" in n})
    wide = half.weight.float() + half.scale * half.lora_B @ half.lora_A
    wide = wide * (half.lora_magnitude / wide.norm(dim=1))[:, None]
    assert torch.equal(half.merged(), wide.bfloat16())
    assert half.merged().dtype == torch.bfloat16
    assert exact.dtype == torch.float32


@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_dropout_is_of_the_adapters_input_in_training_alone(variant: str):
    layer = LoRALinear(nn.Linear(64, 8), replace(VARIANTS[variant], rank=2, dropout=0.25))
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(1, 64)
    layer.eval()
    expected = layer(x)
    assert torch.equal(layer(x), expected)
    layer.train()
    draws = torch.cat([layer(x) for _ in range(4000)])
    assert draws.std(0).min() > 0
    error = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()  # inverted dropout keeps the mean
    base = nn.functional.linear(x, layer.weight, layer.bias)
    if variant == "plain":  # the base's own output sees none of it
        dropped = (nn.functional.dropout(x.expand(4000, -1), 0.25) @ layer.lora_A.T * layer.scale) @ layer.lora_B.T
        assert torch.allclose((draws - base).std(0), dropped.std(0), rtol=0.1)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_t08_recomputed_activations_give_the_same_gradients(variant: str):
    found = []
    for recompute in (False, True):
        model = shaken(adapted(replace(VARIANTS[variant], dropout=0.1))).train()
        model.checkpoint_activations = recompute
        torch.manual_seed(3)
        loss = loss_of(model)
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (again, recomputed) = found
    assert torch.equal(loss, again)
    assert gradients.keys() == recomputed.keys()
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


@pytest.mark.parametrize("variant", ["plain", "dora"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_layer_compiles_into_one_graph(variant: str, mixed: bool):
    layer = shaken(LoRALinear(nn.Linear(8, 4), replace(VARIANTS[variant], dropout=0.1)))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(3, 8)
    for training in (True, False):
        layer.train(training)
        outputs = []
        for run_layer in (layer, compiled):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                outputs.append(run_layer(x))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_mixed_precision(variant: str):
    """fp32 weights under bf16 autocast, and a bf16 base with fp32 adapters: near the fp32 result, fp32 gradients."""
    reference = shaken(adapted(VARIANTS[variant])).train()
    expected = loss_of(reference)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.model().to(dtype)
        apply_lora(model, VARIANTS[variant])
        with torch.no_grad():
            for name, tensor in lora_state(reference).items():
                lora_state(model)[name].copy_(tensor)
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = loss_of(model)
        loss.backward()
        assert abs(loss - expected) < 0.05 * expected
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                assert parameter.dtype == parameter.grad.dtype == torch.float32
                assert parameter.grad.isfinite().all()


def test_lengths_of_rows_are_fp32_under_autocast():
    layer = shaken(LoRALinear(nn.Linear(64, 8), VARIANTS["dora"]))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer.updated()
    assert torch.equal(mixed, layer.updated())


def test_a_head_of_its_own_is_no_target():
    """Its weight is read without a call of the module, so that an adapter on it would be trained by nobody."""
    with pytest.raises(LoraError, match="got 'lm_head'"):
        apply_lora(tiny.model("qwen2-untied"), replace(PLAIN, targets=("q_proj", "lm_head")))


def test_n05_a_small_update_survives_a_half_precision_base():
    layer = LoRALinear(nn.Linear(8, 8).bfloat16(), PLAIN)
    with torch.no_grad():
        layer.lora_B.fill_(1.0)
        layer.lora_B.mul_(1 + 1e-4)
    assert (layer.lora_B > 1).all()


def test_rows_of_zeros_have_finite_gradients_under_dora():
    base = nn.Linear(8, 4)
    with torch.no_grad():
        base.weight[1] = 0
    layer = LoRALinear(base, VARIANTS["dora"])
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"targets": ("q_proj", "c_attn")},
            r"lora\.targets: expected .* linear layers \(q_proj.*\), got 'c_attn'",
        ),
        ({"targets": ("lm_head",)}, "got 'lm_head'"),
        ({"targets": ("proj",)}, "got 'proj'"),
        ({"targets": ("",)}, "got ''"),
        ({"modules_to_save": ("embeddings",)}, r"lora\.modules_to_save: .*embed_tokens.*, got 'embeddings'"),
        ({"modules_to_save": ("lm_head",)}, "got 'lm_head'; a tied head is embed_tokens"),
        ({"modules_to_save": ("",)}, "got ''"),
        ({"modules_to_save": ("mlp",)}, "cannot be trained in full and be a target as well"),
    ],
)
def test_names_that_the_model_does_not_have(change: dict, said: str):
    model = tiny.model()
    with pytest.raises(LoraError, match=said) as refusal:
        apply_lora(model, replace(PLAIN, **change))
    assert refusal.value.exit_code == 2
    assert "\n" not in str(refusal.value)
    assert all(p.requires_grad for p in model.parameters())  # refused before anything is touched
    apply_lora(model, PLAIN)
    with pytest.raises(LoraError, match="has adapters already"):
        apply_lora(model, PLAIN)


def test_targets_may_name_one_layer():
    model = adapted(replace(PLAIN, targets=("layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj")))
    where = [name for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert where == ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"]


@pytest.mark.parametrize(
    "values",
    [{"targets": ()}, {"targets": ("q_proj", "q_proj")}, {"modules_to_save": ("norm", "norm")}],
    ids=str,
)
def test_impossible_values(values: dict):
    with pytest.raises(ValueError, match=f"^{next(iter(values))}: expected .*, got "):
        LoraConfig(**values)


def test_the_section_of_the_configuration():
    argv = ["--lora.rank=8", "--lora.targets=q_proj", "--lora.targets=v_proj", "--lora.dora"]
    cfg = load_config(argv, "train").lora
    assert cfg == LoraConfig(rank=8, targets=("q_proj", "v_proj"), dora=True)
    assert load_config([], "train").lora == LoraConfig()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_state_round_trip(variant: str):
    trained = shaken(adapted(VARIANTS[variant]))
    state = copies(lora_state(trained))
    assert set(state) == {name for name, p in trained.named_parameters() if p.requires_grad}
    fresh = adapted(VARIANTS[variant])
    load_lora(fresh, state)
    assert torch.equal(logits(fresh), logits(trained))
    whole = adapted(VARIANTS[variant])
    whole.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(logits(whole), logits(trained))


def test_c05_an_adapter_that_does_not_fit_is_refused_as_a_whole():
    """A missing key was once a warning, and the model answered with a random adapter."""
    state = copies(lora_state(shaken(adapted())))
    one, two, *_ = state
    state["extra.lora_A"] = state.pop(one)
    state[two] = torch.zeros(1, 2)
    model = adapted()
    before = copies(model.state_dict())
    with pytest.raises(LoraError) as refusal:
        load_lora(model, state)
    for part in (f"missing: {one}", "unexpected: extra.lora_A", f"mis-shaped: {two} (1, 2) instead of "):
        assert part in str(refusal.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- PEFT -------------------------------------------------------------------------------------------------------------

KINDS = ["qwen2", "qwen2-untied", "qwen3", "llama-biased"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for kind in [*KINDS, "gpt2"]:
        theirs(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in [*KINDS, "gpt2"]}


def written(cfg: LoraConfig, base: Path, folder: Path, **more: Any) -> GPT:
    """A trained adapter in a folder, and the model that it belongs to."""
    model, _ = load_model(base)
    apply_lora(model, cfg)
    shaken(model)
    folder.mkdir(parents=True)
    write_adapter(model, cfg, base, None, folder, **more)
    return model


def base_of_theirs(base: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_we_write_and_has_our_gradients(kind: str, variant: str, bases, tmp_path: Path):
    ours = written(VARIANTS[variant], bases[kind], tmp_path / "adapter")
    reference = peft.PeftModel.from_pretrained(base_of_theirs(bases[kind]), tmp_path / "adapter", is_trainable=True)
    with torch.no_grad():
        expected = reference(IDS, use_cache=False).logits
    assert close(logits(ours), expected)

    labels = IDS.clone()
    labels[:, 0] = IGNORE  # the first token is nobody's target; the labels are shifted there
    reference(IDS, labels=labels, use_cache=False).loss.backward()
    loss_of(ours).backward()
    theirs_by_name = {
        from_peft_name(re.sub(r"(?<=_vector)\.default\.weight|\.default|\.modules_to_save", "", name)): p.grad
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            expected = theirs_by_name.pop(name)
            assert (parameter.grad - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-9, name
            compared += 1
    assert compared == len(lora_state(ours))
    assert not theirs_by_name


@pytest.mark.parametrize("kind", ["qwen2", "qwen2-untied"])
@pytest.mark.parametrize("saved", [("lm_head",), ("embed_tokens", "lm_head")])
def test_heads_trained_in_full(kind: str, saved: tuple[str, ...], bases, tmp_path: Path):
    cfg = replace(PLAIN, modules_to_save=saved)
    if kind == "qwen2":
        model, _ = load_model(bases[kind])
        with pytest.raises(LoraError, match="a tied head is embed_tokens"):
            apply_lora(model, cfg)
        return
    ours = written(cfg, bases[kind], tmp_path / "adapter")
    reference = peft.PeftModel.from_pretrained(base_of_theirs(bases[kind]), tmp_path / "adapter")
    with torch.no_grad():
        assert close(logits(ours), reference(IDS).logits)
    again, _ = load_model(tmp_path / "adapter")
    assert close(logits(again), logits(ours))


def made_by_peft(kind: str, folder: Path, bases: dict[str, Path], **arguments: Any) -> nn.Module:
    cfg = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | arguments)
    model = shaken(peft.get_peft_model(base_of_theirs(bases[kind]), cfg)).eval()
    model.save_pretrained(folder)
    return model


LINEAR = list(PLAIN.targets)
BY_PEFT: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "set": {"target_modules": {"up_proj", "o_proj"}},
    "all-linear": {"target_modules": "all-linear"},  # PEFT resolves it to names before it saves
    "default": {},
    "one-layer": {"target_modules": ["layers.1.mlp.down_proj"]},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "gaussian": {"target_modules": LINEAR, "init_lora_weights": "gaussian"},
    "embedding": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
    "both": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head", "norm"], "use_dora": True},
    "kept-tied": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "kept-tied-head": {"target_modules": LINEAR, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "kept-tied-both": {
        "target_modules": LINEAR,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
}


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied modules:UserWarning")
@pytest.mark.parametrize(
    ("kind", "form"),
    [(kind, form) for kind in KINDS for form in BY_PEFT if "qwen2" in kind or form in ("all-linear", "dora", "both")],
)
def test_we_load_what_peft_writes(kind: str, form: str, bases, tmp_path: Path):
    """PEFT trains a tied head apart from its embedding unless told otherwise: then they come apart here too."""
    reference = made_by_peft(kind, tmp_path / "adapter", bases, **BY_PEFT[form])
    with torch.no_grad():
        expected = reference(IDS).logits
    merged, tokenizer = load_model(tmp_path / "adapter")
    assert tokenizer is None
    assert close(logits(merged), expected)
    assert not lora_state(merged)
    assert not merged.training
    beside, _ = load_model(tmp_path / "adapter", merge=False)
    assert close(logits(beside), expected)
    assert {name for name, p in beside.named_parameters() if p.requires_grad} == set(lora_state(beside))
    tied = base_of_theirs(bases[kind]).config.tie_word_embeddings and form not in ("embedding", "head", "both")
    assert merged.cfg.tie_word_embeddings == tied == (merged.lm_head is None)
    export(merged, None, tmp_path / "out")
    with torch.no_grad():
        assert close(base_of_theirs(tmp_path / "out")(IDS).logits, expected)
    weights.export_adapter(tmp_path / "adapter", tmp_path / "again")
    stored, again = (load_file(tmp_path / name / weights.ADAPTER_WEIGHTS) for name in ("adapter", "again"))
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    back = peft.PeftModel.from_pretrained(base_of_theirs(bases[kind]), tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(back(IDS).logits, expected)


def test_peft_sees_its_own_configuration_in_ours(bases, tmp_path: Path):
    """No key that PEFT does not know: it would warn, and advise an upgrade that does not help."""
    cfg = replace(VARIANTS["norm"], dropout=0.1, rslora=True)
    written(cfg, bases["qwen2"], tmp_path / "adapter")
    theirs_cfg = peft.LoraConfig.from_pretrained(tmp_path / "adapter")  # warnings are errors
    assert (theirs_cfg.r, theirs_cfg.lora_alpha, theirs_cfg.lora_dropout, theirs_cfg.use_rslora) == (4, 8, 0.1, True)
    assert theirs_cfg.target_modules == set(cfg.targets)
    assert theirs_cfg.modules_to_save == ["norm"]
    assert theirs_cfg.task_type == "CAUSAL_LM"
    assert theirs_cfg.base_model_name_or_path == str(bases["qwen2"].resolve())
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        assert close(logits(load_model(tmp_path / "adapter")[0]), auto(IDS).logits)


def test_names_and_configuration_round_trip():
    for cfg in VARIANTS.values():
        names = {name: torch.zeros(0) for name in lora_state(adapted(cfg))}
        assert all(from_peft_name(to_peft_name(name)) == name for name in names)
        ours = replace(cfg, targets=tuple(sorted(cfg.targets)), modules_to_save=tuple(sorted(cfg.modules_to_save)))
        assert from_peft(to_peft(cfg, "base", tied=False)) == ours
    for name in (
        "model.norm.weight",
        "base_model.model.x.lora_A",
        "base_model.model.x.lora_magnitude",
        "x.lora_A.weight",
    ):
        with pytest.raises(LoraError, match="not the name of a tensor"):
            from_peft_name(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type: expected 'LORA', got 'LOHA'"),
        ({"peft_type": None}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type: expected 'CAUSAL_LM' or None, got 'SEQ_CLS'"),
        ({"bias": "all"}, "bias: expected 'none' or None, got 'all'"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias: not supported, got True"),
        ({"rank_pattern": {f"layers.{n}": 8 for n in range(99)}}, "rank_pattern: not supported, got .{1,60}$"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern: not supported"),
        ({"layers_to_transform": [1]}, "layers_to_transform: not supported"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules: not supported"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices: not supported"),
        ({"target_parameters": ["x.weight"]}, "target_parameters: not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected True or .*, got 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"use_something_new": True}, "use_something_new: not supported, got True"),
        ({"revision": "abc123"}, "revision: expected None or 'main', got 'abc123'"),
        ({"target_modules": "all-linear"}, "target_modules: expected a list of names, got 'all-linear'"),
        ({"target_modules": r".*\.q_proj"}, "target_modules: expected a list of names"),
        ({"target_modules": None}, "target_modules: expected a list of names"),
        ({"target_modules": []}, "targets: expected one name or more"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"lora\.targets: .* got 'lm_head'"),
        ({"modules_to_save": "norm"}, "modules_to_save: expected a list of names"),
        ({"modules_to_save": ["nowhere"]}, "got 'nowhere'"),
        ({"r": "4"}, "r: expected a number, got '4'"),
        ({"r": True}, "r: expected a number"),
        ({"r": 0}, "r: expected 1 or more"),
        ({"r": 10**12}, "expected 1000000000000 rows as r says"),
        ({"lora_alpha": None}, "lora_alpha: expected a number"),
        ({"lora_alpha": float("nan")}, "alpha: expected float > 0"),
        ({"lora_dropout": 2.0}, "dropout: expected"),
        ({"use_dora": True}, "missing: .*lora_magnitude"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path: expected a folder or hub id, got None"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "x" * 5000}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "\0"}, "base_model_name_or_path"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_would_be_computed_differently_is_refused(change: dict, said: str, bases, tmp_path: Path):
    written(PLAIN, bases["qwen2"], tmp_path / "adapter")
    path = tmp_path / "adapter" / weights.ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tmp_path / "adapter" / weights.BASE_RECORD).unlink()
    with pytest.raises(CheckpointError, match=said) as refusal:
        load_model(tmp_path / "adapter")
    assert "\n" not in str(refusal.value)
    assert str(tmp_path / "adapter") in str(refusal.value)


def test_variants_that_peft_really_writes_are_refused(bases, tmp_path: Path):
    made_by_peft("qwen2", tmp_path / "regex", bases, target_modules=r".*\.[qv]_proj")
    made_by_peft("qwen2", tmp_path / "ranks", bases, target_modules=["q_proj"], rank_pattern={"q_proj": 8})
    made_by_peft("qwen2", tmp_path / "bias", bases, target_modules=["q_proj"], bias="lora_only")
    made_by_peft("gpt2", tmp_path / "conv", bases, target_modules=["c_attn"], fan_in_fan_out=True)
    loha = peft.get_peft_model(base_of_theirs(bases["qwen2"]), peft.LoHaConfig(target_modules=["q_proj"]))
    loha.save_pretrained(tmp_path / "loha")
    for name, said in (("regex", "target_modules"), ("ranks", "rank_pattern"), ("bias", "bias"),
                       ("conv", "fan_in_fan_out"), ("loha", "peft_type")):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"{said}: "):
            load_model(tmp_path / name)


def test_shapes_of_our_own_keep_their_adapters(bases, tmp_path: Path):
    cfg = replace(PLAIN, targets=("q_proj", "up_proj"))
    ours = written(cfg, bases["gpt2"], tmp_path / "adapter")
    again, _ = load_model(tmp_path / "adapter")
    assert close(logits(again), logits(ours))
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.PeftModel.from_pretrained(base_of_theirs(bases["gpt2"]), tmp_path / "adapter")
    export(again, None, tmp_path / "out")
    with torch.no_grad():
        assert close(base_of_theirs(tmp_path / "out")(IDS).logits, logits(ours))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_c04_resume_with_an_adapter(bases, tmp_path: Path):
    """Loaded unmerged, an adapter trains on: the same names, live tensors, and the same next step."""
    cfg = VARIANTS["mlp"]
    ours = written(cfg, bases["qwen2-untied"], tmp_path / "adapter")
    again, _ = load_model(tmp_path / "adapter", merge=False)
    assert torch.equal(logits(again), logits(ours))
    results = []
    for model in (ours.train(), again.train()):
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        before = copies(lora_state(model))
        groups = parameter_groups(model, load_config([], "train").train)
        optimizer = torch.optim.AdamW([p for members in groups.values() for p in members.values()], lr=1e-3)
        loss_of(model).backward()
        optimizer.step()
        after = lora_state(model)
        assert all(not torch.equal(after[name], before[name]) for name in after)
        results.append((names, copies(after)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_loading_does_not_disturb_the_random_numbers(bases, tmp_path: Path):
    written(PLAIN, bases["qwen2"], tmp_path / "adapter")
    before = torch.get_rng_state()
    load_model(tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_adapters_load_in_the_wanted_dtype(dtype: torch.dtype, bases, tmp_path: Path):
    ours = written(VARIANTS["dora"], bases["qwen2"], tmp_path / "adapter")
    merged, _ = load_model(tmp_path / "adapter", dtype=dtype)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    beside, _ = load_model(tmp_path / "adapter", dtype=dtype, merge=False)
    assert {p.dtype for n, p in beside.named_parameters() if "lora_" in n} == {torch.float32}
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    expected = logits(ours)
    for model in (merged, beside):
        assert (logits(model) - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_hash_is_of_the_weights_and_of_nothing_else(bases, tmp_path: Path):
    one = hash_weights(bases["qwen2-untied"])
    theirs("qwen2-untied").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert hash_weights(tmp_path / "sharded") == one
    model, _ = load_model(bases["qwen2-untied"])
    export(model, None, tmp_path / "exported")
    assert hash_weights(tmp_path / "exported") == one
    export(model, None, tmp_path / "half", torch.bfloat16)
    assert hash_weights(tmp_path / "half") != one
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    export(model, None, tmp_path / "other")
    assert hash_weights(tmp_path / "other") != one
    state = load_file(tmp_path / "exported" / "model.safetensors")
    q, k = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    save_file(state | {q: state[k], k: state[q]}, tmp_path / "exported" / "model.safetensors")
    assert hash_weights(tmp_path / "exported") != one


def test_another_base_is_refused(bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = tmp_path / "base"
    shutil.copytree(bases["qwen2"], base)
    written(PLAIN, base, tmp_path / "adapter")
    old = hash_weights(base)
    model, _ = load_model(base)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    shutil.rmtree(base)
    export(model, None, base)
    with pytest.raises(CheckpointError) as refusal:
        load_model(tmp_path / "adapter")
    said = str(refusal.value)
    assert old[:12] in said
    assert hash_weights(base)[:12] in said
    assert "--allow_mismatch" in said
    assert "\n" not in said
    warnings: list[str] = []
    monkeypatch.setattr(weights, "warn", warnings.append)
    load_model(tmp_path / "adapter", allow_mismatch=True)
    assert len(warnings) == 1
    assert old[:12] in warnings[0]
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=r"base_model_name_or_path: .*base: no such folder"):
        load_model(tmp_path / "adapter")


def test_adapter_and_base_may_move_together(bases, tmp_path: Path):
    shutil.copytree(bases["qwen2"], tmp_path / "runs" / "base")
    ours = written(PLAIN, tmp_path / "runs" / "base", tmp_path / "runs" / "tuned")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    again, _ = load_model(tmp_path / "elsewhere" / "tuned")
    assert close(logits(again), logits(ours))


def test_the_base_may_be_a_run_folder(bases, tmp_path: Path):
    """The checkpoint that was the newest is recorded, since the run may go on."""
    model, _ = load_model(bases["qwen2"])
    for step in (10, 20):
        export(model, None, tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
        runs.seal(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    ours = written(PLAIN, tmp_path / "run", tmp_path / "adapter")
    with torch.no_grad():
        model.model.norm.weight.zero_()
    export(model, None, tmp_path / "run" / "checkpoints" / "step-00000030")
    runs.seal(tmp_path / "run" / "checkpoints" / "step-00000030")
    again, _ = load_model(tmp_path / "adapter")
    assert close(logits(again), logits(ours))


def test_weights_gathered_by_the_caller_are_what_is_written(bases, tmp_path: Path):
    gathered = copies(written(VARIANTS["embedding"], bases["qwen2"], tmp_path / "one").state_dict())
    spread, _ = load_model(bases["qwen2"])
    apply_lora(spread, VARIANTS["embedding"])
    (tmp_path / "two").mkdir()
    write_adapter(spread, VARIANTS["embedding"], bases["qwen2"], None, tmp_path / "two", state=gathered)
    one, two = (load_file(tmp_path / name / weights.ADAPTER_WEIGHTS) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_adapter_of_an_adapter_is_refused(bases, tmp_path: Path):
    model = written(PLAIN, bases["qwen2"], tmp_path / "first")
    (tmp_path / "second").mkdir()
    with pytest.raises(CheckpointError, match="is an adapter"):
        write_adapter(model, PLAIN, tmp_path / "first", None, tmp_path / "second")
    write_adapter(model, PLAIN, tmp_path / "first", None, tmp_path / "second", base_hash="0" * 64)
    with pytest.raises(CheckpointError, match="is an adapter itself"):
        load_model(tmp_path / "second")
    path = tmp_path / "first" / weights.ADAPTER_CONFIG  # which is its own base, and so on
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "first")}))
    (tmp_path / "first" / weights.BASE_RECORD).unlink()
    with pytest.raises(CheckpointError, match="is an adapter itself"):
        load_model(tmp_path / "first")


def test_a_run_folder_with_adapters_is_its_newest(bases, tmp_path: Path):
    for step in (5, 100, 12):
        newest = written(PLAIN, bases["qwen2"], tmp_path / "run" / "checkpoints" / f"step-{step:08d}", base_hash=None)
        with torch.no_grad():
            newest.model.layers[0].mlp.up_proj.lora_B.fill_(step)
        write_adapter(newest, PLAIN, bases["qwen2"], None, tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
        runs.seal(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
        if step == 100:
            expected = logits(newest)
    assert close(logits(load_model(tmp_path / "run")[0]), expected)


def test_the_tokenizer_of_the_adapter_comes_first(tmp_path: Path):
    tokenizer = load_tokenizer("bytes")
    model = tiny.model(vocab_size=512)
    export(model, tokenizer, tmp_path / "base")
    apply_lora(model, PLAIN)
    for name, own in (("without", None), ("with", tokenizer)):
        (tmp_path / name).mkdir()
        write_adapter(model, PLAIN, tmp_path / "base", own, tmp_path / name)
        assert load_model(tmp_path / name)[1].hash == tokenizer.hash
    record = tmp_path / "with" / weights.BASE_RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"tokenizer_hash": "f" * 64}))
    with pytest.raises(CheckpointError, match="tokenizer: the model was trained with ffffffffffff"):
        load_model(tmp_path / "with")
    record.write_text(json.dumps({"sha256": 5}))
    with pytest.raises(CheckpointError, match=r"base\.json: expected strings"):
        load_model(tmp_path / "with")


def spoiled(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / weights.ADAPTER_WEIGHTS)
        change(state)
        save_file(state, folder / weights.ADAPTER_WEIGHTS)

    return spoil


KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
SPOILED = {
    "missing": (spoiled(lambda s: s.pop(KEY)), r"missing: model\.layers\.0\.mlp\.up_proj\.lora_B"),
    "extra": (spoiled(lambda s: s.update({KEY.replace("up", "left"): s[KEY].clone()})), "unexpected: .*left_proj"),
    "no prefix": (spoiled(lambda s: s.update({"model.norm.weight": torch.ones(32)})), "not the name of a tensor"),
    "a base weight": (
        spoiled(lambda s: s.update({"base_model.model.model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)})),
        r"unexpected: model\.layers\.0\.mlp\.up_proj\.weight",
    ),
    "shape": (spoiled(lambda s: s.update({KEY: torch.zeros(3, 4)})), r"mis-shaped: .* \(3, 4\) instead of \(48, 4\)"),
    "rank": (spoiled(lambda s: s.update({KEY.replace("_B", "_A"): torch.zeros(8, 32)})), "expected 4 rows as r says"),
    "scalar": (spoiled(lambda s: s.update({KEY.replace("_B", "_A"): torch.tensor(1.0)})), "expected 4 rows as r says"),
    "integers": (spoiled(lambda s: s.update({KEY: torch.zeros(48, 4, dtype=torch.int64)})), "expected floating-point"),
    "empty": (lambda f: (f / weights.ADAPTER_WEIGHTS).write_bytes(b""), "not a readable safetensors file"),
    "gone": (lambda f: (f / weights.ADAPTER_WEIGHTS).unlink(), r"no adapter_model\.safetensors"),
    "config": (lambda f: (f / weights.ADAPTER_CONFIG).write_text("[1]"), "expected a JSON object"),
    "record": (lambda f: (f / weights.BASE_RECORD).write_text("{"), "not readable JSON"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(SPOILED))
def test_c05_damaged_adapters_are_one_line(what: str, bases, tmp_path: Path):
    written(PLAIN, bases["qwen2"], tmp_path / "adapter")
    change, said = SPOILED[what]
    change(tmp_path / "adapter")
    for allow in (False, True):  # no option turns a missing tensor into a random one
        with pytest.raises(CheckpointError, match=said) as refusal:
            load_model(tmp_path / "adapter", allow_mismatch=allow)
        assert "\n" not in str(refusal.value)


def test_s1_pickled_adapters_do_not_run(bases, tmp_path: Path):
    canary = tmp_path / "canary"

    class Malicious:
        def __reduce__(self):
            return Path.touch, (canary,)

    written(PLAIN, bases["qwen2"], tmp_path / "adapter")
    good = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    torch.save({"x": Malicious()}, tmp_path / "evil")
    for name in good:
        (tmp_path / "adapter" / name).write_bytes((tmp_path / "evil").read_bytes())
        with pytest.raises(CheckpointError):
            load_model(tmp_path / "adapter")
        (tmp_path / "adapter" / name).write_bytes(good[name])
    (tmp_path / "adapter" / weights.ADAPTER_WEIGHTS).unlink()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes((tmp_path / "evil").read_bytes())
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle, which is not read"):
        load_model(tmp_path / "adapter")
    assert not canary.exists()


def test_a_model_with_adapters_is_not_written_as_a_plain_one(tmp_path: Path):
    with pytest.raises(ValueError, match="merge_lora first"):
        export(adapted(), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- commands ---------------------------------------------------------------------------------------------------------


def run(main: Callable[[list[str]], int | None], *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script within this process, which saves the seconds that importing torch takes."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), "utf-8") for name in ("stdin", "stdout", "stderr")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *arguments])
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as left:
            run_script(main)
    out, err = (streams[name].seek(0) or streams[name].read() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(arguments, left.value.code, out, err)


def test_export_commands(bases, tmp_path: Path):
    adapter = tmp_path / "adapter"
    ours = written(PLAIN, bases["qwen2"], adapter)
    done = run(checkpoint.main, "export", str(adapter), str(tmp_path / "merged"), "--merge")
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert close(base_of_theirs(tmp_path / "merged")(IDS).logits, logits(ours))
    assert not (tmp_path / "merged" / weights.ADAPTER_CONFIG).exists()
    done = run(checkpoint.main, "export", str(adapter), str(tmp_path / "copy"), "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "PeftModel" in done.stdout
    assert {t.dtype for t in load_file(tmp_path / "copy" / weights.ADAPTER_WEIGHTS).values()} == {torch.bfloat16}
    assert read_adapter(tmp_path / "copy").base_hash == read_adapter(adapter).base_hash
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "copy").iterdir()} == {"0o644"}

    whole = run(checkpoint.main, "export", str(bases["qwen2"]), str(tmp_path / "x"), "--merge")
    assert (whole.returncode, whole.stderr.count("\n")) == (2, 1)
    assert "expected an adapter" in whole.stderr
    compare = run(checkpoint.main, "parity", str(adapter))
    assert (compare.returncode, compare.stderr.count("\n")) == (4, 1)
    assert "export --merge" in compare.stderr
    config = json.loads((adapter / weights.ADAPTER_CONFIG).read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / weights.ADAPTER_CONFIG).write_text(json.dumps(config))
    (adapter / weights.BASE_RECORD).unlink()
    command = [sys.executable, "checkpoint.py", "export", str(adapter), str(tmp_path / "x"), "--merge"]
    missing = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (missing.returncode, missing.stderr.count("\n")) == (4, 1)
    assert "no such folder" in missing.stderr
    assert not (tmp_path / "x").exists()


def test_infer_takes_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = load_tokenizer("bytes")
    model = tiny.model(vocab_size=512)
    base = tmp_path / "runs" / "base" / "checkpoints" / "step-00000001"
    export(model, tokenizer, base)
    runs.seal(base)
    folder = tmp_path / "runs" / "tuned" / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    apply_lora(model, PLAIN)
    write_adapter(shaken(model), PLAIN, tmp_path / "runs" / "base", tokenizer, folder)
    runs.seal(folder)
    asked = ["--prompt", "ab", "--temperature", "0", "--max_new_tokens", "8", "--run.device", "cpu"]
    done = run(infer.main, "--ckpt", str(tmp_path / "runs" / "tuned"), *asked)
    assert done.returncode == 0, done.stderr
    export(load_model(folder)[0], tokenizer, tmp_path / "merged")
    assert run(infer.main, "--ckpt", str(tmp_path / "merged"), *asked).stdout == done.stdout
    monkeypatch.setattr(infer, "RUNS", tmp_path / "runs")
    os.utime(base / "manifest.json", (1e9, 1e9))
    assert infer.newest_run() == tmp_path / "runs" / "tuned"
