"""Optimizers by name, the cosine schedule of the learning rate, and gradient clipping.

No reader of the method needs this file: which parameters decay, and which learn more slowly, stands in beitv2.py.
"""

import math

import torch
from torch import Tensor, nn

from beitv2 import parameter_groups

# name: parameter groups, options of the stage -> the optimizer. `fused`: one kernel for all weights.
OPTIMIZERS = {
    "adamw": lambda groups, cfg: torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True),
}


def make_optimizer(model: nn.Module, cfg, layer_decay: float = 1.0) -> torch.optim.Optimizer:
    """The optimizer that an OptimizerConfig describes, for what can be trained of the model; see parameter_groups."""
    return OPTIMIZERS[cfg.optimizer](parameter_groups(model, cfg.weight_decay, layer_decay), cfg)


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float) -> Tensor:
    """Scale all gradients down together if their norm is above `largest` (0: never); returns the norm before."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if largest:
        return nn.utils.clip_grad_norm_(parameters, largest)
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def cosine_schedule(base: float, final: float, epochs: int, steps_per_epoch: int, warmup_epochs: float) -> list[float]:
    """The value at every step: linear from 0 to `base` over the warm-up, then half a cosine down towards `final`."""
    warmup = min(round(warmup_epochs * steps_per_epoch), epochs * steps_per_epoch)
    rest = epochs * steps_per_epoch - warmup
    rise = [base * step / max(1, warmup - 1) for step in range(warmup)]
    fall = [final + 0.5 * (base - final) * (1 + math.cos(math.pi * step / rest)) for step in range(rest)]
    return rise + fall
