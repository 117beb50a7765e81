import math

import torch

from support.options import TrainConfig


def make_optimizer(groups: list[dict], config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def cosine_schedule(base: float, final: float, epochs: int, steps_per_epoch: int, warmup_epochs: float) -> list[float]:
    """The value at every step: linear from 0 to `base` over the warm-up, then half a cosine down towards `final`."""
    warmup = min(round(warmup_epochs * steps_per_epoch), epochs * steps_per_epoch)
    rest = epochs * steps_per_epoch - warmup
    rise = [base * step / max(1, warmup - 1) for step in range(warmup)]
    fall = [final + 0.5 * (base - final) * (1 + math.cos(math.pi * step / rest)) for step in range(rest)]
    return rise + fall


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
