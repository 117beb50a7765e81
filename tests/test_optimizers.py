"""support/optimizers.py: schedules, and the groups that an optimizer takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from beitv2 import parameter_groups  # noqa: E402
from support.optimizers import OPTIMIZERS, cosine_schedule, make_optimizer  # noqa: E402
from support.options import TrainConfig  # noqa: E402


@pytest.mark.parametrize("warmup_epochs, peak", [(0, 0), (1, 6), (2.5, 17)])
def test_the_schedule_rises_to_its_base_and_falls_towards_its_end(warmup_epochs, peak):
    values = cosine_schedule(1.0, 0.1, epochs=10, steps_per_epoch=7, warmup_epochs=warmup_epochs)
    assert len(values) == 70 and max(values) == values[peak] == 1.0
    assert all(a < b for a, b in zip(values[:peak], values[1:])) and all(a >= b for a, b in zip(values[peak:], values[peak + 1:]))
    assert values[0] == (1.0 if peak == 0 else 0.0) and 0.1 < values[-1] < 0.11


def test_a_warmup_longer_than_the_run():
    assert cosine_schedule(1.0, 0.0, epochs=2, steps_per_epoch=2, warmup_epochs=5) == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_frozen_parameters_have_no_group_and_nested_ones_keep_their_kind():
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "frozen": nn.Linear(2, 2).requires_grad_(False)})
    model.encoder.cls_token = nn.Parameter(torch.zeros(1, 1, 2))
    decays = {name: group["weight_decay"] for group in parameter_groups(model, 0.05) for name in group["names"]}
    assert decays == {"encoder.weight": 0.05, "encoder.bias": 0, "encoder.cls_token": 0}


def test_the_named_optimizer_is_made_of_the_parameter_groups():
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, TrainConfig(lr=0.3, betas=(0.5, 0.6), weight_decay=0.7))
    assert type(optimizer) is torch.optim.AdamW
    assert [(g["lr"], g["betas"], g["fused"], g["weight_decay"], g["names"]) for g in optimizer.param_groups] == [
        (0.3, (0.5, 0.6), True, 0.7, ["weight"]), (0.3, (0.5, 0.6), True, 0.0, ["bias"])]


def test_an_optimizer_is_one_entry_of_the_table(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "sgd", lambda groups, cfg: torch.optim.SGD(groups, lr=cfg.lr))
    assert type(make_optimizer(nn.Linear(2, 2), TrainConfig(optimizer="sgd"))) is torch.optim.SGD
    program = ("import support.optimizers as o; o.OPTIMIZERS['sgd'] = None; from support.options import TrainConfig, convert; "
               "import typing; kind = typing.get_type_hints(TrainConfig)['optimizer']; print(convert('sgd', kind), convert('adamw', kind))")
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.stdout.split() == ["sgd", "adamw"], done.stderr
