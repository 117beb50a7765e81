"""finetune.py: the average of the weights, and what frozen features are measured with. Runs are in test_scripts.py."""

import contextlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

CODE = Path(__file__).parent.parent
sys.path.insert(0, str(CODE))
import finetune  # noqa: E402
from data import IMAGENET_MEAN, IMAGENET_STD  # noqa: E402


def test_mean_of_weights():
    model, mean = nn.Linear(2, 1), nn.Linear(2, 1).requires_grad_(False)
    mean.load_state_dict(model.state_dict())
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(4)
    finetune.update_average(mean, model, decay=0.75)
    assert torch.allclose(mean.weight, first + 1) and torch.equal(model.weight, first + 4)
    finetune.update_average(mean, model, decay=0.75)
    assert torch.allclose(mean.weight, first + 1.75)


@pytest.mark.parametrize("k, bank_size", [(1, 50), (7, 50), (20, 12)])
def test_knn_accuracy_against_a_loop(k, bank_size):
    generator = torch.Generator().manual_seed(k)
    bank, queries = torch.randn(bank_size, 4, generator=generator), torch.randn(1100, 4, generator=generator)  # two chunks
    bank_labels, labels = torch.randint(3, (bank_size,), generator=generator), torch.randint(5, (1100,), generator=generator)
    cosine = F.cosine_similarity(queries[:, None], bank[None], dim=-1).tolist()
    hits = 0
    for row, label in zip(cosine, labels.tolist()):
        votes = [0.0] * 5
        for neighbour in sorted(range(bank_size), key=lambda i: -row[i])[:k]:
            votes[bank_labels[neighbour]] += math.exp(row[neighbour] / 0.07)
        hits += max(range(5), key=votes.__getitem__) == label
    assert 0.1 < hits / 1100 < 0.5  # three classes of five are in the bank
    assert finetune.knn_accuracy(bank, bank_labels, queries, labels, k) == pytest.approx(hits / 1100, abs=1.5 / 1100)


def test_extract_features_keeps_order_and_separates_cls():
    run = SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext)
    pixels = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)
    loader = [{"image": part, "label": part[:, 0, 0, 0].long() * 10} for part in pixels.split(2)]

    class Model:
        @staticmethod
        def features(images):  # normalised; [CLS] is 100 + pixel, the patches are pixel - 1 and pixel + 1
            pixel = (255 * (images * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]))
            pixel = pixel.mean(dim=(1, 2, 3))
            return torch.stack([pixel + 100, pixel - 1, pixel + 1], dim=1)[..., None]

    features = finetune.extract_features(run, Model, loader, total=5)
    assert features["cls"][:, 0].tolist() == pytest.approx([100, 101, 102, 103, 104], abs=1e-4)
    assert features["mean"][:, 0].tolist() == pytest.approx([0, 1, 2, 3, 4], abs=1e-4) and features["labels"].tolist() == [0, 10, 20, 30, 40]


def test_a_probe_moves_its_batch_norms_once_a_step_and_each_head_has_its_own_gradient():
    torch.manual_seed(0)
    probes, features = finetune.LinearProbes({"cls": 3, "mean": 5}, 4, 2), {"cls": torch.randn(6, 3), "mean": torch.randn(6, 5)}
    logits = probes(features)
    for kind, norm in probes.norms.items():
        assert norm.num_batches_tracked == 1, "a second call for a second rate would move the averages again"
        normed, heads = F.batch_norm(features[kind], None, None, training=True), probes.heads[kind]
        expected = [F.linear(normed, heads.weight[rows], heads.bias[rows]) for rows in (slice(4), slice(4, 8))]
        assert torch.allclose(logits[kind], torch.stack(expected), atol=1e-6)
    (logits["mean"][1] * torch.randn(6, 4)).sum().backward()
    assert probes.heads["cls"].weight.grad is None
    gradient = probes.heads["mean"].weight.grad
    assert gradient[:4].abs().max() == 0 and gradient[4:].abs().max() > 1e-3


def test_each_head_of_a_probe_learns_with_its_own_rate(tmp_path, monkeypatch):
    """Two heads with two rates end as those of two probes that have one of the rates each."""
    class EqualHeads(finetune.LinearProbes):
        """Its random initial weights would depend on the number of heads."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            for heads in self.heads.values():
                nn.init.zeros_(heads.weight)

    def heads(*rates: float) -> list[torch.Tensor]:
        """The weights [rates, classes, D] of a small run, for [CLS] and the mean patch."""
        options = ["data.train_images=64", "data.val_images=16", "finetune.weights=none", "finetune.batch_size=16",
                   "finetune.mode=linear_probe", "finetune.probe_epochs=2", "precision=fp32", "device=cpu",
                   f"finetune.probe_lrs={[*rates]}", f"output_dir={tmp_path}/{rates}"]
        monkeypatch.setattr(sys, "argv", ["finetune.py", str(CODE / "configs/demo.yaml"), *options])
        finetune.main()
        state = torch.load(tmp_path / f"{rates}/linear_probe_scratch/last.pt", weights_only=True)["probes"]
        return [state[f"heads.{kind}.weight"].unflatten(0, (len(rates), -1)) for kind in ("cls", "mean")]

    monkeypatch.setattr(finetune, "LinearProbes", EqualHeads)
    for both, slow, fast in zip(heads(0.03, 1.0), heads(0.03), heads(1.0), strict=True):
        assert torch.allclose(both, torch.cat([slow, fast]), atol=1e-5)
        assert slow.abs().max() > 1e-3 and fast.abs().max() > 10 * slow.abs().max()
