"""The loop: that the loss is what it says, that a stopped run goes on bit for bit, and what a person meets."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny
import torch
from runs import ROOT, Starter, killed_at, lines, metrics, options, script, torchrun
from torch import nn

import train
from data import Batch, micro_batches
from model import IGNORE, KVCache
from nanoqwen import optim, runfolder
from nanoqwen.config import TrainConfig, load_config
from nanoqwen.distributed import World
from nanoqwen.errors import ConfigError, ResumeError
from nanoqwen.lora import LoraConfig, apply_lora, lora_state

ALONE = World(0, 0, 1, torch.device("cpu"))
T = 16


def batch(rows: int = 16, seed: int = 0) -> Batch:
    """Rows with 1 to T targets each: an average over rows would not be one over targets."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, (rows, T + 1), generator=rng)
    targets = ids[:, 1:].clone()
    for row in range(rows):
        targets[row, int(torch.randint(1, T, (), generator=rng)) :] = IGNORE
    targets[3] = IGNORE  # a row without any
    return Batch(ids[:, :-1], targets, None)


def gradients(rows: int, penalties: dict[str, float] | None = None) -> tuple[float, list[torch.Tensor]]:
    objective = train.LanguageModeling(tiny.model().train(), penalties or {})
    seen: list[torch.Tensor] = []

    class Catch:
        names = {p: name for name, p in objective.named_parameters()}  # noqa: RUF012
        members: list = []  # noqa: RUF012

        def step(self, _) -> None:
            seen.extend(p.grad.clone() for p in self.names)

        def zero_grad(self) -> None:
            objective.zero_grad()

    metrics = train.train_step(
        objective,
        Catch(),
        micro_batches(batch(), rows, ALONE.device),
        ALONE,
        clip=1e9,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        autocast=nullcontext(),
    )
    return float(metrics["loss"]), seen


@pytest.mark.parametrize("rows", [1, 3, 4, 8])
def test_f7_loss_and_gradient_do_not_depend_on_how_a_batch_is_cut(rows: int):
    """A mean of means once weighed a short row as much as a long one."""
    whole_loss, whole = gradients(16)
    loss, cut = gradients(rows)
    assert abs(loss - whole_loss) <= 1e-6 * whole_loss
    for a, b in zip(cut, whole, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-9


def test_t02_the_loss_is_the_mean_over_all_targets():
    data, model = batch(), tiny.model()
    logits = model(data.tokens).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), data.targets.flatten(), ignore_index=IGNORE)
    assert gradients(4)[0] == pytest.approx(expected.item(), rel=1e-6)


