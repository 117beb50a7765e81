"""Assignment 6: patch aggregation."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

pytestmark = pytest.mark.assignment(6)

MASKED = torch.tensor([[0, 3, 6, 12], [1, 2, 9, 15]])  # positions among the 16 patches of two images


def hidden_states() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens after the last block and after the early one, [CLS] first."""
    torch.manual_seed(1)
    return torch.randn(2, 17, 8), torch.randn(2, 17, 8)


def moves(model, last: torch.Tensor, early: torch.Tensor, tokens: torch.Tensor) -> bool:
    """Whether the head's logits change when `tokens`, a part of `last` or `early`, change."""
    before = model.aggregate(last, early, MASKED, None)
    tokens += 1
    return not torch.allclose(model.aggregate(last, early, MASKED, None), before, atol=1e-5)


def test_the_head_gives_a_logit_for_each_code(masked_image_model):
    logits = masked_image_model().aggregate(*hidden_states(), MASKED, None)
    assert logits.shape == (2, 4, 11), \
        f"the head's logits should be [B, M, K] = [2, 4, 11], but are {list(logits.shape)}"


def test_the_head_sees_the_last_cls_and_early_patches(masked_image_model):
    model = masked_image_model()
    last, early = hidden_states()
    assert moves(model, last, early, last[:, 0]), \
        "the head should see the [CLS] of the last layer, but its logits do not depend on it"
    assert moves(model, last, early, early[:, 1:]), \
        "the head should see the patches of the early layer, but its logits do not depend on them"


def test_the_head_sees_no_late_patches(masked_image_model):
    last, early = hidden_states()
    assert not moves(masked_image_model(), last, early, last[:, 1:]), \
        "the head should not see patches of the last layer, but does: with late patches it needs nothing from [CLS]"


def test_the_head_sees_no_early_cls(masked_image_model):
    last, early = hidden_states()
    assert not moves(masked_image_model(), last, early, early[:, 0]), \
        "the head should not see the [CLS] of the early layer, but does: the last one takes its place"


def test_the_head_is_all_its_blocks_then_norm_and_output_layer(masked_image_model):
    model = masked_image_model(head_layers=2)
    last, early = hidden_states()
    x = torch.cat([last[:, :1], early[:, 1:]], dim=1)
    for block in model.cls_pt_layers:
        x = block(x)
    expected = torch.stack([model.lm_head(model.norm(x[i, 1 + MASKED[i]])) for i in range(2)])
    found = model.aggregate(last, early, MASKED, None)
    assert torch.allclose(found, expected, atol=1e-4), \
        "the head should run all its blocks, then the model's own norm and lm_head on the masked patches, but " \
        f"differs by {(found - expected).abs().max():.2g}: is each block run once, in order, and [CLS] not counted " \
        "as a patch?"


def test_a_shared_head_has_no_norm_and_output_layer_of_its_own(masked_image_model):
    model = masked_image_model()
    before = model.aggregate(*hidden_states(), MASKED, None)
    for name, parameter in (("norm", model.norm.weight), ("lm_head", model.lm_head.bias)):
        with torch.no_grad():
            parameter += 1
        after = model.aggregate(*hidden_states(), MASKED, None)
        assert not torch.allclose(after, before, atol=1e-5), \
            f"with shared_lm_head the head should use the model's own `{name}`, but a change of it does not reach " \
            "the head"
        before = after


def test_a_separate_head_has_its_own_norm_and_output_layer(masked_image_model):
    model = masked_image_model(shared_lm_head=False)
    before = model.aggregate(*hidden_states(), MASKED, None)
    for name, parameter, matters in (("norm", model.norm.weight, False), ("lm_head", model.lm_head.bias, False),
                                     ("cls_pt_norm", model.cls_pt_norm.weight, True),
                                     ("cls_pt_lm_head", model.cls_pt_lm_head.bias, True)):
        with torch.no_grad():
            parameter += 1
        after = model.aggregate(*hidden_states(), MASKED, None)
        assert torch.allclose(after, before, atol=1e-5) != matters, \
            "with shared_lm_head=False the head should use cls_pt_norm and cls_pt_lm_head only, but a change of " \
            f"`{name}` {'does not reach it' if matters else 'reaches it'}"
        before = after


def test_the_heads_blocks_use_the_shared_position_bias(masked_image_model):
    model, bias = masked_image_model(), torch.randn(1, 2, 17, 17)
    model.aggregate(*hidden_states(), MASKED, bias)
    assert all(len(block.biases) == 1 and block.biases[0] is bias for block in model.cls_pt_layers), \
        "each block of the head should run once, with the position bias that is given, but does not"


def test_the_gradient_reaches_both_inputs(masked_image_model):
    last, early = (tokens.requires_grad_() for tokens in hidden_states())
    logits = masked_image_model().aggregate(last, early, MASKED, None)
    for name, tokens, part in (("the last [CLS]", last, slice(0, 1)), ("the early patches", early, slice(1, None))):
        gradient = torch.autograd.grad(logits.square().sum(), tokens, retain_graph=True, allow_unused=True)[0]
        assert gradient is not None and gradient[:, part].abs().max() > 0, \
            f"the head's loss should train {name}, but no gradient arrives there: is something detached?"
