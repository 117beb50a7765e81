"""beitv2.py: what the networks do beside the parity numbers, and what `load_pretrained` accepts, changes and refuses."""

import argparse
import io
import math
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import beitv2  # noqa: E402
from beitv2 import Classifier, MaskedImageModel, ModelConfig, ModelError, VisionTransformer, load_pretrained, read_checkpoint  # noqa: E402

TINY = dict(image_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, layer_scale=0.1)


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fresh models have zero biases and tables, behind which a mistake could hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny(**options) -> VisionTransformer:
    return randomised(VisionTransformer(**TINY | options))


def tiny_mim(**options) -> MaskedImageModel:
    return randomised(MaskedImageModel(**TINY | dict(vocab_size=11, early_layers=1, head_layers=2, rel_pos_bias="shared") | options))


def images(count: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


MASKED = torch.tensor([[0, 3, 6, 12], [1, 2, 9, 15]])  # positions among the 16 patches of two images


# --- building ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size, patch_size", [(33, 8), (7, 8), (230, 16), (1, 16)])
def test_an_image_that_the_patches_do_not_divide(image_size, patch_size):
    with pytest.raises(ModelError, match=f"{image_size} pixels .* patches of {patch_size}") as error:
        tiny(image_size=image_size, patch_size=patch_size)
    suggestion = int(re.search(r"such as (\d+)", str(error.value))[1])
    assert suggestion % patch_size == 0 and 0 < suggestion and abs(suggestion - image_size) <= patch_size


def test_a_width_that_the_heads_do_not_divide():
    with pytest.raises(ModelError, match="16 does not divide among 3"):
        tiny(num_heads=3)


@pytest.mark.parametrize("early_layers", [0, 4])
def test_an_early_layer_that_does_not_exist(early_layers):
    with pytest.raises(ModelError, match=f"early_layers is {early_layers}.*3 blocks"):
        tiny_mim(early_layers=early_layers)


def test_model_config_sizes_and_overrides():
    large = ModelConfig(size="large").backbone(224)
    assert (large["embed_dim"], large["depth"], large["num_heads"]) == (1024, 24, 16)
    mixed = ModelConfig(size="tiny", depth=2, patch_size=8, layer_scale=0.0).backbone(64)
    assert (mixed["embed_dim"], mixed["depth"], mixed["num_heads"]) == (192, 2, 3)
    model = VisionTransformer(**mixed)
    assert model.num_patches == 64 and model.blocks[0].gamma_1 is None


def test_initial_weights_of_tokenizer_and_classifier():
    """Linear layers are normal and not cut off; deep branches start smaller; the convolution is as PyTorch made it."""
    torch.manual_seed(0)
    model = VisionTransformer(image_size=16, patch_size=8, embed_dim=128, depth=3, num_heads=2)
    for layer, block in enumerate(model.blocks, start=1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.attn.qkv.weight.abs().max() > 0.06  # 49152 normal numbers pass three sigma for certain
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * layer), rel=0.05)
    bound = 1 / math.sqrt(3 * 8 * 8)  # nn.Conv2d's default: uniform within 1 / sqrt(fan-in)
    assert model.patch_embed.proj.weight.abs().max() <= bound
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_the_deviation_of_initial_weights_is_an_option():
    """In pre-training the cut-off moves with it: at +-1 std, which leaves 0.54 of it (the deviation of N(0,1) there)."""
    torch.manual_seed(0)
    options = ModelConfig(embed_dim=128, depth=2, num_heads=2, patch_size=8, init_std=0.06).backbone(16)
    weight = VisionTransformer(**options).blocks[0].attn.qkv.weight
    assert weight.std().item() == pytest.approx(0.06, rel=0.05) and weight.abs().max() > 0.18
    model = MaskedImageModel(vocab_size=512, early_layers=1, head_layers=1, shared_lm_head=False, **options)
    for weight in (model.patch_embed.proj.weight, model.lm_head.weight, model.cls_pt_lm_head.weight):
        assert weight.std().item() == pytest.approx(0.54 * 0.06, rel=0.05) and 0.059 < weight.abs().max() <= 0.06


def test_the_classifiers_head_starts_small():
    torch.manual_seed(0)
    model = Classifier(50, **TINY)
    assert 0 < model.head.weight.std() < 1.3 * 0.02 * 0.001 and model.head.bias.abs().max() == 0


