"""Stage 1, VQ-KD: teach a tokenizer to turn each image patch into one of K codes (paper section 2.2).

    torchrun tokenizer.py configs/demo.yaml                                  # one process, CPU or GPU
    torchrun --nproc-per-node 8 tokenizer.py configs/base.yaml               # eight GPUs of one machine
    torchrun tokenizer.py configs/imagenette.yaml tokenizer.codebook_size=1024
    torchrun tokenizer.py configs/demo.yaml tokenizer.mode=encode tokenizer.images=PHOTO_OR_FOLDER   # print their ids

    image -> encoder -> z, one vector per patch -> the nearest code of the codebook -> decoder -> teacher's features

Masked image modeling needs something to predict. Pixels would mean every texture. Words are better, but images have
none. So we make some: a codebook of K vectors, the codes, which the tokenizer learns to use as words for patches.

A *code* is a vector of the codebook. Its *id* is its number there, 0 to K-1, and all that stage 2 needs: "to name a
code" means to give its id. C is the width of the codebook: a code has C numbers, 32 in the paper. (The width of a
network is D, as in beitv2.py.)

What makes a good word? The decoder sees nothing but codes, and from them it must say what a frozen teacher such as
CLIP sees in each patch. So a code must keep what the teacher finds worth knowing: parts, objects, meanings. If the
decoder had to paint the pixels instead, the codes would keep colours and edges.

One image of 224 pixels on its way through the paper's base tokenizer:

    image                                [3, 224, 224]
    14 x 14 patches, encoded             [196, 768]     a transformer of 12 blocks
    z, from the encoder's width down     [196, 32]      encode_task_layer
    ids of the nearest codes             [196]          the result, when the training is over
    the codes themselves                 [196, 32]      a grid [32, 14, 14]: an "image" of 14 x 14 pixels
    up to the decoder's width            [196, 768]     the decoder's patch embedding, patches of 1 x 1 "pixel"
    what the decoder predicts            [196, 512]     3 blocks, then decode_task_layer
    what the teacher says                [196, 512]     CLIP ViT-B/16, frozen: the target

The file has four acts. Act 1: the quantizer, which replaces a vector by its nearest code. Act 2: the model around it.
Act 3: the training loop. Act 4: whether the codes are alive and mean anything. The teachers are in support/teachers.py.
Writes OUTPUT_DIR/tokenizer/{last.pt, metrics.jsonl, config.yaml}.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Callable, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beitv2 import (ModelConfig, ModelError, VisionTransformer, dimensions, init_weights, load_pretrained, model_state,
                    read_checkpoint, saved_section, take)
from data import DataConfig, TrainSamples, ValSamples, to_unit
from finetune import knn_accuracy
from support import teacher_codes, use
from support.datasets import open_datasets
from support.errors import UserError
from support.files import say_if_unfinished, stage_checkpoint
from support.frozen import Frozen, digest
from support.launch import launch
from support.loaders import ValLoader, evenly_chosen
from support.optimizers import clip_gradients, make_optimizer
from support.options import Amount, Beta, Count, Natural, PathText, Share, TrainConfig, load_config
from support.processes import all_reduce_sum, gather_in_order, say, world_size
from support.run import Run
from support.teachers import TeacherName, about_teacher, open_teacher


@dataclass
class TokenizerConfig(TrainConfig):
    """The `tokenizer` section. The image is cut into the same patches as the student's: `model.patch_size`."""

    mode: Literal["train", "encode"] = "train"  # encode: do not train, but write the ids of images
    weights: PathText = ""  # encode only: a trained tokenizer, path or URL; empty: OUTPUT_DIR/tokenizer/last.pt
    images: PathText = ""  # encode only: an image, a folder, or a pattern such as *.jpg
    output: PathText = ""  # encode only: file for names and ids; empty: they are printed
    epochs: Count = 100
    batch_size: Count = 512
    lr: Amount = 2e-4  # the paper's 5e-5 per 128 images
    min_lr: Amount = 1e-5
    warmup_epochs: Amount = 10
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: Amount = 1e-4
    teacher: TeacherName = "clip_vitb16"  # or another one of docs/teachers.md, or FILE.py:NAME
    teacher_weights: PathText = ""  # path of the teacher's weights; empty: its public URL. `beitv2` needs one of ours
    teacher_gelu: Literal["auto", "quick", "exact"] = "auto"  # of CLIP; auto: quick, as OpenAI's. LAION's want exact
    encoder: Literal["vqkd", "teacher"] = "vqkd"  # teacher: no VQ-KD, but k-means of the teacher's own features
    size: Literal["tiny", "small", "base", "large"] = "base"  # of the encoder; the three below override it
    embed_dim: Count | None = None  # width of encoder and decoder
    depth: Count | None = None  # blocks of the encoder
    num_heads: Count | None = None
    init_std: Annotated[float, 0.001, 1.0] = 0.02  # of the initial weights; narrow models learn faster with more
    decoder_depth: Count = 3  # blocks of the decoder: shallow, so that the codes must do the work
    codebook_size: Annotated[int, 2, math.inf] = 8192  # K
    codebook_dim: Count = 32  # C, how many numbers a code has: with many, most codes go unused, says the paper
    ema_decay: Share = 0.99  # of the codebook's moving average; .95 is better for short runs
    commitment_beta: Amount = 1.0  # weight of the commitment loss
    kmeans_init: bool = True  # start from k-means over the first batch's vectors
    mean_start: bool = False  # start with a decoder that gives the teacher's mean feature; good for short runs
    revive_below: Amount = 0.0  # a code whose running count of hits per step falls below this starts anew; 0: never
    crop_scale: tuple[Share, Share] = (0.08, 1.0)  # area of the random crop over that of the image
    knn_images: Natural = 2000  # training images, evenly spaced, that bag_knn compares with; 0: no bag_knn


