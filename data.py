"""Images to batches: data sets, crops, block masks, and batch-wise augmentation on the device.

    worker:  decode -> random resized crop -> flip -> uint8          (class TrainView)
    device:  colour jitter -> normalise -> random erasing            (the functions at the end)

Every random choice of a training sample (crop, flip, jitter factors, mask, erased box) is drawn in the
worker from a generator seeded by (seed, epoch, index) and travels with the sample. A run is therefore the
same for any number of workers, and can continue in the middle of an epoch without any saved state.
"""

import functools
import glob
import itertools
import math
import os
import signal
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import datasets as tv
from torchvision.transforms import RandomErasing, RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as TF

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

    def __init__(self, sources, labels, classes: list[str], title: str):
        # One block of bytes instead of a million Python strings: reading a string touches its reference
        # count, so each forked worker would end with a copy of the whole list.
        self.is_files = not isinstance(sources, np.ndarray)
        self.sources = np.array([os.fsencode(path) for path in sources]) if self.is_files else sources
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes, self.title = classes, title

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
            return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB: 16 bits are scaled (PIL would clip them), transparency lies on white."""
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

    samples = tv.folder.make_dataset(folder, {name: i for i, name in enumerate(classes)},
                                     extensions=tv.folder.IMG_EXTENSIONS, allow_empty=True)
    paths, labels = zip(*samples) if samples else ((), ())
    empty = sorted(set(range(len(classes))) - set(labels))
    if empty:
        raise UserError(f"data.root: the class folder '{os.path.join(folder, classes[empty[0]])}' holds no image "
                        f"({', '.join(tv.folder.IMG_EXTENSIONS)}): put images there, or remove the folder")
    return Images(paths, labels, classes, title=folder)


def open_files(pattern: str) -> Images:
    """The image at a path, those of a folder and its sub-folders, or those that a pattern such as *.jpg finds."""
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(pattern) for name in names
                 if name.lower().endswith(tv.folder.IMG_EXTENSIONS)]
    else:
        paths = [pattern] if os.path.isfile(pattern) else glob.glob(pattern)
    paths = sorted(path for path in paths if os.path.isfile(path))
    if not paths:
        raise UserError(f"there is no image at '{pattern}': give the path of an image or folder, or a pattern such as "
                        f"'*.jpg'")
    return Images(paths, [0] * len(paths), [], title=pattern)


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
# Act 2: `shapes`, a data set without files. The class is the shape; colour, texture, size, rotation,
# position, background and clutter are noise, so that pixels alone tell a linear model little.
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


# Outlines within the unit circle, y upwards: one polygon, or a polygon and the hole in it.
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

    def __init__(self, split: str, count: int, image_size: int):
        self.split, self.size = split, image_size
        self.drawn: dict[int, tuple] = {}  # each worker keeps what it has drawn, up to 256 MiB
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
        if index in self.drawn:
            return self.drawn[index]
        drawing = self.draw(index)
        if len(self.drawn) < 2**28 // (4 * self.size**2):
            self.drawn[index] = drawing
        return drawing

    def draw(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The picture, and where its shape is: bool [H, W]."""
        rng = np.random.default_rng((2208_06366, self.split == "val", index))

        # Where: the shape's circle has a diameter of 76 to 94 % of the image, and leaves it by 3 % at most.
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
    """The outline of a line with round ends, or of a dot where it ends where it starts."""
    angle = np.degrees(np.arctan2(*(end - start)[::-1]))
    return np.concatenate([start + arc(width / 2, angle + 90, angle + 270, points=8),
                           end + arc(width / 2, angle - 90, angle + 90, points=8)])


# ---------------------------------------------------------------------------------------------------------
# Act 3: block-wise masks (BEiT, arXiv 2106.08254, algorithm 1), with a constant number of masked patches.
# ---------------------------------------------------------------------------------------------------------


