import glob
import os
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torchvision import datasets as tv

from support.errors import UserError, one_line
from support.processes import on_main


def open_dataset(config, split: Literal["train", "val"]):
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


def open_datasets(config):
    """Both splits, (train, val). If there is something to download, one process does it while the others wait."""
    if config.download:
        on_main(lambda: (open_dataset(config, "train"), open_dataset(config, "val")) and None)
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


def open_val_folder(config):
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


def open_named(config, root: str, split: str) -> Images:
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