SECTIONS = {"data": DataConfig, "model": ModelConfig, "tokenizer": TokenizerConfig}


# ----------------------------------------------------------------------------------------------------------------
# Act 1. The quantizer: the nearest of K codes, and how the codes follow


class Quantizer(nn.Module):
    """The codebook: K codes, which are vectors of length 1 with C numbers (section 2.2).

    Four ideas meet here.

    Low dimension. C is 32, while the encoder's width is hundreds. In a high dimension a few codes lie near everything
    and take all the hits, and the others are never used. So says the paper, which uses nearly all of 8192 codes with
    C = 32. (Our small codebooks, of 256 codes, are used equally well with C = 8, 32 and 192. But there `revive_below`
    brings back codes that nothing chooses: docs/ablations.md.)

    Length 1. Both z and the codes are scaled to length 1, so the nearest code is the one with the highest cosine. If
    lengths were free, a code could win or lose by its length alone.

    No gradient. The optimizer does not train the codes. Each code moves towards the mean of the vectors that chose it,
    by an exponential moving average. This is k-means in small steps. It needs no learning rate, and a code moves only
    when it gets a *hit*, that is, when a vector chooses it. (Other VQ-VAEs also average the number of hits, so that
    many hits move a code further than few. Here, as published, one hit moves it as far as a thousand.)

    Dead codes. A code that nothing chooses has no mean to move to. It stays where it is, while the vectors move on with
    the encoder, so it will never be chosen again. `revive_below` puts such codes back among the vectors of the batch.
    It is not in the paper, and off unless asked for: skip `seen`, `latest` and `remember` when you read this first.

    Everything here is in float32: in half precision, two neighbouring codes may become equal.

    embedding.weight    [K, C], the codes, of length 1
    running_count       [K], a moving average of hits per optimizer step, by which dead codes are found
    """

    def __init__(self, codebook_size: int, codebook_dim: int, ema_decay: float = 0.99, commitment_beta: float = 1.0,
                 revive_below: float = 0.0):
        super().__init__()
        self.ema_decay, self.commitment_beta, self.revive_below = ema_decay, commitment_beta, revive_below
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        self.embedding.weight = nn.Parameter(F.normalize(torch.randn(codebook_size, codebook_dim), dim=1), False)
        self.register_buffer("running_count", torch.ones(codebook_size))
        self.register_buffer("counts", torch.zeros(codebook_size), persistent=False)  # hits since the last update
        self.register_buffer("sums", torch.zeros(codebook_size, codebook_dim), persistent=False)  # their l2(z) added up
        self.seen: list[Tensor] = []  # l2(z) [B, N, C] of each micro-batch since the last update, for dead codes
        self.latest: Tensor | None = None  # l2(z) [B, N, C] of the last micro-batch, for `remember`

    @property
    def vectors(self) -> Tensor:
        """What each id stands for, float32 [number of ids, C]: here the codes."""
        return self.embedding.weight

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replace each vector by its nearest code. While training, also count the hits of each code.

        z        [B, N, C], any length
        returns  codes float32 [B, N, C] whose gradient is copied to l2(z) unchanged; ids int64 [B, N]; commitment loss,
                 commitment_beta included
        """
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=-1)  # [B, N, C], on the unit sphere
            # Equation 1. `detach`: while z moves, its id stays the same until it jumps. No gradient can come through it.
            ids = nearest_code(z.detach().flatten(0, 1), self.embedding.weight).view(z.shape[:2])  # [B, N]
            codes = self.embedding(ids)  # [B, N, C]
            if self.training:
                self.count(z.detach(), ids)
            # The commitment loss pulls z towards its code. Without it, z may run away faster than the codes can follow.
            # The codes have no gradient, so only z moves. It is a mean over all elements, as in the published code.
            commitment_loss = self.commitment_beta * F.mse_loss(z, codes)
            # The straight-through estimator. Forward, this is `codes`: z cancels. Backward, the bracket is a constant,
            # so the decoder's gradient for the codes is copied to z, which has length 1 here. From z it goes on through
            # the normalisation to the encoder. The copy is approximate: it was computed at the code, not at z. But
            # without it the encoder would learn nothing from the decoder.
            codes = z + (codes - z).detach()
            return codes, ids, commitment_loss

    @torch.no_grad()
    def count(self, z: Tensor, ids: Tensor) -> None:
        """Add the hits of each code to `counts`, their vectors to `sums`; if `revive_below` > 0, keep z as `latest`.

        z is l2(z), detached, [B, N, C]; ids [B, N]. The published code builds an N x K one-hot matrix instead.
        """
        self.counts.index_add_(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=torch.float32))
        self.sums.index_add_(0, ids.flatten(), z.flatten(0, 1))
        if self.revive_below:
            self.latest = z

    def remember(self) -> None:
        """After each forward pass of a step: keep its vectors, among which `update` finds places for dead codes.

        `count` does not append to the list itself, because it is a part of the compiled forward pass. A tensor may
        change there. But the length of a list is fixed in a compiled graph, so each micro-batch of a step would have
        to be compiled anew.
        """
        if self.revive_below:
            self.seen.append(self.latest)

    @torch.no_grad()
    def update(self, seed: int) -> Tensor:
        """Once per optimizer step, on all ranks together: move each code towards the mean of the vectors that hit it.

        w <- normalize(decay * w + (1 - decay) * normalize(mean)); codes without a hit stay where they are.
        Then codes whose running count fell below `revive_below` are put on random vectors of this batch; `seed`
        makes all ranks choose alike. Returns the hits of each code in this step, [K], a copy.
        """
        # For this step ranks exchange K counts and K sums of vectors. Sums can be added over ranks, so one process and
        # many give the same codes, up to rounding. (A mean of the ranks' means would weigh a rank with one hit like one
        # with a thousand.) The revival below also gathers the vectors themselves.
        counts, sums = all_reduce_sum(self.counts), all_reduce_sum(self.sums)
        weight, hit = self.embedding.weight, (counts > 0)[:, None]
        means = F.normalize(sums / counts.clamp(min=1)[:, None], dim=1)
        moved = F.normalize(self.ema_decay * weight + (1 - self.ema_decay) * means, dim=1)
        weight.copy_(torch.where(hit, moved, weight))
        self.running_count.lerp_(counts, 1 - self.ema_decay)

        if self.revive_below:  # not in the paper
            # The i-th dead code takes the i-th of the shuffled candidates. No size here depends on how many are dead,
            # so the host need not wait for the device to count them.
            candidates = gather_in_order(torch.cat(self.seen)).flatten(0, 1)
            generator = torch.Generator(weight.device).manual_seed(seed)
            order = torch.randperm(len(candidates), generator=generator, device=weight.device)[:len(weight)]
            dead = self.running_count < self.revive_below
            place = (dead.cumsum(0) - 1).clamp(min=0) % len(order)
            weight.copy_(torch.where(dead[:, None], candidates[order][place], weight))
            self.running_count.masked_fill_(dead, 1.0)
            self.seen.clear()
        hits = counts.clone()
        self.counts.zero_()
        self.sums.zero_()
        return hits

    @torch.no_grad()
    def init_from(self, z: Tensor, seed: int, iterations: int = 10) -> None:
        """k-means on the sphere over the vectors z, in the same global order on every rank.

        z [n, C], of any length, is scaled to length 1 first, in float32.

        Random codes would lie anywhere on the sphere. But the vectors of an untrained encoder lie in one small region
        of it, so nearly all would choose the same few codes. k-means puts the codes where the vectors are.
        """
        z, weight = F.normalize(z.float(), dim=1), self.embedding.weight
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(z), generator=generator).to(z.device)
        weight.copy_(z[order[torch.arange(len(weight), device=z.device) % len(z)]])
        for _ in range(iterations):
            ids = nearest_code(z, weight)  # each vector chooses a code; then each code moves to the mean of its vectors
            counts = torch.zeros(len(weight), device=z.device).index_add_(0, ids, torch.ones(len(z), device=z.device))
            sums = torch.zeros_like(weight).index_add_(0, ids, z)
            weight.copy_(torch.where(counts[:, None] > 0, F.normalize(sums, dim=1), weight))
        if world_size() > 1:
            torch.distributed.broadcast(weight, 0)  # ranks may have rounded differently


def nearest_code(z: Tensor, codebook: Tensor, chunk: int = 16384) -> Tensor:
    """Id of the code nearest to each row of z [n, C]: int64 [n]. In chunks, so that n x K need not fit in memory."""
    offset = codebook.square().sum(dim=1)  # |z - w|^2 = |z|^2 - 2 z.w + |w|^2, and |z|^2 does not matter
    return torch.cat([torch.addmm(offset, part, codebook.T, alpha=-2).argmin(dim=1) for part in z.split(chunk)])


class CodeUsage:
    """Counts the hits of each code over an epoch.

    A codebook can collapse: a few codes take all hits. Then nearly all patches have the same id, and stage 2 has
    nothing to learn, though its loss looks excellent. These figures show it.
    """

    def __init__(self, codebook_size: int, device: torch.device):
        self.counts = torch.zeros(codebook_size, dtype=torch.float64, device=device)

    def add(self, hits: Tensor) -> None:
        self.counts += hits

    def figures(self) -> dict[str, float]:
        """usage: share in [0, 1] of the codes that were hit at all; perplexity: how many are really in use, 1 to K.

        Perplexity is what to watch: a few hits keep a code "used", though nearly everything goes to a handful. (With a
        language model low is good; here high is good.)
        """
        return {"usage": (self.counts > 0).double().mean().item(), "perplexity": perplexity(self.counts).item()}

    def state_dict(self) -> dict:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict) -> None:
        self.counts.copy_(state["counts"])


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of the distribution that the counts describe: K if all are equal, 1 if one has everything.

    counts [K], integer or float; codes without hits add nothing (0 log 0 = 0).
    """
    p = counts / counts.sum().clamp(min=1)
    return torch.special.entr(p).sum().exp()


