"""Semantic segmentation: a class for every pixel, with UperNet on the pre-trained backbone (paper section 3.3).

    torchrun segment.py configs/camvid.yaml data.root=PATH                   # one process, CPU or GPU
    torchrun segment.py configs/camvid.yaml data.root=PATH segment.weights=none       # from scratch, to compare
    torchrun --nproc-per-node 8 segment.py configs/ade20k.yaml data.root=PATH         # eight GPUs of one machine
    torchrun segment.py configs/camvid.yaml data.root=PATH segment.eval_only=true     # measure best.pt again
    torchrun segment.py configs/camvid.yaml segment.mode=predict segment.images=PHOTO_OR_FOLDER   # masks of your own

    image -> blocks -> hidden states of four of them -> pyramid (strides 4, 8, 16, 32) -> UperNet -> class per pixel

The data lie as ADE20K's do: ROOT/images/SPLIT/NAME.jpg and ROOT/annotations/SPLIT/NAME.png, whose pixels are class
numbers. `data.dataset: shapes` draws images and masks itself.
Writes OUTPUT_DIR/segment/, or OUTPUT_DIR/segment_scratch/ for `weights: none`: last.pt, best.pt (of the highest mIoU),
metrics.jsonl, config.yaml, and overlays/NAME.png: image, truth and prediction side by side. What `predict` writes is in
OUTPUT_DIR/predict_masks/.
"""

import contextlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import data
from beitv2 import ModelConfig, ModelError, VisionTransformer, load_pretrained, read_checkpoint, read_model
from support.datasets import SHAPES, SUFFIXES, Images, find_images, found, open_dataset, open_files
from support.errors import UserError, explained
from support.files import say_if_unfinished, stage_checkpoint
from support.launch import launch
from support.loaders import ValLoader, evenly_chosen
from support.optimizers import clip_gradients, make_optimizer
from support.options import Amount, Count, Natural, OptimizerConfig, PathText, Share, load_config
from support.pictures import paint
from support.precision import Precision
from support.processes import all_reduce_sum, broadcast_buffers, gather_in_order, say, setup_distributed, world_size
from support.run import Run, shortened
from support.use import OrError, from_all_ranks, output_folder, refuse_unreadable, restored


IGNORE = 255  # the label, inside this file, of pixels that count for nothing


@dataclass
class SegmentConfig(OptimizerConfig):
    """The `segment` section; the defaults are the paper's for base on ADE20K."""

    mode: Literal["train", "predict"] = "train"  # predict: write masks of images that have no annotation
    weights: PathText = ""  # path or URL; empty: OUTPUT_DIR/pretrain/last.pt; none: an untrained backbone
    eval_only: bool = False  # only validate `checkpoint`
    # For eval_only and predict. Path or URL; empty: OUTPUT_DIR/segment/best.pt, or segment_scratch/ for weights: none.
    checkpoint: PathText = ""
    images: PathText = ""  # predict only: an image, a folder, or a pattern such as *.jpg
    iterations: Count = 160_000  # optimizer steps
    eval_every: Count = 16_000  # steps between two evaluations; a divisor of `iterations`
    warmup_iterations: Natural = 1500  # linear warm-up, on top of the linear decay to 0
    batch_size: Count = 16
    lr: Amount = 5e-5
    layer_decay: Share = 0.75  # a layer's learning rate is this times that of the layer above it
    drop_path: Share = 0.15
    dropout: Share = 0.1  # before each of the two output layers
    crop_size: Count = 512  # pixels; training crops and evaluation windows are squares of this size
    stride: Count = 341  # pixels between two evaluation windows
    short_side: Count = 512  # images are first scaled, keeping their aspect, to fit into short_side x long_side
    long_side: Count = 2048
    feature_layers: tuple[Natural, Natural, Natural, Natural] = (3, 5, 7, 11)  # blocks, from 0, that feed the pyramid
    auxiliary_weight: Amount = 0.4  # of the loss of the auxiliary head
    train_split: str = "training"
    val_split: str = "validation"
    classes: list[str] = field(default_factory=list)  # names, in the order of the annotations' numbers
    ignore_index: int = 255  # the annotations' number of unlabelled pixels
    reduce_zero_label: bool = False  # 0 means unlabelled, and 1 is the first class (ADE20K)
    overlays: Natural = 4  # validation images to paint after each evaluation

    @property
    def epochs(self) -> int:
        """What the other scripts do after an epoch happens here after `eval_every` steps."""
        return self.iterations // self.eval_every