def test_penalties_are_weighed_once():
    plain, with_z = gradients(16)[1], gradients(16, {"z_loss": 1e-2})[1]
    assert not all(torch.equal(a, b) for a, b in zip(plain, with_z, strict=True))
    model, data = tiny.model(), batch()
    logits = model(data.tokens).logits
    kept = data.targets != IGNORE
    loss = (
        nn.functional.cross_entropy(logits[kept], data.targets[kept]) + 1e-2 * (logits[kept].logsumexp(-1) ** 2).mean()
    )
    loss.backward()
    for a, p in zip(with_z, model.parameters(), strict=True):
        assert (a - p.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-9


def optimizers(model: nn.Module, **changes) -> optim.Optimizers:
    cfg = replace(TrainConfig(), **changes)
    return optim.Optimizers(optim.parameter_groups(model, cfg), cfg)


def step_of(model: nn.Module, members: optim.Optimizers, data: Batch) -> dict[str, torch.Tensor]:
    return train.train_step(
        train.LanguageModeling(model, {}),
        members,
        [data],
        ALONE,
        clip=1.0,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        autocast=nullcontext(),
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_o01_every_parameter_is_in_one_group_and_moves(optimizer: str):
    model = tiny.model().train()
    members = optimizers(model, optimizer=optimizer)
    listed = [p for member in members.members for group in member.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))
    for member in members.members:
        for group in member.param_groups:
            assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    before = [p.clone() for p in model.parameters()]
    step_of(model, members, batch())
    still = [n for (n, p), old in zip(model.named_parameters(), before, strict=True) if torch.equal(p, old)]
    assert all(name.endswith("k_proj.bias") for name in still)  # softmax does not see it


def test_adapters_alone_are_moved_by_muon():
    """There is nothing left for AdamW, which refuses to be made for no parameter."""
    model = tiny.model().train()
    apply_lora(model, LoraConfig(rank=2))
    members = optimizers(model, optimizer="muon", weight_decay=0.0)
    before = {name: tensor.clone() for name, tensor in lora_state(model).items()}
    step_of(model, members, batch())
    assert {name for name, tensor in lora_state(model).items() if not torch.equal(tensor, before[name])} == {
        name
        for name in before
        if name.endswith("lora_B")  # A follows when B is no longer zero
    }
    members.load(members.state())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_f1_a_gradient_that_is_not_finite_changes_nothing(optimizer: str):
    """Multiplying an update by zero does not skip it: 0 x NaN is NaN, in the weights and in the moments."""
    model = tiny.model().train()
    members = optimizers(model, optimizer=optimizer)
    step_of(model, members, batch())
    weights = {n: p.clone() for n, p in model.named_parameters()}
    moments = {n: t.clone() for n, t in members.state().items()}
    hook = model.model.norm.weight.register_hook(lambda grad: grad * math.nan)
    metrics = step_of(model, members, batch(seed=1))
    hook.remove()
    assert metrics["skipped"] == 1
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(t, moments[n]) for n, t in members.state().items())
    assert step_of(model, members, batch(seed=1))["skipped"] == 0


def test_t05_the_reported_norm_is_that_before_clipping():
    model = tiny.model().train()
    norm = step_of(model, optimizers(model), batch())["grad_norm"]
    reference = torch.cat([g.flatten() for g in gradients(16)[1]]).norm()
    assert torch.allclose(norm, reference, rtol=1e-5)


def test_t11_the_label_is_shifted_exactly_once():
    """A fixed cycle is learned to nothing; two shifts would make the model learn what comes after the next token."""
    cycle = torch.arange(200) % 7
    tokens, targets = cycle[:-1].view(1, -1)[:, :64], cycle[1:].view(1, -1)[:, :64]
    model = tiny.model(lively=False, max_position_embeddings=64).train()
    members = optimizers(model, lr=1e-2)
    members.set_rate(1e-2)
    for _ in range(60):
        loss = float(step_of(model, members, Batch(tokens, targets, None))["loss"])
    assert loss < 0.05
    two_ahead = cycle[2:].view(1, -1)[:, :64]
    with torch.no_grad():
        assert float(model(tokens, two_ahead).loss) / 64 > 2


SCHEDULES = ["cosine", "wsd", "linear", "constant"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_l8_t04_schedules_rise_to_the_rate_and_end_at_the_floor(schedule: str):
    cfg = TrainConfig(steps=100, warmup_steps=10, schedule=schedule, lr=2e-3, floor=0.1)
    rates = [optim.lr_at(step, cfg) for step in range(100)]
    assert rates[:10] == pytest.approx([2e-3 * (i + 1) / 10 for i in range(10)])
    assert max(rates) == pytest.approx(2e-3)
    assert rates[-1] == pytest.approx(2e-3 if schedule == "constant" else 2e-4)
    assert all(a >= b - 1e-15 for a, b in itertools.pairwise(rates[10:]))
    if schedule == "cosine":
        assert rates[10 + 45] == pytest.approx(2e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * 45 / 89)) / 2))


