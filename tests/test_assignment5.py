"""Assignment 5: masked image modeling."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import beitv2  # noqa: E402

pytestmark = pytest.mark.assignment(5)

MASKED = torch.tensor([[0, 3, 6, 12], [1, 2, 9, 15]])  # positions among the 16 patches of two images


def test_take_picks_the_tokens_of_each_image():
    tokens = torch.arange(2 * 16 * 3.0).view(2, 16, 3)
    found = beitv2.take(tokens, MASKED)
    assert found.shape == (2, 4, 3), \
        f"4 positions of tokens [2, 16, 3] should give [2, 4, 3], but give {list(found.shape)}"
    for image in range(2):
        assert torch.equal(found[image], tokens[image, MASKED[image]]), \
            f"image {image} should give its tokens at {MASKED[image].tolist()}, but gives others: each image has " \
            "positions of its own"


def test_take_picks_ids_too():
    ids = torch.arange(100, 132).view(2, 16)
    try:
        found = beitv2.take(ids, MASKED)
        what = f"{found.dtype} {list(found.shape)}: {found.tolist()}"
    except (IndexError, RuntimeError) as error:
        if isinstance(error, NotImplementedError):
            raise
        found, what = None, str(error).split("\n")[0]
    expected = [[100, 103, 106, 112], [117, 118, 125, 131]]
    assert found is not None and found.tolist() == expected and found.dtype == torch.int64, \
        f"4 positions of ids [2, 16], which have no third dimension, should give int64 [2, 4]: {expected}, but give " \
        f"{what}"


def hidden_states(model, images) -> dict[int, torch.Tensor]:
    """What `forward_blocks` gives for masked images, after each block, from 1."""
    return model.forward_blocks(model.embed(images, MASKED, model.mask_token), None, (1, 2, 3))[1]


def predictions(model, images) -> list[torch.Tensor]:
    """What forward returns for masked images, if it is a list with an entry for each name in `model.prediction_names`."""
    found, names = model(images, MASKED[:len(images)]), model.prediction_names
    what = f"a list of {len(found)}" if isinstance(found, list) else f"a {type(found).__name__}"
    assert isinstance(found, list) and len(found) == len(names), \
        f"forward should return a list of logits, one for each name in `predictions`, here {' and '.join(names)}, but " \
        f"returns {what}: is the head asked if there is one (head_layers > 0), and only then?"
    return found


def test_logits_name_the_ids_of_the_masked_patches(masked_image_model):
    model, images = masked_image_model(head_layers=0), torch.randn(2, 3, 16, 16)
    [logits] = predictions(model, images)
    assert logits.shape == (2, 4, 11), f"the logits should be [B, M, K] = [2, 4, 11], but are {list(logits.shape)}"
    tokens = hidden_states(model, images)[3]
    for image in range(2):
        expected = model.lm_head(model.norm(tokens[image, 1 + MASKED[image]]))
        assert torch.allclose(logits[image], expected, atol=1e-4), \
            "the logits should be lm_head(norm(tokens of the masked patches)), but differ by " \
            f"{(logits[image] - expected).abs().max():.2g}: is the norm there, and [CLS], token 0, not counted as a " \
            "patch?"


def test_what_is_masked_is_not_seen(masked_image_model):
    model, images = masked_image_model(head_layers=0), torch.randn(1, 3, 16, 16)
    before = predictions(model, images)[0]
    images[:, :, :4, :4] += 5  # patch 0, which is masked
    moved = (predictions(model, images)[0] - before).abs().max().item()
    assert moved < 1e-5, \
        f"pixels of a masked patch should not change any logits, but move them by {moved:.2g}: does `embed` get the " \
        "masked positions and the mask token?"
    images[:, :, :4, 4:8] += 5  # patch 1, which is visible
    assert not torch.allclose(predictions(model, images)[0], before), \
        "pixels of a visible patch should change the logits, but do not"


@pytest.mark.parametrize("early_layers", [1, 2])
def test_the_head_is_given_what_it_needs(masked_image_model, early_layers):
    """`aggregate` is assignment 6. Here it only notes what it is given."""
    model, images, given = masked_image_model(early_layers=early_layers), torch.randn(2, 3, 16, 16), {}

    def aggregate(last, early, masked, position_bias):
        given.update(last=last, early=early, masked=masked, position_bias=position_bias)
        return torch.ones(2, 4, 11)

    bias = torch.randn(1, 2, 17, 17)
    model.aggregate, model.shared_position_bias = aggregate, lambda: bias
    found = predictions(model, images)
    assert given, "with a head (head_layers > 0) forward should call `aggregate`, but does not"
    assert torch.equal(found[1], torch.ones(2, 4, 11)), \
        "the second prediction, named \"cls\", should be what `aggregate` returns, but is another"
    states = hidden_states(model, images)
    assert torch.allclose(given["last"][:, :1], states[3][:, :1], atol=1e-5), \
        "`last` should begin with [CLS] after the last block, not normed, but begins with something else"
    early = states[early_layers]
    assert given["early"].shape == early.shape and torch.allclose(given["early"], early, atol=1e-5), \
        f"`early` should be the tokens after block {early_layers} of 3, all of them and not normed, but is something " \
        "else: layers are counted from 1"
    assert torch.equal(given["masked"], MASKED), "`aggregate` should be given the masked positions"
    assert given["position_bias"] is bias, "`aggregate` should be given the position bias that all blocks share"
    assert all(block.biases[0] is bias for block in model.blocks), "the blocks should be given the shared position bias"


# -- score --------------------------------------------------------------------------------------------------------

RIGHT = torch.tensor([[True, False, False, False], [True, True, False, False]])  # the best guesses of logits_and_ids


def logits_and_ids() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 11)
    best = logits.argmax(dim=-1)
    return logits, torch.where(RIGHT, best, (best + 1) % 11)


def test_the_loss_is_the_mean_cross_entropy_of_the_masked_patches():
    logits, ids = logits_and_ids()
    expected = -logits.log_softmax(dim=-1).gather(2, ids[..., None]).mean()
    loss = beitv2.score(logits, ids)[0]
    assert loss.shape == (), f"the loss should be one number, but is {list(loss.shape)}"
    assert abs(loss.item() - expected.item()) < 1e-4, \
        f"the loss should be the mean of - log p(id) over all masked patches, {expected:.4f}, but is {loss:.4f}: a " \
        "mean, not a sum, of a softmax over the ids?"


def test_the_hits_say_for_each_masked_patch_whether_the_best_guess_is_right():
    hits = beitv2.score(*logits_and_ids())[1]
    found = f"{hits.dtype} {list(hits.shape)}" if isinstance(hits, torch.Tensor) else f"a {type(hits).__name__}"
    assert isinstance(hits, torch.Tensor) and hits.dtype == torch.bool and hits.shape == (2, 4), \
        f"the hits should be bool [B, M] = [2, 4], one for each masked patch, but are {found}"
    assert torch.equal(hits, RIGHT), \
        f"the best guesses of 3 of 8 patches are right, {RIGHT.tolist()}, but the hits are {hits.tolist()}"


def test_the_loss_of_half_precision_is_computed_in_float32():
    logits, ids = logits_and_ids()
    loss = beitv2.score(logits.bfloat16(), ids)[0]
    assert loss.dtype == torch.float32, \
        f"logits come in bfloat16 under autocast, and the loss should be float32 all the same, but is {loss.dtype}"
