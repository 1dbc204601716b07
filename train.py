"""Pretraining, and the one loop that all training shares.

    python train.py                                         a small model on Python's own standard library, in minutes
    python train.py --preset 50M --data.train "notes/*.md"  another shape, another text
    torchrun --nproc_per_node 8 train.py --preset 0.5B      eight devices, the same run

Read `fit` first: it is the loop. An objective is a module whose forward returns a sum and a weight; whatever is wrapped
(compiled, distributed) is that module. Batches, learning rate and seeds are functions of the step, so a resumed run
needs little more than the step and the tensors.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from checkpoint import load_model
from config import Config, ConfigError, TrainConfig, check, dump, load_config, run_script
from corpus import prepare
from data import Batch, PretrainBatches, StreamBatches, eval_windows, open_batches, token_bytes
from distributed import World, any_rank, barrier, pick_dtype, start, stop, sync_gradients, total, wrap
from model import GPT, IGNORE, LOGITS_PER_CHUNK, flops_per_token, generate
from runfolder import (
    NonFiniteError,
    check_disk,
    load_trainer_state,
    lock,
    newest_valid,
    save,
    source_record,
    write_atomic,
    write_status,
)
from tokenizer import Tokenizer, escape_terminal

PREEMPTED = 75  # exit code: stopped by a signal, everything saved
CPU_MICRO_TOKENS = 4_096  # tokens per forward at most: more do not fit into a CPU's caches ...
GPU_MICRO_TOKENS = 65_536  # ... and make a GPU no busier


class ResumeError(Exception):
    exit_code = 4


# --- what is minimised ------------------------------------------------------------------------------------------------


class StepLoss(NamedTuple):
    total: Tensor  # summed over the targets, penalties included: this is back-propagated
    weight: Tensor  # number of targets
    metrics: dict[str, Tensor]  # sums that are logged as averages over the targets


class LanguageModeling(nn.Module):
    """Next-token cross-entropy, plus named penalties with their weights."""

    def __init__(self, model: GPT, penalties: dict[str, float]):
        super().__init__()
        self.model, self.penalties = model, {name: weight for name, weight in penalties.items() if weight}
        model.z_loss = "z_loss" in self.penalties

    def forward(self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> StepLoss:
        out = self.model(tokens, targets, documents=documents)
        extra = [weight * out.penalties[name] for name, weight in self.penalties.items()]
        return StepLoss(sum(extra, out.loss), out.weight, {"loss": out.loss.detach()})


# --- how it is minimised ----------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, cfg: TrainConfig) -> dict[str, dict[str, nn.Parameter]]:
    """Each trainable parameter in one group: muon (hidden matrices), decay (other matrices), plain (vectors)."""
    groups: dict[str, dict[str, nn.Parameter]] = {"muon": {}, "decay": {}, "plain": {}}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        hidden = ".layers." in name and parameter.dim() == 2
        kind = "plain" if parameter.dim() < 2 else "muon" if hidden and cfg.optimizer == "muon" else "decay"
        groups[kind][name] = parameter
    return {kind: members for kind, members in groups.items() if members}


class Optimizers:
    """AdamW, with Muon beside it for the hidden matrices; one rate for all. State is kept by parameter name."""

    def __init__(self, groups: dict[str, dict[str, nn.Parameter]], cfg: TrainConfig):
        self.names = {p: name for members in groups.values() for name, p in members.items()}
        adamw = [
            {"params": list(groups[kind].values()), "weight_decay": decay}
            for kind, decay in (("decay", cfg.weight_decay), ("plain", 0.0))
            if kind in groups
        ]
        betas = (cfg.beta1, cfg.beta2)
        self.members: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(adamw, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True)
        ]
        if "muon" in groups:
            matrices = list(groups["muon"].values())
            # With this rule a Muon step is as long as one of AdamW, so that one rate serves both (arXiv 2502.16982).
            muon = torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw")
            self.members.append(muon)

    def set_rate(self, rate: float) -> None:
        for optimizer in self.members:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def step(self, scaler: torch.amp.GradScaler) -> None:
        for optimizer in self.members:
            scaler.step(optimizer)

    def zero_grad(self) -> None:
        for optimizer in self.members:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """PARAMETER.key -> tensor."""
        return {
            f"{self.names[p]}.{key}": value
            for optimizer in self.members
            for p, entry in optimizer.state.items()
            for key, value in entry.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`; a tensor too many, too few or of another shape is refused."""
        rest = dict(state)
        for optimizer in self.members:
            muon = isinstance(optimizer, torch.optim.Muon)
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                keys = ("momentum_buffer",) if muon else ("step", "exp_avg", "exp_avg_sq")
                entry = {key: rest.pop(f"{self.names[p]}.{key}", None) for key in keys}
                if any(t is None or (key != "step" and t.shape != p.shape) for key, t in entry.items()):
                    raise ResumeError(f"optimizer state of {self.names[p]}: missing or of another shape")
                # AdamW keeps its step count beside the parameters in fp32, also on a device.
                optimizer.state[p] = {key: t.to(p.device) for key, t in entry.items()}
        if rest:
            raise ResumeError(f"optimizer state: unexpected {', '.join(sorted(rest)[:5])}")


