"""Pretraining, and the one loop that all training shares.

    python train.py                                         a small model on Python's own standard library, in minutes
    python train.py --preset 30M --data.train "notes/*.md"  another shape, another text
    python train.py --base_ckpt SOURCE --data.train ...     from weights that there are, with their tokenizer
    torchrun --nproc_per_node 8 train.py --preset 0.5B      eight devices, the same run

Read `fit` first: it is the loop. An objective is a module whose forward returns a sum and a weight; whatever is wrapped
(compiled, distributed) is that module. Batches, learning rate and seeds are functions of the step, so a resumed run
needs little more than the step and the tensors.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C while torch is being imported: leave, without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import gc
import hashlib
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import data
from data import Batch, Batches, Micro, StreamBatches, micro_batches, token_bytes
from model import GPT, IGNORE, Output, generate
from nanoqwen import corpus, distributed, evaluate, flops, heartbeat, optim, plan, routing, runfolder, weights
from nanoqwen.config import Config, TrainConfig, check, check_context, dump, load_config
from nanoqwen.distributed import Stop, World, all_reduce_sum, full_tensor
from nanoqwen.errors import PREEMPTED, SILENT, ConfigError, ResumeError, escape_terminal, exit_code_of, run_script, say
from nanoqwen.files import write_atomic
from nanoqwen.log import MetricLog, Peak, Speed, peak_of
from nanoqwen.lora import LoraConfig, apply_lora, keep_frozen_in, lora_state
from nanoqwen.tokenizer import Tokenizer, pieces_of
from nanoqwen.weights import resolve

# --- what is minimised ------------------------------------------------------------------------------------------------


class StepLoss(NamedTuple):
    total: Tensor  # summed over the targets, penalties included: this is back-propagated
    weight: Tensor  # number of targets
    metrics: dict[str, Tensor]  # sums that are logged as averages over the targets
    batch_loss: Tensor | None = None  # of the whole batch: back-propagated too, neither summed nor divided
    batch_metrics: dict[str, Tensor] | None = None  # of the whole batch: logged as they are


class LanguageModeling(nn.Module):
    """Next-token cross-entropy, plus named penalties with their weights."""

    def __init__(self, model: GPT, penalties: dict[str, float]):
        super().__init__()
        self.head: nn.Module | None = None  # what is trained beside the model
        # Those of routers are added even at weight 0: ranks wait for a gradient of every parameter.
        self.penalties = {name: weight for name, weight in penalties.items() if name != "z_loss"}
        self.model = model
        model.z_loss = penalties.get("z_loss", 0.0)

    def before_step(self, micros: list[Micro], wrapped: nn.Module) -> list[Micro]:
        """The micro-batches of a step, before the first forward; an objective may add what it needs of all of them."""
        return micros

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        at: Tensor | None = None,
        extra: tuple[Tensor, ...] = (),
    ) -> StepLoss:
        out = self.model(tokens, targets, documents=documents, at=at)
        total, metrics = self.penalised(out, targets)
        return StepLoss(total, out.weight, {"loss": out.sums.cross_entropy} | metrics)

    def penalised(self, out: Output, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss plus penalties, sums to log about these)"""
        if self.penalties.keys() != out.penalties.keys():
            raise ValueError(f"penalties: expected weights of {sorted(out.penalties)}, got {sorted(self.penalties)}")
        # A row's mean counts as often as the row has targets: so the sum does not depend on how a batch is cut.
        counts = (targets != IGNORE).sum(1)
        sums = {name: (value * counts).sum() for name, value in out.penalties.items()}
        total = sum((weight * sums[name] for name, weight in self.penalties.items()), out.loss)
        metrics = {}
        if self.model.routing is not None:
            metrics |= {"train/loss": total, "train/lm_loss": out.sums.cross_entropy}
            metrics |= {f"train/{name}": value for name, value in sums.items()}
            metrics |= {f"router/{n}": value * out.weight for n, value in routing.mean_stats(out.stats).items()}
        return total, metrics


