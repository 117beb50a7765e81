"""Pictures of what a run has learned, on one page that needs nothing but a browser: OUTPUT_DIR/report.html.

    python visualize.py configs/demo.yaml                              # everything that the run has so far
    python visualize.py configs/demo.yaml 'visualize.codes=[3,17,42]'  # chosen codes, not the most used
    python visualize.py runs/a runs/b runs/c                           # a table and the curves of runs

Functions come in pairs: one computes numbers (which patch has which code, which token attends to which), one draws
them. What a run lacks is left out, with a line that says which command adds it.
"""

import base64
import copy
import dataclasses
import html
import io
import math
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageDraw
from torch import Tensor, nn

import data
import engine
import finetune
import pretrain
import tokenizer as vqkd
from beitv2 import MaskedImageModel, ModelConfig, ModelError, VisionTransformer, load_pretrained, read_model
from engine import Count, Natural, UserError

# Colours that colour-blind people can tell apart, on white and on black (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass
class VisualizeConfig:
    """The `visualize` section."""

    images: Count = 1000  # validation images to look at, evenly chosen
    shown: Count = 6  # of these, images to draw
    codes: list[Natural] = field(default_factory=list)  # codes to show; empty: `num_codes` that are chosen
    choose: Literal["most_used", "random"] = "most_used"
    num_codes: Count = 12
    examples: Count = 8  # patches of each
    layer: Natural = 0  # block, from 1, whose attention to draw; 0: the last
    query: Natural = 0  # patch, from 1 row by row, whose attention to draw; 0: the one in the middle
    decoder_steps: Natural = 600  # training steps of the pixel decoder; 0: leave it out


SECTIONS = {"data": data.DataConfig, "model": ModelConfig, "tokenizer": vqkd.TokenizerConfig,
            "pretrain": pretrain.PretrainConfig, "finetune": finetune.FinetuneConfig, "visualize": VisualizeConfig}


# ----------------------------------------------------------------------------------------------------------------
# Act 1. Numbers


@dataclass
class Seen:
    """The validation images that the page is about, and what the tokenizer says of them."""

    images: Tensor  # uint8 [n, 3, S, S]
    labels: Tensor  # int64 [n]
    names: list[str]
    classes: list[str]
    patch_size: int
    ids: Tensor | None = None  # int64 [n, grid, grid], the code of each patch


def look(config) -> Seen:
    """Evenly chosen validation images, cropped as for validation."""
    _, val_set = data.open_datasets(config.data)
    chosen = torch.linspace(0, len(val_set) - 1, min(config.visualize.images, len(val_set))).long().tolist()
    view = data.ValView(val_set, config.data.image_size)
    batches = list(data.ValLoader(view, 64, workers=config.data.workers, indices=chosen))
    images, labels = (torch.cat([batch[key] for batch in batches]) for key in ("image", "label"))
    return Seen(images, labels, [val_set.name(i) for i in chosen], list(val_set.classes), config.model.patch_size)


@torch.no_grad()
def codes_of(tokenizer: vqkd.VQKD | vqkd.TeacherTokenizer, images: Tensor) -> Tensor:
    """uint8 images [n, 3, S, S] -> the code of each patch, int64 [n, grid, grid]."""
    device = next(tokenizer.parameters()).device
    ids = [tokenizer.token_ids(data.to_unit(part.to(device))).cpu() for part in images.split(64)]
    return torch.cat(ids).view(-1, tokenizer.grid, tokenizer.grid)


def choose_codes(ids: Tensor, cfg: VisualizeConfig, codebook_size: int) -> list[int]:
    """The codes to show: those that are named, or the most used ones, or random ones of those in use."""
    counts = ids.flatten().bincount(minlength=codebook_size)
    if cfg.codes:
        if max(cfg.codes) >= codebook_size:
            raise UserError(f"visualize.codes names code {max(cfg.codes)}, and the codebook has {codebook_size}")
        return cfg.codes
    used = counts.nonzero().flatten()
    if cfg.choose == "random":
        order = torch.randperm(len(used), generator=torch.Generator().manual_seed(0))
    else:
        order = counts[used].argsort(descending=True, stable=True)
    return used[order[:cfg.num_codes]].tolist()


