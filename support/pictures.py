import base64
import colorsys
import html
import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

import data
from beitv2 import MaskedImageModel, masked_positions
from support.processes import rank
from support.run import Run


HIT, MISS = (0, 114, 178), (230, 159, 0)  # blue and orange, which colour-blind people can tell apart


@torch.no_grad()
def paint_epoch(run: Run, model: MaskedImageModel, tokenizer: nn.Module, val_set, epoch: int) -> None:
    """Write OUTPUT_DIR/pretrain/epoch-NN.png: four validation images, their masks, and what each head got right."""
    if rank() > 0:
        return
    model.eval()
    view = data.ValView(val_set, run.config.data.image_size)
    chosen = torch.linspace(0, len(val_set) - 1, min(4, len(val_set))).long().tolist()
    images = torch.stack([view[i]["image"] for i in chosen])
    masked = fixed_masks(len(chosen), model.grid, run.config.pretrain).to(run.device)
    with run.autocast():
        inputs = data.to_unit(images.to(run.device))
        codes = tokenizer.token_ids(inputs).gather(1, masked)
        heads = list(model(data.normalize(inputs), masked).values())
    rows = []
    for i, image in enumerate(images):
        panels = [image.permute(1, 2, 0).numpy(), mask_picture(image, masked[i], None, model.grid)]
        panels += [mask_picture(image, masked[i], logits[i].argmax(dim=-1) == codes[i], model.grid) for logits in heads]
        rows.append(np.concatenate(panels, axis=1))
    picture = np.concatenate(rows)
    Image.fromarray(picture).save(run.folder / f"epoch-{epoch + 1:02d}.png")
    run.picture("masks and hits", picture)


def fixed_masks(count: int, grid: int, cfg) -> torch.Tensor:
    """Masked positions [count, M] for pictures, drawn as in training, but the same each time."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.stack([data.block_mask(grid, cfg.num_masked, cfg.min_block, generator) for _ in range(count)])
    return masked_positions(mask, cfg.num_masked)


def mask_picture(image: torch.Tensor, masked: torch.Tensor, hits: torch.Tensor | None, grid: int,
                 scale: int = 1) -> np.ndarray:
    """The image [3, S, S] with its masked patches [M] grey, or, with `hits` [M], blue with a dot where a head was
    right and orange with a cross where it was wrong: uint8 [S * scale, S * scale, 3]."""
    size = image.shape[-1] // grid * scale
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for m, place in enumerate(masked.tolist()):
        top, left = place // grid * size, place % grid * size
        box, middle = (left, top, left + size - 1, top + size - 1), (left + size // 2, top + size // 2)
        r = max(1, size // 6)
        inner = (middle[0] - r, middle[1] - r, middle[0] + r, middle[1] + r)
        if hits is None:
            draw.rectangle(box, fill=(128, 128, 128))
        elif hits[m]:
            draw.rectangle(box, fill=HIT, outline="white")
            draw.ellipse(inner, fill="white")
        else:
            draw.rectangle(box, fill=MISS, outline="white")
            draw.line(inner, fill="black", width=max(1, size // 12))
            draw.line((inner[0], inner[3], inner[2], inner[1]), fill="black", width=max(1, size // 12))
    return np.asarray(picture)


def paint(file: Path, image: Tensor, masks: list[Tensor]) -> None:
    """Write an image uint8 [3, h, w], enlarged to its masks [H, W], and beside it each mask in colours over the image.
    Where a mask has 255, only the image shows."""
    image = F.interpolate(data.to_unit(image)[None], size=masks[0].shape, mode="bilinear")[0]
    image = image.permute(1, 2, 0).numpy()  # [H, W, 3]
    panels, class_colours = [image], palette()
    for mask in masks:
        panels.append(np.where(mask.numpy()[..., None] == 255, image, 0.4 * image + 0.6 * class_colours[mask.numpy()]))
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = np.concatenate(panels, axis=1)
    Image.fromarray((255 * picture).round().astype(np.uint8)).save(file)


def palette() -> np.ndarray:
    """256 colours [256, 3] in [0, 1], neighbours far apart: hues at the golden angle, in three brightnesses."""
    return np.array([colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.9, 0.55, 0.75)[i % 3], (1.0, 0.85, 0.6)[i % 3])
                     for i in range(256)])


# Colours that colour-blind people can tell apart, on white and on black (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def pixels(image: Tensor) -> np.ndarray:
    """uint8 [3, H, W] -> uint8 [H, W, 3]."""
    return image.permute(1, 2, 0).numpy()


def enlarge(picture: np.ndarray, factor: int) -> np.ndarray:
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def patch_with_context(image: Tensor, row: int, column: int, patch_size: int, scale: int) -> np.ndarray:
    """A patch, framed, with half a patch of its surroundings on each side: uint8 [2 P scale, 2 P scale, 3]."""
    margin = patch_size // 2
    padded = F.pad(image[None].float(), [margin] * 4, mode="replicate")[0].byte()
    top, left = row * patch_size, column * patch_size
    picture = enlarge(pixels(padded[:, top:top + 2 * patch_size, left:left + 2 * patch_size]), scale)
    return framed(picture, margin * scale, margin * scale, patch_size * scale)


def framed(picture: np.ndarray, left: int, top: int, side: int) -> np.ndarray:
    """The picture with a square marked by a frame of black and white, which shows on any colour."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline="black", width=2)
    draw.rectangle((left, top, left + side - 1, top + side - 1), outline="white")
    return np.asarray(image)


