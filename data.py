"""What a sample is: an image, a random crop of it, and in pre-training a mask; and what the device does with a batch.

    worker:  decode -> random resized crop -> flip -> uint8, and a mask  (class TrainSamples)
    device:  colour jitter -> normalise                                  (the functions at the end)

A worker is a process that prepares samples while the device computes. It decodes and crops, and for fine-tuning it
augments. Jitter and normalising are the same simple arithmetic for each pixel: the device does them for a whole batch
at once. Images travel as uint8, a quarter of the bytes of float32.

Every random choice of a training sample (crop, flip, RandAugment, jitter factors, mask, erased box) is drawn in the
worker from a generator seeded by (seed, epoch, index), and is part of the sample, also where the device carries it
out. (Fixed crops, `data.views`, are seeded otherwise: see TrainSamples.) So samples do not depend on the number of
workers, and no generator's state has to be saved. The loop's own random numbers (drop path, MixUp) come from
generators that are seeded at each step by (seed, step, rank): see `Run`.
"""

import contextlib
import functools
import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import RandomErasing, RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as TF

from support.datasets import NAMED
from support.errors import UserError, one_line
from support.options import Count, Natural, PathText


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = v2.InterpolationMode.BICUBIC


@dataclass
class DataConfig:
    """The section `data` of a config file."""

    dataset: Literal["imagefolder", *NAMED, "shapes", "ade20k"] = "imagefolder"  # where the images come from
    root: PathText = "data"  # a folder of images, or ROOT/{train,val}/CLASS/*.jpg with classes; or where to download to
    download: bool = False  # fetch a named data set that is not in `root`
    image_size: Count = 224  # pixels, square
    # Fixed crops of each image, of which epoch e takes number e mod views; 0: new ones in each epoch. Fine-tuning and
    # segmentation always draw new ones.
    views: Natural = 0
    cache: PathText = ""  # with views: folder for what frozen networks say of crops; empty: OUTPUT_DIR/cache; none: off
    workers: Natural = 8  # loader processes per rank
    train_images: Count = 4000  # `shapes` only: how many training images to make
    val_images: Count = 1000  # `shapes` only: how many validation images to make

    def check(self, config) -> None:
        """Called when the configuration is read."""
        for name, section in vars(config).items():
            if hasattr(section, "crop_scale"):
                check_crop_scale(section.crop_scale, f"{name}.crop_scale")


# ---------------------------------------------------------------------------------------------------------
# Act 1: block-wise masks (BEiT, arXiv 2106.08254, algorithm 1), with a constant number of masked patches.
#
# Why blocks: neighbouring patches look alike. If single patches were hidden, nearly every one would have visible
# neighbours, and the model could guess its id from their colour and edges. It would not need to know what the image
# shows. Of 75 masked patches among 14 x 14, 3 % have no visible neighbour (left, right, above, below) if
# single patches are drawn, and 55 % with the blocks below. Deep inside a block, nothing nearby helps. The model has to
# recognise the object, and to know how objects continue.
#
# Why 40 %: it is a compromise. With fewer masked patches, there is less to predict in each image, and it is easier.
# With many more, too little is left to recognise the object by, and the input differs more from what the model sees
# after pre-training, when nothing is masked.
#
# Why the same number in each image: masked positions, ids and logits of a batch are then single tensors, [B, M] and
# [B, M, K], of the same shape in every step. With a number that varies, they would need padding or lists, the compiled
# model would be compiled again and again, and the host would have to wait for the device to learn the sizes.
# ---------------------------------------------------------------------------------------------------------