# ----------------------------------------------------------------------------------------------------------------
# Act 2. The model


class PatchTransformer(VisionTransformer):
    """VQ-KD's encoder and decoder: a transformer that returns normed patch tokens [B, N, width] and keeps no [CLS].

    As published, it adds position embeddings and has no relative position bias, unlike the backbone of stage 2.
    """

    def __init__(self, **options):
        super().__init__(abs_pos_embed=True, final_norm=False, **options)
        self.fc_norm = nn.LayerNorm(self.embed_dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc_norm(self.features(images)[:, 1:])


class VQKD(nn.Module):
    """Vector-quantized knowledge distillation (section 2.2, Figure 2).

    The encoder is large and the decoder is shallow on purpose. A deep decoder could guess much of what the teacher says
    from the neighbours of a patch, and the codes themselves would need to say less. After training, nobody
    asks the decoder again: stage 2 needs the ids alone.

    encoder, decoder    dict(embed_dim, depth, num_heads) of each
    teacher_dim         width of the teacher's patch features
    """

    may_be_fresh = ("quantize.running_count",)  # published checkpoints have none

    def __init__(self, image_size: int, patch_size: int, encoder: dict, decoder: dict, codebook_size: int,
                 codebook_dim: int, teacher_dim: int, ema_decay: float = 0.99, commitment_beta: float = 1.0,
                 revive_below: float = 0.0, init_std: float = 0.02):
        super().__init__()
        encoder, decoder = encoder | dict(init_std=init_std), decoder | dict(init_std=init_std)
        self.encoder = PatchTransformer(image_size=image_size, patch_size=patch_size, **encoder)
        # The decoder's "image" is the grid of codes, each a patch of one "pixel" with C channels. So its patch
        # embedding, a convolution of 1 x 1, is what lifts the C numbers of a code back to the decoder's width.
        self.grid, self.patch_size = self.encoder.grid, patch_size
        self.decoder = PatchTransformer(image_size=self.grid, patch_size=1, in_channels=codebook_dim, **decoder)
        width, decoder_width = encoder["embed_dim"], decoder["embed_dim"]
        # Two small networks change the width: one from the encoder's to C, one from the decoder's to the teacher's.
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, codebook_dim))
        self.decode_task_layer = nn.Sequential(nn.Linear(decoder_width, decoder_width), nn.Tanh(),
                                               nn.Linear(decoder_width, teacher_dim))
        init_weights(self.encode_task_layer, truncate_at=2.0, std=init_std)
        init_weights(self.decode_task_layer, truncate_at=2.0, std=init_std)
        self.quantize = Quantizer(codebook_size, codebook_dim, ema_decay, commitment_beta, revive_below)

    @property
    def vectors(self) -> Tensor:
        """The codebook, float32 [K, C]."""
        return self.quantize.vectors

    @property
    def num_ids(self) -> int:
        """K, the number of codes."""
        return len(self.vectors)

    def encode(self, images: Tensor) -> Tensor:
        """Images in [0,1], [B, 3, S, S] -> z, one vector per patch before quantization, float32 [B, N, C]."""
        features = self.encoder(images * 2 - 1)  # [B, N, width]; the published tokenizer was trained on [-1, 1]
        with torch.autocast(images.device.type, enabled=False):  # fp32: a small error in z may lead to another code
            return self.encode_task_layer(features.float())  # [B, N, C], from the encoder's width down to C

    @torch.no_grad()
    def token_ids(self, images: Tensor) -> Tensor:
        """Images in [0,1], [B, 3, S, S] -> the id of each patch's code, row by row, int64 [B, N]."""
        return self.quantize(self.encode(images))[1]

    def target(self, images: Tensor) -> Tensor:
        """What stage 2 has to predict of each patch, [B, N, ...]: its id. Another kind of target begins here."""
        return self.token_ids(images)

    def targets(self, run: Run, samples: TrainSamples) -> Callable[[dict, Tensor, Tensor], Tensor]:
        """`target` for the training loop: a function of a batch, its images in [0,1] and the positions `masked` [B, M],
        which gives the ids of these patches, int64 [B, M]. From here on the tokenizer is on the run's device.
        """
        ids_of = Frozen(run, self.to(run.device).target, "ids", samples, digest(self), "int32")
        return lambda batch, images, masked: take(ids_of(batch, images), masked)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, N, C] -> predicted teacher features [B, N, teacher_dim]."""
        grid = codes.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # [B, C, grid, grid]
        # The decoder is a transformer too, so it reads the codes together: a word's meaning depends on its neighbours.
        return self.decode_task_layer(self.decoder(grid))

    def forward(self, images: Tensor, teacher_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [0,1] and the teacher's features [B, N, teacher_dim] -> two losses to add, and ids [B, N].

        cosine loss      mean of 1 - cos(prediction, teacher) over all patches, 0 to 2 (equation 2, first term)
        commitment loss  pulls z towards its code; the gradient never moves the codes (equation 2, last term)
        """
        codes, ids, commitment_loss = self.quantize(self.encode(images))
        prediction = self.decode(codes)  # [B, N, teacher_dim]
        # The cosine asks for the direction of the teacher's feature, not for its length. CLIP's lengths differ much
        # from patch to patch, and a squared error would care most about the longest.
        cosine_loss = 1 - F.cosine_similarity(prediction.float(), teacher_features.float(), dim=-1).mean()
        return cosine_loss, commitment_loss, ids


