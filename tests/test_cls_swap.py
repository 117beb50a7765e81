"""What the aggregation head takes from [CLS]: whose [CLS] it gets, and which hits are counted."""

import sys
from pathlib import Path

import pytest
import torch

CODE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CODE))
from beitv2 import MaskedImageModel  # noqa: E402
from data import normalize  # noqa: E402
from support.cls_swap import another_image, hits_by_cls, predict, with_other_cls  # noqa: E402


@pytest.fixture
@torch.no_grad()
def given():
    """A model of random weights whose head heeds [CLS], seven images, eight hidden patches of each, and their ids."""
    torch.manual_seed(8)
    model = MaskedImageModel(vocab_size=16, early_layers=1, head_layers=2, image_size=16, patch_size=4, embed_dim=16,
                             depth=3, num_heads=2, rel_pos_bias="shared").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.5)
    model.rel_pos_bias.relative_position_bias_table[-2] = 20  # patches attend to [CLS] above all
    masked = torch.stack([torch.randperm(16)[:8].sort().values for _ in range(7)])
    images = (torch.rand(7, 3, 1, 1) * 200 + torch.rand(7, 3, 16, 16) * 55).byte()  # each has a colour of its own
    ids = by_hand(model, images, masked, lambda cls: cls)  # most are right with the own [CLS]
    return model, images, masked, torch.where(torch.rand(7, 8) < 0.2, 0, ids)


def by_hand(model, images, masked, change):
    """The head's best guesses [n, M] where change(cls) takes the place of its [CLS], all images in one batch."""
    bias = model.shared_position_bias()
    x, kept = model.forward_blocks(model.embed(normalize(images / 255), masked, model.mask_token), bias, (1,))
    x = torch.cat([change(x[:, :1]), x[:, 1:]], dim=1)
    return model.aggregate(x, kept[1], masked, bias).argmax(dim=-1)


@torch.no_grad()
def test_the_head_gets_the_cls_that_is_given(given):
    model, images, masked, _ = given
    images, plain = normalize(images / 255), model(normalize(images / 255), masked)
    predictions, read = predict(model, images, masked)
    assert all(torch.equal(*pair) for pair in zip(predictions, plain, strict=True))
    own = read[:, 0]
    assert torch.equal(with_other_cls(model, read, own, masked), plain[1])
    foreign = with_other_cls(model, read, own.roll(1, dims=0), masked)
    assert not torch.allclose(foreign, plain[1], atol=0.1)
    assert torch.equal(read[:, 0], own) and torch.equal(model(images, masked)[1], plain[1]), "all is as it was"


@pytest.mark.parametrize("count", [2, 7, 1000])
def test_another_image_is_never_the_same_and_serves_once(count):
    other = another_image(count)
    assert sorted(other.tolist()) == list(range(count)) and (other != torch.arange(count)).all()
    assert torch.equal(other, another_image(count))


def test_another_image_is_of_any_class():
    """Whether classes take turns, as drawn shapes do, or lie in folders one after the other: each class gets its [CLS]
    from all ten, and a tenth from itself."""
    for labels in (torch.arange(1000) % 10, torch.arange(1000) // 100):
        pairs = (10 * labels + labels[another_image(1000)]).bincount(minlength=100)
        assert pairs.min() >= 1 and pairs.max() <= 25 and 60 < pairs[::11].sum() < 140


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, 7])
def test_hits_are_those_with_own_foreign_and_mean_cls(given, size):
    """Whatever the size of a batch; an image that cannot be read gives its [CLS] to none."""
    model, images, masked, ids = given
    batches = list(zip(images.split(size), masked.split(size), ids.split(size), strict=True))
    readable = torch.tensor([1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    usable = readable.nonzero().flatten()
    hits = hits_by_cls(model, batches, readable)
    found = {name: hit[readable] for name, hit in hits.items()}
    expected = {
        "mim_accuracy": model(normalize(images / 255), masked)[0].argmax(dim=-1)[readable],
        "cls_accuracy": by_hand(model, images, masked, lambda cls: cls)[readable],
        "cls_accuracy_swapped": by_hand(model, images[usable], masked[usable], lambda cls: cls[another_image(6)]),
        "cls_accuracy_mean": by_hand(model, images[usable], masked[usable], lambda cls: cls.mean(0).expand_as(cls))}
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name] == ids[readable]), name
    assert len({tuple(hit.flatten().tolist()) for hit in found.values()}) == 4, "all four differ in this model"


@torch.no_grad()
def test_without_a_head_there_is_nothing_to_swap():
    model = MaskedImageModel(vocab_size=5, head_layers=0, image_size=16, patch_size=4, embed_dim=16, depth=1,
                             num_heads=2).eval()
    images, masked, ids = torch.zeros(2, 3, 16, 16).byte(), torch.tensor([[1], [2]]), torch.tensor([[0], [1]])
    hits = hits_by_cls(model, [(images, masked, ids)], torch.ones(2, dtype=torch.bool))
    assert hits.keys() == {"mim_accuracy"} and hits["mim_accuracy"].shape == (2, 1)