def block_mask(grid: int, num_masked: int, min_block: int = 16,
               generator: torch.Generator | None = None) -> Tensor:
    """bool [grid * grid], row by row, with exactly `num_masked` True, mostly in rectangles that may overlap.

    grid        patches along one side of the image
    min_block   the smallest area of a rectangle, in patches, before rounding; less where fewer are still to be masked

    The paper masks 75 of 14 x 14 patches (38 %, "about 40 %") in blocks of at least 16. With `min_block` 0 there are no
    blocks, and every masked patch is drawn alone. One random number of the `generator`, or of torch's default one, is
    the seed of all others. UserError when there are fewer than `num_masked` patches.
    """
    check_num_masked(num_masked, grid)
    # Python's random numbers and numpy's small arrays, because torch takes five times as long for a single number.
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    mask = np.zeros((grid, grid), dtype=bool)
    # Add random rectangles until enough patches are masked. Near the end, most rectangles are too large for what is
    # left. After ten of them in a row that do not fit, give up, or the loop might never end.
    tries, masked = 0, 0
    while min_block and masked < num_masked and tries < 10:
        tries += 1
        # The area in patches is uniform between the minimum and what is still to be masked.
        area = rng.uniform(min_block, num_masked - masked)
        # The aspect ratio height / width is between 0.3 and 1 / 0.3. It is uniform in its logarithm, so that a flat
        # block is as likely as a tall one. A uniform number from 0.3 to 3.3 would be above 1 three times out of four.
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid or width >= grid:  # a block never covers a whole row or column (as published)
            continue
        top, left = rng.randint(0, grid - height), rng.randint(0, grid - width)
        block = mask[top:top + height, left:left + width]
        # Blocks may overlap. Only the patches that were visible count, and there must not be too many of them.
        new = block.size - np.count_nonzero(block)
        if 0 < new <= num_masked - masked:
            block[:] = True
            tries, masked = 0, masked + new

    # If patches are still missing, because no block was small enough (or with `min_block` 0), draw single ones. So the
    # number is exact.
    # (Algorithm 1 of BEiT stops as soon as 40 % are exceeded, so its number varies. The published code of BEiT v2
    # completes the mask as we do here.)
    mask = mask.flatten()
    free = np.flatnonzero(~mask).tolist()
    mask[rng.sample(free, num_masked - masked)] = True
    return torch.from_numpy(mask)


def check_num_masked(num_masked: int, grid: int):
    """UserError if an image of grid x grid patches has fewer than `num_masked`."""
    if num_masked > grid * grid:
        raise UserError(f"num_masked: {num_masked} masked patches are more than the {grid * grid} patches of the image "
                        f"({grid} x {grid}): lower the number of masked patches, or raise data.image_size")


def fixed_masks(count: int, grid: int, cfg) -> torch.Tensor:
    """Masked positions [count, M] drawn as in training (`cfg`: its section `pretrain`), but the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([block_mask(grid, cfg.num_masked, cfg.min_block, generator) for _ in range(count)])
    return masks.nonzero()[:, 1].view(count, cfg.num_masked)


# ---------------------------------------------------------------------------------------------------------
# Act 2: training samples.
# ---------------------------------------------------------------------------------------------------------


class SeededSamples(Dataset):
    """samples[epoch, index] is one sample, made by a subclass in `draw(index)`. Each has random numbers of its own.

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
        with seeded(self.seed, epoch, index):
            return self.draw(index)

    def load(self, index: int):
        return self.dataset.load(index)

    def load_or_replace(self, index: int) -> tuple:
        """Returns (what `load` gives, the number of the image, that of an image that could not be read or -1).

        A random image takes the place of one that cannot be read, so that a single broken file in a million does
        not end a run of days. It is drawn from the sample's own generator, so it is the same one every time.
        """
        unreadable = -1
        for _ in range(10):
            try:
                return self.load(index), index, unreadable
            except UserError:
                raise
            except Exception:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
                unreadable, index = index, int(torch.randint(len(self.dataset), ()))
        raise UserError(f"ten images in a row cannot be read, among them '{self.dataset.name(unreadable)}': repair or "
                        f"remove them")


@contextlib.contextmanager
def seeded(*numbers: int):
    """Within it, torch's default CPU generator starts at these numbers, which make one seed; afterwards it is restored.

    torchvision's transforms take no generator; they draw from the default one of the CPU, from which the training loop
    draws too. `torch.manual_seed` would also change the generators of the GPUs, which belong to the training loop.
    """
    with torch.random.fork_rng(devices=[]):
        # The hash makes one seed of the numbers. Their sum would give (epoch 1, image 2) and (epoch 2, image 1) the
        # same crop and mask.
        seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(seed[0]))
        yield


def check_crop_scale(crop_scale: tuple[float, float], option: str = "crop_scale") -> None:
    if not 0 < crop_scale[0] <= crop_scale[1]:
        raise UserError(f"{option} is {list(crop_scale)}, and must be [smallest, largest] share of the image's area, "
                        f"both above 0")


