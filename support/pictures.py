"""Pictures from arrays: masks and hits, patches, maps of codes and of attention, classes painted over an image.

No reader of the method needs this file.
"""

import colorsys
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

HIT, MISS = (0, 114, 178), (230, 159, 0)  # blue and orange, which colour-blind people can tell apart


def mask_picture(image: Tensor, masked: Tensor, hits: Tensor | None, grid: int, scale: int = 1) -> np.ndarray:
    """The image [3, S, S] with its masked patches [M] grey, or, with `hits` [M], blue with a dot where a prediction was
    right and orange with a cross where it was wrong: uint8 [S * scale, S * scale, 3]."""
    picture = Image.fromarray(enlarge(pixels(image), scale))
    drawing, side = ImageDraw.Draw(picture), picture.width // grid
    r, width = max(1, side // 6), max(1, side // 12)
    for m, position in enumerate(masked.tolist()):
        top, left = position // grid * side, position % grid * side
        y, x = top + side // 2, left + side // 2
        box, inner = (left, top, left + side - 1, top + side - 1), (x - r, y - r, x + r, y + r)
        if hits is None:
            drawing.rectangle(box, fill=(128, 128, 128))
        elif hits[m]:
            drawing.rectangle(box, fill=HIT, outline="white")
            drawing.ellipse(inner, fill="white")
        else:
            drawing.rectangle(box, fill=MISS, outline="white")
            drawing.line(inner, fill="black", width=width)
            drawing.line((x - r, y + r, x + r, y - r), fill="black", width=width)
    return np.asarray(picture)


def paint(file: Path, image: Tensor, masks: list[Tensor]) -> None:
    """Write an image uint8 [3, h, w], enlarged to its masks [H, W], and beside it each mask in colours over the image.
    Where a mask has 255, only the image shows."""
    image = F.interpolate(image[None] / 255, size=masks[0].shape, mode="bilinear")[0]
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
    drawing = ImageDraw.Draw(image)
    drawing.rectangle((left - 1, top - 1, left + side, top + side), outline="black", width=2)
    drawing.rectangle((left, top, left + side - 1, top + side - 1), outline="white")
    return np.asarray(image)


def token_map(ids: Tensor, colours: np.ndarray, cell: int) -> np.ndarray:
    """Ids [grid, grid] as squares of `cell` pixels in the colours of their codes: uint8 [grid*cell, grid*cell, 3]."""
    return enlarge(colours[ids.numpy()], cell)


def heat_map(values: Tensor, cell: int = 1) -> np.ndarray:
    """Values [grid, grid] from the smallest (dark blue) to the largest (yellow), as squares of `cell` pixels."""
    stops = np.array([(24, 24, 72), (40, 90, 140), (40, 150, 130), (140, 200, 80), (250, 230, 60)])
    values = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
    colours = np.stack([np.interp(values.numpy(), np.linspace(0, 1, 5), stops[:, channel]) for channel in range(3)], -1)
    return enlarge(colours.round().astype(np.uint8), cell)
