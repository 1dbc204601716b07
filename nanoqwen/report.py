"""One page per run, and several runs on one page: the numbers of run folders, put into page.html, which draws them.

    python -m nanoqwen.report runs/base                  writes runs/base/report.html, as the end of a run does
    python -m nanoqwen.report runs/base --watch          again every 10 s until the run ends; the page refreshes itself
    python -m nanoqwen.report compare runs/a runs/b      overlaid; runs that differ in their seed alone become a band

A page loads nothing, and its policy forbids it to. Text of a run is escaped in one place (`tag`), or is JSON that the
script turns into text nodes. The same folder gives the same bytes. Whatever is missing or torn is left out.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nanoqwen.config import dump, load_config
from nanoqwen.errors import ConfigError, run_script, say, warn
from nanoqwen.files import read_json_or_empty, write_atomic
from nanoqwen.manifest import checkpoints
from nanoqwen.run_reader import (
    EMPTY,
    Run,
    Series,
    band,
    config_lines,
    final,
    last_of,
    mean_of_end,
    median,
    minimum,
    number,
    read_run,
    seconds_until,
    smoothed,
    steps_done,
    tokens_until,
)
from nanoqwen.runfolder import inventory
from nanoqwen.weights import CheckpointError

TEMPLATE = Path(__file__).with_name("page.html")
NOT_DRAWN = {"step", "cursor", "epoch", "skipped", "targets", "batch_sha"}
MAX_SAMPLES, SAMPLE_CHARS, SAMPLE_PIECES = 12, 4_000, 600  # on one page
POINTS, AXIS_POINTS = 1_600, 200  # of a chart, over all its lines; of the steps whose tokens and seconds a page knows
SHADES = 10  # of a token and of the lines of layers
# Settings of where a run is kept and how it is watched: they do not make it another run.
LOCATION = re.compile(r"run\.(dir|resume|overwrite|keep|save_every)|data\.(cache_dir|workers)|log\..*|(infer|eval)\..*")
# Invisible but harmless: joiners of letters and emoji, and wide spaces.
INVISIBLE = {"\n", "\t", "\u200c", "\u200d", "\u00a0", "\u3000"}
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


# --- text and markup --------------------------------------------------------------------------------------------------


class Html(str):
    """Finished markup. Any other text is escaped when it becomes part of an element."""


def printable(value: object) -> str:
    """Text in which control characters and marks that turn the direction of writing are spelled out."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in INVISIBLE else ascii(c)[1:-1] for c in text)


def tag(name: str, *inside: object, **attributes: object) -> Html:
    """An element; None leaves an attribute out. Of `inside`, what is not Html is text and stays text."""
    texts = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    start = " ".join([name, *(f'{key}="{html.escape(printable(value))}"' for key, value in texts.items())])
    content = "".join(each if isinstance(each, Html) else html.escape(printable(each)) for each in inside)
    return Html(f"<{start}>{content}</{name}>")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], sortable: bool = False) -> Html:
    """A cell is a text, or (text, number to sort by). On a narrow screen it says itself what its column is."""

    def cell(title: str, value: Any) -> Html:
        text, sort_key = value if isinstance(value, tuple) else (value, math.nan)
        return tag("td", text, data_head=title, data_value=sort_key if math.isfinite(sort_key) else None)

    body = [tag("tr", *(cell(title, value) for title, value in zip(head, row, strict=True))) for row in rows]
    top = [tag("thead", tag("tr", *(tag("th", title) for title in head)))] if any(head) else []
    return tag("div", tag("table", *top, tag("tbody", *body), class_="sortable" if sortable else None), class_="scroll")


def block(title: str, *inside: Html) -> Html:
    return tag("section", tag("h2", title), *inside)


def details(title: str, *inside: Html, opened: bool = False) -> Html:
    return tag("details", tag("summary", title), *inside, open="open" if opened else None)


def short(value: float, digits: int = 5) -> str:
    """A number for a person, with this many digits: 1,234, 12.345k, 0.001235, 1.235e-5."""
    if not math.isfinite(value):
        return "n/a"
    size, unit = next(((s, n) for s, n in UNITS if abs(value) >= 10 * s or (abs(value) >= s > 1e3)), (1.0, ""))
    value /= size
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{_trimmed(mantissa)}e{int(exponent)}"
    before = math.floor(math.log10(abs(value))) + 1 if value else 1  # digits in front of the point; 0.01: -1
    return _trimmed(f"{value:,.{max(0, digits - before)}f}") + unit


def _trimmed(digits: str) -> str:
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def duration(seconds: float, digits: int = 3) -> str:
    if not math.isfinite(seconds):
        return "n/a"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.{digits}g} s"


# --- facts ------------------------------------------------------------------------------------------------------------


