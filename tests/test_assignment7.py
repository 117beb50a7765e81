"""Assignment 7: evaluation and fine-tuning."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import beitv2  # noqa: E402
import finetune  # noqa: E402

pytestmark = pytest.mark.assignment(7)

# -- knn_accuracy -------------------------------------------------------------------------------------------------


def accuracy(bank, bank_labels, queries, labels, **options) -> float:
    return finetune.knn_accuracy(torch.tensor(bank), torch.tensor(bank_labels), torch.tensor(queries),
                                 torch.tensor(labels), **options)


def direction(degrees: float, length: float = 1.0) -> list[float]:
    return [length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees))]


def test_knn_compares_directions():
    """The query points to class 0; class 1 has a long vector 60 degrees away, whose product with it is larger."""
    found = accuracy([direction(5), direction(60, 100)], [0, 1], [direction(0)], [0], k=1)
    assert found == 1, \
        f"the nearest neighbour by cosine is of class 0, so the accuracy should be 1, but is {found:g}: are bank and " \
        "queries normalised?"


@pytest.mark.parametrize("length", [0.01, 100.0])
def test_knn_does_not_depend_on_the_lengths_of_queries(length):
    """One neighbour at 10 degrees against two at 40: exp(cosine / .07) makes its vote 23 times as heavy."""
    bank = [direction(10), direction(40), direction(-40)]
    found = accuracy(bank, [0, 1, 1], [direction(0, length)], [0], k=3)
    assert found == 1, \
        "one neighbour 10 degrees away should outvote two at 40 degrees, whatever the query's length, here " \
        f"{length:g}, but the accuracy is {found:g}: are queries normalised, and votes exp(cosine / temperature)?"


def test_knn_lets_near_neighbours_outvote_far_ones():
    bank, labels = [direction(angle) for angle in (5, 8, 40, 42, 45)], [0, 0, 1, 1, 1]
    found = accuracy(bank, labels, [direction(0)], [0], k=5)
    assert found == 1, \
        f"two neighbours within 8 degrees should outvote three at 40, but the accuracy is {found:g}: do votes weigh " \
        f"exp(cosine / temperature)?"
    found = accuracy(bank, labels, [direction(0)], [1], k=5, temperature=10.0)
    assert found == 1, \
        "at a temperature of 10 all votes weigh about the same, and three should outvote two, but the accuracy is " \
        f"{found:g}: is the cosine divided by the temperature, and do all k vote?"


def test_only_k_neighbours_vote():
    bank, labels = [direction(angle) for angle in (5, 20, 20, 20, 20)], [0, 1, 1, 1, 1]
    found = accuracy(bank, labels, [direction(0)], [0], k=1)
    assert found == 1, f"with k=1 the nearest neighbour decides, so the accuracy should be 1, but is {found:g}"
    found = accuracy(bank, labels, [direction(0)], [1], k=20, temperature=1.0)
    assert found == 1, \
        f"with k larger than the bank all of it should vote, so the accuracy should be 1, but is {found:g}"


def test_knn_returns_a_share_of_all_queries():
    """More queries than a chunk may hold; a quarter of them has the wrong label."""
    torch.manual_seed(0)
    bank, labels = torch.eye(4), torch.arange(4)
    truth = torch.randint(4, (3000,))
    wrong = torch.arange(3000) % 4 == 0
    found = finetune.knn_accuracy(bank, labels, bank[truth], torch.where(wrong, (truth + 1) % 4, truth), k=1)
    assert abs(found - 0.75) < 1e-6, \
        f"2250 of 3000 queries are right, so the accuracy should be .75, but is {found:.4f}"
    assert isinstance(found, float), f"the accuracy should be a Python float, but is a {type(found).__name__}: .item()?"


# -- lr_scale -----------------------------------------------------------------------------------------------------


def scale(name: str) -> float:
    return beitv2.lr_scale(name, depth=12, layer_decay=0.65)


@pytest.mark.parametrize("name", ["head.weight", "fc_norm.bias", "norm.weight"])
def test_the_head_learns_at_the_full_rate(name):
    assert scale(name) == 1, \
        f"'{name}' should learn at the full rate, but learns at {scale(name):.4g} of it: does the decay count from " \
        "the top?"


@pytest.mark.parametrize("block", [0, 1, 10, 11])
def test_each_block_learns_more_slowly_than_the_one_above(block):
    found = scale(f"blocks.{block}.attn.qkv.weight")
    expected = 0.65 ** (12 - block)
    assert math.isclose(found, expected), \
        f"'blocks.{block}', layer {block + 1} of 12, should learn at .65^{12 - block} = {expected:.4g} of the rate, " \
        f"but at {found:.4g}: names count blocks from 0, layers from 1, and the top layer is number L + 1"


@pytest.mark.parametrize("name", ["cls_token", "patch_embed.proj.weight", "pos_embed", "mask_token"])
def test_the_embeddings_learn_slowest(name):
    assert math.isclose(scale(name), 0.65**13), \
        f"'{name}' is layer 0, so it should learn at .65^13 = {0.65**13:.4g} of the rate, but learns at " \
        f"{scale(name):.4g}"


# -- Classifier.forward -------------------------------------------------------------------------------------------


def classifier(pooling: str) -> tuple[beitv2.Classifier, torch.Tensor]:
    """A classifier of 3 classes whose backbone returns these tokens [2, 5, 8]."""
    torch.manual_seed(0)
    model = beitv2.Classifier(3, pooling, image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    tokens = torch.randn(2, 5, 8) * 3
    with torch.no_grad():
        for parameter in [*model.head.parameters(), *model.fc_norm.parameters()]:
            parameter.copy_(torch.randn(parameter.shape))
    model.features = lambda images: tokens
    return model, tokens


def test_the_classifier_sees_the_normed_mean_of_the_patches():
    model, tokens = classifier("mean")
    logits = model(torch.zeros(2, 3, 8, 8))
    assert logits.shape == (2, 3), f"the logits should be [B, classes] = [2, 3], but are {list(logits.shape)}"
    expected = model.head(model.fc_norm(tokens[:, 1:].mean(dim=1)))
    assert torch.allclose(logits, expected, atol=1e-4), \
        "the logits should be head(fc_norm(mean of the patches)), but differ by " \
        f"{(logits - expected).abs().max():.2g}: the mean first, without [CLS], then the norm?"


def test_the_classifier_sees_cls_if_asked():
    model, tokens = classifier("cls")
    logits = model(torch.zeros(2, 3, 8, 8))
    expected = model.head(tokens[:, 0])
    assert logits.shape == (2, 3) and torch.allclose(logits, expected, atol=1e-4), \
        "with pooling=\"cls\" the logits should be head([CLS]), which `features` has normed, but are others"
