"""What a run says: that every step stands once, that speed has a formula and a peak, that wandb gets the same rows."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from data import Batch, micro_batches
from nanoqwen import log, optim
from nanoqwen.config import Config, load_config
from nanoqwen.distributed import World
from nanoqwen.errors import DiskError, NonFiniteError
from nanoqwen.flops import dense_flops_per_token as flops_per_token
from nanoqwen.log import MetricLog, Peak, Speed

ROOT = Path(__file__).parents[1]
ALONE = World(0, 0, 1, torch.device("cpu"))
SPEED = Speed(causal=2e6, full=3e6, peak=1e9)


def config(*more: str) -> Config:
    return load_config(list(more), "train")


def row(step: int, loss: float = 2.0, skipped: float = 0.0) -> dict:
    figures = {"loss": torch.tensor(loss), "grad_norm": torch.tensor(1.0), "targets": torch.tensor(8.0)}
    return figures | {"step": step, "lr": 1e-3, "skipped": torch.tensor(skipped), "batch_sha": "ab"}


def metric_log(folder: Path, first: int = 0, cfg: Config | None = None) -> MetricLog:
    cfg = cfg or config()
    return MetricLog(cfg, replace(cfg.train, steps=10, skip_limit=2, warmup_steps=0), folder, first, SPEED, ALONE)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_log_holds_every_step_once(tmp_path: Path):
    """After kill -9 the log is ahead of the checkpoint, and its last line may be half: steps stood in it twice."""
    with metric_log(tmp_path).open() as first:
        for step in range(1, 8):
            first.add(**row(step))
        first.flush()
        first.event(step=6, **{"val/loss": 1.0})
        first.sample(3, "kept")
        first.sample(6, "to come again")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    with metric_log(tmp_path, first=5).open() as again:
        assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3, 4, 5]
        again.add(**row(6))
        again.flush()
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == {"step": 3, "text": "kept"}


def test_what_is_not_finite_is_null_in_the_file(tmp_path: Path, capfd: pytest.CaptureFixture):
    """NaN is no JSON: other readers than Python's refuse the whole file."""
    with metric_log(tmp_path).open() as opened:
        opened.add(**row(1, loss=math.nan, skipped=1.0))
        opened.flush()
    assert rows(tmp_path)[0]["loss"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert "step 1 skipped" in capfd.readouterr().err


def test_t06_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path):
    with metric_log(tmp_path).open() as opened:
        for step, skipped in enumerate([1, 1, 0, 1, 1], start=1):  # never three in a row
            opened.add(**row(step, skipped=skipped))
        opened.flush()
        opened.add(**row(6, skipped=1))  # across two intervals: steps 4, 5 and 6
        with pytest.raises(NonFiniteError, match=r"3 steps in a row .* step 6"):
            opened.flush()
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]  # written before it ends


