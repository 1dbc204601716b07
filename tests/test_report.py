"""The page of a run: its numbers are those of the run, it loads nothing, and no text in it becomes more than text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import runs

from nanoqwen import report
from nanoqwen.errors import run_script
from nanoqwen.plot import Scale, draw, safe, short, thinned, ticks
from nanoqwen.routing import RoutingConfig, penalty_weights
from nanoqwen.run_reader import read_run, rows_of, smoothed

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "<script>alert(1)</script>\"><img src=x onerror=alert(2)>'/*</style></title></textarea></svg><!--]]>"
    "&lt;b&gt;\x00\x1b[2J\x9b\u202egnp.exe\u2066\u200f\ud800javascript:alert(3)"
)


# --- runs made by hand ------------------------------------------------------------------------------------------------


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def step_row(step: int, seed: int = 0, **more: object) -> dict:
    loss = 2 + 5 / step + 0.1 * math.sin(step + seed)
    row = {"step": step, "loss": loss, "grad_norm": 1 + 1 / step, "targets": 64.0, "skipped": 0.0, "lr": 1e-3 / step}
    row |= {"epoch": step / 9, "cursor": step, "batch_sha": f"{step:016x}"}
    if step % 5 == 0:
        row |= {"tokens_per_s": 320.0, "mfu": 0.25, "mfu_full": 0.3, "memory_mb": 100.0 + step}
    return row | more


def write_run(folder: Path, steps: int = 60, seed: int = 0, **config: str) -> Path:
    """A finished run of `steps` steps, five of them in a second, evaluated at every tenth."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(1, steps + 1):
        rows.append(step_row(step, seed))
        if step % 10 == 0:
            rows.append({"step": step, "val/loss": 2.5 + 1 / step + seed / 100, "val/bits_per_byte": 1.5 + 1 / step})
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(folder / "samples.jsonl", [{"step": 10, "text": "def f(x):\n    return x < 3"}])
    values = {"run.seed": str(seed), "train.steps": str(steps), "train.lr": "0.001"} | config
    sections: dict[str, list[str]] = {}
    for key, value in values.items():
        sections.setdefault(key.partition(".")[0], []).append(f"  {key.partition('.')[2]}: {value}\n")
    (folder / "config.yaml").write_text("".join(f"{name}:\n{''.join(lines)}" for name, lines in sections.items()))
    (folder / "status.json").write_text('{"status": "done", "code": 0, "reason": ""}')
    source = {"commit": "c0ffee", "versions": {"torch": "2.13.0"}, "command": ["train.py"], "device": "a CPU"}
    (folder / "source.json").write_text(json.dumps(source))
    return folder