# --- parts of a block --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [1, 2, 5])
def test_relative_position_index_against_a_double_loop(grid):
    index = beitv2.relative_position_index(grid)
    side = 2 * grid - 1
    assert index.shape == (1 + grid**2, 1 + grid**2)
    for query in range(grid**2):
        for key in range(grid**2):
            down, right = query // grid - key // grid, query % grid - key % grid
            assert index[1 + query, 1 + key] == (down + grid - 1) * side + (right + grid - 1)
    assert (index[0, 1:] == side**2).all()  # [CLS] looks at patches
    assert (index[1:, 0] == side**2 + 1).all()  # patches look at [CLS]
    assert index[0, 0] == side**2 + 2


def test_attention_against_the_formula():
    """softmax(q k^T / sqrt(d) + bias) v, head by head, with biases on q and v."""
    attention = randomised(beitv2.Attention(8, 2)).double()
    x, bias = torch.randn(3, 5, 8).double(), torch.randn(1, 2, 5, 5).double()
    weight_q, weight_k, weight_v = attention.qkv.weight.chunk(3)
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q, k = x @ weight_q[part].T + attention.q_bias[part], x @ weight_k[part].T
        v = x @ weight_v[part].T + attention.v_bias[part]
        heads.append((q @ k.transpose(1, 2) / 2 + bias[0, head]).softmax(dim=-1) @ v)
    assert torch.allclose(attention(x, bias), attention.proj(torch.cat(heads, dim=-1)), atol=1e-12)


def test_drop_path_drops_whole_images_and_keeps_the_expectation():
    torch.manual_seed(0)
    drop, n, rate = beitv2.DropPath(0.3), 4000, 0.3
    out = drop(torch.ones(n, 2, 3)).flatten(1)
    kept = out[:, 0] != 0
    assert torch.equal(out, (kept / 0.7)[:, None].expand_as(out))
    deviation = 5 * math.sqrt(rate / (1 - rate) / n)  # five standard errors of the mean
    assert out.mean().item() == pytest.approx(1, abs=deviation)
    x = torch.randn(4, 2, 3)
    assert torch.equal(drop.eval()(x), x) and torch.equal(beitv2.DropPath(0.0)(x), x)


def test_drop_path_rises_linearly_with_depth():
    rates = [block.drop_path.rate for block in tiny(depth=5, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_layer_scale():
    """0 has no parameters and equals a scale of one; a tiny scale makes a block almost the identity."""
    torch.manual_seed(0)
    plain = beitv2.Block(16, 2, layer_scale=0.0)
    ones, small = beitv2.Block(16, 2, layer_scale=1.0), beitv2.Block(16, 2, layer_scale=1e-5)
    assert not any("gamma" in name for name, _ in plain.named_parameters())
    ones.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 5, 16)
    assert torch.equal(plain(x), ones(x)) and not torch.equal(plain(x), x)
    assert torch.allclose(small(x), x, atol=1e-4) and not torch.equal(small(x), x)


# --- the backbone ------------------------------------------------------------------------------------------------


def test_a_patch_token_comes_from_its_patch():
    """Without blocks, token 1 + row * grid + column sees that patch's pixels and no others."""
    model = tiny(depth=1)
    x, changed = images(1), images(1)
    changed[..., 8:16, 24:32] += 1  # row 1, column 3 of 4
    differs = (model.embed(x) != model.embed(changed)).any(dim=-1)[0]
    assert differs.nonzero().flatten().tolist() == [1 + 1 * 4 + 3]


def test_registers_are_seen_but_not_returned():
    model = tiny(num_registers=3, abs_pos_embed=True)
    tokens = model(images())
    assert tokens.shape == (2, 17, 16)
    embedded = model.embed(images())
    assert torch.equal(embedded[:, 1:4], model.register_tokens.expand(2, -1, -1))  # after [CLS], without positions
    with torch.no_grad():
        model.register_tokens *= 2
    assert not torch.allclose(model(images()), tokens)


def test_a_kept_layer_is_counted_from_one():
    model = tiny()
    x = model.embed(images())
    last, kept = model.forward_blocks(x, model.shared_position_bias(), keep=(1, 3))
    assert kept.keys() == {1, 3} and torch.equal(kept[3], last)
    assert torch.equal(kept[1], model.blocks[0](x))


@pytest.mark.parametrize("early_layers", [1, 3])
def test_tokens_that_nobody_asks_for_leave_before_the_last_mlp(early_layers):
    """Logits and gradients are those of all tokens. The head reads all tokens of layer 3 of 3, so there none leaves."""
    model = tiny_mim(early_layers=early_layers)
    bias = model.shared_position_bias()
    x = model.embed(images(), MASKED, model.mask_token)
    last, kept = model.forward_blocks(x, bias, (early_layers,))
    x = torch.cat([last[:, :1], kept[early_layers][:, 1:]], dim=1)
    for block in model.cls_pt_layers:
        x = block(x, bias)
    expected = [model.lm_head(model.norm(beitv2.take(tokens[:, 1:], MASKED))) for tokens in (last, x)]
    sum(logits.square().sum() for logits in expected).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    counts = []
    for block in (*model.blocks, *model.cls_pt_layers):
        block.mlp.register_forward_hook(lambda _, inputs, output: counts.append(output.shape[1]))
    found = model(images(), MASKED)
    sum(logits.square().sum() for logits in found).backward()
    assert counts == [17, 17, 5 if early_layers == 1 else 17, 17, 4]
    for here, there in zip(found, expected, strict=True):
        assert torch.allclose(here, there, atol=1e-5)
    assert all(torch.allclose(p.grad, gradients[name], atol=1e-4) for name, p in model.named_parameters())


@pytest.mark.parametrize("rel_pos_bias", ["shared", "per_block"])
def test_checkpointed_activations_give_the_same_gradients(rel_pos_bias):
    """Bit for bit, drop path included: the second forward pass must drop what the first one dropped."""
    gradients, calls = [], []
    for option in (False, True):
        model = tiny_mim(rel_pos_bias=rel_pos_bias, drop_path=0.5, checkpoint_activations=option).train()
        count = []
        model.blocks[0].mlp.register_forward_hook(lambda *_: count.append(1))
        torch.manual_seed(7)
        loss = sum(logits.square().mean() for logits in model(images(), MASKED))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        calls.append(len(count))
    assert calls == [1, 2]  # else nothing was recomputed
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())


