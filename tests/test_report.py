"""The page of a run: its numbers are those of the run, it loads nothing, and no text in it becomes more than text."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import runs

from nanoqwen import report
from nanoqwen.errors import run_script
from nanoqwen.routing import RoutingConfig, penalty_weights
from nanoqwen.run_reader import Series, band, read_jsonl, read_run, smoothed

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
    def data(self) -> dict:
        return json.loads(self.within["script"][0])

    @property
    def charts(self) -> list[dict]:
        return [chart for section in self.data["sections"] for chart in section["charts"]]

    @property
    def curves(self) -> list[list]:
        """Of each chart, in order, its lines as [steps, values]."""
        return [[[line["x"], line["y"]] for line in chart["lines"]] for chart in self.charts]


def page_of(folder: Path) -> Page:
    return Page(report.run_page(read_run(folder)))


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_page_are_those_of_the_run(tmp_path: Path):
    run = write_run(tmp_path / "run")
    rows = runs.lines(run / "metrics.jsonl")
    page = page_of(run)
    (each, validation), rate, norm, bits, speed, *_ = page.curves

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


def smoothed_directly(series: Series, width: float) -> list[float]:
    """Slow twin: at each step the sum over all others, with weights that fall by the distance."""
    known = np.isfinite(series.y)
    weights = np.exp(-2 * np.abs(series.x[:, None] - series.x[None, known]) / width)
    return (weights @ series.y[known] / weights.sum(1)).tolist()


def test_smoothing_is_a_weighted_mean_without_bias_at_the_start():
    series = Series(np.r_[np.arange(1.0, 101.0), np.arange(110.0, 300.0, 10.0)], np.sin(np.arange(119.0)))
    series.y[20] = math.nan
    values, expected = smoothed(series, 24).y, smoothed_directly(series, 24)
    assert math.isnan(values[20])
    assert np.delete(values, 20).tolist() == pytest.approx(np.delete(expected, 20).tolist(), abs=1e-12)
    falling = Series(np.arange(1.0, 201.0), np.arange(200.0, 0.0, -1.0))
    assert smoothed(falling, 24).y[99:101] == pytest.approx(falling.y[99:101], abs=0.01)  # no lag


def test_a_spike_of_one_step_stays_visible():
    rng = np.random.default_rng(0)
    x, y = np.arange(50_000.0), rng.normal(size=50_000)
    y[31_234], y[17] = 1e3, math.nan
    kept = report.thinned(x, y, 300)
    assert len(kept) <= 2 * 300 + 2
    assert {0, 31_234, 49_999} <= set(kept.tolist())
    assert 17 not in kept
    columns: dict[int, list[int]] = {}  # against the obvious way
    for n in range(50_000):
        if n != 17:
            columns.setdefault(min(int(x[n] / 49_999 * 300), 299), []).append(n)
    for inside in columns.values():
        assert {min(inside, key=y.__getitem__), max(inside, key=y.__getitem__)} <= set(kept.tolist())


def test_what_was_left_out_is_in_the_means_that_are_smoothed():
    rng = np.random.default_rng(0)
    x, y = np.arange(1.0, 10_001.0), rng.normal(size=10_000)
    data = report.line_json(report.Line("l", x, y), 100)
    assert len(data["x"]) <= 202
    assert data["mean"][0] == pytest.approx(x.reshape(100, 100).mean(1).tolist(), rel=0.01)
    assert data["mean"][1] == pytest.approx(y.reshape(100, 100).mean(1).tolist(), abs=0.05)
    assert "mean" not in report.line_json(report.Line("l", x[:200], y[:200]), 100)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3.73036, "3.73"), (1234, "1,234"), (12_345, "12.35k"), (1_228_800, "1.229M"), (4e-4, "4e-4"),
     (0.004, "0.004"), (-0.5, "-0.5"), (99.96, "99.96"), (3e13, "30T"), (math.nan, "n/a"), (math.inf, "n/a")],
)  # fmt: skip
def test_numbers_for_a_person(value: float, text: str):
    assert report.short(value, 4) == text


def test_steps_stand_for_tokens_and_for_seconds(tmp_path: Path):
    (axes,) = page_of(write_run(tmp_path / "run")).data["runs"]
    assert axes["tokens"] == [list(range(61)), [64 * step for step in range(61)]]
    assert axes["seconds"] == [list(range(0, 61, 5)), list(range(0, 13))]


# --- nothing but text, and nothing from elsewhere ---------------------------------------------------------------------

TEMPLATE = report.TEMPLATE.read_text(encoding="utf-8")
TAGS = set(re.findall(r"<([a-z]\w*)", TEMPLATE)) | {
    *("h1", "h2", "h3", "p", "b", "span", "dl", "div", "dt", "dd", "section"),
    *("details", "summary", "pre", "table", "thead", "tbody", "tr", "th", "td"),
}
DRAWN = {*("b", "i", "button", "figure", "figcaption", "svg", "line", "path", "circle", "rect", "text"), *TAGS}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "title", "open", "type", "id", "hidden", "max"),
    *("value", "data-head", "data-value"),
}
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def assert_inert(text: str) -> Page:
    """Of a whole page: only what report.py itself writes is markup, and nothing of it leads elsewhere."""
    page = Page(text)
    assert page.tags <= TAGS
    assert {name for _, name, _ in page.attributes} <= ATTRIBUTES
    assert not UNSEEN.search(text)
    assert not re.search(r"url\(|@import|expression\(|javascript:(?!alert\(3\))", text, re.IGNORECASE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", TEMPLATE)
    assert len(page.within["script"]) == 2  # the data and the program
    assert not re.search("[<\u2028\u2029]", page.within["script"][0])
    assert not UNSEEN.search(json.dumps(page.data, ensure_ascii=False))
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
    page = assert_inert(report.run_page(read_run(run)).encode("utf-8", "backslashreplace").decode())
    shown = report.printable(HOSTILE)
    assert page.text.count(shown) >= 15  # it is there, to be read
    assert shown in [chart["title"] for chart in page.charts]
    assert_inert(report.comparison_page([read_run(run), read_run(run)]))


def test_text_that_looks_like_a_blank_of_the_template_is_text(tmp_path: Path):
    run = write_run(tmp_path / "{{data}}")
    (run / "status.json").write_text(json.dumps({"status": "failed", "code": 1, "reason": "{{policy}} \u2028 <!--"}))
    page = assert_inert(report.run_page(read_run(run)))
    assert "{{data}}failed" in page.text
    assert "exit code 1: {{policy}} \\u2028 <!--" in page.text


def test_an_ordinary_page_loads_nothing(tmp_path: Path):
    page = assert_inert(report.run_page(read_run(write_run(tmp_path / "run"))))
    assert len(page.charts) == 7
    assert page.text.index("Configuration") > page.text.index("need JavaScript")  # numbers and tables stand without it
    assert "no-referrer" in [value for _, _, value in page.attributes]


def test_letters_of_the_world_are_left_alone():
    text = "日本語 עברית العربية 👩\u200d👧 é e\u0301\n\tx"
    assert report.printable(text) == text


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path):
    """Whenever, wherever and in whatever order sets come out."""
    run = write_hostile(tmp_path / "a" / "run")
    shutil.copytree(run, tmp_path / "b" / "run")
    report.write_report(run)
    other = str(tmp_path / "b" / "run")
    code = f"import pathlib; from nanoqwen import report; report.write_report(pathlib.Path({other!r}))"
    env = {"PYTHONHASHSEED": "3", "TZ": "X3", "LC_ALL": "C", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
    assert (run / "report.html").read_bytes() == (tmp_path / "b" / "run" / "report.html").read_bytes()


# --- whatever lies in the folder --------------------------------------------------------------------------------------


def test_a_run_of_100_000_steps_is_a_page_of_less_than_2_mb_within_seconds(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=10)
    rows = (json.dumps(step_row(step)) + "\n" for step in range(1, 100_001))
    (run / "metrics.jsonl").write_text("".join(rows))
    started = time.process_time()
    text = report.run_page(read_run(run))
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
    assert page.curves[0][0][0] == list(range(1, 21))
    assert page.charts[0]["marks"] == [[21, "step 21: not finite, skipped"], [21, "resumed after step 21"]]
    for name in ("samples.jsonl", "config.yaml", "source.json", "status.json", "metrics.jsonl"):
        (run / name).unlink()
        (run / "status.json").touch()  # which alone makes it a run, one that has not come far
        assert_inert(report.run_page(read_run(run)))
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
    page = assert_inert(report.run_page(read_run(run)))
    assert not re.search(r"\b(nan|inf)\b", " ".join(str(v) for _, _, v in page.attributes), re.IGNORECASE)
    assert_inert(report.comparison_page([read_run(run), read_run(run)]))


def test_of_a_step_that_stands_twice_the_later_row_counts(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=9)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_row(5, loss=9.5)) + "\n")
    steps, losses = page_of(run).curves[0][0]
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


def test_the_name_of_a_folder_cannot_control_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture):
    report.main([str(write_run(tmp_path / "a\x1b[31mb"))])
    assert "\\x1b[31mb" in (said := capfd.readouterr().out)
    assert "\x1b" not in said


def test_the_command_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    report.main([str(a)])
    report.main([str(a), "--output", str(tmp_path / "x.html")])
    report.main(["compare", str(a), str(b), "--output", str(tmp_path / "c.html")])
    assert capsys.readouterr().out.split() == [
        word for path in (a / "report.html", tmp_path / "x.html", tmp_path / "c.html")
        for word in ("wrote", str(path))
    ]  # fmt: skip
    assert (a / "report.html").read_bytes() == (tmp_path / "x.html").read_bytes()


def test_a_run_is_watched_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, pages = write_run(tmp_path / "run"), []
    done, running = (run / "status.json").read_text(), '{"status": "running", "code": 0, "reason": ""}'
    (run / "status.json").write_text(running)

    def sleep(seconds: float) -> None:
        assert seconds == 3
        pages.append((run / "report.html").read_text())
        (run / "status.json").write_text(running if len(pages) < 2 else done)

    monkeypatch.setattr(report.time, "sleep", sleep)
    report.main([str(run), "--watch", "3"])
    refresh = '<meta http-equiv="refresh" content="3">'
    assert [text.count(refresh) for text in pages] == [1, 1]
    assert 'http-equiv="refresh"' not in (run / "report.html").read_text()  # it has ended
    assert (run / "report.html").read_text() == report.run_page(read_run(run))


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
    assert page.data["sections"][-1]["title"] == "Other metrics"
    assert page.charts[-1]["title"] == "weather/rain"
    assert page.curves[-1] == [[list(range(1, 9)), [step / 2 for step in range(1, 9)]]]


def test_every_penalty_of_a_router_has_its_curve():
    drawn = {name for panel in report.ROUTERS for name in panel.names}
    for kind in ("mod", "dtf", "tdtf"):
        assert {f"train/{name}" for name in penalty_weights(RoutingConfig(kind=kind))} <= drawn


def test_a_band_and_a_gap_are_in_the_data():
    x = np.arange(6.0)
    y = np.array([1.0, 2.0, math.nan, 4.0, math.nan, 6.0])
    data = report.line_json(report.Line("l", x, y, deviation=np.full(6, 0.5)), 100)
    assert data["y"] == [1, 2, None, 4, None, 6]
    assert data["low"] == [0.5, 1.5, None, 3.5, None, 5.5]
    assert data["high"] == [1.5, 2.5, None, 4.5, None, 6.5]


# --- several runs -----------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_become_mean_and_deviation(tmp_path: Path):
    seeds = [read_run(write_run(tmp_path / f"s{seed}", seed=seed)) for seed in (1, 2, 4)]
    other = read_run(write_run(tmp_path / "other", seed=1, **{"train.lr": "0.5"}))
    page = assert_inert(report.comparison_page([*seeds, other]))
    chart = page.charts[0]["lines"]
    assert [line["name"] for line in chart] == ["lr 0.001 (3 seeds)", "other"]  # which differs in more
    expected = [
        statistics.mean(2.5 + 1 / step + seed / 100 for seed in (1, 2, 4)) for step in range(10, 61, 10)
    ]  # fmt: skip
    assert chart[0]["x"] == list(range(10, 61, 10))
    assert chart[0]["y"] == pytest.approx(expected, abs=1e-12)
    sd = statistics.stdev((0.01, 0.02, 0.04))
    assert chart[0]["low"] == pytest.approx([value - sd for value in expected], abs=1e-12)
    assert chart[0]["high"] == pytest.approx([value + sd for value in expected], abs=1e-12)
    finals = [2.5 + 1 / 60 + seed / 100 for seed in (1, 2, 4)]
    assert f"{statistics.mean(finals):.5g}\u00a0±\u00a0{statistics.stdev(finals):.2g}" in page.text
    assert "run.seed1241" in page.text
    assert "train.lr0.0010.0010.0010.5" in page.text
    assert "train.steps0" not in page.text.partition("What differs")[2]


def test_the_same_seed_twice_is_no_second_seed(tmp_path: Path):
    """Two runs of one configuration on two commits are a comparison of the code, and its result would be averaged."""
    same = [read_run(write_run(tmp_path / name / "base", seed=1)) for name in ("a", "b")]
    assert len(assert_inert(report.comparison_page(same)).charts[0]["lines"]) == 2
    source = json.loads((tmp_path / "b" / "base" / "source.json").read_text())
    (tmp_path / "b" / "base" / "source.json").write_text(json.dumps(source | {"commit": "f" * 40}))
    other = [same[0], read_run(tmp_path / "b" / "base"), read_run(write_run(tmp_path / "c", seed=2))]
    groups = report.grouped(other, report.differences(other))
    assert sorted(len(group.runs) for group in groups) == [1, 2]


def test_keys_that_the_script_does_not_read_are_not_shown(tmp_path: Path):
    run = read_run(write_run(tmp_path / "run", **{"lora.rank": "7", "train.lr": "0.5"}))
    assert run.section == "train"
    assert "lora.rank" not in report.used_settings(run)
    assert report.used_settings(run)["train.lr"] == "0.5"


def test_runs_of_unequal_length_are_averaged_where_all_have_a_value(tmp_path: Path):
    series = [read_run(write_run(tmp_path / str(n), steps=n, seed=n)).metric("val/loss") for n in (20, 40)]
    (steps, mean), sd = band(series)
    assert steps.tolist() == [10, 20]
    pairs = [[s.y[n] for s in series] for n in range(2)]
    assert mean.tolist() == pytest.approx([statistics.mean(pair) for pair in pairs], abs=1e-12)
    assert sd.tolist() == pytest.approx([statistics.stdev(pair) for pair in pairs], abs=1e-12)


# --- at the end of a run ----------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_report(reference: Path):
    text = (reference / "report.html").read_text()
    assert text == report.run_page(read_run(reference))
    page = assert_inert(text)
    rows = runs.rows(reference)
    assert page.curves[0][0] == [[r["step"] for r in rows], [float(f"{r['loss']:.6g}") for r in rows]]
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
    from nanoqwen.routing import layers_per_token
    from nanoqwen.weights import load_model

    run = tmp_path / "run"
    starter.run(*runs.options(corpus, run, "--routing.kind=mod", "--routing.capacity=0.5", "--train.sample_tokens=12"))
    row = list(read_jsonl(run / "samples.jsonl"))[-1]
    model, tokenizer = load_model(run / runs.CHECKPOINTS / "step-00000020")
    texts, counts = zip(*row["pieces"], strict=True)
    assert row["layers"] == len(model.routers) == 1
    assert "".join(texts) == row["text"]  # the prompt is the mark between documents, which is no text
    ids = [tokenizer.eos_id, *tokenizer.encode(row["text"])]
    if len(ids) == 1 + len(counts):  # each byte by itself, none of which needed a repair
        assert layers_per_token(model, ids)[1:] == list(counts)
    page = Page((run / "report.html").read_text())
    shades = [int(v) for tag, name, value in page.attributes if (tag, name) == ("span", "title") for v in value[:1]]
    assert shades[2 : 2 + len(counts)] == list(counts)  # after the legend's 0 and 1
    assert "Thresholds" in [chart["title"] for chart in page.charts]


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
    report.write_report(run)
    dom, console = browse(tmp_path, run / "report.html")
    assert console == ""
    assert "<figure" in dom
    assert Page(dom).tags <= DRAWN
    assert asked_of(tmp_path) == set()
    (tmp_path / "control.html").write_text('<img src="https://elsewhere.example/x.png">')  # would it be seen?
    browse(tmp_path, tmp_path / "control.html")
    assert asked_of(tmp_path) == {"elsewhere.example"}


def scripted(folder: Path, text: str, script: str) -> tuple[dict, str]:
    """(what `script` puts into `answers` in the page, the document afterwards). It has a hash of its own."""
    script = f"{{ const answers = {{}}; {script}; document.title = JSON.stringify(answers); }}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ").replace(
        "</body>", f"<script>{script}</script></body>"
    )
    (folder / "x.html").write_text(text)
    dom, console = browse(folder, folder / "x.html")
    assert console == ""
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1])), dom


HELPERS = """
  const frame = () => charts.forEach(draw); // a browser without a window need not draw any
  const at = (chart, x) => chart.plot.getBoundingClientRect().left + chart.left + chart.sx(x);
  const point = (chart, kind, x, y = 90) => chart.plot.dispatchEvent(new PointerEvent(kind, {button: 0, bubbles: true,
    pointerId: 1, clientX: at(chart, x), clientY: chart.plot.getBoundingClientRect().top + y}));
  const set = (name, value) => { controls[name].value = value; controls[name].dispatchEvent(new Event("input",
    {bubbles: true})); };
  Element.prototype.setPointerCapture = () => {};
  frame();
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_shows_values_zooms_hides_and_changes_its_axes(tmp_path: Path):
    run = write_run(tmp_path / "run")
    answers, dom = scripted(tmp_path, report.run_page(read_run(run)), HELPERS + """
      const [loss, rate] = charts, button = document.querySelector(".legend button");
      point(rate, "pointermove", 30); answers.tip = rate.plot.querySelector(".tip").textContent;
      point(loss, "pointerdown", 20); point(loss, "pointermove", 40); point(loss, "pointerup", 40); frame();
      answers.zoom = [loss.range.x, rate.range.x, controls.reset.hidden];
      loss.plot.dispatchEvent(new MouseEvent("dblclick")); frame();
      answers.full = [loss.range.x, controls.reset.hidden];
      button.click(); frame(); answers.hidden = loss.curves.map(curve => curve.line.name);
      button.click(); frame(); answers.back = loss.curves.map(curve => curve.line.name);
      set("axis", "tokens"); frame(); answers.tokens = loss.curves[1].x;
      set("axis", "seconds"); frame(); answers.seconds = loss.curves[1].x;
      answers.label = [...loss.plot.querySelectorAll("text")].at(-1).textContent;
      set("axis", "step"); set("logy", "linear"); frame(); answers.linear = loss.range.log;
      set("logy", "log"); controls.logx.click(); frame(); answers.log = [rate.range.log, rate.range.x[0]];
      answers.middle = (rate.sx(10) - rate.sx(1)) / (rate.sx(100) - rate.sx(10))
    """)  # fmt: skip
    assert answers["tip"].startswith("step 30 · 1,920 tokens · 6 s")
    assert answers["tip"].endswith("rate 3.33333e-5")
    assert answers["zoom"][0] == pytest.approx([20, 40], abs=0.5)
    assert answers["zoom"][1:] == [answers["zoom"][0], False]
    assert answers["full"] == [[0, 60], True]
    assert (answers["hidden"], answers["back"]) == (["validation"], ["train", "validation"])
    assert answers["tokens"] == [640 * n for n in range(1, 7)]
    assert answers["seconds"] == pytest.approx([2 * n for n in range(1, 7)])
    assert answers["label"] == "training time (s)"
    assert (answers["linear"], answers["log"]) == (False, [True, 1])
    assert answers["middle"] == pytest.approx(1)
    assert "<figure" in dom


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_numbers_that_the_script_makes_are_right(tmp_path: Path):
    """Smoothing against its twin in Python, which is held against a direct sum; ticks; numbers; order of a table."""
    runs_of = [read_run(write_run(tmp_path / f"r{seed}", seed=seed, steps=60 + seed)) for seed in (3, 1, 2)]
    ends = [[0, 1], [2.9, 7.7], [-3, 40], [1e-9, 3e-9], [0, 123_456_789], [0.997, 1.001]]
    values = [0, 3.73036, 1234, 12_345, 1_228_800, 4e-4, 0.004, -0.5, 99.96, 3e13]
    answers, _ = scripted(tmp_path, report.comparison_page(runs_of), HELPERS + f"""
      answers.ticks = {ends}.map(([low, high]) => ticks(low, high, 5));
      answers.decades = [ticks(0.5, 2e4, 5, true), ticks(0.05, 3, 5, true)];
      answers.short = {values}.map(value => short(value, 4));
      answers.labels = labels([0, 0.0005, 0.001, 0.0015]);
      const line = charts[1].lines[0]; answers.line = [line.x, line.y];
      answers.smooth = smooth(answers.line, 24)[1];
      const table = [...document.querySelectorAll("table.sortable")].at(-1), loss = table.querySelectorAll("button")[2];
      const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
      loss.click(); answers.rising = names(); loss.click(); answers.falling = names()
    """)  # fmt: skip
    for (low, high), found in zip(ends, answers["ticks"], strict=True):
        assert 3 <= len(found) <= 8
        slack = (high - low) * 1e-5
        assert all(low - slack <= value <= high + slack for value in found)
        assert float(f"{found[1] - found[0]:.6e}"[:8]) in (1, 2, 5)
        assert np.allclose(np.diff(found), found[1] - found[0])
    assert answers["decades"] == [[1, 10, 100, 1000, 10_000], [0.05, 0.1, 0.2, 0.5, 1, 2]]
    assert answers["short"] == [report.short(value, 4) for value in values]
    assert answers["labels"] == ["0", "5e-4", "1e-3", "1.5e-3"]
    series = Series(*(np.array(column, float) for column in answers["line"]))
    assert answers["smooth"] == pytest.approx(smoothed(series, 24).y.tolist(), abs=1e-12)
    assert answers["rising"] == ["r1", "r2", "r3"]
    assert answers["falling"] == ["r3", "r2", "r1"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_scrolls_sideways(tmp_path: Path, width: int):
    """In a frame of that width, for no window of Chromium is as narrow as a phone."""
    run = write_run(tmp_path / "run", **{"data.train": json.dumps(["/a/long/path" * 9])})
    texts = [
        report.run_page(read_run(run)),
        report.comparison_page([read_run(run), read_run(write_hostile(tmp_path / "h"))]),
    ]
    for text in texts:
        inner = html.escape(text.encode("utf-8", "backslashreplace").decode())
        frame = f'<title></title><body><iframe srcdoc="{inner}" width="{width}" height="900"></iframe></body>'
        answers, _ = scripted(tmp_path, frame, """
          const inside = document.querySelector("iframe");
          inside.onload = () => {
            const page = inside.contentDocument.documentElement;
            answers.scroll = page.scrollWidth; answers.width = page.clientWidth;
            answers.figures = page.querySelectorAll("figure").length; document.title = JSON.stringify(answers);
          }
        """)  # fmt: skip
        assert answers["figures"] > 5
        assert answers["scroll"] <= answers["width"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "config.yaml", "status.json", "source.json"])
def test_a_pipe_in_a_run_folder_holds_no_reader_up(name: str, tmp_path: Path):
    folder = write_run(tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    report.write_report(folder)
