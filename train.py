"""Pretraining, and the one loop that all training shares.

    python train.py                                         a small model on Python's own standard library, in minutes
    python train.py --preset 50M --data.train "notes/*.md"  another shape, another text
    torchrun --nproc_per_node 8 train.py --preset 0.5B      eight devices, the same run

Read `fit` first: it is the loop. An objective is a module whose forward returns a sum and a weight; whatever is wrapped
(compiled, distributed) is that module. Batches, learning rate and seeds are functions of the step, so a resumed run
needs little more than the step and the tensors.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data import (
    Batch,
    ChatBatches,
    Micro,
    PretrainBatches,
    StreamBatches,
    eval_windows,
    micro_batches,
    open_batches,
    token_bytes,
)
from model import GPT, IGNORE, Output, generate
from nanoqwen import report, runfolder
from nanoqwen.config import Config, TrainConfig, check, dump, load_config
from nanoqwen.corpus import prepare
from nanoqwen.distributed import (
    World,
    any_rank,
    barrier,
    name_of,
    pick_dtype,
    ranks,
    spread_like,
    start,
    stop,
    sync_gradients,
    total,
    unwrapped,
    whole,
    wrap,
)
from nanoqwen.errors import (
    PREEMPTED,
    ConfigError,
    Preempted,
    ResumeError,
    escape_terminal,
    exit_code_of,
    run_script,
    say,
)
from nanoqwen.evaluate import evaluate_routed
from nanoqwen.files import write_atomic
from nanoqwen.harness import ask_at_the_end, check_tasks
from nanoqwen.injection.triplets import TripletBatches
from nanoqwen.log import MetricLog, Peak, Speed, peak_of
from nanoqwen.optim import Optimizers, Plateau, lr_at, parameter_groups
from nanoqwen.plan import announce, micro_rows
from nanoqwen.routing import at_step, build_model, mean_stats, penalty_weights, tokens_used
from nanoqwen.runfolder import (
    check_disk,
    clear,
    inventory,
    load_trainer_state,
    newest_valid,
    read_state,
    read_status,
    save,
    source_record,
    sweep,
    verify,
    versions,
    write_status,
)
from nanoqwen.tokenizer import Tokenizer, pieces_of
from nanoqwen.weights import load_model, write_folder

SECTIONS = ("run", "model", "routing", "data", "train")  # of the configuration, which decide what comes out of train.py


# --- what is minimised ------------------------------------------------------------------------------------------------


class StepLoss(NamedTuple):
    total: Tensor  # summed over the targets, penalties included: this is back-propagated
    weight: Tensor  # number of targets
    metrics: dict[str, Tensor]  # sums that are logged as averages over the targets
    shared: Tensor | None = None  # a loss over the whole batch: back-propagated too, neither summed up nor divided
    figures: dict[str, Tensor] | None = None  # of the whole batch: logged as they are


class LanguageModeling(nn.Module):
    """Next-token cross-entropy, plus named penalties with their weights."""

    def __init__(self, model: GPT, penalties: dict[str, float]):
        super().__init__()
        self.head: nn.Module | None = None  # what is trained beside the model
        # Penalties of routers stay at weight 0 too: ranks wait for a gradient of every parameter.
        kept = {name: weight for name, weight in penalties.items() if weight or name != "z_loss"}
        self.model, self.penalties = model, kept
        model.z_loss = "z_loss" in self.penalties

    def across(self, micros: list[Micro], wrapped: nn.Module) -> list[Micro]:
        """The micro-batches of a step, before the first of them: where an objective needs to know of all of them."""
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
        total, more = self.penalised(out, targets)
        return StepLoss(total, out.weight, {"loss": out.loss.detach()} | more)

    def penalised(self, out: Output, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(the loss with its penalties, sums to log about these)"""
        if self.penalties.keys() != out.penalties.keys():
            raise ValueError(f"penalties: expected weights of {sorted(out.penalties)}, got {sorted(self.penalties)}")
        # A row's mean counts as often as the row has targets: so the sum does not depend on how a batch is cut.
        counts = (targets != IGNORE).sum(1)
        sums = {n: value if n == "z_loss" else (value * counts).sum() for n, value in out.penalties.items()}
        total = sum((weight * sums[name] for name, weight in self.penalties.items()), out.loss)
        metrics = {}
        if self.model.routing is not None:
            metrics |= {"train/loss": total, "train/lm_loss": out.loss} | {f"train/{n}": s for n, s in sums.items()}
            metrics |= {f"router/{n}": value * out.weight for n, value in mean_stats(out.stats).items()}
        return total, metrics


