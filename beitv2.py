"""BEiT v2's networks: the Vision Transformer, its two heads, and how to read a checkpoint into them.

    VisionTransformer     images -> normed tokens: [CLS] and one per patch       (the backbone)
    MaskedImageModel      images + masked positions -> which code each hides     (stage 2, paper section 2.3)
    Classifier            images -> class logits                                 (stage 3)
    load_pretrained       checkpoint -> model, with a report of every tensor

Parameter names are those of the published code, so its `.pth` files load key for key.
This file needs nothing but torch: copy it to use a trained model elsewhere.

Paper: Peng et al., "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers", arXiv 2208.06366.
Letters in the shape comments: B images, N patches, T = 1 + N tokens, D width, H heads, M masked patches per image,
K codes in the codebook.
"""

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# name: width D, blocks, heads
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


class ModelError(ValueError):
    """A model that cannot be built or a checkpoint that does not fit; the message says why in one sentence."""


Count = Annotated[int, 1, math.inf]  # smallest and largest value, checked when a config is read


@dataclass
class ModelConfig:
    """The `model` section: the backbone that is pre-trained and then fine-tuned."""

    size: Literal["tiny", "small", "base", "large"] = "base"  # width, depth and heads; the three below override it
    embed_dim: Count | None = None  # width D
    depth: Count | None = None  # number of blocks
    num_heads: Count | None = None  # attention heads; D must be a multiple
    patch_size: Count = 16  # pixels; the image size must be a multiple
    mlp_ratio: Annotated[float, 0.1, math.inf] = 4.0  # hidden width of the MLP over D
    layer_scale: Annotated[float, 0.0, 1.0] = 0.1  # initial factor on each residual branch (1e-5 for large); 0: none
    rel_pos_bias: bool = True  # relative position bias: one table while pre-training, one per block afterwards
    abs_pos_embed: bool = False  # learned absolute position embeddings
    checkpoint_activations: bool = False  # recompute the blocks in the backward pass: less memory, a third more time

    def backbone(self, image_size: int, tables: Literal["shared", "per_block"] = "per_block") -> dict:
        """Keyword arguments of `VisionTransformer` for this configuration; `tables` of position bias, if any."""
        return dimensions(self) | dict(
            image_size=image_size,
            rel_pos_bias=tables if self.rel_pos_bias else None,
            patch_size=self.patch_size,
            mlp_ratio=self.mlp_ratio,
            layer_scale=self.layer_scale,
            abs_pos_embed=self.abs_pos_embed,
            checkpoint_activations=self.checkpoint_activations,
        )


def dimensions(section) -> dict[str, int]:
    """Width, depth and heads of a section that has `size`, and may override it: the model's or the tokenizer's."""
    width, depth, heads = SIZES[section.size]
    return dict(embed_dim=section.embed_dim or width, depth=section.depth or depth,
                num_heads=section.num_heads or heads)


# ----------------------------------------------------------------------------------------------------------------
# The parts of a block


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops a residual branch for whole images, and scales the others up."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.rate
        return x * keep / (1 - self.rate)  # the expectation stays that of the full branch


