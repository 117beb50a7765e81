"""What pytest must know of these tests: their markers, and a small model that two of the assignments share."""

import multiprocessing
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import beitv2  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "assignment(n): a test of the course's assignment n, see course/README.md")
    config.addinivalue_line("markers", "last: waits for what is computed beside the other tests, so it comes at the end")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


def pytest_unconfigure():
    """End the loader workers that a failed test has left. They ignore SIGTERM, so Python would wait without end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own handler would take their end for an accident
    for process in multiprocessing.active_children():
        process.kill()


class MixingBlock(nn.Module):
    """Stands in for a transformer block, so that a test needs no attention: each token sees the mean of all."""

    attn = None  # no bias table of its own

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.inputs, self.biases = [], []  # tokens and position bias of each call

    def forward(self, x, position_bias=None, asked=None):
        self.inputs.append(x)
        self.biases.append(position_bias)
        x = x + torch.tanh(self.linear(x + x.mean(dim=1, keepdim=True)))
        return x if asked is None else x[torch.arange(len(x))[:, None], asked]


@pytest.fixture
def masked_image_model():
    """A function that builds a MaskedImageModel of 16 patches, width 8, 11 codes and 3 blocks."""
    def build(**options) -> beitv2.MaskedImageModel:
        torch.manual_seed(0)
        options = dict(vocab_size=11, early_layers=1, head_layers=2) | options
        model = beitv2.MaskedImageModel(image_size=16, patch_size=4, embed_dim=8, depth=3, num_heads=2, **options)
        model.blocks = nn.ModuleList(MixingBlock(8) for _ in model.blocks)
        model.cls_pt_layers = nn.ModuleList(MixingBlock(8) for _ in model.cls_pt_layers)
        with torch.no_grad():
            for parameter in model.parameters():  # norms too, or a missing one could hide
                parameter.copy_(torch.randn(parameter.shape) * 0.5)
        return model
    return build