def block_mask(grid: int, num_masked: int, min_block: int = 16,
               generator: torch.Generator | None = None) -> torch.Tensor:
    """bool [grid * grid] with exactly `num_masked` True, mostly in rectangles of `min_block` patches or more.

    UserError when there are fewer than `num_masked` patches. Without a generator, torch's default one.
    """
    check_num_masked(num_masked, grid)
    mask = torch.zeros(grid, grid, dtype=torch.bool)
    tries, masked = 0, 0
    while masked < num_masked and tries < 10:
        tries += 1
        area, aspect, y, x = torch.rand(4, generator=generator).tolist()
        area = min_block + area * (num_masked - masked - min_block)  # uniform between the minimum and what is left
        aspect = math.exp((2 * aspect - 1) * math.log(1 / 0.3))  # log-uniform in [0.3, 1 / 0.3]
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid or width >= grid:
            continue
        top, left = int(y * (grid - height + 1)), int(x * (grid - width + 1))
        block = mask[top:top + height, left:left + width]
        new = block.numel() - int(block.sum())
        if 0 < new <= num_masked - masked:
            block.fill_(True)
            tries, masked = 0, masked + new

    # The paper stops "near" the target; a constant number gives every batch the same static shape.
    mask = mask.flatten()
    free = (~mask).nonzero().flatten()
    mask[free[torch.randperm(len(free), generator=generator)[:num_masked - masked]]] = True
    return mask


def check_num_masked(num_masked: int, grid: int):
    if num_masked > grid * grid:
        raise UserError(f"num_masked: {num_masked} masked patches are more than the {grid * grid} patches of the image "
                        f"({grid} x {grid}): lower the number of masked patches, or raise data.image_size")


# ---------------------------------------------------------------------------------------------------------
# Act 4: training samples, and epochs of them.
# ---------------------------------------------------------------------------------------------------------


class SampleView(Dataset):
    """view[epoch, index] is what `draw(index)` makes of an image, the same whenever and wherever it is drawn."""

    def __init__(self, dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict:
        # torchvision draws from the default CPU generator: seed it for this sample, and restore it after.
        # `torch.manual_seed` would reach for the GPU's generators too, which belong to the training loop.
        with torch.random.fork_rng(devices=[]):
            sample_seed = np.random.SeedSequence((self.seed, *epoch_and_index)).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(sample_seed[0]))
            return self.draw(epoch_and_index[1])

    def load(self, index: int):
        return self.dataset.load(index)

    def load_or_replace(self, index: int) -> tuple:
        """What `load` gives, or, if it cannot be read, for a random other image; its index; the unreadable names."""
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
    """view[epoch, index], for classification and pre-training, holds:

    image   uint8 [3, S, S], a random resized crop, flipped half the time
    label   int64, the class; index: int64, the image's place in the data set
    jitter  float32 [3], factors of brightness, contrast and saturation  (if jitter > 0)
    mask    bool [mask_grid ** 2], `num_masked` of them True              (if num_masked > 0)
    erase   int64 [5], a box as top, left, height, width (height 0: none), and which noise fills it, see
            erase_boxes                                                  (if erase, a probability, > 0)
    unreadable  "" or the names, one a line, of images that could not be read, in whose place this one came
    """

    def __init__(self, dataset, seed: int, image_size: int, crop_scale=(0.08, 1.0), jitter=0.0,
                 num_masked=0, mask_grid=0, min_block=16, rand_augment=False, erase=0.0):
        check_num_masked(num_masked, mask_grid)
        if not 0 < crop_scale[0] <= crop_scale[1]:
            raise UserError(f"crop_scale is {list(crop_scale)}, and must be [smallest, largest] share of the image's "
                            f"area, both above 0")
        super().__init__(dataset, seed)
        self.size = image_size
        self.crop_scale, self.jitter, self.erase = crop_scale, jitter, erase
        self.num_masked, self.mask_grid, self.min_block = num_masked, mask_grid, min_block
        # With 11 bins, magnitude 9 means timm's angles and strengths (`rand-m9-mstd0.5-inc1` without its noise).
        mean_colour = [round(255 * channel) for channel in IMAGENET_MEAN]
        self.rand_augment = v2.RandAugment(2, 9, 11, interpolation=BICUBIC, fill=mean_colour) if rand_augment else None

    def draw(self, index: int) -> dict:
        image, index, unreadable = self.load_or_replace(index)
        box = RandomResizedCrop.get_params(image, self.crop_scale, (3 / 4, 4 / 3))
        image = TF.resized_crop(image, *box, [self.size, self.size], BICUBIC)
        if torch.rand(()) < 0.5:
            image = TF.horizontal_flip(image)
        if self.rand_augment:
            image = self.rand_augment(image)
        sample = {"image": TF.pil_to_tensor(image), "label": self.dataset.label(index), "index": index,
                  "unreadable": unreadable}
        if self.jitter > 0:
            sample["jitter"] = torch.empty(3).uniform_(max(0.0, 1 - self.jitter), 1 + self.jitter)
        if self.num_masked > 0:
            sample["mask"] = block_mask(self.mask_grid, self.num_masked, self.min_block)
        if self.erase > 0:
            sample["erase"] = self.erased_box(sample["image"])
        return sample

    def erased_box(self, image: torch.Tensor) -> torch.Tensor:
        """Random erasing (arXiv 1708.04896): a box of 2 to 33 % of the image. The device fills it."""
        if torch.rand(()) < self.erase:
            top, left, height, width, _ = RandomErasing.get_params(image, (0.02, 1 / 3), (0.3, 3.3), [0.0])
            if height < self.size:  # else no box was found, and torchvision returns the whole image
                return torch.tensor([top, left, height, width, int(torch.randint(NOISE, ()))])
        return torch.zeros(5, dtype=torch.int64)