# --- how it is minimised ----------------------------------------------------------------------------------------------


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout is a function of (seed, step, rank): nothing to save, and evaluation cannot disturb it."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def train_step(
    objective: nn.Module,
    optimizers: optim.Optimizers,
    micros: list[Micro],
    world: World,
    *,
    clip: float,
    scaler: torch.amp.GradScaler,
    autocast: torch.autocast | nullcontext,
) -> dict[str, Tensor]:
    """One optimizer step. Loss and gradient are sums over all targets of all micro-batches and ranks, divided once.

    A gradient that is not finite changes nothing, not even the moments: all ranks skip the step alike. Metrics stay
    on the device: no host sync here.
    """
    weight = all_reduce_sum(sum((micro.targets != IGNORE).sum() for micro in micros).float(), world).clamp(min=1)
    sums: dict[str, Tensor] = {}
    with autocast:
        micros = distributed.unwrap_model(objective).before_step(micros, objective)
    for number, micro in enumerate(micros, start=1):
        with distributed.sync_gradients(objective, now=number == len(micros)), autocast:
            out = objective(*micro)
            loss = out.total / weight if out.batch_loss is None else out.total / weight + out.batch_loss
            scaler.scale(loss * world.size).backward()  # the ranks' gradients are averaged
        for name, value in out.metrics.items():
            sums[name] = sums.get(name, 0) + value.detach()
    for optimizer in optimizers.members:
        scaler.unscale_(optimizer)
    norm = full_tensor(nn.utils.clip_grad_norm_([p for p in optimizers.names if p.grad is not None], clip))
    skip = (~norm.isfinite()).float()  # the same on all ranks, because their gradients are
    optimizers.step(skip)
    scaler.update()  # lowers its scale where `unscale_` has met what is not finite
    optimizers.zero_grad()
    averages = all_reduce_sum(torch.stack([value.float() for value in sums.values()]), world) / weight
    metrics = dict(zip(sums, averages, strict=True))
    metrics["train/perplexity"] = metrics["loss"].exp()
    return metrics | (out.batch_metrics or {}) | {"grad_norm": norm, "targets": weight, "skipped": skip}


# --- the loop ---------------------------------------------------------------------------------------------------------


class FullCheckpoint:
    """What a checkpoint stores of the model: all of it, as a Hugging Face folder."""

    loaded_by = "AutoModelForCausalLM.from_pretrained loads each"

    def tensors(self, model: GPT) -> dict[str, Tensor]:
        return model.state_dict()

    def write(self, trainer: Trainer, tensors: dict[str, Tensor], folder: Path) -> None:
        weights.write_folder(trainer.model, trainer.tokenizer, folder, state=tensors)

    def read(self, folder: Path) -> dict[str, Tensor]:
        return weights.load_model(folder)[0].state_dict()


class RoutedCheckpoint(FullCheckpoint):
    loaded_by = "load_model and infer.py load each; transformers has no routed layers"


class AdapterCheckpoint(FullCheckpoint):
    """What is trained, in PEFT's format, with the name and hash of the base that it belongs to."""

    loaded_by = "PeftModel.from_pretrained loads each"

    def __init__(self, lora: LoraConfig, base: str, base_hash: str):
        self.lora, self.base, self.base_hash = lora, base, base_hash
        if set(lora.modules_to_save) & {"causal_router"}:
            self.loaded_by = RoutedCheckpoint.loaded_by

    def tensors(self, model: GPT) -> dict[str, Tensor]:
        return lora_state(model)

    def write(self, trainer: Trainer, tensors: dict[str, Tensor], folder: Path) -> None:
        hashed = {"base_hash": self.base_hash, "state": tensors}
        weights.write_adapter(trainer.model, self.lora, self.base, trainer.tokenizer, folder, **hashed)

    def read(self, folder: Path) -> dict[str, Tensor]:
        stored = weights.read_adapter(folder)
        if stored.base_hash != self.base_hash:
            raise ResumeError(f"{folder}: belongs to base weights {stored.base_hash}, got {self.base} {self.base_hash}")
        return stored.tensors


class Evaluator:
    """What an evaluation measures beside the loss, and which of two evaluations is better: here by the loss."""

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        return {}

    def sort_key(self, result: dict[str, float]) -> list[float]:
        """Lower is better; later entries count where the earlier ones are equal."""
        return [result["loss"]]


class Trainer(NamedTuple):
    """What `fit` works on."""

    cfg: Config
    loop: TrainConfig  # the section of the script: steps, rates, intervals
    world: World
    objective: nn.Module  # wrapped
    model: GPT
    tokenizer: Tokenizer
    batches: Batches
    windows: list[Batch]  # to validate on
    bytes_of: Tensor  # of each id
    sample: Callable[[Trainer], dict[str, Any]]  # what the model writes now, for samples.jsonl; all ranks call it
    rows: int  # of a micro-batch
    autocast: torch.autocast | nullcontext
    scaler: torch.amp.GradScaler
    speed: Speed
    checkpoint_format: FullCheckpoint
    evaluator: Evaluator

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run.dir)