def parameters(run: Run) -> tuple[int, int]:
    """(of the model, of adapters) in the newest checkpoint, by the headers of its files; 0 where there are none."""
    try:
        listed = checkpoints(run.folder)
        stored = inventory(listed[-1][1]) if listed else {}
        sizes = [
            sum(math.prod(json.loads(kind.partition(" ")[2])) for name, kind in stored.items()
                if name.startswith(f"{file}:"))
            for file in ("model", "adapter_model")
        ]  # fmt: skip
    except (OSError, ValueError, TypeError, CheckpointError):
        return 0, 0
    return sizes[0], sizes[1]


def parameter_text(run: Run) -> str:
    counts = zip(parameters(run), ("parameters", "parameters of adapters"), strict=True)
    return ", ".join(f"{short(count, 4)} {kind}" for count, kind in counts if count)


def facts(run: Run) -> Iterator[tuple[str, str, str]]:
    """(title, value, note) of the line at the head of the page."""
    best, at = minimum(run.metric("val/loss"))
    planned, tokens = run.setting(f"{run.section}.steps"), final(tokens_until(run))
    if math.isfinite(best):
        note = f"nats; lowest {short(best)} at step {at:.0f}"
        yield "validation loss", short(last_of(run.metric("val/loss"))), note
    elif math.isfinite(loss := last_of(run.metric("loss"))):
        yield "training loss", short(loss), "nats; not evaluated yet"
    if math.isfinite(bits := last_of(run.metric("val/bits_per_byte"))):
        yield "bits per byte", short(bits), "of validation text"
    for name, title in (("val/attack_success", "attacks succeed"), ("val/utility", "benign requests right")):
        if math.isfinite(fraction := last_of(run.metric(name))):
            yield title, f"{100 * fraction:.3g} %", "of validation rows"
    yield "steps", f"{steps_done(run):,}", f"of {planned:,} planned" if isinstance(planned, int) else ""
    if math.isfinite(tokens):
        yield "tokens trained", short(tokens, 4), parameter_text(run)
    rate, mfu = median(run.metric("tokens_per_s")), median(run.metric("mfu"))
    note = f"{short(rate, 4)} tokens/s" + (f", MFU {100 * mfu:.3g} %" if math.isfinite(mfu) else "")
    yield "training time", duration(final(seconds_until(run))), note if math.isfinite(rate) else ""


def kind_of(run: Run) -> str:
    """Which kind of run, in words."""
    kinds = {"sft": "Supervised fine-tuning", "contrast": "Contrastive fine-tuning"}
    kind = "Pretraining"
    if run.section == "finetune":
        kind = kinds.get(run.setting("finetune.objective"), "Fine-tuning")
        kind += f", LoRA of rank {run.setting('lora.rank')}" if run.setting("lora.rank") else ""
    routed = {"mod": "Mixture-of-Depths", "dtf": "DTF routing", "tdtf": "TDTF routing"}
    has_routers = any("router/" in name for name in run.series)
    routing = routed.get(run.setting("routing.kind"), "routed" if has_routers else "")
    return kind + (f", {routing}" if routing else "")


def status_of(run: Run) -> tuple[str, str]:
    """(one word, a sentence)"""
    word, reason = str(run.status.get("status") or "unknown"), str(run.status.get("reason") or "")
    sentence = {"running": "under way, or killed"}.get(word, reason)
    code = run.status.get("code")
    return word, f"exit code {code}: {sentence}" if code and sentence else sentence


# --- charts -----------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    name: str
    x: np.ndarray  # steps
    y: np.ndarray  # NaN: a gap
    look: str = "c0"  # CSS classes: a colour c0 to c7, the shade of a layer (layer u0 to u10), ink; and dashed
    dots: bool = False  # few points, each a dot with all digits
    run: int = 0  # whose tokens and seconds stand behind its steps
    deviation: np.ndarray | None = None  # half the width of a band around the line
    averaged: int = 0  # steps over which its values are means already


class Chart(NamedTuple):
    title: str
    unit: str
    lines: list[Line]
    log: bool = False
    smooth: bool = True  # lines without dots are noisy, and follow the slider
    wide: bool = False
    marks: tuple[tuple[float, str], ...] = ()  # (step, what happened there)


class Panel(NamedTuple):
    """Metrics that share a chart."""

    title: str
    unit: str
    names: dict[str, str]  # metric -> in the legend; its namesake with val/ in front is drawn beside it
    log: bool = False
    times: float = 1.0
    smooth: bool = True


