"""A small decoder that paints images from their codes, to see what the codes have kept.

No reader of the method needs this file.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import TrainSamples, to_unit
from support.loaders import TrainLoader


class PixelDecoder(nn.Module):
    """Codes back to pixels: a few convolutions on the grid of codes.

    ids [B, grid, grid] -> images [B, 3, S, S] in [0,1]
    """

    def __init__(self, codebook: Tensor, patch_size: int, width: int = 192):
        super().__init__()
        self.codes = nn.Embedding.from_pretrained(codebook.detach().float())  # frozen
        self.layers = nn.Sequential(
            nn.Conv2d(codebook.shape[1], width, 3, padding=1), nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, 3 * patch_size**2, 1),
            nn.PixelShuffle(patch_size))

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.codes(ids).permute(0, 3, 1, 2)).sigmoid()


@torch.enable_grad()
def train_pixel_decoder(tokenizer: nn.Module, samples: TrainSamples, steps: int,
                        device: torch.device, workers: int = 0) -> PixelDecoder:
    """Train a decoder on training crops, whose codes the frozen tokenizer gives, by the mean absolute error."""
    decoder = PixelDecoder(tokenizer.vectors, samples.size // tokenizer.grid).to(device)
    optimizer = torch.optim.AdamW(decoder.layers.parameters(), lr=2e-3)
    loader = TrainLoader(samples, min(32, len(samples)), seed=0, workers=workers)
    batches = loader.stream(0, loader.batches_per_epoch)
    for step, batch in enumerate(itertools.islice(batches, steps)):
        images = to_unit(batch["image"].to(device))
        ids = tokenizer.token_ids(images).view(-1, tokenizer.grid, tokenizer.grid)
        loss = F.l1_loss(decoder(ids), images)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return decoder.eval()
