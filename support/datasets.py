"""Where images come from: folders, torchvision's data sets, and the drawn `shapes`; and how one is decoded.

No reader of the method needs this file: a data set has `classes`, `labels`, len(), load(i), label(i) and name(i).
"""

import contextlib
import glob
import hashlib
import os
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torchvision import datasets as tv
from torchvision.transforms.v2.functional import pil_to_tensor

from support.errors import UserError, explained
from support.processes import on_main, rank, say

try:
    from torchvision.io import decode_jpeg
except ImportError:  # torchvision 0.29 announces that a later one will have no decoders
    decode_jpeg = None

SUFFIXES = (*tv.folder.IMG_EXTENSIONS, ".jfif")  # of image files, in lower case
HELD_OUT = 0.1  # share of a folder's images that serve for validation where there is no folder for it


def open_dataset(config, split: Literal["train", "val"]) -> "Images":
    """The data set's `split`; a missing, empty or inconsistent one is a UserError that says what to do."""
    return open_splits(config, split)[0]


def open_datasets(config) -> "list[Images]":
    """Both splits, [train, val], and a line that says what was found. Where there is something to download, one process
    does it while the others wait."""
    if config.download:
        on_main(lambda: open_splits(config, "train", "val") and None)
    splits = open_splits(config, "train", "val")
    say(found(*splits))
    return splits


def open_splits(config, *splits: str) -> "list[Images]":
    if config.dataset == "ade20k":
        raise UserError("data.dataset: ade20k is for segment.py: for the other scripts, set data.dataset to "
                        "imagefolder or to a named data set")
    if config.dataset == "shapes":
        counts = {"train": config.train_images, "val": config.val_images}
        return [Shapes(split, counts[split], config.image_size) for split in splits]
    root = config.root
    if not os.path.isdir(root) and (os.path.exists(root) or config.dataset == "imagefolder"):
        raise UserError(f"data.root: '{root}' is {'a file' if os.path.exists(root) else 'not there'}: set data.root "
                        f"to the folder that holds the images")
    if config.dataset == "imagefolder":
        return open_folder(root, *splits)
    opened = [open_named(config, root, split) for split in splits]
    # Such as an Imagenette whose unpacking was interrupted. Its labels number the folders that are there, so they
    # would mean other classes in each split.
    if opened[0].classes != opened[-1].classes:
        raise UserError(f"data.dataset: {config.dataset} is not whole in '{root}': "
                        f"{differing(opened[0].classes, opened[-1].classes)}: fetch or unpack it again")
    return opened


def require_labels(dataset, what: str) -> None:
    """UserError if `what`, such as "a linear probe", cannot be made of these images: it needs two classes or more."""
    if not dataset.labelled:
        raise UserError(f"{what} needs the class of each image, and those in '{dataset.title}' have none: put them "
                        f"into ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg, and set data.root=ROOT")
    if len(dataset.classes) == 1:
        raise UserError(f"{what} needs two classes or more, and '{dataset.title}' has only '{dataset.classes[0]}': one "
                        f"class cannot be told from anything, so add a folder of other images")


# --- folders of images -----------------------------------------------------------------------------------------


def open_folder(root: str, *splits: str) -> "list[Images]":
    """The `splits`, "train" or "val", of a folder of images.

    With class folders in ROOT/train, images are labelled: ROOT/{train,val}/CLASS, with the same classes in both, which
    are numbered in alphabetical order. Any other folder holds images without labels, nested as they are. Training
    images are then those of ROOT/train, or without this folder all of ROOT but ROOT/val.

    Without a folder ROOT/val, about a tenth of the images is held out for validation. A hash of an image's name decides
    it. So the same images are held out in any order, in any place, and whatever is added later.
    """
    train_folder, val_folder = os.path.join(root, "train"), os.path.join(root, "val")
    folders = {"train": train_folder if os.path.isdir(train_folder) else root, "val": val_folder}
    classes, has_val = class_folders(train_folder), os.path.isdir(val_folder)
    if classes and has_val and classes != class_folders(val_folder):
        raise UserError(f"data.root: '{train_folder}' and '{val_folder}' must hold the same class folders, but "
                        f"{differing(classes, class_folders(val_folder))}: add or remove these")
    open_it = open_classes if classes else open_unlabelled
    if has_val:
        return [open_it(folders[split]) for split in splits]
    divided = dict(zip(folders, hold_out(open_it(folders["train"]), root)))
    return [divided[split] for split in splits]


