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

IMAGES = 1000  # validation images to look at; what the base model's head reads of 1000 takes 600 MB, over all ranks


def predict(model: MaskedImageModel, images: Tensor, masked: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The model's predictions for images [B, 3, S, S], normalised, masked at [B, M]; and what its head has read: the
    final [CLS] and the early patches, [B, T, D], or None if there is no head."""
    read = []
    hooks = [block.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
             for block in model.cls_pt_layers[:1]]  # none without a head
    predictions = model(images, masked)
    for hook in hooks:
        hook.remove()
    return predictions, read[0] if read else None


def with_other_cls(model: MaskedImageModel, read: Tensor, cls: Tensor, masked: Tensor) -> Tensor:
    """The head's logits [B, M, K] if it reads `cls` [B, D] in place of the [CLS] in `read` [B, T, D]."""
    return model.aggregate(cls[:, None].to(read.dtype), read, masked, model.shared_position_bias())


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
    device = next(model.parameters()).device

    def gathered(parts: list[Tensor]) -> Tensor:
        return gather_in_order(torch.cat(parts), len(readable))

    hits, read = {name: [] for name in model.prediction_names}, []
    for images, masked, ids in batches:
        with autocast():
            predictions, part = predict(model, normalize(to_unit(images.to(device))), masked.to(device))
        for parts, logits in zip(hits.values(), predictions, strict=True):
            parts.append(score(logits, ids.to(device))[1])
        read.append(part)
    found = {f"{name}_accuracy": gathered(parts) for name, parts in hits.items()}

    def hits_with(cls: Tensor) -> Tensor:
        """The head's hits [n, M] with other [CLS], [n, D]; the backbone need not run again."""
        mine, parts = cls[rank()::world_size()].split([len(images) for images, *_ in batches]), []
        for (_, masked, ids), tokens, part in zip(batches, read, mine, strict=True):
            with autocast():
                logits = with_other_cls(model, tokens, part, masked.to(device))
            parts.append(score(logits, ids.to(device))[1])
        return gathered(parts)

    if model.head_layers:
        own = gathered([tokens[:, 0] for tokens in read])
        usable = readable.nonzero().flatten().to(device)
        other = own.index_copy(0, usable, own[usable[another_image(len(usable)).to(device)]])
        found["cls_accuracy_swapped"] = hits_with(other)
        found["cls_accuracy_mean"] = hits_with(own[usable].mean(dim=0).expand_as(own))
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