PANELS = [
    Panel("Learning rate", "", {"lr": "rate"}, smooth=False),
    Panel("Gradient norm", "before clipping", {"grad_norm": "norm"}, log=True),
    Panel("Validation text", "bits per byte", {"val/bits_per_byte": "bits per byte"}, log=True),
    Panel("Speed", "trained tokens/s", {"tokens_per_s": "speed"}),
    Panel("MFU", "% of the peak", {"mfu": "causal attention", "mfu_full": "full attention"}, times=100),
    Panel("Memory", "MB", {"memory_mb": "memory"}, smooth=False),
]
TUNING = [
    Panel("Attacks and answers", "% of validation rows", {"val/attack_success": "attacks succeed",
          "val/utility": "benign requests right", "val/utility_injected": "right under attack"}, times=100),
    Panel("Contrast", "of cosines between requests", {"contrast/stability": "stability",
          "contrast/separation": "separation", "contrast/discrimination": "discrimination",
          "contrast/collapse": "collapse"}),
    Panel("Loss of the contrast", "nats", {"contrast/loss": "contrast"}, log=True),
    Panel("Loss of the task", "nats per token", {"task": "task"}, log=True),
    Panel("Effective rank", "of the representations", {"contrast/rank": "rank"}),
    Panel("Streams left out", "of a step", {"contrast/left_out": "left out"}),
]  # fmt: skip
ROUTERS = [  # "": the statistic of each routed layer; the others are drawn once, as its baseline
    Panel("Tokens that causal routers choose", "% of all", {"causal_selected_fraction": "", "selected_fraction":
          "top-k in training", "val/used": "at inference, validation"}, times=100),
    Panel("Causal routers: cross-entropy", "nats", {"causal_bce": "", "causal_bce_baseline": "always the base rate"}),
    Panel("Causal routers: accuracy", "% of tokens", {"causal_acc": "", "causal_acc_baseline": "always the base rate"},
          times=100),
    Panel("Thresholds", "probability", {"threshold": ""}, smooth=False),
    Panel("Penalties", "unweighted", {f"train/{name}": name for name in
          ("causal_loss", "mod_aux_loss", "mod_z_loss", "prior_loss", "tpn_loss")}, log=True),
]  # fmt: skip
ROUTER = re.compile(r"(val/)?router/([^/]+)/(.+)")


def loss_chart(run: Run) -> Chart:
    loss, skipped = run.metric("loss"), run.metric("skipped")
    names = {"loss": ("train", "c0"), "val/loss": ("validation", "c1"),
             "val/loss_topk": ("validation by top-k (non-causal)", "c2 dashed")}  # fmt: skip
    lines = [Line(title, *run.metric(name), look, dots=name != "loss") for name, (title, look) in names.items()]
    bad = sorted({*loss.x[~np.isfinite(loss.y)], *skipped.x[skipped.y > 0]})
    marks = [(step, f"step {step:.0f}: not finite, skipped") for step in bad[:100]]
    marks += [(step, f"resumed after step {step:.0f}") for step in run.resumes[:100]]
    return Chart("Loss", "nats per token", lines, log=True, wide=True, marks=tuple(marks))


def chart_of(run: Run, panel: Panel, curves: Iterable[tuple[str, str, str]]) -> Chart:
    """`curves` are (legend, metric, look)."""
    lines = [
        Line(legend, series.x, panel.times * series.y, look, dots=metric.startswith("val/"))
        for legend, metric, look in curves for series in [run.metric(metric)]
    ]  # fmt: skip
    return Chart(panel.title, panel.unit, lines, panel.log, panel.smooth)


def panel_chart(run: Run, panel: Panel) -> Chart:
    """The metrics of a panel, and those of the same name on validation text."""
    curves = []
    for n, (name, title) in enumerate(panel.names.items()):
        curves += [(title, name, f"c{n % 8}"), (f"{title}, validation", f"val/{name}", f"c{n % 8}")]
    return chart_of(run, panel, curves)


def router_chart(run: Run, panel: Panel) -> Chart:
    """A statistic of every routed layer and their mean, and what the panel compares it with."""
    curves = []
    for n, (name, title) in enumerate(panel.names.items()):
        if "/" in name:
            curves.append((title, name, f"c{(n + 1) % 8}"))
        elif title:
            curves.append((title, f"router/mean/{name}", "c1 dashed"))
        else:
            curves += _layer_curves(run, name)
    return chart_of(run, panel, curves)


def _layer_curves(run: Run, statistic: str) -> Iterator[tuple[str, str, str]]:
    """(legend, metric, look) of each layer, from light to dark, and of their mean; on validation text if only there."""
    prefixes: dict[str, str] = {}  # layer -> of the metric
    for match in filter(None, map(ROUTER.fullmatch, sorted(run.series))):
        if match[3] == statistic:  # router/ comes before val/router/
            prefixes.setdefault(match[2], match[1] or "")
    layers = sorted(prefixes, key=lambda layer: (layer == "mean", layer.zfill(9)))
    for n, layer in enumerate(layers):
        metric = f"{prefixes[layer]}router/{layer}/{statistic}"
        shade = f"layer u{round(SHADES * n / max(1, len(layers) - 1))}"
        yield ("mean of layers", metric, "ink") if layer == "mean" else (f"layer {layer}", metric, shade)