def test_autocast_keeps_the_residual_stream_in_float32():
    model = tiny_mim().eval()
    with torch.no_grad():
        expected, _ = model.forward_blocks(model.embed(images(), MASKED, model.mask_token), model.shared_position_bias())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden, _ = model.forward_blocks(model.embed(images(), MASKED, model.mask_token), model.shared_position_bias())
    assert hidden.dtype == torch.float32
    assert F.cosine_similarity(hidden.flatten(), expected.flatten(), dim=0) > 0.999


# --- masked image modeling ---------------------------------------------------------------------------------------


def test_masked_positions_are_those_of_the_mask():
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(20, 30, generator=generator).argsort(dim=1)[:, :11]
    mask = torch.zeros(20, 30, dtype=torch.bool).scatter(1, positions, True)
    assert torch.equal(beitv2.masked_positions(mask, 11), positions.sort(dim=1).values)


def test_take_picks_tokens():
    tokens = torch.arange(24).view(2, 4, 3)
    assert beitv2.take(tokens, torch.tensor([[3, 0], [1, 1]])).tolist() == [[[9, 10, 11], [0, 1, 2]], [[15, 16, 17]] * 2]


def test_pixels_of_masked_patches_do_not_matter():
    model = tiny_mim().eval()
    x, hidden, seen = images(), images(), images()
    hidden[0, :, 0:8, 24:32] += 3  # patch 3, masked in the first image
    seen[0, :, 0:8, 8:16] += 3  # patch 1, visible there
    for reference, same, other in zip(model(x, MASKED), model(hidden, MASKED), model(seen, MASKED)):
        assert reference.shape == (2, 4, 11)
        assert torch.equal(reference, same)
        assert not torch.allclose(reference[0], other[0]) and torch.equal(reference[1], other[1])


@pytest.mark.parametrize("block, token, reaches", [
    (-1, 0, True),  # the final [CLS] ...
    (-1, slice(1, None), False),  # ... but no patch token of a later layer
    (1, slice(1, None), True),  # those of the layer after `early_layers` do get there, through [CLS] alone
])
def test_the_aggregation_head_sees_the_final_cls_and_early_patches(block, token, reaches):
    model = tiny_mim(early_layers=1).eval()
    mim, cls = model(images(), MASKED)

    def disturb(module, inputs, output):
        output = output.clone()
        output[:, token] += torch.randn(output[:, token].shape, generator=torch.Generator().manual_seed(1))
        return output

    model.blocks[block].register_forward_hook(disturb)
    disturbed_mim, disturbed_cls = model(images(), MASKED)
    assert torch.allclose(cls, disturbed_cls) is not reaches
    if block == -1:  # no block follows, so each prediction of the backbone's own has nothing but its own token
        assert torch.equal(mim, disturbed_mim) is (token == 0)