SECTIONS = {"data": data.DataConfig, "model": ModelConfig, "segment": SegmentConfig}


# ----------------------------------------------------------------------------------------------------------------
# Act 1. Images with a label for each pixel


class AnnotatedFolder(Images):
    """ROOT/images/SPLIT/NAME.* and ROOT/annotations/SPLIT/NAME.png; every image must have its annotation."""

    def __init__(self, root: str, split: str, cfg: SegmentConfig):
        images, annotations = (os.path.join(root, kind, split) for kind in ("images", "annotations"))
        for folder in (images, annotations):
            if not os.path.isdir(folder):
                raise UserError(f"data.root: there is no folder '{folder}': put the images into {images} and their "
                                f"annotations, as PNG of the same name, into {annotations}, or set data.root=PATH")
        paths, passed_over = find_images(images, nested=False)
        names = [os.path.basename(path) for path in paths]
        if not names:
            raise UserError(f"data.root: '{images}' holds no image ({', '.join(SUFFIXES)}): put images there")
        annotated = set(os.listdir(annotations))
        missing = [name for name in names if f"{Path(name).stem}.png" not in annotated]
        if missing:
            raise UserError(f"{len(missing)} of {len(names)} images in '{images}' have no annotation; the first is "
                            f"'{missing[0]}': put {Path(missing[0]).stem}.png into {annotations}, or remove the image")
        super().__init__(paths, [0] * len(paths), cfg.classes, images, passed_over)
        self.annotations, self.cfg = annotations, cfg

    def segmentation(self, index: int) -> np.ndarray:
        """Class numbers from 0, and IGNORE. UserError, naming the file, for anything that is no annotation."""
        path = os.path.join(self.annotations, f"{Path(self.name(index)).stem}.png")
        with explained(f"the annotation '{path}' cannot be read", "repair it, or remove it and its image", Exception):
            with Image.open(path) as image:
                labels = np.asarray(image)
        if labels.ndim != 2:
            raise UserError(f"the annotation '{path}' is a colour picture: it must be a PNG of one channel (grey or "
                            f"palette) that holds class numbers")
        first = int(self.cfg.reduce_zero_label)  # the number of the first class
        labels = labels.astype(np.int64) - first
        ignored = (labels < 0) | (labels == self.cfg.ignore_index - first)
        wrong = labels[~ignored & (labels >= len(self.cfg.classes))]
        if wrong.size:
            raise UserError(f"the annotation '{path}' has the label {wrong[0] + first}, but "
                            f"segment.classes names {len(self.cfg.classes)} classes: complete the list, or set "
                            f"segment.ignore_index or segment.reduce_zero_label (masks of 0 and 255 must hold 0 and 1)")
        return np.where(ignored, IGNORE, labels).astype(np.uint8)


def open_split(config, split: Literal["train", "val"]) -> Images:
    """Training or validation images with their masks."""
    cfg = config.segment
    if config.data.dataset == "shapes":
        cfg.classes = ["background", *SHAPES]
        return open_dataset(config.data, split)
    if config.data.dataset != "ade20k":
        raise UserError(f"data.dataset: {config.data.dataset} has no masks: set data.dataset to ade20k, for folders "
                        f"laid out as ADE20K's are, or to shapes")
    if len(cfg.classes) == 1:
        raise UserError(f"segment.classes lists '{cfg.classes[0]}' only, and one class cannot be told from anything: "
                        f"name the background too")
    if twice := [name for name in cfg.classes if cfg.classes.count(name) > 1]:
        raise UserError(f"segment.classes lists '{twice[0]}' twice: give each class a name of its own")
    if not 1 < len(cfg.classes) < IGNORE:
        raise UserError(f"segment.classes lists {len(cfg.classes)} names: list those of the annotations' classes, 254 "
                        f"at most")
    return AnnotatedFolder(config.data.root, cfg.train_split if split == "train" else cfg.val_split, cfg)