class Plateau:
    """Multiplies the rate by a factor when the validation loss has stopped falling."""

    def __init__(self, cfg: TrainConfig):
        self.cfg, self.scale, self.best, self.bad, self.cooldown = cfg, 1.0, math.inf, 0, 0

    def see(self, loss: float) -> None:
        if loss < self.best * (1 - self.cfg.plateau_threshold):
            self.best, self.bad = loss, 0
        elif self.cooldown:
            self.cooldown -= 1
        else:
            self.bad += 1
        if self.bad > self.cfg.plateau_patience:
            self.scale = max(self.scale * self.cfg.plateau_factor, self.cfg.floor)
            self.bad, self.cooldown = 0, self.cfg.plateau_cooldown

    def state(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("scale", "best", "bad", "cooldown")}

    def load(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def lr_at(step: int, cfg: TrainConfig, plateau_scale: float = 1.0) -> float:
    """The rate of a step: a linear warm-up, then the schedule, down to floor x lr at the last step."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - 1 - cfg.warmup_steps)
    if cfg.schedule == "plateau":
        return cfg.lr * plateau_scale
    if cfg.schedule == "constant":
        return cfg.lr
    if cfg.schedule == "cosine":
        share = (1 + math.cos(math.pi * done)) / 2
    elif cfg.schedule == "linear":
        share = 1 - done
    else:  # wsd: warm-up, stable, decay
        share = min(1.0, (1 - done) / cfg.decay_share) if cfg.decay_share else 1.0
    return cfg.lr * (cfg.floor + (1 - cfg.floor) * share)


def micro_batches(batch: Batch, rows: int, device: torch.device) -> list[Batch]:
    parts = [[None] * len(batch.tokens) if t is None else t.to(device).split(rows) for t in batch]
    return [Batch(*part) for part in zip(*parts, strict=False)]


def train_step(
    objective: nn.Module,
    optimizers: Optimizers,
    micros: list[Batch],
    world: World,
    *,
    clip: float,
    scaler: torch.amp.GradScaler,
    autocast: torch.autocast | nullcontext,
) -> dict[str, Tensor]:
    """One optimizer step. Loss and gradient are sums over all targets of all micro-batches and ranks, divided once.

    A gradient that is not finite changes nothing, not even the moments: the step is skipped on all ranks alike.
    """
    weight = total(sum((micro.targets != IGNORE).sum() for micro in micros).float(), world).clamp(min=1)
    sums: dict[str, Tensor] = {}
    for number, micro in enumerate(micros, start=1):
        with sync_gradients(objective, now=number == len(micros)), autocast:
            out = objective(*micro)
            # The ranks' gradients are averaged, so each counts `size` times.
            scaler.scale(out.total * (world.size / weight)).backward()
        for name, value in out.metrics.items():
            sums[name] = sums.get(name, 0) + value.detach()
    for optimizer in optimizers.members:
        scaler.unscale_(optimizer)
    parameters = [p for p in optimizers.names if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    finite = bool(norm.isfinite())  # the same on all ranks, because their gradients are
    if finite or scaler.is_enabled():  # the scaler skips by itself and lowers its scale
        optimizers.step(scaler)
    scaler.update()
    optimizers.zero_grad()
    metrics = {name: total(value.clone(), world) / weight for name, value in sums.items()}
    return metrics | {"grad_norm": norm, "targets": weight, "skipped": torch.tensor(float(not finite))}


# --- how well it does -------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: GPT, windows: list[Batch], bytes_of: Tensor, world: World, autocast: Any) -> dict[str, float]:
    """Validation loss in nats, perplexity and bits per byte, over a fixed list of windows shared among the ranks."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for window in windows[world.rank :: world.size]:
        micro = [t if t is None else t.to(world.device) for t in window]
        with autocast:
            out = model(micro[0], micro[1], documents=micro[2])
        real = window.targets[window.targets != IGNORE]
        sums += torch.tensor([float(out.loss), float(out.weight), float(bytes_of[real].sum())], dtype=torch.float64)
    model.train(was_training)
    nats, count, size = total(sums.to(world.device) if world.size > 1 else sums, world).tolist()
    loss = nats / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": nats / math.log(2) / size}


# --- the loop ---------------------------------------------------------------------------------------------------------


class Stop:
    """A signal's flag: the first asks to save and leave after the step, a second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        old = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


class MetricLog:
    """metrics.jsonl, one object per step, and a line for the person every `log_every` steps.

    Values stay tensors until then, so that the device is asked once per log line.
    """

    def __init__(self, path: Path | None, cfg: TrainConfig, flops: float):
        self.cfg, self.flops = cfg, flops
        self.file = path.open("a", encoding="utf-8") if path else None
        self.waiting: list[dict[str, Any]] = []
        self.clock, self.paused = time.perf_counter(), 0.0

    def add(self, **entry: Any) -> None:
        self.waiting.append(entry)

    def flush(self, note: str = "") -> None:
        if not self.waiting:
            return
        rows = [{k: v.item() if isinstance(v, Tensor) else v for k, v in row.items()} for row in self.waiting]
        seconds = time.perf_counter() - self.clock - self.paused
        speed = sum(row["targets"] for row in rows) / seconds
        if self.file:
            self.file.writelines(json.dumps(row) + "\n" for row in rows)
            self.file.flush()
            last = rows[-1]
            print(
                f"step {last['step']}/{self.cfg.steps} loss {last['loss']:.4f} lr {last['lr']:.2e} "
                f"grad_norm {last['grad_norm']:.2f} tok/s {speed:,.0f} GFLOP/s {speed * self.flops / 1e9:.0f}{note}",
                file=sys.stderr,
                flush=True,
            )
        self.waiting, self.clock, self.paused = [], time.perf_counter(), 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that does not count as training: evaluation, samples, checkpoints."""
        started = time.perf_counter()
        yield
        self.paused += time.perf_counter() - started

    def close(self) -> None:
        self.flush()
        if self.file:
            self.file.close()


class Trainer(NamedTuple):
    """What `fit` works on."""

    cfg: Config
    world: World
    objective: nn.Module  # wrapped
    model: GPT
    tokenizer: Tokenizer
    batches: PretrainBatches | StreamBatches
    windows: list[Batch]
    folder: Path
    autocast: Any
    scaler: torch.amp.GradScaler


def fit(trainer: Trainer) -> dict[str, float]:
    """Train from the newest checkpoint, or from the start, to the last step; returns the last evaluation."""
    cfg, world, model = trainer.cfg, trainer.world, trainer.model
    optimizers = Optimizers(parameter_groups(model, cfg.train), cfg.train)
    plateau, best = Plateau(cfg.train), {"step": None, "loss": math.inf}
    first = resume(trainer, optimizers, plateau, best)
    rows = micro_rows(cfg, world)
    flops = flops_per_token(model.cfg, cfg.train.seq_len)
    log = MetricLog(trainer.folder / "metrics.jsonl" if world.is_main else None, cfg.train, flops)
    bytes_of, stop, skipped, result = token_bytes(trainer.tokenizer), Stop(), 0, {}
    model.train()
    with stop.watching():
        for step in range(first, cfg.train.steps):
            rate = lr_at(step, cfg.train, plateau.scale)
            optimizers.set_rate(rate)
            batch = trainer.batches(step, world.rank, world.size)
            micros = micro_batches(batch, rows, world.device)
            metrics = train_step(
                trainer.objective,
                optimizers,
                micros,
                world,
                clip=cfg.train.clip,
                scaler=trainer.scaler,
                autocast=trainer.autocast,
            )
            done = step + 1
            sha = trainer.batches.sha(step) if world.is_main else ""
            log.add(step=done, **metrics, lr=rate, epoch=trainer.batches.epoch(done), cursor=done, batch_sha=sha)
            skipped = skipped + 1 if metrics["skipped"] else 0
            if skipped > cfg.train.skip_limit:
                log.close()
                raise NonFiniteError(f"{skipped} steps in a row without a finite gradient, last at step {done}")
            last, leaving = done == cfg.train.steps, any_rank(stop.asked, world)
            if last or leaving or done % cfg.train.log_every == 0:
                log.flush()
            if last or done % cfg.train.eval_every == 0:
                with log.pause():
                    result = evaluate(model, trainer.windows, bytes_of, world, trainer.autocast)
                    plateau.see(result["loss"])
                    best = min(best, {"step": done, "loss": result["loss"]}, key=lambda entry: entry["loss"])
                    show_progress(trainer, done, result)
            if last or leaving or done % cfg.run.save_every == 0:
                with log.pause():
                    keep_checkpoint(trainer, done, optimizers, plateau, best, rate)
            if leaving and not last:
                log.close()
                if world.is_main:
                    write_status(trainer.folder, "preempted", PREEMPTED, f"signal after step {done}")
                raise SystemExit(PREEMPTED)
    log.close()
    return result


def show_progress(trainer: Trainer, step: int, result: dict[str, float]) -> None:
    """A line with the validation loss, and what the model writes at this point when it begins a document."""
    if not trainer.world.is_main:
        return
    row = {"step": step, **{f"val/{name}": value for name, value in result.items()}}
    with (trainer.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    say(f"step {step} val/loss {result['loss']:.4f} perplexity {result['perplexity']:.2f} "
        f"bits per byte {result['bits_per_byte']:.4f}")  # fmt: skip
    length = min(trainer.cfg.train.sample_tokens, trainer.model.cfg.context - 1)
    if length:
        start = trainer.tokenizer.eos_id  # what a document begins after
        params = {"max_new_tokens": length, "temperature": 0.8, "top_p": 0.95, "seed": trainer.cfg.run.seed}
        banned = range(trainer.tokenizer.n_vocab, trainer.model.cfg.vocab_size)
        (ids,) = generate(trainer.model, [[start]], eos=start, banned=banned, **params)
        text = trainer.tokenizer.decode(ids[1:], skip_special=True)
        with (trainer.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "text": text}) + "\n")
        say("  | " + escape_terminal(text).replace("\n", "\n  | "))