class TrainSamples(SeededSamples):
    """A training sample for classification and pre-training. samples[epoch, index] is a dictionary with these entries:

    image   uint8 [3, S, S], a random resized crop, flipped half the time
    label   int64, the class (0 without classes); index: int64, the image's index in the data set
    jitter  float32 [3], factors of brightness, contrast and saturation  (if jitter > 0)
    mask    bool [mask_grid ** 2], `num_masked` of them True              (if num_masked > 0)
    row     int64, the crop's number among the views * len(dataset)       (if views > 0)
    unreadable  int64, the index of an image that cannot be read, and that this one replaces; else -1

    The tokenizer uses crop and flip, pre-training also jitter and mask. Fine-tuning has RandAugment instead, and random
    erasing with the probability `erase`.

    With `views` V > 0, an image has V crops in all: `image` in epoch e is that of epoch e mod V. So what a frozen
    network says of it can be computed once (support/frozen.py). These crops do not depend on the seed: they are like a
    data set V times as large, and runs with other seeds use what was computed for the first one. Jitter, mask and
    erased box are drawn anew in each epoch, and do depend on the seed.
    """

    def __init__(self, dataset, seed: int, image_size: int, crop_scale=(0.08, 1.0), jitter=0.0,
                 num_masked=0, mask_grid=0, min_block=16, rand_augment=False, erase=0.0, views=0):
        check_num_masked(num_masked, mask_grid)
        check_crop_scale(crop_scale)
        super().__init__(dataset, seed)
        self.size, self.views = image_size, views
        self.crop_scale, self.jitter, self.erase = crop_scale, jitter, erase
        self.num_masked, self.mask_grid, self.min_block = num_masked, mask_grid, min_block
        # RandAugment (arXiv 1909.13719): two random operations, such as rotate or shear. With 11 bins, magnitude 9 is
        # the angles and strengths of timm, which the paper used (`rand-m9-mstd0.5-inc1`, without its noise). But
        # Posterize keeps 4 bits here and 1 there, and timm's list has Invert and SolarizeAdd instead of Identity.
        mean_colour = [round(255 * channel) for channel in IMAGENET_MEAN]
        self.rand_augment = RandAugment(2, 9, 11, BICUBIC, mean_colour) if rand_augment else None
        self.fixed_crops = FixedCrops(self)
        self.wants_images = True  # False: fixed crops come without `image`, for a loop that only reads a cache

    def draw(self, index: int) -> dict:
        """Make one sample. The order of the draws is fixed: another order gives other samples for the same seed."""
        sample = self.draw_crop(index)
        return sample | self.draw_rest(sample["image"])

    def draw_crop(self, index: int) -> dict:
        image, index, unreadable = self.load_or_replace(index)
        # Random resized crop: a box whose area is a random share of the image (`crop_scale`), resized to [S, S]. The
        # model meets objects at many sizes and places. In pre-training the share starts at 0.2, not at 0.08: a very
        # small crop leaves little context from which a hidden patch can be told. Bicubic, as in evaluation.
        top, left, height, width = RandomResizedCrop.get_params(image, self.crop_scale, (3 / 4, 4 / 3))
        image = TF.resize(image[:, top:top + height, left:left + width], [self.size, self.size], BICUBIC)
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        if self.rand_augment:  # faster on Pillow's images than on tensors; the way there is fastest channel by channel
            picture = Image.merge("RGB", [Image.fromarray(channel.numpy()) for channel in image])
            image = torch.from_numpy(np.stack(self.rand_augment(picture).split()))
        return {"image": image, "label": self.dataset.label(index), "index": index, "unreadable": unreadable}

    def draw_rest(self, image: Tensor) -> dict:
        """Three factors between 1 - jitter and 1 + jitter, for the device, and a mask; a box of `image` is erased."""
        sample = {}
        if self.jitter > 0:
            sample["jitter"] = torch.empty(3).uniform_(max(0.0, 1 - self.jitter), 1 + self.jitter)
        if self.num_masked > 0:
            sample["mask"] = block_mask(self.mask_grid, self.num_masked, self.min_block)
        if self.erase and torch.rand(()) < self.erase:
            erase_box(image)
        return sample

    def fixed(self) -> "FixedCrops | None":
        """All crops, where they are always the same."""
        return self.fixed_crops if self.views else None

    def __getitems__(self, epochs_and_indices: list[tuple[int, int]]) -> list | dict:
        """Many samples for the loader: a list of them, or, of fixed crops, at once a batch of tensors [B, ...]."""
        if not self.views:
            return [self[pair] for pair in epochs_and_indices]
        images = len(self)
        rows = [epoch % self.views * images + index for epoch, index in epochs_and_indices]
        if not self.wants_images:
            return self.fixed_crops.numbers(rows)
        batch = self.fixed_crops.__getitems__(rows)
        if self.jitter or self.num_masked or self.erase:
            rest = []
            for (epoch, index), image in zip(epochs_and_indices, batch["image"]):
                with seeded(self.seed, epoch, index, 1):  # 1 keeps these draws apart from those of a crop
                    rest.append(self.draw_rest(image))
            batch |= default_collate(rest)
        return batch