class Progress:
    """Where a run stands, beside its tensors. A checkpoint holds all of it."""

    def __init__(self, loop: TrainConfig, sort_key: Callable[[dict[str, float]], list[float]]):
        self.loop, self.plateau, self.sort_key = loop, optim.Plateau(loop), sort_key
        self.step = 0  # optimizer steps that are done
        self.best: dict[str, Any] = {"step": None, "loss": math.inf, "sort_key": [math.inf]}
        self.stale = 0  # evaluations since the best one
        self.result: dict[str, float] = {}  # of the last evaluation
        self.pace = optim.Pace(loop.steps, loop.warmup_steps)
        self.continued: optim.Continued | None = None  # where the length of the run changed last

    def update(self, result: dict[str, float]) -> None:
        """Take an evaluation into account."""
        self.result = result
        if self.step > self.loop.warmup_steps:  # a rate that still rises is not to be lowered
            self.plateau.update(result["loss"])
        self.stale += 1
        if (key := self.sort_key(result)) < self.best["sort_key"]:
            self.best, self.stale = {"step": self.step, "loss": result["loss"], "sort_key": key}, 0

    @property
    def finished(self) -> bool:
        out_of_patience = bool(self.loop.patience) and self.stale >= self.loop.patience
        return out_of_patience or self.step >= self.loop.steps

    def summary(self) -> str:
        """The end of the sentence `done in 9 s`."""
        if not self.result:
            return ", not evaluated"
        last = "val/loss {loss:.4f}, {bits_per_byte:.4f} bits per byte of validation text".format(**self.result)
        best = "; best: val/loss {loss:.4f} at step {step}".format(**self.best)
        return f": {last}{best if self.best['step'] != self.step else ''}"

    def state(self) -> dict[str, Any]:
        progress = {"step": self.step, "best": self.best, "stale": self.stale, "result": self.result}
        return progress | {"plateau": self.plateau.state(), "pace": self.pace, "continued": self.continued}

    def load(self, state: dict[str, Any]) -> None:
        self.step, self.best, self.stale, self.result = (state[k] for k in ("step", "best", "stale", "result"))
        self.plateau.load(state["plateau"])
        self.pace = optim.Pace(*state["pace"])
        self.continued = optim.Continued(*state["continued"]) if state["continued"] else None

    def rate(self) -> float:
        """The learning rate of the next step."""
        return optim.continued_rate(self.step, self.loop, self.plateau.scale, self.continued)

    def go_on_from(self, rate: float, changed: dict[str, Any]) -> None:
        """Another length of the run bends its schedule, which goes on from the rate that the last step had.

        A change of the rate itself, or during warm-up, is meant as it is.
        """
        keys = {key.partition(".")[2] for key in changed}
        if "warmup_steps" in keys:
            self.pace = self.pace._replace(warmup_steps=self.loop.warmup_steps)
        self.loop = replace(self.loop, warmup_steps=min(self.pace.warmup_steps, self.loop.steps))
        if keys & {"steps", "tokens", "epochs"} and "lr" not in keys and self.step >= self.loop.warmup_steps:
            self.continued = optim.Continued(self.step, rate)
            last = optim.continued_rate(self.loop.steps - 1, self.loop, self.plateau.scale, self.continued)
            say(f"the rate goes on from {rate:.3g}, by schedule {self.loop.schedule} to {last:.3g} at step "
                f"{self.loop.steps}")  # fmt: skip
            if not rate:
                say("warning: that rate is 0 and nothing will change; a new rate must be allowed too "
                    "(--run.allow_change train.lr)")  # fmt: skip


