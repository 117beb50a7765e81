"""Pictures of what a run has learned, on one page that needs nothing but a browser: OUTPUT_DIR/report.html.

    python visualize.py configs/demo.yaml                              # everything that the run has so far
    python visualize.py configs/demo.yaml 'visualize.codes=[3,17,42]'  # chosen codes, not the most used
    python visualize.py runs/a runs/b runs/c                           # a table and the curves of runs

Functions come in pairs: one computes numbers (which patch has which code, which token attends to which), one draws
them. What a run lacks is left out, with a line that says which command adds it.
"""

import copy
import dataclasses
import html
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import finetune
import pretrain
import tokenizer as vqkd
from beitv2 import MaskedImageModel, ModelConfig, ModelError, VisionTransformer, load_pretrained, read_model
from support.compare import charts, compare, in_order, read_curves, results
from support.datasets import open_datasets
from support.errors import UserError
from support.files import stage_checkpoint
from support.launch import launch
from support.loaders import TrainLoader, ValLoader
from support.options import Count, Natural, load_config
from support.pictures import (embed, enlarge, figure, fixed_masks, framed, heat_map, mask_picture, page,
                              patch_with_context, pixels, row_of, scatter_chart, token_map)
from support.processes import say, setup_distributed
from support.teacher_codes import TeacherTokenizer
from support.teachers import Teacher, open_teacher
from support.use import open_trained


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
    _, val_set = open_datasets(config.data)
    chosen = torch.linspace(0, len(val_set) - 1, min(config.visualize.images, len(val_set))).long().tolist()
    view = data.ValView(val_set, config.data.image_size)
    batches = list(ValLoader(view, 64, workers=config.data.workers, indices=chosen))
    images, labels = (torch.cat([batch[key] for batch in batches]) for key in ("image", "label"))
    return Seen(images, labels, [val_set.name(i) for i in chosen], list(val_set.classes), config.model.patch_size)


@torch.no_grad()
def codes_of(tokenizer: vqkd.VQKD | TeacherTokenizer, images: Tensor) -> Tensor:
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
    masked = fixed_masks(len(images), model.grid, config.pretrain)
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
def train_pixel_decoder(tokenizer: vqkd.VQKD | TeacherTokenizer, view: data.TrainView, steps: int,
                        device: torch.device, workers: int = 0) -> PixelDecoder:
    """Train a decoder on training crops, whose codes the frozen tokenizer gives, by the mean absolute error."""
    codebook = tokenizer.quantize.embedding.weight
    decoder = PixelDecoder(codebook.shape[1], view.size // tokenizer.grid).to(device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    loader = TrainLoader(view, min(32, len(view)), seed=0, workers=workers)
    for step, batch in enumerate(Rounds(loader, steps, accumulation=1).epoch(0)):
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


# ----------------------------------------------------------------------------------------------------------------
# Act 2. Drawing


# ----------------------------------------------------------------------------------------------------------------
# Act 3. The sections of the page: each returns HTML, or raises UserError with the command that would make it possible


def scale_of(config, target: int) -> int:
    """By how much to enlarge an image so that it is about `target` pixels wide."""
    return max(1, round(target / config.data.image_size))


def results_section(config, seen, models) -> str:
    rows = "".join(f"<tr><th>{html.escape(title)}</th><td>{untrained}</td><td>{trained}</td></tr>"
                   for title, untrained, trained in results(config))
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
            pictures.append(mask_picture(seen.images[i], said.masked[j], None if hits is None else hits[j],
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
        self.device = setup_distributed(config.device, config.threads)

    def once(self, name: str, make):
        if name not in self.opened:
            self.opened[name] = make()
        return self.opened[name]

    def tokenizer(self) -> vqkd.VQKD | TeacherTokenizer:
        def make():
            given = self.config.pretrain.tokenizer_weights
            path = stage_checkpoint(self.config, "tokenizer", given, "pretrain.tokenizer_weights")
            tokenizer = vqkd.load_tokenizer(self.config, path)
            self.seen.ids = codes_of(tokenizer.to(self.device), self.seen.images)
            return tokenizer
        return self.once("tokenizer", make)

    def pixel_decoder(self) -> PixelDecoder:
        def make():
            train_set, _ = open_datasets(self.config.data)
            view = data.TrainView(train_set, self.config.seed, self.config.data.image_size, (0.7, 1.0))
            return train_pixel_decoder(self.tokenizer(), view, self.config.visualize.decoder_steps, self.device,
                                       self.config.data.workers)
        return self.once("pixels", make)

    def pretrained(self) -> MaskedImageModel:
        def make():
            config = self.config
            path = stage_checkpoint(config, "pretrain", given="", key="")
            model = pretrain.build_model(config)
            content = read_model(path, "model", config.model)
            say(load_pretrained(model, content, source=str(path)))
            return model.eval()
        return self.once("pretrained", make)

    def backbone(self):
        return self.pretrained(), data.normalize

    def finetuned(self):
        """This run's own, whatever `finetune.weights` says: that is where fine-tuning starts from."""
        def make():
            config = copy.copy(self.config)
            config.finetune = dataclasses.replace(config.finetune, weights="", classes_file="")
            return open_trained(config)[0]
        return self.once("finetuned", make), data.normalize

    def teacher(self):
        teacher = self.once("teacher", lambda: open_teacher(self.config))
        if not isinstance(teacher, Teacher):
            raise UserError(f"the teacher is {self.config.tokenizer.teacher}, which has no attention")
        return teacher.backbone, teacher.prepare


TITLES = (("Results", results_section), ("Codebook words", words_section), ("Token maps", token_maps_section),
          ("Pixels from codes", pixels_section), ("Masked prediction", predictions_section),
          ("Attention", attention_section), ("Features", features_section), ("Curves", curves_section))


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


def main() -> None:
    folders = [Path(argument) for argument in sys.argv[1:]]
    if folders and all(folder.is_dir() for folder in folders):
        print(compare(folders))
    else:
        print(report(load_config(SECTIONS)))


if __name__ == "__main__":
    launch(main, ModelError)