class FixedCrops(Dataset):
    """With `views` V, all V * len(dataset) crops of a TrainSamples, those of epoch 0 first: [row] is one of its
    samples.

    They are kept in memory, up to 1 GiB in each process, because each will be needed again. Drawn shapes keep theirs
    for all stages in one process, such as those of the demo.
    """

    def __init__(self, samples: TrainSamples):
        kind = samples.size, *samples.crop_scale, samples.rand_augment is None
        self.samples, self.kept = samples, getattr(samples.dataset, "crops", {}).setdefault(kind, {})
        # For each crop that was made, the index of its image, else -1. It is another image than the one that was asked
        # for, if that one cannot be read.
        self.drawn_from = torch.full((len(self),), -1, dtype=torch.int32)

    def __len__(self) -> int:
        return self.samples.views * len(self.samples)

    def __getitem__(self, row: int) -> dict:
        if row in self.kept:
            return self.kept[row]
        epoch, index = divmod(row, len(self.samples))
        with seeded(0, epoch, index):  # 0: the same crops for every seed
            sample = self.samples.draw_crop(index) | {"row": row}
        if len(self.kept) < 2**30 // sample["image"].numel():
            self.kept[row] = sample
        return sample

    def __getitems__(self, rows: list[int]) -> dict:
        """A batch: the pixels are copied once, and nothing else is done for each sample."""
        samples = [self[row] for row in rows]
        numbers = {name: torch.tensor([sample[name] for sample in samples])
                   for name in ("label", "index", "row", "unreadable")}
        return {"image": torch.stack([sample["image"] for sample in samples])} | numbers

    def numbers(self, rows: list[int]) -> dict:
        """The same without `image`: no pixels are fetched for crops that were drawn before."""
        rows = torch.tensor(rows)
        for row in rows[self.drawn_from[rows] < 0].tolist():
            self.drawn_from[row] = self[row]["index"]
        index, asked = self.drawn_from[rows].long(), rows % len(self.samples)
        return {"label": torch.from_numpy(self.samples.dataset.labels)[index], "index": index, "row": rows,
                "unreadable": torch.where(index == asked, -1, asked)}


class RandAugment(v2.RandAugment):
    """torchvision's, to the same pixels, but quicker. Its operation Translate moves an image by whole pixels. So the
    nearest pixel is the exact one, and bicubic interpolation would take forty times as long to find it."""

    def _apply_image_or_video_transform(self, image, transform_id, magnitude, interpolation, fill):
        if transform_id.startswith("Translate"):
            interpolation = v2.InterpolationMode.NEAREST
        return super()._apply_image_or_video_transform(image, transform_id, magnitude, interpolation, fill)


def erase_box(image: Tensor) -> None:
    """Random erasing (arXiv 1708.04896): fill a box of 2 to 33 % of an image, uint8 [3, H, W], with noise, in place.

    The class must then be recognised by what is left. A model that relies on one part only, such as the head of a dog,
    fails when the box hides it, and learns to look at the rest too.

    Each pixel and channel gets a number that is standard normal once the image is normalised: normalised pixels have
    about mean 0 and deviation 1 too, so the noise keeps these. A box of one colour would look like an object. (The
    published code draws it after normalising. Here, colours end at 0 and 255: 3 % of the numbers lie beyond.)
    """
    top, left, height, width, noise = RandomErasing.get_params(image, (0.02, 1 / 3), (0.3, 3.3), None)
    if height < image.shape[1]:  # else no box was found, and torchvision returns the whole image
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        image[:, top:top + height, left:left + width] = (255 * (mean + std * noise)).round().clamp(0, 255).byte()


