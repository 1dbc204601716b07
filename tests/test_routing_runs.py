"""Routed models in use: runs, checkpoints, ranks, transfer from dense weights, adapters, export, figures."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import tiny
import torch
from test_finetune import base, pairs  # noqa: F401
from test_finetune import options as tuning
from test_infer import run as run_infer
from torch import Tensor

import bench
import finetune
import infer
import train
from checkpoint import main as checkpoint_main
from data import Batch, micro_batches
from model import GPT, IGNORE, ModelConfig
from nanoqwen import evaluate, optim, plan
from nanoqwen.config import load_config
from nanoqwen.distributed import World
from nanoqwen.errors import ConfigError
from nanoqwen.flops import dense_flops_per_token, flops_per_token
from nanoqwen.lora import LoraConfig, apply_lora, lora_state
from nanoqwen.routing import (
    RoutingConfig,
    build_model,
    layers_per_token,
    penalty_weights,
    routing_mode,
    set_step,
)
from nanoqwen.runfolder import verify
from nanoqwen.tokenizer import load_tokenizer
from nanoqwen.weights import CheckpointError, export, is_adapter, load_model
from train import LanguageModeling, with_routers

KINDS = ("mod", "dtf", "tdtf")
OWN = {
    "mod": {"mod_router", "causal_router"},
    "dtf": {"prior_ffn", "surprise_router", "causal_router"},
    "tdtf": {"transition_net", "surprise_router", "causal_router"},
}
ALONE = World(0, 0, 1, torch.device("cpu"))
V = 97
each_kind = pytest.mark.parametrize("kind", KINDS)


def model(kind: str, seed: int = 0, **more) -> GPT:
    torch.manual_seed(seed)
    return build_model(tiny.config(num_hidden_layers=4), RoutingConfig(kind=kind, capacity=0.5, **more))


def batch(rows: int = 8, length: int = 24, share: float = 1.0) -> Batch:
    ids = torch.randint(V, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(2)) >= share] = IGNORE
    return Batch(ids[:, :-1], targets, None)


def objective(kind: str, **more) -> LanguageModeling:
    gpt = model(kind, **more).train()
    return LanguageModeling(gpt, {"z_loss": 0.0} | penalty_weights(gpt.routing))


def options(corpus: Path, run: Path, kind: str, *more: str) -> list[str]:
    shape = (f"--routing.kind={kind}", "--model.num_hidden_layers=4", "--routing.calibrate_tokens=512")
    return runs.options(corpus, run, *shape, *more)


# --- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.4])
@each_kind
def test_loss_and_gradients_do_not_depend_on_how_a_batch_is_cut(kind: str, share: float):
    """Also where rows have different numbers of targets: a row's mean counts as often as it has some."""
    found = []
    for rows in (8, 3, 1):
        target = objective(kind)
        outs = [target(*micro) for micro in micro_batches(batch(share=share), rows, ALONE.device)]
        weight = sum(out.weight for out in outs)
        sum(out.total / weight for out in outs).backward()
        sums = {k: float(sum(out.metrics[k].detach() for out in outs) / weight) for k in ("train/loss", "loss")}
        found.append((sums, {n: p.grad for n, p in target.model.named_parameters()}))
    for sums, gradients in found[1:]:
        assert sums == pytest.approx(found[0][0], abs=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-4, atol=1e-5, msg=name)


@each_kind
def test_inv_27_the_total_is_the_text_loss_and_the_weighted_penalties(kind: str):
    target = objective(kind)
    optimizers = optim.Optimizers(
        optim.parameter_groups(target.model, load_config([], "train").train),
        load_config([], "train").train,
        target.model.routing,
    )
    optimizers.set_rate(1e-3)
    micros = micro_batches(batch(), 4, ALONE.device)
    how = {"clip": 1.0, "scaler": torch.amp.GradScaler("cpu", enabled=False), "autocast": train.nullcontext()}
    found = {name: v.item() for name, v in train.train_step(target, optimizers, micros, ALONE, **how).items()}
    weights = penalty_weights(target.model.routing)
    expected = found["train/lm_loss"] + sum(weight * found[f"train/{name}"] for name, weight in weights.items())
    assert found["train/loss"] == pytest.approx(expected, abs=1e-6)
    assert found["train/perplexity"] == pytest.approx(math.exp(found["train/lm_loss"]), rel=1e-6)
    assert found["train/lm_loss"] == found["loss"]


