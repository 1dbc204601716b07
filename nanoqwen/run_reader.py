"""What a run folder says about its run: every metric as a series, configuration, source, status and samples.

Read as found: a torn last line, a key that an older run has not logged, a file that is missing are left out. Nothing
is executed or believed: a configuration is lines of text here, a number is a number or it is left out.
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
from nanoqwen.files import read_json_if_any

LARGEST = 1e100  # of what is drawn: beyond it is as good as infinite, and below its inverse nothing
NAMES_AT_MOST = 2_000  # different metrics of a run: more are a mistake, and would not fit on a page


class Series(NamedTuple):
    x: np.ndarray  # steps, rising
    y: np.ndarray  # NaN where it was not finite


NOTHING = Series(np.zeros(0), np.zeros(0))


class Run(NamedTuple):
    name: str
    folder: Path
    config: dict[str, str]  # by full key, as written
    source: dict[str, Any]
    status: dict[str, Any]
    series: dict[str, Series]
    samples: list[dict[str, Any]]
    resumes: list[float]  # steps at which it was gone on with

    def value(self, key: str) -> Any:
        """Of the configuration; None where it is not known."""
        try:
            return json.loads(self.config[key])
        except (KeyError, ValueError):
            return None

    def of(self, name: str) -> Series:
        return self.series.get(name, NOTHING)

    @property
    def section(self) -> str:
        """The script that ran, which is the section of its loop."""
        command = self.source.get("command")
        script = Path(str(command[0])).stem if isinstance(command, list) and command else ""
        return (
            script if script in ("train", "finetune") else "finetune" if self.value("finetune.base_ckpt") else "train"
        )


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """Of a JSONL file, one after the other; a line that is torn, or just being written, is left out."""
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


def numeric(value: Any) -> float | None:
    """null, which stands for what was not finite, is NaN; what is no number is None."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return math.nan if not abs(value) < LARGEST else float(value) if abs(value) > 1 / LARGEST else 0.0
    except OverflowError:
        return math.nan


def read_metrics(file: Path) -> tuple[dict[str, Series], list[float]]:
    """(every metric by its name, steps of resumes), from one pass over the file."""
    columns: dict[str, tuple[array, array]] = {}
    resumes = []
    for row in rows_of(file):
        step = numeric(row.get("step"))
        if step is None or math.isnan(step):
            continue
        if "event" in row:
            resumes.append(step)
            continue
        for name, value in row.items():
            if name == "step" or (value := numeric(value)) is None:
                continue
            if name not in columns and len(columns) >= NAMES_AT_MOST:
                continue
            xs, ys = columns.setdefault(name, (array("d"), array("d")))
            xs.append(step)
            ys.append(value)
    return {name: _rising(*column) for name, column in columns.items()}, sorted(set(resumes))


def _rising(xs: array, ys: array) -> Series:
    """In the order of the steps; of a step that stands twice the later row."""
    x, y = np.array(xs), np.array(ys)
    if len(x) > 1 and not (np.diff(x) > 0).all():
        steps, last = np.unique(x[::-1], return_index=True)
        x, y = steps, y[::-1][last]
    return Series(x, y)


def read_config(file: Path) -> dict[str, str]:
    """The lines of a resolved config.yaml as {full key: value as written}; their form is that of `config.dump`."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return flat(text)


def flat(text: str) -> dict[str, str]:
    path: list[str] = []
    found = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"( *)([\w.-]+):(?: (.*))?", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            if match[3] is not None:
                found[".".join(path)] = match[3]
    return found


def read_run(folder: Path) -> Run:
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "status.json")):
        raise NoRunError(f"{folder}: expected a run folder with metrics.jsonl or status.json, got {_instead(folder)}")
    series, resumes = read_metrics(folder / "metrics.jsonl")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        config=read_config(folder / "config.yaml"),
        source=read_json_if_any(folder / "source.json"),
        status=read_json_if_any(folder / "status.json"),
        series=series,
        samples=[row for row in rows_of(folder / "samples.jsonl") if isinstance(row.get("text"), str)],
        resumes=resumes,
    )


def _instead(folder: Path) -> str:
    if not folder.is_dir():
        return "a file" if folder.exists() else "nothing there"
    inside = sorted(path.parent.name for path in folder.glob("*/status.json"))
    return f"a folder of runs: {', '.join(inside[:5])}" if inside else "a folder without them"


# --- figures ----------------------------------------------------------------------------------------------------------


def last_of(series: Series) -> float:
    finite = series.y[np.isfinite(series.y)]
    return float(finite[-1]) if len(finite) else math.nan


def lowest(series: Series) -> tuple[float, float]:
    """(value, step)"""
    finite = np.isfinite(series.y)
    if not finite.any():
        return math.nan, math.nan
    at = int(np.argmin(np.where(finite, series.y, np.inf)))
    return float(series.y[at]), float(series.x[at])


def median(series: Series) -> float:
    finite = series.y[np.isfinite(series.y)]
    return float(np.median(finite)) if len(finite) else math.nan


def steps_done(run: Run) -> int:
    return int(max((s.x[-1] for name, s in run.series.items() if not name.startswith("val/") and len(s.x)), default=0))


def tokens_until(run: Run) -> Series:
    """Trained tokens up to each step."""
    targets = run.of("targets")
    return Series(targets.x, np.cumsum(np.nan_to_num(targets.y)))


def training_seconds(run: Run) -> float:
    """Of the steps alone: each interval's tokens over its tokens a second. Evaluations and saves are not in it."""
    tokens, rate = tokens_until(run), run.of("tokens_per_s")
    if not len(tokens.x) or not len(rate.x):
        return math.nan
    done = tokens.y[np.searchsorted(tokens.x, rate.x, side="right") - 1]
    spent = np.diff(np.r_[0.0, done]) / np.where(rate.y > 0, rate.y, np.nan)
    return float(np.nansum(spent))


def smoothed(series: Series) -> tuple[Series, int]:
    """(mean of the last steps, how many): a fiftieth of the run. What is not finite does not count."""
    width = max(1, len(series.y) // 50)
    known = np.isfinite(series.y)
    sums, counts = (np.r_[0.0, np.cumsum(part)] for part in (np.where(known, series.y, 0.0), known))
    first = np.maximum(np.arange(len(series.y)) + 1 - width, 0)
    count = counts[1:] - counts[first]
    with np.errstate(invalid="ignore"):
        return Series(series.x, np.where(count > 0, (sums[1:] - sums[first]) / count, np.nan)), width


def drawable(series: Series) -> bool:
    return bool(np.isfinite(series.y).any())


def spread(series: Sequence[Series]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps that all have, mean, standard deviation with n - 1)"""
    common = series[0].x
    for other in series[1:]:
        common = np.intersect1d(common, other.x)
    values = np.stack([one.y[np.searchsorted(one.x, common)] for one in series])
    return common, values.mean(0), values.std(0, ddof=1)