def other_charts(run: Run) -> Iterator[Chart]:
    """Whatever else a run has logged: metrics of routed layers by their statistic, others by their name."""
    drawn = {name.removeprefix("val/") for panel in (*PANELS, *TUNING, *ROUTERS) for name in panel.names} | NOT_DRAWN
    drawn |= {"loss", "loss_topk", "loss_causal", "perplexity", "perplexity_causal", "perplexity_topk"}
    drawn |= {"train/loss", "train/lm_loss", "train/perplexity"}  # the loss again, in other words
    matches = {name: ROUTER.fullmatch(name) for name in sorted(run.series)}
    for statistic in dict.fromkeys(match[3] for match in matches.values() if match and match[3] not in drawn):
        yield router_chart(run, Panel(statistic, "routed layers", {statistic: ""}))
    for name in sorted({name.removeprefix("val/") for name, match in matches.items() if not match} - drawn):
        yield panel_chart(run, Panel(name, "", {name: "train"}))


def sections(run: Run) -> list[dict[str, Any]]:
    """The charts of a page by their headings; what a run has not logged is left out."""
    routers = (router_chart(run, panel) for panel in ROUTERS)
    charts = {
        "Training": [loss_chart(run), *(panel_chart(run, panel) for panel in PANELS)],
        "Fine-tuning": [panel_chart(run, panel) for panel in TUNING],
        "Routing": list(routers) if any("router/" in name for name in run.series) else [],
        "Other metrics": list(other_charts(run)),
    }
    return [section for title, each in charts.items() if (section := section_json(title, each))["charts"]]


# --- charts as JSON ---------------------------------------------------------------------------------------------------


