"""What a run folder says about its run: each metric as a series, configuration, source, status and samples.

Read as it is: a torn last line, a metric that was not logged, a missing file are left out. Nothing in it is trusted: a
configuration is lines of text, and a value that is not a number is dropped.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanoqwen.errors import NoRunError
from nanoqwen.files import is_special, read_json_or_empty

LARGEST = 1e100  # larger values count as infinite, and those below its inverse as zero
MAX_METRICS = 2_000  # different names in one run: more are a mistake, and would not fit on a page


class Series(NamedTuple):
    x: np.ndarray  # steps, rising
    y: np.ndarray  # NaN where it was not finite


EMPTY = Series(np.zeros(0), np.zeros(0))


class Run(NamedTuple):
    name: str
    folder: Path
    config: dict[str, str]  # full key -> value as written
    source: dict[str, Any]
    status: dict[str, Any]
    series: dict[str, Series]
    samples: list[dict[str, Any]]
    resumes: list[float]  # steps after which it was resumed

    def setting(self, key: str) -> Any:
        """A value of the configuration; None where it is unknown."""
        try:
            return json.loads(self.config[key])
        except (KeyError, ValueError):
            return None

    def metric(self, name: str) -> Series:
        return self.series.get(name, EMPTY)

    @property
    def section(self) -> str:
        """The script that ran: `train` or `finetune`, which is also the section of its loop."""
        command = self.source.get("command")
        script = Path(str(command[0])).stem if isinstance(command, list) and command else ""
        if script in ("train", "finetune"):
            return script
        return "finetune" if self.setting("finetune.base_ckpt") else "train"


# --- files ------------------------------------------------------------------------------------------------------------


def read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a line that is torn, or just being written, is left out."""
    if is_special(file):
        return
    try:
        with file.open("rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict):
                    yield row
    except OSError:
        return


def number(value: Any) -> float | None:
    """A JSON value as a float: null stands for "not finite" and is NaN; None for what is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return math.nan if not abs(value) < LARGEST else float(value) if abs(value) > 1 / LARGEST else 0.0
    except OverflowError:
        return math.nan


def read_metrics(file: Path) -> tuple[dict[str, Series], list[float]]:
    """(each metric by its name, steps of resumes), in one pass over metrics.jsonl."""
    columns: dict[str, tuple[array, array]] = {}
    resumes = []
    for row in read_jsonl(file):
        step = number(row.get("step"))
        if step is None or math.isnan(step):
            continue
        if "event" in row:
            resumes.append(step)
            continue
        for name, value in row.items():
            if name == "step" or (value := number(value)) is None:
                continue
            if name not in columns and len(columns) >= MAX_METRICS:
                continue
            xs, ys = columns.setdefault(name, (array("d"), array("d")))
            xs.append(step)
            ys.append(value)
    return {name: _sorted(*column) for name, column in columns.items()}, sorted(set(resumes))


def _sorted(xs: array, ys: array) -> Series:
    """By step; if a step stands twice, its later row counts."""
    x, y = np.array(xs), np.array(ys)
    if len(x) > 1 and not (np.diff(x) > 0).all():
        steps, last = np.unique(x[::-1], return_index=True)
        x, y = steps, y[::-1][last]
    return Series(x, y)


def read_config(file: Path) -> dict[str, str]:
    """A resolved config.yaml as {full key: value as written}; empty where there is none."""
    try:
        if is_special(file):
            return {}
        return config_lines(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def config_lines(text: str) -> dict[str, str]:
    """{full key: value as written} of what `config.dump` writes: one key a line, two spaces a level."""
    path: list[str] = []
    values = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"( *)([\w.-]+):(?: (.*))?", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            if match[3] is not None:
                values[".".join(path)] = match[3]
    return values


def read_run(folder: Path) -> Run:
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "status.json")):
        raise NoRunError(f"{folder}: expected a run folder with metrics.jsonl or status.json, got {_contents(folder)}")
    series, resumes = read_metrics(folder / "metrics.jsonl")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        config=read_config(folder / "config.yaml"),
        source=read_json_or_empty(folder / "source.json"),
        status=read_json_or_empty(folder / "status.json"),
        series=series,
        samples=[row for row in read_jsonl(folder / "samples.jsonl") if isinstance(row.get("text"), str)],
        resumes=resumes,
    )


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return "a file" if folder.exists() else "nothing there"
    runs = sorted(path.parent.name for path in folder.glob("*/status.json"))
    return f"a folder of runs: {', '.join(runs[:5])}" if runs else "a folder without them"


# --- numbers of a series ----------------------------------------------------------------------------------------------


def last_of(series: Series) -> float:
    finite = series.y[np.isfinite(series.y)]
    return float(finite[-1]) if len(finite) else math.nan


def minimum(series: Series) -> tuple[float, float]:
    """(lowest value, its step)"""
    finite = np.isfinite(series.y)
    if not finite.any():
        return math.nan, math.nan
    at = int(np.argmin(np.where(finite, series.y, np.inf)))
    return float(series.y[at]), float(series.x[at])


def median(series: Series) -> float:
    finite = series.y[np.isfinite(series.y)]
    return float(np.median(finite)) if len(finite) else math.nan


def mean_of_end(series: Series) -> float:
    """The mean of the last 2 % of the values, which noise of single steps moves little."""
    end = series.y[-max(1, len(series.y) // 50) :]
    return float(end[np.isfinite(end)].mean()) if np.isfinite(end).any() else last_of(series)


def smoothed(series: Series, width: float) -> Series:
    """An exponential mean to both sides, over about `width` steps, as page.html draws it.

    Both sides, because a mean of the past alone lies above a falling loss. It is divided by the sum of its weights,
    which keeps it right at both ends; NaN adds nothing.
    """
    known = np.isfinite(series.y)
    values = np.stack([np.where(known, series.y, 0.0), known])  # of the numerator and of the denominator
    decay = np.exp(-2 * np.diff(series.x) / width)
    sums = values.copy()
    for own, factors in ((sums, decay), (backward := values[:, ::-1].copy(), decay[::-1])):
        for n, factor in enumerate(factors.tolist(), 1):
            own[:, n] += factor * own[:, n - 1]
    sums += backward[:, ::-1] - values
    return Series(series.x, np.where(known, sums[0], np.nan) / np.where(known, sums[1], 1.0))


def band(series: Sequence[Series]) -> tuple[Series, np.ndarray]:
    """(mean over the steps that all have, its standard deviation with n - 1)"""
    common = series[0].x
    for other in series[1:]:
        common = np.intersect1d(common, other.x)
    values = np.stack([one.y[np.searchsorted(one.x, common)] for one in series])
    return Series(common, values.mean(0)), values.std(0, ddof=1)


# --- numbers of a run -------------------------------------------------------------------------------------------------


def steps_done(run: Run) -> int:
    return int(max((s.x[-1] for name, s in run.series.items() if not name.startswith("val/") and len(s.x)), default=0))


def tokens_until(run: Run) -> Series:
    """Trained tokens up to each step."""
    targets = run.metric("targets")
    return Series(targets.x, np.cumsum(np.nan_to_num(targets.y)))


def seconds_until(run: Run) -> Series:
    """Seconds of training up to each step that logs a speed: the tokens of each interval over its tokens per second.

    Evaluations, samples and saves are not in it.
    """
    tokens, rate = tokens_until(run), run.metric("tokens_per_s")
    if not len(tokens.x) or not len(rate.x):
        return EMPTY
    done = np.r_[0.0, tokens.y][np.searchsorted(tokens.x, rate.x, side="right")]
    spent = np.diff(np.r_[0.0, done]) / np.where(rate.y > 0, rate.y, np.nan)
    return Series(rate.x, np.cumsum(np.nan_to_num(spent)))


def final(series: Series) -> float:
    """The last value of a sum such as `tokens_until`; NaN where nothing was logged."""
    return float(series.y[-1]) if len(series.y) else math.nan