def test_early_patches_reach_the_head_directly():
    """With the way through [CLS] cut off, the head's predictions still depend on the early patch tokens."""
    model = tiny_mim(early_layers=1)
    early = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: early.append(output) or output.retain_grad())
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: output.detach())
    model(images(), MASKED)[1].square().sum().backward()
    gradient = early[0].grad
    assert gradient[:, 1:].abs().amax(dim=-1).min() > 0  # every patch
    assert gradient[:, 0].abs().max() == 0  # but not the early [CLS], in whose place stands the final one


def test_without_a_head_it_is_plain_masked_prediction():
    full, plain = tiny_mim(), tiny_mim(head_layers=0, early_layers=99)
    plain.load_state_dict({name: value for name, value in full.state_dict().items() if not name.startswith("cls_pt")})
    [logits] = plain(images(), MASKED)
    assert torch.equal(logits, full(images(), MASKED)[0])
    assert (full.prediction_names, plain.prediction_names) == (("mim", "cls"), ("mim",))


def test_a_separate_head_begins_as_the_shared_one_does():
    """Both output layers: normal, cut off at one standard deviation of .02, without bias. (Its layers do not.)"""
    model = MaskedImageModel(**TINY, vocab_size=200, early_layers=1, shared_lm_head=False)
    for layer in (model.lm_head, model.cls_pt_lm_head):
        assert layer.weight.abs().max() <= 0.02 and 0.009 < layer.weight.std() < 0.013
        assert not layer.bias.any()


def test_the_shared_bias_is_built_once_per_forward(monkeypatch):
    model, built = tiny_mim(rel_pos_bias="shared"), []
    position_bias = model.position_bias
    monkeypatch.setattr(model, "position_bias", lambda table: built.append(table) or position_bias(table))
    model(images(), MASKED)
    assert len(built) == 1


@pytest.mark.parametrize("shared_lm_head", [True, False])
def test_shared_head_shares_norm_and_output_layer(shared_lm_head):
    model = tiny_mim(shared_lm_head=shared_lm_head)
    model(images(), MASKED)[1].sum().backward()
    assert (model.lm_head.weight.grad is not None) == shared_lm_head
    assert (model.norm.weight.grad is not None) == shared_lm_head


def test_classifier_pools_as_asked():
    for pooling in ("mean", "cls"):
        model = randomised(Classifier(5, pooling, **TINY))
        tokens = model.features(images())
        pooled = model.fc_norm(tokens[:, 1:].mean(dim=1)) if pooling == "mean" else tokens[:, 0]
        assert torch.equal(model(images()), model.head(pooled))
        assert isinstance(model.norm, torch.nn.Identity) == (pooling == "mean")


# --- load_pretrained: what fits ----------------------------------------------------------------------------------


def test_a_shared_bias_table_is_copied_into_every_block():
    mim, model = tiny_mim().eval(), tiny(rel_pos_bias="per_block").eval()
    report = load_pretrained(model, mim.state_dict())
    expected = mim.features(images())
    assert torch.allclose(model(images()), expected, atol=1e-6)
    assert set(report.loaded) == set(model.state_dict()) and report.resized == report.fresh == []
    model.blocks[0].attn.relative_position_bias_table.data.zero_()  # copies: a change of one leaves the others alone
    assert model.blocks[1].attn.relative_position_bias_table.abs().max() > 0
    assert torch.equal(mim.features(images()), expected)


def test_what_is_dropped_and_what_is_fresh_is_reported():
    model = Classifier(5, rel_pos_bias="per_block", **TINY)
    mim = tiny_mim(shared_lm_head=False)
    report = load_pretrained(model, {"model": mim.state_dict(), "optimizer": {}, "epoch": 3}, source="it.pth")
    gone = [name for name in mim.state_dict() if name.startswith(("mask_token", "lm_head", "cls_pt", "norm."))]
    assert sorted(report.dropped) == sorted(gone)
    assert sorted(report.fresh) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    text = str(report)
    assert "it.pth" in text and "\n" not in text and "fresh 4 (fc_norm, head)" in text
    assert f"dropped {len(gone)} (cls_pt_layers, cls_pt_lm_head, cls_pt_norm, lm_head, mask_token, norm)" in text