def build_vqkd(config, teacher_dim: int) -> VQKD:
    """The VQ-KD that the `tokenizer` section describes, for images of data.image_size."""
    c = config.tokenizer
    encoder = dimensions(c)
    return VQKD(config.data.image_size, config.model.patch_size, encoder, encoder | dict(depth=c.decoder_depth),
                c.codebook_size, c.codebook_dim, teacher_dim, c.ema_decay, c.commitment_beta, c.revive_below,
                c.init_std)


@torch.random.fork_rng(devices=[])  # the student's initial weights are to depend on the seed alone
def load_tokenizer(config, given: str, key: str) -> "tuple[VQKD | teacher_codes.TeacherTokenizer, Path]":
    """The trained tokenizer, frozen, and the path of its checkpoint.

    given   path or URL; empty: OUTPUT_DIR/tokenizer/last.pt. `key` is the option that gives it

    Our checkpoints say what they hold, and that counts: `config.tokenizer` is set to it, and nobody has to repeat stage
    1's options in stage 2. Published checkpoints do not say it; there the configuration must describe the model, except
    for the decoder, which is no longer needed.
    """
    path = stage_checkpoint(config, "tokenizer", given, key)
    content = read_checkpoint(path)
    say_if_unfinished(content, path)
    if saved := saved_section(content, "tokenizer"):
        there = TokenizerConfig(**{field.name: saved[field.name] for field in fields(TokenizerConfig)
                                   if field.name in saved})
        there.teacher_weights = config.tokenizer.teacher_weights or there.teacher_weights
        config.tokenizer = there
    if config.tokenizer.encoder == "teacher":
        model = teacher_codes.build(config, open_teacher(config), Quantizer)
    else:
        state = model_state(content, str(path))
        if not saved:
            config.tokenizer.decoder_depth = len({name.split(".")[2] for name in state if "decoder.blocks." in name})
        model = build_vqkd(config, teacher_dim=len(state.get("decode_task_layer.2.bias", [0])))
    say(load_pretrained(model, content, source=str(path)))
    say(f"codes: K = {model.num_ids}, {model.vectors.shape[1]} numbers each")
    return model.requires_grad_(False).eval(), path