@pytest.mark.parametrize("at", [150, 200])
@pytest.mark.parametrize("schedule", [*SCHEDULES, "plateau"])
def test_an_extended_run_goes_on_from_the_rate_that_it_had(schedule: str, at: int, capfd: pytest.CaptureFixture):
    """From the floor of a cosine the rate once jumped by 3.6 to 10 times."""
    cfg = TrainConfig(steps=200, warmup_steps=10, schedule=schedule, lr=2e-3, floor=0.1)
    progress, rate = train.Progress(cfg, min), optim.lr_at(at - 1, cfg)
    for steps in (400, 800):  # the second time in the middle of the first extension
        progress.loop, progress.step = replace(cfg, steps=steps), at
        progress.go_on_from(rate, {"train.steps": [200, steps]})
        progress.load(json.loads(json.dumps(progress.state())))
        rates = []
        for progress.step in range(at, steps):
            rates.append(progress.rate())
        assert rates[0] == pytest.approx(rate, rel=1e-12)
        assert all(a >= b - 1e-15 for a, b in itertools.pairwise(rates))
        assert rates[-1] == pytest.approx(2e-3 if schedule in ("constant", "plateau") else 2e-4)
        assert f"the rate goes on from {rate:.3g}, by schedule {schedule} to" in capfd.readouterr().err
        at, rate = 300, rates[299 - at]


@pytest.mark.parametrize("at", [3, 12, 40])
def test_an_extended_run_keeps_the_warm_up_and_the_pace_of_its_routers(at: int):
    """With `auto` both once grew with the length: the rate fell by 3 to 30 times, the capacity went back towards 1."""
    rates, paces = {}, {}
    for steps in (200, 4_000):
        progress = train.Progress(TrainConfig(steps=200, warmup_steps="auto", lr=2e-3).with_warmup(), min)
        state = json.loads(json.dumps(progress.state() | {"step": at}))
        again = train.Progress(TrainConfig(steps=steps, warmup_steps="auto", lr=2e-3).with_warmup(), min)
        again.load(state)
        again.go_on_from(optim.lr_at(at - 1, progress.loop), {"train.steps": [200, steps]} if steps > 200 else {})
        rates[steps], paces[steps] = again.rate(), again.pace.steps
    assert rates[4_000] == pytest.approx(rates[200], rel=1e-2)
    assert paces[4_000] == 200
    again.loop = replace(again.loop, warmup_steps=100)
    again.go_on_from(1e-3, {"train.warmup_steps": [10, 100]})  # meant as it is
    assert again.loop.warmup_steps == again.pace.warmup_steps == 100


def test_dropout_is_of_the_seed_the_step_and_the_rank():
    drawn = {}
    for place in itertools.product((1, 2), (3, 4), (0, 1)):
        train.seed_step(*place)
        drawn[place] = float(torch.rand(()))
        train.seed_step(*place)
        assert drawn[place] == float(torch.rand(()))
    assert len(set(drawn.values())) == 8


def test_adamw_has_the_moments_of_the_configuration():
    cfg = TrainConfig(beta1=0.8, beta2=0.95, eps=1e-6, lr=1e-3)
    (adamw,) = optim.Optimizers(optim.parameter_groups(tiny.model(), cfg), cfg).members
    assert {group["betas"] for group in adamw.param_groups} == {(0.8, 0.95)}
    assert {group["eps"] for group in adamw.param_groups} == {1e-6}


def test_all_of_progress_is_restored():
    """The evaluations without a better one among it, else patience would begin anew at each resume."""
    loop = TrainConfig(steps=100, warmup_steps=0, schedule="plateau", patience=3, plateau_patience=1)
    progress = train.Progress(loop, lambda result: [result["loss"]])
    for progress.step, loss in enumerate((3.0, 2.0, 2.5, 2.4), start=1):
        progress.update({"loss": loss})
    again = train.Progress(loop, lambda result: [result["loss"]])
    again.load(json.loads(json.dumps(progress.state())))
    assert vars(again) == vars(progress) | {"plateau": again.plateau, "sort_key": again.sort_key}
    assert again.stale == 2
    assert again.plateau.state() == progress.plateau.state()
    assert again.plateau.scale == 0.5