def test_another_number_of_classes_gets_a_fresh_head():
    old, new = randomised(Classifier(5, **TINY)), Classifier(7, **TINY)
    head = new.head.weight.clone()
    report = load_pretrained(new, old.state_dict())
    assert set(report.fresh) == set(report.dropped) == {"head.weight", "head.bias"}
    assert torch.equal(new.head.weight, head) and torch.equal(new.fc_norm.weight, old.fc_norm.weight)


def test_published_extras_are_dropped_by_name():
    extras = dict.fromkeys(["relative_position_index", "blocks.0.attn.relative_position_index", "quantize.cluster_size",
                            "quantize.embedding.initted", "quantize.embedding.cluster_size", "teacher.proj",
                            "quantize.embedding.embed_avg", "scaling_layer.scale", "loss.weight"], torch.ones(2))
    model = tiny()
    report = load_pretrained(tiny(), model.state_dict() | extras)
    assert sorted(report.dropped) == sorted(extras)


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
def test_wrappings_of_a_state_dict(key, tmp_path):
    old, new = tiny(), randomised(tiny(), seed=1)
    torch.save({key: old.state_dict(), "epoch": 1} if key else old.state_dict(), tmp_path / "it.pth")
    report = load_pretrained(new, tmp_path / "it.pth")
    assert "it.pth" in str(report) and torch.equal(new(images()), old(images()))


def test_half_precision_checkpoints_load():
    old, new = tiny(rel_pos_bias="per_block"), tiny(rel_pos_bias="per_block", image_size=48)
    load_pretrained(new, {name: value.half() for name, value in old.state_dict().items()})
    assert torch.equal(new.cls_token, old.cls_token.half().float())
    assert all(p.dtype == torch.float32 for p in new.parameters())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model._orig_mod.", "module." * 2])
def test_prefixes_of_wrappers_are_taken_off(prefix):
    old, new = tiny(), randomised(tiny(), seed=1)
    report = load_pretrained(new, {"model": {prefix + name: value for name, value in old.state_dict().items()}})
    assert report.loaded == list(old.state_dict()) and torch.equal(new(images()), old(images()))


def test_a_prefix_that_not_all_names_share_stays():
    state = {f"module.{name}": value for name, value in tiny().state_dict().items()}
    with pytest.raises(ModelError, match=r"does not have: module\.cls_token"):
        load_pretrained(tiny(), state | {"norm.weight": state["module.norm.weight"]})


# --- load_pretrained: another grid -------------------------------------------------------------------------------

TABLE = "relative_position_bias_table"


def ramp_table(grid: int) -> torch.Tensor:
    """A bias table whose heads rise by one per row and by one per column; then the entries of [CLS]."""
    offset = torch.arange(2 * grid - 1.0) - (grid - 1)
    rows, columns = torch.meshgrid(offset, offset, indexing="ij")
    table = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    return torch.cat([table, torch.tensor([[70.0, 71], [72, 73], [74, 75]])])


def test_the_same_grid_is_left_alone():
    for name, value in ((TABLE, ramp_table(4)), ("pos_embed", torch.randn(1, 17, 6))):
        assert beitv2.resize_positions(name, value, torch.empty_like(value)) is value


@pytest.mark.parametrize("old, new", [(4, 7), (7, 4), (14, 24), (1, 4)])
def test_cls_entries_and_constants_survive_a_resize(old, new):
    table = torch.full(((2 * old - 1) ** 2 + 3, 2), 0.25)
    table[-3:] = ramp_table(1)[-3:]
    resized = beitv2.resize_positions(TABLE, table, torch.empty((2 * new - 1) ** 2 + 3, 2))
    assert torch.equal(resized[-3:], table[-3:]) and torch.allclose(resized[:-3], torch.tensor(0.25))

    positions = torch.full((1, 1 + old**2, 6), 0.25)
    positions[0, 0] = torch.arange(6.0)
    resized = beitv2.resize_positions("encoder.pos_embed", positions, torch.empty(1, 1 + new**2, 6))
    assert torch.equal(resized[0, 0], positions[0, 0]) and torch.allclose(resized[0, 1:], torch.tensor(0.25))


