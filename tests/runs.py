"""Tiny runs of train.py, started, stopped and looked into from outside: arguments, signals, exit codes and files.

Three seconds of each start go into imports: half of them torch's, half what the first step of an optimizer brings in.
`Starter` pays them once: a process that has done a run forks for every start, and the child does what
`python train.py ...` does, in 0.6 s. Run as a program, this file is that process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
TRAIN = [sys.executable, str(ROOT / "train.py")]
STEPS, SAVE_EVERY = 20, 4
PATIENCE = 60.0  # seconds until a test gives up on a process
CHECKPOINTS = "checkpoints"


# --- what is run ------------------------------------------------------------------------------------------------------


def write_corpus(folder: Path) -> Path:
    for number in range(30):
        lines = [f"line {i} of document {number}: {'word ' * (i % 7)}" for i in range(40)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


def options(corpus: Path, run: Path, *more: str) -> list[str]:
    """A tiny run of 20 steps, saved every 4; `more` overrides. A line of metrics is written at each step."""
    shape = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "dropout": 0.1}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    listed = {f"--model.{key}": value for key, value in shape.items()}
    listed |= {"--data.tokenizer": "bytes", "--data.train": corpus, "--data.val_fraction": 0.2}
    listed |= {"--data.cache_dir": corpus.with_name("cache"), "--run.dir": run, "--run.save_every": SAVE_EVERY}
    steps = {"steps": STEPS, "warmup_steps": 4, "seq_len": 32, "batch_tokens": 256, "micro_batch": 4, "eval_every": 7}
    steps |= {"eval_tokens": 1024, "log_every": 1, "sample_tokens": 8, "schedule": "plateau", "lr": 3e-3}
    listed |= {f"--train.{key}": value for key, value in steps.items()}
    listed |= dict(word.split("=", 1) for word in more)
    return [f"{key}={value}" for key, value in {"--run.device": "cpu", "--run.dtype": "float32", **listed}.items()]


# --- how it is started ------------------------------------------------------------------------------------------------


@dataclass
class Started:
    """A process, and the files that its output goes to."""

    pid: int
    poll: Callable[[], int | None]  # its exit code, negative after a signal; None while it runs
    out: Path
    err: Path

    @property
    def stdout(self) -> str:
        return self.out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self.err.read_text(errors="replace")

    def signal(self, number: int) -> None:
        """Nothing, when it has ended by itself: its number may be another's by then."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
        """Wait for something to happen; False when the process ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.poll() is not None:
                return bool(condition())
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                pytest.fail(f"nothing happened for {seconds} s: {self.stderr[-2000:]}")
            time.sleep(0.002)
        return True

    def wait(self, seconds: float = PATIENCE) -> int:
        self.until(lambda: False, seconds)
        return self.poll()


class Starter:
    """Starts runs of train.py without the import of torch. One for all tests of a worker."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.ended = folder, 0, {}
        command = [sys.executable, str(Path(__file__)), str(folder)]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)

    def _ask(self, **question: object) -> int | None:
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def _poll(self, pid: int) -> int | None:
        if pid not in self.ended:
            code = self._ask(poll=pid)
            if code is None:
                return None
            self.ended[pid] = code
        return self.ended[pid]

    def start(
        self, *arguments: str, first: str = "", halted: bool = False, env: dict[str, str] | None = None
    ) -> Started:
        """`python train.py ARGUMENTS`. `first` is code that runs before; `halted` processes wait for a SIGCONT."""
        self.count += 1
        out, err = (self.folder / f"{self.count}.{name}" for name in ("out", "err"))
        injected = self.folder / f"{self.count}.py"
        injected.write_text(first)
        out.touch(), err.touch()
        paths = {"out": str(out), "err": str(err), "first": str(injected)}
        pid = self._ask(arguments=[str(word) for word in arguments], halted=halted, **paths)
        return Started(pid, lambda: self._poll(pid), out, err)

    def run(self, *arguments: str, code: int | None = 0, **how: object) -> Started:
        """Started, and ended; with the exit code that the test expects."""
        started = self.start(*arguments, **how)
        found = started.wait()
        assert code is None or found == code, (found, started.stderr[-2000:])
        return started

    def close(self) -> None:
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait(PATIENCE)