def test_a_run_extended_at_a_rate_of_0_is_warned(capfd: pytest.CaptureFixture):
    cfg = TrainConfig(steps=400, warmup_steps=10, schedule="cosine", lr=2e-3, floor=0.0)
    progress = train.Progress(cfg, min)
    progress.step = 200
    progress.go_on_from(optim.lr_at(199, replace(cfg, steps=200)), {"train.steps": [200, 400]})
    assert progress.rate() == 0
    assert "warning: that rate is 0" in capfd.readouterr().err


def test_the_rate_of_an_extended_run_is_in_its_log(corpus: Path, tmp_path: Path):
    more = ("--train.schedule=cosine", "--train.warmup_steps=2", *allowed("train.steps"))
    for steps in (8, 12):
        train.main(options(corpus, tmp_path / "run", f"--train.steps={steps}", *more))
    rates = [metrics(tmp_path / "run")[step]["lr"] for step in range(1, 13)]
    assert rates[7:] == [pytest.approx(3e-4)] * 5  # the floor, a tenth of the rate
    (event,) = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if "continued" in row]
    assert event["continued"] == {"step": 8, "rate": rates[7]}


@pytest.mark.parametrize("cooldown", range(4))
def test_s01_plateau_is_the_rule_of_torch(cooldown: int):
    """Oracle: torch's ReduceLROnPlateau with the same factor, patience, threshold and cooldown, on 50 traces each."""
    cfg = TrainConfig(schedule="plateau", plateau_cooldown=cooldown, floor=0.0)
    rng = torch.Generator().manual_seed(cooldown)
    for _ in range(50):
        ours, optimizer = optim.Plateau(cfg), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=2, threshold=1e-3, cooldown=cooldown, eps=0
        )
        for loss in (1 + torch.rand(60, generator=rng) * 0.2 - torch.linspace(0, 0.3, 60)).tolist():
            ours.update(loss)
            theirs.step(loss)
            assert ours.scale == optimizer.param_groups[0]["lr"]
    again = optim.Plateau(cfg)
    again.load(json.loads(json.dumps(ours.state())))
    assert vars(again) == vars(ours)


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_says(reference: Path):
    names = {path.name for path in reference.iterdir()}
    assert {"config.yaml", "source.json", "metrics.jsonl", "status.json", "samples.jsonl", "checkpoints"} <= names
    assert sorted(path.name for path in (reference / "checkpoints").iterdir())[-1] == "step-00000020"
    rows = metrics(reference)
    assert sorted(rows) == list(range(1, 21))
    assert {"loss", "grad_norm", "lr", "targets", "epoch", "cursor", "batch_sha"} <= set(rows[1])
    assert all(row["train/perplexity"] == pytest.approx(math.exp(row["loss"]), rel=1e-6) for row in rows.values())
    assert len({row["batch_sha"] for row in rows.values()}) == 20
    assert json.loads((reference / "status.json").read_text())["status"] == "done"
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(reference / "checkpoints" / "step-00000020")


def test_a9_a_finished_run_says_so_and_changes_nothing(corpus: Path, reference: Path, capfd: pytest.CaptureFixture):
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    train.main(options(corpus, reference))
    assert "is complete: 20 steps" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()} == before


def test_a6_sigterm_saves_and_leaves_with_75(starter: Starter, corpus: Path, reference: Path, tmp_path: Path):
    run = tmp_path / "stopped"
    started = time.monotonic()
    assert killed_at(starter, run, 6, signal.SIGTERM, options(corpus, run)).wait() == 75
    assert time.monotonic() - started < 60
    assert json.loads((run / "status.json").read_text())["status"] == "preempted"
    train.main(options(corpus, run))
    assert runfolder.verify(run) == runfolder.verify(reference)


@pytest.mark.parametrize(
    "more", [("--train.optimizer=muon",), ("--run.dtype=bfloat16", "--train.checkpoint_activations=true")]
)
def test_a2_other_modes_go_on_bitwise(starter: Starter, corpus: Path, tmp_path: Path, more: tuple[str, ...]):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train.main(options(corpus, straight, *more))
    arguments = options(corpus, stopped, *more)
    assert killed_at(starter, stopped, 10, signal.SIGKILL, arguments).wait() == -signal.SIGKILL
    train.main(arguments)
    assert runfolder.verify(straight) == runfolder.verify(stopped)