# ---------------------------------------------------------------------------------------------------------
# Act 3: validation samples.
# ---------------------------------------------------------------------------------------------------------


class ValSamples(Dataset):
    """samples[index]: image uint8 [3, S, S], resized and cropped in the centre; label; index; and row, which is the
    index too.

    An image that cannot be read is a UserError. If `strict` is False, samples also say whether the image is `readable`:
    an unreadable one is black, and the caller must leave it out.

    Of drawn shapes each process keeps these crops, up to 256 MiB: an image is looked at in many passes.
    """

    def __init__(self, dataset, image_size: int, strict=True):
        self.dataset, self.size, self.strict = dataset, image_size, strict

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        readable = True
        try:
            image = self.crop(index)
        except UserError:
            if self.strict:
                raise
            image, readable = torch.zeros(3, self.size, self.size, dtype=torch.uint8), False
        sample = {"image": image, "label": self.dataset.label(index), "index": index, "row": index}
        return sample if self.strict else sample | {"readable": readable}

    def crop(self, index: int) -> Tensor:
        """The centre crop of an image, uint8 [3, S, S]. Only drawn shapes have `crops`, a place to keep it."""
        kept = getattr(self.dataset, "crops", {}).setdefault(self.size, {})
        if index in kept:
            return kept[index]
        image = centre_crop(load_strictly(self.dataset.load, self.dataset, index), self.size)
        if len(kept) < 2**28 // image.numel():
            kept[index] = image
        return image

    def fixed(self) -> "ValSamples":
        """Validation images never change."""
        return self


def centre_crop(image: Tensor, size: int) -> Tensor:
    """uint8 [3, H, W] -> [3, size, size], the crop of evaluation."""
    # Of a very long image only the middle will be seen. Enlarged as a whole, it could fill the memory.
    limit = 8 * min(image.shape[1:])
    if max(image.shape[1:]) > limit:
        image = TF.center_crop(image, [min(length, limit) for length in image.shape[1:]])
    # The shorter side becomes 256/224 of the crop, so that a margin is cut off: objects are mostly in the middle.
    # From 384 pixels up there is no margin, as in the paper's evaluation.
    shorter_side = round(size * 256 / 224) if size < 384 else size
    return TF.center_crop(TF.resize(image, [shorter_side], BICUBIC), [size, size])


def load_strictly(load, dataset, index: int):
    """load(index). If the decoder fails, with any error, this raises a UserError that names the image."""
    try:
        return load(index)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the image '{dataset.name(index)}' cannot be read ({one_line(error)}): repair or remove "
                        f"it") from error


# ---------------------------------------------------------------------------------------------------------
# Act 4: augmentation on the device, for a whole batch at once.
#
# In pre-training, student and tokenizer look at the same pixels, jitter included. Else the codes to be predicted
# would describe other colours than the student sees. (With `data.views`, codes are computed once, without jitter, and
# do describe other colours.) Each model normalises in its own way: so the images stay in [0, 1] until it gets them.
# Everything here is arithmetic on tensors of a fixed shape. No function reads a value back from the device, so the
# host never has to wait for it.
# ---------------------------------------------------------------------------------------------------------


def to_unit(images: Tensor) -> Tensor:
    """uint8 images in 0..255 as float32 in [0, 1]; float images are in [0, 1] already."""
    return images if images.is_floating_point() else images.float() / 255


def jittered(batch: dict) -> Tensor:
    """The images of a batch in [0, 1], [B, 3, H, W], after the colour jitter that it brings along, if any."""
    return color_jitter(batch["image"], batch["jitter"]) if "jitter" in batch else to_unit(batch["image"])


def color_jitter(images: Tensor, factors: Tensor) -> Tensor:
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


def grey(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W]. Green looks brighter than blue to the eye: the weights of ITU-R 601 say so."""
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def normalize(images: Tensor, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> Tensor:
    """Shift and scale images in [0, 1] by a mean and a standard deviation for each channel, those that a model expects.

    Every model must get the numbers it was trained with. Other ones would change all colours and contrasts for it.
    """
    return (images - channels(tuple(mean), images.device)) / channels(tuple(std), images.device)


@functools.cache  # copied to the device once, not in every step
def channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None, None]  # [3, 1, 1]
