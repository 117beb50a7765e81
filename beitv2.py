"""BEiT v2's networks: the Vision Transformer, its two heads, and how to read a checkpoint into them.

    VisionTransformer     images -> normed tokens: [CLS] and one per patch       (the backbone)
    MaskedImageModel      images + masked positions -> the id that each hides    (stage 2, paper section 2.3)
    Classifier            images -> class logits                                 (stage 3)
    load_pretrained       checkpoint -> model, with a report of every tensor

Parameter names are those of the published code, so its `.pth` files load key for key.
This file needs nothing but torch: copy it to use a trained model elsewhere.

Paper: Peng et al., "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers", arXiv 2208.06366.
It builds on BEiT (arXiv 2106.08254), from which the backbone and the masking come.

Three words: a *token* is a vector of D numbers inside the network. A *code* is one of the K vectors of the codebook
that stage 1 makes, and its *id* is its number there, 0 to K-1. The tokenizer gives each patch a code. This file deals
with ids alone. (The paper says visual token for both, others say visual word.)

The shape comments use these letters:

    B   images in a batch
    S   side of an image in pixels; images are square
    N   patches of an image, (S / patch size)^2: 196 for 224 pixels and patches of 16
    T   tokens of an image, 1 + N: the token [CLS] stands before the patches
    D   width of the network: a token has D numbers
    H   attention heads
    M   masked patches of an image: 75 in the paper
    K   codes in the codebook: 8192 in the paper
"""

import argparse
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# name: width D, blocks, heads
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}

# What is special about some parameters. A new part of the model may have to be added here.
ROLES = {
    "drawn": ("cls_token", "mask_token", "pos_embed", "register_tokens"),  # vectors with random initial values
    # The last part of the names of parameters:
    "undecayed": ("cls_token", "pos_embed"),  # no weight decay; the same holds for all biases and norms
    # How the names of parameters begin:
    "layer 0": ("cls_token", "mask_token", "pos_embed", "patch_embed."),  # below the first block, for layer decay
    "pre-training": ("mask_token", "lm_head.", "cls_pt_layers.", "cls_pt_norm.", "cls_pt_lm_head."),  # for it alone
}


class ModelError(ValueError):
    """A model that cannot be built or a checkpoint that does not fit; the message says why in one sentence."""


Count = Annotated[int, 1, math.inf]  # smallest and largest value, checked when a config is read


@dataclass
class ModelConfig:
    """The `model` section: the backbone that is pre-trained and then fine-tuned."""

    size: Literal["tiny", "small", "base", "large"] = "base"  # width, depth and heads; the three below override it
    embed_dim: Count | None = None  # width D
    depth: Count | None = None  # number of blocks
    num_heads: Count | None = None  # attention heads; D must be a multiple of it
    patch_size: Count = 16  # pixels; the image size must be a multiple of it
    mlp_ratio: Annotated[float, 0.1, math.inf] = 4.0  # hidden width of the MLP over D
    layer_scale: Annotated[float, 0.0, 1.0] = 0.1  # initial factor on each residual branch (1e-5 for large); 0: none
    init_std: Annotated[float, 0.001, 1.0] = 0.02  # of the initial weights; narrow models learn faster with more
    rel_pos_bias: bool = True  # relative position bias: one table while pre-training, one per block afterwards
    abs_pos_embed: bool = False  # learned absolute position embeddings
    checkpoint_activations: bool = False  # recompute blocks in the backward pass: less memory, more time

    def check(self, config) -> None:
        """Called when the configuration is read. ModelError if patches do not fit the image, or heads the width."""
        if hasattr(config, "segment"):  # segment.py looks at crops of their own size
            check_patches(config.segment.crop_size, self.patch_size, "segment.crop_size")
        else:
            check_patches(config.data.image_size, self.patch_size, "data.image_size")
        for section in ("model", "tokenizer"):
            if hasattr(config, section):
                sizes = dimensions(getattr(config, section))
                check_heads(sizes["embed_dim"], sizes["num_heads"], f"{section}.")

    def backbone(self, image_size: int, tables: Literal["shared", "per_block"] = "per_block") -> dict:
        """Keyword arguments of `VisionTransformer` for this configuration.

        tables   whether the blocks share one table of position bias, if the configuration has any
        """
        return dimensions(self) | dict(
            image_size=image_size,
            rel_pos_bias=tables if self.rel_pos_bias else None,
            patch_size=self.patch_size,
            mlp_ratio=self.mlp_ratio,
            layer_scale=self.layer_scale,
            init_std=self.init_std,
            abs_pos_embed=self.abs_pos_embed,
            checkpoint_activations=self.checkpoint_activations,
        )


def dimensions(section) -> dict[str, int]:
    """Width, depth and heads of a section, `model` or `tokenizer`: those of its `size`, unless it sets them itself."""
    width, depth, heads = SIZES[section.size]
    return dict(embed_dim=section.embed_dim or width, depth=section.depth or depth,
                num_heads=section.num_heads or heads)


def check_patches(image_size: int, patch_size: int, option: str = "image_size") -> None:
    """ModelError if an image of image_size x image_size pixels cannot be cut into whole patches."""
    if image_size < patch_size or image_size % patch_size:
        nearest = max(1, round(image_size / patch_size)) * patch_size
        raise ModelError(f"an image of {image_size} pixels cannot be cut into patches of {patch_size}: choose a "
                         f"multiple of the patch size, such as {nearest} for {option}")


def check_heads(embed_dim: int, num_heads: int, section: str = "") -> None:
    """ModelError if the attention heads cannot share the width out evenly."""
    if embed_dim % num_heads:
        raise ModelError(f"a width of {embed_dim} does not divide among {num_heads} attention heads: choose "
                         f"{section}embed_dim a multiple of {section}num_heads")


# ----------------------------------------------------------------------------------------------------------------
# Act 1. The parts of a block


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): while training, some images skip a residual branch.

    Each image skips it with probability `rate`. So no block can rely on one particular branch, and a large
    model overfits less. Dropout would zero single numbers; here the image really passes through a shallower network.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        # x is the output of a branch, [B, T, D]. One random number decides for all tokens and channels of an image.
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.rate
        # Evaluation uses every branch. The division makes the average over the random choices equal to that full
        # branch. Without it, evaluation would add larger branches than the later blocks have been trained with.
        return x * keep / (1 - self.rate)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """The rate of each block, rising linearly from 0 at the first to `last`: early blocks feed all others."""
    return [last * block / max(1, depth - 1) for block in range(depth)]