class TrainLoader:
    """Epochs of device batches of `view`: shuffled, in the same order for any number of ranks and workers.

    batch_size is that of one device batch: global batch / (ranks * accumulation steps). Rank r of W takes the
    positions r, r + W, ... of the epoch's order, so that batch b of all ranks together is batch b of a single
    process with the whole batch. What does not fill a batch at the end of an epoch is left out. rank and
    world_size are those of the process group, unless given.
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
        """Yields the epoch's collated batches (dicts of tensors, see TrainView) from number `start` on.

        UserError when more than 1 % of the images turn out to be unreadable.
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
        share = len(self.view) / self.world_size  # in one epoch, each rank meets this many images
        if len(self.unreadable) > 0.01 * share:
            raise UserError(f"{len(self.unreadable)} of {share:.0f} training images cannot be read, among them "
                            f"'{min(self.unreadable)}': that is more than 1 %, so repair or remove them first")


class Rounds:
    """The endless sequence of a TrainLoader's epochs, cut into rounds of `steps` each, for runs that count steps.

    A step takes `accumulation` batches. What does not fill a step at the end of an epoch is left out.
    """

    def __init__(self, loader: TrainLoader, steps: int, accumulation: int):
        self.loader, self.batches_per_epoch = loader, steps * accumulation  # here: of a round
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
    """The batch sampler: lists of (epoch, index), set to an epoch and a first batch before each pass."""

    def __init__(self, view: TrainView, batch_size: int, seed: int, rank: int, world_size: int):
        self.sampler = DistributedSampler(view, world_size, rank, shuffle=True, seed=seed, drop_last=True)
        self.batch_size, self.epoch, self.start = batch_size, 0, 0

    def __iter__(self):
        self.sampler.set_epoch(self.epoch)
        order = list(self.sampler)
        for first in range(self.start * self.batch_size, len(order) - self.batch_size + 1, self.batch_size):
            yield [(self.epoch, index) for index in order[first:first + self.batch_size]]


def loader_options(workers: int) -> dict:
    # The generator: a DataLoader draws a seed for its workers, and must not take it from the training loop's.
    return dict(num_workers=min(workers, engine.cores()), worker_init_fn=start_worker,
                pin_memory=torch.cuda.is_available(), generator=torch.Generator())


def start_worker(_: int):
    for number in engine.STOP_SIGNALS:  # these are for the parent, which saves and then ends its workers
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def with_plain_errors(loader: DataLoader):
    """The loader's batches. A UserError of a worker comes wrapped in its traceback: unwrap the sentence."""
    try:
        yield from loader
    except UserError as error:
        # torch leaves a reference cycle in the traceback, whose collection would wait 5 s for each worker.
        error.__traceback__ = None
        raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None