def thinned(x: ArrayLike, y: ArrayLike, columns: int) -> np.ndarray:
    """Which points to draw: the first, the last, and the lowest and highest of each column. NaNs are left out."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(known) <= 2 * columns:
        return known
    column = column_of(x[known], columns)
    order = np.lexsort((y[known], column))  # by column, and in it by value
    edges = np.flatnonzero(np.diff(column[order])) + 1
    lowest, highest = order[np.r_[0, edges]], order[np.r_[edges - 1, len(order) - 1]]
    return known[np.unique(np.r_[0, lowest, highest, len(known) - 1])]


def column_of(x: np.ndarray, columns: int) -> np.ndarray:
    """The column that each of the rising values lies in, all of equal width."""
    return np.minimum((x - x[0]) / ((x[-1] - x[0]) or 1.0) * columns, columns - 1).astype(int)


def numbers(values: np.ndarray, digits: int = 17) -> list[float | None]:
    """For JSON: whole numbers without a point, null for NaN."""
    rounded = (float(f"{value:.{digits}g}") for value in values.tolist())
    return [None if math.isnan(value) else int(value) if value.is_integer() and abs(value) < 1e15 else value
            for value in rounded]  # fmt: skip


def line_json(line: Line, columns: int) -> dict[str, Any]:
    """The points that are drawn: lowest and highest of each column, a null where values are missing in between.

    mean   [steps, values] of each column where points were left out: what the script smooths
    """
    kept = thinned(line.x, line.y, columns)
    known = np.isfinite(line.y)
    last_gap = np.maximum.accumulate(np.where(known, -1, np.arange(len(known))))[kept]
    points = np.union1d(kept, last_gap[1:][last_gap[1:] > kept[:-1]])
    digits = 17 if line.dots else 6
    data: dict[str, Any] = {"name": printable(line.name), "look": line.look, "dots": line.dots, "run": line.run}
    data |= {"averaged": line.averaged, "x": numbers(line.x[points]), "y": numbers(line.y[points], digits)}
    if len(kept) < known.sum():
        x, y = line.x[known], line.y[known]
        column = column_of(x, columns)
        counts = np.bincount(column)
        means = [np.bincount(column, values)[counts > 0] / counts[counts > 0] for values in (x, y)]
        data["mean"] = [numbers(values, digits) for values in means]
    if line.deviation is not None:
        data["low"], data["high"] = (numbers((line.y + side * line.deviation)[points], digits) for side in (-1, 1))
    return data


def section_json(title: str, charts: Iterable[Chart]) -> dict[str, Any]:
    """Charts and lines that have a value."""
    drawn = []
    for chart in charts:
        lines = [line for line in chart.lines if np.isfinite(line.y).any()]
        columns = max(30, POINTS // (2 * max(1, len(lines))))
        texts = {"title": printable(chart.title), "unit": printable(chart.unit)}
        if lines:
            drawn.append(chart._asdict() | texts | {"lines": [line_json(line, columns) for line in lines]})
    return {"title": title, "charts": drawn}


def axes_json(run: Run) -> dict[str, Any]:
    """Tokens and seconds that stand behind the steps of a run, each as [steps, values]."""
    axes = {}
    for name, (x, y) in (("tokens", tokens_until(run)), ("seconds", seconds_until(run))):
        if final(Series(x, y)) > 0:
            chosen = np.unique(np.linspace(0, len(x) - 1, AXIS_POINTS).round().astype(int))
            axes[name] = [[0, *numbers(x[chosen])], [0, *numbers(y[chosen], 6 if name == "seconds" else 17)]]
    return axes


# --- samples and evaluations ------------------------------------------------------------------------------------------


def samples(run: Run) -> Iterator[Html]:
    """What the model wrote on the way, the last first; of a routed model each token with what computed it."""
    rows = run.samples
    if len(rows) > MAX_SAMPLES:
        rows = [rows[round(n * (len(rows) - 1) / (MAX_SAMPLES - 1))] for n in range(MAX_SAMPLES)]
    for n, row in enumerate(reversed(rows)):
        step = number(row.get("step"))
        when = "?" if step is None or math.isnan(step) else f"{step:g}" if step < 1e6 else f"{step:.0f}"
        text = row["text"][:SAMPLE_CHARS] + (" ..." if len(row["text"]) > SAMPLE_CHARS else "")
        pieces = sample_pieces(row)
        content = shaded(pieces, row["layers"]) if pieces else [tag("pre", text or " ")]
        yield details(f"after step {when}", *content, opened=n == 0)


def sample_pieces(row: dict[str, Any]) -> list[tuple[str, int]]:
    """(text, by how many of its routed layers it was computed) of each token; empty where a row does not say."""
    pieces, layers = row.get("pieces"), row.get("layers")
    if not isinstance(pieces, list) or not isinstance(layers, int) or not 1 <= layers <= 10_000:
        return []
    pieces = pieces[:SAMPLE_PIECES]
    valid = [(p[0], p[1]) for p in pieces if isinstance(p, list) and len(p) == 2
             and isinstance(p[0], str) and isinstance(p[1], int) and 0 <= p[1] <= layers]  # fmt: skip
    return valid if len(valid) == len(pieces) else []


def shaded(pieces: Sequence[tuple[str, int]], layers: int) -> list[Html]:
    """A text whose tokens are the darker, the more of the routed layers computed them."""

    def span(text: str, used: int) -> Html:
        return tag("span", text, class_=f"u{round(SHADES * used / layers)}", title=f"{used} of {layers}")

    steps = sorted({round(n * layers / min(layers, 8)) for n in range(min(layers, 8) + 1)})
    legend = [part for n in steps for part in (span(f" {n} ", n), " ")]
    note = tag("p", "computed by ", *legend, f"of {layers} routed layers", class_="note shade")
    return [note, tag("pre", *(span(text, used) for text, used in pieces), class_="shade")]


def evaluations(run: Run) -> Iterator[Html]:
    """Tables of what eval.py has left in the run folder."""
    for name in ("heldout.json", "tasks.json", "injection.json"):
        results = read_json_or_empty(run.folder / name)
        for rows in (heldout_rows(results), harness_rows(results), injection_rows(results)):
            if len(rows) > 1:
                yield tag("h3", name)
                yield table(rows[0], rows[1:])
        if isinstance(results.get("acceptance"), dict):
            criteria = [["yes" if met is True else "NO", str(text)] for text, met in results["acceptance"].items()]
            yield table(["met", "criterion"], criteria)
            yield tag("p", "Verdict: ", tag("b", "PASS" if results.get("pass") is True else "FAIL"))


def heldout_rows(results: dict[str, Any]) -> list[list[str]]:
    """Held-out text: each metric with its standard error, a column for each way to compute it."""
    modes = [name for name, each in results.items() if isinstance(each, dict) and isinstance(each.get("loss"), dict)]
    rows = [[f"text: {results.get('data')}", *modes]]
    for key, title in (("loss", "nats per token"), ("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
        cells = []
        for mode in modes:
            metric = results[mode].get(key) if isinstance(results[mode].get(key), dict) else {}
            value, error = number(metric.get("value", "")), number(metric.get("standard_error", ""))
            suffix = "" if error is None or math.isnan(error) else f" ± {short(error, 3)}"
            cells.append("n/a" if value is None else short(value) + suffix)
        rows.append([title, *cells])
    return rows if modes else []


def harness_rows(results: dict[str, Any]) -> list[list[str]]:
    """{"results": {task: {metric: value, metric_stderr: value}}}, also with a filter as in `acc,none`."""
    rows = [["task", "metric", "value", "± standard error"]]
    tasks = results.get("results")
    for task, metrics in tasks.items() if isinstance(tasks, dict) else ():
        for metric, value in metrics.items() if isinstance(metrics, dict) else ():
            name, comma, rest = metric.partition(",")
            if name.endswith("_stderr") or (plain := number(value)) is None:
                continue
            error = number(metrics.get(f"{name}_stderr{comma}{rest}", metrics.get(f"{metric}_stderr", "")))
            rows.append([task, metric.removesuffix(",none"), short(plain), "" if error is None else short(error, 3)])
    return rows


def injection_rows(results: dict[str, Any]) -> list[list[str]]:
    """The injection suite: attack success and utility by group of rows and model, in per cent."""
    scores = results.get("scores")
    models = [name for name in scores if isinstance(scores[name], dict)] if isinstance(scores, dict) else []
    rows = [["%, with the 95 % interval", *models]]
    groups = list(dict.fromkeys(group for model in models for group in scores[model]))
    for title, key in (("attacks succeed", "attack_success"), ("benign requests right", "utility"),
                       ("right under attack", "utility_injected")):  # fmt: skip
        for group in groups if key == "attack_success" else groups[:1]:
            rows.append([f"{title}: {group}", *(_interval(scores[model].get(group), key) for model in models)])
    return rows


def _interval(scores: Any, key: str) -> str:
    try:
        low, high = scores[key]["interval"]
        return f"{100 * scores[key]['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    except (KeyError, TypeError, ValueError):
        return "n/a"


# --- configuration and source -----------------------------------------------------------------------------------------

UNUSED = {"train": ("finetune.", "lora.", "chat.", "contrast."), "finetune": ("train.", "model.")}


def used_settings(run: Run) -> dict[str, str]:
    """The keys of the configuration that its script reads; the model of a fine-tuned one comes with its base."""
    return {key: value for key, value in run.config.items() if not key.startswith(UNUSED.get(run.section, ()))}


def configuration(run: Run) -> Iterator[Html]:
    """What differs from config.yaml of this folder, then all of it."""
    settings = used_settings(run)
    if not settings:
        return
    try:
        defaults = config_lines(dump(load_config([], run.section)))
    except ConfigError:  # a config.yaml that cannot be read: there is nothing to compare with
        defaults = {}
    changed = [[key, value, defaults.get(key, "no such key")] for key, value in settings.items()
               if defaults and value != defaults.get(key) and key != "run.dir"]  # fmt: skip
    if changed:
        rows = table(["key", "value", "default"], changed)
        count = f"{len(changed)} keys differ" if len(changed) > 1 else "1 key differs"
        yield details(f"{count} from the defaults", rows, opened=len(changed) <= 20)
    else:
        yield tag("p", "Nothing differs from the defaults.")
    yield details("Everything", tag("pre", "\n".join(f"{key}: {value}" for key, value in settings.items())))


def provenance(run: Run) -> Html:
    source = run.source
    command, versions = source.get("command"), source.get("versions")
    rows = [
        ["command", "python " + shlex.join(map(str, command)) if isinstance(command, list) else "not recorded"],
        ["device", source.get("device") or f"{run.setting('run.device') or 'not recorded'}"],
        ["ranks", source.get("ranks", "")],
        ["commit", source.get("commit") or "not recorded"],
        ["uncommitted (SHA-256)", source.get("changes") or ""],
        ["platform", source.get("platform", "")],
        ["versions", ", ".join(f"{k} {v}" for k, v in versions.items() if v) if isinstance(versions, dict) else ""],
        ["resumed after steps", ", ".join(f"{step:.0f}" for step in run.resumes)],
    ]
    return table(["", ""], [row for row in rows if row[1]])


# --- several runs -----------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Runs that differ in nothing but their seed."""

    name: str
    runs: list[Run]


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """{key: its value in each run} for the keys in which runs differ, without those of where they are kept."""
    configs = [used_settings(run) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key, "") for config in configs] for key in keys if not LOCATION.fullmatch(key)}
    values["commit"] = [str(run.source.get("commit") or "")[:12] for run in runs]
    values["uncommitted"] = [str(run.source.get("changes") or "")[:12] for run in runs]
    values["device"] = [str(run.source.get("device") or "") for run in runs]
    return {key: each for key, each in values.items() if len(set(each)) > 1}


