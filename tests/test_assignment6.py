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


def aggregate(model, last: torch.Tensor, early: torch.Tensor, position_bias=None) -> torch.Tensor:
    """What the head returns. It gets a copy of MASKED, for a function that writes into it."""
    return model.aggregate(last, early, MASKED.clone(), position_bias)


def head_logits(model, last: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
    """What the head returns, if it can be compared with logits at all."""
    logits = aggregate(model, last, early)
    assert logits.is_floating_point(), f"the head should return logits, which are floats, but returns {logits.dtype}"
    assert logits.shape == (2, 4, 11), \
        f"the head's logits should be those of the masked patches, [B, M, K] = [2, 4, 11], but are {list(logits.shape)}"
    return logits


def moves(model, last: torch.Tensor, early: torch.Tensor, tokens: torch.Tensor) -> bool:
    """Whether what the head returns changes when `tokens`, a part of `last` or `early`, change."""
    before = aggregate(model, last, early)
    tokens += torch.randn(tokens.shape)  # not a shift or a factor, which a norm would remove
    return not torch.allclose(aggregate(model, last, early), before, atol=1e-5)


def test_the_head_gives_a_logit_for_each_id(masked_image_model):
    head_logits(masked_image_model(), *hidden_states())


def test_the_arguments_stay_as_they_are(masked_image_model):
    last, early = hidden_states()
    arguments = dict(last=last, early=early, masked=MASKED.clone(), position_bias=torch.randn(1, 2, 17, 17))
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    masked_image_model().aggregate(**arguments)
    for name, tensor in arguments.items():
        assert torch.equal(tensor, before[name]), \
            f"aggregate should not write into its arguments, but changes `{name}`: build a new tensor"


def test_the_head_sees_the_last_cls_and_early_patches(masked_image_model):
    model = masked_image_model()
    last, early = hidden_states()
    assert moves(model, last, early, last[:, 0]), \
        "the head should see the [CLS] of the last layer, but its logits do not follow a change of it: is it left out?"
    assert moves(model, last, early, early[:, 1:]), \
        "the head should see the patches of the early layer, but its logits do not follow a change of them: are they " \
        "left out?"


def test_the_head_sees_no_late_patches(masked_image_model):
    last, early = hidden_states()
    assert not moves(masked_image_model(), last, early, last[:, 1:]), \
        "the head should not see patches of the last layer, but does: with late patches it needs nothing from [CLS]"


def test_the_last_tokens_may_be_fewer(masked_image_model):
    model = masked_image_model()
    last, early = hidden_states()
    expected = aggregate(model, last, early)
    try:
        found = aggregate(model, last[:, :5], early)  # [CLS] and the masked patches, as `forward` may pass them
    except (IndexError, RuntimeError) as error:
        if isinstance(error, NotImplementedError):
            raise
        found = None
    assert found is not None and torch.allclose(found, expected, atol=1e-5), \
        "of `last` the head should read nothing but [CLS], so that the other tokens may be missing, but it needs them"


def test_the_head_sees_no_early_cls(masked_image_model):
    last, early = hidden_states()
    assert not moves(masked_image_model(), last, early, early[:, 0]), \
        "the head should not see the [CLS] of the early layer, but does: the last one takes its place"


def test_the_heads_input_is_the_cls_and_then_the_patches(masked_image_model):
    model = masked_image_model(head_layers=1)
    last, early = hidden_states()
    expected = torch.cat([last[:, :1], early[:, 1:]], dim=1)
    aggregate(model, last, early)
    inputs = model.cls_pt_layers[0].inputs
    assert inputs, "each block of the head should run once, but a head of one block does not run it"
    assert inputs[0].shape == expected.shape and torch.allclose(inputs[0], expected, atol=1e-5), \
        "the head's blocks should get [B, T, D] with [CLS] as token 0, then the patches in order; the position bias " \
        "relies on it. But the first block gets something else: is the order another one, or is there a norm before " \
        "the blocks?"


def test_the_heads_blocks_use_the_position_bias_that_is_given(masked_image_model):
    model, bias = masked_image_model(), torch.randn(1, 2, 17, 17)
    aggregate(model, *hidden_states(), bias)
    for number, block in enumerate(model.cls_pt_layers, start=1):
        assert len(block.biases) == 1, \
            f"each block of the head should run once, but block {number} ran {len(block.biases)} times"
        got = block.biases[0]
        assert got is not None and torch.equal(got, bias), \
            "each block of the head should get the position bias that is given, but " \
            f"block {number} got {'None' if got is None else 'another tensor'}"


def test_no_position_bias_stays_none(masked_image_model):
    model = masked_image_model()
    model.shared_position_bias = lambda: torch.randn(1, 2, 17, 17)
    aggregate(model, *hidden_states())
    assert all(bias is None for block in model.cls_pt_layers for bias in block.biases), \
        "a position bias of None means that there is none, and the head's blocks should get it as it is, but they " \
        "get a tensor: is the bias looked up once more?"


def test_the_heads_blocks_obey_checkpoint_activations(masked_image_model):
    model = masked_image_model(checkpoint_activations=True).train()
    aggregate(model, *hidden_states()).sum().backward()
    for number, block in enumerate(model.cls_pt_layers, start=1):
        assert len(block.biases) == 2, \
            "with checkpoint_activations each block of the head should run twice in training, in the forward and in " \
            f"the backward pass, but block {number} does not: is it run with `self.run_block`?"


def test_the_head_is_all_its_blocks_then_norm_and_output_layer(masked_image_model):
    model = masked_image_model(head_layers=2)
    last, early = hidden_states()
    x = torch.cat([last[:, :1], early[:, 1:]], dim=1)
    for block in model.cls_pt_layers:
        x = block(x)
    expected = torch.stack([model.lm_head(model.norm(x[i, 1 + MASKED[i]])) for i in range(2)])
    found = head_logits(model, last, early)
    assert torch.allclose(found, expected, atol=1e-4), \
        "the head should run all its blocks, then the model's own norm and lm_head on the masked patches, but " \
        f"differs by {(found - expected).abs().max():.2g}: is each block run once, in order, is [CLS] not counted " \
        "as a patch, and is there one norm, after the blocks, nothing added, and no softmax?"


def test_a_shared_head_has_no_norm_and_output_layer_of_its_own(masked_image_model):
    model = masked_image_model()
    before = aggregate(model, *hidden_states())
    for name, parameter in (("norm", model.norm.weight), ("lm_head", model.lm_head.bias)):
        with torch.no_grad():
            parameter += torch.randn(parameter.shape)
        after = aggregate(model, *hidden_states())
        assert not torch.allclose(after, before, atol=1e-5), \
            f"with shared_lm_head the head should use the model's own `{name}`, but a change of it does not reach " \
            "the head"
        before = after


def test_a_separate_head_has_its_own_norm_and_output_layer(masked_image_model):
    model = masked_image_model(shared_lm_head=False)
    before = aggregate(model, *hidden_states())
    for name, parameter, matters in (("norm", model.norm.weight, False), ("lm_head", model.lm_head.bias, False),
                                     ("cls_pt_norm", model.cls_pt_norm.weight, True),
                                     ("cls_pt_lm_head", model.cls_pt_lm_head.bias, True)):
        with torch.no_grad():
            parameter += torch.randn(parameter.shape)
        after = aggregate(model, *hidden_states())
        assert torch.allclose(after, before, atol=1e-5) != matters, \
            "with shared_lm_head=False the head should use cls_pt_norm and cls_pt_lm_head only, but a change of " \
            f"`{name}` {'does not reach it' if matters else 'reaches it'}: see the hint 'a part that may not exist'"
        before = after


def test_the_gradient_reaches_both_inputs(masked_image_model):
    last, early = (tokens.requires_grad_() for tokens in hidden_states())
    # Copies, since a function that writes into its arguments would fail here with words of PyTorch's own.
    logits = head_logits(masked_image_model(), last.clone(), early.clone())
    for name, tokens, part in (("the last [CLS]", last, slice(0, 1)), ("the early patches", early, slice(1, None))):
        gradient = torch.autograd.grad(logits.square().sum(), tokens, retain_graph=True, allow_unused=True)[0]
        assert gradient is not None and gradient[:, part].abs().max() > 0, \
            f"the head's loss should train {name}, but no gradient arrives there: is something detached?"
