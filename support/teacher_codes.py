"""Codes without VQ-KD: k-means of the frozen teacher's own features (`tokenizer.encoder: teacher`), to compare with.

It answers the question that everyone asks of VQ-KD: why not cluster the teacher's features themselves? No reader of the
method needs this file.
"""

import math
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beitv2 import take
from data import TrainSamples, ValSamples
from support.datasets import open_datasets
from support.frozen import Frozen
from support.loaders import TrainLoader, ValLoader
from support.processes import gather_in_order, say, world_size
from support.run import Run
from support.teachers import about_teacher, open_teacher


class TeacherTokenizer(nn.Module):
    """A code is one of K means of the teacher's features, and a patch has the nearest one.

    No encoder and no decoder is trained, so ids cost a pass through the teacher: they want `data.views`. It shows how
    much of the teacher's features K codes can keep at best. It does what VQKD does, with the same names.
    """

    may_be_fresh = ("teacher.", "quantize.running_count")  # checkpoints hold the codebook alone

    def __init__(self, teacher: nn.Module, grid: int, quantizer: nn.Module, about: dict):
        super().__init__()
        self.teacher, self.grid, self.quantize, self.about = teacher, grid, quantizer, about

    @property
    def vectors(self) -> Tensor:
        """The codebook, float32 [K, teacher_dim]."""
        return self.quantize.vectors

    @property
    def num_ids(self) -> int:
        return len(self.vectors)

    @torch.no_grad()
    def token_ids(self, images: Tensor) -> Tensor:
        """Images in [0,1], [B, 3, S, S] -> the id of each patch's code, row by row, int64 [B, N]."""
        return self.quantize(self.teacher(images))[1]

    def target(self, images: Tensor) -> Tensor:
        """As VQKD.target."""
        return self.token_ids(images)

    def targets(self, run: Run, samples: TrainSamples) -> Callable[[dict, Tensor, Tensor], Tensor]:
        """As VQKD.targets. Stage 1 has left the teacher's features in the cache, if the crops are the same."""
        features_of = Frozen(run, self.to(run.device).teacher, "features", samples, self.about, "float16")
        return lambda batch, images, masked: take(self.quantize(features_of(batch, images))[1], masked)

    def forward(self, images: Tensor, teacher_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As VQKD.forward. What a decoder would predict is the code itself, which is a mean of features."""
        codes, ids, commitment_loss = self.quantize(teacher_features)
        return 1 - F.cosine_similarity(codes, teacher_features.float(), dim=-1).mean(), commitment_loss, ids


def build(config, teacher: nn.Module, quantizer: type[nn.Module]) -> TeacherTokenizer:
    """The tokenizer that the `tokenizer` section describes; quantizer(K, width) is a codebook."""
    return TeacherTokenizer(teacher, config.data.image_size // config.model.patch_size,
                            quantizer(config.tokenizer.codebook_size, teacher.output_dim),
                            about_teacher(config, teacher))


def cluster(config, quantizer: type[nn.Module], evaluate: Callable[..., dict], open_bank: Callable) -> None:
    """This way's stage 1: k-means, the figures of tokenizer.evaluate, and a checkpoint of the codebook."""
    cfg = config.tokenizer
    run = Run("tokenizer", config, cfg)
    run.claim_folder()
    train_set, val_set = open_datasets(config.data)
    model = build(config, open_teacher(config).to(run.device), quantizer).to(run.device)
    samples = TrainSamples(train_set, config.seed, config.data.image_size, cfg.crop_scale, views=config.data.views)
    val_samples = ValSamples(val_set, config.data.image_size, strict=val_set.labelled)
    features_of, val_features_of = (Frozen(run, model.teacher, "features", part, model.about, "float16")
                                    for part in (samples, val_samples))
    loader = TrainLoader(samples, run.device_batch, config.seed, workers=config.data.workers)
    cluster_features(run, model, loader, features_of)
    val = evaluate(run, model, val_features_of, ValLoader(val_samples, run.device_batch, workers=config.data.workers),
                   open_bank(run, train_set), len(val_set.classes))
    run.save_model("last.pt", nn.ModuleDict({"quantize": model.quantize}), val)
    run.write_alone(val)


@torch.no_grad()
def cluster_features(run: Run, model: TeacherTokenizer, loader: TrainLoader, features_of: Frozen) -> None:
    """k-means of the teacher's features, on random patches of the training images: about a hundred for each code.

    That many are enough to place a mean. All patches of all images would not fit in memory.
    """
    images = loader.batches_per_epoch * run.device_batch * world_size()
    patches = min(model.grid**2, math.ceil(100 * model.num_ids / images))  # of each image
    generator, z = torch.Generator().manual_seed(run.config.seed), []
    for batch in loader.epoch(0):
        features = features_of({key: value.to(run.device) for key, value in batch.items()})
        z.append(features[:, torch.randperm(model.grid**2, generator=generator)[:patches]])
    z = gather_in_order(torch.cat(z)).flatten(0, 1)
    say(f"k-means of {len(z)} of the teacher's features, then the figures of its codes: minutes on a CPU")
    model.quantize.init_from(z, seed=run.config.seed, iterations=20)