def token_map(ids: Tensor, colours: np.ndarray, cell: int) -> np.ndarray:
    """Codes [grid, grid] as squares of `cell` pixels: uint8 [grid * cell, grid * cell, 3]."""
    return enlarge(colours[ids.numpy()], cell)


def heat_map(values: Tensor, size: int) -> np.ndarray:
    """A grid of values [grid, grid] from its smallest (dark blue) to its largest (yellow): uint8 [size, size, 3]."""
    stops = np.array([(24, 24, 72), (40, 90, 140), (40, 150, 130), (140, 200, 80), (250, 230, 60)])
    values = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
    colours = np.stack([np.interp(values.numpy(), np.linspace(0, 1, 5), stops[:, channel]) for channel in range(3)], -1)
    return np.asarray(Image.fromarray(colours.round().astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST))


def row_of(pictures: list[np.ndarray], gap: int = 4) -> Image.Image:
    """Pictures [h, w, 3] side by side, transparent in between, so that any background will do."""
    height, width = max(p.shape[0] for p in pictures), sum(p.shape[1] for p in pictures) + gap * (len(pictures) - 1)
    canvas, x = Image.new("RGBA", (width, height)), 0
    for picture in pictures:
        canvas.paste(Image.fromarray(picture), (x, 0))
        x += picture.shape[1] + gap
    return canvas


def embed(picture: Image.Image, alternative: str) -> str:
    """An <img> that carries its own bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    text = html.escape(alternative)
    return (f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="{text}" '
            f'width="{picture.width}" height="{picture.height}">')


def figure(content: str, caption: str) -> str:
    """The caption is HTML: escape names before."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


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
        for mark, name in entries) + "</p>"


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


MARKS = ('<circle cx="{0:.1f}" cy="{1:.1f}" r="3.2" {2}/>', '<path d="M{0:.1f} {1:.1f}m-3 3h6l-3-6z" {2}/>',
         '<path d="M{0:.1f} {1:.1f}m-2.8-2.8h5.6v5.6h-5.6z" {2}/>', '<path d="M{0:.1f} {1:.1f}m-3 0h6m-3-3v6" {2}/>')


def scatter_chart(title: str, points: Tensor, labels: Tensor, classes: list[str]) -> str:
    """Points [n, 2], a colour and a mark for each class, as SVG."""
    parts, place, opening = frame(points.tolist(), "first main direction", "second", title)
    shown = sorted(set(labels.tolist()))[:len(COLOURS) * len(MARKS)]

    def mark(label: int, x: float, y: float) -> str:
        i = shown.index(label)
        colour = COLOURS[i % len(COLOURS)]
        return MARKS[i // len(COLOURS) if len(shown) > len(COLOURS) else i % len(MARKS)].format(
            x, y, f'fill="{colour}" stroke="{colour}" stroke-width="1.5" fill-opacity=".75"')

    parts += [mark(label, *place(point)) for point, label in zip(points.tolist(), labels.tolist()) if label in shown]
    return (f'<div class="chart wide">{opening}{"".join(parts)}</svg>'
            f'{legend([(mark(label, 10, 6), classes[label]) for label in shown])}</div>')


STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; display: block; image-rendering: pixelated; }
figure { margin: 0 0 1.2rem; } figcaption { font-size: .85rem; margin-top: .3rem; }
.row, .charts { display: flex; flex-wrap: wrap; gap: 1rem; } .row figure { max-width: 26rem; }
.chart { flex: 0 1 22rem; min-width: 0; } .chart.wide { max-width: 46rem; }
.chart > svg { width: 100%; height: auto; display: block; }
svg text { fill: currentColor; font-size: 12.5px; } svg .title { font-weight: 600; font-size: 14px; }
.axis { stroke: currentColor; fill: none; } .grid { stroke: var(--line); } .curve { fill: none; stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin: .2rem 0 1rem; }
.legend span { display: inline-flex; align-items: center; gap: .3rem; }
table { border-collapse: collapse; overflow-wrap: normal; }
td, th { text-align: left; padding: .15rem 1rem .15rem 0; font-weight: normal; }
h1 { font-size: clamp(1.3rem, 5vw, 2rem); }
.missing { border-left: 4px solid #E69F00; padding: .2rem .8rem; } nav a { margin-right: 1rem; }
.hit { border-bottom: 3px solid #0072B2; } .miss { border-bottom: 3px solid #E69F00; }
"""


def page(title: str, sections: list[tuple[str, str]]) -> str:
    links = "".join(f'<a href="#s{i}">{html.escape(name)}</a>' for i, (name, _) in enumerate(sections))
    body = "".join(f'<section id="s{i}"><h2>{html.escape(name)}</h2>{content}</section>'
                   for i, (name, content) in enumerate(sections))
    title = html.escape(title)
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
            f"<body><h1>{title}</h1><nav>{links}</nav>{body}</body></html>")