def fit(
    trainer: Trainer, source: Path | None = None, changed: dict[str, Any] | None = None, stop: Stop | None = None
) -> Progress:
    """Train from a checkpoint, or from the start, to the end or until asked to stop.

    changed: keys in which the run differs from the one that wrote the checkpoint; they are logged
    """
    cfg, loop, world, model = trainer.cfg, trainer.loop, trainer.world, trainer.model
    groups = optim.parameter_groups(model, loop, distributed.unwrap_model(trainer.objective).head)
    optimizers = optim.Optimizers(groups, loop, model.routing)
    progress, stop = Progress(loop, trainer.evaluator.sort_key), stop or Stop()
    resumed = resume(trainer, source, optimizers, progress, changed or {}) if source else None
    log = MetricLog(cfg, loop, trainer.folder, progress.step, trainer.speed, world)
    leaving, early = False, progress.step + 3  # so that a person soon sees loss, speed and remaining time
    model.train()
    stop.can_wait = True
    with log.open():
        if resumed:
            log.event(**resumed, changed=changed)
        else:
            with log.pause(), distributed.uncompiled():
                evaluate_now(trainer, log, progress)
        while not progress.finished and not leaving:
            step = progress.step
            rate = progress.rate()
            optimizers.set_rate(rate)
            routing.set_step(model, step, progress.pace.steps)
            seed_step(cfg.run.seed, step, world.rank)
            metrics = train_step(
                trainer.objective,
                optimizers,
                micro_batches(trainer.batches(step, world.rank, world.size), trainer.rows, world.device),
                world,
                clip=loop.clip,
                scaler=trainer.scaler,
                autocast=trainer.autocast,
            )
            progress.step = done = step + 1
            sha = trainer.batches.sha(step) if world.is_main else ""
            log.add(step=done, **metrics, lr=rate, epoch=trainer.batches.epoch(done), cursor=done, batch_sha=sha)
            leaving, last = distributed.any_rank(stop.requested, world), done == loop.steps
            if last or leaving or done == early or done % loop.log_every == 0:
                log.flush()
            if done == early and (idle := optimizers.idle()):
                say(f"warning: never a gradient for {len(idle)} parameters: {', '.join(idle[:5])}")
            if last or done % loop.eval_every == 0:
                log.flush()
                with log.pause(), distributed.uncompiled():
                    evaluate_now(trainer, log, progress)
            if progress.finished or leaving or done % cfg.run.save_every == 0 or progress.best["step"] == done:
                log.flush()
                with log.pause():
                    save_checkpoint(trainer, progress, optimizers, rate)
    return progress


# Metrics of an evaluation that the printed line has in words of its own, or that are too many for it.
NOT_APPENDED = re.compile(r"loss$|perplexity|bits_per_byte$|router/")


def evaluate_now(trainer: Trainer, log: MetricLog, progress: Progress) -> None:
    """Evaluate, print a line with the validation loss, and show what the model writes at this point.

    Step 0 is for comparison alone: no checkpoint holds it, and a model without training writes noise.
    """
    result = evaluate.evaluate_routed(
        trainer.model, trainer.windows, trainer.bytes_of, trainer.world, trainer.autocast
    ) | trainer.evaluator(trainer)
    if progress.step:
        progress.update(result)
    else:
        log.first_loss = result["loss"]
    log.event(step=progress.step, **{f"val/{name}": value for name, value in result.items()})
    others = "".join(f" {name} {value:.3f}" for name, value in result.items() if not NOT_APPENDED.match(name))
    say(f"step {progress.step} val/loss {result['loss']:.4f} perplexity {result['perplexity']:.2f} "
        f"bits per byte {result['bits_per_byte']:.4f}{others}")  # fmt: skip
    if trainer.loop.sample_tokens and progress.step:
        sample = trainer.sample(trainer)
        log.sample(progress.step, **sample)
        say("  | " + escape_terminal(sample["text"]).replace("\n", "\n  | "))


def sample_continuation(trainer: Trainer, prompt: list[int], eos: int | list[int]) -> dict[str, Any]:
    """What the model writes after a prompt, control tokens left out; if routed, also what computed each token."""
    model, tokenizer = trainer.model, trainer.tokenizer
    length = min(trainer.loop.sample_tokens, model.cfg.context - len(prompt))
    params = {"max_new_tokens": length, "temperature": 0.8, "top_p": 0.95, "seed": trainer.cfg.run.seed}
    banned = range(tokenizer.n_vocab, model.cfg.vocab_size)  # ids that stand for nothing
    with trainer.autocast:
        (ids,) = generate(model, [prompt], eos=eos, banned=banned, **params)
    sample: dict[str, Any] = {"text": tokenizer.decode(ids[len(prompt) :], skip_special=True)}
    if model.routing is not None:  # prompt and text, each piece with how many of the routed layers computed it
        pieces = zip(pieces_of(tokenizer, ids), routing.layers_per_token(model, ids), strict=True)
        sample |= {"layers": len(model.routers), "pieces": [piece for piece in pieces if piece[0]]}
    return sample