@pytest.mark.parametrize("old, new, ratio", [(8, 14, 1.2020988), (14, 24, 1.0903074), (14, 8, 1.01), (24, 14, 1.01)])
def test_a_ramp_of_displacements(old, new, ratio):
    """Neighbours keep their bias, and the old displacement i is found at 1 + q + ... + q^(i-1): where the new one is d,
    that makes i = log(1 + d (q - 1)) / log(q). Rows stay rows, columns stay columns, and the signs theirs."""
    resized = beitv2.resize_positions(TABLE, ramp_table(old), torch.empty((2 * new - 1) ** 2 + 3, 2))
    side = 2 * new - 1
    found = resized[:-3].view(side, side, 2)
    d = torch.arange(side) - (new - 1)
    expected = d.sign() * torch.log1p(d.abs() * (ratio - 1)) / math.log(ratio)
    assert (found[..., 0] - expected[:, None]).abs().max() < 2e-3  # between the positions, the spline is no logarithm
    assert (found[..., 1] - expected[None, :]).abs().max() < 2e-3
    middle = slice(new - 2, new + 1)
    assert torch.allclose(found[middle, middle], ramp_table(2)[:-3].view(3, 3, 2), atol=1e-5)
    if new > old:
        assert found[-1, -1].tolist() == pytest.approx([old - 1, old - 1], abs=1e-3)


@pytest.mark.parametrize("old", [1, 2, 3])
def test_beyond_the_farthest_distance_there_is_the_last_value(old):
    """The ratio is at most 1.5, so a tiny table ends at 1 or 2.5, wherever the new one ends."""
    resized = beitv2.resize_positions(TABLE, ramp_table(old), torch.empty(23**2 + 3, 2))
    found = resized[:-3].view(23, 23, 2)
    last = torch.tensor([old - 1.0, old - 1.0])
    assert torch.allclose(found[-9:, -9:], last.expand(9, 9, 2), atol=1e-5)
    assert torch.allclose(found[:9, :9], -last.expand(9, 9, 2), atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_a_spline_is_exact_for_cubic_polynomials_and_at_its_positions(count):
    """Few positions allow polynomials of lower degree only. Between 5 and more, each cubic polynomial is found again."""
    positions = torch.linspace(-2, 3, count, dtype=torch.float64) ** 3
    wanted = torch.linspace(float(positions[0]), float(positions[-1]), 31, dtype=torch.float64)
    weights = beitv2.spline_weights(positions, wanted)
    for degree in range(min(4, count)):
        assert torch.allclose(weights @ positions**degree, wanted**degree, rtol=1e-9, atol=1e-9)
    assert torch.allclose(beitv2.spline_weights(positions, positions), torch.eye(count, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("size", [48, 16])
def test_tables_and_embeddings_are_resized_on_loading(size):
    old = tiny_mim(abs_pos_embed=True)
    new = tiny(abs_pos_embed=True, rel_pos_bias="per_block", image_size=size)
    report = load_pretrained(new, old.state_dict())
    assert sorted(report.resized) == [f"blocks.{i}.attn.{TABLE}" for i in range(3)] + ["pos_embed"]
    assert set(report.resized) < set(report.loaded) == set(new.state_dict())
    for block in new.blocks:
        assert torch.equal(block.attn.relative_position_bias_table[-3:], old.rel_pos_bias.relative_position_bias_table[-3:])
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0])
    assert new(images(size=size)).isfinite().all()


# --- load_pretrained: what does not fit --------------------------------------------------------------------------


def test_an_unknown_tensor_is_an_error_that_names_it():
    with pytest.raises(ModelError, match=r"holds tensors that this model does not have: foreign\.weight"):
        load_pretrained(tiny(), tiny().state_dict() | {"foreign.weight": torch.ones(2)})


def test_a_missing_tensor_is_an_error_that_names_it():
    state = tiny().state_dict()
    del state["blocks.1.norm2.bias"]
    with pytest.raises(ModelError, match=r"lacks tensors that this model needs: blocks\.1\.norm2\.bias"):
        load_pretrained(tiny(), state)


def test_another_depth_width_codebook_or_head_count():
    cases = [(tiny(depth=2), tiny(), "blocks.2."), (tiny(embed_dim=8), tiny(), "cls_token"),
             (tiny_mim(vocab_size=12), tiny_mim(), "lm_head.weight"),
             (tiny(rel_pos_bias="per_block", num_heads=4), tiny(rel_pos_bias="per_block"), TABLE),
             (tiny(patch_size=16), tiny(), "patch_embed.proj.weight")]
    for model, other, name in cases:
        with pytest.raises(ModelError, match=re.escape(name)):
            load_pretrained(model, other.state_dict())


def test_position_bias_is_not_dropped_in_silence():
    """A model without position bias must refuse a checkpoint with one: its outputs would be others."""
    with pytest.raises(ModelError, match=TABLE):
        load_pretrained(tiny(), tiny_mim().state_dict())


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.ones(1, 1, 1, 16), torch.ones(0)])
def test_a_tensor_of_another_rank_is_an_error_that_names_it(value):
    with pytest.raises(ModelError, match="cls_token"):
        load_pretrained(tiny(), tiny().state_dict() | {"cls_token": value})


