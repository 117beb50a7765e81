"""The frozen teachers of stage 1: what they compute, where their weights are published, and how these get our names.

No reader of the method needs this file: a teacher is any module with `output_dim` that maps images in [0,1],
[B, 3, S, S], to one feature for each patch, [B, N, output_dim].
"""

import contextlib
import difflib
import io
import math
import pickle
import runpy
import sys
import traceback
import types
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from beitv2 import (SIZES, LoadReport, ModelConfig, ModelError, VisionTransformer, as_backbone, load_pretrained,
                    model_state, read_checkpoint, resize_grid)
from support.errors import UserError, explained, one_line
from support.files import fetch, file_sha256, save_atomically
from support.frozen import digest
from support.launch import launch
from support.processes import say
from support.use import restored

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# ----------------------------------------------------------------------------------------------------------------
# Act 1. What teachers compute


class Teacher(nn.Module):
    """A frozen Vision Transformer: images in [0,1], [B, 3, S, S] -> patch features [B, N, output_dim].

    The image is resized so that the teacher has as many patches as the tokenizer: the grid times the teacher's patch
    size. So patch i of both shows the same place. Features are those after the final norm (and after CLIP's projection
    into the space it shares with text). They are not scaled any further: the cosine loss looks at their direction only.

    Why [0,1] here and the teacher's own normalisation inside: each network must see colours in the range it was trained
    with. A teacher that gets another range still answers, but the answers are worse, and nothing tells you so.
    """

    def __init__(self, backbone: VisionTransformer, mean: tuple, std: tuple, output_dim: int | None = None):
        super().__init__()
        self.backbone, self.mean, self.std = backbone, mean, std
        self.projection = nn.Linear(backbone.embed_dim, output_dim, bias=False) if output_dim else nn.Identity()
        self.output_dim = output_dim or backbone.embed_dim
        self.requires_grad_(False).eval()

    def prepare(self, images: Tensor) -> Tensor:
        """Images in [0,1] at the backbone's resolution, normalised its way."""
        size = self.backbone.image_size
        if images.shape[-1] != size:
            images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        return data.normalize(images, self.mean, self.std)

    @torch.no_grad()  # the teacher is only asked; it never learns
    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone(self.prepare(images))  # [B, 1 + N, width], [CLS] first
        return self.projection(tokens[:, 1:])  # [B, N, output_dim]: the target, a feature for each patch


