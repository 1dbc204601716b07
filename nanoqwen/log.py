"""What a run reports on its way: metrics.jsonl, a bar or lines for the person, wandb, and its speed.

MFU, model FLOP utilisation, is FLOPs per token x tokens per second / peak. The FLOPs are those of the matrix products
that the model needs (`flops.flops_per_token`): recomputed activations do not count, nor do embeddings that are looked
up. Attention counts once with the half of its scores that causality needs, and once in full, as many papers have it.
The peak is that of the device's data sheet (dense, in the dtype that computes); on a CPU and an Apple GPU that of a
measured product.

metrics.jsonl has a row for each step: `loss` (nats per target), `grad_norm` (before clipping), `lr`, `targets` (their
number), `skipped`, `epoch`, `cursor` and `batch_sha` (which batch it was), and what the objective adds (`task`,
`contrast/*`, `train/*`, `router/LAYER/*`). The last row of each interval also has `tokens_per_s` (targets per second of
training), `mfu`, `mfu_full` and `memory_mb`. An evaluation is a row of its own, with `val/*`; so is a resume (`event`).
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from model import ModelConfig
from nanoqwen.config import Config, LogConfig, TrainConfig
from nanoqwen.distributed import World
from nanoqwen.errors import DiskError, NonFiniteError, say, warn
from nanoqwen.files import is_special, write_atomic
from nanoqwen.flops import flops_per_token
from nanoqwen.routing import RoutingConfig

# Dense half-precision peaks in TFLOP/s, from the vendors' data sheets; the first name that is part of the device's.
PEAKS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "A800": 312, "H800": 989,
    "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A30": 165, "A10G": 70, "A10": 125, "V100": 125, "T4": 65,
    "RTX 5090": 210, "RTX 4090": 165, "RTX 4080": 97, "RTX 3090": 71, "RTX A6000": 155, "RTX 6000 Ada": 364,
}  # fmt: skip
NARROWEST_BAR = 10  # columns
SHORTEST_WARMUP = 20  # steps in which a loss that doubles is worth a word
SIDE, SECONDS = 1024, 0.4  # of the square matrices whose product is measured; seconds of measuring


# --- speed ------------------------------------------------------------------------------------------------------------


class Peak(NamedTuple):
    """FLOP/s of one device at most; None: not known."""

    flops: float | None
    origin: str


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        words = name.replace("-", " ")
        known = next((peak for model, peak in PEAKS.items() if re.search(rf"\b{model}\b", words)), None)
        if known is None or dtype == torch.float32:
            return Peak(None, f"of {name} in {kind} not known")
        return Peak(known * 1e12, f"{known} TFLOP/s of {name}, {kind}, data sheet")
    peak = measured_peak(device, dtype)
    return Peak(peak, f"{peak / 1e9:.0f} GFLOP/s, measured: {kind} product of {SIDE} x {SIDE}")


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of several matrix products: what else runs on the machine only makes them slower."""
    a = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
    times = []
    until = time.perf_counter() + SECONDS
    while not times or time.perf_counter() < until:
        started = time.perf_counter()
        (a @ a).flatten()[0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return 2 * SIDE**3 / min(times)


class Speed(NamedTuple):
    """Tokens per second as a fraction of what the devices could do."""

    causal: float  # FLOPs per token, attention counted as far as causality needs it
    full: float  # attention counted in full
    peak: float | None  # of all devices together, FLOP/s

    @classmethod
    def of(
        cls, model: ModelConfig, seq_len: int, peak: Peak, devices: int, routing: RoutingConfig | None = None
    ) -> Speed:
        flops = [flops_per_token(model, routing, seq_len, causal=causal) for causal in (True, False)]
        return cls(*flops, peak.flops and peak.flops * devices)

    def metrics(self, positions_per_s: float) -> dict[str, float | None]:
        """Of all positions, with or without a target: both are computed."""
        rates = {"mfu": self.causal * positions_per_s, "mfu_full": self.full * positions_per_s}
        return {name: flops_per_s / self.peak if self.peak else None for name, flops_per_s in rates.items()}


def memory_mb(device: torch.device) -> float:
    """Memory of a run in 10^6 bytes: of a GPU (CUDA: its peak so far), else what is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e6
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:  # no Linux: the peak so far, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def percent(fraction: float | None) -> str:
    return "n/a" if fraction is None else f"{100 * fraction:.1f}%"


# --- metrics ----------------------------------------------------------------------------------------------------------


def trim(file: Path, step: int) -> None:
    """Drop the rows after `step`, which are about to be written again, and a line that a kill cut off."""
    if is_special(file):
        raise DiskError(f"{file}: expected a file, found a pipe or device")
    if not file.exists():
        return
    kept_lines = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= step:
                kept_lines.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            continue
    write_atomic(file, "".join(kept_lines).encode())


def json_value(value: Any) -> Any:
    """A tensor's number; null for what is not finite."""
    value = value.item() if isinstance(value, Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bar_format(shown: str, rest: list[str], steps: int, columns: int) -> str:
    """A format of tqdm: step, `shown`, time left, the bar, and as much of the rest as the terminal has room for."""
    room = columns - len(f"{steps}/{steps} steps {shown} ETA 00:00:00 ||") - NARROWEST_BAR
    fitting = []
    for text in rest:
        room -= len(text) + 1
        fitting += [f" {text}"] if room >= 0 else []
    return f"{{n_fmt}}/{{total_fmt}} steps {shown} ETA {{remaining}} |{{bar}}|{''.join(fitting)}"


class HostFlag:
    """A flag on its way to the host. Asked one step later, it is there, and the queue of the device never runs dry."""

    def __init__(self, flag: Tensor):
        self.copy = flag.detach().to("cpu", non_blocking=flag.is_cuda)  # into pinned memory, where it does not block
        self.arrived = torch.cuda.current_stream(flag.device).record_event() if flag.is_cuda else None

    def is_set(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.copy.numpy())  # a read of memory: no operation of torch


class MetricLog:
    """One row per step in metrics.jsonl and wandb; for the person a bar on a terminal, else lines to grep.

    Values stay tensors until `flush`: one host sync per interval. All ranks keep the log, because all have to see when
    steps are skipped; the main rank alone writes.
    """

    def __init__(self, cfg: Config, loop: TrainConfig, folder: Path, first: int, speed: Speed, world: World):
        self.steps, self.skip_limit, self.positions = loop.steps, loop.skip_limit, loop.batch_tokens
        self.speed, self.main, self.device = speed, world.is_main, world.device
        self.path = folder / "metrics.jsonl"
        self.pending: list[dict[str, Any]] = []
        self.skipped, self.done = 0, first
        self.flag, self.flags_in_a_row = HostFlag(torch.zeros(())), 0
        self.first_loss = math.inf  # of the evaluation before the first step
        self.warmup = max(loop.warmup_steps, SHORTEST_WARMUP)
        self.wandb = self.bar = None
        if self.main:
            for name in ("metrics.jsonl", "samples.jsonl"):
                trim(folder / name, first or -1)  # a run that starts anew repeats its evaluation at step 0
            self.wandb = start_wandb(cfg, folder)
            self.bar = tqdm(
                total=loop.steps,
                initial=first,
                disable=None,
                file=sys.stderr,
                leave=False,
                dynamic_ncols=True,
                bar_format=bar_format("", [], loop.steps, 0),
            )
        self.clock, self.paused = time.perf_counter(), 0.0

    def add(self, **entry: Any) -> None:
        """Take a step's row; a NonFiniteError at most one step after too many skipped ones, whatever the interval."""
        self.pending.append(entry)
        if self.bar is not None:
            self.bar.update()
        self.flags_in_a_row = self.flags_in_a_row + 1 if self.flag.is_set() else 0
        self.flag = HostFlag(entry["skipped"])
        if self.flags_in_a_row > self.skip_limit:
            self.flush()

    def flush(self) -> None:
        """Write and print the pending rows; a NonFiniteError after too many skipped steps in a row."""
        if not self.pending:
            return
        rows = [{key: json_value(value) for key, value in row.items()} for row in self.pending]
        seconds = time.perf_counter() - self.clock - self.paused
        rows[-1]["tokens_per_s"] = sum(row["targets"] for row in rows) / seconds
        rows[-1] |= self.speed.metrics(len(rows) * self.positions / seconds) | {"memory_mb": memory_mb(self.device)}
        self.done = rows[-1]["step"]
        if self.main:
            self._write(rows)
            self._print(rows[-1], seconds / len(rows) * (self.steps - self.done))
        self.pending, self.clock, self.paused = [], time.perf_counter(), 0.0
        self._compare(rows)
        for row in rows:
            self._count_skipped(row)

    def event(self, **row: Any) -> None:
        """A row beside those of the steps: an evaluation, a resume."""
        if self.main:
            self._write([{key: json_value(value) for key, value in row.items()}])

    def sample(self, step: int, text: str, **more: Any) -> None:
        if self.main:
            with (self.path.parent / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "text": text, **more}) + "\n")

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if self.wandb is not None:
            for row in rows:  # without `step=`: wandb drops rows of steps it has seen, which a resume repeats
                self.wandb.log({key: value for key, value in row.items() if key != "batch_sha"})

    def _print(self, row: dict[str, Any], seconds_left: float) -> None:
        loss = "n/a" if row["loss"] is None else f"{row['loss']:.4f}"
        norm = "n/a" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
        speed, rate, mfu = f"{row['tokens_per_s']:,.0f}", f"lr {row['lr']:.2e}", percent(row["mfu"])
        if self.bar.disable:
            metrics = f"loss {loss} {rate} grad_norm {norm} tok/s {speed} MFU {mfu} ({percent(row['mfu_full'])})"
            say(f"step {row['step']}/{self.steps} {metrics} ETA {tqdm.format_interval(seconds_left)}")
        else:
            shown, rest = f"loss {loss} {speed} tok/s", [rate, f"grad_norm {norm}", f"MFU {mfu}"]
            self.bar.bar_format = bar_format(shown, rest, self.steps, shutil.get_terminal_size().columns)

    def _compare(self, rows: list[dict[str, Any]]) -> None:
        """Say once, while the rate rises, that training destroys what the weights knew."""
        losses = [row["loss"] for row in rows if row["loss"] is not None]
        if losses and self.done <= self.warmup and (mean := sum(losses) / len(losses)) > 2 * self.first_loss:
            warn(f"the loss has doubled by step {self.done}, from {self.first_loss:.2f} to {mean:.2f}: try a lower lr")
            self.first_loss = math.inf

    def _count_skipped(self, row: dict[str, Any]) -> None:
        self.skipped = self.skipped + 1 if row["skipped"] else 0
        if self.skipped:
            say(f"step {row['step']} skipped: its gradient is not finite (batch_sha {row['batch_sha']})")
        if self.skipped > self.skip_limit:
            raise NonFiniteError(f"{self.skipped} steps in a row without a finite gradient, last at step {row['step']}")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock of training: for evaluation, samples, checkpoints."""
        started = time.perf_counter()
        yield
        self.paused += time.perf_counter() - started

    @contextmanager
    def open(self) -> Iterator[MetricLog]:
        try:
            yield self
        finally:
            if self.bar is not None:
                self.bar.close()
            if self.wandb is not None:
                self.wandb.finish()


def start_wandb(cfg: Config, folder: Path) -> Any:
    """The wandb run of this run folder, the same one after a resume; None where wandb is off."""
    log: LogConfig = cfg.log
    if log.wandb == "off":
        return None
    import wandb

    id_file = folder / "wandb-id"
    if not id_file.exists():
        write_atomic(id_file, secrets.token_hex(8).encode())
    run = wandb.init(
        project=log.project,
        name=log.name or folder.name,
        id=id_file.read_text().strip(),
        resume="allow",
        mode=log.wandb,
        dir=str(folder),
        config=asdict(cfg),
        settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
    )
    run.define_metric("*", step_metric="step")
    return run