# --- stop and go on ---------------------------------------------------------------------------------------------------

# What may differ between a run and its continuation without a word: it does not change a single weight.
HARMLESS = re.compile(
    r"run\.(device|dir|resume|keep|save_every|wandb|allow_change)|infer\..*|data\.(cache_dir|workers)"
    r"|train\.(micro_batch|checkpoint_activations|compile|eval_every|eval_tokens|log_every|sample_tokens|skip_limit)"
)


def flat(section: dict[str, Any], path: str = "") -> dict[str, Any]:
    out = {}
    for name, value in section.items():
        out |= flat(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return out


def refuse_changes(cfg: Config, old: dict[str, Any]) -> None:
    """A continued run is the same run: other weights, data or rates are named, and refused unless allowed by key."""
    was, now = flat(old), flat(json.loads(json.dumps(asdict(cfg))))
    changed = [key for key in now if now[key] != was.get(key) and not HARMLESS.fullmatch(key)]
    refused = [key for key in changed if key not in cfg.run.allow_change or key.startswith("model.")]
    if refused:
        listed = ", ".join(f"{key} {was.get(key)!r} -> {now[key]!r}" for key in refused)
        raise ConfigError(f"{cfg.run.dir}: this run was started otherwise: {listed} (another --run.dir starts anew)")


def random_state(device: torch.device) -> dict[str, str]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return {name: bytes(value.tolist()).hex() for name, value in state.items()}


def restore_random_state(state: dict[str, str], device: torch.device) -> None:
    tensors = {name: torch.tensor(list(bytes.fromhex(value)), dtype=torch.uint8) for name, value in state.items()}
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def keep_checkpoint(
    trainer: Trainer, step: int, optimizers: Optimizers, plateau: Plateau, best: dict, rate: float
) -> None:
    """Write everything that the run needs to go on; every rank waits until it is durable."""
    if trainer.world.is_main:
        state = {
            "step": step,
            "cursor": step,
            "lr": rate,
            "plateau": plateau.state(),
            "best": best,
            "scaler": trainer.scaler.state_dict(),
            "rng": random_state(trainer.world.device),
            "config": asdict(trainer.cfg),
            "tokenizer_hash": trainer.tokenizer.hash,
            "data": trainer.batches.fingerprint,
            "stream": trainer.batches.state() if isinstance(trainer.batches, StreamBatches) else None,
        }
        path, digest = save(
            trainer.folder,
            step,
            model=trainer.model,
            tokenizer=trainer.tokenizer,
            optimizer=optimizers.state(),
            state=state,
            keep=trainer.cfg.run.keep,
            best=best["step"],
        )
        print(f"CKPT step={step} path={path} sha256={digest}", flush=True)
    barrier(trainer.world)


def resume(trainer: Trainer, optimizers: Optimizers, plateau: Plateau, best: dict) -> int:
    """Put everything back as the newest checkpoint has it; returns the number of steps that are done."""
    cfg = trainer.cfg
    newest = newest_valid(trainer.folder, say)
    if newest is None:
        if cfg.run.resume == "must":
            raise ResumeError(f"{trainer.folder}: run.resume is must, but there is no checkpoint")
        return 0
    if cfg.run.resume == "never":
        raise ConfigError(f"{trainer.folder}: run.resume is never, but {newest.name} is there; choose another run.dir")
    tensors, state = load_trainer_state(newest)
    refuse_changes(cfg, state["config"])
    for name, old, new in (
        ("tokenizer", state["tokenizer_hash"], trainer.tokenizer.hash),
        ("data", state["data"], trainer.batches.fingerprint),
    ):
        if old != new and "data" not in cfg.run.allow_change:
            raise ResumeError(f"{newest}: the {name} has changed since ({old[:12]} -> {new[:12]})")
    stored, _ = load_model(newest, trainer.world.device)
    trainer.model.load_state_dict(stored.state_dict())
    optimizers.load(tensors)
    if isinstance(trainer.batches, StreamBatches):
        trainer.batches.load_state(state["stream"])
    plateau.load(state["plateau"])
    best.update(state["best"])
    trainer.scaler.load_state_dict(state["scaler"])
    restore_random_state(state["rng"], trainer.world.device)  # last: all of the above may have drawn
    say(f"going on from {newest}")
    return state["step"]


# --- before the first step --------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A line for the person, from the main rank alone, on stderr."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def memory_estimate(cfg: Config, rows: int) -> dict[str, float]:
    """Bytes on one device: fp32 weights, gradients and optimizer state, activations and logits of one micro-batch."""
    m, tokens = cfg.model, rows * cfg.train.seq_len
    with torch.device("meta"):
        groups = parameter_groups(GPT(m), cfg.train)
    sizes = {kind: sum(p.numel() for p in members.values()) for kind, members in groups.items()}
    parameters = sum(sizes.values())
    q_size, kv_size = m.num_attention_heads * m.head_size, m.num_key_value_heads * m.head_size
    # Kept for the backward of one layer and token, in fp32: two norms and their inputs (6 E), q k v before and after
    # the rotation, the attention's output, and the MLP's gate, up, silu and product.
    layer = 6 * m.hidden_size + 3 * q_size + 4 * kv_size + 4 * m.intermediate_size
    kept = (
        m.hidden_size * m.num_hidden_layers + layer if cfg.train.checkpoint_activations else layer * m.num_hidden_layers
    )
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * (parameters - sizes.get("muon", 0)) + 4 * sizes.get("muon", 0),
        "activations": 4 * tokens * kept,
        "logits": 3 * 4 * min(tokens * m.vocab_size, LOGITS_PER_CHUNK),  # logits, softmax and gradient
    }