# ---------------------------------------------------------------------------------------------------------
# Act 5: validation, every image exactly once.
# ---------------------------------------------------------------------------------------------------------


class ValView(Dataset):
    """view[index]: image uint8 [3, S, S], resized and cropped in the centre; label; index.

    An image that cannot be read is a UserError; without `strict`, for training images, the next one takes its place.
    """

    def __init__(self, dataset, image_size: int, strict=True):
        self.dataset, self.size, self.strict = dataset, image_size, strict

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        try:
            image = load_strictly(self.dataset.load, self.dataset, index)
        except UserError:
            if self.strict:
                raise
            return self[(index + 1) % len(self)]
        # The usual margin of 256 / 224 around the crop; large inputs leave none, as in the paper's evaluation.
        shorter_side = round(self.size * 256 / 224) if self.size < 384 else self.size
        image = TF.center_crop(TF.resize(image, [shorter_side], BICUBIC), [self.size, self.size])
        return {"image": TF.pil_to_tensor(image), "label": self.dataset.label(index), "index": index}


def load_strictly(load, dataset, index: int):
    """load(index), where whatever a decoder raises becomes a UserError that names the image."""
    try:
        return load(index)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the image '{dataset.name(index)}' cannot be read ({one_line(error)}): repair or remove "
                        f"it") from error


class ValLoader:
    """Batches of the view's images (or of those in `indices`), each once over all ranks: its dicts, collated.

    Rank r of W has positions r, r + W, ... No padding: a rank may have one image fewer than another. UserError if
    there are more ranks than images; while iterating, if an image cannot be read. batch_size None: image by image.
    """

    def __init__(self, view: Dataset, batch_size: int | None, rank=None, world_size=None, workers=0, indices=None):
        rank = engine.rank() if rank is None else rank
        world_size = engine.world_size() if world_size is None else world_size
        chosen = range(len(view)) if indices is None else indices
        if len(chosen) < world_size:  # said on every rank, or the others would wait for this one for ever
            raise UserError(f"{len(chosen)} image(s) to evaluate cannot be shared by {world_size} processes: use fewer "
                            f"processes, or add validation images")
        mine = chosen[rank::world_size]
        self.loader = DataLoader(view, batch_size, sampler=mine, **loader_options(workers))

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        return with_plain_errors(self.loader)


# ---------------------------------------------------------------------------------------------------------
# Act 6: on the device, a whole batch at once, and never a wait for it.
# ---------------------------------------------------------------------------------------------------------


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 images in 0..255 as float32 in [0, 1]; float images are in [0, 1] already."""
    return images if images.is_floating_point() else images.float() / 255


def color_jitter(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """images [B, 3, H, W] uint8 or in [0, 1], factors [B, 3] of brightness, contrast, saturation -> [0, 1].

    Like torchvision's adjust_* one after the other, but with a factor per image.
    """
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)  # each [B, 1, 1, 1]
    images = (to_unit(images) * brightness).clamp(0, 1)
    mean_grey = grey(images).mean(dim=(2, 3), keepdim=True)  # [B, 1, 1, 1]
    images = (mean_grey + contrast * (images - mean_grey)).clamp(0, 1)
    greys = grey(images)  # [B, 1, H, W]
    return (greys + saturation * (images - greys)).clamp(0, 1)


def grey(images: torch.Tensor) -> torch.Tensor:
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def normalize(images: torch.Tensor, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> torch.Tensor:
    """Images in [0, 1] to a model's mean and standard deviation, three numbers each."""
    return (images - channels(tuple(mean), images.device)) / channels(tuple(std), images.device)


@functools.cache  # copied to the device once, not in every step
def channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device)[:, None, None]  # [3, 1, 1]


def erase_boxes(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Normalised images [B, 3, H, W] with each one's box full of standard normal noise, a value per pixel and channel.

    boxes   int64 [B, 5]: top, left, height, width, and where the image's noise starts in `noise_bank`: the sample
            brings it along, so that its noise is the same on any number of ranks
    """
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
    return torch.randn(NOISE + pixels, generator=torch.Generator().manual_seed(0)).to(device)