class Asked(TorchDispatchMode):
    """Counts how often the program waits for a number from the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_skipped_steps_end_the_run_between_two_intervals_too(tmp_path: Path):
    """At most one step late; they once waited for `log_every`: 45 skipped steps under a limit of 5."""
    with metric_log(tmp_path).open() as opened:
        for step, skipped in enumerate([1, 1, 0, 1, 1, 1], start=1):
            opened.add(**row(step, skipped=skipped))
        with pytest.raises(NonFiniteError, match=r"3 steps in a row .* step 6"):
            opened.add(**row(7, skipped=1))
    assert [line["step"] for line in rows(tmp_path)] == [*range(1, 8)]


def test_t13_a_step_asks_the_device_nothing(tmp_path: Path):
    """Each `.item()` makes a GPU wait for the program. One per step cost a tenth of the speed and nobody saw it."""
    model = tiny.model().train()
    cfg = config().train
    optimizers = optim.Optimizers(optim.parameter_groups(model, cfg), cfg)
    ids = torch.randint(97, (4, 17))
    micros = micro_batches(Batch(ids[:, :-1], ids[:, 1:], None), 2, ALONE.device)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    objective = train.LanguageModeling(model, {})
    opened = metric_log(tmp_path)
    with Asked() as asked:
        for step in range(1, 4):
            metrics = train.train_step(objective, optimizers, micros, ALONE, clip=1.0, scaler=scaler,
                                       autocast=train.nullcontext())  # fmt: skip
            opened.add(step=step, **metrics, lr=0.1, batch_sha="")
        assert asked.count == 0
        opened.flush()
        assert asked.count > 0


def test_mfu_is_flops_times_rate_over_peak():
    cfg = tiny.config()
    speed = Speed.of(cfg, 32, Peak(1e9, "assumed"), devices=2)
    found = speed.metrics(1000.0)
    assert found["mfu"] == pytest.approx(1000 * flops_per_token(cfg, 32) / 2e9)
    assert found["mfu_full"] == pytest.approx(1000 * flops_per_token(cfg, 32, causal=False) / 2e9)
    assert found["mfu_full"] > found["mfu"]
    unknown = Speed.of(cfg, 32, Peak(None, "unknown"), devices=1).metrics(1000.0)
    assert unknown["mfu"] is None
    assert log.percent(unknown["mfu"]) == "n/a"
    assert log.percent(0.1234) == "12.3%"


def test_the_flops_of_a_token_are_those_that_torch_counts():
    """Oracle: torch's own FLOP counter on a forward and backward, which counts the attention in full."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny.model(vocab_size=256).train()
    ids = torch.randint(256, (2, 33))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(ids[:, :-1], ids[:, 1:]).loss.backward()
    ours = 64 * flops_per_token(model.cfg, 32, causal=False)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_memory_of_a_cpu_run_is_what_its_process_has_resident():
    before = log.memory_mb(ALONE.device)
    held = torch.ones(100_000_000 // 4)
    after = log.memory_mb(ALONE.device)
    kernel = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    assert after == pytest.approx(int(kernel[0].split()[1]) * 1024 / 1e6, rel=0.02)
    assert after - before == pytest.approx(held.nbytes / 1e6, rel=0.1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-40GB", 312),
     ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA A10G", 70), ("NVIDIA GeForce RTX 4090", 165), ("Tesla T4", 65),
     ("NVIDIA GeForce GTX 1080", None)],
)  # fmt: skip
def test_the_peak_of_a_device_is_that_of_its_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = log.peak_of(torch.device("cuda"), torch.bfloat16)
    assert found.flops == (peak and peak * 1e12)
    assert log.peak_of(torch.device("cuda"), torch.float32).flops is None  # half-precision figures are not for it


def test_the_peak_of_a_cpu_is_measured():
    found = log.peak_of(torch.device("cpu"), torch.float32)
    assert found.flops > 1e9
    assert "measured: float32 product" in found.origin


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch):
    with metric_log(tmp_path).open() as opened:
        opened.add(**row(1))
        opened.flush()
    assert capfd.readouterr().err.startswith("step 1/10 loss 2.0000 lr 1.00e-03 grad_norm 1.00 tok/s ")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with metric_log(tmp_path, first=1).open() as opened:
        opened.add(**row(2))
        opened.flush()
        opened.bar.refresh()
        log.say("a line above the bar")
    text = terminal.getvalue()
    assert "2/10" in text
    assert "loss 2.0000" in text
    assert "step 2/10 loss" not in text
    assert "a line above the bar\n" in text


@pytest.mark.parametrize(
    ("columns", "seen"), [(80, ""), (100, "lr 4.00e-03 grad_norm 0.50"), (140, "lr 4.00e-03 grad_norm 0.50 MFU 34.1%")]
)
def test_the_bar_of_a_long_run_fits_its_terminal(columns: int, seen: str):
    """At 80 columns the loss once stood beyond the edge."""
    shown, rest = "loss 10.8234 1,234,567 tok/s", ["lr 4.00e-03", "grad_norm 0.50", "MFU 34.1%"]
    layout = log.bar_format(shown, rest, 19_560, columns)
    line = log.tqdm.format_meter(n=19_000, total=19_560, elapsed=90_000, ncols=columns, bar_format=layout, ascii=True)
    assert len(line) <= columns
    assert line.startswith(f"19000/19560 steps {shown} ETA 44:12 |#")
    assert line.endswith(f"| {seen}".rstrip())