@each_kind
def test_inv_28_a_step_on_the_penalties_moves_every_router(kind: str):
    gpt = model(kind, mod_z_loss_weight=1e-4).train()
    watched = {n: p.detach().clone() for n, p in gpt.named_parameters() if set(n.split(".")) & OWN[kind]}
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2, eps=1e-20, weight_decay=0.0)
    out = gpt(batch().tokens)
    sum(weight * out.penalties[name].sum() for name, weight in penalty_weights(gpt.routing).items()).backward()
    optimizer.step()
    now = dict(gpt.named_parameters())
    for name, old in watched.items():
        if "surprise_router" not in name:  # the text alone teaches these: INV-13
            assert not torch.equal(now[name].detach(), old), name


@pytest.mark.parametrize("weights", [{}, {"causal_los": 0.01, "prior_loss": 0.05}, {"causal_loss": 0.01}])
def test_inv_28_a_misspelt_or_missing_weight_is_an_error(weights: dict[str, float]):
    with pytest.raises(ValueError, match="penalties: expected weights of"):
        LanguageModeling(model("dtf").train(), weights)(batch().tokens, batch().targets)


@pytest.mark.parametrize("gate", ["auto", "hard"])
@each_kind
def test_every_parameter_has_a_gradient_so_that_no_rank_waits_for_one(kind: str, gate: str):
    off = {f"{name}_weight": 0.0 for name in ("causal_loss", "prior_loss", "tpn_loss", "mod_aux_loss")}
    target = objective(kind, gate=gate, **off)
    target(batch().tokens, batch().targets).total.backward()
    assert [name for name, p in target.model.named_parameters() if p.grad is None] == []


# --- rates ------------------------------------------------------------------------------------------------------------