class Attention(nn.Module):
    """Multi-head self-attention with a bias on queries and values and, optionally, on relative positions.

    The keys have no bias: it would add the same number to all logits of one query, and softmax ignores that.
    """

    def __init__(self, dim: int, num_heads: int, num_relative_positions: int = 0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        if num_relative_positions:  # a table of this block's own; VisionTransformer.position_bias reads it
            self.relative_position_bias_table = nn.Parameter(torch.zeros(num_relative_positions, num_heads))

    def queries_keys_values(self, x: Tensor) -> Tensor:
        """Tokens [B, T, D] -> [3, B, H, T, D/H]."""
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)  # [B, T, 3D]
        return qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, position_bias: Tensor | None) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        if position_bias is not None:
            position_bias = position_bias.to(q.dtype)  # half precision under autocast
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=position_bias)
        return self.proj(x.transpose(1, 2).flatten(2))


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, quick_gelu: bool):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = QuickGELU() if quick_gelu else nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block; `layer_scale` > 0 multiplies each branch by a learned vector (arXiv 2103.17239)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, layer_scale: float = 0.0,
                 drop_path: float = 0.0, norm_eps: float = 1e-6, quick_gelu: bool = False,
                 num_relative_positions: int = 0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, num_relative_positions)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio), quick_gelu)
        self.drop_path = DropPath(drop_path)
        self.gamma_1 = nn.Parameter(torch.full([dim], layer_scale)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full([dim], layer_scale)) if layer_scale else None

    def forward(self, x: Tensor, position_bias: Tensor | None = None) -> Tensor:
        branch = self.attn(self.norm1(x), position_bias)
        x = x + self.drop_path(branch if self.gamma_1 is None else self.gamma_1 * branch)
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path(branch if self.gamma_2 is None else self.gamma_2 * branch)


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each, by a convolution whose stride is its kernel.

    [B, C, S, S] -> [B, N, D]
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class RelativePositionBias(nn.Module):
    """Holds the table that all blocks share, under its published name."""

    def __init__(self, num_relative_positions: int, num_heads: int):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_relative_positions, num_heads))


def relative_position_index(grid: int) -> Tensor:
    """For each pair (query token, key token), the row of the bias table that holds their bias. int64 [T, T]

    Two patches on a `grid` x `grid` image lie between -(grid-1) and grid-1 rows, and as many columns, apart: that
    makes (2 grid - 1)^2 rows. Three more follow, for [CLS] to patch, patch to [CLS], and [CLS] to itself.
    """
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    y, x = y.flatten(), x.flatten()
    side = 2 * grid - 1
    rows, columns = y[:, None] - y + grid - 1, x[:, None] - x + grid - 1  # [N, N], each in 0 .. side-1
    index = torch.empty(1 + grid**2, 1 + grid**2, dtype=torch.int64)
    index[1:, 1:] = rows * side + columns
    index[0, :] = side**2
    index[:, 0] = side**2 + 1
    index[0, 0] = side**2 + 2
    return index


# ----------------------------------------------------------------------------------------------------------------
# The backbone