def open_classes(folder: str) -> "Images":
    """FOLDER/CLASS/*.jpg, and what lies in folders there; labels number the class folders in alphabetical order."""
    classes = class_folders(folder)
    if not classes:
        raise UserError(f"data.root: '{folder}' has no class folders: put the images into {folder}/CLASS/*.jpg")
    paths, labels, passed_over = [], [], Counter()
    for label, name in enumerate(classes):
        files, others = find_images(os.path.join(folder, name))
        if not files:
            raise UserError(f"data.root: the class folder '{os.path.join(folder, name)}' holds no image "
                            f"({', '.join(SUFFIXES)}{passed_text(others)}): put images there, or remove the folder")
        paths += files
        labels += [label] * len(files)
        passed_over += others
    loose, others = find_images(folder, nested=False)
    passed_over += others + Counter({"outside of class folders": len(loose)})
    return Images(paths, labels, classes, folder, passed_over)


def open_unlabelled(folder: str) -> "Images":
    paths, passed_over = find_images(folder, but=os.path.join(folder, "val"))
    if not paths:
        kinds = ", ".join(SUFFIXES) + passed_text(passed_over)
        raise UserError(f"data.root: there is no image in '{folder}' ({kinds}): set data.root=PATH to a folder of "
                        f"images, or, for images with classes, to one that holds train/CLASS/*.jpg and val/CLASS/*.jpg")
    return Images(paths, [0] * len(paths), [], folder, passed_over)


def hold_out(images: "Images", root: str) -> "list[Images]":
    """Divide images into those to train on and about a tenth to validate on, at least one of each."""
    if len(images) < 2:
        raise UserError(f"data.root: '{images.title}' holds one image only, and training and validation need one each: "
                        f"add images")
    start = len(os.fsencode(root))
    numbers = np.array([int.from_bytes(hashlib.sha256(path[start:].lstrip(b"/")).digest()[:8], "little")
                        for path in images.sources], dtype=np.uint64)
    held_out = numbers < HELD_OUT * 2.0**64
    held_out[numbers.argmin()], held_out[numbers.argmax()] = True, False
    train, val = (Images(images.sources[chosen], images.labels[chosen], images.classes, images.title)
                  for chosen in (~held_out, held_out))
    train.passed_over = images.passed_over
    train.total = val.total = len(images)
    val.title += " (held out, by a hash of the name)"
    return [train, val]


def differing(one: list[str], other: list[str]) -> str:
    names = sorted(set(one) ^ set(other))
    return f"only one of them has {', '.join(names[:5])}{' …' * (len(names) > 5)}"


def class_folders(folder: str) -> list[str]:
    """The names of the folders in a folder; [] if there is no such folder."""
    if not os.path.isdir(folder):
        return []
    with explained(f"the folder '{folder}' cannot be read", "repair it, or set data.root=PATH", OSError):
        return sorted(name for name in os.listdir(folder)
                      if os.path.isdir(os.path.join(folder, name)) and not hidden(name))


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is a program's own: thumbnails, a waste bin, a Mac's `._` files."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN")


def find_images(folder: str, nested: bool = True, but: str | None = None) -> tuple[list[str], Counter]:
    """The paths of the images in a folder (and in the folders there, if `nested`), in order, and how many other files
    of each kind were passed over.

    Symbolic links are followed, but each folder counts once: a link that points upwards leads back to where it is, and
    its images would be found again and again. A folder `but` is left out.
    """
    found, passed_over = [], Counter()
    folders, seen = [folder], {os.path.realpath(path) for path in (folder, but) if path}
    while folders:
        here, names = folders.pop(), []
        with explained(f"the folder '{here}' cannot be read", "repair or remove it", OSError):
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        for entry in entries:
            # A broken link is an image that cannot be read. But reading a pipe would wait forever.
            is_image = entry.name.lower().endswith(SUFFIXES) and (
                entry.is_file(follow_symlinks=False) or entry.is_symlink() and not os.path.isdir(entry.path))
            is_folder = not is_image and os.path.isdir(entry.path)
            if hidden(entry.name):
                passed_over["hidden"] += is_image or is_folder
            elif is_folder:
                real = os.path.realpath(entry.path)
                if nested and real not in seen:
                    seen.add(real)
                    folders.append(entry.path)
            elif is_image:
                names.append(entry.name)
            else:
                passed_over[os.path.splitext(entry.name)[1].lower() or "without a suffix"] += 1
        found.append((here, names))
    return [os.path.join(here, name) for here, names in sorted(found) for name in names], +passed_over


