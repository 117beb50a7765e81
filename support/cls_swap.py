"""What the aggregation head takes from [CLS]: its hits with the image's own [CLS], another image's, and the mean one.

If the head names as many hidden patches with the [CLS] of another image, its own tells it nothing of this image, and
patch aggregation (section 2.3 of the paper) has taught [CLS] nothing. No reader of the method needs this file.
"""

import contextlib

import torch
from torch import Tensor, nn

from beitv2 import MaskedImageModel, score, take
from data import ValSamples, fixed_masks, normalize, to_unit
from support.loaders import ValLoader, evenly_chosen
from support.processes import gather_in_order, rank, world_size
from support.run import Run

IMAGES = 1000  # validation images to look at; 1000 of 224 pixels take 150 MB


def predict(model: MaskedImageModel, images: Tensor, masked: Tensor,
            cls: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
    """What the model predicts if its head gets a [CLS] of our choice.

    images, masked   as for the model: [B, 3, S, S] normalised, and int64 [B, M]
    cls              what the head shall get in place of the final [CLS], [B, D]; None: the image's own
    returns          the model's predictions, and the [CLS] that the head has got, [B, D]; None if there is no head
    """
    got = []

    def give(block: nn.Module, arguments: tuple) -> tuple:
        x, *others = arguments  # x: [CLS] and the early patches, [B, T, D]
        if cls is not None:
            x = torch.cat([cls[:, None].to(x.dtype), x[:, 1:]], dim=1)
        got.append(x[:, 0])
        return x, *others

    hooks = [block.register_forward_pre_hook(give) for block in model.cls_pt_layers[:1]]  # none without a head
    predictions = model(images, masked)
    for hook in hooks:
        hook.remove()
    return predictions, got[0] if got else None


def another_image(count: int) -> Tensor:
    """For each of `count` images the number of another one, random but the same each time, int64 [count].

    Random, because images mostly come class by class: the next one would be of the same class, or, of drawn shapes,
    always of the next class. All images stand in one circle, and each gets what the one before it has.
    """
    circle = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return torch.empty_like(circle).scatter_(0, circle, circle.roll(1))


@torch.no_grad()
def hits_by_cls(model: MaskedImageModel, batches: list[tuple[Tensor, Tensor, Tensor]], readable: Tensor,
                autocast=contextlib.nullcontext) -> dict[str, Tensor]:
    """Which hidden patches are named rightly: by the backbone, and by the head with three kinds of [CLS].

    batches    this rank's images: uint8 [B, 3, S, S], masked positions [B, M], their ids [B, M]
    readable   bool [n], of the images of all ranks: the others give their [CLS] to none
    returns    bool [n, M], the same on every rank: "mim_accuracy" of the backbone; and, if there is a head,
               "cls_accuracy" with the image's own [CLS], "cls_accuracy_swapped" with that of another image, and
               "cls_accuracy_mean" with the mean [CLS] of all images
    """
    device, sizes = next(model.parameters()).device, [len(images) for images, *_ in batches]

    def ask(cls: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor | None]:
        """The hits of each prediction, [n, M], where the head gets `cls` [n, D], and what it has got, [n, D]."""
        given = [None] * len(batches) if cls is None else cls[rank()::world_size()].split(sizes)
        hits, got = {name: [] for name in model.prediction_names}, []
        for (images, masked, ids), part in zip(batches, given, strict=True):
            with autocast():
                predictions, part = predict(model, normalize(to_unit(images.to(device))), masked.to(device), part)
            for parts, logits in zip(hits.values(), predictions, strict=True):
                parts.append(score(logits, ids.to(device))[1])
            got.append(part)
        gathered = {name: gather_in_order(torch.cat(parts), len(readable)) for name, parts in hits.items()}
        return gathered, gather_in_order(torch.cat(got), len(readable)) if model.head_layers else None

    hits, own = ask()
    found = {f"{name}_accuracy": hit for name, hit in hits.items()}
    if own is not None:
        usable = readable.nonzero().flatten().to(device)
        other = own.index_copy(0, usable, own[usable[another_image(len(usable)).to(device)]])
        found["cls_accuracy_swapped"] = ask(other)[0]["cls"]
        found["cls_accuracy_mean"] = ask(own[usable].mean(dim=0).expand_as(own))[0]["cls"]
    return {name: hit.cpu() for name, hit in found.items()}


def masked_accuracy(run: Run, model: MaskedImageModel, tokenizer: nn.Module, val_set) -> dict[str, float]:
    """The shares of hits that `hits_by_cls` finds, in [0,1], behind fixed masks on evenly chosen validation images.

    Each image counts once, whatever the number of ranks, and the [CLS] of an image comes from the same other image.
    """
    model.eval()
    chosen = evenly_chosen(len(val_set), IMAGES)
    samples = ValSamples(val_set, run.config.data.image_size, strict=val_set.labelled)
    loader = ValLoader(samples, run.device_batch, workers=run.config.data.workers, indices=chosen)
    masks = fixed_masks(len(chosen), model.grid, run.config.pretrain)[rank()::world_size()].split(run.device_batch)
    batches, readable = [], []
    for batch, masked in zip(loader, masks, strict=True):
        with torch.no_grad(), run.autocast():
            target = tokenizer.target(to_unit(batch["image"].to(run.device)))
        batches.append((batch["image"], masked, take(target, masked.to(run.device))))
        readable.append(batch.get("readable", torch.ones(len(masked), dtype=torch.bool)).to(run.device))
    readable = gather_in_order(torch.cat(readable), len(chosen)).cpu()
    hits = hits_by_cls(model, batches, readable, run.autocast)
    return {name: hit[readable].float().mean().item() for name, hit in hits.items()}