def document_sampler(trainer: Trainer) -> dict[str, Any]:
    """The beginning of a document."""
    eos = trainer.tokenizer.eos_id  # what a document begins after
    return sample_continuation(trainer, [eos], eos)


# --- stop and resume --------------------------------------------------------------------------------------------------


def save_checkpoint(trainer: Trainer, progress: Progress, optimizers: optim.Optimizers, rate: float) -> None:
    """Write everything that a resume needs; every rank waits until it is durable."""
    world, step = trainer.world, progress.step
    tensors = gather_on_main(trainer.checkpoint_format.tensors(trainer.model), world)  # by all ranks together
    moments = gather_on_main(optimizers.state(), world)
    if world.is_main:
        state = progress.state() | {
            "cursor": step,
            "lr": rate,
            "rng": f"seeded by ({trainer.cfg.run.seed}, step, rank)",
            "scaler": trainer.scaler.state_dict(),
            "config": asdict(trainer.cfg),
            "finished": progress.finished,
            "world_size": world.size,
            "data": trainer.batches.fingerprint,
            "stream": trainer.batches.state() if isinstance(trainer.batches, StreamBatches) else None,
        }
        path, digest = runfolder.save(
            trainer.folder,
            step,
            model=lambda folder: trainer.checkpoint_format.write(trainer, tensors, folder),
            tokenizer=trainer.tokenizer,
            optimizer=moments,
            state=state,
            keep=trainer.cfg.run.keep,
            best=progress.best["step"],
        )
        say(f"CKPT step={step} path={path} sha256={digest}", sys.stdout)
    distributed.barrier(world)


