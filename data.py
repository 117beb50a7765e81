"""Images to batches: data sets, crops, block masks, and batch-wise augmentation on the device.

    worker:  decode -> random resized crop -> flip -> uint8          (class TrainView)
    device:  colour jitter -> normalise -> random erasing            (the functions at the end)

A worker is a process that prepares samples while the device computes. The work is divided between them like this:
what needs the decoded file, or shrinks it, is done by the worker. What is the same simple arithmetic for each pixel is
done by the device, for a whole batch at once. Images travel as uint8, a quarter of the bytes of float32.

Every random choice of a training sample (crop, flip, RandAugment, jitter factors, mask, erased box) is drawn in the
worker from a generator seeded by (seed, epoch, index), and is part of the sample, also where the device carries it
out. (Fixed crops, `data.views`, are seeded otherwise: see TrainView.) So samples do not depend on the number of
workers, and no generator's state has to be saved. The loop's own random numbers (drop path, MixUp) come from
generators that are seeded at each step by (seed, step, rank): see `engine.Run`.
"""

import functools
import glob
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import datasets as tv
from torchvision.transforms import RandomErasing, RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import engine
from engine import Count, Natural, UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = v2.InterpolationMode.BICUBIC


@dataclass
class DataConfig:
    """The section `data` of a config file."""

    dataset: Literal["imagefolder", "cifar10", "cifar100", "stl10", "imagenette", "food101", "oxford_pets",
                     "fashion_mnist", "shapes", "ade20k"] = "imagefolder"  # where the images come from
    root: str = "data"  # folder of the data set: ROOT/{train,val}/CLASS/*.jpg, or where to download to
    download: bool = False  # fetch a named data set that is not in `root`
    image_size: Count = 224  # pixels, square
    views: Natural = 0  # crops of each image that a frozen network sees: epoch e takes number e mod views; 0: new ones
    cache: str = ""  # with views: folder for what frozen networks say of the crops; empty: OUTPUT_DIR/cache; none: off
    workers: Natural = 8  # loader processes per rank
    train_images: Count = 4000  # `shapes` only: how many to draw for training
    val_images: Count = 1000  # `shapes` only: how many to draw for validation


# ---------------------------------------------------------------------------------------------------------
# Act 1: data sets. Each one has `classes`, `labels`, len(), load(i), label(i) and name(i).
# ---------------------------------------------------------------------------------------------------------


def open_dataset(config: DataConfig, split: Literal["train", "val"]):
    """The data set's `split`; a missing, empty or inconsistent one is a UserError that says what to do."""
    if config.dataset == "ade20k":
        raise UserError("data.dataset: ade20k is for segment.py: for the other scripts, set data.dataset to "
                        "imagefolder or to a named data set")
    if config.dataset == "shapes":
        return Shapes(split, config.train_images if split == "train" else config.val_images, config.image_size)
    root = os.path.expanduser(config.root)
    if os.path.exists(root) and not os.path.isdir(root):
        raise UserError(f"data.root: '{root}' is a file: set data.root to the folder that holds the images")
    return open_folder(root, split) if config.dataset == "imagefolder" else open_named(config, root, split)


def open_datasets(config: DataConfig):
    """Both splits, (train, val). If there is something to download, one process does it while the others wait."""
    if config.download:
        engine.on_main(lambda: (open_dataset(config, "train"), open_dataset(config, "val")) and None)
    return open_dataset(config, "train"), open_dataset(config, "val")