class Attention(nn.Module):
    """Multi-head self-attention with a bias on queries and values and, optionally, on relative positions.

    Each head computes softmax(q k^T / sqrt(D/H) + position bias) v.

    The keys have no bias, because it could not change anything. A bias b would turn the logit q . k_j of key j into
    q . k_j + q . b. The second term is the same for all keys j of this query, and softmax ignores a number that is
    added to all its inputs. So models that do have a key bias (CLIP, DINO) lose nothing when it is left out here.
    A query bias does matter: it adds b . k_j, which differs from key to key. A value bias adds itself to the output.
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
        # One matrix product makes all three. In its bias, the part of the keys is zero.
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)  # [B, T, 3D]
        return qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, position_bias: Tensor | None) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        if position_bias is not None:
            position_bias = position_bias.to(q.dtype)  # q is in half precision under autocast
        # PyTorch calls the argument attn_mask, but a mask of numbers is added to the logits. It hides nothing: every
        # token sees every other one. The tokens of masked patches attend and are attended to like all the rest.
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=position_bias)
        return self.proj(x.transpose(1, 2).flatten(2))  # the heads side by side again: [B, T, D]


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, for each token on its own: [B, T, D] -> [B, T, D]."""

    def __init__(self, dim: int, hidden_dim: int, quick_gelu: bool):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = QuickGELU() if quick_gelu else nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block: x = x + attention(norm(x)), then x = x + MLP(norm(x)).

    Pre-norm means that the norm stands inside the branch. The sum x runs through all blocks and is never normed on
    its way (the "residual stream"), so the gradient reaches the first block undisturbed. The first transformers
    normed after each addition. Then every block rescales the gradient, and deep models easily diverge early on.

    Layer scale (arXiv 2103.17239) multiplies each branch by a learned vector gamma [D], whose entries all start at
    `layer_scale`: 0.1 in the base model, 1e-5 in the large one. So each block changes its input only a little at
    first, and learns how much it should. Without it, 24 blocks that are still random would bury the image in noise.
    With `layer_scale` 0 there is no gamma.
    """

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

    def forward(self, x: Tensor, position_bias: Tensor | None = None, asked: Tensor | None = None) -> Tensor:
        """Tokens [B, T, D] -> [B, T, D]; with `asked`, int64 [B, A], only the tokens at these places: [B, A, D]."""
        x = self.add_attention(x, position_bias)
        # From here on each token is on its own. One that nobody asks for may leave: the others have read it already.
        if asked is not None:
            x = take(x, asked)
        return self.add_mlp(x)

    def add_attention(self, x: Tensor, position_bias: Tensor | None) -> Tensor:
        """x + attention(norm(x)), [B, T, D]: the only place where tokens exchange information."""
        branch = self.attn(self.norm1(x), position_bias)
        return x + self.drop_path(branch if self.gamma_1 is None else self.gamma_1 * branch)

    def add_mlp(self, x: Tensor) -> Tensor:
        """x + MLP(norm(x)), [B, T, D], for each token alone."""
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path(branch if self.gamma_2 is None else self.gamma_2 * branch)


class PatchEmbed(nn.Module):
    """Cuts images of C channels into patches and projects each linearly: [B, C, S, S] -> [B, N, D], row by row.

    It is a convolution whose stride equals its kernel, so that each patch meets the kernel exactly once. This is the
    same as cutting out the patch, flattening it, and one linear layer. That is how it is computed here, because a CPU
    takes much longer for the gradient of such a convolution. Patches do not overlap. Masking depends on that: if they
    did, the pixels of a masked patch would leak through the tokens of its neighbours.
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        # [B, C, S, S] -> [B, C, rows, P, columns, P] -> [B, rows, columns, C, P, P]; N is rows times columns
        side = self.proj.stride[0]
        patches = images.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
        patches = patches.flatten(3).flatten(1, 2)  # [B, N, C P P]
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class RelativePositionBias(nn.Module):
    """Holds the bias table of relative positions that all blocks share, under its published name.

    Attention treats its tokens as a set: it cannot tell which patch lies where. The bias tells it. Each pair (query
    patch, key patch) gets a learned number for each head, which is added to their logit. It depends only on how many
    rows and columns lie between the two patches. So "the patch to my right" is learned once for all places.

    The table has one row for each possible displacement: [(2 grid - 1)^2 + 3, H], 732 rows for a grid of 14 x 14.
    `relative_position_index` says which row belongs to which pair.

    In pre-training all blocks share one table ("shared"): it is small, and every block helps to train it. In
    fine-tuning each block gets a table of its own ("per_block"), which starts as a copy of the shared one, so that
    the function is unchanged at first. There, layer decay gives each block a learning rate of its own, and one shared
    table could not follow twelve rates. With copies, the blocks may also come to differ. (The papers do so without
    giving a reason; this reason is ours.)
    """

    def __init__(self, num_relative_positions: int, num_heads: int):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_relative_positions, num_heads))


def relative_position_index(grid: int) -> Tensor:
    """For each pair (query token, key token), the row of the bias table that holds their bias: int64 [T, T].

    On an image of grid x grid patches, two patches are between -(grid-1) and grid-1 rows apart; so with columns.
    That makes (2 grid - 1)^2 displacements, one row of the table for each. Three more rows follow, because [CLS] has
    no place: one for the pairs [CLS] -> patch, one for patch -> [CLS], and one for [CLS] -> [CLS].

    An example, grid = 2. The patches are numbered row by row:      0 1
                                                                    2 3

    Their rows differ by -1, 0 or 1, and so do their columns. These 3 x 3 = 9 displacements are rows 0 to 8 of the
    table. Rows 9 to 11 are for [CLS]. Take query patch 3 and key patch 0. The query's place minus the key's is one row
    and one column, (1, 1). Adding grid-1 = 1 makes both numbers start at 0: (2, 2). So the pair uses row 2 * 3 + 2 = 8
    of the table. The whole index:

                    key [CLS]   0    1    2    3
        query [CLS]       11    9    9    9    9
        query 0           10    4    3    1    0
        query 1           10    5    4    2    1      The diagonal of the patches is 4: displacement (0, 0).
        query 2           10    7    6    4    3      The pairs 0 -> 1 and 2 -> 3 both use row 3: in both
        query 3           10    8    7    5    4      of them the key lies to the right of the query.
    """
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    y, x = y.flatten(), x.flatten()
    side = 2 * grid - 1
    # Query minus key, shifted to start at 0.
    rows, columns = y[:, None] - y + grid - 1, x[:, None] - x + grid - 1  # [N, N], each in 0 .. side-1
    index = torch.empty(1 + grid**2, 1 + grid**2, dtype=torch.int64)
    index[1:, 1:] = rows * side + columns  # a two-digit number in base `side`: no two displacements share a row
    index[0, :] = side**2  # the query is [CLS]
    index[:, 0] = side**2 + 1  # the key is [CLS]
    index[0, 0] = side**2 + 2
    return index


