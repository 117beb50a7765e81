"""Pictures of what a run has learned, on one page that needs nothing but a browser: OUTPUT_DIR/report.html.

    python visualize.py configs/demo.yaml                              # everything that the run has so far
    python visualize.py configs/demo.yaml 'visualize.codes=[3,17,42]'  # chosen codes, not the most used
    python visualize.py runs/a runs/b runs/c                           # a table and the curves of runs

Act 1 computes numbers (which patch has which code, which token attends to which), act 2 makes the page's sections of
them. What a run lacks is left out, with a line that says which command adds it.
"""

import copy
import dataclasses
import functools
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
import segment
import tokenizer as vqkd
from beitv2 import (Classifier, MaskedImageModel, ModelConfig, ModelError, VisionTransformer, load_pretrained,
                    model_state, read_model, score, take)
from support.charts import bar_chart, curves_of, scatter_chart
from support.cls_swap import another_image, hits_by_cls
from support.compare import compare
from support.datasets import PARTS, Shapes, open_datasets, parts_of_patches
from support.errors import UserError
from support.figures import results
from support.files import stage_checkpoint
from support.launch import launch
from support.loaders import ValLoader, evenly_chosen
from support.options import Count, Natural, load_config
from support.page import cells, missing, page, table
from support.pixel_decoder import PixelDecoder, train_pixel_decoder
from support.pictures import enlarge, framed, heat_map, mask_picture, patch_with_context, pixels, token_map
from support.processes import say, setup_distributed
from support.teacher_codes import TeacherTokenizer
from support.teachers import HOG, Teacher, open_teacher
from support.use import open_trained, restored
from support.words import code_colours, examples_of, mean_patch, most_frequent, nearest_codes, purity


@dataclass
class VisualizeConfig:
    """The `visualize` section."""

    images: Count = 1000  # validation images to look at, evenly chosen
    shown: Count = 6  # of these, images to show
    codes: list[Natural] = field(default_factory=list)  # ids of codes to show; empty: `num_codes` that are chosen
    choose: Literal["most_used", "random"] = "most_used"
    num_codes: Count = 12
    examples: Count = 8  # patches of each
    layer: Natural = 0  # block, from 1, whose attention to show; 0: the last
    query: Natural = 0  # patch, from 1 row by row, whose attention to show; 0: the one in the middle
    decoder_steps: Natural = 600  # training steps of the pixel decoder; 0: leave it out


SECTIONS = {"data": data.DataConfig, "model": ModelConfig, "tokenizer": vqkd.TokenizerConfig,
            "pretrain": pretrain.PretrainConfig, "finetune": finetune.FinetuneConfig, "visualize": VisualizeConfig}


# ----------------------------------------------------------------------------------------------------------------
# Act 1. Numbers


@dataclass
class Seen:
    """The validation images that the page is about."""

    images: Tensor  # uint8 [n, 3, S, S]
    labels: Tensor  # int64 [n]; without meaning where there are no classes
    names: list[str]
    classes: list[str]  # [] for images without labels
    parts: Tensor | None = None  # of drawn shapes, which of PARTS each patch shows, int64 [n, grid, grid]

    def caption(self, i: int) -> str:
        """What is known of an image: its class, or else its file."""
        return self.classes[self.labels[i]] if self.classes else Path(self.names[i]).name