def free_memory(device: torch.device) -> float:
    """Bytes that a process can still have on a device; on the CPU, and where it cannot be asked, the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    return float(pages * os.sysconf("SC_PAGE_SIZE")) or math.inf


def micro_rows(cfg: Config, world: World) -> int:
    """Rows per forward: the largest share of a rank's rows that fits into memory, and on a CPU into its caches."""
    own = cfg.train.rows // world.size
    if cfg.train.micro_batch != "auto":
        return min(cfg.train.micro_batch, own)
    room = 0.8 * free_memory(world.device)
    most = CPU_MICRO_TOKENS if world.device.type == "cpu" else GPU_MICRO_TOKENS
    for rows in sorted((n for n in range(1, own + 1) if own % n == 0), reverse=True):
        if rows * cfg.train.seq_len <= most and sum(memory_estimate(cfg, rows).values()) <= room:
            return rows
    return 1


def compiled(objective: nn.Module, cfg: TrainConfig, device: torch.device) -> nn.Module:
    """Compile in place, where asked. `auto` compiles on CUDA, where it pays within seconds."""
    wanted = cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")
    if wanted and not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        say("not compiled: no C++ compiler found")
    elif wanted:
        model = objective.model  # whose rotary tables are made now: grown later, they would compile everything again
        model.rope.tables(model.cfg, cfg.seq_len, cfg.seq_len, device)
        objective.compile()
    return objective


