"""The look of a report: one HTML page without anything from elsewhere, light and dark, wide and narrow, on paper.

The page is complete without its script, which only shows the values under the pointer. Style and script are allowed by
their hashes and nothing else is: not even markup that slipped through could load, run or send anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from nanoqwen.plot import FONT, Chart, Line, draw, safe, short, thinned

SMALL, LARGE = (400, 220), (830, 512)  # pixels of a chart, and of the one that has four places on a wide screen
POINTS = 1_600  # told by a card under the pointer, over all its lines: what is drawn may be more
SHADES = 10  # of a token, and of the lines of layers

# Told apart also by those who see fewer colours, on light and on dark ground.
COLOURS = {
    "light": ("#2563ab", "#c2410c", "#15803d", "#7e3fb2", "#a16207", "#0e7490", "#be185d", "#57534e"),
    "dark": ("#6ea8ee", "#f59455", "#5fc27e", "#bd93e8", "#d9b44a", "#4fc0d3", "#f07fb0", "#b5afa8"),
}
GROUND = {  # paper, card, ink, quiet ink, hairline, grid, first and last of the layers
    "light": ("#f7f6f3", "#ffffff", "#1c1b19", "#6b6862", "#dfdcd5", "#ecebe6", "#a9c7ea", "#123a6b"),
    "dark": ("#141413", "#1e1e1c", "#ecebe7", "#a3a097", "#383631", "#2b2a27", "#274c78", "#b9d7fb"),
}
NAMES = ("paper", "card", "ink", "quiet", "hair", "grid", "r-low", "r-high")


def _variables(theme: str) -> str:
    named = [f"--{name}:{colour}" for name, colour in zip(NAMES, GROUND[theme], strict=True)]
    return ";".join([*named, *(f"--c{n}:{colour}" for n, colour in enumerate(COLOURS[theme]))])


PLOT_STYLE = (
    f":root{{color-scheme:light dark;{_variables('light')}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_variables('dark')}}}}}"
    + "".join(f".c{n}{{--k:var(--c{n})}}" for n in range(len(COLOURS["light"])))
    + "".join(
        f".r{n}{{--k:color-mix(in oklab,var(--r-high) {round(100 * n / (SHADES - 1))}%,var(--r-low))}}"
        for n in range(SHADES)
    )
    + """
.bold{--k:var(--ink)}
.line{fill:none;stroke:var(--k);stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
.line.faint{stroke-width:1;opacity:.32}
.line.bold{stroke-width:2.2}
.line.dashed{stroke-dasharray:5 4}
.band{fill:var(--k);opacity:.2;stroke:none}
circle{fill:var(--k);stroke:var(--card);stroke-width:1}
.grid line,line.grid{stroke:var(--grid)}
line.axis{stroke:var(--quiet)}
line.mark{stroke:var(--c6);stroke-dasharray:2 3}
line.cursor{stroke:var(--quiet);visibility:hidden}
.tick{fill:var(--quiet);font-size:11px;font-variant-numeric:tabular-nums}
"""
)
STYLE = (
    PLOT_STYLE
    + f"*{{box-sizing:border-box}}body{{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 {FONT}}}"
    + """
main,header{max-width:1320px;margin:0 auto;padding:0 20px}
header{padding-top:22px}
h1{font-size:25px;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:17px;margin:30px 0 10px}
h3{font-size:14px;margin:16px 0 6px}
.about{color:var(--quiet);margin:5px 0 0;overflow-wrap:anywhere}
.status{display:inline-block;font-size:13px;font-weight:600;border:1.5px solid var(--k);color:var(--k);
  border-radius:99px;padding:0 10px;margin-left:10px;vertical-align:4px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:1px;background:var(--card);
  border:1px solid var(--hair);border-radius:9px;overflow:hidden;margin:16px 0 0;padding:0}
.facts div{box-shadow:0 0 0 1px var(--hair);padding:9px 13px}
dt,dd.beneath,.unit{color:var(--quiet);font-size:12.5px}
dd{margin:0}
dd.value{font-size:21px;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,350px),1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--hair);border-radius:9px;padding:10px 12px 4px;
  min-width:0;display:flex;flex-direction:column;break-inside:avoid}
figcaption{display:flex;gap:8px;align-items:baseline;flex-wrap:wrap}
figcaption .at{margin-left:auto;color:var(--quiet);font-size:12.5px;font-variant-numeric:tabular-nums}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:0 13px;margin:1px 0 3px;padding:0;font-size:12.5px;
  color:var(--quiet)}