# ----------------------------------------------------------------------------------------------------------------
# Act 2. The backbone


class VisionTransformer(nn.Module):
    """A Vision Transformer: images [B, C, S, S] -> embed -> blocks -> final norm -> tokens [B, T, D].

    The teachers CLIP, DINO and DINOv2 are this class too, with position embeddings and other switches.

    image_size       pixels; images are square
    patch_size       pixels, divides image_size; N = (image_size / patch_size)^2
    abs_pos_embed    add a learned vector to each token that says where it is (ViT's way; BEiT v2 leaves it out)
    rel_pos_bias     "shared": one bias table for all blocks; "per_block": one for each; None: no bias
    layer_scale      initial value of gamma_1 and gamma_2, 0 for none
    init_std         standard deviation of the initial weights, see init_weights
    drop_path        rate of the last block, see drop_path_rates
    final_norm       False for models that bring a norm of their own (`fc_norm`), or read hidden states (segmentation)
    pre_norm, quick_gelu, norm_eps, num_registers     what CLIP and DINOv2 have, and BEiT does not
    """

    # For load_pretrained: `droppable` names what this model leaves in a checkpoint because it has no use for it,
    # `may_be_fresh` its own parts that may stay untrained if the checkpoint lacks them.
    droppable = (*ROLES["pre-training"], "head.")
    may_be_fresh = ()

    def __init__(self, image_size: int = 224, patch_size: int = 16, embed_dim: int = 768, depth: int = 12,
                 num_heads: int = 12, mlp_ratio: float = 4.0, in_channels: int = 3, abs_pos_embed: bool = False,
                 rel_pos_bias: Literal["shared", "per_block"] | None = None, layer_scale: float = 0.0,
                 init_std: float = 0.02, drop_path: float = 0.0, final_norm: bool = True,
                 checkpoint_activations: bool = False, pre_norm: bool = False, quick_gelu: bool = False,
                 norm_eps: float = 1e-6, num_registers: int = 0):
        super().__init__()
        check_patches(image_size, patch_size)
        check_heads(embed_dim, num_heads)
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
        # The index follows from the grid. It is no parameter, and no checkpoint needs to hold it.
        if rel_pos_bias:
            self.register_buffer("relative_position_index", relative_position_index(self.grid), persistent=False)
        self.block_options = dict(dim=embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio, layer_scale=layer_scale,
                                  norm_eps=norm_eps, quick_gelu=quick_gelu,
                                  num_relative_positions=num_positions if rel_pos_bias == "per_block" else 0)
        rates = drop_path_rates(drop_path, depth)
        self.blocks = nn.ModuleList(Block(drop_path=rate, **self.block_options) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps) if final_norm else nn.Identity()

        # As published: the cut-off at +-2 is 100 times 0.02, so in practice nothing is cut off, and the patch
        # convolution keeps PyTorch's default. (Stage 2 has other rules: see MaskedImageModel.)
        init_weights(self, truncate_at=2.0, std=init_std)

    def embed(self, images: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Images [B, C, S, S] to input tokens [B, T, D]. The patches at `masked` [B, M] become the `mask_token`."""
        x = self.patch_embed(images)  # [B, N, D]
        B, N, D = x.shape

        # The mask token is one learned vector [D] for all masked patches (section 2.3).
        # Why after the patch embedding? Grey pixels instead would be embedded like a wall that is really grey. A vector
        # of its own means "hidden" and nothing else. The pixels behind the mask go nowhere from here on.
        # Why before the positions? The model must know which patch it has to predict. If the mask token replaced the
        # position embedding too, all masked patches would be the same vector, and get the same prediction.
        # (BEiT v2 itself has no position embeddings, `pos_embed` is None. There the relative position bias says where
        # each token is. It works inside attention, on masked patches as on all others.)
        if masked is not None:
            mask = torch.zeros(B, N, 1, dtype=torch.bool, device=x.device).scatter(1, masked[..., None], True)
            x = torch.where(mask, mask_token.to(x.dtype), x)

        # [CLS] is a learned vector too, the same for all images. It has no patch: it is free to collect in the blocks
        # what concerns the whole image. It is never masked.
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)  # [B, T, D]
        if self.pos_embed is not None:
            x = x + self.pos_embed
        if self.num_registers:  # further tokens like [CLS]; DINOv2 adds them after the positions, so they have none
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], dim=1)
        return self.norm_pre(x)

    def position_bias(self, table: Tensor) -> Tensor:
        """Look up the bias of all pairs of tokens in a table [displacements, H]: [1, H, T, T], for all images alike."""
        bias = F.embedding(self.relative_position_index, table)  # [T, T, H]
        # PyTorch's fast attention needs the last dimension contiguous in memory.
        return bias.permute(2, 0, 1).contiguous()[None]

    def shared_position_bias(self) -> Tensor | None:
        """The bias of the table that all blocks share, or None if there is no such table.

        The caller builds it once per forward pass and hands it to all blocks, which would all look up the same numbers.
        """
        if self.rel_pos_bias is None:
            return None
        return self.position_bias(self.rel_pos_bias.relative_position_bias_table)

    def run_block(self, block: Block, x: Tensor, position_bias: Tensor | None, asked: Tensor | None = None) -> Tensor:
        """One block: see Block.forward. It gets the shared `position_bias`, or that of its own table.

        With `checkpoint_activations` the backward pass computes the block a second time, instead of keeping all its
        intermediate results in memory.
        """
        if position_bias is None and hasattr(block.attn, "relative_position_bias_table"):
            position_bias = self.position_bias(block.attn.relative_position_bias_table)
        if self.checkpoint_activations and self.training:
            return checkpoint(block, x, position_bias, asked, use_reentrant=False)
        return block(x, position_bias, asked)

    def forward_blocks(self, x: Tensor, position_bias: Tensor | None, keep: tuple[int, ...] = (),
                       asked: Tensor | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        """Run all blocks. Returns the last hidden state [B, T, D], and those after the blocks that `keep` names.

        Blocks are counted from 1 here, as in the paper: 9 means after the ninth block. The final norm is not
        applied to them. With `asked`, int64 [B, A], the last block gives only the tokens at these places, [B, A, D].
        """
        kept = {}
        for layer, block in enumerate(self.blocks, start=1):
            x = self.run_block(block, x, position_bias, asked if layer == self.depth else None)
            if layer in keep:
                kept[layer] = x
        return x, kept

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to tokens [B, T, D] after the final norm, if the model has one: [CLS], then the patches
        row by row. Registers are left out.

        The final norm is needed because no block norms the residual stream, whose size grows from block to block.
        """
        x, _ = self.forward_blocks(self.embed(images), self.shared_position_bias())
        x = self.norm(x)
        return torch.cat([x[:, :1], x[:, 1 + self.num_registers:]], dim=1) if self.num_registers else x

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


@torch.no_grad()
def init_weights(model: nn.Module, truncate_at: float, convolutions: bool = False, std: float = 0.02) -> None:
    """Draw normal weights with standard deviation `std`, cut off at +-`truncate_at`, and set biases to zero.

    The residual branches of the blocks then become smaller with depth: see shrink_residual_branches.

    Why a cut-off: a normal distribution now and then gives a weight of four or five std. Among 86 million weights
    some are that large, and a few large ones can make the first steps unstable. BEiT (section 2.5) wants all weights
    within [-0.02, 0.02]. The published code draws with std 0.02 and cuts off at +-0.02, that is at +-1 std. What is
    left has a standard deviation of 0.011.

    Narrow models want a larger `std`. A sum over D inputs has a deviation of sqrt(D) times that of the weights. With
    D = 768 and 0.02 that is 0.55, so a layer hands on about half of what comes in. With D = 128 it is 0.23: all
    branches begin so small that a short run spends most of its steps on enlarging them. So it wants an `std` of
    0.02 * sqrt(768 / D) or more.

    What is not named here keeps its constants: norms ones and zeros, layer scales theirs, bias tables zeros.
    """
    def truncated_normal_(tensor: Tensor) -> None:
        if truncate_at > 6 * std:  # nothing to cut off
            tensor.normal_(std=std)
        else:
            # Uniform numbers go through the inverse of the distribution function, which gives normal ones at once.
            # nn.init.trunc_normal_ instead draws again until no number lies outside. At +-1 std a third of them do,
            # and a base model takes half a minute.
            edge = math.erf(truncate_at / std / math.sqrt(2))
            tensor.uniform_(-edge, edge).erfinv_().mul_(std * math.sqrt(2)).clamp_(-truncate_at, truncate_at)

    for module in model.modules():
        if isinstance(module, nn.Linear) or (convolutions and isinstance(module, nn.Conv2d)):
            truncated_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name in ROLES["drawn"]:
        if getattr(model, name, None) is not None:
            truncated_normal_(getattr(model, name))
    for layer, block in enumerate(getattr(model, "blocks", ()), start=1):
        shrink_residual_branches(block, layer)


@torch.no_grad()
def shrink_residual_branches(block: Block, layer: int) -> None:
    """Divide the last linear layer of both branches of block `layer` (from 1) by sqrt(2 layer) (BEiT, section 2.5).

    Each block adds two branches to the residual stream. Say that each has the variance v before it is divided. After
    12 blocks the stream would have gained 24 v, and the embedding of the patch would be a small part of it. Divided,
    both branches of block i add v / (2i) each, so v / i together. After 12 blocks that is v (1 + 1/2 + ... + 1/12),
    which is 3.1 v. (There are 2 * layer branches up to here.)
    """
    block.attn.proj.weight /= math.sqrt(2 * layer)
    block.mlp.fc2.weight /= math.sqrt(2 * layer)


# ----------------------------------------------------------------------------------------------------------------
# Act 3. Stage 2: masked image modeling with patch aggregation


class MaskedImageModel(VisionTransformer):
    """The pre-training model (paper section 2.3): it predicts the ids of the masked patches, twice.

    The first prediction is BEiT's. It comes from the patch tokens of the last layer. It trains the patches well, but
    [CLS] by chance: no loss looks at [CLS], so nothing asks it to say what the image is about.

    The second prediction is new in BEiT v2 and is called patch aggregation. A small transformer, the aggregation
    head, gets the *final* [CLS] and the patch tokens of the *early* layer l, and predicts the same ids again.

        patches ──► blocks 1 ... l ──► blocks l+1 ... L ──► patch tokens ──► norm, lm_head ──► ids     (1)
                          │                   └───────────► [CLS] ──┐
                          └──────► early patch tokens ──────────────┴──► head ──► norm, lm_head ──► ids     (2)

    Why the head needs [CLS]: what the blocks after l find out can reach it in one way only, through [CLS]. The
    final patch tokens are not shown to it. The early ones know less of the other patches, and the head, with its
    two layers, cannot do the work of the missing blocks. So the loss goes down only if [CLS] carries what the early
    patches do not know. And one vector can hardly hold the answers for all the masked patches one by one. It has to
    say what helps with all of them: what the image shows. That is how [CLS] learns this without any label. (So the
    paper argues, and its ablation shows what the linear probe of [CLS] gains by it. Runs four times as long as our demo
    show it too: with its own [CLS] the head names 54 % of the hidden codes, with that of another image 38 to 44 %. k-NN
    of [CLS] is 1.4 points better there than without a head, its probe 1.8, on the mean of three seeds: docs/results.md.
    In the demo's own 12 epochs the head has hardly begun to read [CLS].)

    If l were L, the head would see the final patches, and could do without [CLS]. If the head were deep, it could
    compute what is missing by itself. In both cases [CLS] would learn little. After training, the head is thrown away.

    vocab_size       K, the codebook size
    early_layers     l of the paper, counted from 1: 9 of 12 for base, 21 of 24 for large
    head_layers      depth of the aggregation head; 0: no head, plain masked prediction (not in the published code)
    shared_lm_head   both predictions go through the same final norm and the same output layer; False: the head has a
                     norm and an output layer of its own
    """

    droppable = ()

    def __init__(self, vocab_size: int = 8192, early_layers: int = 9, head_layers: int = 2,
                 shared_lm_head: bool = True, drop_path: float = 0.0, init_std: float = 0.02, **backbone):
        super().__init__(drop_path=drop_path, init_std=init_std, **backbone)
        if head_layers and not 1 <= early_layers <= self.depth:
            raise ModelError(f"early_layers is {early_layers}, but the backbone has {self.depth} blocks: "
                             f"choose a layer from 1 to {self.depth}")
        self.early_layers, self.head_layers = early_layers, head_layers
        self.prediction_names = ("mim", "cls") if head_layers else ("mim",)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.lm_head = nn.Linear(self.embed_dim, vocab_size)
        # The parent class has drawn its weights already. They are drawn again, because in pre-training the published
        # code cuts the normal init off at +-1 std, also that of the patch convolution.
        init_weights(self, truncate_at=init_std, convolutions=True, std=init_std)

        # The head's layers are made after init_weights has run. So their linear layers keep PyTorch's default init, as
        # in the published code. The head continues from the early patches, as blocks l+1, l+2, ... do. So its layers
        # have the drop path rates of these blocks, and their branches are divided by the same numbers.
        rates = drop_path_rates(drop_path, max(self.depth, early_layers + head_layers))
        self.cls_pt_layers = nn.ModuleList()  # the aggregation head, under its published name
        for layer in range(1, head_layers + 1):
            block = Block(drop_path=rates[early_layers + layer - 1], **self.block_options)
            shrink_residual_branches(block, early_layers + layer)
            self.cls_pt_layers.append(block)
        # The paper shares the final norm and the output layer between both predictions, and found that better than
        # separate ones. Both then speak the same language: the head must bring its tokens into the space in which the
        # backbone's patches are read. A separate output layer could learn a reading that only the head uses, and what
        # it learned would be thrown away with the head. This branch is for trying just that.
        if head_layers and not shared_lm_head:
            self.cls_pt_norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
            self.cls_pt_lm_head = nn.Linear(self.embed_dim, vocab_size)
            init_weights(self.cls_pt_lm_head, truncate_at=init_std, std=init_std)

    @staticmethod
    def vocab_size(state: dict[str, Tensor]) -> int:
        """K of the model whose tensors these are, as its output layer tells it."""
        return len(state["lm_head.weight"])

    def forward(self, images: Tensor, masked: Tensor) -> list[Tensor]:
        """Predict the ids of the masked patches: p(id | visible patches) = softmax of these logits (equation 3).

        images   [B, 3, S, S], normalised
        masked   int64 [B, M], ascending positions of the masked patches, 0 to N-1. M is the same number for each image,
                 so that every shape is static (see `masked_positions`)
        returns  logits [B, M, K] for each name in `self.prediction_names`: "mim", of the backbone, and "cls", of the
                 aggregation head, if there is one
        """
        # Built once, used by all blocks and by the head.
        position_bias = self.shared_position_bias()  # [1, H, T, T], or None

        # Only [CLS] and the masked patches are asked for something in the end: tokens 0 and 1 + masked. A visible patch
        # sees its own pixels, so naming its code would be an exercise in copying. So visible patches need no output
        # layer, which is the largest matrix product of the model (D x 8192 for each token), and no MLP in the last
        # block. Leaving them out there changes no number of the others.
        asked = torch.cat([torch.zeros_like(masked[:, :1]), 1 + masked], dim=1)  # [B, 1 + M]

        # Until there, the whole sequence runs through the blocks, masked patches included (MAE leaves them out). In the
        # place of a masked patch, attention gathers from the visible ones what may be there. x is the state after the
        # last block, [B, 1 + M, D]. kept[l] is the state after block l, [B, T, D], of the same pass.
        x = self.embed(images, masked, self.mask_token)
        if self.early_layers != self.depth:
            x, kept = self.forward_blocks(x, position_bias, (self.early_layers,), asked)
        else:  # l = L: the head reads the visible patches of the last layer too, so all of them stay
            x, kept = self.forward_blocks(x, position_bias, (self.early_layers,))
            x = take(x, asked)

        # Prediction 1, of the masked patches: [B, M, D] -> [B, M, K].
        predictions = [self.lm_head(self.norm(x[:, 1:]))]
        if self.head_layers:
            predictions.append(self.aggregate(x, kept[self.early_layers], masked, position_bias))
        return predictions

    def aggregate(self, last: Tensor, early: Tensor, masked: Tensor, position_bias: Tensor | None) -> Tensor:
        """Patch aggregation (Figure 3 of the paper): predict the ids again, from the final [CLS] and early patches.

        last            tokens after the last block, [CLS] first, [B, 1 or more, D]; the others are not read
        early           tokens [B, T, D] after block `early_layers`. The final norm is applied to neither: it comes
                        after the head, before the output layer
        masked          int64 [B, M]
        position_bias   the bias of the shared table, or None for none; the head's blocks get it as it is
        returns         logits [B, M, K]
        """
        # Prediction 2. The final [CLS] takes the place of the early one, in front of the early patch tokens: [B, T, D].
        # Nothing is detached. The gradient of this loss reaches blocks l+1 ... L through [CLS] alone, and blocks
        # 1 ... l through the early patches too. (Position bias, norm and output layer are used here too, and learn.)
        x = torch.cat([last[:, :1], early[:, 1:]], dim=1)
        # In the head, each masked patch reads from [CLS] what its early token does not know.
        for layer, block in enumerate(self.cls_pt_layers, start=1):
            asked = 1 + masked if layer == self.head_layers else None  # after the head, only the masked patches
            x = self.run_block(block, x, position_bias, asked)
        # The final norm and the output layer are those of prediction 1, unless the head has its own.
        norm = getattr(self, "cls_pt_norm", self.norm)
        lm_head = getattr(self, "cls_pt_lm_head", self.lm_head)
        return lm_head(norm(x))


def masked_positions(mask: Tensor, num_masked: int) -> Tensor:
    """Positions [B, M], ascending, of the True entries of a mask [B, N] that has exactly `num_masked` in each row.

    A stable sort brings the True entries to the front and keeps their order. Its result has the same shape whatever
    the mask holds. `nonzero` would be the usual way, but the size of its result depends on the values: on a GPU the
    program would have to wait in every step until the device has counted, and a compiled graph would break there.
    """
    return mask.byte().sort(dim=1, descending=True, stable=True).indices[:, :num_masked]


def take(values: Tensor, positions: Tensor) -> Tensor:
    """Pick from values [B, N, ...], tokens or ids, those at `positions` [B, M] of each image: [B, M, ...]."""
    index = positions.view(*positions.shape, *[1] * (values.ndim - 2))
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


def score(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """How good a prediction is: its loss (equation 3), and for which patches its best guess is right.

    logits   [B, M, K], what was predicted of the masked patches
    ids      int64 [B, M], what is right
    returns  the mean over all masked patches of  - log p(id), a scalar, and hits, bool [B, M]

    The mean keeps the loss the same size for any number of masked patches. In fp32: with 8192 ids, the sum inside the
    softmax would lose its small terms in half precision.
    """
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    return loss, logits.argmax(dim=-1) == ids


# ----------------------------------------------------------------------------------------------------------------
# Act 4. Stage 3: classification

# How the tokens of an image, [B, T, D], become one vector for each image. Fine-tuning uses one of these; k-NN and the
# linear probe measure all of them.
POOLINGS = {
    "cls": lambda tokens: tokens[:, 0],  # [B, D]
    "mean": lambda tokens: tokens[:, 1:].mean(dim=1),  # [B, D], of the patches
}


class Classifier(VisionTransformer):
    """The fine-tuning model: the mean of the patch tokens (or [CLS]) through a norm and a linear layer.

    Fine-tuning trains all blocks, so the pooling may be chosen freely. BEiT and BEiT v2 take the mean of the patches:
    pre-training asked each patch token directly what is at its place, and a mean of all of them is a stable summary.

    The head's weights start 1000 times smaller than usual. A head with random weights of the usual size would say
    something definite and wrong, and send a large random gradient into the pre-trained backbone. The gradient that
    reaches the backbone is multiplied by the head's weights. With tiny ones, all classes begin equally likely
    (a loss of log(classes)), the backbone stays almost as it is, and the head learns first.

    pooling      "mean": the mean of the patches, then `fc_norm`; "cls": the final `norm`, then [CLS]
    init_scale   factor on the head's initial weights
    """

    may_be_fresh = ("head.", "fc_norm.")

    def __init__(self, num_classes: int, pooling: str = "mean", init_scale: float = 0.001, **backbone):
        super().__init__(final_norm=pooling == "cls", **backbone)
        self.pool = POOLINGS[pooling]
        width = self.pool(torch.zeros(1, 2, self.embed_dim)).shape[1]
        # The pre-trained norm was trained on single tokens. A mean of tokens has a smaller spread, because what differs
        # between patches cancels. So the mean gets a fresh norm of its own, and the pre-trained one is left behind.
        if pooling != "cls":
            self.droppable = (*self.droppable, "norm.")
        self.fc_norm = nn.LayerNorm(width, eps=1e-6) if pooling != "cls" else nn.Identity()
        self.head = nn.Linear(width, num_classes)
        init_weights(self.head, truncate_at=2.0)
        with torch.no_grad():
            self.head.weight *= init_scale  # its bias is 0

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] to logits [B, classes]."""
        # There is one norm: before the pooling for [CLS], after it for the mean. The other one is the identity.
        return self.head(self.fc_norm(self.pool(self.features(images))))


# ----------------------------------------------------------------------------------------------------------------
# Act 5. Which parameters decay, and how fast each of them learns


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Sort the trainable parameters into AdamW groups by weight decay and learning-rate scale.

    Norms, layer scales, biases, [CLS] and positions do not decay; mask token and bias tables do, as published.
    With `layer_decay` < 1 (fine-tuning), lower layers learn more slowly, see `lr_scale`.
    """
    depth = len(getattr(model, "blocks", ()))
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bare = parameter.ndim == 1 or name.endswith(".bias") or name.split(".")[-1] in ROLES["undecayed"]
        decay = 0.0 if bare else weight_decay
        scale = lr_scale(name, depth, layer_decay) if layer_decay < 1 else 1.0
        group = groups.setdefault((decay, scale), dict(params=[], names=[], weight_decay=decay, lr_scale=scale))
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def lr_scale(name: str, depth: int, layer_decay: float) -> float:
    """The share of the learning rate that the parameter `name` gets: layer_decay^(L + 1 - i) in layer i of `depth` L.

    The embeddings ([CLS], mask token, positions, patches) are layer 0, block i is layer i, counted from 1, and all else
    is layer L + 1.
    """
    if name.startswith(ROLES["layer 0"]):
        layer = 0
    elif name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1  # names count blocks from 0
    else:
        layer = depth + 1
    return layer_decay ** (depth + 1 - layer)


# ----------------------------------------------------------------------------------------------------------------
# Act 6. Checkpoints
#
# Our names are those of the published code, so most of the published tensors load without any renaming:
#
#     patch_embed.proj                             the convolution of PatchEmbed
#     cls_token, mask_token, pos_embed             the vectors that VisionTransformer.embed uses
#     rel_pos_bias.relative_position_bias_table    the table that all blocks share (a pre-trained model)
#     blocks.N.attn.relative_position_bias_table   the table of each block (a fine-tuned model)
#     blocks.N.{norm1, attn, gamma_1}              attention branch of block N, counted from 0; N + 1 in our comments
#     blocks.N.{norm2, mlp, gamma_2}               its MLP branch
#     norm, lm_head                                final norm and output layer, for both predictions
#     cls_pt_layers.N                              blocks of the aggregation head, counted from 0
#     cls_pt_norm, cls_pt_lm_head                  norm and output layer of a head that does not share them
#     fc_norm, head                                norm after pooling and the linear layer of a Classifier
#
# load_pretrained does three things beyond copying. It copies a shared table into every block of a model that has one
# for each. It resizes position tables to another number of patches. And it drops by name what the model does not need.

# What checkpoints (ours and the published ones) hold beside the parameters of a model, and no model needs: an index
# that follows from the grid, counters of the codebook's training, and the teacher that only the training needs.
ALWAYS_DROPPED_ENDS = ("relative_position_index", "quantize.cluster_size", "quantize.embedding.initted",
                       "quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
ALWAYS_DROPPED_STARTS = ("teacher", "scaling", "loss")
WRAPPERS = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, Lightning


@dataclass
class LoadReport:
    """What `load_pretrained` did with every tensor; prints as one line."""

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)  # position tables and embeddings, brought to another grid
    dropped: list[str] = field(default_factory=list)  # in the checkpoint, but not needed by the model
    fresh: list[str] = field(default_factory=list)  # in the model, not in the checkpoint: left as initialised

    def __str__(self) -> str:
        parts = [f"loaded {len(self.loaded)} tensors from {self.source}"]
        for verb in ("resized", "dropped", "fresh"):
            if names := getattr(self, verb):
                # More than two names are shortened to one word for each kind of tensor: "blocks.3.mlp.fc1.weight" to
                # its first part, "blocks", and position tables to their last part, which says more.
                if len(names) > 2:
                    names = {name.split(".")[-1 if "pos" in name.split(".")[-1] else 0] for name in names}
                parts.append(f"{verb} {len(getattr(self, verb))} ({', '.join(sorted(names))})")
        return "; ".join(parts)


# What torch says of a type that it does not read from files, the name in one of the groups. It has no class of error
# for it.
FOREIGN_TYPE = re.compile(r"GLOBAL (\S+) (?:was not|whose)|add_safe_globals`,? but got <class '(\S+)'>|"
                          r"(TorchScript) archives")


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint file onto the CPU. Only tensors and plain values are read; code in the file is never run.

    An ordinary pickle file can run any program when it is opened, so a downloaded one is a risk (`weights_only`).
    Raises ModelError in one sentence if the file is missing, truncated, or holds anything else. PyTorch advises then to
    allow the types by name, or to read everything. Neither is ours to advise, so its text is read, but not shown.
    """
    if not Path(path).is_file():
        raise ModelError(f"there is no checkpoint at '{path}'")
    try:
        with torch.serialization.safe_globals(plain_types()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can raise nearly any type of error while torch reads it
        text = str(error).strip()
        if foreign := FOREIGN_TYPE.search(text):
            name = foreign[foreign.lastindex]
            if not ends_with(path, name.split(".")[-1].encode()):
                raise ModelError(f"'{path}' holds objects of another program ({name}), which are not read: keep its "
                                 f"tensors alone, with torch.save({{'model': model.state_dict()}}, PATH) where that "
                                 f"program runs") from error
            text = "cut off in a name"  # the type is unknown because only the beginning of its name is there
        reason = text.split("WeightsUnpickler error: ")[-1].strip().splitlines() or [type(error).__name__]
        raise ModelError(f"'{path}' cannot be read as a checkpoint; it is truncated, or no file of tensors and plain "
                         f"values: copy or download it again ({reason[0][:200]})") from error
    if not isinstance(content, dict):
        raise ModelError(f"'{path}' holds a {type(content).__name__}, not a checkpoint with named tensors")
    return content


def ends_with(path: str | Path, text: bytes) -> bool:
    """Whether a file ends with these bytes and one more, which torch takes for the end of the line.

    A file in the format before torch 1.6 can be cut off in the name of a type.
    """
    with open(path, "rb") as file:
        file.seek(max(0, Path(path).stat().st_size - len(text) - 1))
        return file.read(len(text)) == text


def read_model(path: str | Path, section: str, here) -> dict:
    """Read a checkpoint and compare its dimensions with those of `here`, a section of the configuration.

    section   the name under which the file holds the section that it was made with

    A tensor of another shape is refused later anyway (load_pretrained). Another number of heads is not: all shapes
    fit, but the model computes something else. So it is compared here. Published files do not say how many heads they
    have, and are not checked. Raises ModelError, which names what differs.
    """
    content = read_checkpoint(path)
    here, saved = dimensions(here), saved_section(content, section)
    there = dimensions(argparse.Namespace(**saved)) if saved else here
    differing = [f"{section}.{key}={there[key]} there, {section}.{key}={here[key]} here" for key in here
                 if there[key] != here[key]]
    if differing:
        raise ModelError(f"'{path}' was made with another model ({'; '.join(differing)}): make the configuration "
                         f"agree with it, or choose another checkpoint")
    return content


def saved_section(content: dict, section: str) -> dict | None:
    """The section of the configuration that a checkpoint of ours was made with; None for files that have none.

    Files of other programs have an entry "config" too, with anything in it. Ours describes a network, in the section
    `model`, or `tokenizer` for stage 1: with a size that we know, and three numbers that override it or are None.
    """
    config = content.get("config")
    if not isinstance(config, dict):
        return None
    network, found = config.get("tokenizer" if section == "tokenizer" else "model"), config.get(section)
    if not isinstance(network, dict) or not isinstance(found, dict) or network.get("size") not in [*SIZES]:
        return None
    numbers = [network.get(key, "missing") for key in ("embed_dim", "depth", "num_heads")]
    return found if all(number is None or type(number) is int and number > 0 for number in numbers) else None


def plain_types() -> list:
    """The types that published files hold beside tensors: argparse's namespace, numpy's scalars. None of it is code."""
    try:
        import numpy as np
    except ModuleNotFoundError:  # torch works without it; files that hold its scalars are then refused
        return [argparse.Namespace]
    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"}
    scalar = np.float64().__reduce__()[0]  # what makes a scalar when a file is read; numpy 2 gave it another name
    return [argparse.Namespace, np.dtype, *kinds, (scalar, "numpy.core.multiarray.scalar"),
            (scalar, "numpy._core.multiarray.scalar")]


def model_state(content: dict, source: str) -> dict[str, Tensor]:
    """The named tensors of a checkpoint. They are its entry "model" (ours, BEiT's), "module" (DeepSpeed's) or
    "state_dict", or the whole dictionary if it has none of these entries. A prefix that a wrapper of the model has put
    before all names is taken off."""
    content = next((content[key] for key in ("model", "module", "state_dict") if isinstance(content.get(key), dict)),
                   content)
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(f"'{source}' holds no model: its entries are {', '.join(map(str, list(content)[:8]))}")
    while wrapper := [prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in tensors)]:
        tensors = {name.removeprefix(wrapper[0]): value for name, value in tensors.items()}
    return tensors


def as_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a fine-tuned model, for a backbone.

    A model that classifies the mean of its patches norms after pooling, and a backbone norms before it. So the norm
    that it has takes the place of the one that it lacks. Other weights stay as they are.
    """
    return {name.replace("fc_norm.", "norm."): value for name, value in state.items()}


@torch.no_grad()
def load_pretrained(model: nn.Module, checkpoint: str | Path | dict, source: str | None = None) -> LoadReport:
    """Load a checkpoint (a path, or a dictionary already read) into any model of this project.

    Reads our own and the published checkpoints of all three stages. A bias table that all blocks share is copied
    into every block of a model with one table each. Tables and position embeddings of another grid are resized.

    Everything else must fit, because a model with one layer missing still runs, and only its results are bad.
    ModelError names the tensors if one is not expected (and not in `model.droppable`), if one has another shape,
    or if one is missing (and not in `model.may_be_fresh`).
    """
    if not isinstance(checkpoint, dict):
        source, checkpoint = str(checkpoint), read_checkpoint(checkpoint)
    report = LoadReport(source or "a dictionary")
    state, target = model_state(checkpoint, report.source), model.state_dict()
    droppable, may_be_fresh = getattr(model, "droppable", ()), getattr(model, "may_be_fresh", ())

    # From pre-training to fine-tuning: one table becomes one for each block (see RelativePositionBias).
    shared = "rel_pos_bias.relative_position_bias_table"
    per_block = [name for name in target if name.endswith("attn.relative_position_bias_table")]
    if per_block and shared in state and shared not in target:
        state |= dict.fromkeys(per_block, state.pop(shared))

    here = {name: resize_positions(name, value, target[name]) if name in target else value
            for name, value in state.items()}
    report.resized = [name for name in here if here[name] is not state[name]]
    misfits = [name for name in here if name in target and here[name].shape != target[name].shape]
    report.dropped = [name for name in here if name.endswith(ALWAYS_DROPPED_ENDS)
                      or name.startswith(ALWAYS_DROPPED_STARTS) or (name not in target and name.startswith(droppable))
                      or (name in misfits and name.startswith(may_be_fresh))]
    here = {name: value for name, value in here.items() if name not in report.dropped}

    def refuse(problem: str, names: list[str]) -> None:
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ModelError(f"'{report.source}' {problem}: {shown}; it was made with another model or codebook, so "
                             f"make the configuration agree with it or choose another checkpoint")

    refuse("has tensors of another size",
           [f"{name} is {list(state[name].shape)} there and {list(target[name].shape)} here"
            for name in misfits if name in here])
    missing, unexpected = model.load_state_dict(here, strict=False)
    refuse("holds tensors that this model does not have", unexpected)
    report.loaded, report.fresh = list(here), [name for name in missing if name.startswith(may_be_fresh)]
    refuse("lacks tensors that this model needs", [name for name in missing if name not in report.fresh])
    broken = [name for name in report.loaded if not target[name].isfinite().all()]
    if broken:  # such a tokenizer would give each patch the id 0, and pre-training would learn to say so
        raise ModelError(f"'{report.source}' holds numbers that are not finite, in {', '.join(broken[:4])}: the run "
                         f"that wrote it has failed, so train it anew or choose another checkpoint")
    return report


def timm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a backbone or classifier as timm's `beitv2_*` models expect them.

    Use: `timm.create_model(..., checkpoint_path=...)`. timm uses the published names too. But its models have a bias
    table in each block, and no part that only pre-training needs.
    """
    shared = state.get("rel_pos_bias.relative_position_bias_table")
    kept = {name: value for name, value in state.items()
            if not name.startswith((*ROLES["pre-training"], "rel_pos_bias."))
            and not name.endswith(ALWAYS_DROPPED_ENDS)}
    if shared is not None:
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        kept |= {f"blocks.{i}.attn.relative_position_bias_table": shared.clone() for i in range(depth)}
    return kept


def resize_positions(name: str, value: Tensor, target: Tensor) -> Tensor:
    """Bring a bias table [(2g-1)^2 + 3, H] or position embedding [1, 1 + g^2, D] to the target's grid.

    Fine-tuning on larger images gives more patches, so more displacements and places, for which values are read
    between those that were learned. Both ways are the published ones: see resize_bias, and resize_grid for position
    embeddings. What belongs to [CLS] has no place, and is kept. A tensor that fits already, or that holds no
    positions, is returned as it is.
    """
    if value.shape == target.shape or value.ndim != target.ndim or value.shape[-1] != target.shape[-1]:
        return value
    if name.endswith("relative_position_bias_table"):
        return torch.cat([resize_bias(value[:-3], len(target) - 3), value[-3:]])
    if name.endswith("pos_embed"):
        return torch.cat([value[0, :1], resize_grid(value[0, 1:], target.shape[1] - 1)])[None]
    return value


def resize_grid(values: Tensor, length: int, **how) -> Tensor:
    """Stretch a square grid of vectors, [side^2, D] row by row, to [length, D], where length is a square too.

    A position embedding says where in the image a patch lies. The grid is stretched like a picture (bicubically), so
    that the last column stays the last: each place keeps what was learned for the same share of the image.

    how   arguments of F.interpolate that lead to this length; without any, the new size
    """
    old, new = math.isqrt(len(values)), math.isqrt(length)
    if not old or old**2 != len(values) or new**2 != length:
        return values
    values = values.float().T.reshape(1, -1, old, old)
    values = F.interpolate(values, mode="bicubic", **(how or dict(size=(new, new))))
    return values.reshape(-1, length).T


def resize_bias(values: Tensor, length: int) -> Tensor:
    """Bring the displacements of a bias table, [side^2, H] row by row, to [length, H]; both are squares of odd numbers.

    A bias says how far apart two patches are, and a patch has its direct neighbours at one patch's distance, however
    many patches there are. What was learned about neighbours is the strongest of a table, so it must stay what it is.
    A stretched table would break this: from 27 to 47 columns, "one to the right" would get what belonged to 0.57 of
    a patch. But the farthest of the new displacements, 23, must be read from a table that ends at 13.

    So the old displacements are put at growing distances, at 1, 1 + q, 1 + q + q^2, ... to both sides of 0, with q
    such that the last one comes to lie where the new table ends: q = 1.09 from 13 to 23. Near 0 these are almost the
    old distances, and 0 and 1 exactly so. The steps become longer only far away, where the bias changes little from
    one patch to the next. A cubic spline through the old values is then read at 0, 1, 2, ..., rows and columns alike.

    A smaller table has q = 1.01, the least that is allowed: it is nearly the middle of the old one, cut out. The
    largest q is 1.5. If the old table ends too early even so, what lies beyond gets its last value.
    """
    old, new = math.isqrt(len(values)), math.isqrt(length)
    if old % 2 == 0 or old**2 != len(values) or new**2 != length:
        return values
    low, high = 1.01, 1.5
    while high - low > 1e-6:  # halve the interval until it holds nothing but the ratio
        q = (low + high) / 2
        low, high = (low, q) if (q**(old // 2) - 1) / (q - 1) > new // 2 else (q, high)
    # 1 + q + ... + q^(i-1) = (q^i - 1) / (q - 1). In double precision, because a spline multiplies rounding errors.
    distances = (q**torch.arange(old // 2 + 1, dtype=torch.float64) - 1) / (q - 1)
    positions = torch.cat([-distances[1:].flip(0), distances])  # [old]
    wanted = (torch.arange(new, dtype=torch.float64) - new // 2).clamp(positions[0], positions[-1])  # [new]
    weights = spline_weights(positions, wanted)
    grid = weights @ values.double().view(old, old, -1).permute(2, 0, 1) @ weights.T  # [H, new, new]
    return grid.flatten(1).T.float()


def spline_weights(positions: Tensor, wanted: Tensor) -> Tensor:
    """What each value at `positions` [P] counts for a cubic spline at `wanted` [W]: float64 [W, P]. It is linear in
    them.

    A cubic spline is one cubic polynomial between each two knots, and so smooth at the knots that only the third
    derivative jumps. So it is a sum of 1, x, x^2, x^3 and of one term c (x - knot)^3 to the right of each knot. These
    are P terms, and P coefficients follow from P values, if all positions but the two outermost at each end are knots
    (the usual choice, called not-a-knot). Up to three positions give the polynomial through them.
    """
    def terms(x: Tensor) -> Tensor:  # [X] -> [X, P]; scaled, so that cubes stay near 1
        powers = [x**i for i in range(min(4, len(positions)))]
        return torch.stack(powers + [(x - knot).clamp(min=0)**3 for knot in positions[2:-2]], dim=1)

    scale = len(positions)
    positions, wanted = positions / scale, wanted / scale
    # Coefficients are terms(positions)^-1 values, and the spline is terms(wanted) coefficients.
    return torch.linalg.solve(terms(positions), terms(wanted), left=False)