def test_a12_evaluation_and_samples_do_not_disturb(corpus: Path, reference: Path, tmp_path: Path):
    """The plateau rule listens to evaluations, so this holds for schedules that do not."""
    digests = set()
    for name, every in (("often", 3), ("never", 1000)):
        train.main(options(corpus, tmp_path / name, f"--train.eval_every={every}", "--train.schedule=cosine"))
        digests.add(runfolder.verify(tmp_path / name))
    assert len(digests) == 1


def test_h2_h3_a_continued_run_is_the_same_run(corpus: Path, reference: Path, capfd: pytest.CaptureFixture):
    for change, said in (
        ("--model.num_hidden_layers=3", "model.num_hidden_layers 2 -> 3"),
        ("--train.lr=1e-4", "train.lr 0.003 -> 0.0001"),
        ("--run.seed=5", "run.seed 1337 -> 5"),
    ):
        with pytest.raises(ConfigError) as refusal:
            train.main(options(corpus, reference, change))
        assert said in str(refusal.value)
    train.main(options(corpus, reference, "--run.keep=5"))  # harmless
    with pytest.raises(ResumeError, match="a checkpoint's folder"):
        train.main(options(corpus, reference, f"--run.resume={reference}"))  # once looked for a state.json in it


@pytest.mark.parametrize("rule", [{"schedule": "plateau"}, {"schedule": "constant", "patience": 3}])
def test_h3_evaluations_are_not_harmless_where_something_listens_to_them(rule: dict):
    """The plateau rule counts evaluations: with others in between the rate falls at other steps."""
    cfg = load_config([], "train")
    old = json.loads(json.dumps(asdict(replace(cfg, train=replace(cfg.train, **rule)))))
    now = replace(cfg, train=replace(cfg.train, **rule, eval_every=7))
    with pytest.raises(ConfigError, match=r"train\.eval_every 400 -> 7"):
        runfolder.refuse_changes(now, old, train.SECTIONS)
    deaf = {"schedule": "cosine", "patience": 0}
    old["train"] |= deaf
    assert not runfolder.refuse_changes(replace(now, train=replace(now.train, **deaf)), old, train.SECTIONS)


def allowed(*keys: str) -> list[str]:
    return [f"--run.allow_change={key}" for key in keys]


def test_h4_other_data_may_be_allowed_another_tokenizer_never(corpus: Path, tmp_path: Path):
    """allow_change data went on with the new text's own tokenizer, whose ids mean something else."""
    first, then = (options(corpus, tmp_path / "run", f"--train.steps={steps}", "--train.warmup_steps=2",
                           "--data.tokenizer=auto", "--model.vocab_size=300") for steps in (4, 6))  # fmt: skip
    train.main(first)
    other = tmp_path / "other"
    other.mkdir()
    for number in range(20):
        (other / f"{number}.txt").write_text(f"something else, number {number}, altogether; " * 20)
    then = [f"--data.train={other}" if word.startswith("--data.train=") else word for word in then]
    with pytest.raises(ResumeError, match="the tokenizer has changed"):
        train.main([*then, *allowed("data", "data.train", "train.steps")])


def test_a_stream_cannot_go_on_where_nothing_was_streamed(corpus: Path, tmp_path: Path):
    train.main(options(corpus, tmp_path / "run", "--train.steps=4"))
    more = options(corpus, tmp_path / "run", "--train.steps=6", "--data.streaming=true")
    with pytest.raises(ResumeError, match="was not streamed"):
        train.main([*more, *allowed("data", "data.streaming", "train.steps")])