def load_pair(dataset, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """uint8 image [3, H, W] and labels [H, W]: two tensors that torchvision's transforms treat alike. Of an image
    without annotation all pixels are unlabelled."""
    image = TF.to_image(dataset.load(index))
    if not hasattr(dataset, "segmentation"):
        return image, tv_tensors.Mask(torch.full(image.shape[1:], IGNORE, dtype=torch.uint8))
    labels = torch.from_numpy(dataset.segmentation(index))
    require_same_size(dataset.name(index), image.shape[1:], labels.shape)
    return image, tv_tensors.Mask(labels)


def require_same_size(path: str, image: tuple[int, int], labels: tuple[int, int]) -> None:
    """UserError if an image [H, W], as it is loaded, and its annotation [H, W] differ in size.

    Cameras store photos turned, with an EXIF tag that says how to turn them upright. Images obey that tag here, as in
    all scripts; an annotation is taken as it is stored, because it was drawn on what a program showed.
    """
    if tuple(image) == tuple(labels):
        return
    tag, advice = read_header(path)[1], "make them agree, or remove both"
    turned = f" when it is turned as its EXIF orientation tag ({tag}) says" if tag != 1 else ""
    if tuple(image) == tuple(labels[::-1]):
        other = "save the image as it is stored but without the EXIF tag" if turned else "the image"
        advice = f"they are turned against each other, so turn the annotation, or {other}"
    raise UserError(f"'{path}' has {image[1]} x {image[0]} pixels{turned}, but its annotation has {labels[1]} x "
                    f"{labels[0]}: {advice}")


def read_header(path: str) -> tuple[tuple[int, int], int]:
    """The size (H, W) that an image file is loaded with, and its EXIF orientation tag (1: upright), from its header."""
    with Image.open(path) as image:
        # Pillow would decode a whole PNG to look for a tag at its end, where hardly any program puts it.
        tag = image.getexif().get(0x0112, 1) if image.format != "PNG" or "exif" in image.info else 1
        # Pillow gives the size of a turned TIFF as it will be shown, and that of all others as it is stored.
        width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
    return ((width, height) if 5 <= tag <= 8 else (height, width)), tag


class Surveyed(Dataset):
    """samples[index]: `counts`, int64 [256], how many pixels of an annotation have each label; the EXIF `tag`."""

    def __init__(self, dataset: AnnotatedFolder):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        labels, path = torch.from_numpy(self.dataset.segmentation(index)), self.dataset.name(index)
        size, tag = labels.shape, 1
        with contextlib.suppress(Exception):  # whoever needs the pixels of an image will say if it cannot be read
            size, tag = read_header(path)
        require_same_size(path, size, labels.shape)
        return {"counts": labels.flatten().bincount(minlength=256), "tag": tag}


def survey(run: Run, dataset: Images, kind: Literal["training", "validation"]) -> None:
    """Look at a split's annotations before hours are spent on them, and say what is in them: classes, ignored pixels.

    UserError if nothing can be learned from them, or measured. An annotation of 680 x 512 pixels takes 10 to 20 ms of
    one core, so of more than 2000 only 2000 are looked at, evenly chosen.
    """
    if not isinstance(dataset, AnnotatedFolder):
        return
    cfg, chosen = run.config.segment, evenly_chosen(len(dataset), 2000)
    mine = list(ValLoader(Surveyed(dataset), 32, workers=run.config.data.workers, indices=chosen))
    counts, tags = (gather_in_order(torch.cat([batch[name] for batch in mine]).to(run.device), len(chosen)).cpu()
                    for name in ("counts", "tag"))
    counts = counts.sum(dim=0)
    occurring = counts[:len(cfg.classes)] > 0
    numbers = f"{cfg.ignore_index} and 0" if cfg.reduce_zero_label else cfg.ignore_index
    ignored = f"{100 * counts[IGNORE] / counts.sum():.3g} % of the pixels are ignored ({numbers})"
    if occurring.sum() < {"training": 2, "validation": 1}[kind]:
        only = f"no class but '{cfg.classes[occurring.int().argmax()]}'" if occurring.any() else "no labelled pixel"
        raise UserError(f"the {kind} annotations in '{dataset.annotations}' have {only}, and {ignored}: give each "
                        f"class its number (masks of 0 and 255 must hold 0 and 1), or set segment.ignore_index to the "
                        f"number of unlabelled pixels")
    number = f"{len(chosen)} of {len(dataset)}" if len(chosen) < len(dataset) else len(chosen)
    say(f"{kind}: {number} annotations have {occurring.sum()} of {len(cfg.classes)} classes, and {ignored}")
    if absent := [name for name, occurs in zip(cfg.classes, occurring) if not occurs]:
        say(f"note: no {kind} pixel has the class {shortened([repr(name) for name in absent])}")
    # Where the size fits, nobody can tell which way an annotation was drawn: so this is no error.
    if turned := [dataset.name(chosen[i]) for i in (tags != 1).nonzero().flatten()]:
        say(f"note: {len(turned)} {kind} images have an EXIF orientation tag, the first is '{turned[0]}'. They are "
            f"turned as it says, and their annotations are not: see that they fit")


def scaled_size(height: int, width: int, cfg: SegmentConfig, factor: float = 1.0) -> list[int]:
    """The size [height, width] that fits into short_side x long_side with its aspect kept, times `factor`."""
    factor *= min(cfg.short_side / min(height, width), cfg.long_side / max(height, width))
    return [max(1, round(height * factor)), max(1, round(width * factor))]


class CropSamples(data.SeededSamples):
    """samples[epoch, index]: a training sample of image uint8 [3, C, C] and labels uint8 [C, C].

    Image and labels together are scaled by 0.5 to 2, cropped so that no class fills more than 75 % if ten tries find
    such a place, and flipped; the colours of the image are distorted; what is smaller than the crop is padded.
    """

    def __init__(self, dataset, seed: int, cfg: SegmentConfig):
        super().__init__(dataset, seed)
        self.cfg = cfg
        # The published strengths with torchvision's operations (the published brightness is added, its contrast starts
        # from black). torchvision's RandomPhotometricDistort would swap the colour channels too.
        strengths = dict(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.1)
        self.distort = v2.Compose([v2.RandomApply([v2.ColorJitter(**{kind: strength})], p=0.5)
                                   for kind, strength in strengths.items()])

    def load(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        return load_pair(self.dataset, index)

    def draw(self, index: int) -> dict:
        (image, labels), index, unreadable = self.load_or_replace(index)
        size = scaled_size(*labels.shape, self.cfg, factor=float(torch.empty(()).uniform_(0.5, 2.0)))
        image, labels = TF.resize(image, size), TF.resize(labels, size)  # labels: nearest
        image, labels = self.crop(image, labels)
        if torch.rand(()) < 0.5:
            image, labels = TF.horizontal_flip(image), TF.horizontal_flip(labels)
        # Fill up at the right and the bottom: the image with the mean colour, the labels with what counts for nothing.
        height, width = labels.shape
        margins = [0, 0, max(0, self.cfg.crop_size - width), max(0, self.cfg.crop_size - height)]
        image = TF.pad(self.distort(image), margins, fill=[round(255 * mean) for mean in data.IMAGENET_MEAN])
        labels = TF.pad(labels, margins, fill=IGNORE)
        return {"image": image.as_subclass(Tensor), "labels": labels.as_subclass(Tensor), "index": index,
                "unreadable": unreadable}

    def crop(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        size = self.cfg.crop_size
        for _ in range(10):
            top, left = (int(torch.randint(max(1, length - size + 1), ())) for length in labels.shape)
            window = labels[top:top + size, left:left + size]
            counts = torch.bincount(window[window != IGNORE].flatten())
            if counts.sum() and counts.max() / counts.sum() <= 0.75:
                break
        return tv_tensors.Image(image[:, top:top + size, left:left + size]), tv_tensors.Mask(window)


class WholeSamples(Dataset):
    """samples[index]: a whole image, scaled to fit, uint8 [3, h, w], and its labels as they are, uint8 [H, W]."""

    def __init__(self, dataset, cfg: SegmentConfig):
        self.dataset, self.cfg = dataset, cfg

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        image, labels = data.load_strictly(lambda index: load_pair(self.dataset, index), self.dataset, index)
        image = TF.resize(image, scaled_size(*labels.shape, self.cfg))
        return {"image": image.as_subclass(Tensor), "labels": labels.as_subclass(Tensor), "index": index,
                "name": self.dataset.name(index)}


# ----------------------------------------------------------------------------------------------------------------
# Act 2. UperNet (arXiv 1807.10221)


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as published
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class UperHead(nn.Module):
    """Four maps [B, D, h_i, w_i], fine to coarse -> logits [B, classes, h_0, w_0].

    The coarsest map is pooled to 1, 2, 3 and 6 squares a side, to know the whole scene; then each finer map receives
    what the coarser ones know, from the top down; all four are fused at the finest resolution.
    """

    def __init__(self, dim: int, num_classes: int, dropout: float, pool_sizes: tuple[int, ...] = (1, 2, 3, 6)):
        super().__init__()
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(size), conv_norm_relu(dim, dim, 1))
                                   for size in pool_sizes)
        self.bottleneck = conv_norm_relu(dim * (1 + len(pool_sizes)), dim, 3)
        self.laterals = nn.ModuleList(conv_norm_relu(dim, dim, 1) for _ in range(3))
        self.smooths = nn.ModuleList(conv_norm_relu(dim, dim, 3) for _ in range(3))
        self.fusion = conv_norm_relu(4 * dim, dim, 3)
        self.classify = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(dim, num_classes, 1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        *finer, coarsest = maps
        pooled = [resize(pool(coarsest), coarsest.shape[2:]) for pool in self.pools]
        levels = [lateral(x) for lateral, x in zip(self.laterals, finer)]
        levels.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for i in (2, 1, 0):  # top down
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[2:])
        levels = [*(smooth(x) for smooth, x in zip(self.smooths, levels)), levels[3]]
        return self.classify(self.fusion(torch.cat([resize(x, levels[0].shape[2:]) for x in levels], dim=1)))


class Segmenter(VisionTransformer):
    """The backbone, a pyramid on four of its hidden states, UperNet, and an auxiliary head that eases training.

    feature_layers   four blocks, counted from 0; their hidden states go without a norm, as published
    """

    may_be_fresh = ("pyramid.", "decode_head.", "auxiliary_head.")
    # The final norm and the heads of pre-training and classification have no place here.
    droppable = (*VisionTransformer.droppable, "norm.", "fc_norm.")

    def __init__(self, num_classes: int, feature_layers: tuple[int, ...] = (3, 5, 7, 11), dropout: float = 0.1,
                 **backbone):
        super().__init__(final_norm=False, **backbone)
        if max(feature_layers) >= self.depth:
            raise ModelError(f"feature_layers is {list(feature_layers)}, and must name blocks from 0 to "
                             f"{self.depth - 1}")
        if self.grid < 2:
            raise ModelError(f"a crop of {self.image_size} pixels is a single patch of {self.patch_size}: choose a "
                             f"crop_size of at least {2 * self.patch_size}")
        self.feature_layers = tuple(sorted(feature_layers))
        # Nothing follows from later blocks. Several ranks would wait for their gradients for ever.
        self.blocks[max(feature_layers) + 1:].requires_grad_(False)
        dim = self.embed_dim
        self.pyramid = nn.ModuleList([  # the strides are those of 16-pixel patches
            nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(),
                          nn.ConvTranspose2d(dim, dim, 2, 2)),  # stride 4
            nn.ConvTranspose2d(dim, dim, 2, 2),  # stride 8
            nn.Identity(),  # stride 16
            nn.MaxPool2d(2),  # stride 32
        ])
        self.decode_head = UperHead(dim, num_classes, dropout)
        self.auxiliary_head = nn.Sequential(conv_norm_relu(dim, 256, 3), nn.Dropout2d(dropout),
                                            nn.Conv2d(256, num_classes, 1))
        for output in (self.decode_head.classify[1], self.auxiliary_head[2]):
            nn.init.normal_(output.weight, std=0.01)
            nn.init.zeros_(output.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised images [B, 3, S, S] -> logits [B, classes, S, S] and, while training, the auxiliary head's."""
        layers = [layer + 1 for layer in self.feature_layers]
        _, kept = self.forward_blocks(self.embed(images), self.shared_position_bias(), keep=tuple(layers))
        maps = [kept[layer][:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid)) for layer in layers]
        maps = [scale(x) for scale, x in zip(self.pyramid, maps)]  # each [B, D, s, s]
        logits = resize(self.decode_head(maps), images.shape[2:])
        return logits, resize(self.auxiliary_head(maps[2]), images.shape[2:]) if self.training else None


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled pixels. logits [B, classes, H, W], labels [B, H, W] -> scalar

    (Published: over all pixels, of which the unlabelled ones give 0.) 0, not 0/0, if a batch has no labelled pixel.
    """
    labels = labels.long()
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


# ----------------------------------------------------------------------------------------------------------------
# Act 3. Evaluation


@torch.no_grad()
def sliding_window(predict, image: Tensor, crop: int, stride: int) -> Tensor:
    """Logits [classes, H, W] of a normalised image [3, H, W]: the mean over overlapping windows, the last ones flush
    with the border. What is smaller than a window is padded with 0, the mean colour.

    predict   normalised windows [n, 3, crop, crop] -> logits [n, classes, crop, crop]
    """
    height, width = image.shape[1:]
    image = F.pad(image, (0, max(0, crop - width), 0, max(0, crop - height)))

    def starts(length: int) -> list[int]:
        return [min(start, length - crop) for start in range(0, max(1, length - crop + stride), stride)]

    corners = [(top, left) for top in starts(image.shape[1]) for left in starts(image.shape[2])]
    windows = torch.stack([image[:, top:top + crop, left:left + crop] for top, left in corners])
    logits = torch.cat([predict(part).float() for part in windows.split(8)])
    total = torch.zeros(logits.shape[1], *image.shape[1:], device=image.device)
    times = torch.zeros(image.shape[1:], device=image.device)
    for (top, left), values in zip(corners, logits):
        total[:, top:top + crop, left:left + crop] += values
        times[top:top + crop, left:left + crop] += 1
    return (total / times)[:, :height, :width]


def segmented(precision: Run | Precision, model: Segmenter, image: Tensor, size: tuple[int, int], cfg: SegmentConfig,
              chunk: int = 8) -> Tensor:
    """The most likely class of each pixel, int64 [H, W] of the given `size`, of an image uint8 [3, h, w].

    chunk   so many classes at a time are enlarged to `size`: all 150 of ADE20K would be 7 GB for a photo of a phone
    """
    def predict(windows: Tensor) -> Tensor:
        with precision.autocast():
            return model(windows)[0]

    logits = sliding_window(predict, data.normalize(data.to_unit(image)), cfg.crop_size, cfg.stride)
    best, labels = resize(logits[None, :chunk], size)[0].max(dim=0)
    for first in range(chunk, len(logits), chunk):
        values, ids = resize(logits[None, first:first + chunk], size)[0].max(dim=0)
        labels = torch.where(values > best, ids + first, labels)
        best = torch.maximum(values, best)
    return labels


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """int64 [classes, classes]: how many pixels of the true class (row) were taken for a class (column)."""
    valid = labels != IGNORE
    pairs = labels[valid].long() * num_classes + predictions[valid].long()
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def segmentation_figures(confusion: Tensor) -> dict:
    """From a confusion matrix: IoU and accuracy of each class, and three means.

    miou              mean over classes of  intersection / union  of predicted and true pixels. A class that neither
                      occurs nor is predicted is nan, and does not count
    mean_accuracy     mean over the classes that occur of the share of their pixels that were found
    pixel_accuracy    share of all pixels that were right
    """
    confusion = confusion.double()
    hits, truth, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    iou, accuracy = hits / (truth + predicted - hits), hits / truth
    return dict(iou=iou, accuracy=accuracy, miou=iou.nanmean().item(), mean_accuracy=accuracy.nanmean().item(),
                pixel_accuracy=(hits.sum() / truth.sum()).item())


@torch.no_grad()
def evaluate(run: Run, model: Segmenter, loader: ValLoader) -> Tensor:
    """The confusion matrix over all validation images, each at its own resolution, once, however many ranks there are.

    `segment.overlays` of them are also drawn into overlays/, each by the rank that has it.
    """
    cfg, painted = run.config.segment, evenly_chosen(len(loader.chosen), run.config.segment.overlays)
    model.eval()
    confusion = torch.zeros(len(cfg.classes), len(cfg.classes), dtype=torch.int64, device=run.device)
    for sample in loader:
        image, labels = (sample[key].to(run.device, non_blocking=True) for key in ("image", "labels"))
        prediction = segmented(run, model, image, labels.shape, cfg)
        confusion += confusion_matrix(labels, prediction, len(cfg.classes))
        if sample["index"] in painted:
            picture = run.folder / "overlays" / f"{Path(sample['name']).stem}.png"
            paint(picture, sample["image"], [sample["labels"], prediction.cpu()])
    return all_reduce_sum(confusion)


def print_table(confusion: Tensor, classes: list[str]) -> None:
    figures = segmentation_figures(confusion)
    width = max(map(len, classes))
    say(f"{'class':<{width}}{'IoU':>9}{'accuracy':>10}")
    for name, iou, accuracy in zip(classes, figures["iou"].tolist(), figures["accuracy"].tolist()):
        shown = ["-" if math.isnan(value) else f"{100 * value:.1f} %" for value in (iou, accuracy)]
        say(f"{name:<{width}}{shown[0]:>9}{shown[1]:>10}")
    occurring, counted = (int(figures[name].isfinite().sum()) for name in ("accuracy", "iou"))
    over = ""
    if occurring < len(classes):
        over = (f" (mean over {counted} of {len(classes)} classes: {occurring} that occur, and {counted - occurring} "
                f"that are only predicted)")
    say(f"mIoU {100 * figures['miou']:.2f} %{over}, mean accuracy {100 * figures['mean_accuracy']:.2f} %, "
        f"pixel accuracy {100 * figures['pixel_accuracy']:.2f} %")


# ----------------------------------------------------------------------------------------------------------------
# Act 4. Training


def poly_schedule(lr: float, iterations: int, warmup: int) -> list[float]:
    """Linear from `lr` at the first step towards 0 after the last, times a linear warm-up from 0."""
    return [lr * (1 - step / iterations) * min(1.0, step / max(1, warmup)) for step in range(iterations)]


def main() -> None:
    config = load_config(SECTIONS)
    cfg = config.segment
    if cfg.stride > cfg.crop_size:
        raise UserError(f"segment.stride is {cfg.stride} and segment.crop_size {cfg.crop_size}: a larger stride would "
                        f"leave gaps between the windows, so lower it")
    if cfg.iterations % cfg.eval_every:
        raise UserError(f"segment.iterations is {cfg.iterations} and segment.eval_every is {cfg.eval_every}: the first "
                        f"must be a multiple of the second")
    if cfg.eval_only and cfg.mode != "train":
        raise UserError("segment.eval_only is for segment.mode=train: leave one of the two out")
    modes = {"train": evaluate_only if cfg.eval_only else train, "predict": predict}
    modes[cfg.mode](config)


def train(config) -> None:
    """Train a segmenter from a pre-trained backbone; validate after every `eval_every` steps and keep the best."""
    cfg, size = config.segment, config.segment.crop_size
    run = Run(stage_folder(cfg), config, cfg)
    if run.device_batch * (world_size() if run.device.type == "cuda" else 1) < 2:
        raise UserError("BatchNorm needs at least two images at once: raise segment.batch_size or "
                        "segment.device_batch_size, or use fewer processes")
    train_set, val_set = open_split(config, "train"), open_split(config, "val")
    say(found(train_set, val_set))
    val_loader = ValLoader(WholeSamples(val_set, cfg), batch_size=None, workers=config.data.workers)
    model = Segmenter(len(cfg.classes), cfg.feature_layers, cfg.dropout, drop_path=cfg.drop_path,
                      **config.model.backbone(size))
    source, example = None, (torch.zeros(1, 3, size, size),)
    if cfg.weights != "none":
        source = stage_checkpoint(config, "pretrain", cfg.weights, "segment.weights")
        content = read_model(source, "model", config.model)
        say_if_unfinished(content, source)
        say(load_pretrained(model, content, source=str(source)))
    optimizer = make_optimizer(model.to(run.device), cfg, cfg.layer_decay)
    run.notes = {"classes": cfg.classes}
    parallel = run.begin(CropSamples(train_set, config.seed, cfg), source, example, cfg.eval_every, model=model,
                         optimizer=optimizer)
    if run.step == 0:
        survey(run, val_set, "validation")
        survey(run, train_set, "training")
    lr = poly_schedule(cfg.lr, cfg.iterations, cfg.warmup_iterations)

    for epoch in run.epochs():  # of `eval_every` steps each
        parallel.train()
        for step, batch, last in run.micro_batches(epoch):
            for group in optimizer.param_groups:
                group["lr"] = lr[step] * group["lr_scale"]
            labels = batch["labels"]  # uint8 [B, C, C]
            with run.autocast():
                logits, auxiliary_logits = parallel(data.normalize(data.to_unit(batch["image"])))  # [B, classes, C, C]
            # The auxiliary head looks at the third of the four layers: a short way for gradients to blocks below.
            auxiliary_loss = segmentation_loss(auxiliary_logits, labels)
            loss = segmentation_loss(logits, labels) + cfg.auxiliary_weight * auxiliary_loss
            run.backward(loss)
            labelled = labels != IGNORE
            hits = (logits.argmax(dim=1) == labels) & labelled
            run.record(loss=loss, accuracy=hits.sum() / labelled.sum().clamp(min=1))
            if last:
                run.scaler.unscale_(optimizer)
                grad_norm = clip_gradients(optimizer, cfg.clip_grad)
                run.scaler.step(optimizer)  # optimizer.step(), unless fp16 gradients have overflowed
                run.scaler.update()
                optimizer.zero_grad()
                run.record(lr=lr[step], grad_norm=grad_norm)

        broadcast_buffers(model)  # the running statistics of BatchNorm, which on CPU each rank has of its own
        confusion = evaluate(run, model, val_loader)
        figures = {name: value for name, value in segmentation_figures(confusion).items() if isinstance(value, float)}
        if not figures["miou"] <= run.best:  # nan too, where no pixel is labelled: there is a best.pt in any case
            run.best = figures["miou"]
            run.save_model("best.pt", model, val=figures)
        run.end_epoch(epoch, figures)
        if epoch + 1 == cfg.epochs:
            print_table(confusion, cfg.classes)


def stage_folder(cfg: SegmentConfig) -> str:
    """Runs from an untrained backbone have a folder of their own."""
    return "segment_scratch" if cfg.weights == "none" else "segment"


# ----------------------------------------------------------------------------------------------------------------
# Act 5. Using what was trained. A reader of the method may skip this.


def open_segmenter(config, device: torch.device, read=read_checkpoint) -> tuple[Segmenter, SegmentConfig, Path]:
    """The trained model, for windows of `segment.crop_size`; the section it was trained with; and its file, as `read`.

    What the model is, its checkpoint says; how it looks at images, `config` says.
    """
    cfg = config.segment
    path = stage_checkpoint(config, stage_folder(cfg), cfg.checkpoint, "segment.checkpoint", "best.pt")
    content = read(path)
    trained, model_config = restored(SegmentConfig, content, "segment"), restored(ModelConfig, content, "model")
    if trained is None or model_config is None:
        raise UserError(f"'{path}' does not say with which classes it was trained, so segment.py has not written it: "
                        f"name a best.pt or last.pt of segment.py")
    model = Segmenter(len(trained.classes), trained.feature_layers, trained.dropout,
                      **model_config.backbone(cfg.crop_size))
    model.may_be_fresh = ()  # a segmenter with untrained heads has nothing to show
    say(load_pretrained(model, content, source=str(path)))
    return model.requires_grad_(False).eval().to(device), trained, path


def evaluate_only(config) -> None:
    """Measure a checkpoint again, on the validation split. It must be of the configuration's own model and classes."""
    cfg = config.segment
    run = Run(stage_folder(cfg), config, cfg)
    val_set = open_split(config, "val")
    say(found(val_set))
    model, trained, path = open_segmenter(config, run.device, lambda path: read_model(path, "model", config.model))
    for key in ("classes", "feature_layers"):
        here, there = list(getattr(cfg, key)), list(getattr(trained, key))
        if there != here:
            raise UserError(f"'{path}' was trained with segment.{key}={there}, not {here}: make them agree")
    survey(run, val_set, "validation")
    val_loader = ValLoader(WholeSamples(val_set, cfg), batch_size=None, workers=config.data.workers)
    print_table(evaluate(run, model, val_loader), cfg.classes)