def look(config) -> Seen:
    """Evenly chosen validation images, cropped as for validation."""
    _, val_set = open_datasets(config.data)
    chosen = evenly_chosen(len(val_set), config.visualize.images)
    samples = data.ValSamples(val_set, config.data.image_size, strict=val_set.labelled)
    batches = list(ValLoader(samples, 64, workers=config.data.workers, indices=chosen))
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    if "readable" in whole:  # of images without labels
        whole = {key: values[whole["readable"]] for key, values in whole.items()}
    indices, parts, size = whole["index"].tolist(), None, config.data.image_size
    if isinstance(val_set, Shapes):
        drawn = (torch.from_numpy(255 * val_set.segmentation(i).clip(0, 1))[None] for i in indices)
        shape = torch.cat([data.centre_crop(mask, size) for mask in drawn]) > 127
        parts = parts_of_patches(shape, size // config.model.patch_size)
    return Seen(whole["image"], whole["label"], [val_set.name(i) for i in indices], list(val_set.classes), parts)


@torch.no_grad()
def token_ids(tokenizer: vqkd.VQKD | TeacherTokenizer, images: Tensor) -> Tensor:
    """uint8 images [n, 3, S, S] -> the id of each patch's code, int64 [n, grid, grid]."""
    device = next(tokenizer.parameters()).device
    ids = [tokenizer.token_ids(data.to_unit(part.to(device))).cpu() for part in images.split(64)]
    return torch.cat(ids).view(-1, tokenizer.grid, tokenizer.grid)


def choose_codes(ids: Tensor, cfg: VisualizeConfig, num_ids: int) -> list[int]:
    """The ids of codes to show: those that are named, or the most used ones, or random ones of those in use."""
    counts = ids.flatten().bincount(minlength=num_ids)
    if cfg.codes:
        if max(cfg.codes) >= num_ids:
            raise UserError(f"visualize.codes names code {max(cfg.codes)}, and the codebook has {num_ids}")
        return cfg.codes
    used = counts.nonzero().flatten()
    if cfg.choose == "random":
        order = torch.randperm(len(used), generator=torch.Generator().manual_seed(0))
    else:
        order = counts[used].argsort(descending=True, stable=True)
    return used[order[:cfg.num_codes]].tolist()


@torch.no_grad()
def clustered(features_of: nn.Module, images: Tensor, num_ids: int) -> Tensor:
    """K-means of a teacher's features with K = `num_ids`: uint8 images [n, 3, S, S] -> id of each patch, int64 [n * N].

    The means are those of these same patches, which favours them a little over codes that were learned from others.
    """
    features = torch.cat([features_of(data.to_unit(part)) for part in images.split(64)]).flatten(0, 1).float()
    codes = vqkd.Quantizer(num_ids, features.shape[1])
    codes.init_from(features, seed=0)
    return vqkd.nearest_code(F.normalize(features, dim=1), codes.vectors)


@dataclass
class Predictions:
    """What the pre-trained model says of M masked patches of B images; dictionaries are by the prediction's name."""

    masked: Tensor  # int64 [B, M], their positions
    truth: Tensor  # int64 [B, M], the ids of their codes
    hits: dict[str, Tensor]  # bool [B, M], whether the best guess is the truth
    top: dict[str, Tensor]  # int64 [B, M, 5], the five likeliest ids
    share: dict[str, Tensor]  # float32 [B, M, 5], and their probabilities


@torch.no_grad()
def predict_masked(model: MaskedImageModel, images: Tensor, ids: Tensor, masked: Tensor) -> Predictions:
    """Mask uint8 images [B, 3, S, S], whose ids are [B, grid, grid], at the positions [B, M]; ask what is hidden."""
    said = Predictions(masked, take(ids.flatten(1), masked), {}, {}, {})
    for name, logits in zip(model.prediction_names, model(data.normalize(data.to_unit(images)), masked),
                            strict=True):
        said.hits[name] = score(logits, said.truth)[1]
        said.share[name], said.top[name] = logits.softmax(dim=-1).topk(min(5, logits.shape[-1]), dim=-1)
    return said


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
# Act 2. The sections of the page: each returns HTML, or raises UserError with the command that would make it possible.
# Its docstring stands above it on the page: what to see, and where the method predicts it (sections of the paper).

PREDICTIONS = {"mim": "backbone", "cls": "aggregation head"}
NO_LABELS = "Classes are left out: these images have no labels."


def results_section(config, seen, models) -> str:
    """What to see: how far the pre-trained backbone is above the untrained one. k-NN and probe read frozen
    features: the method predicts (section 2.3) that patch aggregation makes [CLS] as good a summary as the mean of
    the patches."""
    if not (rows := results(Path(config.output_dir))):
        raise UserError(f"nothing has been measured in '{config.output_dir}' yet: `torchrun finetune.py {config.file} "
                        f"finetune.mode=knn` is the quickest figure")
    command = html.escape(f"torchrun finetune.py {config.file}")
    return (f"{table([('validation images', 'untrained', 'pre-trained'), *rows])}<p>A dash: not measured. "
            f"<code>{command}</code> measures fine-tuning, with "
            "<code>finetune.mode=linear_probe</code> or <code>finetune.mode=knn</code> the frozen features, each with "
            "<code>finetune.weights=none</code> for the untrained column.</p>")


def way_section(config, seen, models) -> str:
    """From left to right: the image; the code that stage 1 gives to each patch (section 2.2), one colour for each
    code and similar colours for similar codes; the patches that stage 2 hides (section 2.3); and which hidden codes
    each prediction of equation 3 names: blue with a dot is right, orange with a cross wrong. What to see: patches
    of the same look share a colour, hits are more frequent than by chance, and where the first guess is wrong, the
    likeliest codes still resemble what is hidden."""
    chosen = shown_images(config, seen)
    images, ids, colours = seen.images[chosen], models.ids[chosen], code_colours(models.vectors)
    try:
        masked = data.fixed_masks(len(seen.images), ids.shape[1], config.pretrain)[chosen]
        said, note = predict_masked(models.pretrained, images, ids, masked), ""
    except (UserError, ModelError) as error:
        said, note = None, missing(f"Left out: masks and predictions, because {error}")
    rows = []
    for j, i in enumerate(chosen):
        rows.append([(pixels(images[j]), seen.caption(i)),
                     (token_map(ids[j], colours, 1), f"{len(ids[j].unique())} codes")])
        if said:
            kinds = {f"{said.masked.shape[1]} hidden": None}
            kinds |= {f"{PREDICTIONS.get(name, name)}: {int(hits[j].sum())} right": hits[j]
                      for name, hits in said.hits.items()}
            rows[j] += [(mask_picture(images[j], said.masked[j], hits, ids.shape[1], fine(images.shape[-1])), caption)
                        for caption, hits in kinds.items()]
    if said:
        strips = [belief(seen, models.ids, chosen[0], said, name, m)
                  for m in range(min(3, said.masked.shape[1])) for name in said.top]
        note = ("<h3>What is hidden, and the five likeliest codes of each prediction</h3><p>First the hidden patch, "
                "framed, and its code. Then the five likeliest codes with their probabilities, each shown by a patch "
                f'of another image; a tick marks the right one.</p><div class="columns">{"".join(strips)}</div>')
    others = [f"<div>{cells(row, smallest=90)}</div>" for row in rows[1:]]
    return (f"<p>{html.escape(seen.names[chosen[0]])}</p>{cells(rows[0])}{note}{classified(seen, models, chosen[0])}"
            f'<h3>Other images</h3><div class="columns">{"".join(others)}</div>')


def belief(seen: Seen, ids: Tensor, i: int, said: Predictions, name: str, m: int) -> str:
    """Masked patch m of image i, the first one of `said`, and of each of the five likeliest codes an example patch from
    another image."""
    position, truth, size = int(said.masked[0, m]), int(said.truth[0, m]), seen.images.shape[-1] // ids.shape[1]

    def picture(image: int, row: int, column: int) -> np.ndarray:
        return patch_with_context(seen.images[image], row, column, size, fine(4 * size))

    pictures = [(picture(i, *divmod(position, ids.shape[1])), f"code {truth}")]
    for code, share in zip(said.top[name][0, m].tolist(), said.share[name][0, m].tolist()):
        places = [place for place in examples_of(ids, code, 2) if place[0] != i]
        shown = picture(*places[0]) if places else np.full_like(pictures[0][0], 128)
        pictures.append((shown, f"{code}: {100 * share:.0f} %{' ✓' if code == truth else ''}"))
    heading = html.escape(f"{PREDICTIONS.get(name, name)}, patch {position + 1}")
    return f"<div><p>{heading}</p>{cells(pictures, smallest=50)}</div>"


@torch.no_grad()
def classified(seen: Seen, models: "Models", i: int) -> str:
    """What the fine-tuned model says of image i."""
    try:
        model, classes = models.finetuned
    except (UserError, ModelError) as error:
        return missing(f"Left out: its class, because {error}")
    if not isinstance(model, Classifier):
        return ""
    share, best = model(data.normalize(data.to_unit(seen.images[i:i + 1])))[0].softmax(dim=0).topk(
        min(5, model.head.out_features))
    said = ", ".join(f"{classes[k] if classes else f'class {k}'} {100 * p:.0f} %"
                     for k, p in zip(best.tolist(), share.tolist()))
    return f"<h3>What the fine-tuned model sees in the whole image</h3><p>{html.escape(said)}</p>"


def words_section(config, seen, models) -> str:
    """Each row shows patches of one code. What to see: they have something in common that is more than a colour.
    VQ-KD predicts it (section 2.2), because a decoder must tell the teacher's features from the code alone."""
    ids, codebook, cfg = models.ids, models.vectors, config.visualize
    size = seen.images.shape[-1] // ids.shape[1]
    counts = ids.flatten().bincount(minlength=len(codebook))
    parts = []
    for code in choose_codes(ids, cfg, len(codebook)):
        places = examples_of(ids, code, cfg.examples)
        if not places:
            parts.append(f"<p>Code {code} does not occur in these images.</p>")
            continue
        near = ", ".join(f"{other} ({cosine:.2f})" for other, cosine in nearest_codes(codebook, code, 3))
        about = (f"{int(counts[code])} patches ({100 * counts[code] / counts.sum():.1f} %); nearest codes by cosine "
                 f"{near}")
        pictures = [(patch_with_context(seen.images[i], y, x, size, fine(4 * size)), "") for i, y, x in places]
        pictures.append((pixels(mean_patch(seen.images, ids, code, size).byte()), "mean"))
        parts.append(f"<div><p><b>code {code}:</b> {html.escape(kinds_of_code(seen, ids, code))}<br><small>{about}"
                     f"</small></p>"
                     f"{cells(pictures, smallest=50, alternative=f'a patch of code {code}')}</div>")
    note = "" if seen.classes else missing(NO_LABELS)
    return (f"<p>{int((counts > 0).sum())} of {len(codebook)} codes occur in {len(seen.images)} validation images; "
            f"perplexity {vqkd.perplexity(counts.double()):.0f}. Framed is the patch itself; the last picture is the "
            f"mean of all patches of the code.</p>{note}{purity_table(config, seen, models)}"
            f'<div class="columns">{"".join(parts)}</div>')


def kinds_of_code(seen: Seen, ids: Tensor, code: int) -> str:
    """What is known of the patches of a code: their parts and shapes, or the classes of their images."""
    if not seen.classes:
        return ""
    labels, here = seen.labels[:, None, None].expand_as(ids), ids == code
    if seen.parts is None:
        return f"in images of {most_frequent(labels[here], seen.classes)}"
    shapes = most_frequent(labels[here & (seen.parts > 0)], seen.classes)
    return f"{most_frequent(seen.parts[here], PARTS)}{f'; shapes: {shapes}' if shapes else ''}"


def purity_table(config, seen: Seen, models: "Models") -> str:
    """For drawn shapes: how well codes tell shapes and parts apart, beside k-means of features."""
    if seen.parts is None:
        return ""
    rivals, note = {"k-means of HOG features": lambda: HOG(config.model.patch_size)}, ""
    if config.tokenizer.teacher != "hog":
        rivals["k-means of the teacher's features"] = lambda: models.any_teacher
    codes = {"the tokenizer's codes": models.ids.flatten()}
    for name, open_features in rivals.items():
        try:
            codes[name] = clustered(open_features(), seen.images, len(models.vectors))
        except (UserError, ModelError) as error:
            note += missing(f"Left out: {name}, because {error}")
    parts, shapes = seen.parts.flatten(), seen.labels[:, None, None].expand_as(seen.parts).flatten()
    rows = [("purity by", "shape", "by chance", "part", "by chance")]
    for name, ids in codes.items():
        figures = *purity(ids[parts > 0], shapes[parts > 0]), *purity(ids, parts)
        rows.append((name, *(f"{100 * figure:.1f}\N{NO-BREAK SPACE}%" for figure in figures)))
    return (f"{table(rows)}<p>Purity is the share of patches that are of the most frequent kind of their code: 100 % "
            f"if each code means one kind. The drawing program knows which shape a patch shows (patches of background "
            f"do not count here) and which part of it: {', '.join(PARTS)}; a tip and a narrow part are corners too. "
            f"Many codes raise purity, so compare it with chance: the same codes, dealt out to patches at random. "
            f"K-means has as many codes, and was made of these same patches, which favours it a little.</p>{note}")


@torch.no_grad()
def cls_section(config, seen, models) -> str:
    """The aggregation head names the hidden codes from [CLS] and early patches. Here it gets the image's own [CLS],
    that of another image, or the mean of all. What to see: whether it loses hits. The method predicts it (section 2.3),
    because what the last blocks know of the image reaches the head through [CLS] alone. Where the three are alike,
    [CLS] has told the head nothing yet: early patches were enough."""
    model = models.pretrained
    if not model.head_layers:
        raise UserError("this model was pre-trained without an aggregation head (pretrain.head_layers=0), which alone "
                        "reads [CLS]")
    masked = data.fixed_masks(len(seen.images), model.grid, config.pretrain)
    batches = list(zip(seen.images.split(64), masked.split(64), take(models.ids.flatten(1), masked).split(64)))
    hits = hits_by_cls(model, batches, torch.ones(len(masked), dtype=torch.bool))
    own, foreign = hits["cls_accuracy"], hits["cls_accuracy_swapped"]
    shares = {title: hits[name].float().mean().item() for title, name in (
        ("own [CLS]", "cls_accuracy"), ("another image's [CLS]", "cls_accuracy_swapped"),
        ("mean [CLS]", "cls_accuracy_mean"))}
    lost = 100 * (own.float() - foreign.float()).mean(dim=1)  # of each image, in points
    rows, givers = [], another_image(len(masked)).tolist()
    for i in shown_images(config, seen):
        painted = [mask_picture(seen.images[i], masked[i], hit[i], model.grid, fine(seen.images.shape[-1]))
                   for hit in (own, foreign)]
        rows.append([(pixels(seen.images[i]), seen.caption(i)),
                     (painted[0], f"its own [CLS]: {int(own[i].sum())} right"),
                     (pixels(seen.images[givers[i]]), f"another image: {seen.caption(givers[i])}"),
                     (painted[1], f"with its [CLS]: {int(foreign[i].sum())} right")])
    pairs = "".join(f"<div>{cells(row, smallest=120)}</div>" for row in rows)
    return (f"<div class=\"columns\">{bar_chart('Hidden codes that the head names rightly', shares)}"
            f"<p>Of {masked.numel()} hidden patches of {len(masked)} images. Own less foreign: {lost.mean():.2f} ± "
            f"{lost.std() / len(lost)**0.5:.2f} points (standard error over images). The backbone names "
            f"{100 * hits['mim_accuracy'].float().mean():.1f} %.</p></div><h3>The same hidden patches with the image's "
            f'own [CLS] and with a foreign one</h3><div class="columns">{pairs}</div>')


@torch.no_grad()
def pixels_section(config, seen, models) -> str:
    """A small decoder paints each image from its codes alone. What to see: what it cannot paint, the codes have
    thrown away. The method never asks for pixels (section 2.2), so colour and fine texture may go, and parts should
    stay."""
    steps, chosen = config.visualize.decoder_steps, shown_images(config, seen)
    if not steps:
        raise UserError("the pixel decoder is off: set visualize.decoder_steps=600")
    rebuilt = (255 * models.pixel_decoder(models.ids[chosen].to(models.device))).round().byte().cpu()
    error = (rebuilt.float() - seen.images[chosen].float()).abs().mean() / 255
    pictures = [picture for i, painted in zip(chosen, rebuilt)
                for picture in ((pixels(seen.images[i]), seen.caption(i)), (pixels(painted), "from its codes"))]
    return (f"<p>The small decoder was trained for {steps} steps on the frozen tokenizer. Mean error {error:.3f} of 1."
            f"</p>{cells(pictures)}")


def attention_section(config, seen, models) -> str:
    """How much a token, [CLS] or the framed patch, attends to each patch: little is dark, much is bright, each map
    with a scale of its own. What to see: whether [CLS] looks at the object. It has a reason to, since the
    aggregation head learns of the rest of the image from [CLS] alone (section 2.3)."""
    chosen, scale = shown_images(config, seen)[:3], fine(seen.images.shape[-1])
    parts = []
    kinds = {"pre-trained": lambda: (models.pretrained, data.normalize),
             "fine-tuned": lambda: (models.finetuned[0], data.normalize),
             "teacher": lambda: (models.teacher.backbone, models.teacher.prepare)}
    for name, open_model in kinds.items():
        try:
            model, prepare = open_model()
            layer, grid = config.visualize.layer or model.depth, model.grid
            if layer > model.depth:
                raise UserError(f"it has {model.depth} blocks, and visualize.layer is {layer}")
        except (UserError, ModelError) as error:
            parts.append(missing(f"The {name} model is left out: {error}"))
            continue
        query = config.visualize.query or grid * (grid // 2) + grid // 2 + 1
        if query > grid**2:
            raise UserError(f"visualize.query is {query}, and an image has {grid**2} patches")
        maps = attention_maps(model, prepare(data.to_unit(seen.images[chosen])), layer)
        first = maps.shape[-1] - grid**2  # [CLS] and registers come before the patches
        for i, attention in zip(chosen, maps):  # [H, T, T]
            for token, row in (("[CLS]", 0), (f"patch {query}", first + query - 1)):
                heads = attention[:, row, first:].view(-1, grid, grid)
                image = enlarge(pixels(seen.images[i]), scale)
                if row:
                    side = len(image) // grid
                    image = framed(image, (query - 1) % grid * side, (query - 1) // grid * side, side)
                pictures = [(image, seen.caption(i)), (heat_map(heads.mean(dim=0)), "mean")]
                pictures += [(heat_map(head), f"head {h}") for h, head in enumerate(heads, 1)]
                parts.append(f"<div><p>{name}, block {layer}, {token}</p>{cells(pictures, smallest=50)}</div>")
    return f'<div class="columns">{"".join(parts)}</div>'


@torch.no_grad()
def neighbours_section(config, seen, models) -> str:
    """An image, and the five others whose [CLS] of the pre-trained model is nearest to its own. What to see:
    whether they are of its class, though no label was used. Patch aggregation (section 2.3) is meant to bring this
    about."""
    tokens = [models.pretrained.features(data.normalize(data.to_unit(part))) for part in seen.images.split(64)]
    cls, parts = torch.cat(tokens)[:, 0].float(), []
    for i in shown_images(config, seen):
        pictures = [(pixels(seen.images[j]), seen.caption(j)) for j in (i, *nearest_images(cls, i, 5))]
        parts.append(f"<div>{cells(pictures, smallest=50)}</div>")
    chart = scatter_chart("[CLS] of all images", principal_components(cls), seen.labels, seen.classes)
    return f'{"" if seen.classes else missing(NO_LABELS)}<div class="columns">{"".join(parts)}</div>{chart}'


def curves_section(config, seen, models) -> str:
    """What to see: in stage 1 the cosine loss falls while perplexity rises, or the codebook has collapsed; in stage 2
    both losses of equation 3 fall, cls_accuracy leaves cls_accuracy_swapped behind where [CLS] tells the head something
    (section 2.3), and the k-NN figures tell whether the features become useful at the same time."""
    if not (stages := curves_of([Path(config.output_dir)])):
        raise UserError(f"there are no metrics in '{config.output_dir}' yet: begin with `torchrun tokenizer.py "
                        f"{config.file}`")
    return "".join(f"<h3>{html.escape(stage)}</h3>{content}" for stage, content in stages)


def shown_images(config, seen: Seen) -> list[int]:
    """Random ones, but the same each time."""
    order = torch.randperm(len(seen.images), generator=torch.Generator().manual_seed(0))
    return order[:config.visualize.shown].tolist()


def fine(width: int) -> int:
    """By how much to enlarge a picture of this width before something fine is painted on it."""
    return max(1, round(192 / width))


class Models:
    """The run's models, opened when a section first asks for them, and only once."""

    def __init__(self, config, seen: Seen):
        self.config, self.seen = config, seen
        self.device = setup_distributed(config.device, config.threads)

    @functools.cached_property
    def tokenizer(self) -> vqkd.VQKD | TeacherTokenizer:
        given = self.config.pretrain.tokenizer_weights
        return vqkd.load_tokenizer(self.config, given, "pretrain.tokenizer_weights")[0].to(self.device)

    @functools.cached_property
    def ids(self) -> Tensor:
        """The id of the code of each patch of the images, int64 [n, grid, grid]."""
        return token_ids(self.tokenizer, self.seen.images)

    @property
    def vectors(self) -> Tensor:
        """The codebook, float32 [K, width]."""
        return self.tokenizer.vectors.detach().float().cpu()

    @functools.cached_property
    def pixel_decoder(self) -> PixelDecoder:
        train_set, _ = open_datasets(self.config.data)
        samples = data.TrainSamples(train_set, self.config.seed, self.config.data.image_size, (0.7, 1.0))
        return train_pixel_decoder(self.tokenizer, samples, self.config.visualize.decoder_steps, self.device,
                                   self.config.data.workers)

    @functools.cached_property
    def pretrained(self) -> MaskedImageModel:
        path = stage_checkpoint(self.config, "pretrain", given="", key="")
        content, config = read_model(path, "model", self.config.model), copy.copy(self.config)
        config.pretrain = restored(pretrain.PretrainConfig, content, "pretrain") or config.pretrain
        model = pretrain.build_model(config, MaskedImageModel.vocab_size(model_state(content, str(path))))
        say(load_pretrained(model, content, source=str(path)))
        return model.eval()

    @functools.cached_property
    def finetuned(self) -> tuple[VisionTransformer, list[str] | None]:
        """This run's own, whatever `finetune.weights` says: that is where fine-tuning starts from. And its classes."""
        config = copy.copy(self.config)
        config.finetune = dataclasses.replace(config.finetune, weights="", classes_file="")
        return open_trained(config)

    @functools.cached_property
    def any_teacher(self) -> nn.Module:
        return open_teacher(self.config)

    @property
    def teacher(self) -> Teacher:
        if not isinstance(self.any_teacher, Teacher):
            raise UserError(f"the teacher is {self.config.tokenizer.teacher}, which has no attention")
        return self.any_teacher


TITLES = (("Results", results_section), ("One image through the three stages", way_section),
          ("Codebook words", words_section), ("Pixels from codes", pixels_section),
          ("What [CLS] tells the head", cls_section), ("Attention", attention_section),
          ("Neighbours", neighbours_section), ("Curves", curves_section))


def report(config) -> Path:
    """Write OUTPUT_DIR/report.html."""
    if not Path(config.output_dir).is_dir():
        raise UserError(f"there is no run in '{config.output_dir}' yet: begin with `torchrun tokenizer.py "
                        f"{config.file}`")
    seen = look(config)
    models, sections = Models(config, seen), []
    for name, section in TITLES:
        try:
            content = section(config, seen, models)
        except (UserError, ModelError) as error:
            content = missing(f"Left out: {error}")
        sections.append((name, f"<p>{html.escape(section.__doc__)}</p>{content}"))
    path = Path(config.output_dir) / "report.html"
    path.write_text(page(f"BEiT v2: {config.output_dir}", sections), encoding="utf-8", errors="replace")
    return path


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and Path(arguments[0]).is_dir():
        print(compare([Path(argument) for argument in arguments], SECTIONS | segment.SECTIONS))
    else:
        print(report(load_config(SECTIONS)))


if __name__ == "__main__":
    launch(main, ModelError)