def grouped(runs: Sequence[Run], differing: dict[str, list[str]]) -> list[Group]:
    """Runs that differ in their seed alone, and each in it: the same seed twice is another code or another device."""
    decisive = [key for key in differing if key != "run.seed"]
    members: dict[tuple[str, ...], list[Run]] = {}
    for n, run in enumerate(runs):
        key = tuple(differing[name][n] for name in decisive) if run.config else (str(n),)
        members.setdefault(key, []).append(run)
    groups = []
    for values, each in members.items():
        if len({run.config.get("run.seed") for run in each}) < len(each):
            groups += [Group(run.name, [run]) for run in each]
            continue
        settings = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in zip(decisive, values, strict=False))
        name = settings if settings and len(decisive) <= 3 else ", ".join(run.name for run in each)
        groups.append(Group(f"{name} ({len(each)} seeds)" if len(each) > 1 else each[0].name, each))
    return groups


COMPARED = [
    Panel("Validation loss", "nats per token", {"val/loss": ""}, log=True),
    Panel("Training loss", "nats per token", {"loss": ""}, log=True),
    *PANELS,
    *TUNING,
    Panel("Computed at inference", "% of tokens", {"val/used": ""}, times=100),
]


def compared_charts(runs: Sequence[Run], groups: Sequence[Group]) -> Iterator[Chart]:
    first = [next(n for n, run in enumerate(runs) if run is group.runs[0]) for group in groups]
    for panel in COMPARED:
        for metric, title in panel.names.items():
            lines = [group_line(group, metric, panel.times, f"c{n % 8}", first[n]) for n, group in enumerate(groups)]
            name = panel.title if len(panel.names) == 1 else f"{panel.title}: {title}"
            yield Chart(name, panel.unit, lines, panel.log, panel.smooth, wide=metric == "val/loss")


