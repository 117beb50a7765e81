"""What is known of codes: their patches, what these show, and how pure codes are."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

CODE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CODE))
from support.pictures import token_map  # noqa: E402
from support.words import (code_colours, examples_of, mean_patch, most_frequent, nearest_codes,  # noqa: E402
                           purity)


def test_examples_of_a_code_are_patches_that_have_it():
    """From as many images as possible: of ten images that all have the code twice, ten examples are one from each."""
    ids = torch.randint(0, 5, (10, 4, 4), generator=torch.Generator().manual_seed(0)) + 10
    ids[:, 1, 2], ids[:, 3, 0] = 7, 7
    for count in (3, 10):
        places = examples_of(ids, 7, count)
        assert len(places) == count == len({image for image, _, _ in places})
        assert all(ids[place] == 7 for place in places)
    assert len(set(examples_of(ids, 7, 14))) == 14
    assert len(set(examples_of(ids, 7, 99))) == 20
    assert examples_of(ids, 8, 3) == []


def test_nearest_codes_are_those_of_the_highest_cosine():
    codebook = F.normalize(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [-1, 0]]), dim=1)
    lengths = torch.tensor([[2.0], [0.5], [3], [1]])  # a teacher's mean features have any
    (first, cosine), (second, zero) = nearest_codes(lengths * codebook, 0, 2)
    assert (first, second) == (1, 2) and cosine == pytest.approx(0.9 / math.hypot(0.9, 0.1)) and zero == pytest.approx(0)


def test_colours_belong_to_codes_for_good():
    codebook = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    colours = code_colours(codebook)
    assert colours.shape == (50, 3) and len({tuple(colour) for colour in colours}) == 50
    assert (colours == code_colours(codebook.clone())).all()
    picture = token_map(torch.tensor([[1, 2], [2, 3]]), colours, 3)
    assert picture.shape == (6, 6, 3) and (picture[:3, 3:] == colours[2]).all() and (picture[3:, 3:] == colours[3]).all()


def test_the_mean_patch_of_a_code():
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    ids = torch.tensor([[[0, 1], [0, 0]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]])
    expected = (images[0, :, :4, 4:].float() + images[1, :, :4, :4].float()) / 2
    assert torch.equal(mean_patch(images, ids, 1, 4), expected)


def test_the_most_frequent_kinds_with_their_shares():
    names = ["cat", "dog", "owl", "fox"]
    said = lambda kinds, *count: most_frequent(kinds, names, *count).replace("\N{NO-BREAK SPACE}", " ")  # noqa: E731
    kinds = torch.tensor([2] * 650 + [0] * 300 + [1] * 46 + [3] * 4)
    assert said(kinds) == "owl 65 %, cat 30 %, dog 5 %"
    assert said(kinds, 4) == "owl 65 %, cat 30 %, dog 5 %", "what would be 0 % is left out"
    assert said(kinds, 1) == "owl 65 %" and said(kinds[:0]) == ""


def test_purity_counts_the_most_frequent_kind_of_each_code():
    ids, kinds = torch.tensor([0, 0, 0, 2, 2, 2, 2, 5]), torch.tensor([1, 1, 0, 3, 3, 1, 0, 2])
    assert purity(ids, kinds)[0] == (2 + 2 + 1) / 8


def test_purity_by_chance_is_what_meaningless_codes_reach():
    """Two kinds, of which one has 70 %: a few random codes reach hardly more; a code for each patch is always pure."""
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.rand(10_000, generator=generator) < 0.7).long()
    own, chance = purity(kinds, kinds)
    assert own == 1 and 0.69 < chance < 0.72
    own, chance = purity(torch.randint(0, 4, (10_000,), generator=generator), kinds)
    assert own == pytest.approx(chance, abs=0.01)
    assert purity(torch.arange(10_000), kinds) == (1, 1)