# ----------------------------------------------------------------------------------------------------------------
# Act 3. Training


def main() -> None:
    config = load_config(SECTIONS)
    if config.tokenizer.mode == "encode":
        use.encode(config, load_tokenizer)
    elif config.tokenizer.encoder == "teacher":
        teacher_codes.cluster(config, Quantizer, evaluate, open_bank)
    else:
        train(config)


def train(config) -> None:
    cfg = config.tokenizer
    run = Run("tokenizer", config, cfg)

    # The images, and the frozen teacher. Crops may be small here (from 8 % of the image): then a patch shows a detail,
    # and there will be codes for details. No colour jitter: the codes are to say what is there.
    train_set, val_set = open_datasets(config.data)
    samples = TrainSamples(train_set, config.seed, config.data.image_size, cfg.crop_scale, views=config.data.views)
    teacher = open_teacher(config).to(run.device)

    # The model that learns in this stage. `parallel` is the same model, compiled if asked for, and synchronised between
    # processes if there are several. The optimizer does not move the codebook, which has no gradient.
    model = build_vqkd(config, teacher.output_dim).to(run.device)
    optimizer = make_optimizer(model, cfg)
    usage = CodeUsage(model.num_ids, run.device)
    example = torch.zeros(1, 3, *[config.data.image_size] * 2), torch.zeros(1, model.grid**2, teacher.output_dim)
    parallel = run.begin(samples, example=example, model=model, optimizer=optimizer, usage=usage)
    lr = run.cosine_schedule()

    # What the teacher says of a batch: asked anew, or computed once for all crops, if they are fixed (`data.views`).
    about = about_teacher(config, teacher)
    features_of = Frozen(run, teacher, "features", samples, about, "float16")
    val_samples = ValSamples(val_set, config.data.image_size, strict=val_set.labelled)
    val_features_of = Frozen(run, teacher, "features", val_samples, about, "float16")
    val_loader = ValLoader(val_samples, run.device_batch, workers=config.data.workers)
    bank_loader = open_bank(run, train_set)  # for bag_knn, see `evaluate`
    if run.step == 0:  # a run that goes on has its codebook in the checkpoint
        start_from_first_batch(run, model, features_of)

    for epoch in run.epochs():
        parallel.train()
        # One optimizer step looks at `batch_size` images, spread over all processes. If a process cannot hold its share
        # at once, it takes it in several micro-batches and adds the gradients up; `last` is true for the last of them.
        for step, batch, last in run.micro_batches(epoch):
            for group in optimizer.param_groups:
                group["lr"] = lr[step] * group["lr_scale"]

            # 1. Teacher and tokenizer look at the same pixels, in [0,1], and each normalises them in its own way.
            images = to_unit(batch["image"])  # [B, 3, S, S]
            # 2. The target: what the frozen teacher says of each patch.
            features = features_of(batch)  # [B, N, teacher_dim]
            # 3. Encode, choose codes, decode, compare (VQKD.forward). The forward pass also counts which vectors chose
            #    which code.
            with run.autocast():
                cosine_loss, commitment_loss, _ = parallel(images, features)
            model.quantize.remember()  # keep the vectors: dead codes may be put among them
            loss = cosine_loss + commitment_loss  # equation 2, as a loss
            run.backward(loss)
            run.record(loss=loss, cosine_loss=cosine_loss, commitment_loss=commitment_loss)

            # 4. Two kinds of learning in one step. The optimizer moves encoder and decoder along their gradients. The
            #    codebook moves by averages, once per step, however many micro-batches and processes took part.
            if last:
                run.scaler.unscale_(optimizer)
                grad_norm = clip_gradients(optimizer, cfg.clip_grad)
                run.scaler.step(optimizer)  # optimizer.step(), unless fp16 gradients have overflowed
                run.scaler.update()
                optimizer.zero_grad()
                hits = model.quantize.update(seed=config.seed + step)
                usage.add(hits)
                run.record(lr=lr[step], grad_norm=grad_norm, batch_perplexity=perplexity(hits))

        # Is the codebook alive, and do its codes mean anything? The loss alone does not tell.
        in_use = usage.figures()
        usage.counts.zero_()
        val = evaluate(run, model, val_features_of, val_loader, bank_loader, len(val_set.classes))
        check_collapse(in_use["perplexity"], model.num_ids, epoch, cfg.warmup_epochs)  # before the epoch counts as done
        run.end_epoch(epoch, val, train=in_use)