def test_fewer_steps_than_are_done_and_no_evaluation(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    """The last line once asked for a figure of an evaluation that never was."""
    run = tmp_path / "run"
    train.main(options(corpus, run, "--train.steps=9", "--train.eval_every=100"))
    shutil.rmtree(run / "checkpoints" / "step-00000009")
    train.main([*options(corpus, run, "--train.steps=6", "--train.eval_every=100"), *allowed("train.steps")])
    assert "not evaluated" in capfd.readouterr().err


def test_a_start_loads_nothing_that_only_other_runs_need():
    """torch.distributed.fsdp alone once took as long as half of torch, on every start and every --help."""
    unwanted = ("nanoqwen.injection", "nanoqwen.share", "nanoqwen.report", "nanoqwen.harness", "torch.distributed.fsdp")
    program = f"import sys, train; sys.exit(', '.join(m for m in sys.modules if m.startswith({unwanted})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert not done.stderr.strip(), done.stderr


def test_a_mistake_is_one_line(corpus: Path, tmp_path: Path):
    for more, code in (("--train.batch_tokens=100", 2), ("--data.train=/nowhere/*.txt", 3), ("--train.seq_len=128", 2)):
        done = script(*options(corpus, tmp_path / "run", more))
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_x01_two_ranks_are_one(corpus: Path, tmp_path: Path):
    """Dropout off: each rank draws its own. The same batches, and weights within rounding."""
    more = ("--model.dropout=0.0",)
    train.main(options(corpus, tmp_path / "one", *more))
    done = torchrun(tmp_path / "output", options(corpus, tmp_path / "two", *more))
    assert done.wait(120) == 0, [line for line in done.stderr.splitlines() if "error" in line]
    one, both = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for step in one:
        assert one[step]["batch_sha"] == both[step]["batch_sha"]
        assert one[step]["loss"] == pytest.approx(both[step]["loss"], rel=1e-5)
    from nanoqwen.weights import load_model

    weights = [load_model(tmp_path / name)[0].state_dict() for name in ("one", "two")]
    assert max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0]) <= 1e-5


def test_a_cache_in_the_middle_of_training_is_refused():
    model = tiny.model().train()
    with pytest.raises(ValueError, match="inference"):
        model(batch().tokens, cache=KVCache(model.cfg, 16))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_logits_are_computed_only_where_there_is_a_target(share: float):
    """The slow twin computes all of them and ignores most; loss, gradient and weight are the same."""
    data = batch()
    targets = data.targets.masked_fill(torch.rand(data.targets.shape) >= share, IGNORE)
    (micro,) = micro_batches(Batch(data.tokens, targets, None), 16, ALONE.device)
    assert (micro.at is None) == (int((targets == IGNORE).sum()) == 0)
    found = []
    for at in (micro.at, None):
        model = tiny.model()
        out = model(micro.tokens, micro.targets, at=at)
        out.loss.backward()
        found.append((out.loss.detach(), out.weight, [p.grad for p in model.parameters()]))
    (loss, weight, ours), (slow_loss, slow_weight, slow) = found
    assert weight == slow_weight
    assert torch.allclose(loss, slow_loss, rtol=1e-6)
    for a, b in zip(ours, slow, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-9


GOLDEN = Path(__file__).with_name("golden_losses.json")


def test_f10_the_losses_of_a_known_run(corpus: Path, tmp_path: Path):
    """What no other test sees moves these: an initialiser, an order, a default. Refreshed only on purpose, by

    python -m pytest tests/test_train.py -k f10, which on a mismatch says where it wrote what it found
    """
    train.main(options(corpus, tmp_path / "run", "--train.steps=50", "--train.schedule=cosine"))
    losses = {str(step): row["loss"] for step, row in sorted(metrics(tmp_path / "run").items())}
    here = f"torch {torch.__version__.split('+')[0]}, {torch.backends.cpu.get_cpu_capability()}"
    golden = json.loads(GOLDEN.read_text())
    (tmp_path / "golden.json").write_text(json.dumps(golden | {here: losses}, indent=0) + "\n")
    if here not in golden:
        pytest.skip(f"the known losses are of {' and of '.join(golden)}, this is {here}: {tmp_path / 'golden.json'}")
    worst = max(abs(losses[step] - loss) for step, loss in golden[here].items())
    assert worst <= 1e-6, f"found other losses: {tmp_path / 'golden.json'}"
