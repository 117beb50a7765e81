"""One small picture for each epoch of pre-training: masks, and what is predicted rightly behind them.

No reader of the method needs this file.
"""

import numpy as np
import torch
from PIL import Image
from torch import nn

import data
from beitv2 import MaskedImageModel, score, take
from support.loaders import evenly_chosen
from support.pictures import mask_picture, pixels
from support.processes import rank
from support.run import Run


@torch.no_grad()
def paint_epoch(run: Run, student: MaskedImageModel, tokenizer: nn.Module, val_set, epoch: int) -> None:
    """Write OUTPUT_DIR/pretrain/epoch-NN.png: four validation images, their masks, and what each head got right."""
    if rank() > 0:
        return
    student.eval()
    samples = data.ValSamples(val_set, run.config.data.image_size, strict=val_set.labelled)
    chosen = evenly_chosen(len(val_set), 4)
    images = torch.stack([samples[i]["image"] for i in chosen])
    masked = data.fixed_masks(len(chosen), student.grid, run.config.pretrain).to(run.device)
    with run.autocast():
        inputs = data.to_unit(images.to(run.device))
        target = take(tokenizer.target(inputs), masked)
        hits = [score(logits, target)[1] for logits in student(data.normalize(inputs), masked)]
    rows = []
    for i, image in enumerate(images):
        panels = [mask_picture(image, masked[i], None, student.grid)]
        panels += [mask_picture(image, masked[i], right[i], student.grid) for right in hits]
        rows.append(np.concatenate([pixels(image), *panels], axis=1))
    picture = np.concatenate(rows)
    Image.fromarray(picture).save(run.folder / f"epoch-{epoch + 1:02d}.png")
    run.picture("masks and hits", picture)