class Page(HTMLParser):
    """What a browser would find in a page, as far as it matters here."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.within: dict[str, list[str]] = {"script": [], "style": []}
        self.text, self._open = "", None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag in self.within:
            self._open = tag
            self.within[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = None if tag == self._open else self._open

    def handle_data(self, data: str) -> None:
        if self._open:
            self.within[self._open][-1] += data
        else:
            self.text += data

    @property
    def charts(self) -> list[list]:
        """The data blocks, in order: each a list of [steps, values]."""
        return [json.loads(text) for text in self.within["script"] if text.startswith("[")]


def page_of(folder: Path) -> Page:
    return Page(report.html_of(read_run(folder)))


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_page_are_those_of_the_run(tmp_path: Path):
    run = write_run(tmp_path / "run")
    rows = runs.lines(run / "metrics.jsonl")
    page = page_of(run)
    (each, validation), rate, norm, bits, speed, *_ = page.charts

    def column(name: str, digits: int | None = 6) -> list[list]:
        found = [(row["step"], row[name]) for row in rows if name in row]
        return [[s for s, _ in found], [float(f"{v:.{digits}g}") if digits else v for _, v in found]]

    assert each == column("loss")
    assert rate == [column("lr")]
    assert norm == [column("grad_norm")]
    assert speed == [column("tokens_per_s")]
    assert validation == column("val/loss", None)  # to the last digit
    assert bits == [column("val/bits_per_byte", None)]
    best = min(row["val/loss"] for row in rows if "val/loss" in row)
    assert f"lowest {best:.5g} at step 60" in page.text
    assert "60of 60 planned" in page.text
    assert "3,840" in page.text  # 60 x 64 tokens
    assert "12 s320 tokens/s, MFU 25 %" in page.text  # 3,840 tokens at 320 a second


def test_smoothing_is_the_mean_of_the_last_steps():
    series = report.Series(np.arange(1.0, 201.0), np.sin(np.arange(200.0)))
    series.y[20] = math.nan
    found, width = smoothed(series)
    assert width == 4
    for n, value in enumerate(found.y):
        window = [v for v in series.y[max(0, n - 3) : n + 1] if math.isfinite(v)]
        assert value == pytest.approx(statistics.mean(window), abs=1e-12)


def test_a_spike_of_one_step_stays_visible():
    rng = np.random.default_rng(0)
    x, y = np.arange(50_000.0), rng.normal(size=50_000)
    y[31_234], y[17] = 1e3, math.nan
    kept = thinned(x, y, 300)
    assert len(kept) <= 2 * 300 + 2
    assert {0, 31_234, 49_999} <= set(kept.tolist())
    assert 17 not in kept
    columns: dict[int, list[int]] = {}  # against the obvious way
    for n in range(50_000):
        if n != 17:
            columns.setdefault(min(int(x[n] / 49_999 * 300), 299), []).append(n)
    for inside in columns.values():
        assert {min(inside, key=y.__getitem__), max(inside, key=y.__getitem__)} <= set(kept.tolist())


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.9, 7.7), (-3, 40), (1e-9, 3e-9), (0, 123_456_789), (0.997, 1.001)]
)
def test_ticks_are_round_and_lie_between_the_ends(low: float, high: float):
    found = ticks(low, high, 5)
    assert 3 <= len(found) <= 8
    slack = (high - low) * 1e-5
    assert all(low - slack <= value <= high + slack for value in found)
    step = found[1] - found[0]
    assert float(f"{step:.6e}"[:8]) in (1, 2, 5)
    assert np.allclose(np.diff(found), step)


def test_ticks_of_decades():
    assert ticks(0.5, 2e4, 5, log=True) == [1, 10, 100, 1000, 10_000]
    assert ticks(0.05, 3, 5, log=True) == [0.05, 0.1, 0.2, 0.5, 1, 2]


def test_a_logarithmic_scale_is_one():
    scale = Scale(1.0, 100.0, 0.0, 200.0, log=True)
    assert float(scale(10.0)) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3.73036, "3.73"), (1234, "1,234"), (12_345, "12.35k"), (1_228_800, "1.229M"), (4e-4, "4e-4"),
     (0.004, "0.004"), (-0.5, "-0.5"), (99.96, "99.96"), (3e13, "30T"), (math.nan, "n/a"), (math.inf, "n/a")],
)  # fmt: skip
def test_numbers_for_a_person(value: float, text: str):
    assert short(value) == text


# --- nothing but text, and nothing from elsewhere ---------------------------------------------------------------------

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "h1", "h2", "h3", "p"),
    *("b", "i", "span", "ul", "li", "dl", "div", "dt", "dd", "figure", "figcaption", "svg", "line", "path", "circle"),
    *("text", "script", "details", "summary", "pre", "table", "tr", "th", "td"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "title", "open", "type", "role", "aria-label"),
    *("data-x", "viewbox", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "d", "text-anchor"),
}
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def assert_inert(text: str) -> Page:
    """Of a whole page: only what report.py itself writes is markup, and nothing of it leads elsewhere."""
    page = Page(text)
    assert page.tags <= TAGS
    assert {name for _, name, _ in page.attributes} <= ATTRIBUTES
    assert not UNSEEN.search(text)
    assert not re.search(r"url\(|@import|expression\(|javascript:(?!alert\(3\))", text, re.IGNORECASE)
    for block in page.within["script"][:-1]:
        json.loads(block)
    policy = next(v for tag, name, v in page.attributes if tag == "meta" and name == "content" and "default-src" in v)
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.within[kind][-1].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    return page


def write_hostile(folder: Path) -> Path:
    """A run in which every text, name and key is an attack."""
    run = write_run(folder, **{"train.optimizer": json.dumps(HOSTILE), "data.train": json.dumps([HOSTILE])})
    rows = [step_row(step, **{f"val/{HOSTILE}": 0.5, f"router/{HOSTILE}/{HOSTILE}": 0.5}) for step in range(1, 30)]
    write_rows(run / "metrics.jsonl", [*rows, {"step": 30, "event": HOSTILE, "from": HOSTILE}])
    sample = {"step": HOSTILE, "text": HOSTILE, "layers": 2, "pieces": [[HOSTILE, 1], [HOSTILE, 2]]}
    write_rows(run / "samples.jsonl", [sample, {"step": 2, "text": HOSTILE}])
    (run / "status.json").write_text(json.dumps({"status": HOSTILE, "code": 1, "reason": HOSTILE}))
    (run / "source.json").write_text(json.dumps(dict.fromkeys(("commit", "device", "platform"), HOSTILE)
                                                | {"command": [HOSTILE], "versions": {HOSTILE: HOSTILE}}))  # fmt: skip
    (run / "tasks.json").write_text(
        json.dumps({"results": {HOSTILE: {HOSTILE: 1.0}}, "acceptance": {HOSTILE: HOSTILE}})
    )
    (run / "heldout.json").write_text(json.dumps({"data": HOSTILE, HOSTILE: {"loss": {"value": HOSTILE}}}))
    share = {"value": 0.5, "interval": [0.1, 0.9]}
    (run / "injection.json").write_text(json.dumps({"scores": {HOSTILE: {HOSTILE: {"attack_success": share}}}}))
    return run


def test_s07_hostile_text_stays_text_wherever_it_stands(tmp_path: Path):
    name = "<script>alert(1)<∕script>\"><img onerror='x'>\u202e]]>"
    run = write_hostile(tmp_path / name)
    page = assert_inert(report.html_of(read_run(run)).encode("utf-8", "backslashreplace").decode())
    shown = safe(HOSTILE).encode("utf-8", "backslashreplace").decode()
    assert page.text.count(Page(shown).text) >= 15  # it is there, to be read
    assert_inert(report.comparison([read_run(run), read_run(run)]))
    ElementTree.fromstring(report.picture(read_run(run)))


def test_an_ordinary_page_loads_nothing(tmp_path: Path):
    page = assert_inert(report.html_of(read_run(write_run(tmp_path / "run"))))
    assert len(page.charts) == 7
    assert "no-referrer" in [value for _, _, value in page.attributes]


def test_letters_of_the_world_are_left_alone():
    text = "日本語 עברית العربية 👩\u200d👧 é e\u0301\n\tx"
    assert safe(text) == text


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path):
    """Whenever, wherever and in whatever order sets come out."""
    run = write_hostile(tmp_path / "a" / "run")
    shutil.copytree(run, tmp_path / "b" / "run")
    report.attempt(run)
    code = f"import pathlib; from nanoqwen import report; report.attempt(pathlib.Path({str(tmp_path / 'b' / 'run')!r}))"
    env = {"PYTHONHASHSEED": "3", "TZ": "X3", "LC_ALL": "C", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
    assert (run / "report.html").read_bytes() == (tmp_path / "b" / "run" / "report.html").read_bytes()


# --- whatever lies in the folder --------------------------------------------------------------------------------------


def test_a_run_of_100_000_steps_is_a_page_of_less_than_2_mb_within_seconds(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=10)
    rows = (json.dumps(step_row(step)) + "\n" for step in range(1, 100_001))
    (run / "metrics.jsonl").write_text("".join(rows))
    started = time.process_time()
    text = report.html_of(read_run(run))
    assert time.process_time() - started < 10
    assert len(text.encode()) < 2_000_000
    assert "100,000of 10 planned" in Page(text).text


def test_what_is_torn_missing_or_null_is_left_out(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=20)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(json.dumps(step_row(21, loss=None, grad_norm=None, skipped=1.0)).encode() + b"\n")
        file.write(json.dumps({"step": 21, "event": "resume", "from": "x", "versions": {}, "changed": None}).encode())
        file.write(b'\n[1, 2]\n"text"\n{"step": "7", "loss": 1}\n{"loss": 1}\n{"step": null}\n\xff\xfe\n')
        file.write(b'{"step": 22, "loss": true, "lr": 1e400, "x": ' + b"9" * 400 + b"}\n" + b"[" * 9999 + b"\n")
        file.write(b'{"step": 23, "lo')
    with (run / "samples.jsonl").open("ab") as file:
        file.write(b'{"step": 9}\n{"step": 9, "text": 5}\n{"step": 20, "te')
    page = page_of(run)
    assert page.charts[0][0][0] == list(range(1, 21))
    assert "step 21: not finite, skipped" in page.text
    assert "gone on after step 21" in page.text
    for name in ("samples.jsonl", "config.yaml", "source.json", "status.json", "metrics.jsonl"):
        (run / name).unlink()
        (run / "status.json").touch()  # which alone makes it a run, one that has not come far
        assert_inert(report.html_of(read_run(run)))
    assert "No step has been logged" in page_of(run).text


@pytest.mark.parametrize("seed", range(10))
def test_whatever_the_numbers_there_is_a_page(tmp_path: Path, seed: int):
    rng = random.Random(seed)
    strange = [0, -1, 1e-300, -1e-9, 1e99, -1e99, 1e308, -1e308, 10**400, None, "1", True, [], {}, 5e-324, 3.5]
    names = ["loss", "lr", "grad_norm", "targets", "tokens_per_s", "mfu", "skipped", "val/loss", "val/bits_per_byte",
             "router/1/causal_bce", "router/mean/causal_bce", "val/utility", "x"]  # fmt: skip
    run = write_run(tmp_path / "run")
    few = rng.sample(strange, rng.randint(1, 4))
    rows = []
    for step in range(rng.choice([1, 2, 3, 90])):
        figures = {name: rng.choice(few) for name in names if rng.random() < 0.7}
        rows.append({"step": rng.choice([step, step, rng.choice(strange)])} | figures)
    write_rows(run / "metrics.jsonl", rows)
    page = assert_inert(report.html_of(read_run(run)))
    assert not re.search(r"\b(nan|inf)\b", " ".join(str(v) for _, _, v in page.attributes), re.IGNORECASE)
    assert_inert(report.comparison([read_run(run), read_run(run)]))
    ElementTree.fromstring(report.picture(read_run(run)))


def test_of_a_step_that_stands_twice_the_later_row_counts(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=9)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_row(5, loss=9.5)) + "\n")
    steps, losses = page_of(run).charts[0][0]
    assert steps == list(range(1, 10))
    assert losses[4] == 9.5


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        ("failed", 7, "exit code 7: no <luck>"),
        ("preempted", 75, "exit code 75"),
        ("running", 0, "under way, or killed"),
    ],
)
def test_a_run_that_is_not_done_has_a_page_too(tmp_path: Path, status: str, code: int, said: str):
    run = write_run(tmp_path / "run")
    (run / "status.json").write_text(json.dumps({"status": status, "code": code, "reason": "no <luck>"}))
    page = page_of(run)
    assert f"run{status}" in page.text
    assert said in page.text


def refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """(exit code, stderr) of `python report.py ARGUMENTS`, which has to write nothing to stdout."""
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    with pytest.raises(SystemExit) as left:
        run_script(report.main)
    said = capsys.readouterr()
    assert said.out == ""
    return left.value.code, said.err


def test_a_folder_that_is_no_run_is_one_line_and_code_4(tmp_path: Path, monkeypatch, capsys):
    base = write_run(tmp_path / "runs" / "base")
    for folder, instead in ((tmp_path / "runs", "a folder of runs: base"), (tmp_path / "no", "nothing there")):
        for arguments in ([str(folder)], ["compare", str(base), str(folder)]):
            code, said = refused(arguments, monkeypatch, capsys)
            assert code == 4
            assert said == (
                f"error: {folder}: expected a run folder with metrics.jsonl or status.json, got {instead}\n"
            )
    assert not list(tmp_path.rglob("*.html"))


def test_the_command_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    report.main([str(a)])
    report.main([str(a), "--output", str(tmp_path / "x.html")])
    report.main([str(a), "--svg", str(tmp_path / "x.svg")])
    report.main(["compare", str(a), str(b), "--output", str(tmp_path / "c.html")])
    assert capsys.readouterr().out.split() == [
        word for path in (a / "report.html", tmp_path / "x.html", tmp_path / "x.svg", tmp_path / "c.html")
        for word in ("wrote", str(path))
    ]  # fmt: skip
    assert (a / "report.html").read_bytes() == (tmp_path / "x.html").read_bytes()
    assert len((tmp_path / "x.svg").read_bytes()) < 60_000
    assert ElementTree.parse(tmp_path / "x.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_file_that_cannot_be_written_is_one_line_and_code_6(tmp_path: Path, monkeypatch, capsys):
    run = write_run(tmp_path / "a")
    code, said = refused([str(run), "--output", str(tmp_path / "no" / "x.html")], monkeypatch, capsys)
    assert code == 6
    assert said.count("\n") == 1


# --- what else is shown -----------------------------------------------------------------------------------------------


def test_what_differs_from_the_defaults_comes_first(tmp_path: Path):
    page = page_of(write_run(tmp_path / "run", **{"model.hidden_size": "96", "train.clip": "1.0"}))
    assert "model.hidden_size96128" in page.text
    assert "train.lr0.0010.004" in page.text
    assert page.text.count("train.clip") == 1  # among everything alone
    assert page.text.index("keys differ") < page.text.index("train.clip")


def test_evaluations_in_the_folder_become_tables(tmp_path: Path):
    run = write_run(tmp_path / "run")
    figures = {"acc,none": 0.51234, "acc_stderr,none": 0.0123, "alias": "arc", "f1": 1, "f1_stderr": "N/A"}
    (run / "tasks.json").write_text(json.dumps({"results": {"arc_easy": figures}}))
    loss, bits = {"value": 1.25, "standard_error": 0.0125}, {"value": 2.5, "standard_error": None}
    held = {"data": "notes", "loss": {"loss": loss, "perplexity": 3, "bits_per_byte": bits, "rows": 4}}
    (run / "heldout.json").write_text(json.dumps(held))
    share = {"value": 0.125, "interval": [0.1, 0.15]}
    scores = {name: {"all rows": {"attack_success": share, "utility": share}} for name in ("base", "fine-tuned")}
    found = {"scores": scores, "acceptance": {"it works": False}, "pass": False}
    (run / "injection.json").write_text(json.dumps(found))
    text = page_of(run).text
    assert "nats per token1.25 ± 0.0125" in text
    assert "perplexityn/a" in text
    assert re.search(r"bits per byte2\.5(?! ±)", text)
    assert "arc_easyacc0.512340.0123" in text
    assert "arc_easyf11" in text
    assert "attacks succeed: all rows12.5 [10.0, 15.0]12.5 [10.0, 15.0]" in text
    assert "NOit works" in text
    assert "Verdict: FAIL" in text


def test_unknown_metrics_are_drawn_too(tmp_path: Path):
    run = write_run(tmp_path / "run")
    write_rows(run / "metrics.jsonl", [step_row(step, **{"weather/rain": step / 2}) for step in range(1, 9)])
    page = page_of(run)
    assert "1 other figures" in page.text or "other figure" in page.text
    assert "weather/rain" in page.text
    assert [list(range(1, 9)), [step / 2 for step in range(1, 9)]] in page.charts[-1]


def test_every_penalty_of_a_router_has_its_curve():
    drawn = {name for panel in report.ROUTERS for name in panel.names}
    for kind in ("mod", "dtf", "tdtf"):
        assert {f"train/{name}" for name in penalty_weights(RoutingConfig(kind=kind))} <= drawn


def test_a_band_and_a_gap_are_drawn():
    x = np.arange(6.0)
    y = np.array([1.0, 2.0, math.nan, 4.0, math.nan, 6.0])
    line = report.Line("l", x, y, low=y - 1, high=y + 1)
    drawn = draw(report.Chart("t", "", [line]), 400, 200)
    path = re.search(r'class="line c0" d="([^"]*)"', drawn)[1]
    assert path.count("M") == 3  # three pieces
    assert path.count("h0") == 2  # two of which are points
    assert 'class="band c0"' in drawn


# --- several runs -----------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_become_mean_and_deviation(tmp_path: Path):
    seeds = [read_run(write_run(tmp_path / f"s{seed}", seed=seed)) for seed in (1, 2, 4)]
    other = read_run(write_run(tmp_path / "other", seed=1, **{"train.lr": "0.5"}))
    page = assert_inert(report.comparison([*seeds, other]))
    chart = page.charts[0]
    assert len(chart) == 2  # the group, and the run that differs in more
    expected = [
        statistics.mean(2.5 + 1 / step + seed / 100 for seed in (1, 2, 4)) for step in range(10, 61, 10)
    ]  # fmt: skip
    assert chart[0][0] == list(range(10, 61, 10))
    assert chart[0][1] == pytest.approx(expected, abs=1e-12)
    finals = [2.5 + 1 / 60 + seed / 100 for seed in (1, 2, 4)]
    assert f"{statistics.mean(finals):.5g}\u00a0±\u00a0{statistics.stdev(finals):.2g}" in page.text
    assert "run.seed1241" in page.text
    assert "train.lr0.0010.0010.0010.5" in page.text
    assert "train.steps0" not in page.text.partition("What differs")[2]


def test_the_same_seed_twice_is_no_second_seed(tmp_path: Path):
    """Two runs of one configuration on two commits are a comparison of the code, and its result would be averaged."""
    same = [read_run(write_run(tmp_path / name / "base", seed=1)) for name in ("a", "b")]
    assert len(assert_inert(report.comparison(same)).charts[0]) == 2
    source = json.loads((tmp_path / "b" / "base" / "source.json").read_text())
    (tmp_path / "b" / "base" / "source.json").write_text(json.dumps(source | {"commit": "f" * 40}))
    other = [same[0], read_run(tmp_path / "b" / "base"), read_run(write_run(tmp_path / "c", seed=2))]
    groups = report.grouped(other, report.differences(other))
    assert sorted(len(group.runs) for group in groups) == [1, 2]


def test_keys_that_the_script_does_not_read_are_not_shown(tmp_path: Path):
    run = read_run(write_run(tmp_path / "run", **{"lora.rank": "7", "train.lr": "0.5"}))
    assert run.section == "train"
    assert "lora.rank" not in report.used(run)
    assert report.used(run)["train.lr"] == "0.5"


def test_runs_of_unequal_length_are_averaged_where_all_have_a_value(tmp_path: Path):
    series = [read_run(write_run(tmp_path / str(n), steps=n, seed=n)).of("val/loss") for n in (20, 40)]
    steps, mean, sd = report.spread(series)
    assert steps.tolist() == [10, 20]
    pairs = [[s.y[n] for s in series] for n in range(2)]
    assert mean.tolist() == pytest.approx([statistics.mean(pair) for pair in pairs], abs=1e-12)
    assert sd.tolist() == pytest.approx([statistics.stdev(pair) for pair in pairs], abs=1e-12)


# --- at the end of a run ----------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_report(reference: Path):
    text = (reference / "report.html").read_text()
    assert text == report.html_of(read_run(reference))
    page = assert_inert(text)
    rows = runs.rows(reference)
    assert page.charts[0][0] == [[r["step"] for r in rows], [float(f"{r['loss']:.6g}") for r in rows]]
    assert all(row["memory_mb"] > 10 for row in rows)  # it is a line at each step of this run
    assert json.loads((reference / "source.json").read_text())["device"] in page.text


def test_a_report_that_fails_is_a_warning_and_the_run_is_done(corpus: Path, starter: runs.Starter, tmp_path: Path):
    first = "from nanoqwen import report\nreport.page = None"
    started = starter.run(*runs.options(corpus, tmp_path / "run", "--train.steps=4"), first=first)
    assert runs.status(tmp_path / "run")["status"] == "done"
    assert re.search(r"^warning: .*: no report.html: TypeError", started.stderr, re.MULTILINE)
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_run_that_fails_leaves_its_report(corpus: Path, starter: runs.Starter, tmp_path: Path):
    options = runs.options(
        corpus, tmp_path / "run", "--train.lr=1e30", "--train.skip_limit=1", "--train.warmup_steps=0"
    )
    starter.run(*options, code=7)
    assert "runfailed" in Page((tmp_path / "run" / "report.html").read_text()).text


def test_samples_of_a_routed_run_say_what_computed_each_token(corpus: Path, starter: runs.Starter, tmp_path: Path):
    """Oracle: the model of the checkpoint, asked again."""
    from nanoqwen.routing import tokens_used
    from nanoqwen.weights import load_model

    run = tmp_path / "run"
    starter.run(*runs.options(corpus, run, "--routing.kind=mod", "--routing.capacity=0.5", "--train.sample_tokens=12"))
    row = list(rows_of(run / "samples.jsonl"))[-1]
    model, tokenizer = load_model(run / runs.CHECKPOINTS / "step-00000020")
    texts, counts = zip(*row["pieces"], strict=True)
    assert row["layers"] == len(model.routers) == 1
    assert "".join(texts) == row["text"]  # the prompt is the mark between documents, which is no text
    ids = [tokenizer.eos_id, *tokenizer.encode(row["text"])]
    if len(ids) == 1 + len(counts):  # each byte by itself, none of which needed a repair
        assert tokens_used(model, ids)[1:] == list(counts)
    page = Page((run / "report.html").read_text())
    shades = [int(v) for tag, name, value in page.attributes if (tag, name) == ("span", "title") for v in value[:1]]
    assert shades[2 : 2 + len(counts)] == list(counts)  # after the legend's 0 and 1
    assert "Thresholds" in page.text


# --- in a browser -----------------------------------------------------------------------------------------------------


def browse(folder: Path, file: Path, *more: str) -> tuple[str, str]:
    """(the document as the browser has it in the end, what its console and network said)"""
    net = folder / "net.json"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
               "--host-resolver-rules=MAP * 127.0.0.1:9", "--enable-logging=stderr", f"--log-net-log={net}",
               "--disable-component-update", "--disable-background-networking", "--no-first-run",
               "--virtual-time-budget=2000", *more, "--dump-dom", f"file://{file}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def asked_of(folder: Path) -> set[str]:
    """The hosts that a page wanted something from; the browser itself asks its maker."""
    events = json.loads((folder / "net.json").read_text())["events"]
    urls = [str(e["params"]["url"]) for e in events if isinstance(e.get("params"), dict) and "url" in e["params"]]
    hosts = {urlsplit(url).hostname for url in urls if url.startswith(("http", "ws", "ftp"))}
    return {host for host in hosts if not re.search(r"(^|\.)(google|googleapis|gvt1|gstatic)\.com$", host)}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("made", [write_run, write_hostile])
def test_a_browser_has_nothing_to_complain_about_and_asks_nobody(made, tmp_path: Path):
    run = made(tmp_path / "run")
    report.attempt(run)
    dom, console = browse(tmp_path, run / "report.html")
    assert console == ""
    assert "<figure" in dom
    assert Page(dom).tags <= TAGS | {"tbody"}
    assert asked_of(tmp_path) == set()
    (tmp_path / "control.html").write_text('<img src="https://elsewhere.example/x.png">')  # would it be seen?
    browse(tmp_path, tmp_path / "control.html")
    assert asked_of(tmp_path) == {"elsewhere.example"}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_script_of_the_page_tells_the_value_under_the_pointer(tmp_path: Path):
    """The page itself must not be changed for it: a second script has a hash of its own."""
    run = write_run(tmp_path / "run")
    text = report.html_of(read_run(run))
    script = """
      const svg = [...document.querySelectorAll("figure")][1].querySelector("svg"), box = svg.getBoundingClientRect();
      const [left, right, low, high] = svg.dataset.x.split(" ").map(Number);
      const x = box.left + (left + (30 - low) / (high - low) * (right - left)) * box.width / 400;
      svg.dispatchEvent(new PointerEvent("pointermove", {clientX: x, clientY: box.top + 9}));
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ").replace(
        "</body>", f"<script>{script}</script></body>"
    )
    (tmp_path / "x.html").write_text(text)
    dom, console = browse(tmp_path, tmp_path / "x.html")
    assert console == ""
    figure = dom.split("<figure")[2]
    assert '<span class="at">step 30</span>' in figure
    assert f"rate <b>{1e-3 / 30:.4e}</b>".replace("e-05", "e-5") in figure or "<b>0.000033333</b>" in figure