def open_files(pattern: str) -> "Images":
    """The image at a path, those of a folder and its sub-folders, or those that a pattern such as *.jpg finds; `**` is
    any number of folders. Files that are no images are passed over, if it does not name them."""
    if os.path.isdir(pattern):
        paths, passed_over = find_images(pattern)
    else:
        paths, passed_over, given = [], Counter(), set(Path(pattern).parts)
        for path in [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True)):
            suffix = os.path.splitext(path)[1].lower()
            if any(hidden(part) for part in set(Path(path).parts) - given):
                passed_over["hidden"] += 1
            elif os.path.isfile(path) and (suffix in SUFFIXES or not pattern.endswith("*")):
                paths.append(path)
            elif os.path.isfile(path):
                passed_over[suffix or "without a suffix"] += 1
    existing = [path for path in paths if os.path.isfile(path)]
    passed_over += Counter({"broken links": len(paths) - len(existing)})
    if not existing:
        raise UserError(f"there is no image at '{pattern}'{passed_text(passed_over)}: give the path of an image or "
                        f"folder, or a pattern such as '*.jpg'")
    images = Images(existing, [0] * len(existing), [], pattern, passed_over)
    if rank() == 0:  # on stderr: what a script prints of these images is its result
        print(found(images), file=sys.stderr)
    return images


def open_val_folder(config) -> "Images":
    """What to evaluate: the validation split, or, for an `imagefolder` without training images, the class folders of
    ROOT/val or of ROOT."""
    root, val_folder = config.root, os.path.join(config.root, "val")
    if config.dataset == "imagefolder" and os.path.isdir(root) and not os.path.isdir(os.path.join(root, "train")):
        images = open_classes(val_folder if os.path.isdir(val_folder) else root)
    else:
        images = open_dataset(config, "val")
    say(found(images))
    return images


def found(*splits: "Images") -> str:
    """Such as "12,345 images of 37 classes in ROOT/train, 800 in ROOT/val; passed over: 12 .gif, 3 .heic"."""
    first, *others = splits
    classes = f" of {len(first.classes)} class{'es' * (len(first.classes) > 1)}" if first.labelled else \
        " without classes (so without k-NN, bag_knn and one_class)" * bool(others)
    counts = [f"{len(first):,} image{'s' * (len(first) > 1)}{classes} in {first.title}"]
    counts += [f"{len(split):,} in {split.title}" for split in others]
    return ", ".join(counts) + passed_text(sum((split.passed_over for split in splits), Counter()))


def passed_text(over: Counter) -> str:
    """"; passed over: 12 .gif, 3 .heic", or nothing."""
    kinds = [f"{count:,} {kind}" for kind, count in sorted(over.items(), key=lambda item: (-item[1], item[0]))[:8]]
    return f"; passed over: {', '.join(kinds)}{' …' * (len(over) > 8)}" if kinds else ""


class Images:
    """Images, each from a file or from an array that is in memory.

    sources       paths, or one uint8 array [N, H, W] or [N, H, W, 3] (of Shapes: N numbers)
    labels        N integers, all 0 without classes
    classes       their names; [] for images without labels
    title         where they are, for messages
    passed_over   how many files of each kind lie there too and are no images
    total         how many images these are a part of, where a part was held out
    """

    def __init__(self, sources, labels, classes: list[str], title: str, passed_over: Counter = Counter()):
        # The paths are one array of bytes instead of a million Python objects. Workers share the memory of the main
        # process until they write to it. But reading a Python object already writes to it, because Python counts its
        # references. So each worker would end with a copy of the whole list.
        if not isinstance(sources, np.ndarray):
            sources = np.array([os.fsencode(path) for path in sources], dtype=bytes)
        self.sources, self.is_files = sources, sources.dtype.kind == "S"
        self.labels, self.total = np.asarray(labels, dtype=np.int64), len(labels)
        self.classes, self.title, self.passed_over = classes, title, passed_over

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        return bool(self.classes)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return os.fsdecode(self.sources[index]) if self.is_files else f"{self.title}/{index}"

    def load(self, index: int) -> Tensor:
        """The image, decoded to its last byte: uint8 [3, H, W], RGB. Raises whatever the decoder raises."""
        if self.is_files:
            return read_image(self.sources[index])
        pixels = torch.from_numpy(self.sources[index])
        return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(3, -1, -1)