# --- how it is minimised ----------------------------------------------------------------------------------------------


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout is a function of (seed, step, rank): nothing to save, and evaluation cannot disturb it."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def train_step(
    objective: nn.Module,
    optimizers: Optimizers,
    micros: list[Micro],
    world: World,
    *,
    clip: float,
    scaler: torch.amp.GradScaler,
    autocast: torch.autocast | nullcontext,
) -> dict[str, Tensor]:
    """One optimizer step. Loss and gradient are sums over all targets of all micro-batches and ranks, divided once.

    A gradient that is not finite changes nothing, not even the moments: the step is skipped on all ranks alike. All
    figures stay on the device, which is not asked for anything here.
    """
    weight = total(sum((micro.targets != IGNORE).sum() for micro in micros).float(), world).clamp(min=1)
    sums: dict[str, Tensor] = {}
    with autocast:
        micros = unwrapped(objective).across(micros, objective)
    for number, micro in enumerate(micros, start=1):
        with sync_gradients(objective, now=number == len(micros)), autocast:
            out = objective(*micro)
            loss = out.total / weight if out.shared is None else out.total / weight + out.shared
            scaler.scale(loss * world.size).backward()  # the ranks' gradients are averaged
        for name, value in out.metrics.items():
            sums[name] = sums.get(name, 0) + value.detach()
    for optimizer in optimizers.members:
        scaler.unscale_(optimizer)
    norm = whole(nn.utils.clip_grad_norm_([p for p in optimizers.names if p.grad is not None], clip))
    skip = (~norm.isfinite()).float()  # the same on all ranks, because their gradients are
    optimizers.step(skip)
    scaler.update()  # lowers its scale where `unscale_` has met what is not finite
    optimizers.zero_grad()
    averages = total(torch.stack([value.float() for value in sums.values()]), world) / weight
    metrics = dict(zip(sums, averages, strict=True))
    if "train/lm_loss" in metrics:
        metrics["train/perplexity"] = metrics["train/lm_loss"].exp()
    return metrics | (out.figures or {}) | {"grad_norm": norm, "targets": weight, "skipped": skip}


# --- the loop ---------------------------------------------------------------------------------------------------------


