"""Assignment 2: block-wise masks."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import beitv2  # noqa: E402
import data  # noqa: E402
from support.errors import UserError  # noqa: E402

pytestmark = pytest.mark.assignment(2)


def masks(count: int, grid: int, num_masked: int, min_block: int) -> torch.Tensor:
    """`count` masks, bool [count, grid, grid], from one generator."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([data.block_mask(grid, num_masked, min_block, generator) for _ in range(count)]).view(
        count, grid, grid)


def height_and_width(mask: torch.Tensor) -> tuple[int, int]:
    """Of the block in a mask [grid, grid]: rows and columns with two masked patches or more, so that single ones do not
    count."""
    return (mask.sum(dim=1) >= 2).sum().item(), (mask.sum(dim=0) >= 2).sum().item()


@pytest.mark.parametrize("grid, num_masked, min_block", [(14, 75, 16), (8, 26, 4), (4, 6, 2), (4, 16, 2), (6, 1, 1)])
def test_exactly_as_many_patches_are_masked_as_asked(grid, num_masked, min_block):
    for seed in range(50):
        mask = data.block_mask(grid, num_masked, min_block, torch.Generator().manual_seed(seed))
        assert mask.shape == (grid**2,) and mask.dtype == torch.bool, \
            f"a mask should be bool [grid * grid] = [{grid**2}], but is {mask.dtype} {list(mask.shape)}"
        assert mask.sum() == num_masked, \
            f"{num_masked} of {grid**2} patches should be masked in every image, but here {mask.sum()} are: does a " \
            "patch that two blocks cover count once, and is what is missing at the end filled up?"


def test_more_masked_patches_than_there_are():
    error = None
    try:
        data.block_mask(4, 17, 2)
    except Exception as raised:
        error = raised
    assert isinstance(error, UserError), \
        f"17 masked patches of 16 should raise UserError (see check_num_masked), but raised " \
        f"{type(error).__name__ if error else 'nothing'}"


def test_every_random_number_comes_from_the_generator():
    torch.rand(1)  # so that a seed set anew shows, whichever it is
    before = torch.random.get_rng_state()
    # Ten masks each: some need single patches at the end, and some do not.
    first, again, other = (torch.stack([data.block_mask(14, 75, 16, torch.Generator().manual_seed(seed))
                                        for seed in range(start, start + 10)]) for start in (1, 1, 11))
    assert torch.equal(first, again), \
        "the same seed should give the same mask, but does not: does every random number come from `generator`?"
    assert (first != other).any(dim=1).all(), "another seed should give another mask, but gives the same"
    assert torch.equal(torch.random.get_rng_state(), before), \
        "with a generator given, torch's default generator should be left alone, but numbers were drawn from it"


def test_masked_patches_lie_in_blocks():
    """The share of a masked patch's four neighbours that are masked too: .35 for single patches at 75 of 196."""
    mask = masks(100, 14, 75, 16).float()
    pairs = (mask[:, 1:] * mask[:, :-1]).sum() + (mask[:, :, 1:] * mask[:, :, :-1]).sum()
    share = (2 * pairs / (4 * mask.sum())).item()
    assert share > 0.6, \
        f"about .7 of a masked patch's neighbours should be masked as well, but only {share:.2f} are: single patches " \
        "give .35"


def test_blocks_are_as_often_tall_as_wide():
    """With num_masked = min_block = 16 a mask is one block of about 16 patches, sometimes with one or two beside it."""
    sizes = [height_and_width(mask) for mask in masks(400, 14, 16, 16)]
    whole = [(height, width) for height, width in sizes if 12 <= height * width <= 18]
    assert len(whole) > 80, \
        f"with num_masked = min_block = 16 about nine in ten masks should be one rectangle, but only {len(whole)} " \
        "of 400 are: does the area start at min_block?"
    tall, wide = (sum(a > b for a, b in pairs) for pairs in (whole, [(w, h) for h, w in whole]))
    assert min(tall, wide) > 0.25 * len(whole), \
        f"blocks should be tall as often as wide, but {tall} are tall, {wide} wide and {len(whole) - tall - wide} " \
        "square: is the logarithm of the aspect ratio uniform between log .3 and log 1/.3?"
    assert max(height for height, _ in whole) <= 8, \
        f"16 patches at an aspect ratio of at most 1/.3 should be 7 high, but one block is {max(whole)[0]} high"