def announce(cfg: Config, world: World, model: GPT, batches: Any, dtype: torch.dtype, reason: str) -> None:
    """What is about to happen, in six lines."""
    train, rows = cfg.train, micro_rows(cfg, world)
    size = sum(p.numel() for p in model.parameters())
    estimate = memory_estimate(cfg, rows)
    groups = parameter_groups(model, train)
    named = {"muon": "matrices by Muon", "decay": "with weight decay", "plain": "without"}
    micro = train.rows // world.size // rows
    say(f"device     {world.device} x {world.size}, {str(dtype).removeprefix('torch.')} ({reason})")
    say(
        f"model      {size / 1e6:.2f} M parameters, {flops_per_token(model.cfg, train.seq_len) / 1e6:.1f} MFLOP a token"
    )
    say("optimizer  " + ", ".join(f"{len(m)} tensors ({sum(p.numel() for p in m.values()) / 1e6:.2f} M) {named[k]}"
        for k, m in groups.items()))  # fmt: skip
    say("memory     " + ", ".join(f"{k} {v / 1e6:.0f} MB" for k, v in estimate.items())
        + f": {sum(estimate.values()) / 1e9:.2f} of {free_memory(world.device) / 1e9:.1f} GB free")  # fmt: skip
    say(f"step       {train.batch_tokens:,} tokens: {train.rows} rows of {train.seq_len} in {micro} x {rows} a rank")
    say(f"plan       {train.steps} steps, {train.steps * train.batch_tokens / 1e6:.2f} M tokens, "
        f"{batches.epoch(train.steps):.2f} epochs, {train.schedule} to {train.lr:g}")  # fmt: skip


