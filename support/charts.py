"""Charts as SVG: curves, points, and the curves of a run's metrics.jsonl.

No reader of the method needs this file.
"""

import html
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from support.files import read_lines

# Colours that colour-blind people can tell apart, on white and on black (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two values, `count` or so of them."""
    raw = (high - low) / count or 1.0
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def frame(points: list[tuple[float, float]], x_label: str, y_label: str, title: str):
    """An SVG's axes with ticks, units and title, and the function that takes a point to its place in it."""
    width, height, left, right, top, bottom = 480, 300, 76, 14, 34, 46
    (x0, x1), (y0, y1) = ((min(p[axis] for p in points), max(p[axis] for p in points)) for axis in (0, 1))
    x1, y1 = x1 if x1 > x0 else x0 + 1, y1 if y1 > y0 else y0 + (abs(y0) or 1) * 0.1

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return (left + (point[0] - x0) / (x1 - x0) * (width - left - right),
                height - bottom - (point[1] - y0) / (y1 - y0) * (height - top - bottom))

    parts = [f'<text x="{left}" y="18" class="title">{html.escape(title)}</text>']
    for x in ticks(x0, x1):
        px = place((x, y0))[0]
        parts.append(f'<path d="M{px:.1f} {height - bottom}v4" class="axis"/>'
                     f'<text x="{px:.1f}" y="{height - bottom + 17}" text-anchor="middle">{x:g}</text>')
    for y in ticks(y0, y1):
        py = place((x0, y))[1]
        parts.append(f'<line x1="{left}" y1="{py:.1f}" x2="{width - right}" y2="{py:.1f}" class="grid"/>'
                     f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>')
    middle = f'text-anchor="middle">{html.escape(x_label)}', f'text-anchor="middle">{html.escape(y_label)}'
    parts.append(f'<path d="M{left} {top}V{height - bottom}H{width - right}" class="axis"/>'
                 f'<text x="{(left + width - right) / 2}" y="{height - 8}" {middle[0]}</text>'
                 f'<text transform="translate(13 {(top + height - bottom) / 2}) rotate(-90)" {middle[1]}</text>')
    return parts, place, f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">'


def legend(entries: list[tuple[str, str]]) -> str:
    """Marks (SVG, 20 x 12) and names, below the picture, where they may wrap."""
    return '<p class="legend">' + "".join(
        f'<span><svg viewBox="0 0 20 12" width="20" height="12">{mark}</svg> {html.escape(name)}</span>'
        for mark, name in entries if name) + "</p>"


DASHES = ("", "7 3", "2 3", "9 3 2 3")  # the second way to tell curves apart


def line_chart(title: str, series: dict[str, list[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Curves {name: [(x, y), ...]} as SVG with axes and legend. Values that are not finite are left out."""
    series = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    parts, place, opening = frame([p for points in series.values() for p in points], x_label, y_label, title)
    entries = []
    for i, (name, points) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        style = f'stroke="{colour}" stroke-dasharray="{DASHES[i // len(COLOURS) % len(DASHES)]}"'
        places = [place(point) for point in points]
        parts.append(f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in places)}" class="curve" {style}/>')
        if len(points) <= 30:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
        entries.append((f'<line x1="0" y1="6" x2="20" y2="6" class="curve" {style}/>', name))
    return f'<div class="chart">{opening}{"".join(parts)}</svg>{legend(entries)}</div>'


def bar_chart(title: str, bars: dict[str, float]) -> str:
    """Shares {name: 0 to 1} as horizontal bars with their percentage, SVG. The longest one fills the width."""
    longest, parts = max(*bars.values(), 1e-9), []
    for i, (name, value) in enumerate(bars.items()):
        top, length = 34 + 30 * i, 230 * value / longest
        parts.append(f'<text x="172" y="{top + 15}" text-anchor="end">{html.escape(name)}</text>'
                     f'<rect x="180" y="{top}" width="{length:.1f}" height="20" fill="{COLOURS[i % len(COLOURS)]}"/>'
                     f'<text x="{length + 186:.1f}" y="{top + 15}">{100 * value:.1f} %</text>')
    return (f'<div class="chart wide"><svg viewBox="0 0 480 {34 + 30 * len(bars)}" role="img" '
            f'aria-label="{html.escape(title)}"><text x="0" y="18" class="title">{html.escape(title)}</text>'
            f'{"".join(parts)}</svg></div>')


MARKS = ('<circle cx="{0:.1f}" cy="{1:.1f}" r="3.2" {2}/>', '<path d="M{0:.1f} {1:.1f}m-3 3h6l-3-6z" {2}/>',
         '<path d="M{0:.1f} {1:.1f}m-2.8-2.8h5.6v5.6h-5.6z" {2}/>', '<path d="M{0:.1f} {1:.1f}m-3 0h6m-3-3v6" {2}/>')


def scatter_chart(title: str, points: Tensor, labels: Tensor, classes: list[str]) -> str:
    """Points [n, 2], a colour and a mark for each class, as SVG. Without `classes` all look the same."""
    parts, place, opening = frame(points.tolist(), "first main direction", "second", title)
    labels = labels if classes else torch.zeros(len(points), dtype=torch.int64)
    shown = sorted(set(labels.tolist()))[:len(COLOURS) * len(MARKS)]

    def mark(label: int, x: float, y: float) -> str:
        i = shown.index(label)
        colour = COLOURS[i % len(COLOURS)]
        return MARKS[i // len(COLOURS) if len(shown) > len(COLOURS) else i % len(MARKS)].format(
            x, y, f'fill="{colour}" stroke="{colour}" stroke-width="1.5" fill-opacity=".75"')

    parts += [mark(label, *place(point)) for point, label in zip(points.tolist(), labels.tolist()) if label in shown]
    return (f'<div class="chart wide">{opening}{"".join(parts)}</svg>'
            f'{legend([(mark(label, 10, 6), classes[label]) for label in shown if classes])}</div>')


# Title, unit of y, against what, and the names that belong into one chart.
CHARTS = (
    ("Loss", "loss", "step", "((?!commitment_).+_)?loss"),
    ("Loss of epochs", "loss", "epoch", "(val )?(cosine_)?loss"),
    ("Accuracy", "share of 1", "step", "(.+_)?accuracy"),
    # What is measured on validation images is a share of 1, but for what the other charts show.
    ("Hidden codes named rightly", "share of 1", "epoch", "val (mim|cls)_accuracy.*"),
    ("Accuracy of epochs", "share of 1", "epoch",
     "(?!val (mim|cls)_)(.+_)?accuracy|val (?!(mim|cls)_|.*(loss|perplexity|usage|_lr)$).+"),
    ("Codes in use", "perplexity (codes)", "epoch", "(val |batch_)?perplexity"),
    ("Codebook usage", "share of 1", "epoch", "(val )?usage"),
    ("Learning rate", "highest of all groups", "step", "lr"),
)


def curves_of(folders: list[Path]) -> list[tuple[str, str]]:
    """(stage, its charts as HTML) for each stage of these runs that took steps; each curve bears the run's name, if
    there are several runs."""
    stages, sections = {path.parent.name for folder in folders for path in folder.glob("*/metrics.jsonl")}, []
    order = ("tokenizer", "pretrain", "finetune", "finetune_scratch")
    for stage in sorted(stages, key=lambda stage: (order.index(stage) if stage in order else len(order), stage)):
        runs = {str(folder) if len(folders) > 1 else "": read_curves(folder / stage) for folder in folders
                if (folder / stage / "metrics.jsonl").is_file()}
        if any(curves["step"] for curves in runs.values()):
            sections.append((stage, f'<div class="charts">{"".join(charts(runs))}</div>'))
    return sections


def charts(runs: dict[str, dict]) -> list[str]:
    """The charts of one stage: of {run's name: what read_curves gives}."""
    return [line_chart(title, {f"{run} {name}".strip(): points for run, curves in runs.items()
                               for name, points in curves[kind].items() if re.fullmatch(names, name)}, kind, unit)
            for title, unit, kind, names in CHARTS]


def read_curves(folder: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """metrics.jsonl of a stage as curves {"step": {name: [(step, value)]}, "epoch": {name: [(epoch, value)]}}."""
    curves = {"step": {}, "epoch": {}}
    for line in read_lines(folder / "metrics.jsonl"):
        if "val" in line:
            values = line.get("train", {}) | {f"val {name}": value for name, value in line["val"].items()}
            x, kind = line["epoch"] + 1, "epoch"
        else:
            values, x, kind = {key: line[key] for key in line if key not in ("epoch", "step")}, line["step"], "step"
        for name, value in values.items():
            if isinstance(value, (int, float)):
                curves[kind].setdefault(name, []).append((x, value))
    return curves