class VisionTransformer(nn.Module):
    """A Vision Transformer. Also every teacher: CLIP, DINO and DINOv2 differ in the switches at the end only.

    image_size       pixels; images are square
    patch_size       pixels, divides image_size; N = (image_size / patch_size)^2
    rel_pos_bias     "shared": one bias table for all blocks; "per_block": one for each; None
    layer_scale      initial value of gamma_1 and gamma_2, 0 for none
    drop_path        rate of the last block, rising linearly from 0 at the first
    final_norm       False for models that bring a norm of their own (`fc_norm`)
    pre_norm, quick_gelu, norm_eps, num_registers     what CLIP and DINOv2 have and BEiT has not
    """

    # Parts of checkpoints that this model has no use for, and parts of its own that may begin untrained.
    droppable = ("mask_token", "lm_head.", "cls_pt_layers.", "cls_pt_norm.", "cls_pt_lm_head.", "head.")
    may_be_fresh = ()

    def __init__(self, image_size: int = 224, patch_size: int = 16, embed_dim: int = 768, depth: int = 12,
                 num_heads: int = 12, mlp_ratio: float = 4.0, in_channels: int = 3, abs_pos_embed: bool = False,
                 rel_pos_bias: Literal["shared", "per_block"] | None = None, layer_scale: float = 0.0,
                 drop_path: float = 0.0, final_norm: bool = True, checkpoint_activations: bool = False,
                 pre_norm: bool = False, quick_gelu: bool = False, norm_eps: float = 1e-6, num_registers: int = 0):
        super().__init__()
        if image_size < patch_size or image_size % patch_size:
            raise ModelError(f"an image of {image_size} pixels cannot be cut into patches of {patch_size}: choose an "
                             f"image size that is a multiple of the patch size, such as "
                             f"{max(1, round(image_size / patch_size)) * patch_size}")
        if embed_dim % num_heads:
            raise ModelError(f"a width of {embed_dim} does not divide among {num_heads} attention heads: "
                             f"choose embed_dim a multiple of num_heads")
        self.image_size, self.patch_size, self.embed_dim, self.depth = image_size, patch_size, embed_dim, depth
        self.grid = image_size // patch_size
        self.num_patches = self.grid**2
        self.checkpoint_activations = checkpoint_activations
        self.num_registers = num_registers

        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, embed_dim)) if abs_pos_embed else None
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else nn.Identity()

        num_positions = (2 * self.grid - 1) ** 2 + 3 if rel_pos_bias else 0
        self.rel_pos_bias = RelativePositionBias(num_positions, num_heads) if rel_pos_bias == "shared" else None
        if rel_pos_bias:
            self.register_buffer("relative_position_index", relative_position_index(self.grid), persistent=False)
        self.block_options = dict(dim=embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio, layer_scale=layer_scale,
                                  norm_eps=norm_eps, quick_gelu=quick_gelu,
                                  num_relative_positions=num_positions if rel_pos_bias == "per_block" else 0)
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(Block(drop_path=rate, **self.block_options) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps) if final_norm else nn.Identity()

        # Tokenizer and classifier truncate at +-2 (so: never) and leave the patch convolution at PyTorch's default.
        init_weights(self, truncate_at=2.0)

    def embed(self, images: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Images [B, C, S, S] to input tokens [B, T, D], the patches at `masked` [B, M] replaced by `mask_token`."""
        x = self.patch_embed(images)  # [B, N, D]
        B, N, D = x.shape
        if masked is not None:
            mask = torch.zeros(B, N, 1, dtype=torch.bool, device=x.device).scatter(1, masked[..., None], True)
            x = torch.where(mask, mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)  # [B, T, D]
        if self.pos_embed is not None:
            x = x + self.pos_embed
        if self.num_registers:  # DINOv2 puts them after the positions were added: they have none
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], dim=1)
        return self.norm_pre(x)

    def position_bias(self, table: Tensor) -> Tensor:
        """Spread a bias table [positions, H] over all pairs of tokens: [1, H, T, T]."""
        bias = F.embedding(self.relative_position_index, table)  # [T, T, H]
        return bias.permute(2, 0, 1).contiguous()[None]

    def shared_position_bias(self) -> Tensor | None:
        """The bias of the table that all blocks share, or None. Built once per forward pass, not once per block."""
        if self.rel_pos_bias is None:
            return None
        return self.position_bias(self.rel_pos_bias.relative_position_bias_table)

    def run_block(self, block: Block, x: Tensor, position_bias: Tensor | None) -> Tensor:
        if position_bias is None and hasattr(block.attn, "relative_position_bias_table"):
            position_bias = self.position_bias(block.attn.relative_position_bias_table)
        if self.checkpoint_activations and self.training:
            return checkpoint(block, x, position_bias, use_reentrant=False)
        return block(x, position_bias)

    def forward_blocks(self, x: Tensor, position_bias: Tensor | None,
                       keep: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Run all blocks. Returns the last hidden state [B, T, D], and those after the blocks in `keep`, from 1."""
        kept = {}
        for layer, block in enumerate(self.blocks, start=1):
            x = self.run_block(block, x, position_bias)
            if layer in keep:
                kept[layer] = x
        return x, kept

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to normed tokens [B, T, D]: [CLS], then the patches row by row. No registers."""
        x, _ = self.forward_blocks(self.embed(images), self.shared_position_bias())
        x = self.norm(x)
        return torch.cat([x[:, :1], x[:, 1 + self.num_registers:]], dim=1) if self.num_registers else x

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


@torch.no_grad()
def init_weights(model: nn.Module, truncate_at: float, convolutions: bool = False, std: float = 0.02) -> None:
    """Normal weights of `std`, cut off at +-`truncate_at`; zero biases; deeper residual branches start smaller.

    Of block i (from 1), attn.proj and mlp.fc2 are divided by sqrt(2 i), so that the residual stream's variance
    does not grow with depth. Norms keep ones and zeros, layer scales and bias tables their constants.
    """
    def truncated_normal_(tensor: Tensor) -> None:
        if truncate_at > 6 * std:  # nothing to cut off
            tensor.normal_(std=std)
        else:
            # Through the inverse of the distribution function. nn.init.trunc_normal_ draws anew whatever lies outside,
            # and at +-1 std that takes half a minute for a base model.
            edge = math.erf(truncate_at / std / math.sqrt(2))
            tensor.uniform_(-edge, edge).erfinv_().mul_(std * math.sqrt(2)).clamp_(-truncate_at, truncate_at)

    for module in model.modules():
        if isinstance(module, nn.Linear) or (convolutions and isinstance(module, nn.Conv2d)):
            truncated_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name in ("cls_token", "mask_token", "pos_embed", "register_tokens"):
        if getattr(model, name, None) is not None:
            truncated_normal_(getattr(model, name))
    for layer, block in enumerate(getattr(model, "blocks", ()), start=1):
        shrink_residual_branches(block, layer)


@torch.no_grad()
def shrink_residual_branches(block: Block, layer: int) -> None:
    block.attn.proj.weight /= math.sqrt(2 * layer)
    block.mlp.fc2.weight /= math.sqrt(2 * layer)


# ----------------------------------------------------------------------------------------------------------------
# Stage 2: masked image modeling with patch aggregation


class MaskedImageModel(VisionTransformer):
    """The pre-training model (paper section 2.3): predicts the visual tokens of masked patches, twice.

    The backbone predicts them from its last layer. The aggregation head predicts them again from the *final* [CLS]
    and the patch tokens of the *early* layer `early_layers` (counted from 1). Early patches know little of the
    image's content, so what the head lacks must come through [CLS]: that is how [CLS] learns what the image means
    although no label ever speaks of it. The head is thrown away afterwards.

    vocab_size       K, the codebook size
    early_layers     l of the paper: 9 for base, 21 for large
    head_layers      depth of the aggregation head; 0: no head, plain masked prediction (not in the published code)
    shared_lm_head   both predictions go through the same final norm and the same output layer
    """

    droppable = ()

    def __init__(self, vocab_size: int = 8192, early_layers: int = 9, head_layers: int = 2,
                 shared_lm_head: bool = True, drop_path: float = 0.0, **backbone):
        super().__init__(drop_path=drop_path, **backbone)
        if head_layers and not 1 <= early_layers <= self.depth:
            raise ModelError(f"early_layers is {early_layers}, but the backbone has {self.depth} blocks: "
                             f"choose a layer from 1 to {self.depth}")
        self.early_layers, self.head_layers = early_layers, head_layers
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.lm_head = nn.Linear(self.embed_dim, vocab_size)
        # Pre-training cuts its normal init off at +-1 std, the patch convolution included.
        init_weights(self, truncate_at=0.02, convolutions=True)

        # The head's layers come after that, so they keep PyTorch's default init, then shrink by their own depth.
        rates = torch.linspace(0, drop_path, max(self.depth, early_layers + head_layers)).tolist()
        self.cls_pt_layers = nn.ModuleList()
        for layer in range(1, head_layers + 1):
            block = Block(drop_path=rates[early_layers + layer - 1], **self.block_options)
            shrink_residual_branches(block, early_layers + layer)
            self.cls_pt_layers.append(block)
        if head_layers and not shared_lm_head:
            self.cls_pt_norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
            self.cls_pt_lm_head = nn.Linear(self.embed_dim, vocab_size)
            init_weights(self.cls_pt_lm_head, truncate_at=0.02)

    def forward(self, images: Tensor, masked: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predict the codes behind the masked patches.

        images   [B, 3, S, S], normalised
        masked   int64 [B, M], ascending positions of the masked patches: as many in each image, so that every
                 shape is static (see `masked_positions`)
        returns  logits [B, M, K] of the backbone, and of the aggregation head (None without one)
        """
        position_bias = self.shared_position_bias()
        x, kept = self.forward_blocks(self.embed(images, masked, self.mask_token), position_bias, (self.early_layers,))
        logits = self.lm_head(self.norm(take(x[:, 1:], masked)))
        if not self.head_layers:
            return logits, None
        return logits, self.aggregate(x, kept[self.early_layers], masked, position_bias)

    def aggregate(self, last: Tensor, early: Tensor, masked: Tensor, position_bias: Tensor | None) -> Tensor:
        """Patch aggregation (Figure 3 of the paper): predict the codes again, from the final [CLS] and early patches.

        last, early     tokens [B, T, D] after the last block, and after block `early_layers`; neither is normed
        masked          int64 [B, M]
        position_bias   the bias of the shared table, which the head's blocks use too
        returns         logits [B, M, K]
        """
        x = torch.cat([last[:, :1], early[:, 1:]], dim=1)
        for block in self.cls_pt_layers:
            x = self.run_block(block, x, position_bias)
        norm = getattr(self, "cls_pt_norm", self.norm)
        lm_head = getattr(self, "cls_pt_lm_head", self.lm_head)
        return lm_head(norm(take(x[:, 1:], masked)))


def masked_positions(mask: Tensor, num_masked: int) -> Tensor:
    """Positions [B, M], ascending, of the True entries of a mask [B, N] that has exactly `num_masked` in each row.

    A sort has a static shape; `nonzero` would make the host wait for the device to count.
    """
    return mask.byte().sort(dim=1, descending=True, stable=True).indices[:, :num_masked]


def take(tokens: Tensor, positions: Tensor) -> Tensor:
    """Pick the tokens [B, M, D] at `positions` [B, M] of [B, N, D]."""
    return tokens.gather(1, positions[..., None].expand(-1, -1, tokens.shape[-1]))


# ----------------------------------------------------------------------------------------------------------------
# Stage 3: classification


class Classifier(VisionTransformer):
    """The fine-tuning model: the mean of the patch tokens (or [CLS]) through a norm and a linear layer.

    mean_pool    True: `fc_norm` after the mean of the patches; False: the final `norm`, then [CLS]
    init_scale   the head's weights start this much smaller, so that all classes begin equally likely
    """

    may_be_fresh = ("head.", "fc_norm.")

    def __init__(self, num_classes: int, mean_pool: bool = True, init_scale: float = 0.001, **backbone):
        super().__init__(final_norm=not mean_pool, **backbone)
        # The pre-trained norm has learned [CLS] and patches together; their mean gets a fresh norm of its own.
        if mean_pool:
            self.droppable = (*self.droppable, "norm.")
        self.fc_norm = nn.LayerNorm(self.embed_dim, eps=1e-6) if mean_pool else None
        self.head = nn.Linear(self.embed_dim, num_classes)
        init_weights(self.head, truncate_at=2.0)
        with torch.no_grad():
            self.head.weight *= init_scale  # its bias is 0

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] to logits [B, classes]."""
        tokens = self.features(images)  # [B, T, D]
        pooled = self.fc_norm(tokens[:, 1:].mean(dim=1)) if self.fc_norm is not None else tokens[:, 0]
        return self.head(pooled)


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints

# What checkpoints (ours and the published ones) carry beside the parameters of any model.
ALWAYS_DROPPED_ENDS = ("relative_position_index", "quantize.cluster_size", "quantize.embedding.initted",
                       "quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
ALWAYS_DROPPED_STARTS = ("teacher", "scaling", "loss")


@dataclass
class LoadReport:
    """What `load_pretrained` did with every tensor; prints as one line."""

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)  # position tables and embeddings, brought to another grid
    dropped: list[str] = field(default_factory=list)  # in the checkpoint, of no use to the model
    fresh: list[str] = field(default_factory=list)  # in the model, not in the checkpoint: left as initialised

    def __str__(self) -> str:
        parts = [f"loaded {len(self.loaded)} tensors from {self.source}"]
        for verb in ("resized", "dropped", "fresh"):
            if names := getattr(self, verb):
                # Of many, one word for all tensors of a kind: of positions the name's last part, of others its first.
                if len(names) > 2:
                    names = {name.split(".")[-1 if "pos" in name.split(".")[-1] else 0] for name in names}
                parts.append(f"{verb} {len(getattr(self, verb))} ({', '.join(sorted(names))})")
        return "; ".join(parts)


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint file onto the CPU. It can hold tensors and plain values, but never run code.

    Raises ModelError in one sentence if the file is missing, truncated, or holds anything else.
    """
    if not Path(path).is_file():
        raise ModelError(f"there is no checkpoint at '{path}'")
    try:
        with torch.serialization.safe_globals(plain_types()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch lets out whatever a broken file makes its unpickler trip over
        reason = str(error).strip().split("WeightsUnpickler error: ")[-1].splitlines() or [type(error).__name__]
        raise ModelError(f"'{path}' cannot be read as a checkpoint; it is truncated, or no file of tensors and plain "
                         f"values: copy or download it again ({reason[0][:200]})") from error
    if not isinstance(content, dict):
        raise ModelError(f"'{path}' holds a {type(content).__name__}, not a checkpoint with named tensors")
    return content


def read_model(path: str | Path, section: str, here) -> dict:
    """`read_checkpoint` for a model of the dimensions `here`: a configuration's section, named `section` in the file.

    Tensors of another shape would be refused later anyway. But another number of heads fits, and computes something
    else. Published files do not say their dimensions, and pass. Raises ModelError, which names what differs.
    """
    content = read_checkpoint(path)
    saved = content.get("config", {}).get(section)
    if saved and dimensions(argparse.Namespace(**saved)) != dimensions(here):
        there, here = ([f"{section}.{key}={value}" for key, value in dimensions(part).items()]
                       for part in (argparse.Namespace(**saved), here))
        differing = [f"{a} there, {b} here" for a, b in zip(there, here) if a != b]
        raise ModelError(f"'{path}' was made with another model ({'; '.join(differing)}): make the configuration "
                         f"agree with it, or choose another checkpoint")
    return content


def plain_types() -> list:
    """What official files hold beside tensors, none of it code: argparse's namespace and numpy's scalars."""
    import numpy as np

    module = np._core if hasattr(np, "_core") else np.core  # numpy 2 moved it; files of both kinds exist
    scalar_types = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"}
    return [argparse.Namespace, np.dtype, *scalar_types,
            *((module.multiarray.scalar, f"numpy.{name}.multiarray.scalar") for name in ("core", "_core"))]


def model_state(content: dict, source: str) -> dict[str, Tensor]:
    """The named tensors of a checkpoint: its "model" (ours, BEiT), "module" (DeepSpeed), or the whole of it."""
    for key in ("model", "module", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(f"'{source}' holds no model: its entries are {', '.join(map(str, list(content)[:8]))}")
    return tensors


@torch.no_grad()
def load_pretrained(model: nn.Module, checkpoint: str | Path | dict, source: str | None = None) -> LoadReport:
    """Load a checkpoint (a path, or a dictionary already read) into any model of this project.

    Reads our own and the official checkpoints of all three stages. A bias table that all blocks share is copied
    into every block of a model with one table each. Tables and position embeddings of another grid are resized.
    Everything else must fit: a tensor that the model neither expects nor names in `model.droppable`, one of another
    shape, or a parameter that is missing and not in `model.may_be_fresh` raises ModelError, which names them.
    """
    if not isinstance(checkpoint, dict):
        source, checkpoint = str(checkpoint), read_checkpoint(checkpoint)
    report = LoadReport(source or "a dictionary")
    state = model_state(checkpoint, report.source)
    target = model.state_dict()
    droppable, may_be_fresh = getattr(model, "droppable", ()), getattr(model, "may_be_fresh", ())

    shared = "rel_pos_bias.relative_position_bias_table"
    per_block = [name for name in target if name.endswith("attn.relative_position_bias_table")]
    if per_block and shared in state and shared not in target:
        state |= dict.fromkeys(per_block, state.pop(shared))

    unexpected, misfits = [], []
    for name, value in state.items():
        if name.endswith(ALWAYS_DROPPED_ENDS) or name.startswith(ALWAYS_DROPPED_STARTS):
            report.dropped.append(name)
        elif name not in target:
            (report.dropped if name.startswith(droppable) else unexpected).append(name)
        else:
            resized = resize_positions(name, value, target[name])
            if resized is not value:
                report.resized.append(name)
            if resized.shape == target[name].shape:
                target[name].copy_(resized)  # state_dict() shares memory with the model
                report.loaded.append(name)
            elif name.startswith(may_be_fresh):
                report.dropped.append(name)
                report.fresh.append(name)
            else:
                misfits.append(f"{name} is {list(value.shape)} there and {list(target[name].shape)} here")
    missing = [name for name in target if name not in state]
    report.fresh += [name for name in missing if name.startswith(may_be_fresh)]
    missing = [name for name in missing if name not in report.fresh]

    for problem, names in (("has tensors of another size", misfits), ("holds tensors that this model does not have",
                           unexpected), ("lacks tensors that this model needs", missing)):
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ModelError(f"'{report.source}' {problem}: {shown}; it was made with another model or codebook, so "
                             f"make the configuration agree with it or choose another checkpoint")
    return report


def timm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A backbone or classifier as timm's `beitv2_*` models want it, for `timm.create_model(..., checkpoint_path=...)`.

    timm took over the published names, but has a bias table in each block and no heads of pre-training.
    """
    shared = state.get("rel_pos_bias.relative_position_bias_table")
    kept = {name: value for name, value in state.items()
            if not name.startswith(("mask_token", "lm_head.", "cls_pt_", "rel_pos_bias."))
            and not name.endswith(ALWAYS_DROPPED_ENDS)}
    if shared is not None:
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        kept |= {f"blocks.{i}.attn.relative_position_bias_table": shared.clone() for i in range(depth)}
    return kept


def resize_positions(name: str, value: Tensor, target: Tensor) -> Tensor:
    """Bring a bias table [(2g-1)^2 + 3, H] or position embedding [1, 1 + g^2, D] to the target's grid, bicubically.

    What belongs to [CLS] is kept as it is. Anything else, and what fits already, is returned untouched.
    """
    if value.shape == target.shape or value.ndim != target.ndim or value.shape[-1] != target.shape[-1]:
        return value
    if name.endswith("relative_position_bias_table"):
        grid, extra = value[:-3], value[-3:]
        return torch.cat([resize_grid(grid, len(target) - 3), extra])
    if name.endswith("pos_embed"):
        extra, grid = value[0, :1], value[0, 1:]
        return torch.cat([extra, resize_grid(grid, target.shape[1] - 1)])[None]
    return value


def resize_grid(values: Tensor, length: int) -> Tensor:
    """Interpolate a square grid of vectors, [side^2, D] row by row, to [length, D], where length is a square too."""
    old, new = math.isqrt(len(values)), math.isqrt(length)
    if not old or old**2 != len(values) or new**2 != length:
        return values
    values = values.float().T.reshape(1, -1, old, old)
    values = F.interpolate(values, size=(new, new), mode="bicubic", align_corners=False)
    return values.reshape(-1, length).T