def serve(folder: Path) -> None:
    """Forks for each line that asks for a start, and says how a child ended for each that asks for that."""
    sys.path.insert(0, str(ROOT))
    import train
    from nanoqwen import log

    log.SECONDS = 0.0  # for the measurement of this CPU's peak, at each start; nothing here looks at it
    (folder / "corpus").mkdir()
    with (folder / "first").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        train.main(options(write_corpus(folder / "corpus"), folder / "run", "--train.steps=5"))
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                _become(train, **question)
        print(json.dumps(answer), flush=True)


def _become(train: ModuleType, arguments: list[str], halted: bool, out: str, err: str, first: str) -> NoReturn:
    from nanoqwen.errors import run_script

    for number, path in enumerate((os.devnull, out, err)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        descriptor = os.open(path, flags, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if halted:
        os.kill(os.getpid(), signal.SIGSTOP)
    runpy.run_path(first)
    sys.argv = ["train.py", *arguments]
    run_script(train.main)


def launch(folder: Path, command: list[str], env: dict[str, str] | None = None) -> Started:
    """Any program as a process of its own, in a session of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*.out")))
    out, err = (folder / f"{number}.{name}" for name in ("out", "err"))
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    return Started(process.pid, process.poll, out, err)


def torchrun(
    folder: Path, arguments: list[str], ranks: int = 2, env: dict[str, str] | None = None, script: str = "train.py"
) -> Started:
    """A script under torchrun, at a port that the system chooses."""
    world = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return launch(folder, [sys.executable, *world, str(ROOT / script), *arguments], env)


def script(*arguments: str, env: dict[str, str] | None = None, **how: object) -> subprocess.CompletedProcess[str]:
    """`python train.py ARGUMENTS` in a process of its own, waited for."""
    return subprocess.run(
        [*TRAIN, *arguments], capture_output=True, text=True, env={**os.environ, **(env or {})}, **how
    )


def processes_of(run: Path) -> list[int]:
    """Every living process whose command line names this run folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            dead = re.search(r"^State:\s+[ZX]", (entry / "status").read_text(), re.MULTILINE)
        except OSError:  # ended meanwhile
            continue
        if f"--run.dir={run}".encode() in words and not dead:
            found.append(int(entry.name))
    return found


# --- what it left -----------------------------------------------------------------------------------------------------


def lines(file: Path) -> list[dict]:
    """Of a JSONL file, in their order; one being written is left out."""
    return list(map(json.loads, file.read_text().split("\n")[:-1])) if file.exists() else []


def rows(run: Path) -> list[dict]:
    """The lines of metrics.jsonl that are of a training step."""
    return [row for row in lines(run / "metrics.jsonl") if "loss" in row]


def metrics(run: Path) -> dict[int, dict]:
    return {row["step"]: row for row in rows(run)}


def reached(run: Path) -> int:
    """The last step in metrics.jsonl."""
    found = rows(run)
    return found[-1]["step"] if found else 0


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def at(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:08d}"


def seal(folder: Path) -> Path:
    """Write the manifest of a checkpoint that was made or changed by hand."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    sizes = {n: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in files.items()}
    (folder / "manifest.json").write_text(json.dumps({"files": sizes}))
    return folder


def steps(run: Path) -> list[int]:
    """Of the checkpoints under their final names."""
    folder = run / CHECKPOINTS
    return (
        sorted(int(path.name[5:]) for path in folder.iterdir() if path.name.startswith("step-"))
        if folder.exists()
        else []
    )


def leftovers(run: Path) -> list[str]:
    """What an unfinished save or delete left."""
    return [path.name for folder in (run, run / CHECKPOINTS) for path in folder.glob(".*") if path.name != ".lock"]


def killed_at(starter: Starter, run: Path, step: int, number: int, arguments: list[str]) -> Started:
    """Start a run and send a signal as soon as `step` is in its metrics."""
    started = starter.start(*arguments)
    started.until(lambda: reached(run) >= step)
    started.signal(number)
    started.wait()
    return started


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