@each_kind
def test_routers_have_groups_and_rates_of_their_own(kind: str):
    cfg, gpt = load_config([], "train").train, model(kind, prior_lr=2e-3, mod_lr=3e-3)
    groups = optim.parameter_groups(gpt, cfg)
    named = [name for members in groups.values() for name in members]
    assert sorted(named) == sorted(name for name, _ in gpt.named_parameters())
    expected = {"mod": {"mod"}, "dtf": {"prior", "prior_norm", "surprise"}, "tdtf": {"prior", "prior_norm", "surprise"}}
    assert set(groups) == {"decay", "plain", "causal"} | expected[kind]
    optimizers = optim.Optimizers(groups, cfg, gpt.routing)
    optimizers.set_rate(cfg.lr / 2)
    rates = {"decay": cfg.lr, "plain": cfg.lr, "causal": 1e-3, "surprise": 1e-2, "prior": 2e-3, "prior_norm": 2e-3}
    rates["mod"] = 3e-3
    for group in optimizers.members[0].param_groups:
        kind_of = next(k for k, members in groups.items() if group["params"][0] is next(iter(members.values())))
        assert group["lr"] == pytest.approx(rates[kind_of] / 2)
        assert (group["weight_decay"] > 0) == (kind_of in ("decay", "prior"))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def done(
    request: pytest.FixtureRequest,
    corpus: Path,
    starter: runs.Starter,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """A run of each kind, all of whose checkpoints are kept, with everything on that follows a schedule."""
    kind, run = request.param, tmp_path_factory.mktemp("routed") / request.param
    starter.run(*options(corpus, run, kind, "--run.keep=99", *schedules(kind)))
    return kind, run


def schedules(kind: str) -> list[str]:
    return ["--routing.capacity_warmup=0.5", *([] if kind == "mod" else ["--routing.beta_mode=linear"])]


def test_what_a_run_says(done: tuple[str, Path]):
    kind, run = done
    row = runs.rows(run)[-1]
    weights = penalty_weights(RoutingConfig(kind=kind))
    total = row["train/lm_loss"] + sum(weight * row[f"train/{name}"] for name, weight in weights.items())
    assert row["train/loss"] == pytest.approx(total, abs=1e-6)
    stats = "selected_fraction causal_acc causal_precision causal_recall causal_bce causal_selected_fraction"
    stats += " causal_acc_baseline causal_bce_baseline "
    spread = "router_logit router_prob" if kind == "mod" else "S_CE S_CU G_cont"
    stats += "" if kind == "mod" else "D_st D_ch CE CU o_ce m_cu beta_ce beta_cu "
    stats += " ".join(f"{name}{end}" for name in spread.split() for end in ("", "_min", "_max", "_std"))
    for layer in ("1", "3", "mean"):
        assert {f"router/{layer}/{name}" for name in stats.split()} <= row.keys()
    for name in stats.split():
        assert row[f"router/mean/{name}"] == pytest.approx((row[f"router/1/{name}"] + row[f"router/3/{name}"]) / 2)
    result = [row for row in runs.lines(run / "metrics.jsonl") if "val/loss" in row][-1]
    assert result["val/loss"] == result["val/loss_causal"] != result["val/loss_topk"]
    assert result["val/perplexity_topk"] == pytest.approx(math.exp(result["val/loss_topk"]))
    assert result["val/used"] == pytest.approx(RoutingConfig(kind=kind).share, abs=0.06)
    assert result["val/router/mean/causal_bce"] > 0


def test_the_capacity_of_a_run_falls_as_its_warm_up_says(done: tuple[str, Path]):
    kind, run = done
    share = RoutingConfig(kind=kind).share
    for step, row in runs.metrics(run).items():
        expected = 1 + (share - 1) * min(1, (step - 1) / 10)
        assert row["router/mean/selected_fraction"] == pytest.approx(math.floor(expected * 32 + 1e-6) / 32)


def test_inv_21_a_checkpoint_is_the_model(done: tuple[str, Path]):
    """With thresholds that were calibrated, and betas where the schedule had brought them."""
    kind, run = done
    gpt, _ = load_model(run)
    at = runs.at(run, 20)
    again, _ = load_model(at)
    hf = json.loads((at / "config.json").read_text())
    assert hf["model_type"] == "nanoqwen"
    assert gpt.routing == again.routing == RoutingConfig(**{**hf["routing"], "layers": ()})
    told = [row for row in runs.lines(run / "metrics.jsonl") if "val/loss" in row][-1]
    for router in again.routers.values():
        assert float(router.causal_router.threshold) == told[f"val/router/{router.layer}/threshold"] != 0.5
        if kind != "mod":
            expected = model(kind, beta_mode="linear")
            set_step(expected, 19, 20)
            assert float(router.surprise_router.beta_ce) == float(expected.routers["1"].surprise_router.beta_ce)
    row = [row for row in runs.lines(run / "metrics.jsonl") if row.get("step") == 20 and "val/loss" in row][-1]
    cfg = load_config([str(run / "config.yaml")], "train")
    trainer = train.build(cfg, ALONE)
    result = evaluate.evaluate(again, trainer.windows, train.token_bytes(trainer.tokenizer), ALONE, train.nullcontext())
    assert result["loss"] == row["val/loss"]


def test_a_run_goes_on_bit_for_bit(done: tuple[str, Path], corpus: Path, starter: runs.Starter, tmp_path: Path):
    kind, run = done
    other = tmp_path / "run"
    shutil.copytree(run, other)
    for step in runs.steps(other):
        if step > 8:
            shutil.rmtree(runs.at(other, step))
    resumed = starter.run(*options(corpus, other, kind, "--run.keep=99", *schedules(kind)))
    assert "resuming from" in resumed.stderr
    assert verify(other) == verify(run)
    assert [row["loss"] for row in runs.rows(other)] == [row["loss"] for row in runs.rows(run)]


def test_another_kind_does_not_go_on(done: tuple[str, Path], corpus: Path, starter: runs.Starter):
    kind, run = done
    other = KINDS[(KINDS.index(kind) + 1) % 3]
    refused = starter.run(*options(corpus, run, other, "--run.keep=99", *schedules(kind)), code=2)
    assert "routing.kind" in refused.stderr


def test_one_layer_cannot_be_routed(corpus: Path, starter: runs.Starter, tmp_path: Path):
    arguments = options(corpus, tmp_path / "run", "mod", "--model.num_hidden_layers=1")
    assert "expected 2 or more" in starter.run(*arguments, code=2).stderr


@pytest.mark.parametrize(
    ("kind", "wrap"),
    [
        ("tdtf", "fsdp"),
        pytest.param("dtf", "ddp", marks=pytest.mark.slow),
        pytest.param("mod", "ddp", marks=pytest.mark.slow),
        pytest.param("dtf", "fsdp", marks=pytest.mark.slow),
        pytest.param("mod", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one(kind: str, wrap: str, corpus: Path, starter: runs.Starter, tmp_path: Path):
    """Also with recomputed activations, under which a sharded block is gathered once more."""
    recompute = f"--train.checkpoint_activations={str(wrap == 'fsdp').lower()}"
    more = ("--model.dropout=0.0", f"--run.parallel={wrap}", "--train.steps=8", recompute)
    starter.run(*options(corpus, tmp_path / "one", kind, *more))
    started = runs.torchrun(tmp_path / "output", options(corpus, tmp_path / "two", kind, *more))
    assert started.wait(120) == 0, started.stderr[-3000:]
    one, two = runs.metrics(tmp_path / "one"), runs.metrics(tmp_path / "two")
    for step, row in one.items():
        for name in ("loss", "train/loss", "train/causal_loss", "router/mean/causal_bce"):
            assert row[name] == pytest.approx(two[step][name], rel=1e-4), (step, name)
    results = [[r for r in runs.lines(tmp_path / name / "metrics.jsonl") if "val/loss" in r] for name in ("one", "two")]
    for a, b in zip(*results, strict=True):
        for name in ("val/loss", "val/loss_topk", "val/used"):
            assert a[name] == pytest.approx(b[name], abs=2e-3)


# --- in and out -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    """A random Qwen2 of transformers, ids, and its logits of them."""
    import transformers

    torch.manual_seed(0)
    shape = {**tiny.SHAPE, "num_hidden_layers": 4, "rope_theta": 1e6, "tie_word_embeddings": True}
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)).eval()
    folder = tmp_path_factory.mktemp("qwen")
    theirs.save_pretrained(folder)
    ids = torch.randint(V, (2, 16))
    with torch.no_grad():
        return folder, ids, theirs(ids).logits


@pytest.mark.parametrize("gate", ["ste", "hard"])
@each_kind
def test_inv_19_at_full_capacity_a_converted_model_is_the_published_one(kind: str, gate: str, qwen: tuple):
    folder, ids, expected = qwen
    gpt, _ = load_model(folder, dtype=torch.float32, routing=RoutingConfig(kind=kind, capacity=1.0, gate=gate))
    assert gpt.routing.kind == kind
    with torch.no_grad(), routing_mode(gpt, "topk"):
        torch.testing.assert_close(gpt(ids).logits, expected, rtol=0, atol=1e-5)


@each_kind
def test_inv_19_exactly_the_routers_are_missing(kind: str, qwen: tuple, tmp_path: Path):
    folder, _, _ = qwen
    gpt, _ = load_model(folder, routing=RoutingConfig(kind=kind))
    added = gpt.state_dict().keys() - load_model(folder)[0].state_dict().keys()
    assert {name.split(".")[2] for name in added} == OWN[kind]
    assert {name.split(".")[1] for name in added} == {"1", "3"}
    source = load_model(folder)[0]
    for name, state in (
        ("short", {k: v for k, v in source.state_dict().items() if k != "model.layers.1.mlp.up_proj.weight"}),
        ("long", {**source.state_dict(), "routers.1.causal_router.bias": torch.zeros(1)}),
    ):
        from nanoqwen.weights import write_folder

        (tmp_path / name).mkdir()
        write_folder(source, None, tmp_path / name, state=state)
        with pytest.raises(CheckpointError, match="missing: model.layers.1" if name == "short" else "unexpected: rout"):
            load_model(tmp_path / name, routing=RoutingConfig(kind=kind))


@each_kind
def test_a_routed_folder_keeps_its_routing_and_takes_no_other(kind: str, tmp_path: Path):
    gpt = model(kind).eval()
    export(gpt, None, tmp_path / "out")
    assert kind in (tmp_path / "out" / "README.md").read_text()
    again, _ = load_model(tmp_path / "out")
    ids = batch().tokens
    assert torch.equal(gpt(ids).logits, again(ids).logits)
    softer, _ = load_model(tmp_path / "out", routing=replace(gpt.routing, causal_loss_weight=0.5))
    assert softer.routing.causal_loss_weight == 0.5
    with pytest.raises(ConfigError, match="routing: "):
        load_model(tmp_path / "out", routing=replace(gpt.routing, kind=KINDS[KINDS.index(kind) - 1]))


def test_routers_stay_precise_in_narrow_weights(tmp_path: Path):
    gpt = model("dtf").eval()
    with routing_mode(gpt, "calibrate"), torch.no_grad():
        gpt(batch().tokens)
    export(gpt, None, tmp_path / "narrow", torch.bfloat16)
    again, _ = load_model(tmp_path / "narrow", dtype=torch.bfloat16)
    assert again.model.embed_tokens.weight.dtype == torch.bfloat16
    for name, tensor in again.routers.state_dict().items():
        assert torch.equal(tensor, gpt.routers.state_dict()[name])
    with torch.no_grad():
        assert again(batch().tokens).logits.isfinite().all()


def test_what_transformers_cannot_compute_is_not_given_to_it(tmp_path: Path):
    export(model("mod"), None, tmp_path / "out")
    with pytest.raises(ConfigError, match="routed layers would compute all tokens"):
        checkpoint_main(["export", str(tmp_path / "out"), str(tmp_path / "hf"), "--hf"])
    assert not (tmp_path / "hf").exists()
    with pytest.raises(CheckpointError, match="no class for this shape"):
        checkpoint_main(["parity", str(tmp_path / "out")])
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(hf | {"model_type": "qwen2"}))
    with pytest.raises(CheckpointError, match="model_type"):  # or its routing would silently be ignored
        load_model(tmp_path / "out")


# --- adapters and fine-tuning -----------------------------------------------------------------------------------------


@each_kind
def test_beside_adapters_the_routers_are_trained_in_full_and_nothing_else(kind: str):
    gpt = model(kind)
    apply_lora(gpt, with_routers(LoraConfig(rank=4), kind))
    for name, p in gpt.named_parameters():
        assert p.requires_grad == (name.startswith("routers.") or ".lora_" in name), name
    saved = {name for name in lora_state(gpt) if ".lora_" not in name}
    assert saved == {name for name in gpt.state_dict() if name.startswith("routers.")}  # thresholds too
    assert not any("lora" in name for name, _ in gpt.routers.named_parameters())


@pytest.mark.parametrize("rank", [0, 4])
@each_kind
def test_a_dense_model_is_fine_tuned_into_a_routed_one(
    kind: str,
    rank: int,
    base: Path,  # noqa: F811
    pairs: Path,  # noqa: F811
    tmp_path: Path,
):
    run = tmp_path / "run"
    more = (f"--routing.kind={kind}", f"--lora.rank={rank}", "--steps=6", "--routing.capacity_warmup=0.5")
    finetune.main(tuning(base, pairs, run, *more, "--run.keep=9"))
    gpt, _ = load_model(run)
    assert gpt.routing.kind == kind
    assert is_adapter(runs.at(run, 6)) == (rank > 0)
    row = [row for row in runs.lines(run / "metrics.jsonl") if "val/loss" in row][-1]
    assert row["val/loss_topk"] > 0
    for router in gpt.routers.values():  # calibrated, and saved with the adapter as well
        assert float(router.causal_router.threshold) != 0.5
    shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(runs.at(tmp_path / "other", 6))
    finetune.main(tuning(base, pairs, tmp_path / "other", *more, "--run.keep=9"))
    assert verify(tmp_path / "other") == verify(run)
    if rank:
        checkpoint_main(["export", str(runs.at(run, 6)), str(tmp_path / "merged"), "--merge"])
        merged, _ = load_model(tmp_path / "merged")
        ids = torch.randint(259, (2, 20))
        alike = load_model(runs.at(run, 6))[0]
        torch.testing.assert_close(merged(ids).logits, alike(ids).logits, rtol=0, atol=1e-6)
    else:  # a routed base brings its own routing
        finetune.main(tuning(run, pairs, tmp_path / "again", "--steps=2", "--warmup_steps=1", "--lora.rank=2"))
        assert load_model(tmp_path / "again")[0].routing.kind == kind


# --- figures ----------------------------------------------------------------------------------------------------------

HALF_B = ModelConfig()  # Qwen2.5-0.5B


@pytest.mark.parametrize(
    ("length", "share", "mod", "dtf"),
    [(1024, 0.5, 0.743, 0.748), (4096, 0.5, 0.725, 0.729), (32_768, 0.5, 0.667, 0.669), (1024, 0.125, 0.559, 0.564)],
)
def test_flops_of_routed_layers(length: int, share: float, mod: float, dtf: float):
    """Of a forward through Qwen2.5-0.5B's layers, beside the dense one, computed by hand."""

    def layers(kind: str, **how) -> float:
        routing = RoutingConfig(kind=kind, capacity=share)
        return flops_per_token(HALF_B, routing, length, **how) - 2 * HALF_B.hidden_size * HALF_B.vocab_size

    whole = layers("dense", training=False)
    assert layers("mod", training=False) / whole == pytest.approx(mod, abs=1e-3)
    assert layers("dtf", training=False) / whole == pytest.approx(dtf, abs=1e-3)
    assert flops_per_token(HALF_B, None, length) == dense_flops_per_token(HALF_B, length)
    three = flops_per_token(HALF_B, RoutingConfig(kind="mod", capacity=share), length)
    assert three == pytest.approx(
        3 * flops_per_token(HALF_B, RoutingConfig(kind="mod", capacity=share), length, training=False)
    )


def test_a_teacher_costs_a_forward():
    """1.25 of a dense forward at half capacity, as the two passes of a training step have it."""
    routing, length = RoutingConfig(kind="tdtf", capacity=0.5), 1024
    mod = flops_per_token(HALF_B, replace(routing, kind="mod"), length)
    dtf = flops_per_token(HALF_B, replace(routing, kind="dtf"), length)
    whole = flops_per_token(HALF_B, None, length, training=False) - 2 * HALF_B.hidden_size * HALF_B.vocab_size
    teacher = flops_per_token(HALF_B, routing, length) - dtf
    assert teacher / whole == pytest.approx(0.5, abs=1e-3)
    assert (teacher + mod / 3 - 2 * HALF_B.hidden_size * HALF_B.vocab_size) / whole == pytest.approx(1.243, abs=2e-3)


@each_kind
def test_the_memory_estimate_falls_with_the_capacity(kind: str):
    cfg = load_config([], "train").train
    found = []
    for share in (0.125, 0.5, 1.0):
        with torch.device("meta"):
            gpt = build_model(HALF_B, RoutingConfig(kind=kind, capacity=share))
        found.append(plan.memory_estimate(gpt, cfg, 4)["activations"])
    with torch.device("meta"):
        whole = plan.memory_estimate(GPT(HALF_B), cfg, 4)["activations"]
    assert found[0] < found[1] < whole
    assert found == sorted(found)


@pytest.mark.parametrize("share", [0.125, 0.5])
@each_kind
def test_the_memory_estimate_is_what_a_forward_keeps(kind: str, share: float):
    """Counted at autograd's own hooks: storages that are kept for the backward, parameters left out."""
    shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    gpt = build_model(ModelConfig(**shape), RoutingConfig(kind=kind, capacity=share)).train()
    own, kept = {p.untyped_storage().data_ptr() for p in gpt.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(512, (1, 512))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = gpt(ids, ids)
        total = out.loss + sum(value.sum() for value in out.penalties.values())
    found = sum(storage.nbytes() for storage in kept.values())
    loop = replace(load_config([], "train").train, seq_len=512, batch_tokens=512)
    estimate = plan.memory_estimate(gpt, loop, 1)
    assert estimate["activations"] + estimate["logits"] == pytest.approx(found, rel=0.15)
    assert total.requires_grad


@pytest.mark.slow
def test_the_benchmark_prints_a_row_for_each_variant(capsys: pytest.CaptureFixture):
    few = ["--capacities", "0.25", "--lengths", "64", "--turns", "1", "--run.device=cpu", "--model.hidden_size=32"]
    bench.main(["routing", *few])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 64 |")]
    assert [line.split("|")[2].strip() for line in table] == ["dense", "mod 0.25", "dtf 0.25", "tdtf 0.25"]


# --- the picture ------------------------------------------------------------------------------------------------------


def test_a_picture_of_a_text_is_its_text_with_a_shade_for_each_piece():
    pieces = [("def", 0), (" add\n", 2), ("(", 2), ("\x1b[2J", 1)]
    assert infer.shade(pieces, 2, colour=False) == "[0]def[2] add\n([1]\x1b[2J"
    picture = infer.shade(pieces, 2, colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", picture).count("\x1b") == 0  # what the text brings is spelled out
    assert re.findall(r"48;5;(\d+)m", picture) == ["234", "254", "254", "244"]
    assert re.sub(r"\x1b\[[0-9;]*m", "", picture).startswith("def add\n(")


def test_infer_shows_where_a_model_computes(tmp_path: Path):
    torch.manual_seed(0)
    gpt = build_model(tiny.config(vocab_size=259, num_hidden_layers=4), RoutingConfig(kind="mod", capacity=0.5))
    with routing_mode(gpt.eval(), "calibrate"), torch.no_grad():
        gpt(torch.randint(259, (1, 64)))
    export(gpt, load_tokenizer("bytes"), tmp_path / "model")
    shown = run_infer(tmp_path / "model", "--show_routing", "--prompt", "naïve text", "--max_new_tokens", "0")
    assert re.sub(r"\[\d\]", "", shown.stdout) == "naïve text\n"
    assert "of 2 routed layers: [0] 0 [1] 1 [2] 2" in shown.stderr
    ids = load_tokenizer("bytes").encode("naïve text")
    used = layers_per_token(gpt, ids)
    assert f"computed {100 * sum(used) / 2 / len(used):.1f} %" in shown.stderr
    more = run_infer(tmp_path / "model", "--show_routing", "--prompt", "naïve text", "--max_new_tokens", "5")
    assert f"{len(ids) + 5} tokens" in more.stderr
    export(GPT(gpt.cfg), load_tokenizer("bytes"), tmp_path / "dense")
    refused = run_infer(tmp_path / "dense", "--show_routing", "--prompt", "a")
    assert refused.returncode == 2
    assert "expected a model with routed layers" in refused.stderr


@each_kind
def test_text_from_the_command_line_with_and_without_beams(kind: str, tmp_path: Path):
    torch.manual_seed(0)
    gpt = build_model(tiny.config(vocab_size=259, num_hidden_layers=4), RoutingConfig(kind=kind, capacity=0.5)).eval()
    export(gpt, load_tokenizer("bytes"), tmp_path / "model")
    for more in (["--temperature", "0"], ["--num_beams", "3"]):
        done = run_infer(tmp_path / "model", "--prompt", "def ", "--max_new_tokens", "9", *more)
        assert done.returncode == 0
        assert "9 written" in done.stderr
