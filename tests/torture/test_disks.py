"""Power cuts, and disks that fail at any call of anything that writes."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import ROOT, Starter, options, steps

from nanoqwen.runfolder import newest_valid, verify

CUTS = 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small ext4 file system in a file, mounted."""
    image, mounted = tmp_path / "disk.img", tmp_path / "disk"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(96 * 2**20)
    made = shutil.which("mkfs.ext4") and not subprocess.run(["mkfs.ext4", "-q", image], capture_output=True).returncode
    if not made or subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield mounted
    subprocess.run(["umount", "-l", mounted], check=True)


def test_a5_a_power_cut_loses_nothing_that_was_announced(
    starter: Starter, corpus: Path, reference: Path, disk: Path, tmp_path: Path, figure
):
    """What the disk holds at a random moment, without anything that had not been flushed: a checkpoint whose CKPT line
    was printed is there and whole, and the run goes on to the same bits."""
    moments, copied, lost = random.Random(5), tmp_path / "after.img", 0
    after = tmp_path / "after"
    after.mkdir()
    for cut in range(CUTS):
        run = disk / f"run-{cut}"
        started = starter.start(*options(corpus, run))
        started.until(lambda run=run, saved=cut % 3: len(steps(run)) > saved)
        time.sleep(moments.uniform(0, 0.15))
        said = [int(step) for step in re.findall(r"^CKPT step=(\d+) .*\n", started.stdout, re.MULTILINE)]
        subprocess.run(["cp", "--sparse=always", tmp_path / "disk.img", copied], check=True)
        started.signal(9)
        started.wait()
        subprocess.run(["mount", "-o", "loop", copied, after], check=True)
        try:
            found = newest_valid(after / run.name)
            lost += bool(said) and (found is None or int(found.name[5:]) < max(said))
            resumed = tmp_path / f"resumed-{cut}"
            shutil.copytree(after / run.name, resumed) if (after / run.name).is_dir() else None
        finally:
            subprocess.run(["umount", after], check=True)
        shutil.rmtree(run)
        if cut % 4 == 0:
            starter.run(*options(corpus, resumed))
            assert verify(newest_valid(resumed)) == verify(newest_valid(reference))
    figure(f"{lost} of {CUTS} cuts lost an announced checkpoint")
    assert not lost


# --- B2: errors of the kernel -----------------------------------------------------------------------------------------

ERRORS = {
    "openat": ("ENOSPC", "EMFILE", "EDQUOT"),
    "write": ("ENOSPC", "EIO"),
    "fsync": ("EIO",),
    "rename": ("ENOSPC",),
}
POINTS = 4  # calls of each kind that fail, spread over all of them