@torch.no_grad()
def start_from_first_batch(run: Run, model: VQKD, features_of: Callable[[dict], Tensor]) -> None:
    """Initialise codebook and decoder from the images of the first optimizer step, those of all ranks.

    `kmeans_init`: the codes are k-means of the encoder's vectors.
    `mean_start` (not in the published code): the decoder's output is the teacher's mean feature, and nothing else. The
    first thing a random decoder learns is to predict this mean whatever the code. Then the encoder gains nothing by
    different codes, and gives all patches the same. A long run recovers from this collapse; a short one ends too early.
    """
    cfg, z, total = run.config.tokenizer, [], 0
    for batch in run.first_batches():
        with run.autocast():
            z.append(model.encode(to_unit(batch["image"])))  # [B, N, C]
        total = total + F.normalize(features_of(batch).float(), dim=-1).sum(dim=(0, 1))  # [teacher_dim]
    if cfg.kmeans_init:
        model.quantize.init_from(gather_in_order(torch.cat(z)).flatten(0, 1), seed=run.config.seed)
    if cfg.mean_start:
        output = model.decode_task_layer[2]
        output.weight.zero_()
        output.bias.copy_(F.normalize(all_reduce_sum(total), dim=0))


def check_collapse(train_perplexity: float, num_ids: int, epoch: int, warmup_epochs: float) -> None:
    """UserError if nearly all patches have the same few codes: stage 2 could learn nothing from such a tokenizer."""
    fewest = max(0.02 * num_ids, min(3, num_ids / 2))
    if epoch + 1 >= warmup_epochs and train_perplexity < fewest:
        raise UserError(f"the codebook has collapsed: of {num_ids} codes about {train_perplexity:.0f} are in use after "
                        f"epoch {epoch + 1}: start anew in another output_dir, with tokenizer.revive_below=0.1, "
                        f"tokenizer.ema_decay=0.95, a lower tokenizer.lr or a longer tokenizer.warmup_epochs")