def group_line(group: Group, metric: str, times: float, look: str, run: int) -> Line:
    """One run as it is; of several the mean with a band of one standard deviation to either side.

    Noise of single steps is smoothed before: the band is that between seeds, not that between batches.
    """
    members = [run.metric(metric) for run in group.runs if np.isfinite(run.metric(metric).y).any()]
    averaged, deviation, mean = 0, None, EMPTY
    if len(members) > 1:
        if metric == "loss":
            averaged = int(max(each.x[-1] for each in members)) // 50
            members = [smoothed(each, averaged) for each in members] if averaged else members
        mean, deviation = band([Series(x, times * y) for x, y in members])
    elif members:
        mean = Series(members[0].x, times * members[0].y)
    return Line(group.name, *mean, look, metric.startswith("val/"), run, deviation, averaged)


class Column(NamedTuple):
    """Of the list of runs."""

    value: Callable[[Run], float]
    text: Callable[[float, int], str] = short


COLUMNS = {
    "best loss": Column(lambda run: minimum(run.metric("val/loss"))[0]),
    "last loss": Column(lambda run: last_of(run.metric("val/loss"))),
    "bits per byte": Column(lambda run: last_of(run.metric("val/bits_per_byte"))),
    "train loss": Column(lambda run: mean_of_end(run.metric("loss"))),
    "attacks succeed": Column(lambda run: last_of(run.metric("val/attack_success"))),
    "benign right": Column(lambda run: last_of(run.metric("val/utility"))),
    "parameters": Column(lambda run: float(sum(parameters(run))) or math.nan),
    "tokens": Column(lambda run: final(tokens_until(run))),
    "time": Column(lambda run: final(seconds_until(run)), duration),
    "tokens/s": Column(lambda run: median(run.metric("tokens_per_s"))),
    "memory, MB": Column(lambda run: last_of(run.metric("memory_mb"))),
}