def read_image(path: bytes) -> Tensor:
    """An image file, turned upright as its EXIF says: uint8 [3, H, W], RGB. Its content decides of what kind it is, not
    its name.

    Photographs come from torchvision's decoder, to the same numbers as Pillow's and in half of its time. All else is
    Pillow's, also JPEG in the colours of printers, or broken: Pillow says in plainer words what is wrong.
    """
    with open(path, "rb") as file:
        content = bytearray(file.read())
    if decode_jpeg and content.startswith(b"\xff\xd8"):
        with contextlib.suppress(RuntimeError):
            pixels = decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), apply_exif_orientation=True)
            if len(pixels) < 4:  # grey or RGB
                return pixels.expand(3, -1, -1)
    with Image.open(path) as image:
        # Pillow hands 16 bits of a PNG or PGM out as 32-bit "I" too. But of other files nobody knows which of these
        # numbers is white, and Pillow would take nearly all of them for black or nearly all for white.
        if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise ValueError("its pixels are 32-bit numbers: convert it to 8 or 16 bits")
        with contextlib.suppress(SyntaxError, ValueError, KeyError, TypeError, struct.error):  # EXIF that is broken
            image = ImageOps.exif_transpose(image)  # says nothing; torchvision's decoder too passes over it
        return pil_to_tensor(to_rgb(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB. 16 bits are scaled to 8 (PIL would clip them). Transparent parts become white."""
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.asarray(image).astype(np.int64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# --- torchvision's data sets -----------------------------------------------------------------------------------


def imagenette_content(data: tv.Imagenette) -> tuple[list[str], list[int]]:
    """torchvision lists the files of each folder, those of a Mac's archives (`._NAME.JPEG`) too."""
    samples = [(path, label) for path, label in data._samples if not hidden(os.path.basename(path))]
    return [path for path, _ in samples], [label for _, label in samples]


# name: (torchvision's class, its names of the splits for training and validation, where it keeps images and labels)
NAMED = {
    "cifar10": (tv.CIFAR10, (True, False), lambda d: (d.data, d.targets)),
    "cifar100": (tv.CIFAR100, (True, False), lambda d: (d.data, d.targets)),
    "stl10": (tv.STL10, ("train", "test"), lambda d: (d.data.transpose(0, 2, 3, 1), d.labels)),
    "imagenette": (tv.Imagenette, ("train", "val"), imagenette_content),
    "food101": (tv.Food101, ("train", "test"), lambda d: (d._image_files, d._labels)),
    "oxford_pets": (tv.OxfordIIITPet, ("trainval", "test"), lambda d: (d._images, d._labels)),
    "fashion_mnist": (tv.FashionMNIST, (True, False), lambda d: (d.data.numpy(), d.targets)),
}


def open_named(config, root: str, split: str) -> Images:
    """One of torchvision's data sets, fetched first if it is missing and `data.download` allows it."""
    kind, names, content_of = NAMED[config.dataset]
    name = names[split == "val"]
    try:
        data = kind(root, name, download=False)
    except Exception as missing:  # torchvision raises RuntimeError, FileNotFoundError, EOFError, ... here
        for above in Path(os.path.abspath(root)).parents[:2]:  # ROOT may be the set's own folder, or one in it
            try:
                kind(str(above), name, download=False)
            except Exception:
                continue
            raise UserError(f"data.root: '{root}' is the folder of {config.dataset} itself: name the one that it lies "
                            f"in, data.root={above}") from missing
        if not config.download:
            raise UserError(f"data.dataset: {config.dataset} is not (or not whole) in '{root}': set data.download=true "
                            f"to fetch it, or data.root=PATH to where it is") from missing
        with explained(f"data.download: {config.dataset} could not be fetched into '{root}'",
                       "check the network and the disk, or put it there by hand", Exception):
            data = kind(root, name, download=True)
    classes = [name if isinstance(name, str) else name[0] for name in data.classes]
    return Images(*content_of(data), classes, title=f"{config.dataset}/{split}")


# --- drawn shapes ----------------------------------------------------------------------------------------------
# A data set without files, drawn by this code. The class of an image is its shape. Colour, texture, size, rotation,
# position, background and clutter are random, so that a linear model on pixels learns little.


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


class Shapes(Images):
    """`count` images of one shape each, drawn when asked for, from (split, index) alone."""

    drawn: dict[tuple, tuple] = {}  # each process keeps what it has drawn, up to 256 MiB
    drawn_crops: dict[tuple, dict] = {}  # what data.py has cropped from them, and keeps

    def __init__(self, split: str, count: int, image_size: int):
        numbers = np.arange(count)
        super().__init__(numbers, numbers % len(SHAPES), list(SHAPES), title=f"shapes/{split}")
        self.split, self.size = split, image_size
        self.crops = self.drawn_crops.setdefault((split, count, image_size), {})

    def load(self, index: int) -> Tensor:
        """uint8 [3, H, W]"""
        return self.image_and_shape(index)[0]

    def segmentation(self, index: int) -> np.ndarray:
        """uint8 [H, W]: 0 = background, class + 1 = the shape."""
        return (self.image_and_shape(index)[1] * (self.label(index) + 1)).astype(np.uint8)

    def image_and_shape(self, index: int) -> tuple[Tensor, np.ndarray]:
        key = self.split, self.size, index  # and the class, which is index mod 10
        if key in self.drawn:
            return self.drawn[key]
        drawing = self.draw(index)
        if len(self.drawn) < 2**28 // (4 * self.size**2):
            self.drawn[key] = drawing
        return drawing

    def draw(self, index: int) -> tuple[Tensor, np.ndarray]:
        """The picture, uint8 [3, H, W], and where its shape is: bool [H, W]."""
        rng = np.random.default_rng((2208_06366, self.split == "val", index))

        # Where: the shape's circle has a diameter of 76 to 94 % of the image, and leaves it by 3 % at most;
        # the tips of some shapes lie outside of the circle.
        radius = rng.uniform(0.38, 0.47)
        centre = rng.uniform(radius - 0.03, 1.03 - radius, 2)
        turn = np.radians(rng.uniform(-20, 20))
        turned = radius * np.array([[np.cos(turn), np.sin(turn)], [np.sin(turn), -np.cos(turn)]])  # rows grow downwards
        outlines = [centre + outline @ turned.T for outline in SHAPES[self.classes[self.label(index)]]]
        shape = self.stencil(outlines)  # [H, W, 1], the covered fraction of each pixel

        # What colour: to the eye lighter or darker than the background by a clear margin, else the edge would be lost.
        back, fore = rng.uniform(0.05, 0.95, (2, 3))
        while abs((fore - back) @ (0.299, 0.587, 0.114)) < 0.3:
            back, fore = rng.uniform(0.05, 0.95, (2, 3))
        canvas = back + self.texture(rng)
        for _ in range(rng.integers(2, 6)):  # clutter behind the shape: dots and strokes that are no shape
            spot, colour = rng.uniform(0, 1, 2), (back + rng.uniform(0, 1, 3)) / 2
            end = spot + rng.normal(0, 0.12, 2) * rng.integers(0, 2)
            clutter = self.stencil([stroke(spot, end, width=rng.uniform(0.02, 0.06))])
            canvas = canvas + clutter * (colour - canvas)
        canvas = canvas + shape * (fore + self.texture(rng) - canvas)  # [H, W, 3]
        image = torch.from_numpy((255 * canvas.clip(0, 1)).round().astype(np.uint8)).permute(2, 0, 1)
        return image, shape[..., 0] > 0.5

    def stencil(self, outlines, oversampling=3) -> np.ndarray:
        """A polygon in the unit square, less the hole if there is one, antialiased: [H, W, 1] coverage in [0, 1]."""
        mask = Image.new("L", (self.size * oversampling,) * 2)
        for outline, fill in zip(outlines, (255, 0)):
            ImageDraw.Draw(mask).polygon((outline * mask.width).flatten().tolist(), fill=fill)
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


# What a patch can show of a shape, for the page: do codes say it?
PARTS = ("background", "inside", "edge", "corner")


def parts_of_patches(shape: Tensor, grid: int) -> Tensor:
    """Which of PARTS each patch shows, int64 [n, grid, grid], where bool [n, S, S] says which pixels are the shape.

    A patch is background or inside if all its pixels but 2 % are. In any other one the border passes. A straight line
    is laid across the way from the middle of the background to the middle of the shape, with as many pixels on either
    side as they have. If it parts them with up to 5 % of the pixels on the wrong side, the patch shows an edge. Else it
    shows a corner: a tip, a bend, or both sides of a narrow part.
    """
    side = shape.shape[1] // grid
    patches = shape.unfold(1, side, side).unfold(2, side, side).reshape(-1, side**2).double()  # [n * N, P * P]
    covered = patches.sum(dim=1, keepdim=True)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    middles = patches @ places / covered, (1 - patches) @ places / (side**2 - covered)
    along = (middles[0] - middles[1]) @ places.T  # how far each pixel lies towards the shape
    rank = along.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    wrong = ((rank < covered) != patches.bool()).double().mean(dim=1)
    share = covered[:, 0] / side**2
    background, inside, edge = share <= 0.02, share >= 0.98, wrong <= 0.05
    parts = torch.where(background, 0, torch.where(inside, 1, torch.where(edge, 2, 3)))
    return parts.view(-1, grid, grid)


def stroke(start, end, width: float) -> np.ndarray:
    """The outline of a line with round ends. If start and end are the same point, it is a dot."""
    angle = np.degrees(np.arctan2(*(end - start)[::-1]))
    return np.concatenate([start + arc(width / 2, angle + 90, angle + 270, points=8),
                           end + arc(width / 2, angle - 90, angle + 90, points=8)])
