import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.loaders import TrainLoader
from support.processes import gather_in_order, say, world_size
from support.run import Run


class TeacherTokenizer(nn.Module):
    """No VQ-KD, but the question that everyone asks of it: why not cluster the teacher's features themselves?

    The code of a patch is the nearest of K means of the frozen teacher's features (`tokenizer.encoder: teacher`). No
    encoder and no decoder is trained, so codes cost a pass through the teacher: they want `data.views`. It shows how
    much of the teacher's features K codes can keep at best.
    """

    may_be_fresh = ("teacher.", "quantize.running_count")  # checkpoints hold the codebook alone

    def __init__(self, teacher: nn.Module, grid: int, quantizer: nn.Module):
        super().__init__()
        self.teacher, self.grid, self.patch_size = teacher, grid, teacher.patch_size
        self.quantize = quantizer

    @torch.no_grad()
    def token_ids(self, images: Tensor) -> Tensor:
        """Images in [0,1], [B, 3, S, S] -> the code of each patch, row by row, int64 [B, N]."""
        return self.quantize(self.teacher(images))[1]

    def forward(self, images: Tensor, teacher_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As VQKD.forward. What a decoder would predict is the code itself, which is a mean of features."""
        codes, ids, commitment_loss = self.quantize(teacher_features)
        return 1 - F.cosine_similarity(codes, teacher_features.float(), dim=-1).mean(), commitment_loss, ids


@torch.no_grad()
def cluster_features(run: Run, model: TeacherTokenizer, loader: TrainLoader, features_of) -> None:
    """k-means of the teacher's features, on random patches of the training images: about a hundred for each code.

    That many are enough to place a mean. All patches of all images would not fit in memory.
    """
    images = loader.batches_per_epoch * run.device_batch * world_size()
    patches = min(model.grid**2, math.ceil(100 * run.config.tokenizer.codebook_size / images))  # of each image
    generator, z = torch.Generator().manual_seed(run.config.seed), []
    for batch in loader.epoch(0):
        with run.autocast():
            features = features_of(model.teacher, {key: batch[key].to(run.device) for key in batch})
        z.append(features[:, torch.randperm(model.grid**2, generator=generator)[:patches]])
    z = gather_in_order(torch.cat(z)).flatten(0, 1)
    say(f"k-means of {len(z)} of the teacher's features, then the figures of its codes: minutes on a CPU")
    model.quantize.init_from(z, seed=run.config.seed, iterations=20)