class HOG(nn.Module):
    """Histograms of oriented gradients, the target of MaskFeat (arXiv 2112.09133): a teacher without training.

    Each patch has 2 x 2 cells; each cell counts, for each colour channel, how much gradient points into each of 9
    orientations between 0 and 180 degrees. Cells are scaled to unit length, so that contrast does not count, and
    centred: else predicting the mean histogram everywhere earns half the cosine, and small tokenizers settle for it.
    Images in [0,1], [B, 3, S, S] -> [B, N, 3 * 9 * 4].
    """

    orientations = 9

    def __init__(self, patch_size: int):
        super().__init__()
        if patch_size % 2:
            raise ModelError(f"the teacher 'hog' halves each patch, so model.patch_size must be even, not {patch_size}")
        self.patch_size, self.output_dim = patch_size, 2 * 2 * 3 * self.orientations

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 16:  # what fits into the processor's cache is quicker than new memory for each result
            return torch.cat([self(part) for part in images.split(16)])

        # The gradient of each pixel: how much brighter its right neighbour is than its left one, and the lower than the
        # upper one. At the border the image is continued by its own edge.
        B, C, S, _ = images.shape
        cell, grid = self.patch_size // 2, S // self.patch_size
        padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
        dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]  # [B, C, S, S]
        dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]

        # Each pixel votes for the orientation of its gradient, with the gradient's length as its weight. An edge from
        # dark to light and one from light to dark have the same orientation, so angles are taken modulo 180 degrees.
        # An orientation between two bins counts for both, in proportion: else a small turn could change everything.
        angle = torch.atan2(dy, dx).mul_(self.orientations / math.pi).remainder_(self.orientations)
        lower, share, strength = angle.long(), angle.frac_(), torch.hypot(dx, dy)
        upper_vote = share.mul_(strength)
        lower_vote = strength.sub_(upper_vote)

        # Votes are added up at once in their cells: [B, C, 9, S, S] of them would take three times as long. The cells
        # of an image are counted in the order of the result, which is patches, colours, 2 x 2 cells of a patch.
        place = torch.arange(S, device=images.device) // cell  # the cell's row of a pixel's row; likewise for columns
        cells = torch.arange(C * (S // cell)**2, device=images.device).view(grid, grid, C, 2, 2)
        cells = cells.permute(2, 0, 3, 1, 4).reshape(C, S // cell, S // cell)[:, place[:, None], place]  # [C, S, S]
        # A cell has two bins more. The one after the last is the first again. And an angle just below 180 degrees may
        # be rounded up to them, so that its upper bin is the one after that.
        bins = self.orientations + 2
        votes = torch.zeros(B, C * (S // cell)**2 * bins, device=images.device)
        first = lower.add_(cells * bins).flatten(1)  # [B, C*S*S]
        votes.scatter_add_(1, first, lower_vote.flatten(1))
        votes[:, 1:].scatter_add_(1, first, upper_vote.flatten(1))
        votes = votes.view(B, grid**2, C, 4, bins)
        votes[..., :2] += votes[..., self.orientations:]

        # The mean of the votes in each cell is its histogram.
        histograms = votes[..., :self.orientations] / cell**2  # [B, N, C, 4, 9]
        histograms = histograms / (histograms.norm(dim=-1, keepdim=True) + 0.01)  # .01: flat cells stay near zero
        histograms = histograms - histograms.mean(dim=-1, keepdim=True)
        return histograms.transpose(3, 4).flatten(2)  # [B, N, C*9*4]


class Pixels(nn.Module):
    """The patch itself, the target of MAE (arXiv 2111.06377): its pixels, scaled to mean 0 and variance 1.

    Without that scaling the brightness of a patch would be most of what there is to say.
    Images in [0,1], [B, 3, S, S] -> [B, N, 3 * P * P].
    """

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size, self.output_dim = patch_size, 3 * patch_size**2

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(images.float(), self.patch_size).flatten(2).transpose(1, 2)
        return F.layer_norm(patches, patches.shape[-1:], eps=1e-3)


# ----------------------------------------------------------------------------------------------------------------
# Act 2. Published weights under our names


def rename_clip_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's CLIP image tower under our names. The text tower is left behind."""
    state = {name.removeprefix("visual."): value.float() for name, value in state.items() if name.startswith("visual.")}
    if "proj" not in state:
        raise UserError("the CLIP weights hold no image tower (visual.conv1.weight, ...): use OpenAI's ViT-B-16.pt")
    projection = {"projection.weight": state.pop("proj").T}
    state["cls_token"] = state.pop("class_embedding")[None, None]
    state["pos_embed"] = state.pop("positional_embedding")[None]
    state["conv1.bias"] = torch.zeros(len(state["conv1.weight"]))  # CLIP has none
    return projection | of_backbone(state, {
        "conv1": "patch_embed.proj", "transformer.resblocks": "blocks", "ln_pre": "norm_pre", "ln_post": "norm",
        "ln_1": "norm1", "ln_2": "norm2", "in_proj_": "qkv.", "out_proj": "proj", "c_fc": "fc1", "c_proj": "fc2"})


def rename_dino_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINO and DINOv2 under our names; DINOv2's mask token and its registers' missing positions need no more."""
    state = {name: value for name, value in state.items() if not name.startswith(("mask_token", "head."))}
    return of_backbone(state, {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"})


def of_backbone(state: dict[str, Tensor], renamed: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of a teacher's backbone, with parts of their names `renamed`, and `q_bias` and `v_bias` for the one
    bias `qkv.bias`. The keys' share of it cancels in the softmax, so dropping it is exact."""
    for theirs, ours in renamed.items():
        state = {name.replace(theirs, ours): value for name, value in state.items()}
    for name in [name for name in state if name.endswith("attn.qkv.bias")]:
        bias, stem = state.pop(name), name.removesuffix("qkv.bias")
        state[f"{stem}q_bias"], _, state[f"{stem}v_bias"] = bias.chunk(3)
    return {f"backbone.{name}": value for name, value in state.items()}


def interpolate_positions(positions: Tensor, grid: int, antialias: bool) -> Tensor:
    """Position embeddings [1, 1 + g^2, D] at another grid, [1, 1 + grid^2, D], by the way of their authors.

    The teachers were trained with one grid: 14 x 14 for CLIP and DINO, 37 x 37 for DINOv2, which is never ours. Other
    positions than those that the authors' own code computes would make a worse teacher, and nothing would tell.

    Their code enlarges by the *factor* (grid + .1) / g; the .1 was to keep the rounded result from being one too small.
    So the places that are read lie a little closer together than those of a resizing to the *size* grid. This is so in
    the code of DINO, of DINOv2, and of VQ-KD, which the paper's authors use for CLIP. DINOv2's models with registers
    were published with `antialias`, and are resized to the size. At the grid of the training nothing changes.
    """
    g = math.isqrt(positions.shape[1] - 1)
    if g == grid or g**2 != positions.shape[1] - 1:  # no square grid: load_pretrained will say that they do not fit
        return positions
    how = dict(size=(grid, grid), antialias=True) if antialias else dict(scale_factor=(grid + 0.1) / g)
    return torch.cat([positions[0, :1], resize_grid(positions[0, 1:], grid**2, **how)])[None]


# ----------------------------------------------------------------------------------------------------------------
# Act 3. The table of teachers


@dataclass(frozen=True)
class Published:
    """A teacher whose weights are published. Called with the configuration, it opens them: see `open_teacher`.

    url, sha256    where they are, and their sum if it is known
    rename         puts the tensors of such a file under our names
    size           a name of SIZES, or (width, blocks, heads)
    switches       further arguments of VisionTransformer
    output_dim     width of a projection after the final norm; None if there is none
    mean, std      how it normalises images
    antialias      how its positions come to another grid, see interpolate_positions
    """

    url: str
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    size: str | tuple[int, int, int]
    patch_size: int
    switches: dict = field(default_factory=dict)
    output_dim: int | None = None
    mean: tuple = data.IMAGENET_MEAN
    std: tuple = data.IMAGENET_STD
    antialias: bool = False
    sha256: str = ""

    def build(self, grid: int) -> Teacher:
        """The teacher without its weights, for images of grid x grid patches."""
        width, depth, heads = SIZES[self.size] if isinstance(self.size, str) else self.size
        backbone = VisionTransformer(image_size=grid * self.patch_size, patch_size=self.patch_size, embed_dim=width,
                                     depth=depth, num_heads=heads, abs_pos_embed=True, **self.switches)
        return Teacher(backbone, self.mean, self.std, self.output_dim)

    def __call__(self, config) -> Teacher:
        weights = config.tokenizer.teacher_weights
        path = fetch(weights or self.url, "tokenizer.teacher_weights", "" if weights else self.sha256)
        switches = self.switches
        if "quick_gelu" in switches:
            switches = switches | dict(quick_gelu=uses_quick_gelu(config.tokenizer.teacher_gelu, path, self.sha256))
        teacher = replace(self, switches=switches).build(grid_of(config))
        say(self.load(teacher, read_weights(path), source=str(path)))
        return teacher

    def load(self, teacher: Teacher, weights: dict[str, Tensor], source: str) -> LoadReport:
        """Copy published weights into a teacher that `build` has made, their positions brought to its grid."""
        state, name = self.rename(weights), "backbone.pos_embed"
        published = state.get(name)
        if published is not None:
            state[name] = interpolate_positions(published, teacher.backbone.grid, self.antialias)
        report = load_pretrained(teacher, state, source)
        if state.get(name) is not published:
            report.resized.append(name)
        return report


def uses_quick_gelu(choice: str, path: Path, openai_sha256: str) -> bool:
    """Which GELU CLIP weights were trained with: names and shapes are the same, and a wrong one costs in silence."""
    if choice != "auto":
        say(f"{'QuickGELU' if choice == 'quick' else 'exact GELU'} is used, as tokenizer.teacher_gelu says")
    elif file_sha256(path) != openai_sha256:
        say(f"QuickGELU is assumed, since OpenAI's CLIP has it and the sum of '{path}' does not tell whose weights it "
            f"holds; set tokenizer.teacher_gelu=exact for weights trained with exact GELU, such as LAION's")
    return choice != "exact"


def open_beitv2(config) -> Teacher:
    """A checkpoint of our own, pre-trained or fine-tuned, which says what its backbone is."""
    weights = config.tokenizer.teacher_weights
    if not weights:
        raise UserError("the teacher 'beitv2' needs a checkpoint of ours: set tokenizer.teacher_weights=PATH")
    return open_checkpoint(config, fetch(weights, "tokenizer.teacher_weights"))


def open_checkpoint(config, path: Path) -> Teacher:
    content = read_checkpoint(path)
    model = restored(ModelConfig, content, "model")
    if model is None:
        raise UserError(f"'{path}' does not say what model it holds: the teacher '{config.tokenizer.teacher}' must be "
                        f"a checkpoint that pretrain.py or finetune.py wrote")
    backbone = VisionTransformer(**model.backbone(grid_of(config) * model.patch_size))
    state = as_backbone(model_state(content, str(path)))
    say(load_pretrained(backbone, state, source=str(path)))
    return Teacher(backbone, data.IMAGENET_MEAN, data.IMAGENET_STD)


SHAPES_TEACHER = Path(__file__).parent / "shapes_teacher.pt"  # configs/shapes_teacher.yaml says how it was made
OPENAI_SHA256 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
OPENAI_URL = f"https://openaipublic.azureedge.net/clip/models/{OPENAI_SHA256}/ViT-B-16.pt"
DINO_URL = "https://dl.fbaipublicfiles.com/dino/{0}_pretrain/{0}_pretrain.pth"
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/{0}/{0}{1}_pretrain.pth"
CLIP = dict(pre_norm=True, quick_gelu=True, norm_eps=1e-5)
DINOV2 = dict(layer_scale=1.0)  # whatever is not 0: its values come from the file
REGISTERS = DINOV2 | dict(num_registers=4)

# All values of tokenizer.teacher, but for FILE.py:NAME, and how each is opened: a function of the configuration.
TEACHERS = {
    "clip_vitb16": Published(OPENAI_URL, rename_clip_keys, "base", 16, CLIP, output_dim=512, mean=CLIP_MEAN,
                             std=CLIP_STD, sha256=OPENAI_SHA256),
    "dino_vits16": Published(DINO_URL.format("dino_deitsmall16"), rename_dino_keys, "small", 16),
    "dino_vitb16": Published(DINO_URL.format("dino_vitbase16"), rename_dino_keys, "base", 16),
    "dinov2_vits14": Published(DINOV2_URL.format("dinov2_vits14", ""), rename_dino_keys, "small", 14, DINOV2),
    "dinov2_vitb14": Published(DINOV2_URL.format("dinov2_vitb14", ""), rename_dino_keys, "base", 14, DINOV2),
    "dinov2_vits14_reg": Published(DINOV2_URL.format("dinov2_vits14", "_reg4"), rename_dino_keys, "small", 14,
                                   REGISTERS, antialias=True),
    "dinov2_vitb14_reg": Published(DINOV2_URL.format("dinov2_vitb14", "_reg4"), rename_dino_keys, "base", 14,
                                   REGISTERS, antialias=True),
    "hog": lambda config: HOG(config.model.patch_size),
    "pixels": lambda config: Pixels(config.model.patch_size),
    "beitv2": open_beitv2,
    "shapes": lambda config: open_checkpoint(config, SHAPES_TEACHER),
}


def valid_teacher(value: str) -> str:
    """What tokenizer.teacher may be; the ValueError says what it must be."""
    file, _, name = value.rpartition(":")
    if value in TEACHERS:
        return value
    if Path(file).expanduser().is_file() and file.endswith(".py") and name.isidentifier():
        return f"{Path(file).expanduser()}:{name}"
    if ".py" in value:
        raise ValueError("FILE.py:NAME with a file that is there, and a name in it")
    nearest = difflib.get_close_matches(value, TEACHERS, n=1, cutoff=0)[0]
    raise ValueError(f"FILE.py:NAME, or one of {', '.join(TEACHERS)} (the nearest is '{nearest}')")


TeacherName = Annotated[str, valid_teacher]  # the type of the option tokenizer.teacher


def grid_of(config) -> int:
    """Patches along a side of the tokenizer's images."""
    return config.data.image_size // config.model.patch_size


@torch.random.fork_rng(devices=[])  # the tokenizer's initial weights are to depend on the seed alone
def open_teacher(config) -> nn.Module:
    """The teacher that `tokenizer.teacher` names, its patch grid that of the tokenizer. Raises UserError."""
    name, gelu = config.tokenizer.teacher, config.tokenizer.teacher_gelu
    opener = TEACHERS.get(name, open_own)
    if gelu != "auto" and "quick_gelu" not in getattr(opener, "switches", ()):
        raise UserError(f"tokenizer.teacher_gelu={gelu} is for CLIP's weights, and the teacher is '{name}': set it to "
                        f"auto")
    return opener(config)


def about_teacher(config, teacher: nn.Module) -> dict:
    """All that a teacher's features depend on beside the images, in plain values: for the key of a cache."""
    file, _, name = config.tokenizer.teacher.rpartition(":")
    about = dict(teacher=name, weights=digest(teacher), exact_gelu=config.tokenizer.teacher_gelu == "exact")
    # Of a file of the user's own not its place counts, but what stands in it.
    return about | dict(file=file_sha256(Path(file))) if file else about


# ----------------------------------------------------------------------------------------------------------------
# Act 4. A module of the user's own


class OwnTeacher(nn.Module):
    """A module from the user's `file`, frozen. An exception in it is shown as what it is, with the file's name, and
    what it returns must be a feature for each of grid x grid patches, in each batch."""

    def __init__(self, module: nn.Module, file: str, name: str, grid: int):
        super().__init__()
        self.module, self.file, self.name, self.grid, self.output_dim = module, file, name, grid, module.output_dim
        self.requires_grad_(False).eval()

    @torch.compiler.disable  # any program may stand in it, also one that cannot be compiled
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with own_code(self.file, "forward"):
            features = self.module(images)
        expected = [len(images), self.grid**2, self.output_dim]
        if not isinstance(features, Tensor):
            problem = f"returns a {type(features).__name__}: it must return a tensor"
        elif list(features.shape) != expected:
            problem = (f"maps images {list(images.shape)} to {list(features.shape)}, not to {expected}: it must return "
                       f"output_dim numbers for each of {self.grid} x {self.grid} patches, without [CLS] and registers")
        elif not features.is_floating_point():
            problem = f"returns numbers of type {features.dtype}: features must be floating point"
        elif features.requires_grad:
            problem = "keeps a gradient: take torch.enable_grad out of its forward"
        else:
            return features
        raise UserError(f"the teacher {self.name} of '{self.file}' {problem}")


@contextlib.contextmanager
def own_code(file: str, part: str) -> Iterator[None]:
    """Around code of the user's file: its exceptions show their own traceback, and then one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:  # `launch` has advice
        raise
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        raise UserError(f"{part} of the teacher '{file}' ended with {type(error).__name__} ({one_line(error)}): its "
                        f"traceback stands above, so mend it there") from None


def open_own(config) -> OwnTeacher:
    """The module that FILE.py:NAME makes, after a look at what it says of one batch. The file is run as it is."""
    file, _, name = config.tokenizer.teacher.rpartition(":")
    grid, size = grid_of(config), config.data.image_size
    if config.tokenizer.teacher_weights:
        raise UserError(f"tokenizer.teacher_weights is not for the teacher '{file}', which opens its weights itself: "
                        f"leave it empty")
    with own_code(file, "the code"):
        names = runpy.run_path(file)
    if not callable(names.get(name)):
        own = ", ".join(key for key, value in names.items() if callable(value) and not key.startswith("_"))
        raise UserError(f"'{file}' has no function or class '{name}'; it has {own or 'none'}")
    with own_code(file, f"{name}(grid, image_size)"):
        module = names[name](grid, size)
    if not isinstance(module, nn.Module):
        raise UserError(f"{name}(grid, image_size) of '{file}' must return an nn.Module, not a "
                        f"{type(module).__name__}")
    width = getattr(module, "output_dim", None)
    if type(width) is not int or width < 1:
        raise UserError(f"the module of {name} in '{file}' needs an attribute `output_dim`, the width of its features: "
                        f"a whole number, at least 1")

    teacher = OwnTeacher(module, file, name, grid)
    features = teacher(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    if not features.isfinite().all():
        raise UserError(f"the teacher {name} of '{file}' returns numbers that are not finite, of an ordinary image in "
                        f"[0,1]: look at its weights")
    return teacher


# ----------------------------------------------------------------------------------------------------------------
# Act 5. OpenAI's archive


def read_weights(path: Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, or of a TorchScript archive such as OpenAI's ViT-B-16.pt."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if folder := [name for name in archive.namelist() if name.endswith("/constants.pkl")]:
                with explained(f"cannot read the TorchScript archive '{path}'", "download it again, or set "
                               "tokenizer.teacher_weights to a plain state dict", Exception):
                    return named_tensors(ArchiveReader(archive, folder[0].removesuffix("constants.pkl")).load())
    return model_state(read_checkpoint(path), str(path))


class ArchiveReader(pickle.Unpickler):
    """Reads what a TorchScript archive holds, without TorchScript, which is code (and which torch gives up).

    The archive is a zip file. FOLDER/data.pkl is a pickle of the model: objects with attributes, some of them tensors,
    whose bytes lie in FOLDER/data/. A pickle names the functions and classes that are to make its objects. An ordinary
    reader would call whatever it names; this one knows the few names below, and nothing of the archive is ever run.
    """

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__":  # a class of the archive: its objects are read as bags of attributes
            return types.SimpleNamespace
        if module == "torch.jit._pickle":  # lists and dictionaries with the type of what they hold
            return lambda value, *_: value
        if f"{module}.{name}" in KNOWN:
            return KNOWN[f"{module}.{name}"]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, where: tuple) -> Tensor:
        _, dtype, key, _, count = where
        values = bytearray(self.archive.read(f"{self.folder}data/{key}"))
        return torch.frombuffer(values, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


# What an archive may name, and what stands for it here.
KNOWN = {"collections.OrderedDict": dict, "torch.BoolStorage": torch.bool, "torch.DoubleStorage": torch.float64,
         "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16, "torch.IntStorage": torch.int32,
         "torch.LongStorage": torch.int64, "torch.BFloat16Storage": torch.bfloat16,
         "torch._utils._rebuild_tensor_v2": lambda flat, start, size, stride, *_: flat.as_strided(size, stride, start)}


def named_tensors(module: types.SimpleNamespace, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a model from an archive, by their names in its state dict."""
    found = {}
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, types.SimpleNamespace):
            found |= named_tensors(value, f"{prefix}{name}.")
    return found


def convert_archive() -> None:
    """`python -m support.teachers ViT-B-16.pt OUT.pt`: write an archive's tensors as a plain state dict."""
    if len(sys.argv) != 3:
        raise UserError("name two files: python -m support.teachers ViT-B-16.pt OUT.pt")
    source, target = map(Path, sys.argv[1:])
    weights = read_weights(source)
    save_atomically(weights, target)
    say(f"{len(weights)} tensors of {source} are now in {target}, a plain state dict")


if __name__ == "__main__":
    launch(convert_archive, ModelError)