@pytest.fixture(scope="module")
def trained(starter: Starter, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    starter.run(*options(corpus, folder / "run", "--train.steps=8"))
    return {"folder": folder, "run": folder / "run"}


def commands(run: Path, corpus: Path, out: Path) -> dict[str, list[str]]:
    """What writes, and where it writes."""
    train = options(corpus, out / "run", "--train.steps=8", f"--data.cache_dir={out / 'cache'}")
    return {
        "train": ["train.py", *train],
        "prepare": ["data.py", "prepare", *[word for word in train if word.startswith(("--data", "--model.vocab"))]],
        "export": ["checkpoint.py", "export", str(run), str(out / "exported")],
        "report": ["-m", "nanoqwen.report", str(run), "--output", str(out / "report.html")],
    }


def traced(command: list[str], log: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    strace = ["strace", "-f", "-o", str(log), *flags, sys.executable, *command]
    return subprocess.run(strace, cwd=ROOT, capture_output=True, text=True, timeout=240)


def calls_on(log: Path, out: Path, call: str) -> list[int]:
    """The numbers, from 1, of the calls of a kind that are about a path or an open file below `out`."""
    numbers, count, files = [], 0, re.compile(re.escape(str(out)))
    for line in log.read_text(errors="replace").splitlines():
        if not re.match(rf"\d+\s+{call}\(", line):
            continue
        count += 1
        if files.search(line):
            numbers.append(count)
    return numbers


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize("name", ["train", "prepare", "export", "report"])
def test_b2_the_kernel_refuses_a_call(name: str, trained: dict[str, Path], corpus: Path, tmp_path: Path, figure):
    """One line, exit code 6 (or 0 where only a report or a deletion was lost), and the same command then succeeds."""
    tried, failed = 0, []
    for call, errors in ERRORS.items():
        out = tmp_path / call
        out.mkdir()
        whole = traced(commands(trained["run"], corpus, out)[name], tmp_path / "log", "-y", "-e", f"trace={call}")
        if "attach" in whole.stderr or "Operation not permitted" in whole.stderr:
            pytest.skip("strace may not look at other processes here")
        assert whole.returncode == 0, whole.stderr[-2000:]
        numbers = calls_on(tmp_path / "log", out, call)
        for number in numbers[:: max(1, len(numbers) // POINTS)]:
            for error in errors:
                shutil.rmtree(out), out.mkdir()
                inject = ("-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={number}")
                done = traced(commands(trained["run"], corpus, out)[name], tmp_path / "log", *inject)
                tried += 1
                if done.returncode not in (0, 3, 4, 6) or "Traceback" in done.stderr:
                    failed.append(f"{call} {number} {error}: {done.returncode} {done.stderr[-300:]}")
                    continue
                again = subprocess.run(
                    [sys.executable, *commands(trained["run"], corpus, out)[name]],
                    cwd=ROOT, capture_output=True, text=True, timeout=240,
                ) if number == numbers[0] else None  # fmt: skip
                if again is not None and again.returncode:
                    failed.append(f"{call} {number} {error}: again {again.returncode} {again.stderr[-300:]}")
    figure(f"{tried - len(failed)} of {tried} errors handled")
    assert not failed, "\n".join(failed)
    assert tried


def test_b5_a_file_that_may_not_grow(starter: Starter, corpus: Path, tmp_path: Path, figure):
    """RLIMIT_FSIZE, as a batch system sets it: an error of the disk, and nothing half-made under a final name."""
    limit = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n"
    codes = []
    for size in (4_096, 65_536, 200_000):
        run = tmp_path / f"run-{size}"
        started = starter.start(*options(corpus, run), first=limit.format(size))
        codes.append(started.wait())
        assert "Traceback" not in started.stderr, started.stderr[-2000:]
        newest = newest_valid(run)
        assert newest is None or verify(newest)
    figure(f"exit codes {codes}")
    assert set(codes) <= {0, 6}


def test_c7_a_checkpoint_that_is_a_link(starter: Starter, corpus: Path, reference: Path, tmp_path: Path, figure):
    """Checkpoints moved to another disk, with a link in their place, are resumed from and never written through."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    starter.run(*options(corpus, run, "--train.steps=12", "--run.allow_change=train.steps"))
    newest = newest_valid(run)
    shutil.move(newest, elsewhere)
    newest.symlink_to(elsewhere)
    before = verify(elsewhere)
    started = starter.run(*options(corpus, run, "--run.allow_change=train.steps"))
    assert "resuming from" in started.stderr
    figure(f"resumed at step {newest.name[5:].lstrip('0')}, {len(steps(run))} checkpoints at the end")
    assert not elsewhere.exists() or verify(elsewhere) == before


def test_i3_readers_while_a_run_writes(starter: Starter, corpus: Path, tmp_path: Path, figure):
    """200 loads of a run that saves and deletes: none fails, whatever is pruned meanwhile."""
    from nanoqwen.weights import load_model

    run = tmp_path / "run"
    started = starter.start(*options(corpus, run, "--train.steps=4000", "--run.save_every=2", "--run.keep=1"))
    started.until(lambda: len(steps(run)) > 0)
    loads = 0
    while loads < 200 and started.poll() is None:
        load_model(run)
        loads += 1
    started.signal(15)
    assert started.wait() == 75
    figure(f"{loads} loads, 0 failed")
    assert loads == 200