def examples_of(ids: Tensor, code: int, count: int) -> list[tuple[int, int, int]]:
    """Up to `count` patches (image, row, column) with this code: from as many images as possible, evenly chosen."""
    places = (ids == code).nonzero()  # in the order of images
    new = torch.ones(len(places), dtype=torch.bool)  # the first in its image
    new[1:] = places[1:, 0] != places[:-1, 0]
    first = new.nonzero().flatten().tolist()
    order = first if len(first) >= count else first + sorted(set(range(len(places))) - set(first))
    chosen = torch.linspace(0, len(order) - 1, min(count, len(order))).long().tolist() if len(first) >= count else \
        range(min(count, len(order)))
    return [tuple(places[order[i]].tolist()) for i in chosen]


def class_shares(ids: Tensor, labels: Tensor, code: int, num_classes: int) -> Tensor:
    """Of the patches with this code, the share that lies in images of each class: float32 [classes]."""
    counts = torch.zeros(num_classes).index_add_(0, labels, (ids == code).flatten(1).sum(dim=1).float())
    return counts / counts.sum().clamp(min=1)


def nearest_codes(codebook: Tensor, code: int, count: int) -> list[tuple[int, float]]:
    """The `count` other codes with the highest cosine to this one, [(code, cosine), ...]; codes have unit length."""
    cosine = codebook @ codebook[code]
    cosine[code] = -2
    values, indices = cosine.topk(min(count, len(codebook) - 1))
    return list(zip(indices.tolist(), values.tolist()))


def code_colours(codebook: Tensor) -> np.ndarray:
    """A colour for each code, uint8 [K, 3], always the same for the same codebook: similar codes look similar.

    The three main directions of the codebook become red, green and blue, each by rank, so that all values occur.
    """
    centred = (codebook - codebook.mean(dim=0)).double()
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    directions = directions * directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    ranks = (centred @ directions.T).argsort(dim=0).argsort(dim=0)  # [K, 3]
    return (30 + 210 * ranks / max(1, len(codebook) - 1)).round().byte().numpy()


@dataclass
class Prediction:
    """What the pre-trained model says of masked patches. B images, M masked patches each."""

    masked: Tensor  # int64 [B, M], their positions
    truth: Tensor  # int64 [B, M], their codes
    hits: dict[str, Tensor]  # bool [B, M] for each head: whether its best guess is the truth
    top: Tensor  # int64 [B, M, 5], the backbone's five best guesses
    share: Tensor  # float32 [B, M, 5], and their probabilities


@torch.no_grad()
def predict_masked(model: MaskedImageModel, images: Tensor, ids: Tensor, config) -> Prediction:
    """Mask uint8 images [B, 3, S, S] as in pre-training, and let both heads say what is hidden."""
    masked = pretrain.fixed_masks(len(images), model.grid, config.pretrain)
    truth = ids.flatten(1).gather(1, masked)
    logits, head_logits = model(data.normalize(data.to_unit(images)), masked)
    hits = {"backbone": logits.argmax(dim=-1) == truth}
    if head_logits is not None:
        hits["aggregation head"] = head_logits.argmax(dim=-1) == truth
    share, top = logits.softmax(dim=-1).topk(min(5, logits.shape[-1]), dim=-1)
    return Prediction(masked, truth, hits, top, share)


@torch.no_grad()
def attention_maps(model: VisionTransformer, images: Tensor, layer: int) -> Tensor:
    """How much each token attends to each in block `layer` (from 1): normalised images -> [B, H, T, T], rows sum to 1.

    Tokens are [CLS], registers if there are any, patches. Flash attention never writes this matrix down, so it is
    computed again from what goes into the block.
    """
    attention, caught = model.blocks[layer - 1].attn, []
    hook = attention.register_forward_pre_hook(lambda _, given: caught.extend(given))
    model.features(images)
    hook.remove()
    x, position_bias = caught
    q, k, _ = attention.queries_keys_values(x)
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return (logits if position_bias is None else logits + position_bias).softmax(dim=-1)