@pytest.mark.parametrize("table", [torch.ones(2, 2), torch.ones(20, 2), torch.ones(19, 2)])
def test_a_bias_table_that_is_no_square_is_an_error(table):
    model = tiny(rel_pos_bias="per_block")
    with pytest.raises(ModelError, match=TABLE):
        load_pretrained(model, model.state_dict() | {f"blocks.0.attn.{TABLE}": table})


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {}}, {"state": {}, "param_groups": []},
                                     {0: torch.ones(2)}, {"model": {("a", 1): torch.ones(2)}}])
def test_a_dictionary_without_named_tensors_is_an_error(content):
    with pytest.raises(ModelError):
        load_pretrained(tiny(), content, source="it.pth")


# --- checkpoint files --------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [lambda x, path: torch.save(x, path), lambda x, path: path.write_bytes(pickle.dumps(x)),
                                   lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False)],
                         ids=["zip", "pickle", "legacy"])
def test_a_checkpoint_cannot_run_code(write, tmp_path):
    file, payload = tmp_path / "evil.pth", tmp_path / "it-ran"
    write({"model": tiny().state_dict(), "args": Bomb(payload)}, file)
    with pytest.raises(ModelError, match="evil.pth"):
        read_checkpoint(file)
    assert not payload.exists()
    pickle.loads(pickle.dumps(Bomb(payload)))
    assert payload.exists()  # so this would have been seen