@torch.no_grad()
def predict(config) -> None:
    """For each of `segment.images`, without annotations, write into OUTPUT_DIR/predict_masks/

    masks/NAME.png      a class for each pixel of the image, numbered as in the annotations that the model learned from
    overlays/NAME.png   the image, and the same in colours over it
    """
    cfg, device = config.segment, setup_distributed(config.device, config.threads)
    images = open_files(cfg.images)
    model, trained, _ = open_segmenter(config, device)
    precision, folder = Precision(config.precision, device), output_folder(config, "predict_masks")
    names, errors = result_names([images.name(i) for i in range(len(images))]), {}
    for sample in ValLoader(OrError(WholeSamples(images, cfg)), batch_size=None, workers=config.data.workers):
        if sample["error"]:
            errors[sample["index"]] = sample["error"]
            continue
        prediction = segmented(precision, model, sample["image"].to(device), sample["labels"].shape, cfg).cpu()
        mask, overlay = (folder / kind / f"{names[sample['index']]}.png" for kind in ("masks", "overlays"))
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((prediction + trained.reduce_zero_label).byte().numpy()).save(mask)
        paint(overlay, sample["image"], [prediction])
    refuse_unreadable(from_all_ranks(errors), len(images), f"the masks of the others are in '{folder}'")
    say(f"masks of {len(images)} images: {folder / 'masks'}; to look at: {folder / 'overlays'}")


def result_names(paths: list[str]) -> list[str]:
    """For each image its path below the folder that all share, without its ending unless two would then be the same."""
    paths = [os.path.abspath(path) for path in paths]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    paths = [os.path.relpath(path, shared) for path in paths]
    stems = [os.path.splitext(path)[0] for path in paths]
    return stems if len(set(stems)) == len(stems) else paths


if __name__ == "__main__":
    launch(main, ModelError)
