import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from beitv2 import SIZES, ModelConfig, ModelError, VisionTransformer, load_pretrained, read_checkpoint
from support.errors import UserError
from support.frozen import digest
from support.files import fetch, file_sha256
from support.processes import say


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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
        self.patch_size, self.output_dim = backbone.patch_size, output_dim or backbone.embed_dim
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
        # The gradient of each pixel: how much brighter its right neighbour is than its left one, and the lower than the
        # upper one. At the border the image is continued by its own edge.
        B, C, S, _ = images.shape
        cell, cells = self.patch_size // 2, 2 * S // self.patch_size
        padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
        dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]  # [B, C, S, S]
        dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]

        # Each pixel votes for the orientation of its gradient, with the gradient's length as its weight. An edge from
        # dark to light and one from light to dark have the same orientation, so angles are taken modulo 180 degrees.
        # An orientation between two bins counts for both, in proportion: else a small turn could change everything.
        angle = torch.atan2(dy, dx) / math.pi * self.orientations % self.orientations
        lower, share = angle.floor().long() % self.orientations, angle - angle.floor()
        upper, strength = (lower + 1) % self.orientations, torch.hypot(dx, dy)
        votes = torch.zeros(B, C, self.orientations, S, S, device=images.device)
        votes.scatter_(2, lower[:, :, None], (strength * (1 - share))[:, :, None])
        votes.scatter_(2, upper[:, :, None], (strength * share)[:, :, None])

        # The mean of the votes in each cell is its histogram; then the 2 x 2 cells of a patch are put side by side.
        histograms = F.avg_pool2d(votes.flatten(1, 2), cell).unflatten(1, (C, -1))  # [B, C, 9, cells, cells]
        histograms = histograms / (histograms.norm(dim=2, keepdim=True) + 0.01)  # .01: flat cells stay near zero
        histograms = histograms - histograms.mean(dim=2, keepdim=True)
        patches = F.pixel_unshuffle(histograms.flatten(1, 2), 2)  # [B, C*9*4, grid, grid]
        return patches.flatten(2).transpose(1, 2)


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


DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/{0}/{0}{1}_pretrain.pth"


# name: where its weights are published, the SHA-256 if known, and what `VisionTransformer` must be for it
TEACHERS = {
    "clip_vitb16": ("https://openaipublic.azureedge.net/clip/models/"
                    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
                    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
                    dict(size="base", patch_size=16, output_dim=512)),
    "dino_vits16": ("https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", "",
                    dict(size="small", patch_size=16)),
    "dino_vitb16": ("https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", "",
                    dict(size="base", patch_size=16)),
    "dinov2_vits14": (DINOV2_URL.format("dinov2_vits14", ""), "", dict(size="small", patch_size=14)),
    "dinov2_vitb14": (DINOV2_URL.format("dinov2_vitb14", ""), "", dict(size="base", patch_size=14)),
    "dinov2_vits14_reg": (DINOV2_URL.format("dinov2_vits14", "_reg4"), "", dict(size="small", patch_size=14)),
    "dinov2_vitb14_reg": (DINOV2_URL.format("dinov2_vitb14", "_reg4"), "", dict(size="base", patch_size=14)),
}


def rename_clip_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's CLIP image tower under our names. The text tower is left behind."""
    state = {name.removeprefix("visual."): value.float() for name, value in state.items() if name.startswith("visual.")}
    if "proj" not in state:
        raise UserError("the CLIP weights hold no image tower (visual.conv1.weight, ...): use OpenAI's ViT-B-16.pt")
    renamed = {"projection.weight": state.pop("proj").T, "backbone.cls_token": state.pop("class_embedding")[None, None],
               "backbone.pos_embed": state.pop("positional_embedding")[None],
               "backbone.patch_embed.proj.weight": state.pop("conv1.weight")}
    renamed["backbone.patch_embed.proj.bias"] = torch.zeros(len(renamed["backbone.patch_embed.proj.weight"]))
    for old, new in (("ln_pre", "norm_pre"), ("ln_post", "norm"), ("ln_1", "norm1"), ("ln_2", "norm2"),
                     ("c_fc", "fc1"), ("c_proj", "fc2"), ("in_proj_", "qkv."), ("out_proj", "proj"),
                     ("transformer.resblocks", "blocks")):
        state = {name.replace(old, new): value for name, value in state.items()}
    return renamed | split_qkv_bias({f"backbone.{name}": value for name, value in state.items()})