class PixelDecoder(nn.Module):
    """Codes back to pixels: a few convolutions on the grid of codes. [B, D, grid, grid] -> [B, 3, S, S] in [0,1]."""

    def __init__(self, codebook_dim: int, patch_size: int, width: int = 192):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(codebook_dim, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, 3 * patch_size**2, 1),
            nn.PixelShuffle(patch_size))

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(codes).sigmoid()


@torch.enable_grad()
def train_pixel_decoder(tokenizer: vqkd.VQKD | vqkd.TeacherTokenizer, view: data.TrainView, steps: int,
                        device: torch.device, workers: int = 0) -> PixelDecoder:
    """Train a decoder on training crops, whose codes the frozen tokenizer gives, by the mean absolute error."""
    codebook = tokenizer.quantize.embedding.weight
    decoder = PixelDecoder(codebook.shape[1], view.size // tokenizer.grid).to(device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    loader = data.TrainLoader(view, min(32, len(view)), seed=0, workers=workers)
    for step, batch in enumerate(data.Rounds(loader, steps, accumulation=1).epoch(0)):
        images = data.to_unit(batch["image"].to(device))
        ids = tokenizer.token_ids(images).view(-1, tokenizer.grid, tokenizer.grid)
        loss = F.l1_loss(decoder(F.embedding(ids, codebook).permute(0, 3, 1, 2)), images)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return decoder.eval()


def mean_patch(images: Tensor, ids: Tensor, code: int, patch_size: int) -> Tensor:
    """The mean of all patches with this code: uint8 images [n, 3, S, S] -> float32 [3, P, P], 0 to 255."""
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # [n, 3, grid, grid, P, P]
    return patches.permute(0, 2, 3, 1, 4, 5)[ids == code].float().mean(dim=0)


def principal_components(features: Tensor) -> Tensor:
    """Features [n, D] on their two main directions, [n, 2]."""
    centred = features - features.mean(dim=0)
    points = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
    return F.pad(points, (0, 2 - points.shape[1]))  # a single image has no direction


def nearest_images(features: Tensor, query: int, count: int) -> list[int]:
    """The other images whose features [n, D] are nearest to those of `query` by cosine, nearest first."""
    features = F.normalize(features, dim=1)
    cosine = features @ features[query]
    cosine[query] = -2
    return cosine.topk(min(count, len(features) - 1)).indices.tolist()


def read_curves(folder: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """metrics.jsonl of a stage as curves {"step": {name: [(step, value)]}, "epoch": {name: [(epoch, value)]}}."""
    curves = {"step": {}, "epoch": {}}
    for line in engine.read_lines(folder / "metrics.jsonl"):
        if "val" in line:
            values = line.get("train", {}) | {f"val {name}": value for name, value in line["val"].items()}
            x, kind = line["epoch"] + 1, "epoch"
        else:
            values, x, kind = {key: line[key] for key in line if key not in ("epoch", "step")}, line["step"], "step"
        for name, value in values.items():
            curves[kind].setdefault(name, []).append((x, value))
    return curves


# ----------------------------------------------------------------------------------------------------------------
# Act 2. Drawing


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


# ----------------------------------------------------------------------------------------------------------------
# Act 3. The sections of the page: each returns HTML, or raises UserError with the command that would make it possible


def scale_of(config, target: int) -> int:
    """By how much to enlarge an image so that it is about `target` pixels wide."""
    return max(1, round(target / config.data.image_size))


def results_section(config, seen, models) -> str:
    rows = "".join(f"<tr><th>{html.escape(title)}</th><td>{untrained}</td><td>{trained}</td></tr>"
                   for title, untrained, trained in finetune.results(config))
    return (f"<table><tr><th>validation accuracy</th><td>untrained</td><td>pre-trained</td></tr>{rows}</table>"
            f"<p>A dash: not measured yet. <code>torchrun finetune.py {html.escape(config.file)}</code> adds the last "
            "row, with <code>finetune.mode=linear_probe</code> or <code>finetune.mode=knn</code> the others; "
            "<code>finetune.weights=none</code> is for the untrained column.</p>")


def curves_section(config, seen, models) -> str:
    stages = in_order({path.parent.name for path in Path(config.output_dir).glob("*/metrics.jsonl")})
    drawn = [(stage, charts({"": read_curves(Path(config.output_dir) / stage)})) for stage in stages]
    drawn = [f"<h3>{html.escape(name)}</h3>{content}" for name, content in drawn if content]
    if not drawn:
        raise UserError(f"there are no metrics in '{config.output_dir}' yet: begin with `torchrun tokenizer.py "
                        f"{config.file}`")
    return "".join(drawn)


def in_order(stages: set[str]) -> list[str]:
    """Stages as they follow each other, then the others by name."""
    order = ("tokenizer", "pretrain", "finetune", "finetune_scratch")
    return sorted(stages, key=lambda stage: (order.index(stage) if stage in order else len(order), stage))


# title, unit of y, against what, and the names that belong into one chart
CHARTS = (("Loss", "loss", "step", ("loss", "cosine_loss", "mim_loss", "cls_loss")),
          ("Loss of epochs", "loss", "epoch", ("loss", "cosine_loss", "val loss", "val cosine_loss")),
          ("Accuracy", "share of 1", "step", ("accuracy", "mim_accuracy", "cls_accuracy")),
          ("Accuracy of epochs", "share of 1", "epoch", (
              "accuracy", "mim_accuracy", "cls_accuracy", "val top1", "val top5", "val knn_cls", "val knn_mean",
              "val cls", "val mean", "val miou", "val pixel_accuracy")),
          ("Codes in use", "perplexity (codes)", "epoch", ("perplexity", "val perplexity", "batch_perplexity")),
          ("Codebook usage", "share of 1", "epoch", ("usage", "val usage")),
          ("Learning rate", "highest of all groups", "step", ("lr",)))


def charts(runs: dict[str, dict]) -> str:
    """The charts of one stage, "" if it took no steps; with several runs, {name: curves}, each curve bears its run's
    name too."""
    if not any(curves["step"] for curves in runs.values()):
        return ""
    drawn = []
    for title, unit, kind, names in CHARTS:
        series = {" ".join(filter(None, (run, name))): points for run, curves in runs.items()
                  for name, points in curves[kind].items() if name in names}
        drawn.append(line_chart(title, series, kind, unit))
    return f'<div class="charts">{"".join(drawn)}</div>'


def words_section(config, seen, models) -> str:
    tokenizer, cfg = models.tokenizer(), config.visualize
    codebook, scale = tokenizer.quantize.embedding.weight.detach().cpu(), max(1, round(32 / seen.patch_size))
    counts = seen.ids.flatten().bincount(minlength=len(codebook))
    parts = [f"<p>{int((counts > 0).sum())} of {len(codebook)} codes occur in {len(seen.images)} validation images; "
             f"perplexity {vqkd.perplexity(counts.double()):.0f}. Framed is the patch itself. After the count: from "
             "images of which classes these patches come, the three largest shares.</p>"]
    for code in choose_codes(seen.ids, cfg, len(codebook)):
        places = examples_of(seen.ids, code, cfg.examples)
        if not places:
            parts.append(f"<p>Code {code} does not occur in these images.</p>")
            continue
        pictures = [patch_with_context(seen.images[i], y, x, seen.patch_size, scale) for i, y, x in places]
        mean = enlarge(pixels(mean_patch(seen.images, seen.ids, code, seen.patch_size).byte()), scale)
        shares = class_shares(seen.ids, seen.labels, code, len(seen.classes))
        of_classes = ", ".join(f"{html.escape(seen.classes[k])} {100 * shares[k]:.0f} %"
                               for k in shares.argsort(descending=True)[:3].tolist() if shares[k] > 0)
        near = ", ".join(f"{other} ({cosine:.2f})" for other, cosine in nearest_codes(codebook, code, 3))
        share = 100 * counts[code] / counts.sum()
        parts.append(figure(embed(row_of([*pictures, mean]), f"patches of code {code}, and their mean"),
                            f"<b>code {code}</b>: {int(counts[code])} patches ({share:.1f} %); {of_classes}; nearest "
                            f"codes {near}; last picture: the mean patch"))
    return f'<div class="words">{"".join(parts)}</div>'


def token_maps_section(config, seen, models) -> str:
    codebook = models.tokenizer().quantize.embedding.weight.detach().cpu()
    colours, scale = code_colours(codebook), scale_of(config, 190)
    parts = []
    for i in shown_images(config, seen):
        pictures = [enlarge(pixels(seen.images[i]), scale), token_map(seen.ids[i], colours, seen.patch_size * scale)]
        used = seen.ids[i].unique()
        parts.append(figure(embed(row_of(pictures), f"{seen.names[i]} and its codes"),
                            f"{html.escape(seen.classes[seen.labels[i]])}: {len(used)} different codes"))
    return ("<p>Each code has one colour everywhere; codes that are near to each other have similar ones.</p>"
            f'<div class="row">{"".join(parts)}</div>')


def shown_images(config, seen: Seen) -> list[int]:
    """Random ones, but the same each time."""
    order = torch.randperm(len(seen.images), generator=torch.Generator().manual_seed(0))
    return order[:config.visualize.shown].tolist()


@torch.no_grad()
def pixels_section(config, seen, models) -> str:
    tokenizer, steps = models.tokenizer(), config.visualize.decoder_steps
    if not steps:
        raise UserError("the pixel decoder is off: set visualize.decoder_steps=600")
    decoder = models.pixel_decoder()
    chosen, scale = shown_images(config, seen), scale_of(config, 190)
    device = next(decoder.parameters()).device
    codes = F.embedding(seen.ids[chosen].to(device), tokenizer.quantize.embedding.weight).permute(0, 3, 1, 2)
    rebuilt = (255 * decoder(codes)).round().byte().cpu()
    error = (rebuilt.float() - seen.images[chosen].float()).abs().mean() / 255
    parts = []
    for i, painted in zip(chosen, rebuilt):
        pair = row_of([enlarge(pixels(image), scale) for image in (seen.images[i], painted)])
        parts.append(figure(embed(pair, "original, rebuilt"), html.escape(seen.classes[seen.labels[i]])))
    return (f"<p>A small decoder, trained for {steps} steps on the frozen tokenizer, paints each image (left) from its "
            f"codes alone (right). What it cannot paint, the codes have thrown away. Mean error {error:.3f} of 1.</p>"
            f'<div class="row">{"".join(parts)}</div>')


def predictions_section(config, seen, models) -> str:
    model = models.pretrained()
    models.tokenizer()  # gives `seen` its codes
    chosen, scale = shown_images(config, seen), scale_of(config, 150)
    said = predict_masked(model, seen.images[chosen], seen.ids[chosen], config)
    parts = ['<p>Which of the masked patches each head gets right: <span class="hit">blue with a dot</span> is a hit, '
             '<span class="miss">orange with a cross</span> a miss. Below, for some of them: what is hidden, and '
             "patches of the five codes that the backbone believes in most.</p>"]
    for j, i in enumerate(chosen):
        pictures = [enlarge(pixels(seen.images[i]), scale)]
        for hits in (None, *said.hits.values()):
            pictures.append(pretrain.mask_picture(seen.images[i], said.masked[j], None if hits is None else hits[j],
                                                  model.grid, scale))
        rates = ", ".join(f"{head} {int(hits[j].sum())} of {hits.shape[1]}" for head, hits in said.hits.items())
        some = torch.linspace(0, said.masked.shape[1] - 1, min(3, said.masked.shape[1])).long().tolist()
        parts.append(figure(embed(row_of(pictures), "image, mask, hits of each head"),
                            f"{html.escape(seen.classes[seen.labels[i]])}: {rates}"))
        parts.append(f'<div class="row">{"".join(belief(seen, i, said, j, m) for m in some)}</div>')
    return "".join(parts)


def belief(seen: Seen, image: int, said: Prediction, j: int, m: int) -> str:
    """One masked patch and an example patch of each of the five codes that the backbone believes in."""
    grid, size = seen.ids.shape[1], seen.patch_size
    scale = max(1, round(24 / size))
    place = int(said.masked[j, m])
    pictures = [patch_with_context(seen.images[image], place // grid, place % grid, size, scale)]
    for code in said.top[j, m].tolist():
        places = [place for place in examples_of(seen.ids, code, 2) if place[0] != image]  # not the hidden patch itself
        pictures.append(patch_with_context(seen.images[places[0][0]], *places[0][1:], size, scale) if places
                        else np.full((2 * size * scale,) * 2 + (3,), 128, np.uint8))
    shares = ", ".join(f"{code}: {100 * share:.0f} %{' ✓' if code == said.truth[j, m] else ''}"
                       for code, share in zip(said.top[j, m].tolist(), said.share[j, m].tolist()))
    return figure(embed(row_of(pictures), "hidden patch, and patches of the codes believed in"),
                  f"hidden: code {int(said.truth[j, m])}; believed: {shares}")


def attention_section(config, seen, models) -> str:
    chosen, scale = shown_images(config, seen)[:3], scale_of(config, 110)
    size = config.data.image_size * scale
    parts, notes = [], []
    kinds = (("pre-trained", models.backbone), ("fine-tuned", models.finetuned), ("teacher", models.teacher))
    for name, open_model in kinds:
        try:
            model, prepare = open_model()
        except (UserError, ModelError) as error:
            notes.append(f"<p class='missing'>The {name} model is left out: {html.escape(str(error))}</p>")
            continue
        layer = config.visualize.layer or model.depth
        if layer > model.depth:
            notes.append(f"<p class='missing'>The {name} model is left out: it has {model.depth} blocks, and "
                         f"visualize.layer is {layer}.</p>")
            continue
        grid = model.grid
        query = config.visualize.query or grid * (grid // 2) + grid // 2 + 1
        if query > grid**2:
            raise UserError(f"visualize.query is {query}, and an image has {grid**2} patches")
        maps = attention_maps(model, prepare(data.to_unit(seen.images[chosen])), layer)
        first = maps.shape[-1] - grid**2  # [CLS] and registers come before the patches
        for token, row in (("[CLS]", 0), (f"patch {query}", first + query - 1)):
            for i, attention in zip(chosen, maps[:, :, row, first:]):  # [H, N]
                heads = attention.view(-1, grid, grid)
                image = enlarge(pixels(seen.images[i]), scale)
                if row:
                    side = size // grid
                    image = framed(image, (query - 1) % grid * side, (query - 1) // grid * side, side)
                pictures = [image, heat_map(heads.mean(dim=0), size), *(heat_map(head, size) for head in heads)]
                parts.append(figure(embed(row_of(pictures), f"attention of {token}"),
                                    f"{name}, block {layer}, {html.escape(token)}: image, mean, {len(heads)} heads"))
    return ("<p>How much a token ([CLS], or the framed patch) attends to each patch, from little (dark) to much "
            "(bright): the mean over heads, then each head; each map has a scale of its own.</p>"
            f"{''.join(parts)}{''.join(notes)}")


@torch.no_grad()
def features_section(config, seen, models) -> str:
    model, prepare = models.backbone()
    tokens = torch.cat([model.features(prepare(data.to_unit(part))) for part in seen.images.split(64)])
    cls, scale = tokens[:, 0].float(), scale_of(config, 110)
    points = principal_components(cls)
    parts = [scatter_chart("[CLS] features of the pre-trained model", points, seen.labels, seen.classes),
             "<h3>Nearest images</h3><p>An image, and the five others whose [CLS] is nearest to its own.</p>"]
    for i in shown_images(config, seen):
        near = nearest_images(cls, i, 5)
        names = [html.escape(seen.classes[seen.labels[j]]) for j in (i, *near)]
        pictures = row_of([enlarge(pixels(seen.images[j]), scale) for j in (i, *near)])
        parts.append(figure(embed(pictures, "nearest images"), f"<b>{names[0]}</b>: {', '.join(names[1:])}"))
    return "".join(parts)


class Models:
    """The run's models, opened when a section first asks for them, and only once."""

    def __init__(self, config, seen: Seen):
        self.config, self.seen, self.opened = config, seen, {}
        self.device = engine.setup_distributed(config.device)

    def once(self, name: str, make):
        if name not in self.opened:
            self.opened[name] = make()
        return self.opened[name]

    def tokenizer(self) -> vqkd.VQKD | vqkd.TeacherTokenizer:
        def make():
            given = self.config.pretrain.tokenizer_weights
            path = engine.stage_checkpoint(self.config, "tokenizer", given, "pretrain.tokenizer_weights")
            tokenizer = vqkd.load_tokenizer(self.config, path)
            self.seen.ids = codes_of(tokenizer.to(self.device), self.seen.images)
            return tokenizer
        return self.once("tokenizer", make)

    def pixel_decoder(self) -> PixelDecoder:
        def make():
            train_set, _ = data.open_datasets(self.config.data)
            view = data.TrainView(train_set, self.config.seed, self.config.data.image_size, (0.7, 1.0))
            return train_pixel_decoder(self.tokenizer(), view, self.config.visualize.decoder_steps, self.device,
                                       self.config.data.workers)
        return self.once("pixels", make)

    def pretrained(self) -> MaskedImageModel:
        def make():
            config = self.config
            path = engine.stage_checkpoint(config, "pretrain", given="", key="")
            model = pretrain.build_model(config)
            content = read_model(path, "model", config.model)
            engine.say(load_pretrained(model, content, source=str(path)))
            return model.eval()
        return self.once("pretrained", make)

    def backbone(self):
        return self.pretrained(), data.normalize

    def finetuned(self):
        """This run's own, whatever `finetune.weights` says: that is where fine-tuning starts from."""
        def make():
            config = copy.copy(self.config)
            config.finetune = dataclasses.replace(config.finetune, weights="", classes_file="")
            return finetune.open_trained(config)[0]
        return self.once("finetuned", make), data.normalize

    def teacher(self):
        teacher = self.once("teacher", lambda: vqkd.open_teacher(self.config))
        if not isinstance(teacher, vqkd.Teacher):
            raise UserError(f"the teacher is {self.config.tokenizer.teacher}, which has no attention")
        return teacher.backbone, teacher.prepare


TITLES = (("Results", results_section), ("Codebook words", words_section), ("Token maps", token_maps_section),
          ("Pixels from codes", pixels_section), ("Masked prediction", predictions_section),
          ("Attention", attention_section), ("Features", features_section), ("Curves", curves_section))
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


def report(config) -> Path:
    """Write OUTPUT_DIR/report.html."""
    if not Path(config.output_dir).is_dir():
        raise UserError(f"there is no run in '{config.output_dir}' yet: begin with `torchrun tokenizer.py "
                        f"{config.file}`")
    seen = look(config)
    models, sections = Models(config, seen), []
    for name, section in TITLES:
        try:
            sections.append((name, section(config, seen, models)))
        except (UserError, ModelError) as error:
            sections.append((name, f'<p class="missing">Left out: {html.escape(str(error))}</p>'))
    path = Path(config.output_dir) / "report.html"
    path.write_text(page(f"BEiT v2: {config.output_dir}", sections), encoding="utf-8", errors="replace")
    return path


# title of a column, the stages that may have measured it (the first one that has), its name there, its unit
FIGURES = (("cosine loss", ("tokenizer",), "cosine_loss", 1), ("perplexity", ("tokenizer",), "perplexity", 1),
           ("bag of codes, k-NN %", ("tokenizer",), "bag_knn", 100),
           ("codes of one class %", ("tokenizer",), "one_class", 100),
           ("k-NN [CLS] %", ("knn", "pretrain"), ("cls", "knn_cls"), 100),
           ("k-NN mean %", ("knn", "pretrain"), ("mean", "knn_mean"), 100),
           ("probe [CLS] %", ("linear_probe",), "cls", 100), ("probe mean %", ("linear_probe",), "mean", 100),
           ("fine-tuning %", ("finetune",), "top1", 100), ("scratch %", ("finetune_scratch",), "top1", 100))


def figures_of(folder: Path, suffix: str = "") -> dict[str, float]:
    """The last value of each of FIGURES that a run has measured, by title; "_scratch": with an untrained backbone."""
    found = {}
    for title, stages, names, unit in FIGURES:
        for stage, name in zip(stages, [names] if isinstance(names, str) else names):
            value = finetune.last_figure(folder / f"{stage}{suffix}", name)
            if value is not None and title not in found:
                found[title] = unit * value
    return found


def options_of(folder: Path) -> dict[str, Any]:
    """The options of a run, {"section.key": value}, each section as the stage of that name was run with."""
    files = {path.parent.name: yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*/config.yaml"))}
    options = {}
    for stage in [*reversed(files), *(name for name in engine.SECTIONS if name in files)]:  # a section's own stage last
        for section, values in files[stage].items():
            for key, value in values.items() if isinstance(values, dict) else ((None, values),):
                if key not in (*engine.FREE_TO_CHANGE, "mode", "weights"):
                    options[f"{section}.{key}" if key else section] = value
    return {key: value for key, value in options.items() if key not in engine.FREE_TO_CHANGE}


def group_runs(folders: list[Path]) -> dict[str, list[Path]]:
    """Runs that differ in nothing but their seed, and in where the files lie that they began with, under one name.

    The name tells the options in which the runs differ. Where that is not enough (two runs with the same seed), it is
    the folder's.
    """
    options = {folder: options_of(folder) for folder in folders}
    paths = ("seed", "pretrain.tokenizer_weights", "tokenizer.teacher_weights", "data.root")
    keys = sorted({key for values in options.values() for key in values} - set(paths))
    keys = [key for key in keys if len({repr(values[key]) for values in options.values() if key in values}) > 1]
    groups: dict[str, list[Path]] = {}
    for folder, values in options.items():
        name = ", ".join(f"{key}={values[key]}" for key in keys if key in values) or "all alike"
        groups.setdefault(name, []).append(folder)
    for name, members in list(groups.items()):
        seeds = [options[folder].get("seed") for folder in members]
        if len(set(seeds)) < len(seeds):
            del groups[name]
            groups |= {f"{folder}" + (f" ({name})" if keys else ""): [folder] for folder in members}
    return groups


def summary(folders: list[Path]) -> list[list[str]]:
    """A table of runs, its head first: a row for each group of runs, with means and standard deviations over seeds."""
    groups = {name: [figures_of(folder) for folder in members] for name, members in group_runs(folders).items()}
    titles = [title for title, *_ in FIGURES if any(title in run for runs in groups.values() for run in runs)]
    rows = [["runs that differ in", "seeds", *titles]]
    for name, runs in groups.items():
        rows.append([name, str(len(runs)), *(mean_and_deviation(title, runs) for title in titles)])
    return rows


def mean_and_deviation(title: str, runs: list[dict[str, float]]) -> str:
    """A cell of the table; behind it in brackets how many runs have measured it, if not all."""
    values, digits = [run[title] for run in runs if title in run], 4 if title == "cosine loss" else 1
    text = f"{statistics.mean(values):.{digits}f}" if values else "-"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text + (f" ({len(values)})" if 0 < len(values) < len(runs) else "")


def as_markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def as_html(rows: list[list[str]]) -> str:
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def compare(folders: list[Path]) -> Path:
    """Print a table of several runs, and write FIRST/compare.html: that table, and their curves, stage by stage."""
    rows = summary(folders)
    sections = [("Figures", as_html(rows) + "<p>Mean ± standard deviation over the seeds.</p>")]
    for stage in in_order({path.parent.name for folder in folders for path in folder.glob("*/metrics.jsonl")}):
        having = [folder for folder in folders if (folder / stage / "metrics.jsonl").is_file()]
        runs = {str(folder): read_curves(folder / stage) for folder in having}
        if content := charts(runs):
            sections.append((stage, content))
    if len(rows[0]) == 2 and len(sections) == 1:
        names = ", ".join(map(str, folders))
        raise UserError(f"there are no figures or curves in {names}: give the output_dir of runs")
    print(as_markdown(rows))
    path = folders[0] / "compare.html"
    path.write_text(page("BEiT v2: " + ", ".join(map(str, folders)), sections), encoding="utf-8", errors="replace")
    return path


def main() -> None:
    folders = [Path(argument) for argument in sys.argv[1:]]
    if folders and all(folder.is_dir() for folder in folders):
        print(compare(folders))
    else:
        print(report(engine.load_config(SECTIONS)))


if __name__ == "__main__":
    engine.launch(main, ModelError)