def test_a_loss_that_doubles_while_the_rate_rises_is_spoken_of_once(tmp_path: Path, capfd: pytest.CaptureFixture):
    with metric_log(tmp_path).open() as opened:
        opened.first_loss = 1.5
        for step, loss in enumerate((1.6, 2.9, 3.2, 9.0), start=1):
            opened.add(**row(step, loss=loss))
            opened.flush()
    told = [line for line in capfd.readouterr().err.splitlines() if "doubled" in line]
    assert told == ["warning: the loss has doubled by step 3, from 1.50 to 3.20: try a lower lr"]


WANDB = """
import math, sys
from pathlib import Path
import test_log
for first in (0, 2):
    cfg = test_log.config("--log.wandb=offline", "--log.project=here")
    with test_log.metric_log(Path(sys.argv[1]), first, cfg).open() as opened:
        if first:
            opened.event(step=first, event="resume", versions={}, changed=None)
        for step in (first + 1, first + 2):
            opened.add(**test_log.row(step, loss=math.nan if step == 3 else 1 / step))
        opened.flush()
        opened.event(step=step, **{"val/loss": 0.1 * step, "val/router/mean/used": 1 / 3})
print("wandb imported", "wandb" in sys.modules)
"""


def wandb_history(file: Path) -> list[dict]:
    """What wandb has put down of each `log` call: its records, in the blocks of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record, part = Record.FromString(part), b""
            if record.history.item:
                found.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return found


WANDB_SECRET = "0123456789abcdef" * 2 + "canary00"


@pytest.fixture(scope="module")
def sittings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(the folder of a run in two sittings with wandb offline, what it said)"""
    folder = tmp_path_factory.mktemp("wandb")
    env = {**os.environ, "WANDB_API_KEY": WANDB_SECRET, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HOME": str(folder)}
    done = subprocess.run([sys.executable, "-c", WANDB, str(folder)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def test_wandb_offline_gets_the_same_rows_and_goes_on_with_the_same_run(sittings: tuple[Path, str]):
    folder, said = sittings
    run_id = (folder / "wandb-id").read_text()
    files = list((folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2  # two sittings of one run
    assert b"grad_norm" in files[0].read_bytes()
    assert [r["step"] for r in rows(folder) if "loss" in r] == [1, 2, 3, 4]
    for path in folder.rglob("*"):
        assert not path.is_file() or WANDB_SECRET.encode() not in path.read_bytes(), path
    assert WANDB_SECRET not in said


def test_wandb_offline_holds_every_number_of_each_row_also_after_a_resume(sittings: tuple[Path, str]):
    """It used to get the step from us, and then merged an evaluation into its step and dropped what came again."""
    folder, _ = sittings
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    told = [entry for file in files for entry in wandb_history(file)]

    def numbers(row: dict) -> dict:
        return {k: v for k, v in row.items() if not k.startswith("_") and (v is None or isinstance(v, (int, float)))}

    assert [numbers(entry) for entry in told] == [numbers(row) for row in rows(folder)]
    assert len(told) == 7
    assert told[3]["event"] == "resume"
    assert [row["loss"] for row in told if "loss" in row] == [1.0, 0.5, None, 0.25]


def test_wandb_is_not_imported_unless_asked(tmp_path: Path):
    code = "import sys, train, test_log; from nanoqwen import log; from pathlib import Path\n"
    code += "test_log.metric_log(Path(sys.argv[1])).open().__enter__(); assert 'wandb' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_pipe_in_the_place_of_a_log_is_refused(name: str, tmp_path: Path):
    """Opening it once waited for a reader for ever."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(DiskError, match=f"{name}: expected a file, found a pipe or device"):
        metric_log(tmp_path)