def build(cfg: Config, world: World) -> Trainer:
    """Everything that the loop needs, from the text to the wrapped objective."""
    dtype, reason = pick_dtype(cfg.run.dtype, world.device)
    if not world.is_main:
        barrier(world)  # the main rank prepares, the others find it done
    data = prepare(cfg.data, cfg.model.vocab_size, progress=world.is_main)
    if world.is_main:
        barrier(world)
    batches = open_batches(cfg.data, data, cfg.train.seq_len, cfg.train.rows, cfg.run.seed)
    isolate = cfg.data.isolate_documents
    windows = eval_windows(data.val, cfg.train.seq_len, cfg.train.eval_tokens, isolate_documents=isolate)
    torch.manual_seed(cfg.run.seed)
    model = GPT(cfg.model).to(world.device)
    model.checkpoint_activations = cfg.train.checkpoint_activations
    objective = LanguageModeling(model, {"z_loss": cfg.train.z_loss})
    announce(cfg, world, model, batches, dtype, reason)
    half = dtype != torch.float32
    return Trainer(
        cfg=cfg,
        world=world,
        objective=wrap(compiled(objective, cfg.train, world.device), world),
        model=model,
        tokenizer=data.tokenizer,
        batches=batches,
        windows=windows,
        folder=Path(cfg.run.dir),
        autocast=torch.autocast(world.device.type, dtype) if half else nullcontext(),
        scaler=torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16),
    )