def mean_and_sd(values: Iterable[float], text: Callable[[float, int], str]) -> tuple[str, float]:
    """A cell of a table: the mean of the finite values ± their standard deviation (n - 1)."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "", math.nan
    mean = float(np.mean(known))
    spread = f"\u00a0±\u00a0{text(float(np.std(known, ddof=1)), 2)}" if len(known) > 1 else ""
    return text(mean, 5) + spread, mean


def run_tables(runs: Sequence[Run], groups: Sequence[Group]) -> Iterator[Html]:
    """All runs, and the means of those that differ in their seed; a click on a title sorts."""
    columns = {name: each for name, each in COLUMNS.items() if any(math.isfinite(each.value(run)) for run in runs)}

    def cells(members: Sequence[Run]) -> list[tuple[str, float]]:
        return [mean_and_sd(map(each.value, members), each.text) for each in columns.values()]

    if any(len(group.runs) > 1 for group in groups):
        rows = [[group.name, *cells(group.runs)] for group in groups]
        yield block("Groups: mean ± standard deviation over seeds", table(["group", *columns], rows, sortable=True))
    rows = []
    for run in runs:
        steps = steps_done(run)
        device = str(run.source.get("device") or "")
        rows.append([run.name, status_of(run)[0], *cells([run]), (f"{steps:,}", steps), device])
    yield block("Runs", table(["run", "status", *columns, "steps", "device"], rows, sortable=True))


# --- pages ------------------------------------------------------------------------------------------------------------


def page(header: Sequence[Html], before: Iterable[Html], after: Iterable[Html], data: dict[str, Any], title: str,
         refresh: float = 0) -> str:  # fmt: skip
    """page.html with its blanks filled in, in one pass: no text of a run is looked through for further blanks."""
    template = TEMPLATE.read_text(encoding="utf-8")
    hashes = {}
    for kind in ("style", "script"):
        text = re.search(rf"<{kind}>(.*?)</{kind}>", template, re.DOTALL)[1]
        hashes[kind] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    policy = "".join(f"{kind}-src 'sha256-{digest}'; " for kind, digest in hashes.items())
    blanks = {
        "policy": f"default-src 'none'; {policy}base-uri 'none'; form-action 'none'",
        "refresh": f'<meta http-equiv="refresh" content="{refresh:g}">' if refresh else "",
        "title": html.escape(printable(title)),
        "header": "".join(header),
        "before": "".join(before),
        "after": "".join(after),
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda blank: blanks[blank[1]], template)


def run_page(run: Run, refresh: float = 0) -> str:
    """The page of a run; `refresh` seconds after which it loads itself again, 0: never."""
    word, sentence = status_of(run)
    colour = {"done": "c2", "running": "c0", "preempted": "c4", "failed": "c6"}.get(word, "c7")
    about = " · ".join(filter(None, (kind_of(run), str(run.source.get("device") or ""))))
    entries = [tag("div", tag("dt", title), tag("dd", value, class_="value"), tag("dd", note, class_="note"))
               for title, value, note in facts(run)]  # fmt: skip
    header = [tag("h1", run.name, tag("span", word, class_=f"status {colour}")), tag("p", about, class_="note")]
    header += [tag("p", sentence, class_="note")] if sentence else []
    header += [tag("dl", *entries, class_="facts")]
    shown = min(len(run.samples), MAX_SAMPLES)
    title = f"Samples ({shown} of {len(run.samples)})" if shown < len(run.samples) else "Samples"
    parts = {"Evaluations": evaluations(run), title: samples(run), "Configuration": configuration(run)}
    after = [block(title, *content) for title, each in parts.items() if (content := list(each))]
    after.append(block("Where it comes from", provenance(run)))
    data = {"runs": [axes_json(run)], "sections": sections(run), "shared": False}
    before = [] if data["sections"] else [tag("p", "No step has been logged.")]
    return page(header, before, after, data, run.name, refresh)


def comparison_page(runs: Sequence[Run]) -> str:
    """The page of several runs."""
    differing = differences(runs)
    groups = grouped(runs, differing)
    title = "Comparison of " + ", ".join(run.name for run in runs)
    about = f"{len(runs)} runs; those that differ in their seed alone are drawn as mean ± standard deviation"
    section = section_json("Curves", compared_charts(runs, groups))
    rows = table(["key", *(run.name for run in runs)], [[key, *values] for key, values in differing.items()])
    after = block("What differs", rows if differing else tag("p", "Nothing: the configurations are equal."))
    before = list(run_tables(runs, groups)) + ([] if section["charts"] else [tag("p", "No step has been logged.")])
    data = {"runs": list(map(axes_json, runs)), "sections": [section], "shared": True}
    return page([tag("h1", title), tag("p", about, class_="note")], before, [after], data, title)


def write(file: Path, text: str) -> None:
    write_atomic(file, text.encode("utf-8", "backslashreplace"))


def write_report(folder: Path, warn: Callable[[str], None] = warn) -> None:
    """The report of a run that ends. If it fails, that is one warning: the run counts, not its page."""
    try:
        write(folder / "report.html", run_page(read_run(folder)))
    except Exception as error:
        warn(f"{folder}: no report.html: {type(error).__name__}: {' '.join(str(error).split()):.200}")


def watch(folder: Path, file: Path, seconds: float) -> None:
    """Write the page of a run every so many seconds until status.json says that it has ended."""
    running = True
    while running:
        run = read_run(folder)
        running = run.status.get("status") == "running"
        write(file, run_page(run, seconds if running else 0))
        if running:
            time.sleep(seconds)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nanoqwen.report", description="A page about one run, or about several."
    )
    if argv[:1] == ["compare"]:
        parser.prog += " compare"
        parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
        parser.add_argument("--output", type=Path, default=Path("compare.html"), help="default: compare.html")
        args = parser.parse_args(argv[1:])
        file = args.output
        write(file, comparison_page([read_run(folder) for folder in args.runs]))
    else:
        parser.add_argument("run", type=Path, metavar="RUN", help="a run folder; or: compare RUN RUN ...")
        parser.add_argument("--output", type=Path, help="default: report.html in the run folder")
        parser.add_argument("--watch", type=float, nargs="?", const=10.0, metavar="SECONDS",
                            help="write it again every 10 or so many seconds until the run ends")  # fmt: skip
        args = parser.parse_args(argv)
        file = args.output or args.run / "report.html"
        if args.watch is not None and not 1 <= args.watch < math.inf:
            parser.error(f"--watch: expected 1 second or more, got {args.watch:g}")
        if args.watch:
            watch(args.run, file, args.watch)
        else:
            write(file, run_page(read_run(args.run)))
    say(f"wrote {file}", sys.stdout)


if __name__ == "__main__":
    run_script(main)