class Images:
    """Labelled images, each from a file or from an array that is in memory.

    sources: paths, or one uint8 array [N, H, W] or [N, H, W, 3]; labels: N integers; title: used in names.
    """

    def __init__(self, sources, labels, classes: list[str], title: str, upright: bool = False):
        # The paths are one array of bytes instead of a million Python strings. Workers share the memory of the main
        # process until they write to it. But reading a Python string already writes to it, because Python counts its
        # references. So each worker would end with a copy of the whole list.
        self.is_files = not isinstance(sources, np.ndarray)
        self.sources = np.array([os.fsencode(path) for path in sources]) if self.is_files else sources
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes, self.title, self.upright = classes, title, upright

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return os.fsdecode(self.sources[index]) if self.is_files else f"{self.title}/{index}"

    def load(self, index: int) -> Image.Image:
        """The image, decoded to its last byte, as RGB; raises whatever the decoder raises."""
        if not self.is_files:
            return to_rgb(Image.fromarray(self.sources[index]))
        with Image.open(self.name(index)) as image:
            return to_rgb(ImageOps.exif_transpose(image) if self.upright else image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB. 16 bits are scaled to 8 (PIL would clip them). Transparent parts become white."""
    if image.mode.startswith("I"):  # 16-bit grey; older Pillow hands it out as 32-bit "I"
        image = Image.fromarray((np.asarray(image).astype(np.int64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_folder(root: str, split: str) -> Images:
    """ROOT/SPLIT/CLASS/*.jpg; labels number the class folders of ROOT/train in alphabetical order."""
    folder = os.path.join(root, split) if split else root
    if not os.path.isdir(folder):
        raise UserError(f"data.root: '{root}' has no folder '{split}': put ImageNet-style folders "
                        f"{root}/train/CLASS/*.jpg and {root}/val/CLASS/*.jpg there, or set data.root=PATH"
                        f" to where they are")
    classes = class_folders(folder)
    if not classes:
        raise UserError(f"data.root: '{folder}' has no class folders: put the images into {folder}/CLASS/*.jpg")
    train_folder = os.path.join(root, "train")
    if split == "val" and os.path.isdir(train_folder) and classes != class_folders(train_folder):
        differing = sorted(set(classes) ^ set(class_folders(train_folder)))
        raise UserError(f"data.root: '{train_folder}' and '{folder}' must hold the same class folders, but only one of "
                        f"them has {', '.join(differing[:5])}{' …' * (len(differing) > 5)}: add or remove these")

    paths, labels = [], []
    for label, name in enumerate(classes):
        found = image_files(os.path.join(folder, name))
        if not found:
            raise UserError(f"data.root: the class folder '{os.path.join(folder, name)}' holds no image "
                            f"({', '.join(tv.folder.IMG_EXTENSIONS)}): put images there, or remove the folder")
        paths += found
        labels += [label] * len(found)
    return Images(paths, labels, classes, title=folder)


def image_files(folder: str) -> list[str]:
    """The images in a folder and its sub-folders, in order.

    Symbolic links are followed, but each folder counts once: a link that points upwards leads back to where it is, and
    its images would be found again and again.
    """
    found, seen = [], {os.path.realpath(folder)}
    for here, folders, names in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(here, name)) for name in sorted(folders)}
        folders[:] = [name for name, path in real.items() if path not in seen and not seen.add(path)]
        found.append((here, sorted(name for name in names if name.lower().endswith(tv.folder.IMG_EXTENSIONS))))
    return [os.path.join(here, name) for here, names in sorted(found) for name in names]


def open_files(pattern: str) -> Images:
    """The image at a path, those of a folder and its sub-folders, or those that a pattern such as *.jpg finds."""
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        paths = image_files(pattern)
    else:
        paths = [pattern] if os.path.isfile(pattern) else glob.glob(pattern)
    paths = sorted(path for path in paths if os.path.isfile(path))
    if not paths:
        raise UserError(f"there is no image at '{pattern}': give the path of an image or folder, or a pattern such as "
                        f"'*.jpg'")
    return Images(paths, [0] * len(paths), [], title=pattern, upright=True)


def open_val_folder(config: DataConfig):
    """What to evaluate: the validation split, or, for an `imagefolder` without splits, the class folders in ROOT."""
    root = os.path.expanduser(config.root)
    if config.dataset == "imagefolder" and os.path.isdir(root) and not os.path.isdir(os.path.join(root, "val")):
        return open_folder(root, "")
    return open_dataset(config, "val")


def class_folders(folder: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


# name: (how torchvision opens it, where it keeps the images, and the labels)
NAMED = {
    "cifar10": (lambda root, train, get: tv.CIFAR10(root, train, download=get), lambda d: d.data, lambda d: d.targets),
    "cifar100": (lambda root, train, get: tv.CIFAR100(root, train, download=get),
                 lambda d: d.data, lambda d: d.targets),
    "stl10": (lambda root, train, get: tv.STL10(root, "train" if train else "test", download=get),
              lambda d: d.data.transpose(0, 2, 3, 1), lambda d: d.labels),
    "imagenette": (lambda root, train, get: tv.Imagenette(root, "train" if train else "val", download=get),
                   lambda d: [path for path, _ in d._samples], lambda d: [label for _, label in d._samples]),
    "food101": (lambda root, train, get: tv.Food101(root, "train" if train else "test", download=get),
                lambda d: d._image_files, lambda d: d._labels),
    "oxford_pets": (lambda root, train, get: tv.OxfordIIITPet(root, "trainval" if train else "test", download=get),
                    lambda d: d._images, lambda d: d._labels),
    "fashion_mnist": (lambda root, train, get: tv.FashionMNIST(root, train, download=get),
                      lambda d: d.data.numpy(), lambda d: d.targets),
}


def open_named(config: DataConfig, root: str, split: str) -> Images:
    """One of torchvision's data sets, fetched first if it is missing and `data.download` allows it."""
    open_it, images_of, labels_of = NAMED[config.dataset]
    try:
        data = open_it(root, split == "train", False)
    except Exception as missing:  # torchvision raises RuntimeError, FileNotFoundError, EOFError, ... here
        if not config.download:
            raise UserError(f"data.dataset: {config.dataset} is not (or not whole) in '{root}': set data.download=true "
                            f"to fetch it, or data.root=PATH to where it is") from missing
        try:
            data = open_it(root, split == "train", True)
        except Exception as error:  # no network, a full disk, a broken archive
            raise UserError(f"data.download: {config.dataset} could not be fetched into '{root}' ({one_line(error)}): "
                            f"check the network and the disk, or put it there by hand") from error
    classes = [name if isinstance(name, str) else name[0] for name in data.classes]
    return Images(images_of(data), labels_of(data), classes, title=f"{config.dataset}/{split}")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------
# Act 2: `shapes`, a data set without files, drawn by this code. The class of an image is its shape. Colour, texture,
# size, rotation, position, background and clutter are random, so that a linear model on pixels learns little.
# ---------------------------------------------------------------------------------------------------------


def arc(radius: float, start=0.0, end=360.0, x=0.0, y=0.0, points=40):
    """Points [points, 2] on a circle around (x, y), from `start` to `end` degrees."""
    angle = np.radians(np.linspace(start, end, points))
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def corners(*radii: float, turn=90.0):
    """A polygon whose corners stand at equal angles around the origin, at these distances from it."""
    angle = np.radians(turn + 360 * np.arange(len(radii)) / len(radii))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.array(radii)[:, None]


def heart():
    t = np.linspace(0, 2 * np.pi, 60)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t) + 2
    return np.stack([x, y], axis=1) / 17


# Outlines within about the unit circle, y upwards: one polygon, or a polygon and the hole in it.
SHAPES = {
    "circle": [arc(0.85)],
    "ring": [arc(0.95), arc(0.5)],
    "triangle": [corners(1, 1, 1)],
    "square": [corners(1, 1, 1, 1)],
    "star": [corners(*[1, 0.42] * 5)],
    "cross": [np.array([(-.32, 1), (.32, 1), (.32, .32), (1, .32), (1, -.32), (.32, -.32),
                        (.32, -1), (-.32, -1), (-.32, -.32), (-1, -.32), (-1, .32), (-.32, .32)])],
    "heart": [heart()],
    # Two arcs through the same two tips, at +-60 degrees on the unit circle.
    "crescent": [np.concatenate([arc(1, 60, 300), arc(0.889, 256.9, 103.1, x=0.7015)]) + (0.25, 0)],
    "arrow": [np.array([(0, 1), (.8, .1), (.3, .1), (.3, -1), (-.3, -1), (-.3, .1), (-.8, .1)])],
    "hourglass": [np.array([(-.75, .9), (.75, .9), (.12, 0), (.75, -.9), (-.75, -.9), (-.12, 0)])],
}


class Shapes:
    """`count` images of one shape each, drawn when asked for, from (split, index) alone."""

    classes = list(SHAPES)
    drawn: dict[tuple, tuple] = {}  # each process keeps what it has drawn, up to 256 MiB

    def __init__(self, split: str, count: int, image_size: int):
        self.split, self.size = split, image_size
        self.labels = np.arange(count) % len(self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"shapes/{self.split}/{index}"

    def load(self, index: int) -> Image.Image:
        return self.image_and_shape(index)[0]

    def segmentation(self, index: int) -> np.ndarray:
        """uint8 [H, W]: 0 = background, class + 1 = the shape."""
        return (self.image_and_shape(index)[1] * (self.label(index) + 1)).astype(np.uint8)

    def image_and_shape(self, index: int) -> tuple[Image.Image, np.ndarray]:
        key = self.split, self.size, index  # and the class, which is index mod 10
        if key in self.drawn:
            return self.drawn[key]
        drawing = self.draw(index)
        if len(self.drawn) < 2**28 // (4 * self.size**2):
            self.drawn[key] = drawing
        return drawing

    def draw(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The picture, and where its shape is: bool [H, W]."""
        rng = np.random.default_rng((2208_06366, self.split == "val", index))

        # Where: the shape's circle has a diameter of 76 to 94 % of the image, and leaves it by 3 % at most;
        # the tips of some shapes lie outside of the circle.
        radius = rng.uniform(0.38, 0.47)
        centre = rng.uniform(radius - 0.03, 1.03 - radius, 2)
        turn = np.radians(rng.uniform(-20, 20))
        turned = radius * np.array([[np.cos(turn), np.sin(turn)], [np.sin(turn), -np.cos(turn)]])  # rows grow downwards
        outlines = [centre + outline @ turned.T for outline in SHAPES[self.classes[self.label(index)]]]
        shape = self.stencil(outlines)  # [H, W, 1], the covered fraction of each pixel

        # What colour: lighter or darker than the background by a clear margin, else the edge would be lost.
        back, fore = rng.uniform(0.05, 0.95, (2, 3))
        while abs(luminance(fore) - luminance(back)) < 0.3:
            back, fore = rng.uniform(0.05, 0.95, (2, 3))
        canvas = back + self.texture(rng)
        for _ in range(rng.integers(2, 6)):  # clutter behind the shape: dots and strokes that are no shape
            spot, colour = rng.uniform(0, 1, 2), (back + rng.uniform(0, 1, 3)) / 2
            end = spot + rng.normal(0, 0.12, 2) * rng.integers(0, 2)
            clutter = self.stencil([stroke(spot, end, width=rng.uniform(0.02, 0.06))])
            canvas = canvas + clutter * (colour - canvas)
        canvas = canvas + shape * (fore + self.texture(rng) - canvas)  # [H, W, 3]
        image = Image.fromarray((255 * canvas.clip(0, 1)).round().astype(np.uint8))
        return image, shape[..., 0] > 0.5

    def stencil(self, outlines, oversampling=3) -> np.ndarray:
        """A polygon in the unit square, less the hole if there is one, antialiased: [H, W, 1] coverage in [0, 1]."""
        mask = Image.new("L", (self.size * oversampling,) * 2)
        for outline, fill in zip(outlines, (255, 0)):
            ImageDraw.Draw(mask).polygon(list(map(tuple, outline * mask.width)), fill=fill)
        return np.asarray(mask.reduce(oversampling), dtype=np.float32)[..., None] / 255

    def texture(self, rng) -> np.ndarray:
        """An offset to a colour, plain, a gradient, stripes or dots: [1 or H, 1 or W, 3], within +-0.12."""
        kind = rng.choice(["plain", "gradient", "stripes", "dots"], p=[0.4, 0.4, 0.1, 0.1])
        tint, angle = rng.uniform(-0.12, 0.12, 3), rng.uniform(0, 2 * np.pi)
        waves, phase = rng.uniform(3, 7), rng.uniform(0, 6)
        y, x = np.mgrid[0:self.size, 0:self.size] / self.size - 0.5  # unit square: same at any size
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        wave = lambda t: np.sin(2 * np.pi * waves * t + phase)
        field = {"plain": lambda: np.zeros((1, 1)), "gradient": lambda: 1.4 * along,
                 "stripes": lambda: wave(along), "dots": lambda: wave(along) * wave(across)}[kind]()
        return field[..., None] * tint


def luminance(colour) -> float:
    return float(np.dot(colour, (0.299, 0.587, 0.114)))


def stroke(start, end, width: float) -> np.ndarray:
    """The outline of a line with round ends. If start and end are the same point, it is a dot."""
    angle = np.degrees(np.arctan2(*(end - start)[::-1]))
    return np.concatenate([start + arc(width / 2, angle + 90, angle + 270, points=8),
                           end + arc(width / 2, angle - 90, angle + 90, points=8)])


# ---------------------------------------------------------------------------------------------------------
# Act 3: block-wise masks (BEiT, arXiv 2106.08254, algorithm 1), with a constant number of masked patches.
#
# Why blocks: neighbouring patches look alike. If single patches were hidden, nearly every one would have visible
# neighbours, and the model could guess its code from their colour and edges. It would not need to know what the image
# shows. Of 75 masked patches among 14 x 14, 3 % have no visible neighbour (left, right, above, below) if
# single patches are drawn, and 55 % with the blocks below. Deep inside a block, nothing nearby helps. The model has to
# recognise the object, and to know how objects continue.
#
# Why 40 %: it is a compromise. With fewer masked patches, there is less to predict in each image, and it is easier.
# With many more, too little is left to recognise the object by, and the input differs more from what the model sees
# after pre-training, when nothing is masked.
#
# Why the same number in each image: masked positions, codes and logits of a batch then are whole tensors, [B, M] and
# [B, M, K], of the same shape in every step. With a number that varies, they would need padding or lists, the compiled
# model would be compiled again and again, and the host would have to wait for the device to learn the sizes.
# ---------------------------------------------------------------------------------------------------------


def block_mask(grid: int, num_masked: int, min_block: int = 16,
               generator: torch.Generator | None = None) -> torch.Tensor:
    """bool [grid * grid], row by row, with exactly `num_masked` True, mostly in rectangles that may overlap.

    grid        patches along one side of the image
    min_block   the least area, in patches, that a rectangle is drawn with while that many are still to be masked

    The paper masks 75 of 14 x 14 patches (38 %, "about 40 %") in blocks of at least 16. With `min_block` 0 there are no
    blocks, and every masked patch is drawn alone. Random numbers come from the `generator`, or from torch's default
    one. UserError when there are fewer than `num_masked` patches.
    """
    check_num_masked(num_masked, grid)
    mask = torch.zeros(grid, grid, dtype=torch.bool)
    # Add random rectangles until enough patches are masked. Near the end, most rectangles are too large for what is
    # left. After ten of them in a row that do not fit, give up, or the loop might never end.
    tries, masked = 0, 0
    while min_block and masked < num_masked and tries < 10:
        tries += 1
        area, aspect, y, x = torch.rand(4, generator=generator).tolist()
        # The area in patches is uniform between the minimum and what is still to be masked.
        area = min_block + area * (num_masked - masked - min_block)
        # The aspect ratio height / width is between 0.3 and 1 / 0.3. It is uniform in its logarithm, so that a flat
        # block is as likely as a tall one. A uniform number from 0.3 to 3.3 would be above 1 three times out of four.
        aspect = math.exp((2 * aspect - 1) * math.log(1 / 0.3))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid or width >= grid:  # a block never covers a whole row or column (as published)
            continue
        top, left = int(y * (grid - height + 1)), int(x * (grid - width + 1))
        block = mask[top:top + height, left:left + width]
        # Blocks may overlap. Only the patches that were visible count, and there must not be too many of them.
        new = block.numel() - int(block.sum())
        if 0 < new <= num_masked - masked:
            block.fill_(True)
            tries, masked = 0, masked + new

    # A few patches are still missing (or all), and no block was small enough. Draw single ones: the number is exact.
    # (Algorithm 1 of BEiT stops as soon as 40 % are exceeded, so its number varies. The published code of BEiT v2
    # completes the mask as we do here.)
    mask = mask.flatten()
    free = (~mask).nonzero().flatten()
    mask[free[torch.randperm(len(free), generator=generator)[:num_masked - masked]]] = True
    return mask


def check_num_masked(num_masked: int, grid: int):
    """UserError if an image of grid x grid patches has fewer than `num_masked`."""
    if num_masked > grid * grid:
        raise UserError(f"num_masked: {num_masked} masked patches are more than the {grid * grid} patches of the image "
                        f"({grid} x {grid}): lower the number of masked patches, or raise data.image_size")


# ---------------------------------------------------------------------------------------------------------
# Act 4: training samples, and epochs of them.
# ---------------------------------------------------------------------------------------------------------


class SampleView(Dataset):
    """view[epoch, index] is one sample. A subclass makes it in `draw(index)`. Each sample has its own random numbers.

    They come from a generator that is seeded by (seed, epoch, index) for this one sample. So the sample is the
    same whichever worker makes it and whatever was made before it. If the samples of a worker shared one generator,
    each would depend on how many came before. Then another number of workers would give other crops and masks, and an
    interrupted run could continue exactly only if it had saved the state of the generator of every worker.
    """

    def __init__(self, dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict:
        epoch, index = epoch_and_index
        return self.seeded(lambda: self.draw(index), self.seed, epoch, index)

    def seeded(self, draw, *numbers: int):
        """What `draw()` gives when torch's default CPU generator starts at these numbers, which make one seed.

        torchvision's transforms take no generator; they draw from the default one of the CPU. So that one is seeded for
        this sample, and fork_rng restores it afterwards: the training loop draws from it too. `torch.manual_seed` would
        also change the generators of the GPUs, which belong to the training loop.
        """
        with torch.random.fork_rng(devices=[]):
            # The hash makes one seed of the numbers. Their sum would give (epoch 1, image 2) and (epoch 2, image 1) the
            # same crop and mask.
            sample_seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(sample_seed[0]))
            return draw()

    def load(self, index: int):
        return self.dataset.load(index)

    def load_or_replace(self, index: int) -> tuple:
        """What `load` gives; the index of the image; the names of images that could not be read, one a line.

        A random other image takes the place of one that cannot be read, so that a single broken file in a million does
        not end a run of days. It is drawn from the sample's own generator, so it is the same one every time.
        """
        unreadable = []
        for _ in range(10):
            try:
                return self.load(index), index, "\n".join(unreadable)
            except UserError:
                raise
            except Exception:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
                unreadable.append(self.dataset.name(index))
                index = int(torch.randint(len(self.dataset), ()))
        raise UserError(f"ten images in a row cannot be read, among them '{unreadable[0]}': repair or remove them")


class TrainView(SampleView):
    """A training sample for classification and pre-training. view[epoch, index] is a dictionary with these entries:

    image   uint8 [3, S, S], a random resized crop, flipped half the time
    label   int64, the class; index: int64, the image's place in the data set
    jitter  float32 [3], factors of brightness, contrast and saturation  (if jitter > 0)
    mask    bool [mask_grid ** 2], `num_masked` of them True              (if num_masked > 0)
    erase   int64 [5], a box as top, left, height, width (height 0: none), and which noise fills it, see
            erase_boxes                                                  (if erase, a probability, > 0)
    unreadable  "" or the names, one a line, of unreadable images that this one replaces
    NAME    what the cache `attached[NAME]` holds for this crop            (if views > 0)

    The tokenizer uses crop and flip, pre-training also jitter and mask, fine-tuning RandAugment and erase instead.

    With `views` V > 0, an image has V crops in all: `image` in epoch e is that of epoch e mod V. So what a frozen
    network says of it can be computed once, see `Cache`. These crops do not depend on the seed: they are like a data
    set V times as large, and runs with other seeds use what was computed for the first one. Jitter, mask and erased
    box are drawn anew in each epoch, and do depend on the seed.
    """

    def __init__(self, dataset, seed: int, image_size: int, crop_scale=(0.08, 1.0), jitter=0.0,
                 num_masked=0, mask_grid=0, min_block=16, rand_augment=False, erase=0.0, views=0):
        check_num_masked(num_masked, mask_grid)
        if not 0 < crop_scale[0] <= crop_scale[1]:
            raise UserError(f"crop_scale is {list(crop_scale)}, and must be [smallest, largest] share of the image's "
                            f"area, both above 0")
        super().__init__(dataset, seed)
        self.size, self.views = image_size, views
        self.attached: dict[str, Cache] = {}
        self.drawn: dict[int, dict] = {}  # crops that come back are kept, up to 1 GiB in each process
        self.crop_scale, self.jitter, self.erase = crop_scale, jitter, erase
        self.num_masked, self.mask_grid, self.min_block = num_masked, mask_grid, min_block
        # RandAugment (arXiv 1909.13719): two random operations, such as rotate or shear. With 11 bins, magnitude 9 means
        # the angles and strengths of timm, which the paper used (`rand-m9-mstd0.5-inc1`, without its noise). But
        # Posterize keeps 4 bits here and 1 there, and timm's list has Invert and SolarizeAdd instead of Identity.
        mean_colour = [round(255 * channel) for channel in IMAGENET_MEAN]
        self.rand_augment = v2.RandAugment(2, 9, 11, interpolation=BICUBIC, fill=mean_colour) if rand_augment else None

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict:
        if not self.views:
            return super().__getitem__(epoch_and_index)
        epoch, index = epoch_and_index
        row = epoch % self.views * len(self) + index
        sample = self.crop(row)
        # The last number keeps these draws apart from those of a crop.
        anew = self.seeded(lambda: self.draw_rest(sample["image"]), self.seed, epoch, index, 1)
        return sample | anew | {name: cache[row] for name, cache in self.attached.items()}

    def crop(self, row: int) -> dict:
        """With `views`: crop number `row` of the views * len(dataset), those of the first view first."""
        if row not in self.drawn:
            view, index = divmod(row, len(self))
            sample = self.seeded(lambda: self.draw_crop(index), 0, view, index)  # 0: the same crops for every seed
            if len(self.drawn) >= 2**30 // sample["image"].numel():
                return sample
            self.drawn[row] = sample
        return self.drawn[row]

    def draw(self, index: int) -> dict:
        """Make one sample. The order of the draws is fixed: another order gives other samples for the same seed."""
        sample = self.draw_crop(index)
        return sample | self.draw_rest(sample["image"])

    def draw_crop(self, index: int) -> dict:
        image, index, unreadable = self.load_or_replace(index)
        # Random resized crop: a box whose area is a random share of the image (`crop_scale`), resized to [S, S]. The
        # model meets objects at many sizes and places. In pre-training the share starts at 0.2, not at 0.08: a very
        # small crop leaves little context from which a hidden patch can be told. Bicubic, as in evaluation.
        box = RandomResizedCrop.get_params(image, self.crop_scale, (3 / 4, 4 / 3))
        image = TF.resized_crop(image, *box, [self.size, self.size], BICUBIC)
        if torch.rand(()) < 0.5:
            image = TF.horizontal_flip(image)
        if self.rand_augment:
            image = self.rand_augment(image)
        return {"image": TF.pil_to_tensor(image), "label": self.dataset.label(index), "index": index,
                "unreadable": unreadable}

    def draw_rest(self, image: torch.Tensor) -> dict:
        """Three factors between 1 - jitter and 1 + jitter, a mask, a box: all are drawn here and used by the device."""
        sample = {}
        if self.jitter > 0:
            sample["jitter"] = torch.empty(3).uniform_(max(0.0, 1 - self.jitter), 1 + self.jitter)
        if self.num_masked > 0:
            sample["mask"] = block_mask(self.mask_grid, self.num_masked, self.min_block)
        if self.erase > 0:
            sample["erase"] = self.erased_box(image)
        return sample

    def erased_box(self, image: torch.Tensor) -> torch.Tensor:
        """Random erasing (arXiv 1708.04896): a box of 2 to 33 % of the image, int64 [5]. The device fills it.

        The class must then be recognised by what is left. A model that relies on one part only, such as the head of a
        dog, fails when the box hides it, and learns to look at the rest too.
        """
        if torch.rand(()) < self.erase:
            top, left, height, width, _ = RandomErasing.get_params(image, (0.02, 1 / 3), (0.3, 3.3), [0.0])
            if height < self.size:  # else no box was found, and torchvision returns the whole image
                return torch.tensor([top, left, height, width, int(torch.randint(NOISE, ()))])
        return torch.zeros(5, dtype=torch.int64)


class TrainLoader:
    """Epochs of device batches of `view`: shuffled, in the same order for any number of ranks and workers.

    A rank is one of W training processes, usually one for each GPU. batch_size is that of one device batch: global
    batch / (ranks * accumulation steps). Rank r takes the positions r, r + W, r + 2W, ... of the shuffled order. So the
    batches number b of all ranks hold together the images that a single process with the whole batch would take as its
    batch b: an experiment means the same on one GPU and on eight. If each rank took one long piece of the order
    instead, every batch would be another one.

    Images that do not fill a batch at the end of an epoch are left out, so that all batches have one shape. Each epoch
    is shuffled anew, so others are left out next time. rank and world_size default to those of the process group.
    """

    def __init__(self, view: TrainView, batch_size: int, seed: int, rank=None, world_size=None, workers=0):
        rank = engine.rank() if rank is None else rank
        world_size = engine.world_size() if world_size is None else world_size
        self.view, self.world_size, self.unreadable = view, world_size, set()
        self.batches = EpochBatches(view, batch_size, seed, rank, world_size)
        self.batches_per_epoch = len(view) // world_size // batch_size
        if self.batches_per_epoch == 0:
            raise UserError(f"{world_size} process(es) with {batch_size} images each need {world_size * batch_size} "
                            f"training images at once, but there are only {len(view)}: lower the batch size or use "
                            f"fewer processes")
        self.loader = DataLoader(view, batch_sampler=self.batches, persistent_workers=workers > 0,
                                 **loader_options(workers))

    def epoch(self, epoch: int, start: int = 0):
        """Yields the batches of an epoch from number `start` on: TrainView's entries, as tensors [B, ...].

        A resumed run starts in the middle: batches before `start` are skipped by their numbers, and nothing is
        decoded for them. UserError when more than 1 % of the images turn out to be unreadable.
        """
        self.batches.epoch, self.batches.start = epoch, start
        for batch in with_plain_errors(self.loader):
            self.count_unreadable(batch.pop("unreadable"))
            yield batch

    def count_unreadable(self, names: list[str]):
        for name in "\n".join(names).split("\n"):
            if name and name not in self.unreadable:
                self.unreadable.add(name)
                print(f"warning: '{name}' cannot be read, replaced by another image", file=sys.stderr)
        # A few broken files do no harm. Many mean that something is wrong, such as a disk or an unfinished copy.
        share = len(self.view) / self.world_size  # how many images this rank reads in an epoch
        if len(self.unreadable) > 0.01 * share:
            raise UserError(f"{len(self.unreadable)} of {share:.0f} training images cannot be read, among them "
                            f"'{min(self.unreadable)}': that is more than 1 %, so repair or remove them first")


class Rounds:
    """Rounds of `steps` steps each, for runs that count steps instead of epochs (segment.py).

    Takes the batches of a TrainLoader's epochs, one epoch after the other without end. A step takes `accumulation`
    batches. Batches that do not fill a step at the end of an epoch are left out.
    """

    def __init__(self, loader: TrainLoader, steps: int, accumulation: int):
        self.loader, self.batches_per_epoch = loader, steps * accumulation  # a round plays the part of an epoch
        self.whole = loader.batches_per_epoch // accumulation * accumulation
        if self.whole == 0:
            raise UserError("the training set is smaller than one batch: lower the batch size or add images")

    def epoch(self, number: int, start: int = 0):
        """Yields the batches of a round from number `start` on, like TrainLoader.epoch."""
        first, end = number * self.batches_per_epoch + start, (number + 1) * self.batches_per_epoch
        while first < end:
            epoch, skipped = divmod(first, self.whole)
            for batch in itertools.islice(self.loader.epoch(epoch, skipped), min(self.whole - skipped, end - first)):
                first += 1
                yield batch


class EpochBatches:
    """The batch sampler: it gives the workers lists of (epoch, index), one list for each batch.

    TrainLoader sets `epoch` and `start` before each pass. The order of an epoch follows from (seed, epoch) alone. The
    epoch is handed on with each index, because the worker needs it to seed the sample.
    """

    def __init__(self, view: TrainView, batch_size: int, seed: int, rank: int, world_size: int):
        self.sampler = DistributedSampler(view, world_size, rank, shuffle=True, seed=seed, drop_last=True)
        self.batch_size, self.epoch, self.start = batch_size, 0, 0

    def __iter__(self):
        self.sampler.set_epoch(self.epoch)
        order = list(self.sampler)
        for first in range(self.start * self.batch_size, len(order) - self.batch_size + 1, self.batch_size):
            yield [(self.epoch, index) for index in order[first:first + self.batch_size]]


def loader_options(workers: int) -> dict:
    """Options that all loaders share."""
    # A DataLoader draws a seed for its workers. Without a generator of its own it would take it from the default one,
    # and so change the random numbers of the training loop.
    return dict(num_workers=min(workers, engine.cores()), worker_init_fn=start_worker,
                pin_memory=torch.cuda.is_available(), generator=torch.Generator())


def start_worker(_: int):
    """Prepare a new worker process."""
    # Ctrl-C reaches all processes of a terminal. Only the main one reacts: it saves, then ends its workers.
    for number in engine.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # There may be as many workers as cores. If each used several threads, they would only take turns.
    torch.set_num_threads(1)


def with_plain_errors(loader: DataLoader):
    """The loader's batches. PyTorch wraps a worker's UserError into its traceback; this gets the sentence out again."""
    try:
        yield from loader
    except UserError as error:
        # The traceback holds the loader in a reference cycle. Python would clean it up late, and then wait 5 s for each
        # worker. Without the traceback, the workers end at once.
        error.__traceback__ = None
        raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None


# ---------------------------------------------------------------------------------------------------------
# Act 5: validation, every image exactly once.
# ---------------------------------------------------------------------------------------------------------


class ValView(Dataset):
    """view[index]: image uint8 [3, S, S], resized and cropped in the centre; label; index; what `attached` caches hold.

    An image that cannot be read is a UserError. If `strict` is False (for training images), the next one is taken.
    """

    def __init__(self, dataset, image_size: int, strict=True):
        self.dataset, self.size, self.strict = dataset, image_size, strict
        self.attached: dict[str, Cache] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        try:
            image = load_strictly(self.dataset.load, self.dataset, index)
        except UserError:
            if self.strict:
                raise
            return self[(index + 1) % len(self)]
        # The shorter side becomes 256/224 of the crop, so that a margin is cut off: objects are mostly in the middle.
        # From 384 pixels up there is no margin, as in the paper's evaluation.
        shorter_side = round(self.size * 256 / 224) if self.size < 384 else self.size
        image = TF.center_crop(TF.resize(image, [shorter_side], BICUBIC), [self.size, self.size])
        sample = {"image": TF.pil_to_tensor(image), "label": self.dataset.label(index), "index": index}
        return sample | {name: cache[index] for name, cache in self.attached.items()}


def load_strictly(load, dataset, index: int):
    """load(index). If the decoder fails, with any error, this raises a UserError that names the image."""
    try:
        return load(index)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the image '{dataset.name(index)}' cannot be read ({one_line(error)}): repair or remove "
                        f"it") from error


class ValLoader:
    """Batches of the view's images, or of those in `indices`. All ranks together have each image exactly once.

    Rank r of W has positions r, r + W, r + 2W, ... A rank may have one image fewer than another: if it were given one
    more to make them equal, that image would count twice in the accuracy. With batch_size None, images come one by one.
    UserError if there are more ranks than images, or, while iterating, if an image cannot be read.
    """

    def __init__(self, view: Dataset, batch_size: int | None, rank=None, world_size=None, workers=0, indices=None):
        rank = engine.rank() if rank is None else rank
        world_size = engine.world_size() if world_size is None else world_size
        self.chosen = range(len(view)) if indices is None else indices
        if len(self.chosen) < world_size:  # every rank raises it; else the others would wait for this one forever
            raise UserError(f"{len(self.chosen)} image(s) to evaluate cannot be shared by {world_size} processes: use "
                            f"fewer processes, or add validation images")
        mine = self.chosen[rank::world_size]
        self.loader = DataLoader(view, batch_size, sampler=mine, **loader_options(workers))

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        return with_plain_errors(self.loader)


# ---------------------------------------------------------------------------------------------------------
# Act 6: what a frozen network says of images that never change, computed once.
# ---------------------------------------------------------------------------------------------------------


CACHE_BATCH = 128  # images of one pass through a frozen network that fills a cache


class FixedCrops(Dataset):
    """All crops of a TrainView with `views` > 0, one after the other. They are the same for every seed."""

    def __init__(self, view: TrainView):
        self.view = view
        self.attached: dict[str, Cache] = {}

    def __len__(self) -> int:
        return self.view.views * len(self.view)

    def __getitem__(self, row: int) -> dict:
        return self.view.crop(row) | {name: cache[row] for name, cache in self.attached.items()}


class Cache:
    """One value for each image of a data set that never changes, in a memory-mapped file that all ranks share.

    A frozen teacher says the same of the same crop each time. On a small machine this takes longer than a small student
    needs to learn from it. So each crop is shown to it once.

    cache[row] is the value of one image, a tensor of this `shape` on the CPU.

    folder   FOLDER/NAME-DIGEST receives values.npy, done.npy and about.json. The digest is that of `about`, of the
             number of images and of some of their pixels: other images, crops, sizes or networks have another.
    images   Dataset of {"image": uint8 [3, S, S]}
    about    what else the values depend on, in plain values
    shape    of one value; dtype: numpy's name of its type
    """

    def __init__(self, folder: Path, name: str, images: Dataset, about: dict, shape: tuple[int, ...], dtype: str):
        self.images = images
        rows = torch.linspace(0, len(images) - 1, min(64, len(images))).long().tolist()
        pixels = hashlib.sha256(b"".join(images[row]["image"].numpy().tobytes() for row in rows)).hexdigest()
        self.about = about | {"images": len(images), "pixels": pixels, "shape": list(shape), "dtype": dtype}
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:8]
        self.folder = Path(folder) / f"{name}-{digest}"
        engine.on_main(lambda: self.make((len(images), *shape), dtype))
        self.open()

    def open(self) -> None:
        self.values = np.load(self.folder / "values.npy", mmap_mode="r+")
        self.done = np.load(self.folder / "done.npy", mmap_mode="r+")

    def __getstate__(self) -> dict:  # a loader's worker that is not forked opens the files itself
        return {name: value for name, value in vars(self).items() if name not in ("values", "done")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.open()

    def make(self, shape: tuple[int, ...], dtype: str) -> None:
        """Make the files, unless they are there and whole."""
        if self.folder.exists():
            try:
                values, done = (np.load(self.folder / name, mmap_mode="r") for name in ("values.npy", "done.npy"))
                if (values.shape, values.dtype, done.shape) == (shape, np.dtype(dtype), shape[:1]) \
                        and json.loads((self.folder / "about.json").read_text()) == self.about:
                    return
            except (FileNotFoundError, ValueError, EOFError):  # a missing, foreign, truncated or empty file
                pass
            engine.say(f"note: '{self.folder}' is damaged, and is made anew")
            shutil.rmtree(self.folder, ignore_errors=True)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        engine.say(f"cache of {shape[0]} images, {size / 2**20:,.0f} MiB: {self.folder}")
        unfinished = self.folder.with_name(f"{self.folder.name}.{os.getpid()}")  # so that no other run finds a half one
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            (unfinished / "about.json").write_text(json.dumps(self.about, indent=1))
            # Written, not only reserved: a memory-mapped file that finds the disk full kills the process.
            for name, rows, kind in (("values.npy", shape, dtype), ("done.npy", shape[:1], "bool")):
                with open(unfinished / name, "wb") as file:
                    header = dict(shape=rows, fortran_order=False, descr=np.lib.format.dtype_to_descr(np.dtype(kind)))
                    np.lib.format.write_array_header_1_0(file, header)
                    bytes_left = math.prod(rows) * np.dtype(kind).itemsize
                    while bytes_left:
                        bytes_left -= file.write(bytes(min(bytes_left, 2**24)))
            if not self.folder.exists():  # another run may have been quicker
                unfinished.rename(self.folder)
        except OSError as error:
            raise UserError(f"cannot write the cache '{self.folder}' of {size / 2**20:,.0f} MiB ({error.strerror}): "
                            f"free some space, set data.cache=FOLDER to one on another disk, or set data.cache=none to "
                            f"compute the values anew in each epoch") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def fill(self, compute, batch_size: int, device: torch.device, workers: int, title: str) -> "Cache":
        """Compute what is missing: `compute` takes a batch of `images`, on the device, and returns [B, *shape].

        Ranks share the work. If interrupted, it goes on where it was. Values come in blocks of `batch_size` rows that
        are computed together, so that they are the same to the bit however often that happened.
        """
        blocks = [range(first, min(first + batch_size, len(self.done))) for first in range(0, len(self.done), batch_size)]
        # One list for all ranks: a quick rank may write already while another still looks.
        missing = engine.on_main(lambda: [rows for rows in blocks if not self.done[rows.start:rows.stop].all()])
        mine = missing[engine.rank()::engine.world_size()]
        loader = DataLoader(self.images, batch_sampler=mine, **loader_options(workers))
        bar = tqdm(with_plain_errors(loader), desc=title, total=len(mine), leave=False, dynamic_ncols=True,
                   disable=None if engine.rank() == 0 else True)
        for rows, batch in zip(mine, bar):
            batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
            self.values[rows.start:rows.stop] = compute(batch).cpu().numpy()
            self.done[rows.start:rows.stop] = True
        engine.all_reduce_sum(torch.zeros(1, device=device)).item()  # wait for all ranks
        if not self.done.all():
            raise UserError(f"the cache '{self.folder}' has gaps: give each machine a folder on a disk of its own with "
                            f"data.cache=FOLDER, or set data.cache=none")
        return self

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.values[row]))


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of a model's weights, by which a cache knows whose values it holds."""
    return hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values())).hexdigest()


def cache_folder(config) -> Path | None:
    """Where the run's caches lie; None if it has none."""
    if not config.data.views or config.data.cache == "none":
        return None
    return Path(config.data.cache or Path(config.output_dir) / "cache")


# ---------------------------------------------------------------------------------------------------------
# Act 7: augmentation on the device, for a whole batch at once.
#
# In pre-training, student and tokenizer look at the same pixels, jitter included. Else the codes to be predicted
# would describe other colours than the student sees. (With `data.views` they do: codes are computed once, without
# jitter.) They differ only in how they normalise: so the images stay in [0, 1] until each model gets them. Everything
# here is arithmetic on tensors of a fixed shape. No function reads a value back from the device, so the host never
# has to wait for it.
# ---------------------------------------------------------------------------------------------------------


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 images in 0..255 as float32 in [0, 1]; float images are in [0, 1] already."""
    return images if images.is_floating_point() else images.float() / 255


def color_jitter(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """images [B, 3, H, W] uint8 or in [0, 1], factors [B, 3] of brightness, contrast, saturation -> [0, 1].

    Colours change with the light, and say little about what an object is. Jitter keeps the model from relying on them.
    This is torchvision's adjust_brightness, _contrast and _saturation one after the other, but with factors of its own
    for each image: torchvision would need a loop over the batch.

    It comes after the crop, and here instead of in the worker. The crop needs the decoded file, so it stays in the
    worker, and after it fewer pixels are left to change. Decoding keeps the workers busy enough; for the device this
    is little work. (The published code jitters the whole image before the crop, in a random order of operations. There
    the mean grey for the contrast is that of the whole image, and here that of the crop.)
    """
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)  # each [B, 1, 1, 1]
    images = (to_unit(images) * brightness).clamp(0, 1)
    # Contrast is the distance from the mean grey of the image, saturation that from the grey of the pixel. A factor
    # below 1 shrinks the distance, one above 1 stretches it. Each step clamps to [0, 1], as stored images would.
    mean_grey = grey(images).mean(dim=(2, 3), keepdim=True)  # [B, 1, 1, 1]
    images = (mean_grey + contrast * (images - mean_grey)).clamp(0, 1)
    greys = grey(images)  # [B, 1, H, W]
    return (greys + saturation * (images - greys)).clamp(0, 1)


def grey(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] -> [B, 1, H, W]. Green looks brighter than blue to the eye: the weights of ITU-R 601 say so."""
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def normalize(images: torch.Tensor, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> torch.Tensor:
    """Shift and scale images in [0, 1] by a mean and a standard deviation for each channel, those that a model expects.

    Every model must get the numbers it was trained with. Other ones would change all colours and contrasts for it.
    """
    return (images - channels(tuple(mean), images.device)) / channels(tuple(std), images.device)


@functools.cache  # copied to the device once, not in every step
def channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device)[:, None, None]  # [3, 1, 1]


def erase_boxes(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Fill the box of each normalised image [B, 3, H, W] with noise, for random erasing.

    Each pixel and channel gets a standard normal number. Normalised pixels have about mean 0 and deviation 1 too, so
    the noise keeps these. A box of one colour would look like an object.

    boxes   int64 [B, 5]: top, left, height, width, and where in `noise_bank` the noise of this image starts. The start
            is a part of the sample, so that an image gets the same noise on any number of ranks
    """
    # All coordinates are compared with all boxes at once. Writing into a slice of each image would need a loop, and the
    # boxes as Python numbers on the host.
    top, left, height, width, start = boxes[:, :, None].unbind(1)  # each [B, 1]
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    rows, columns = (y >= top) & (y < top + height), (x >= left) & (x < left + width)  # [B, H], [B, W]
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]  # [B, 1, H, W]
    pixels = images[0].numel()
    noise = noise_bank(pixels, images.device)[start + torch.arange(pixels, device=images.device)]  # [B, 3 * H * W]
    return torch.where(inside, noise.view_as(images), images)


NOISE = 2**20  # places in the bank where an image's noise may start


@functools.cache
def noise_bank(pixels: int, device: torch.device) -> torch.Tensor:
    """[NOISE + pixels] standard normal numbers, drawn once, always the same.

    Drawing new noise in each step would take it from the generator of the rank's device. Then the noise of an image
    would depend on which rank has it, and on which images came before.
    """
    return torch.randn(NOISE + pixels, generator=torch.Generator().manual_seed(0)).to(device)