.legend i{display:inline-block;width:15px;height:0;border-top:2.5px solid var(--k);vertical-align:4px;
  margin-right:5px}
.legend .faint i{opacity:.4}
.legend .dashed i{border-top-style:dashed}
.legend .dots i{width:8px;height:8px;border:0;border-radius:8px;background:var(--k);vertical-align:0}
.legend b{color:var(--ink);font-variant-numeric:tabular-nums;font-weight:600}
svg{display:block;width:100%;height:auto;margin-top:auto;touch-action:pan-y}
svg.large{display:none}
@media (min-width:830px){.wide{grid-column:span 2;
  grid-row:span 2}.wide svg.large{display:block}.wide svg.small{display:none}}
details{background:var(--card);border:1px solid var(--hair);border-radius:9px;margin:8px 0;padding:0 13px}
summary{cursor:pointer;padding:7px 0;font-weight:600;font-size:14px}
details>:last-child{margin-bottom:12px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;
  font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:0 0 12px;max-height:560px;
  overflow:auto}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--hair);border-radius:9px;margin:8px 0}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 13px;border-top:1px solid var(--grid);vertical-align:top;overflow-wrap:anywhere;
  min-width:90px}
tr:first-child>*{border-top:0}
th{color:var(--quiet);font-weight:600}
td:first-child{white-space:nowrap}
.figures td{white-space:nowrap}
.figures td:first-child{white-space:normal;min-width:130px}
footer{max-width:1320px;margin:26px auto 0;padding:0 20px 30px;color:var(--quiet);font-size:12.5px}
.shade span{border-radius:2px;box-decoration-break:clone;-webkit-box-decoration-break:clone}
"""
    + "".join(
        f".s{n}{{background:color-mix(in oklab,var(--c0) {round(60 * n / SHADES)}%,var(--card))}}"
        for n in range(SHADES + 1)
    )
    + f"@media print{{:root{{color-scheme:light;{_variables('light')}}}body{{background:none;font-size:12px}}"
    + "details::details-content{content-visibility:visible}pre{max-height:none}"
    + ".grid{grid-template-columns:repeat(2,1fr)}figure,.facts,details,.scroll{break-inside:avoid}}"
    + "@media (max-width:600px){main,header{padding:0 12px}header{padding-top:14px}td:first-child{white-space:normal}"
    + ".facts{grid-template-columns:repeat(2,1fr)}.facts div{padding:7px 10px}dd.value{font-size:18px}}"
)
SCRIPT = """
for (const figure of document.querySelectorAll("figure")) {
  const told = figure.querySelector("script"), at = figure.querySelector(".at");
  if (!told) continue;
  const lines = JSON.parse(told.textContent), values = [...figure.querySelectorAll(".legend b")];
  const last = values.map(value => value.textContent);
  for (const svg of figure.querySelectorAll("svg")) {
    const [left, right, low, high] = svg.dataset.x.split(" ").map(Number), cursor = svg.querySelector(".cursor");
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width - left) / (right - left);
      const step = low + Math.min(1, Math.max(0, share)) * (high - low);
      let near = null;
      lines.forEach(([xs, ys], n) => {
        let a = 0, b = xs.length - 1;
        while (b - a > 1) { const m = a + b >> 1; if (xs[m] > step) b = m; else a = m; }
        const k = step - xs[a] > xs[b] - step ? b : a;
        if (near === null || Math.abs(xs[k] - step) < Math.abs(near - step)) near = xs[k];
        values[n].textContent = ys[k] === null ? "n/a" : String(+ys[k].toPrecision(5));
      });
      at.textContent = "step " + Math.round(near ?? step);
      const x = left + share * (right - left);
      cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.style.visibility = "visible";
    });
    svg.addEventListener("pointerleave", () => {
      last.forEach((text, n) => { values[n].textContent = text; });
      at.textContent = ""; cursor.style.visibility = "hidden";
    });
  }
}
"""


# --- parts ------------------------------------------------------------------------------------------------------------


def told(line: Line, lines: int) -> list[list[float | None]]:
    """[steps, values] for the script. A dot is told to the last digit, a point of a curve to six."""
    kept = thinned(line.x, line.y, max(30, POINTS // (2 * lines)))
    xs, ys = np.asarray(line.x, float)[kept].tolist(), np.asarray(line.y, float)[kept].tolist()
    return [[int(x) if x == int(x) else x for x in xs], ys if line.dots else [float(f"{y:.6g}") for y in ys]]


def card(chart: Chart, wide: bool = False) -> str:
    """A chart with its title, its legend and the numbers behind it."""
    items = []
    for line in chart.lines:
        known = np.asarray(line.y, float)[np.isfinite(line.y)]
        look = line.look + (" dots" if line.dots else "")
        value = short(float(known[-1]), 5) if len(known) else "n/a"
        items.append(f'<li class="{look}"><i></i>{safe(line.name)} <b>{value}</b></li>')
    data = json.dumps([told(line, len(chart.lines)) for line in chart.lines], separators=(",", ":"), allow_nan=False)
    large = draw(chart, *LARGE, look="large") if wide else ""
    return (
        f"<figure{' class=wide' if wide else ''}><figcaption><b>{safe(chart.title)}</b> "
        f'<span class="unit">{safe(chart.unit)}</span><span class="at"></span></figcaption>'
        f'<ul class="legend">{"".join(items)}</ul>{draw(chart, *SMALL, look="small")}{large}'
        f'<script type="application/json">{data.replace("<", chr(92) + "u003c")}</script></figure>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], figures: bool = False) -> str:
    """Of text, whose cells are broken where they must be; or of figures, which stay whole and scroll."""
    top = "<tr>" + "".join(f"<th>{safe(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll{" figures" * figures}"><table>{top}{body}</table></div>'


def block(title: str, inside: str, grid: bool = False) -> str:
    return f"<section><h2>{safe(title)}</h2>{f'<div class=grid>{inside}</div>' if grid else inside}</section>"


def details(title: str, inside: str, opened: bool = False) -> str:
    """A part that can be folded away."""
    return f"<details{' open' if opened else ''}><summary>{safe(title)}</summary>{inside}</details>"


def shaded(pieces: Sequence[tuple[str, int]], layers: int) -> str:
    """A text whose tokens are the darker, the more of the routed layers computed them."""

    def span(text: str, used: int) -> str:
        return f'<span class="s{round(SHADES * used / layers)}" title="{used} of {layers}">{safe(text)}</span>'

    shown = sorted({round(n * layers / min(layers, 8)) for n in range(min(layers, 8) + 1)})
    legend = " ".join(span(f" {n} ", n) for n in shown)
    body = "".join(span(text, used) for text, used in pieces)
    return f'<p class="unit shade">computed by {legend} of {layers} routed layers</p><pre class="shade">{body}</pre>'


def page(
    title: str, about: str, facts: Sequence[tuple[str, str, str]], body: str, status: str = "", reason: str = ""
) -> str:
    """The whole document."""
    colour = {"done": "c2", "running": "c0", "preempted": "c4", "failed": "c6"}.get(status, "c7")
    badge = f'<span class="status {colour}">{safe(status)}</span>' if status else ""
    told = "".join(
        f'<div><dt>{safe(what)}</dt><dd class="value">{safe(value)}</dd><dd class="beneath">{safe(beneath)}</dd></div>'
        for what, value, beneath in facts
    )
    policy = (
        f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{safe(title)} - nanoqwen</title><style>{STYLE}</style></head>\n"
        f'<body><header><h1>{safe(title)}{badge}</h1><p class="about">{safe(about)}</p>'
        + (f'<p class="about">{safe(reason)}</p>' if reason else "")
        + (f'<dl class="facts">{told}</dl>' if told else "")
        + f"</header>\n<main>{body}</main>\n<footer>nanoqwen, report.py. Curves are thinned to the lowest and highest"
        f" value of each column of pixels; metrics.jsonl has every step.</footer>\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def standalone(chart: Chart, title: str, said: str) -> str:
    """A chart as an SVG file with its own colours, title and legend."""
    width, height, head = 820, 400, 62
    entries, x = [], 24.0
    for line in chart.lines:
        entries.append(f'<path class="line {line.look}" d="M{x:.0f} 52h18"/>')
        entries.append(f'<text class="name" x="{x + 24:.0f}" y="56">{safe(line.name)}</text>')
        x += 46 + 6.4 * len(line.name)
    inside = draw(chart, width, height, head=head).partition(">")[2].removesuffix("</svg>")
    style = (
        PLOT_STYLE
        + f"text{{font-family:{FONT};fill:var(--quiet)}}.title{{font-size:16px;font-weight:600;fill:var(--ink)}}"
    )
    style += ".said,.name{font-size:12px}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{style}</style><rect width="{width}" height="{height}" rx="9" fill="var(--card)"/>'
        f'<text class="title" x="24" y="30">{safe(title)}</text>'
        f'<text class="said" x="{width - 14}" y="30" text-anchor="end">{safe(said)}</text>'
        f"{''.join(entries)}{inside}</svg>\n"
    )