class Stop:
    """A signal's flag: the first asks to save and leave after the step, a second Ctrl-C leaves at once.

    Before the first step there is nothing to save, and it ends at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self.can_wait = False  # set by `fit`, which looks at the flag

    @contextmanager
    def watching(self) -> Iterator[None]:
        old = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and (self.asked or not self.can_wait):
            raise KeyboardInterrupt
        if not self.can_wait:
            raise Preempted("stopped by a signal before the first step; the same command starts again")
        self.asked = True


class WholeModel:
    """What a checkpoint holds of the model: here all of it, as a Hugging Face folder."""

    loaded_by = "AutoModelForCausalLM.from_pretrained loads each"

    def tensors(self, model: GPT) -> dict[str, Tensor]:
        return model.state_dict()

    def write(self, trainer: Trainer, tensors: dict[str, Tensor], folder: Path) -> None:
        write_folder(trainer.model, trainer.tokenizer, folder, state=tensors)

    def read(self, folder: Path) -> dict[str, Tensor]:
        return load_model(folder)[0].state_dict()


class RoutedModel(WholeModel):
    loaded_by = "load_model and infer.py load each; transformers has no routed layers"


class Exam:
    """What an evaluation finds beside the loss, and which of two evaluations is the better one: here by the loss."""

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        return {}

    def rank(self, result: dict[str, float]) -> list[float]:
        """Lower is better; later entries count where the earlier ones are equal."""
        return [result["loss"]]


Batches = PretrainBatches | StreamBatches | ChatBatches | TripletBatches


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
    autocast: Any
    scaler: torch.amp.GradScaler
    speed: Speed
    store: WholeModel
    exam: Exam

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run.dir)


class Progress:
    """Where a run stands, beside its tensors. A checkpoint holds all of it."""

    def __init__(self, loop: TrainConfig, rank: Callable[[dict[str, float]], list[float]]):
        self.loop, self.plateau, self.rank = loop, Plateau(loop), rank
        self.step = 0  # optimizer steps that are done
        self.best: dict[str, Any] = {"step": None, "loss": math.inf, "rank": [math.inf]}
        self.stale = 0  # evaluations since the best one
        self.result: dict[str, float] = {}  # of the last evaluation

    def see(self, result: dict[str, float]) -> None:
        """Take an evaluation into account."""
        self.result = result
        if self.step > self.loop.warmup_steps:  # a rate that still rises is not to be lowered
            self.plateau.see(result["loss"])
        self.stale += 1
        if self.rank(result) < self.best["rank"]:
            self.best, self.stale = {"step": self.step, "loss": result["loss"], "rank": self.rank(result)}, 0

    @property
    def over(self) -> bool:
        given_up = bool(self.loop.patience) and self.stale >= self.loop.patience
        return given_up or self.step >= self.loop.steps

    def told(self) -> str:
        """The end of the sentence `done in 9 s`."""
        if not self.result:
            return ", not evaluated"
        figures = "val/loss {loss:.4f}, {bits_per_byte:.4f} bits per byte".format(**self.result)
        best = (
            "" if self.best["step"] == self.step else "; best: val/loss {loss:.4f} at step {step}".format(**self.best)
        )
        return f": {figures} of validation text{best}"

    def state(self) -> dict[str, Any]:
        kept = {"step": self.step, "best": self.best, "stale": self.stale, "result": self.result}
        return kept | {"plateau": self.plateau.state()}

    def load(self, state: dict[str, Any]) -> None:
        self.step, self.best, self.stale, self.result = (state[k] for k in ("step", "best", "stale", "result"))
        self.best = {"rank": [self.best["loss"]]} | self.best  # older runs went by the loss alone
        self.plateau.load(state["plateau"])


def fit(
    trainer: Trainer,
    source: Path | None = None,
    changed: dict[str, Any] | None = None,
    stop: Stop | None = None,
) -> Progress:
    """Train from a checkpoint, or from the start, to the end or until asked to stop; returns how far it came.

    changed: in which keys the run differs from the one that wrote the checkpoint; it is logged
    """
    cfg, loop, world, model = trainer.cfg, trainer.loop, trainer.world, trainer.model
    groups = parameter_groups(model, loop, unwrapped(trainer.objective).head)
    optimizers = Optimizers(groups, loop, model.routing)
    progress, stop = Progress(loop, trainer.exam.rank), stop or Stop()
    resumed = resume(trainer, source, optimizers, progress) if source else None
    log = MetricLog(cfg, loop, trainer.folder, progress.step, trainer.speed, world)
    leaving, early = False, progress.step + 3  # so that a person soon sees loss, speed and remaining time
    model.train()
    stop.can_wait = True
    with log.open():
        if resumed:
            log.event(**resumed, changed=changed)
        while not progress.over and not leaving:
            step = progress.step
            rate = lr_at(step, loop, progress.plateau.scale)
            optimizers.set_rate(rate)
            at_step(model, step, loop.steps)
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
            leaving, last = any_rank(stop.asked, world), done == loop.steps
            if last or leaving or done == early or done % loop.log_every == 0:
                log.flush()
            if done == early and (idle := optimizers.idle()):
                say(f"warning: never a gradient for {len(idle)} parameters: {', '.join(idle[:5])}")
            if last or done % loop.eval_every == 0:
                log.flush()
                with log.pause():
                    loss = evaluate_routed(model, trainer.windows, trainer.bytes_of, world, trainer.autocast)
                    progress.see(loss | trainer.exam(trainer))
                    show_progress(trainer, log, progress)
            if progress.over or leaving or done % cfg.run.save_every == 0 or progress.best["step"] == done:
                log.flush()
                with log.pause():
                    keep_checkpoint(trainer, progress, optimizers, rate)
    return progress


# Of an evaluation: what has words of its own in the line for the person, and what is too much for it.
TOLD_APART = re.compile(r"loss$|perplexity|bits_per_byte$|router/")


def show_progress(trainer: Trainer, log: MetricLog, progress: Progress) -> None:
    """A line with the validation loss, and what the model writes at this point."""
    step, result = progress.step, progress.result
    log.event(step=step, **{f"val/{name}": value for name, value in result.items()})
    beside = "".join(f" {name} {value:.3f}" for name, value in result.items() if not TOLD_APART.match(name))
    say(f"step {step} val/loss {result['loss']:.4f} perplexity {result['perplexity']:.2f} "
        f"bits per byte {result['bits_per_byte']:.4f}{beside}")  # fmt: skip
    if trainer.loop.sample_tokens:
        sample = trainer.sample(trainer)
        log.sample(step, **sample)
        say("  | " + escape_terminal(sample["text"]).replace("\n", "\n  | "))


def written(trainer: Trainer, prompt: list[int], eos: int | list[int]) -> dict[str, Any]:
    """How the model goes on from a prompt, control tokens left out; of a routed one also what computed each token."""
    model, tokenizer = trainer.model, trainer.tokenizer
    length = min(trainer.loop.sample_tokens, model.cfg.context - len(prompt))
    params = {"max_new_tokens": length, "temperature": 0.8, "top_p": 0.95, "seed": trainer.cfg.run.seed}
    banned = range(tokenizer.n_vocab, model.cfg.vocab_size)  # ids that stand for nothing
    (ids,) = generate(model, [prompt], eos=eos, banned=banned, **params)
    sample: dict[str, Any] = {"text": tokenizer.decode(ids[len(prompt) :], skip_special=True)}
    if model.routing is not None:  # prompt and text, each piece with how many of the routed layers computed it
        pieces = zip(pieces_of(tokenizer, ids), tokens_used(model, ids), strict=True)
        sample |= {"layers": len(model.routers), "pieces": [piece for piece in pieces if piece[0]]}
    return sample


def sample_document(trainer: Trainer) -> dict[str, Any]:
    """The beginning of a document."""
    eos = trainer.tokenizer.eos_id  # what a document begins after
    return written(trainer, [eos], eos)


# --- stop and go on ---------------------------------------------------------------------------------------------------

# What may differ between a run and its continuation without a word: it changes no weight by more than rounding does.
HARMLESS = re.compile(
    r"run\.(device|dir|resume|overwrite|keep|save_every|parallel|allow_change)|data\.(cache_dir|workers)"
    r"|\w+\.(micro_batch|checkpoint_activations|compile|eval_every|eval_tokens|log_every|sample_tokens|skip_limit)"
)
LISTENED_TO = re.compile(r"\w+\.(eval_every|eval_tokens)")  # by the plateau rule and by patience


def flat(section: dict[str, Any], path: str = "") -> dict[str, Any]:
    out = {}
    for name, value in section.items():
        out |= flat(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return out


def plain_sections(values: dict[str, Any], sections: tuple[str, ...]) -> dict[str, Any]:
    """As they come back from a state.json."""
    return {name: json.loads(json.dumps(values[name])) for name in sections}


def defaults(cfg: Config, sections: tuple[str, ...]) -> dict[str, Any]:
    """What a run did that was started before a key existed."""
    known = {
        name: {f.name: f.default for f in fields(getattr(cfg, name)) if f.default is not MISSING} for name in sections
    }
    return flat(plain_sections(known, sections))


def refuse_changes(cfg: Config, old: dict[str, Any], sections: tuple[str, ...]) -> dict[str, list[Any]]:
    """What differs from the run that is continued, as {key: [old, new]}; refused unless allowed by key."""
    was, now = defaults(cfg, sections) | flat(old), flat(plain_sections(asdict(cfg), sections))
    listens = any(now.get(f"{name}.schedule") == "plateau" or now.get(f"{name}.patience") for name in sections)
    changed = {
        key: [was.get(key), now[key]]
        for key in now
        if now[key] != was.get(key) and (not HARMLESS.fullmatch(key) or (listens and LISTENED_TO.fullmatch(key)))
    }
    refused = [key for key in changed if key not in cfg.run.allow_change or key.startswith(("model.", "routing."))]
    if refused:
        listed = ", ".join(f"{key} {changed[key][0]!r} -> {changed[key][1]!r}" for key in refused)
        raise ConfigError(
            f"{cfg.run.dir}: this run was started otherwise: {listed} (--run.dir for a new run, --run.allow_change KEY)"
        )
    return changed


def keep_checkpoint(trainer: Trainer, progress: Progress, optimizers: Optimizers, rate: float) -> None:
    """Write everything that the run needs to go on; every rank waits until it is durable."""
    world, step = trainer.world, progress.step
    weights = gathered(trainer.store.tensors(trainer.model), world)  # by all ranks together
    moments = gathered(optimizers.state(), world)
    if world.is_main:
        state = progress.state() | {
            "cursor": step,
            "lr": rate,
            "rng": f"seeded by ({trainer.cfg.run.seed}, step, rank)",
            "scaler": trainer.scaler.state_dict(),
            "config": asdict(trainer.cfg),
            "over": progress.over,
            "world_size": world.size,
            "data": trainer.batches.fingerprint,
            "stream": trainer.batches.state() if isinstance(trainer.batches, StreamBatches) else None,
        }
        path, digest = save(
            trainer.folder,
            step,
            model=lambda folder: trainer.store.write(trainer, weights, folder),
            tokenizer=trainer.tokenizer,
            optimizer=moments,
            state=state,
            keep=trainer.cfg.run.keep,
            best=progress.best["step"],
        )
        print(f"CKPT step={step} path={path} sha256={digest}", flush=True)
    barrier(world)


def gathered(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors on the main rank, one after the other; nothing on the others."""
    found = ((name, whole(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in found if world.is_main}


def starting_point(cfg: Config) -> Path | None:
    """The checkpoint to go on from: that which is named, else the newest that is whole; None: start anew."""
    folder, wanted = Path(cfg.run.dir), cfg.run.resume
    if wanted not in ("auto", "never", "must"):
        if not Path(wanted).is_dir() or (Path(wanted) / "checkpoints").is_dir():
            raise ResumeError(f"run.resume: expected auto, never, must or a checkpoint's folder, got {wanted!r}")
        verify(Path(wanted))
        return Path(wanted)
    if wanted == "never" and cfg.run.overwrite:
        return None
    newest = newest_valid(folder)
    if newest is None and wanted == "must":
        raise ResumeError(f"{folder}: run.resume is must, but there is no checkpoint")
    if newest is not None and wanted == "never":
        raise ConfigError(f"{folder}: run.resume is never, but {newest.name} is there (--run.overwrite deletes it)")
    return newest


def resume(trainer: Trainer, source: Path, optimizers: Optimizers, progress: Progress) -> dict[str, Any]:
    """Put everything back as a checkpoint has it. Returns what is to be logged about it."""
    cfg, model = trainer.cfg, trainer.model
    tensors, state = load_trainer_state(source)
    narrow = [f"{name} is {kind}" for name, kind in inventory(source).items() if not kind.startswith("F32 ")]
    if narrow:  # whoever made it so has rounded the state of the run
        raise ResumeError(f"{source}: expected weights and optimizer state in F32, but {narrow[0]}")
    for name, old, new in (
        ("tokenizer", state["tokenizer_hash"], trainer.tokenizer.hash),
        ("data", state["data"], trainer.batches.fingerprint),
    ):
        if old != new and (name == "tokenizer" or "data" not in cfg.run.allow_change):
            raise ResumeError(f"{source}: the {name} has changed since ({old[:12]} -> {new[:12]})")
    stored, own = trainer.store.read(source), trainer.store.tensors(model)
    differing = [name for name in stored.keys() | own.keys() if _shape(stored, name) != _shape(own, name)]
    if differing:
        name = sorted(differing)[0]
        other = f"expected {name} of shape {_shape(own, name)}, got {_shape(stored, name)}"
        raise ResumeError(f"{source}: {len(differing)} tensors differ from this run's: {other}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(spread_like(stored[name], tensor))
    try:
        optimizers.load(tensors)
    except ValueError as error:
        raise ResumeError(f"{source}: {error}") from None
    if isinstance(trainer.batches, StreamBatches):
        if state["stream"] is None:
            raise ResumeError(f"{source}: its text was not streamed, so that a stream cannot go on (data.streaming)")
        trainer.batches.load_state(state["stream"])
    progress.load(state)
    trainer.scaler.load_state_dict(state["scaler"])
    say(f"going on from {source}")
    others = {
        name: [old, versions().get(name)] for name, old in state["versions"].items() if old != versions().get(name)
    }
    if others:
        listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in others.items())
        say(f"warning: {source} was written by other versions: {listed}; figures may differ in their last digits")
    return {"step": progress.step, "event": "resume", "from": str(source), "versions": others}


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


# --- before the first step --------------------------------------------------------------------------------------------


def compiled(objective: nn.Module, cfg: Config, loop: TrainConfig, device: torch.device) -> nn.Module:
    """Compile in place, where asked. `auto` compiles on CUDA, where it pays within seconds."""
    if loop.compile == "off" or (loop.compile == "auto" and device.type != "cuda"):
        return objective
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # no compiler, no Triton, a broken one: each fails in its own way
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else "no reason"
        if loop.compile == "on":
            raise ConfigError(f"compile: expected a working compiler, got {reason:.200}") from None
        say(f"not compiled: no working compiler ({reason:.200})")
        return objective
    model = objective.model  # whose rotary tables are made now: grown later, they would compile everything again
    model.rope.tables(model.cfg, loop.seq_len, loop.seq_len, device)
    if cfg.run.parallel == "fsdp":
        for block in model.model.layers:  # sharding hooks stand around each block
            block.compile()
    else:
        objective.compile()
    return objective


def assemble(
    cfg: Config,
    loop: TrainConfig,
    world: World,
    objective: nn.Module,
    tokenizer: Tokenizer,
    batches: Batches,
    windows: list[Batch],
    sample: Callable[[Trainer], dict[str, Any]],
    store: WholeModel,
    peak: Peak | None = None,
    exam: Exam | None = None,
) -> Trainer:
    """The part of the way to `fit` that all scripts share: precision, plan, compilation, ranks."""
    model = objective.model
    model.checkpoint_activations = loop.checkpoint_activations
    dtype, reason = pick_dtype(cfg.run.dtype, world.device)
    peak = peak or peak_of(world.device, dtype)
    how = {"dtype": dtype, "head": objective.head, "targets": batches.targets, "isolated": batches.isolated}
    rows = micro_rows(cfg, model, loop, world, **how)
    announce(cfg, loop, world, model, batches, rows, f"{str(dtype).removeprefix('torch.')} ({reason})", peak, **how)
    return Trainer(
        cfg=cfg,
        loop=loop,
        world=world,
        objective=wrap(compiled(objective, cfg, loop, world.device), world, cfg.run.parallel),
        model=model,
        tokenizer=tokenizer,
        batches=batches,
        windows=windows,
        bytes_of=token_bytes(tokenizer),
        sample=sample,
        rows=rows,
        autocast=torch.autocast(world.device.type, dtype) if dtype != torch.float32 else nullcontext(),
        scaler=torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16),
        speed=Speed.of(model.cfg, loop.seq_len, peak, world.size, model.routing),
        store=store,
        exam=exam or Exam(),
    )


def main_first(world: World, make: Callable[[], Any]) -> Any:
    """What the main rank makes on disk, the others find done."""
    if not world.is_main:
        barrier(world)
    made = make()
    if world.is_main:
        barrier(world)
    return made


def build(cfg: Config, world: World) -> Trainer:
    """A model from scratch, on text."""
    loop, isolate = cfg.train, cfg.data.isolate_documents
    data = main_first(world, lambda: prepare(cfg.data, cfg.model.vocab_size, progress=world.is_main))
    batches = open_batches(cfg.data, data, loop.seq_len, loop.rows, cfg.run.seed)
    windows = eval_windows(data.val, loop.seq_len, loop.eval_tokens, isolate_documents=isolate)
    torch.manual_seed(cfg.run.seed)
    model = build_model(cfg.model, cfg.routing).to(world.device)
    objective = LanguageModeling(model, {"z_loss": loop.z_loss} | penalty_weights(cfg.routing))
    store = RoutedModel() if model.routing else WholeModel()
    return assemble(cfg, loop, world, objective, data.tokenizer, batches, windows, sample_document, store)


# --- a whole run ------------------------------------------------------------------------------------------------------


def run(cfg: Config, world: World, *how: Any) -> int:
    """A run in its folder, to its end, and what is asked of it then; `how` is as in `completed`. The exit code."""
    check_tasks(cfg)
    code = completed(cfg, world, *how)
    if code == 0 and world.is_main:
        gc.collect()  # the trained model has to make room for that of its best checkpoint
        if ask_at_the_end(cfg):
            report.attempt(Path(cfg.run.dir))
    return code


def completed(
    cfg: Config,
    world: World,
    build: Callable[[Config, World], Trainer],
    sections: tuple[str, ...],
    following: str,
) -> int:
    """A run in its folder, from the lock to the last line. The same command on a complete run changes nothing.

    sections   of the configuration that decide what comes out
    following  the command to try next

    Returns the exit code.
    """
    folder, started, changed = Path(cfg.run.dir), time.perf_counter(), None
    stop = Stop()
    with stop.watching(), runfolder.lock(folder) if world.is_main else nullcontext():
        source = main_first(world, lambda: starting_point(cfg))
        if source:
            state = read_state(source)
            changed = refuse_changes(cfg, state["config"], sections)  # before anything is written
            if state["over"] and not changed:
                say(f"{folder} is complete: {state['step']} steps, best validation loss {state['best']['loss']:.4f}")
                say(f"next: {following}")
                if world.is_main:
                    sweep(folder, source)  # what the last save left, if killed
                    if read_status(folder) != "done":  # killed between its last save and its last word
                        write_status(folder, "done", 0, "")
                return 0
        if world.is_main:
            write_atomic(folder / "config.yaml", dump(cfg).encode())
            record = source_record() | {"device": name_of(world.device), "ranks": world.size}
            write_atomic(folder / "source.json", json.dumps(record, indent=2).encode())
            write_status(folder, "running", 0, "")
        try:
            trainer = build(cfg, world)
            if world.is_main:
                stored = sum(t.numel() for t in trainer.store.tensors(trainer.model).values())
                trained = sum(p.numel() for p in trainer.objective.parameters() if p.requires_grad)
                check_disk(folder, 4 * stored + 8 * trained, cfg.run.keep)  # fp32, two moments
                if cfg.run.overwrite and not source:
                    clear(folder)
            progress = fit(trainer, source, changed, stop)
        except BaseException as error:
            if world.is_main:
                code = exit_code_of(error)
                status = "preempted" if code == PREEMPTED else "failed"
                write_status(folder, status, code, str(error) or type(error).__name__)
                report.attempt(folder)
            raise
        if not progress.over:
            say(f"stopped by a signal after step {progress.step}, saved; the same command goes on")
            if world.is_main:
                write_status(folder, "preempted", PREEMPTED, f"signal after step {progress.step}")
                report.attempt(folder)
            return PREEMPTED
        if world.is_main:
            write_status(folder, "done", 0, "")
            seconds = time.perf_counter() - started
            report.attempt(folder)
            say(f"done in {seconds:.0f} s{progress.told()}")
            say(f"wrote {folder}/: report.html, metrics.jsonl, samples.jsonl, checkpoints/ ({trainer.store.loaded_by})")
            say(f"next: {following}")
    return 0


def main(argv: list[str]) -> int:
    cfg = load_config(argv, "train")
    cfg = replace(cfg, finetune=replace(cfg.finetune, base_ckpt=None))  # by which a run is known as a fine-tuned one
    check(cfg, ranks())
    world = start(cfg.run.device)
    try:
        return run(cfg, world, build, SECTIONS, f'python infer.py --ckpt {cfg.run.dir} --prompt "def "')
    finally:
        stop(world)


if __name__ == "__main__":
    run_script(main)