def finished(folder: Path, cfg: Config) -> bool:
    """Whether the run is complete: then the same command says so and changes nothing."""
    newest = newest_valid(folder, say) if folder.is_dir() else None
    if newest is None or cfg.run.resume == "never":
        return False
    state = load_trainer_state(newest)[1]
    if state["step"] < cfg.train.steps:
        return False
    refuse_changes(cfg, state["config"])
    say(f"{folder} is complete: {state['step']} steps, best validation loss {state['best']['loss']:.4f}")
    say(f'next: python infer.py --ckpt {folder} --prompt "def "')
    return True


def train(cfg: Config, world: World) -> None:
    folder, started = Path(cfg.run.dir), time.perf_counter()
    if finished(folder, cfg):
        return
    with lock(folder) if world.is_main else nullcontext():
        if world.is_main:
            write_atomic(folder / "config.yaml", dump(cfg).encode())
            write_atomic(folder / "source.json", json.dumps(source_record(), indent=2).encode())
            write_status(folder, "running", 0, "")
        trainer = build(cfg, world)
        if world.is_main:
            size = sum(p.numel() * 12 for p in trainer.model.parameters())  # fp32 weights and two moments
            check_disk(folder, size, cfg.run.keep)
        try:
            result = fit(trainer)
        except Exception as error:
            if world.is_main:
                write_status(folder, "failed", getattr(error, "exit_code", 1), str(error))
            raise
        if world.is_main:
            write_status(folder, "done", 0, "")
            seconds = time.perf_counter() - started
            say(f"done in {seconds:.0f} s: {result['bits_per_byte']:.4f} bits per byte of validation text")
            say(f"wrote {folder}/: metrics.jsonl, samples.jsonl, checkpoints/ (AutoModelForCausalLM loads each)")
            say(f'next: python infer.py --ckpt {folder} --prompt "def "')


def main(argv: list[str]) -> None:
    cfg = load_config(argv, "train")
    world = start(cfg.run.device)
    try:
        check(cfg, world.size)
        train(cfg, world)
    finally:
        stop(world)


if __name__ == "__main__":
    run_script(main)