# ----------------------------------------------------------------------------------------------------------------
# Act 4. Do the codes mean anything? Figures of the validation images


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, features_of: Callable[[dict], Tensor], loader, bank_loader,
             classes: int) -> dict[str, float]:
    """Figures of the validation images, each counted once: cosine loss, usage, perplexity, bag_knn, and one_class.

    bag_knn is the one that says whether codes mean anything. An image becomes the bag of its ids, without their order,
    and k-NN guesses its class from the training images with the most similar bags. The loss may be low and all codes in
    use even if they tell only brightness: then bag_knn stays near chance. one_class is the share of the codes in use of
    which at least half of the patches lie in images of one class. Labels serve only here: without classes both figures
    are left out, without a `bank_loader` only bag_knn.

    model         VQKD, or teacher_codes.TeacherTokenizer
    features_of   batch -> the teacher's features [B, N, teacher_dim]
    """
    model.eval()
    bank, bank_labels, readable = [], [], []
    for batch in bank_loader or ():
        with run.autocast():
            ids = model.token_ids(to_unit(batch["image"].to(run.device, non_blocking=True)))
        bank.append(bag_of_ids(ids, model.num_ids))
        bank_labels.append(batch["label"].to(run.device))
        readable.append(batch["readable"].to(run.device))
    if bank_loader:
        bank, bank_labels, readable = (gather_in_order(torch.cat(part), len(bank_loader.chosen))
                                       for part in (bank, bank_labels, readable))
        bank, bank_labels = bank[readable], bank_labels[readable]

    columns = max(1, classes)
    counts = torch.zeros(model.num_ids, columns, dtype=torch.float64, device=run.device)  # patches of a code in a class
    sums = torch.zeros(3, dtype=torch.float64, device=run.device)  # of the losses, of the k-NN's hits, of images
    for batch in loader:
        if "readable" in batch:
            batch = {key: value[batch["readable"]] for key, value in batch.items()}
        batch = {key: value.to(run.device, non_blocking=True) for key, value in batch.items()}
        features = features_of(batch)
        with run.autocast():
            cosine_loss, _, ids = model(to_unit(batch["image"]), features)
        accuracy = 0.0
        if bank_loader:
            accuracy = knn_accuracy(bank, bank_labels, bag_of_ids(ids, model.num_ids), batch["label"])
        sums += torch.tensor([cosine_loss.item(), accuracy, 1.0], device=run.device) * len(ids)
        places = ids * columns + batch["label"][:, None]  # an id and a class as one number
        counts += places.flatten().bincount(minlength=counts.numel()).view_as(counts)
    loss, hits, count = all_reduce_sum(sums).tolist()
    usage = CodeUsage(model.num_ids, run.device)
    usage.add(all_reduce_sum(counts).sum(dim=1))
    figures = {"cosine_loss": loss / count, **usage.figures()}
    if classes:
        largest = counts.max(dim=1).values[usage.counts > 0] / usage.counts[usage.counts > 0]
        figures["one_class"] = (largest >= 0.5).double().mean().item()
    return figures | ({"bag_knn": hits / count} if bank_loader else {})


def bag_of_ids(ids: Tensor, num_ids: int) -> Tensor:
    """Ids [B, N] -> the square root of how often each occurs, [B, K]: so that a few frequent codes do not decide."""
    ones = torch.ones_like(ids, dtype=torch.float32)
    return torch.zeros(len(ids), num_ids, device=ids.device).scatter_add_(1, ids, ones).sqrt()


def open_bank(run: Run, train_set) -> ValLoader | None:
    """Evenly spaced training images, cropped as for validation, that bag_knn compares with; None without bag_knn."""
    if not run.config.tokenizer.knn_images or len(train_set.classes) < 2:
        return None
    chosen = evenly_chosen(len(train_set), run.config.tokenizer.knn_images)
    samples = ValSamples(train_set, run.config.data.image_size, strict=False)
    return ValLoader(samples, run.device_batch, workers=run.config.data.workers, indices=chosen)


if __name__ == "__main__":
    launch(main, ModelError)
