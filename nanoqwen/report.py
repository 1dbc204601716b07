"""One page per run, and several runs on one page: self-contained HTML from what lies in a run folder.

    python -m nanoqwen.report runs/base                  writes runs/base/report.html, as the end of a run does
    python -m nanoqwen.report runs/base --svg a.svg      its loss as a picture
    python -m nanoqwen.report compare runs/a runs/b      overlaid; runs that differ in their seed alone become a band

Nothing is loaded from elsewhere, and the page forbids it to itself. Text of models, names and paths are escaped in one
place (`plot.safe`). The same folder gives the same bytes. Whatever is missing or torn is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanoqwen.config import dump, load_config
from nanoqwen.errors import ConfigError, run_script, warn
from nanoqwen.files import read_json_if_any, write_atomic
from nanoqwen.pages import block, card, details, page, shaded, table
from nanoqwen.plot import Chart, Line, safe, short
from nanoqwen.run_reader import (
    Run,
    Series,
    drawable,
    flat,
    last_of,
    lowest,
    median,
    numeric,
    read_run,
    smoothed,
    spread,
    steps_done,
    tokens_until,
    training_seconds,
)
from nanoqwen.runfolder import inventory
from nanoqwen.weights import CheckpointError

NOT_DRAWN = {"step", "cursor", "epoch", "skipped", "targets", "batch_sha"}
SAMPLES_AT_MOST, SAMPLE_CHARS, SAMPLE_PIECES = 12, 4_000, 600  # shown on a page
WHERE = re.compile(r"run\.(dir|resume|overwrite|keep|save_every)|data\.(cache_dir|workers)|log\..*|(infer|eval)\..*")


# --- figures ----------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "n/a"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def parameters(run: Run) -> str:
    """Of the newest checkpoint, by the headers of its files."""
    try:
        newest = max((run.folder / "checkpoints").glob("step-*"), default=None, key=lambda path: path.name)
        stored = inventory(newest) if newest else {}
        sizes = {
            part: sum(math.prod(json.loads(kind.partition(" ")[2])) for name, kind in stored.items()
                      if name.startswith(f"{part}:"))
            for part in ("model", "adapter_model")
        }  # fmt: skip
    except (OSError, ValueError, TypeError, CheckpointError):
        return ""
    named = {" parameters": sizes["model"], " parameters of adapters": sizes["adapter_model"]}
    return ", ".join(short(count) + what for what, count in named.items() if count)


def facts(run: Run) -> list[tuple[str, str, str]]:
    """(what, value, beneath it) of the line at the head of the page."""
    loss, (best, at) = run.of("val/loss"), lowest(run.of("val/loss"))
    planned = run.value(f"{run.section}.steps")
    steps, tokens = steps_done(run), tokens_until(run)
    found = []
    if math.isfinite(best):
        found.append(("validation loss", short(last_of(loss), 5), f"nats; lowest {short(best, 5)} at step {at:.0f}"))
    elif math.isfinite(last := last_of(run.of("loss"))):
        found.append(("training loss", short(last, 5), "nats; not evaluated yet"))
    if math.isfinite(bits := last_of(run.of("val/bits_per_byte"))):
        found.append(("bits per byte", short(bits, 5), "of validation text"))
    for name, what in (("val/attack_success", "attacks succeed"), ("val/utility", "benign requests right")):
        if math.isfinite(share := last_of(run.of(name))):
            found.append((what, f"{100 * share:.3g} %", "of validation rows"))
    found.append(("steps", f"{steps:,}", f"of {planned:,} planned" if isinstance(planned, int) else ""))
    if len(tokens.y):
        found.append(("tokens trained", short(float(tokens.y[-1])), parameters(run)))
    rate, share = median(run.of("tokens_per_s")), median(run.of("mfu"))
    beneath = f"{short(rate)} tokens/s" + (f", MFU {100 * share:.3g} %" if math.isfinite(share) else "")
    found.append(("training time", duration(training_seconds(run)), beneath if math.isfinite(rate) else ""))
    return found


def what_it_is(run: Run) -> str:
    """Which kind of run, in words."""
    kinds = {"sft": "Supervised fine-tuning", "contrast": "Contrastive fine-tuning"}
    objective = kinds.get(run.value("finetune.objective"), "Fine-tuning")
    said = "Pretraining" if run.section == "train" else objective
    if run.section == "finetune" and run.value("lora.rank"):
        said += f", LoRA of rank {run.value('lora.rank')}"
    routed = {"mod": "Mixture-of-Depths", "dtf": "DTF routing", "tdtf": "TDTF routing"}
    kind = routed.get(run.value("routing.kind"), "routed" if any("router/" in name for name in run.series) else "")
    return said + (f", {kind}" if kind else "")


# --- curves -----------------------------------------------------------------------------------------------------------


def loss_chart(run: Run) -> Chart:
    lines, loss = [], run.of("loss")
    if drawable(loss):
        mean, width = smoothed(loss)
        lines.append(Line("train, each step", *loss, look="c0 faint" if width > 1 else "c0"))
        if width > 1:
            lines.append(Line(f"train, mean of {width} steps", *mean, look="c0"))
    for name, what, look in (
        ("val/loss", "validation", "c1"), ("val/loss_topk", "validation, by top-k, which looks ahead", "c2 dashed")
    ):  # fmt: skip
        if drawable(run.of(name)):
            lines.append(Line(what, *run.of(name), look=look, dots=True))
    bad = sorted({*loss.x[~np.isfinite(loss.y)], *run.of("skipped").x[run.of("skipped").y > 0]})
    marks = [(step, f"step {step:.0f}: not finite, skipped") for step in bad[:100]]
    marks += [(step, f"gone on after step {step:.0f}") for step in run.resumes[:100]]
    tokens = tokens_until(run)
    above = Line("tokens trained", *tokens) if len(tokens.y) > 1 and tokens.y[-1] > 0 else None
    return Chart("Loss", "nats per token", lines, log=True, marks=tuple(marks), above=above)


class Panel(NamedTuple):
    title: str
    unit: str
    names: dict[str, str]  # metric -> in the legend; with val/ in front of it drawn beside
    log: bool = False
    times: float = 1.0


PANELS = [
    Panel("Learning rate", "", {"lr": "rate"}),
    Panel("Gradient norm", "before clipping", {"grad_norm": "norm"}, log=True),
    Panel("Validation text", "bits per byte", {"val/bits_per_byte": "bits per byte"}, log=True),
    Panel("Speed", "trained tokens/s", {"tokens_per_s": "speed"}),
    Panel("MFU", "% of the peak", {"mfu": "causal attention", "mfu_full": "full attention"}, times=100),
    Panel("Memory", "MB", {"memory_mb": "memory"}),
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
ROUTERS = [  # of each routed layer, and the baseline beside them
    Panel("Tokens that causal routers choose", "% of all", {"causal_selected_fraction": "", "selected_fraction":
          "top-k in training", "val/used": "in use, validation"}, times=100),
    Panel("Causal routers: cross-entropy", "nats", {"causal_bce": "", "causal_bce_baseline": "knows the share alone"}),
    Panel("Causal routers: accuracy", "% of tokens", {"causal_acc": "", "causal_acc_baseline": "knows the share alone"},
          times=100),
    Panel("Thresholds", "probability", {"threshold": ""}),
    Panel("Penalties", "unweighted", {f"train/{name}": name for name in
          ("causal_loss", "mod_aux_loss", "mod_z_loss", "prior_loss", "tpn_loss")}, log=True),
]  # fmt: skip
ROUTER = re.compile(r"(val/)?router/([^/]+)/(.+)")


def panel_chart(run: Run, panel: Panel) -> Chart | None:
    """The metrics of a panel, and those of the same name on validation text; None where the run has none of them."""
    lines = []
    for number, (name, what) in enumerate(panel.names.items()):
        look = f"c{number % 8}"
        for metric, told, dots in ((name, what, name.startswith("val/")), (f"val/{name}", f"{what}, validation", True)):
            if drawable(series := run.of(metric)):
                lines.append(Line(told, series.x, panel.times * series.y, look=look, dots=dots))
    return Chart(panel.title, panel.unit, lines, panel.log) if lines else None


def router_chart(run: Run, panel: Panel) -> Chart | None:
    """A statistic of every routed layer and their mean; further names of the panel are drawn once, dashed."""
    lines: list[Line] = []
    for number, (name, what) in enumerate(panel.names.items()):
        if "/" in name:
            found = [(what, name, f"c{(number + 1) % 8}", name.startswith("val/"))]
        elif what:
            found = [(what, f"router/mean/{name}", "c1 dashed", False)]
        else:
            layers = sorted({m[2] for key in run.series if (m := ROUTER.fullmatch(key)) and m[3] == name}, key=_order)
            shades = {layer: f"r{round(9 * n / max(1, len(layers) - 1))}" for n, layer in enumerate(layers)}
            found = [
                ("mean of layers" if layer == "mean" else f"layer {layer}", f"{prefix}router/{layer}/{name}",
                 "bold" if layer == "mean" else shades[layer], bool(prefix))
                for prefix in ("", "val/") for layer in layers
                if not (prefix and f"router/{layer}/{name}" in run.series)
            ]  # fmt: skip
        for told, metric, look, dots in found:
            if drawable(series := run.of(metric)):
                lines.append(Line(told, series.x, panel.times * series.y, look=look, dots=dots))
    return Chart(panel.title, panel.unit, lines, panel.log) if lines else None


def _order(layer: str) -> tuple[bool, int, str]:
    return layer == "mean", int(layer) if layer.isdecimal() and len(layer) < 9 else 0, layer


def other_charts(run: Run, drawn: set[str]) -> Iterator[Chart]:
    """Whatever else a run has logged: metrics of routed layers by their statistic, others by their name."""
    statistics = {m[3]: m[3] for name in sorted(run.series) if (m := ROUTER.fullmatch(name)) and m[3] not in drawn}
    for name in statistics:
        if (chart := router_chart(run, Panel(name, "routed layers", {name: ""}))) is not None:
            yield chart
    for name in sorted({name.removeprefix("val/") for name in run.series if not ROUTER.fullmatch(name)} - drawn):
        if (chart := panel_chart(run, Panel(name, "", {name: "train"}))) is not None:
            yield chart


def curves(run: Run) -> Iterator[str]:
    """The sections of the page that hold charts."""
    first = [card(loss_chart(run), wide=True)] if loss_chart(run).lines else []
    first += [card(chart) for panel in PANELS if (chart := panel_chart(run, panel))]
    yield block("Training", "".join(first) or "<p>No step has been logged.</p>", grid=bool(first))
    for title, panels, make in (("Fine-tuning", TUNING, panel_chart), ("Routing", ROUTERS, router_chart)):
        cards = [card(chart) for panel in panels if (chart := make(run, panel))]
        if title == "Fine-tuning" or any("router/" in name for name in run.series):
            yield block(title, "".join(cards), grid=True) if cards else ""
    drawn = {name.removeprefix("val/") for panel in (*PANELS, *TUNING, *ROUTERS) for name in panel.names}
    drawn |= NOT_DRAWN | {"loss", "loss_topk", "loss_causal", "perplexity", "perplexity_causal", "perplexity_topk"}
    drawn |= {"train/loss", "train/lm_loss", "train/perplexity"}  # the loss again, in other words
    others = [card(chart) for chart in other_charts(run, drawn)]
    if others:
        yield details(f"{len(others)} other figures", f'<div class="grid">{"".join(others)}</div>')


# --- samples ----------------------------------------------------------------------------------------------------------


def samples(run: Run) -> str:
    """What the model wrote on the way, the last first; of a routed model each token with what computed it."""
    found = run.samples
    if len(found) > SAMPLES_AT_MOST:
        found = [found[round(n * (len(found) - 1) / (SAMPLES_AT_MOST - 1))] for n in range(SAMPLES_AT_MOST)]
    parts = []
    for number, row in enumerate(reversed(found)):
        step = number_or(row.get("step"))
        text = row["text"][:SAMPLE_CHARS] + (" ..." if len(row["text"]) > SAMPLE_CHARS else "")
        picture = shaded(*pieces) if (pieces := pieces_of(row)) else f"<pre>{safe(text) or ' '}</pre>"
        parts.append(details(f"after step {step}", picture, opened=number == 0))
    note = "" if len(found) == len(run.samples) else f" ({len(found)} of {len(run.samples)})"
    return block(f"Samples{note}", "".join(parts)) if parts else ""


def number_or(value: Any) -> str:
    found = numeric(value)
    return "?" if found is None or math.isnan(found) else f"{found:g}" if found < 1e6 else f"{found:.0f}"


def pieces_of(row: dict[str, Any]) -> tuple[list[tuple[str, int]], int] | None:
    """(texts, by how many routed layers each was computed), how many there are; None where a row does not say."""
    pieces, layers = row.get("pieces"), row.get("layers")
    if not isinstance(pieces, list) or not isinstance(layers, int) or not 1 <= layers <= 10_000:
        return None
    whole = [(p[0], p[1]) for p in pieces[:SAMPLE_PIECES] if isinstance(p, list) and len(p) == 2
             and isinstance(p[0], str) and isinstance(p[1], int) and 0 <= p[1] <= layers]  # fmt: skip
    return (whole, layers) if len(whole) == len(pieces[:SAMPLE_PIECES]) else None


# --- evaluations ------------------------------------------------------------------------------------------------------


def results(run: Run) -> Iterator[str]:
    """Tables of the evaluations that lie in the run folder."""
    for name in ("heldout.json", "tasks.json", "injection.json"):
        found = read_json_if_any(run.folder / name)
        for rows in (heldout_rows(found), harness_rows(found), injection_rows(found)):
            if len(rows) > 1:
                yield f"<h3>{name}</h3>" + table(rows[0], rows[1:])
        if isinstance(found.get("acceptance"), dict):
            verdict = [["yes" if held is True else "NO", str(text)] for text, held in found["acceptance"].items()]
            yield table(["held", "criterion"], verdict)
            yield f"<p>Verdict: <b>{'PASS' if found.get('pass') is True else 'FAIL'}</b></p>"


def heldout_rows(found: dict[str, Any]) -> list[list[str]]:
    """Of eval.py's held-out text: each figure with its standard error, a column for each way to compute it."""
    ways = [name for name, each in found.items() if isinstance(each, dict) and isinstance(each.get("loss"), dict)]
    rows = [[f"text: {found.get('data')}", *ways]]
    for key, what in (("loss", "nats per token"), ("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
        cells = []
        for way in ways:
            figure = found[way].get(key) if isinstance(found[way].get(key), dict) else {}
            value, error = numeric(figure.get("value", "")), numeric(figure.get("standard_error", ""))
            told = "" if error is None or math.isnan(error) else f" ± {short(error, 3)}"
            cells.append("n/a" if value is None else short(value, 5) + told)
        rows.append([what, *cells])
    return rows if ways else []


def harness_rows(found: dict[str, Any]) -> list[list[str]]:
    """{"results": {task: {metric: value, metric_stderr: value}}}, also with a filter as in `acc,none`."""
    rows = [["task", "metric", "value", "± standard error"]]
    tasks = found.get("results")
    for task, figures in tasks.items() if isinstance(tasks, dict) else ():
        for metric, value in figures.items() if isinstance(figures, dict) else ():
            name, comma, rest = metric.partition(",")
            if name.endswith("_stderr") or (plain := numeric(value)) is None:
                continue
            error = numeric(figures.get(f"{name}_stderr{comma}{rest}", figures.get(f"{metric}_stderr", "")))
            rows.append([task, metric.removesuffix(",none"), short(plain, 5), "" if error is None else short(error, 3)])
    return rows


def injection_rows(found: dict[str, Any]) -> list[list[str]]:
    """Of eval.py's injection suite: attack success and utility by group of rows and model, in per cent."""
    scores = found.get("scores")
    models = [name for name in scores if isinstance(scores[name], dict)] if isinstance(scores, dict) else []
    rows = [["%, with the 95 % interval", *models]]
    for what, key in (("attacks succeed", "attack_success"), ("benign requests right", "utility"),
                      ("right under attack", "utility_injected")):  # fmt: skip
        groups = list(dict.fromkeys(group for model in models for group in scores[model]))
        for group in groups if key == "attack_success" else groups[:1]:
            cells = [_share(scores[model].get(group), key) for model in models]
            rows.append([f"{what}: {group}", *cells])
    return rows


def _share(group: Any, key: str) -> str:
    try:
        low, high = group[key]["interval"]
        return f"{100 * group[key]['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    except (KeyError, TypeError, ValueError):
        return "n/a"


# --- where it comes from ----------------------------------------------------------------------------------------------


def configuration(run: Run) -> str:
    """What differs from config.yaml of this folder, then all of it."""
    if not run.config:
        return ""
    try:
        usual = flat(dump(load_config([], run.section)))
    except ConfigError:  # a config.yaml that nobody can read: then nothing can be compared with it
        usual = {}
    changed = [[key, value, usual.get(key, "no such key")] for key, value in used(run).items()
               if usual and value != usual.get(key) and key != "run.dir"]  # fmt: skip
    every = "\n".join(f"{key}: {value}" for key, value in used(run).items())
    told = "<p>Nothing differs from the defaults.</p>"
    if changed:
        rows = table(["key", "value", "default"], changed)
        told = details(f"{len(changed)} keys differ from the defaults", rows, opened=len(changed) <= 20)
    return block("Configuration", told + details("Everything", f"<pre>{safe(every)}</pre>"))


def provenance(run: Run) -> str:
    source = run.source
    command, versions = source.get("command"), source.get("versions")
    rows = [
        ["command", "python " + shlex.join(map(str, command)) if isinstance(command, list) else "not recorded"],
        ["device", source.get("device") or f"{run.value('run.device') or 'not recorded'}"],
        ["ranks", source.get("ranks", "")],
        ["commit", source.get("commit") or "not recorded"],
        ["uncommitted (SHA-256)", source.get("changes") or ""],
        ["platform", source.get("platform", "")],
        ["versions", ", ".join(f"{k} {v}" for k, v in versions.items() if v) if isinstance(versions, dict) else ""],
        ["gone on after steps", ", ".join(f"{step:.0f}" for step in run.resumes)],
    ]
    return block("Where it comes from", table([], [[name, str(value)] for name, value in rows if value]))


def status_of(run: Run) -> tuple[str, str]:
    """(one word, a sentence)"""
    word, reason = str(run.status.get("status") or "unknown"), str(run.status.get("reason") or "")
    sentence = {"running": "under way, or killed"}.get(word, reason)
    code = run.status.get("code")
    return word, f"exit code {code}: {sentence}" if code and sentence else sentence


def html_of(run: Run) -> str:
    """The page of a run."""
    word, sentence = status_of(run)
    tables = "".join(results(run))
    parts = [*curves(run), block("Evaluations", tables) if tables else "", samples(run), configuration(run)]
    device = str(run.source.get("device") or "")
    said = " · ".join(filter(None, (what_it_is(run), device)))
    return page(run.name, said, facts(run), "".join([*parts, provenance(run)]), word, sentence)


def picture(run: Run) -> str:
    """The loss as a file of its own."""
    from nanoqwen.pages import standalone

    chart = loss_chart(run)
    bits = last_of(run.of("val/bits_per_byte"))
    said = [f"{steps_done(run):,} steps"]
    said += [f"{bits:.3f} bits per byte of validation text"] if math.isfinite(bits) else []
    return standalone(chart, "Loss (nats per token)", ", ".join(said))


def attempt(folder: Path, warn: Callable[[str], None] = warn) -> None:
    """The report of a run that ends. Whatever is wrong with it is one warning: the run counts, not its picture."""
    try:
        write_atomic(folder / "report.html", html_of(read_run(folder)).encode("utf-8", "backslashreplace"))
    except Exception as error:
        warn(f"{folder}: no report.html: {type(error).__name__}: {' '.join(str(error).split()):.200}")


# --- several runs -----------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Runs that differ in nothing but their seed."""

    name: str
    runs: list[Run]


NOT_USED = {"train": ("finetune.", "lora.", "chat.", "contrast."), "finetune": ("train.", "model.")}


def used(run: Run) -> dict[str, str]:
    """The keys of the configuration that its script reads; the model of a fine-tuned one comes with its base."""
    return {key: value for key, value in run.config.items() if not key.startswith(NOT_USED.get(run.section, ()))}


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """{key: what each run has of it} for all keys in which the runs differ, but for where and how they are kept."""
    configs = [used(run) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    found = {key: [config.get(key, "") for config in configs] for key in keys if not WHERE.fullmatch(key)}
    found["commit"] = [str(run.source.get("commit") or "")[:12] for run in runs]
    found["uncommitted"] = [str(run.source.get("changes") or "")[:12] for run in runs]
    found["device"] = [str(run.source.get("device") or "") for run in runs]
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def grouped(runs: Sequence[Run], differing: dict[str, list[str]]) -> list[Group]:
    """Runs that differ in their seed alone, and each in it: the same seed twice is another code or another device."""
    decisive = [key for key in differing if key != "run.seed"]
    found: dict[tuple[str, ...], list[Run]] = {}
    for number, run in enumerate(runs):
        found.setdefault(
            tuple(differing[key][number] for key in decisive) if run.config else (str(number),), []
        ).append(run)
    groups = []
    for values, members in found.items():
        if len({run.config.get("run.seed") for run in members}) < len(members):
            groups += [Group(run.name, [run]) for run in members]
            continue
        said = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in zip(decisive, values, strict=False))
        if len(members) == 1:
            groups.append(Group(members[0].name, members))
        else:
            named = said if said and len(decisive) <= 3 else ", ".join(run.name for run in members)
            groups.append(Group(f"{named} ({len(members)} seeds)", members))
    return groups


COMPARED = [
    Panel("Validation loss", "nats per token", {"val/loss": ""}, log=True),
    Panel("Training loss, smoothed", "nats per token", {"loss": ""}, log=True),
    *PANELS,
    *TUNING,
    Panel("Share computed in use", "% of tokens", {"val/used": ""}, times=100),
]


def compared_charts(groups: Sequence[Group]) -> Iterator[str]:
    for panel in COMPARED:
        for number, (metric, what) in enumerate(panel.names.items()):
            lines = [
                line for n, group in enumerate(groups) for line in overlaid(group, metric, panel.times, f"c{n % 8}")
            ]
            if lines:
                title = panel.title if len(panel.names) == 1 else f"{panel.title}: {what}"
                yield card(Chart(title, panel.unit, lines, panel.log), wide=number == 0 and metric == "val/loss")


def overlaid(group: Group, metric: str, times: float, look: str) -> Iterator[Line]:
    """A line for one run; for several their mean, in a band of one standard deviation to either side."""
    found = [smoothed(run.of(metric))[0] if metric == "loss" else run.of(metric) for run in group.runs]
    found = [Series(one.x, times * one.y) for one in found if drawable(one)]
    if not found:
        return
    dots = metric.startswith("val/")
    if len(found) == 1:
        yield Line(group.name, *found[0], look=look, dots=dots)
        return
    steps, mean, sd = spread(found)
    yield Line(group.name, steps, mean, look=look, dots=dots, low=mean - sd, high=mean + sd)


FIGURES: dict[str, Callable[[Run], float]] = {
    "val/loss, last": lambda run: last_of(run.of("val/loss")),
    "val/loss, lowest": lambda run: lowest(run.of("val/loss"))[0],
    "bits per byte, last": lambda run: last_of(run.of("val/bits_per_byte")),
    "train loss, last (smoothed)": lambda run: last_of(smoothed(run.of("loss"))[0]),
    "attacks that succeed": lambda run: last_of(run.of("val/attack_success")),
    "benign requests right": lambda run: last_of(run.of("val/utility")),
    "tokens trained": lambda run: float(tokens_until(run).y[-1]) if len(tokens_until(run).y) else math.nan,
    "tokens/s, median": lambda run: median(run.of("tokens_per_s")),
    "memory, MB": lambda run: last_of(run.of("memory_mb")),
}


def mean_and_sd(values: Iterable[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    mean = short(float(np.mean(known)), 5)
    return f"{mean}\u00a0±\u00a0{short(float(np.std(known, ddof=1)), 2)}" if len(known) > 1 else mean


def comparison(runs: Sequence[Run]) -> str:
    """The page of several runs."""
    differing = differences(runs)
    groups = grouped(runs, differing)
    told = {name: figure for name, figure in FIGURES.items() if any(math.isfinite(figure(run)) for run in runs)}
    by_group = [[group.name, *(mean_and_sd(map(figure, group.runs)) for figure in told.values())] for group in groups]
    by_run = [
        [run.name, status_of(run)[0], f"{steps_done(run):,}", *(mean_and_sd([figure(run)]) for figure in told.values())]
        for run in runs
    ]
    charts = "".join(compared_charts(groups))
    return page(
        "Comparison of " + ", ".join(run.name for run in runs),
        f"{len(runs)} runs; those that differ in their seed alone are told as mean ± standard deviation",
        [],
        block("Figures", table(["group", *told], by_group, figures=True))
        + block("Curves", charts or "<p>No step has been logged.</p>", grid=bool(charts))
        + block("Each run", table(["run", "status", "steps", *told], by_run, figures=True))
        + block("What differs", table(["key", *(run.name for run in runs)], [[k, *v] for k, v in differing.items()])
                if differing else "<p>Nothing: the configurations are equal.</p>"),
    )  # fmt: skip


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nanoqwen.report", description="A page about one run, or about several."
    )
    if argv[:1] == ["compare"]:
        parser.prog += " compare"
        parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
        parser.add_argument("--output", type=Path, default=Path("compare.html"), help="default: compare.html")
        args = parser.parse_args(argv[1:])
        made = {args.output: comparison([read_run(Path(run)) for run in args.runs])}
    else:
        parser.add_argument("run", type=Path, metavar="RUN", help="a run folder; or: compare RUN RUN ...")
        parser.add_argument("--output", type=Path, help="default: report.html in the run folder")
        parser.add_argument("--svg", type=Path, metavar="FILE", help="write a picture of the loss instead")
        args = parser.parse_args(argv)
        run = read_run(args.run)
        made = {args.svg: picture(run)} if args.svg else {}
        if args.output or not args.svg:
            made[args.output or args.run / "report.html"] = html_of(run)
    for file, text in made.items():
        write_atomic(file, text.encode("utf-8", "backslashreplace"))
        print(f"wrote {file}")


if __name__ == "__main__":
    run_script(main)