def rename_dino_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINO and DINOv2 under our names; DINOv2's mask token and its registers' missing positions need no more."""
    renamed = {}
    for name, value in state.items():
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if not name.startswith(("mask_token", "head.")):
            renamed[f"backbone.{name}"] = value
    return split_qkv_bias(renamed)


def split_qkv_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace `qkv.bias` by `q_bias` and `v_bias`. The keys' share cancels in the softmax, so dropping it is exact."""
    for name in [name for name in state if name.endswith("attn.qkv.bias")]:
        bias, stem = state.pop(name), name.removesuffix("qkv.bias")
        state[f"{stem}q_bias"], _, state[f"{stem}v_bias"] = bias.chunk(3)
    return state


def open_teacher(config) -> nn.Module:
    """The teacher that `tokenizer.teacher` names, its patch grid that of the tokenizer. Raises UserError."""
    name, weights = config.tokenizer.teacher, config.tokenizer.teacher_weights
    grid = config.data.image_size // config.model.patch_size
    if name in ("hog", "pixels"):
        return {"hog": HOG, "pixels": Pixels}[name](config.model.patch_size)
    if name == "beitv2":  # one of our own checkpoints, which says what its backbone is
        if not weights:
            raise UserError("the teacher 'beitv2' needs a pre-trained checkpoint: set tokenizer.teacher_weights=PATH")
        path = fetch(weights, "tokenizer.teacher_weights")
        content = read_checkpoint(path)
        if "config" not in content:
            raise UserError(f"'{path}' does not say what model it holds: the teacher 'beitv2' must be a checkpoint "
                            f"that pretrain.py wrote")
        model = ModelConfig(**content["config"]["model"])
        backbone = VisionTransformer(**model.backbone(grid * model.patch_size))
        say(load_pretrained(backbone, content, source=str(path)))
        return Teacher(backbone, data.IMAGENET_MEAN, data.IMAGENET_STD)

    url, sha256, shape = TEACHERS[name]
    path = fetch(weights or url, "tokenizer.teacher_weights", sha256)
    if name == "clip_vitb16":
        state = rename_clip_keys(read_clip(path, sha256))
    else:
        state = rename_dino_keys(read_checkpoint(path))
    teacher = build_teacher(name, grid, shape)
    say(load_pretrained(teacher, state, source=str(path)))
    return teacher


def build_teacher(name: str, grid: int, shape: dict) -> Teacher:
    """An untrained teacher: `shape` is its size (a name of SIZES, or width, depth, heads), patch size, projection."""
    size, patch_size = shape["size"], shape["patch_size"]
    width, depth, heads = SIZES[size] if isinstance(size, str) else size
    options = dict(image_size=grid * patch_size, patch_size=patch_size, embed_dim=width, depth=depth, num_heads=heads,
                   abs_pos_embed=True)
    if name.startswith("clip"):
        backbone = VisionTransformer(pre_norm=True, quick_gelu=True, norm_eps=1e-5, **options)
        return Teacher(backbone, CLIP_MEAN, CLIP_STD, shape["output_dim"])
    if name.startswith("dinov2"):
        options |= dict(layer_scale=1.0, num_registers=4 if name.endswith("_reg") else 0)
    return Teacher(VisionTransformer(**options), data.IMAGENET_MEAN, data.IMAGENET_STD)


def read_clip(path: Path, sha256: str) -> dict[str, Tensor]:
    """CLIP's weights from a plain state dict, or from OpenAI's archive.

    That archive is TorchScript, which is code. It is opened only if it is, by its SHA-256, the file OpenAI published.
    """
    try:
        return read_checkpoint(path)
    except ModelError:
        if file_sha256(path) != sha256:
            raise UserError(f"'{path}' is neither a plain state dict nor OpenAI's ViT-B-16.pt (SHA-256 "
                            f"{sha256[:12]}…): download it again, or set tokenizer.teacher_weights to another file") \
                from None
    return torch.jit.load(path, map_location="cpu").state_dict()


def about_teacher(config, teacher: nn.Module) -> dict:
    """What the features of a teacher depend on, in plain values."""
    return dict(teacher=config.tokenizer.teacher, weights=digest(teacher))