def test_blocks_reach_all_borders():
    """Each border is masked as often as the one on the other side."""
    share = masks(1000, 8, 16, 8).float().mean(dim=0)
    for name, (one, other) in {"top and bottom": (share[0], share[-1]),
                               "left and right": (share[:, 0], share[:, -1])}.items():
        one, other = one.mean().item(), other.mean().item()
        assert abs(one - other) < 0.25 * max(one, other), \
            f"the {name} border should be masked equally often, but {one:.3f} and {other:.3f} of their patches are: " \
            "a block of height h has grid - h + 1 places"


def test_masks_grow_from_blocks_that_fill_what_is_left():
    """The area of a block is uniform between min_block and what is left: large blocks must occur."""
    generator = torch.Generator().manual_seed(0)
    heights = [height_and_width(data.block_mask(14, 40, 4, generator).view(14, 14)) for _ in range(200)]
    compact = sum(height * width <= 48 for height, width in heights)
    assert compact >= 5, \
        f"with 40 masked patches a single block should sometimes cover nearly all of them, but only {compact} of 200 " \
        f"masks are so compact: is a block's area uniform between min_block and what is left?"


def test_the_search_goes_on_after_a_refusal():
    """Ten refusals in a row end it. If the first one did, or if it ended when fewer than min_block are left, single patches
    would take over too early, and fewer masked patches would lie deep in a block."""
    mask = masks(400, 14, 75, 16)
    visible = torch.nn.functional.pad(~mask, (1, 1, 1, 1))  # outside of the image nothing is visible
    touched = visible[:, :-2, 1:-1] | visible[:, 2:, 1:-1] | visible[:, 1:-1, :-2] | visible[:, 1:-1, 2:]
    lonely = ((mask & ~touched).sum() / mask.sum()).item()
    assert 0.53 < lonely < 0.58, \
        f"about 55 % of the masked patches should touch no visible one, but {lonely:.0%} do not: does the search end " \
        "after ten refusals in a row, and is a block drawn also when fewer than min_block are left?"


def test_no_block_spans_the_grid():
    """3 of 3 x 3 patches: single patches complete a line now and then, in a fifth of the masks. Whole blocks of 1 x 3
    and 3 x 1 would make two thirds of them."""
    mask = masks(500, 3, 3, 3)
    lines = (mask.all(dim=1) | mask.all(dim=2)).any(dim=1).float().mean().item()
    assert lines < 0.4, \
        f"about 20 % of these masks should hold a whole row or column, but {lines:.0%} do: is a block that is as high or " \
        "as wide as the grid refused?"


# -- masked_positions ---------------------------------------------------------------------------------------------


def test_positions_are_those_of_the_mask_in_ascending_order():
    mask = torch.zeros(40, 30, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for row in mask:
        row[torch.randperm(30, generator=generator)[:7]] = True
    positions = beitv2.masked_positions(mask, 7)
    assert positions.shape == (40, 7) and positions.dtype == torch.int64, \
        f"positions should be int64 [B, M] = [40, 7], but are {positions.dtype} {list(positions.shape)}"
    for row, found in zip(mask, positions):
        expected = row.nonzero().flatten()
        assert torch.equal(found.sort().values, expected), \
            f"the masked positions should be {expected.tolist()}, but are {found.tolist()}"
        assert torch.equal(found, expected), \
            f"the masked positions should ascend as {expected.tolist()}, but are {found.tolist()}: is the sort stable?"


def test_the_shape_of_positions_does_not_depend_on_the_mask():
    """On a GPU, `nonzero` makes the host wait. It is forbidden here, on a meta tensor that holds no values."""
    try:
        shape = list(beitv2.masked_positions(torch.zeros(2, 9, dtype=torch.bool, device="meta"), 3).shape)
    except NotImplementedError as error:
        shape = str(error).split("\n")[0]
        assert "assignment" not in shape, shape
    assert shape == [2, 3], \
        f"the shape [B, M] should follow from num_masked alone, but the values of the mask are needed for it ({shape})"