def gather_on_main(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Full tensors on the main rank, one after the other; nothing on the others."""
    gathered = ((name, full_tensor(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in gathered if world.is_main}


def resume(
    trainer: Trainer, source: Path, optimizers: optim.Optimizers, progress: Progress, changed: dict[str, Any]
) -> dict[str, Any]:
    """Restore everything from a checkpoint. Returns what is to be logged about it."""
    batches = trainer.batches
    moments, state = runfolder.load_trainer_state(source)
    rounded = [f"{name} is {kind}" for name, kind in runfolder.inventory(source).items() if not kind.startswith("F32 ")]
    if rounded:  # by whoever converted the checkpoint
        raise ResumeError(f"{source}: expected weights and optimizer state in F32, but {rounded[0]}")
    for name, old, new in (
        ("tokenizer", state["tokenizer_hash"], trainer.tokenizer.hash),
        ("data", state["data"], batches.fingerprint),
    ):
        if old != new and (name == "tokenizer" or "data" not in trainer.cfg.run.allow_change):
            raise ResumeError(f"{source}: the {name} has changed since ({old[:12]} -> {new[:12]})")
    restore_weights(trainer, source)
    try:
        optimizers.load(moments)
    except ValueError as error:
        raise ResumeError(f"{source}: {error}") from None
    if isinstance(batches, StreamBatches):
        if state["stream"] is None:
            raise ResumeError(f"{source}: its text was not streamed, so that a stream cannot resume (data.streaming)")
        batches.load_state(state["stream"])
    progress.load(state)
    progress.go_on_from(state["lr"], changed)
    trainer.scaler.load_state_dict(state["scaler"])
    say(f"resuming from {source}")
    here = runfolder.versions()
    versions = {name: [old, here.get(name)] for name, old in state["versions"].items() if old != here.get(name)}
    if versions:
        listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in versions.items())
        say(f"warning: {source} was written by other versions: {listed}; metrics may differ in their last digits")
    event = {"step": progress.step, "event": "resume", "from": str(source), "versions": versions}
    return event | ({"continued": progress.continued._asdict()} if progress.continued else {})


@torch.no_grad()
def restore_weights(trainer: Trainer, source: Path) -> None:
    stored, own = trainer.checkpoint_format.read(source), trainer.checkpoint_format.tensors(trainer.model)
    old, new = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (stored, own))
    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if different:
        first = f"expected {different[0]} of shape {new.get(different[0])}, got {old.get(different[0])}"
        raise ResumeError(f"{source}: {len(different)} tensors differ from this run's: {first}")
    for name, tensor in own.items():
        tensor.copy_(distributed.shard_like(stored[name], tensor))


# --- weights to start from --------------------------------------------------------------------------------------------

# Frozen weights have no gradients, packed rows attend to less, and logits are computed for trained tokens alone.
NO_MFU = Peak(None, "n/a, since such a step computes less than `flops_per_token` counts")


class Base(NamedTuple):
    model: GPT  # in fp32
    tokenizer: Tokenizer
    name: str  # a hub id stays one
    hash: str  # of its weights


def find_base(cfg: Config, section: str) -> Path:
    """The folder of the base, found before anything is written."""
    key, source, run = f"{section}.base_ckpt", getattr(cfg, section).base_ckpt, Path(cfg.run.dir).resolve()
    if source is None:
        raise ConfigError(f"{key}: expected a run, a Hugging Face folder or a hub id, got nothing")
    if run in ((base := Path(source).resolve()), *base.parents):  # which would prune what it is made from
        raise ConfigError(f"{key}: {source} is in the run folder (--run.dir for another)")
    return resolve(source)


def load_base(cfg: Config, section: str) -> Base:
    """The weights of `base_ckpt`. A dense base gets the routers that `routing` asks for, drawn from the seed."""
    loop = getattr(cfg, section)
    folder = find_base(cfg, section)
    torch.manual_seed(cfg.run.seed)
    computed, _ = distributed.pick_dtype(cfg.run.dtype, distributed.pick_device(cfg.run.device))
    dtype = plan.base_dtype(cfg, folder, computed)
    model, tokenizer = weights.load_model(folder, dtype=dtype, routing=cfg.routing)
    if tokenizer is None:
        raise ConfigError(f"{section}.base_ckpt: {folder} has no tokenizer")
    check_context(loop, model.cfg)
    base_hash = weights.hash_weights(folder)
    say(f"base       {folder}, weights {base_hash[:16]}")
    name = str(folder.resolve()) if Path(loop.base_ckpt).exists() else loop.base_ckpt
    return Base(model, tokenizer, name, base_hash)


def with_routers(lora: LoraConfig, kind: str) -> LoraConfig:
    """Adapters leave routers alone: these are trained in full beside them."""
    modules = (*lora.modules_to_save, *routing.MODULES_TO_SAVE[kind])
    return replace(lora, modules_to_save=tuple(dict.fromkeys(modules)))


def add_adapters(cfg: Config, base: Base) -> FullCheckpoint:
    """Put adapters into the model where lora.rank asks for them; returns what a checkpoint then stores."""
    lora, routed = cfg.lora, base.model.routing
    if routed:
        lora = with_routers(lora, routed.kind)
    torch.manual_seed(cfg.run.seed)
    apply_lora(base.model, lora)
    if lora.rank:
        keep_frozen_in(base.model, base.model.get_input_embeddings().weight.dtype)
        return AdapterCheckpoint(lora, base.name, base.hash)
    return RoutedCheckpoint() if routed else FullCheckpoint()


def penalties_of(model: GPT, loop: TrainConfig) -> dict[str, float]:
    """The weights of the penalties, by their names."""
    return {"z_loss": loop.z_loss} | (routing.penalty_weights(model.routing) if model.routing else {})


# --- before the first step --------------------------------------------------------------------------------------------


def make_trainer(
    cfg: Config,
    loop: TrainConfig,
    world: World,
    objective: nn.Module,
    tokenizer: Tokenizer,
    batches: Batches,
    windows: list[Batch],
    sample: Callable[[Trainer], dict[str, Any]],
    checkpoint_format: FullCheckpoint,
    *,
    evaluator: Evaluator | None = None,
    peak: Peak | None = None,
) -> Trainer:
    """What all scripts do before `fit`: choose the precision, plan, compile, wrap."""
    model, device = objective.model, world.device
    model.checkpoint_activations = loop.checkpoint_activations
    dtype, reason = distributed.pick_dtype(cfg.run.dtype, device)
    peak = peak or peak_of(device, dtype)
    forward = plan.Forward(dtype, objective.head, batches.targets, batches.isolated)
    rows = plan.micro_rows(cfg, model, loop, world, forward)
    plan.print_plan(cfg, model, loop, world, batches, rows, forward, reason, peak)
    tokens = loop.steps * loop.batch_tokens / world.size
    operations = tokens * flops.flops_per_token(model.cfg, model.routing, loop.seq_len)
    objective = distributed.compile_objective(objective, loop.compile, operations, loop.seq_len, device)
    return Trainer(
        cfg=cfg,
        loop=loop,
        world=world,
        objective=distributed.wrap_model(objective, world, cfg.run.parallel),
        model=model,
        tokenizer=tokenizer,
        batches=batches,
        windows=windows,
        bytes_of=token_bytes(tokenizer),
        sample=sample,
        rows=rows,
        autocast=torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext(),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        speed=Speed.of(model.cfg, loop.seq_len, peak, world.size, model.routing),
        checkpoint_format=checkpoint_format,
        evaluator=evaluator or Evaluator(),
    )


def counted_loop(loop: TrainConfig, batches: Batches) -> TrainConfig:
    """With epochs counted in steps, and the warm-up that belongs to them."""
    if loop.epochs is not None and not batches.steps_per_epoch:
        raise ConfigError("epochs: expected text of a known length, got a stream (data.streaming; tokens counts there)")
    return loop.counted(batches.steps_per_epoch).with_warmup()


def build(cfg: Config, world: World) -> Trainer:
    """A model on text: from scratch, or from the weights of train.base_ckpt."""
    base = load_base(cfg, "train") if cfg.train.base_ckpt is not None else None
    vocab_size, tokenizer = (base.model.cfg.vocab_size, base.tokenizer) if base else (cfg.model.vocab_size, None)
    shards = distributed.main_rank_first(
        world, lambda: corpus.prepare(cfg.data, vocab_size, tokenizer=tokenizer, progress=world.is_main)
    )
    loop, isolate = cfg.train, cfg.data.isolate_documents
    batches = data.open_batches(cfg.data, shards, loop.seq_len, loop.rows, cfg.run.seed)
    loop = counted_loop(loop, batches)
    windows = data.eval_windows(shards.val, loop.seq_len, loop.eval_tokens, isolate_documents=isolate)
    if base:
        model, checkpoint_format = base.model, add_adapters(cfg, base)
    else:
        torch.manual_seed(cfg.run.seed)
        model = routing.build_model(plan.model_shape(cfg, shards.tokenizer), cfg.routing)
        checkpoint_format = RoutedCheckpoint() if model.routing else FullCheckpoint()
    objective = LanguageModeling(model.to(world.device), penalties_of(model, loop))
    peak = NO_MFU if base and cfg.lora.rank else None
    return make_trainer(
        cfg, loop, world, objective, shards.tokenizer, batches, windows, document_sampler, checkpoint_format, peak=peak
    )


# --- a whole run ------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """What differs between the scripts that train."""

    build: Callable[[Config, World], Trainer]
    sections: tuple[str, ...]  # of the configuration that decide the outcome
    next_command: str  # to try after the run


def run(cfg: Config, world: World, task: Task) -> int:
    """One run in its folder, from the lock to the report; returns the exit code. A complete run stays as it is."""
    check_tasks(cfg)
    if cfg.run.dry_run:
        return dry_run(cfg, world, task)
    folder, started, stop = Path(cfg.run.dir), time.perf_counter(), Stop()
    silent = partial(runfolder.write_status, folder, "failed", SILENT)
    with (
        stop.watching(),
        runfolder.lock(folder) if world.is_main else nullcontext(),
        heartbeat.watching(world, cfg.run.timeout, silent),
    ):
        source = distributed.main_rank_first(world, lambda: runfolder.starting_point(cfg))
        state = runfolder.read_state(source) if source else None
        changed = runfolder.refuse_changes(cfg, state["config"], task.sections) if state else None
        if state and state["finished"] and not changed:
            code = leave_complete(folder, source, state, world, task)
        else:
            write_header(cfg, world)
            with recording_failure(folder, world):
                trainer = task.build(cfg, world)
                prepare_disk(trainer, source)
                progress = fit(trainer, source, changed, stop)
            code = finish(trainer, progress, time.perf_counter() - started, task)
            del trainer  # makes room for the model of the best checkpoint
    if code == 0 and world.is_main:
        run_tasks(cfg)
    return code


def dry_run(cfg: Config, world: World, task: Task) -> int:
    """Everything before the first step, and what the steps would cost. The run folder stays as it is."""
    source = runfolder.starting_point(cfg)
    if source:
        runfolder.refuse_changes(cfg, runfolder.read_state(source)["config"], task.sections)
    trainer = task.build(cfg, world)
    if world.is_main:
        bytes_of_checkpoint = check_disk(trainer)
        plan.print_cost(trainer.loop, trainer.speed, bytes_of_checkpoint, cfg.run.keep)
        say(f"dry run    {cfg.run.dir} is not written; without --dry_run it would {'resume' if source else 'start'}")
    return 0


def leave_complete(folder: Path, source: Path, state: dict[str, Any], world: World, task: Task) -> int:
    say(f"{folder} is complete: {state['step']} steps, best validation loss {state['best']['loss']:.4f}")
    say(f"next: {task.next_command}")
    if world.is_main:
        runfolder.delete_leftovers(folder, source)  # what the last save left, if killed
        if runfolder.read_status(folder) != "done":  # killed between its last save and its last line
            runfolder.write_status(folder, "done", 0, "")
    return 0


def write_header(cfg: Config, world: World) -> None:
    """The files that say what is run, before anything is."""
    if world.is_main:
        folder = Path(cfg.run.dir)
        write_atomic(folder / "config.yaml", dump(cfg).encode())
        source = runfolder.source_record() | {"device": distributed.name_of(world.device), "ranks": world.size}
        write_atomic(folder / "source.json", json.dumps(source, indent=2).encode())
        runfolder.write_status(folder, "running", 0, "")


@contextmanager
def recording_failure(folder: Path, world: World) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if world.is_main:
            code = exit_code_of(error)
            status = "preempted" if code == PREEMPTED else "failed"
            runfolder.write_status(folder, status, code, str(error) or type(error).__name__)
            write_report(folder)
        raise


def check_disk(trainer: Trainer) -> int:
    """Refuse a run that will not fit on the disk; returns the bytes of a checkpoint."""
    stored = sum(t.numel() for t in trainer.checkpoint_format.tensors(trainer.model).values())
    trained = sum(p.numel() for p in trainer.objective.parameters() if p.requires_grad)
    needed = 4 * stored + 8 * trained  # fp32, two moments
    runfolder.check_disk(trainer.folder, needed, trainer.cfg.run.keep)
    return needed


def prepare_disk(trainer: Trainer, source: Path | None) -> None:
    """Check the disk; then delete the run that this one replaces."""
    if trainer.world.is_main:
        check_disk(trainer)
        if trainer.cfg.run.overwrite and not source:
            runfolder.clear(trainer.folder)


def finish(trainer: Trainer, progress: Progress, seconds: float, task: Task) -> int:
    """Status, report and last lines; returns the exit code."""
    folder, step = trainer.folder, progress.step
    if progress.finished:
        code, status, reason = 0, "done", ""
    else:
        code, status, reason = PREEMPTED, "preempted", f"signal after step {step}"
        say(f"stopped by a signal after step {step}, saved; the same command resumes")
    if trainer.world.is_main:
        runfolder.write_status(folder, status, code, reason)
        write_report(folder)
    if progress.finished and trainer.world.is_main:
        say(f"done in {seconds:.0f} s{progress.summary()}")
        loaded_by = trainer.checkpoint_format.loaded_by
        say(f"wrote {folder}/: report.html, metrics.jsonl, samples.jsonl, checkpoints/ ({loaded_by})")
        say(f"next: {task.next_command}")
    return code


# Reports and evaluation tasks are imported where a run needs them: they would slow down the start of every run, and the
# loop does not depend on them.
def write_report(folder: Path) -> None:
    from nanoqwen import report

    report.write_report(folder)


def check_tasks(cfg: Config) -> None:
    """Refuse eval.tasks before the run that could only be refused after it."""
    if cfg.eval.tasks:
        from nanoqwen import harness

        harness.check_tasks(cfg)


def run_tasks(cfg: Config) -> None:
    """Evaluate eval.tasks with the best checkpoint, once the trained model is gone from memory."""
    if cfg.eval.tasks:
        from nanoqwen import harness

        gc.collect()
        if harness.run_tasks_after_training(cfg):
            write_report(Path(cfg.run.dir))


SECTIONS = ("run", "model", "routing", "data", "train")


def main(argv: list[str]) -> int:
    cfg = load_config(argv, "train")
    cfg = replace(cfg, finetune=replace(cfg.finetune, base_ckpt=None))  # reports know a fine-tuned run by its base
    check(cfg, distributed.ranks())
    if cfg.train.base_ckpt is not None:
        find_base(cfg, "train")
        cfg = replace(cfg, model=plan.shape_of_source(cfg.train.base_ckpt))
    cfg, sections = plan.settle(cfg, "train"), (*SECTIONS, "lora") if cfg.train.base_ckpt else SECTIONS
    world = distributed.start(cfg.run.device)
    try:
        command = f'python infer.py --ckpt {shlex.quote(cfg.run.dir)} --prompt "    def"'
        return run(cfg, world, Task(build, sections, command))
    finally:
        distributed.stop(world)


if __name__ == "__main__":
    run_script(main)