def test_a_file_that_is_missing_or_a_folder(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(ModelError, match=re.escape(str(path))):
            read_checkpoint(path)


def bytes_of(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_checkpoint(zipped, tmp_path):
    """Wherever it was cut, it is a ModelError and no other. In the older format the beginning of a type's name may be
    the last that is there ("collections.Order"), and is no other program's type."""
    whole = bytes_of({"args": argparse.Namespace(lr=0.1), "model": tiny(depth=1).state_dict()},
                     _use_new_zipfile_serialization=zipped)
    file = tmp_path / "cut.pth"
    names = [whole.find(name) for name in (b"argparse", b"collections", b"torch._utils")]
    for end in [len(whole) * share // 60 for share in range(60)] + [at + more for at in names for more in range(24)]:
        file.write_bytes(whole[:end])
        with pytest.raises(ModelError, match="cut.pth' cannot be read as a checkpoint; it is truncated"):
            read_checkpoint(file)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"total 5\n", b"<!DOCTYPE html><html></html>", b"\x89PNG\r\n\x1a\n" + bytes(50),
                                     b"PK\x03\x04" + bytes(50), b"]a.", b".", pickle.dumps([1, 2]),
                                     bytes_of(torch.ones(3)), bytes_of([torch.ones(3)])])
def test_a_file_that_is_no_checkpoint(content, tmp_path):
    (tmp_path / "foreign.pth").write_bytes(content)
    with pytest.raises(ModelError, match="foreign.pth") as error:
        read_checkpoint(tmp_path / "foreign.pth")
    assert "()" not in str(error.value)  # there is a reason


class Own:
    """A class of another program."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("thing, kind", [
    (np.ones(3), r"numpy\._?core\.multiarray\._reconstruct"), (Path("x"), r"pathlib\S*\.PosixPath"),
    (Own(), r"\S+\.Own"),
    (np.str_("x"), r"numpy\.dtypes?\.\S+"), (torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
], ids=lambda value: type(value).__name__)
def test_objects_of_another_program_are_named(thing, kind, zipped, tmp_path):
    """The file is whole, so nobody should download it again; and what PyTorch advises must not be advised."""
    (tmp_path / "x.pt").write_bytes(bytes_of({"model": tiny().state_dict(), "extra": [thing]},
                                             _use_new_zipfile_serialization=zipped))
    with pytest.raises(ModelError) as error:
        read_checkpoint(tmp_path / "x.pt")
    assert re.fullmatch(rf"'\S+/x\.pt' holds objects of another program \({kind}\), which are not read: keep its "
                        r"tensors alone, with torch\.save\(\{'model': model\.state_dict\(\)\}, PATH\) where that program runs",
                        str(error.value))


@pytest.mark.filterwarnings("ignore")  # torch has deprecated it
def test_a_torchscript_archive_is_named(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"objects of another program \(TorchScript\)"):
        read_checkpoint(tmp_path / "x.pt")


OURS = {"size": "base", "embed_dim": 16, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize("config", [
    None, "base.yaml", 7, [1], argparse.Namespace(model=OURS), {}, {"lr": 0.1}, {"model": None}, {"model": "beit_base"},
    {"model": argparse.Namespace(**OURS)}, {"model": {}}, {"model": {"arch": "vit", "depth": 12}},
    {"model": OURS | {"size": "huge"}}, {"model": OURS | {"size": None}}, {"model": OURS | {"size": ["base"]}},
    {"model": OURS | {"depth": "12"}}, {"model": OURS | {"num_heads": [12]}}, {"model": OURS | {"embed_dim": 16.0}},
    {"model": OURS | {"num_heads": True}}, {"model": OURS | {"depth": 0}},
    {"model": {name: value for name, value in OURS.items() if name != "num_heads"}},
], ids=str)
def test_a_configuration_of_another_program_is_none(config, tmp_path):
    torch.save({"model": tiny().state_dict(), "config": config}, tmp_path / "x.pt")
    content = beitv2.read_model(tmp_path / "x.pt", "model", ModelConfig(size="tiny"))  # with another number of heads
    assert content.keys() == {"model", "config"} and beitv2.saved_section(content, "model") is None


def test_a_configuration_of_ours_is_compared(tmp_path):
    config = {"model": OURS, "finetune": {"pooling": "cls"}, "tokenizer": "x"}
    torch.save({"model": {}, "config": config}, tmp_path / "x.pt")
    content = beitv2.read_model(tmp_path / "x.pt", "model", ModelConfig(**OURS))
    assert beitv2.saved_section(content, "model") == OURS
    assert beitv2.saved_section(content, "finetune") == {"pooling": "cls"}
    assert beitv2.saved_section(content, "tokenizer") is None
    with pytest.raises(ModelError, match=r"another model \(model.num_heads=2 there, model.num_heads=4 here\)"):
        beitv2.read_model(tmp_path / "x.pt", "model", ModelConfig(**OURS | {"num_heads": 4}))
    foreign = {"config": {"model": {"arch": "vit"}, "finetune": {"pooling": "avg"}}}
    assert beitv2.saved_section(foreign, "finetune") is None  # nothing there is of ours


def test_without_numpy_plain_checkpoints_can_be_read(tmp_path, monkeypatch):
    torch.save({"model": {"weight": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "plain.pth")
    monkeypatch.setitem(sys.modules, "numpy", None)  # as if it were not installed
    assert read_checkpoint(tmp_path / "plain.pth")["args"].lr == 0.1


def with_numpy_module(content, module: bytes, zipped: bool) -> bytes:
    """A checkpoint as another numpy wrote it: 1.x called the module numpy.core, 2.x calls it numpy._core."""
    data = bytes_of(content, _use_new_zipfile_serialization=zipped)
    if not zipped:
        return re.sub(rb"numpy\._?core", module, data)
    renamed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(renamed, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, re.sub(rb"numpy\._?core", module, part) if name.endswith("data.pkl") else part)
    return renamed.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("scalar", [np.float64(0.5), np.float32(0.5), np.int64(3), np.int32(3), np.bool_(True)], ids=lambda s: s.dtype.name)
def test_training_arguments_in_official_files(scalar, module, zipped, tmp_path):
    """Official files hold argparse.Namespace and numpy scalars, pickled by whichever numpy was there."""
    content = {"model": tiny().state_dict(), "args": argparse.Namespace(lr=scalar, betas=[scalar, 1.0], name="x")}
    data = with_numpy_module(content, module, zipped)
    assert module + b".multiarray" in data
    (tmp_path / "official.pth").write_bytes(data)
    loaded = read_checkpoint(tmp_path / "official.pth")
    assert loaded["args"].lr == scalar and loaded["args"].name == "x"
    assert load_pretrained(tiny(), loaded).loaded


def test_weights_that_are_not_finite_are_refused():
    """The run that wrote them has failed. As a tokenizer they would give every patch the same code."""
    model = beitv2.VisionTransformer(8, 4, 8, 1, 2)
    state = model.state_dict()
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].clone()
    state["blocks.0.mlp.fc1.weight"][0, 0] = math.nan
    with pytest.raises(beitv2.ModelError, match="x.pt' holds numbers that are not finite, in blocks.0.mlp.fc1.weight:"):
        beitv2.load_pretrained(model, state, source="x.pt")
