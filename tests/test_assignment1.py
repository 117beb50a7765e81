"""Assignment 1: attention with relative position bias."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import beitv2  # noqa: E402

pytestmark = pytest.mark.assignment(1)


def randomised(module: nn.Module) -> nn.Module:
    """Fresh biases and tables are zero, and a mistake could hide behind them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return module.eval()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# -- relative_position_index --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [1, 2, 3, 5])
def test_the_index_has_a_row_of_the_table_for_each_pair_of_tokens(grid):
    index, tokens, rows = beitv2.relative_position_index(grid), 1 + grid**2, (2 * grid - 1) ** 2 + 3
    assert index.shape == (tokens, tokens), \
        f"for a grid of {grid} x {grid} patches the index should be [{tokens}, {tokens}], but is {list(index.shape)}"
    assert index.dtype == torch.int64, f"the index should be int64, but is {index.dtype}"
    assert index.min() >= 0 and index.max() < rows, \
        f"the index should lie in 0 ... {rows - 1}, but goes from {index.min()} to {index.max()}: " \
        f"are the differences shifted by grid - 1?"
    assert grid == 1 or len(index.unique()) == rows, \
        f"each of the {rows} rows of the table should be used, but only {len(index.unique())} are: do two different " \
        f"offsets share a row?"


@pytest.mark.parametrize("grid", [2, 4])
def test_the_index_of_two_patches_says_how_far_apart_they_are(grid):
    """Row by row, as in published checkpoints: (rows apart + grid - 1) * (2 grid - 1) + columns apart + grid - 1."""
    index, side = beitv2.relative_position_index(grid), 2 * grid - 1
    for query in range(grid**2):
        for key in range(grid**2):
            down, right = query // grid - key // grid, query % grid - key % grid
            expected, found = (down + grid - 1) * side + right + grid - 1, index[1 + query, 1 + key].item()
            assert found == expected, \
                f"query patch {query} lies {down} rows and {right} columns from key patch {key} on a grid of {grid}, " \
                f"so their index should be {expected}, but is {found}: query minus key, and (2 grid - 1) indices a row?"


def test_the_last_three_rows_belong_to_cls():
    index, first = beitv2.relative_position_index(3), 25
    for name, part, expected in (("from [CLS] to a patch", index[0, 1:], first),
                                 ("from a patch to [CLS]", index[1:, 0], first + 1),
                                 ("from [CLS] to itself", index[:1, 0], first + 2)):
        assert (part == expected).all(), \
            f"{name} the index should be {expected} for a grid of 3, but is {part.unique().tolist()}"


# -- VisionTransformer.position_bias ------------------------------------------------------------------------------


def test_the_bias_of_a_pair_is_its_row_of_the_table():
    """A model without a table of its own, given a small index: two tokens, four rows, three heads."""
    model = beitv2.VisionTransformer(image_size=4, patch_size=4, embed_dim=6, depth=1, num_heads=3)
    model.relative_position_index = torch.tensor([[0, 1], [2, 3]])
    table = torch.randn(4, 3)
    bias = model.position_bias(table)
    assert bias.shape == (1, 3, 2, 2), f"the bias should be [1, heads, T, T] = [1, 3, 2, 2], but is {list(bias.shape)}"
    for query in range(2):
        for key in range(2):
            assert torch.equal(bias[0, :, query, key], table[2 * query + key]), \
                f"the bias of query {query} and key {key} should be row {2 * query + key} of the table, a number for " \
                f"each head, but is another: are queries and keys exchanged?"


# -- Attention ----------------------------------------------------------------------------------------------------


def test_queries_keys_and_values_come_head_by_head():
    attention = randomised(beitv2.Attention(dim=6, num_heads=2))
    x = torch.randn(3, 5, 6)
    found = attention.queries_keys_values(x)
    assert found.shape == (3, 3, 2, 5, 3), \
        f"queries, keys and values should be [3, B, heads, T, D / heads] = [3, 3, 2, 5, 3], but are {list(found.shape)}"
    biases = {"queries": attention.q_bias, "keys": torch.zeros(6), "values": attention.v_bias}
    for i, (name, bias) in enumerate(biases.items()):
        rows = attention.qkv.weight[6 * i:6 * i + 6]  # the published order: all of q, then all of k, then all of v
        for head in range(2):
            part = slice(3 * head, 3 * head + 3)
            expected = x @ rows[part].T + bias[part]
            assert torch.allclose(found[i, :, head], expected, atol=1e-4), \
                f"the {name} of head {head} should be x times rows {6 * i + part.start} to {6 * i + part.stop - 1} " \
                f"of qkv.weight plus {'no bias' if name == 'keys' else f'{name[0]}_bias'}, but differ by " \
                f"{difference(found[i, :, head], expected):.2g}"


def stub_of_queries(attention: beitv2.Attention, *qkv: torch.Tensor) -> beitv2.Attention:
    """Attention that computes these queries, keys and values, and passes on its output as it is."""
    attention.queries_keys_values = lambda x: torch.stack(qkv)
    attention.proj = nn.Identity()
    return attention


def test_attention_is_the_formula():
    torch.manual_seed(0)
    q, k, v, bias = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4), torch.randn(1, 3, 5, 5)
    attention = stub_of_queries(beitv2.Attention(dim=12, num_heads=3), q, k, v)
    logits = q @ k.transpose(-2, -1) / math.sqrt(4)
    for name, given, expected in (
            ("without a bias", None, logits.softmax(-1) @ v),
            ("with a position bias", bias, (logits + bias).softmax(-1) @ v)):
        found = attention(torch.zeros(2, 5, 12), given)
        assert found.shape == (2, 5, 12), \
            f"attention should return [B, T, D] = [2, 5, 12], but returns {list(found.shape)}"
        expected = torch.cat([expected[:, head] for head in range(3)], dim=-1)  # the heads side by side
        assert torch.allclose(found, expected, atol=1e-5), \
            f"{name}, attention should be softmax(q k^T / sqrt(D / heads) + bias) v with the heads side by side, but " \
            f"differs by {difference(found, expected):.2g}"


def test_a_bias_can_forbid_a_token():
    """A bias of -1e4 towards token 3 hides that token from all queries."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    attention = stub_of_queries(beitv2.Attention(dim=4, num_heads=1), q, k, v)
    bias = torch.zeros(1, 1, 5, 5)
    bias[..., 3] = -1e4
    before = attention(torch.zeros(1, 5, 4), bias)
    v[..., 3, :] += 100
    moved = difference(attention(torch.zeros(1, 5, 4), bias), before)
    assert moved < 1e-4, \
        f"a bias of -10000 towards token 3 should hide its value from all queries, but the output moves " \
                         f"by {moved:.2g}: is the bias added to the logits, and does its last dimension count keys?"


def test_the_output_goes_through_the_projection():
    attention = randomised(beitv2.Attention(dim=4, num_heads=1))
    q, k, v = torch.zeros(3, 1, 1, 2, 4)
    v = v + torch.arange(4.0)
    attention.queries_keys_values = lambda x: torch.stack([q, k, v])
    expected = attention.proj(torch.arange(4.0))
    found = attention(torch.zeros(1, 2, 4), None)
    assert torch.allclose(found, expected.expand(1, 2, 4), atol=1e-5), \
        "the output of the heads should go through `proj`, but does not"


# -- Block --------------------------------------------------------------------------------------------------------


class Doubling(nn.Module):
    """Stands in for attention, and notes the bias that it is given."""

    def forward(self, x, position_bias):
        self.bias = position_bias
        return 2 * x.roll(1, dims=1)


@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
def test_a_block_adds_two_branches_to_its_input(layer_scale):
    block = randomised(beitv2.Block(dim=6, num_heads=2, layer_scale=layer_scale))
    block.attn = Doubling()
    x, bias = torch.randn(2, 5, 6), torch.randn(1, 2, 5, 5)
    gamma_1, gamma_2 = (block.gamma_1, block.gamma_2) if layer_scale else (1.0, 1.0)
    middle = x + gamma_1 * 2 * block.norm1(x).roll(1, dims=1)
    expected = middle + gamma_2 * block.mlp(block.norm2(middle))
    found = block(x, bias)
    assert torch.allclose(found, expected, atol=1e-4), \
        "a block should be x + gamma_1 * attn(norm1(x)), then x + gamma_2 * " \
        f"mlp(norm2(x)){'' if layer_scale else ', here without gammas'}, but differs by " \
        f"{difference(found, expected):.2g}: is each norm within its branch, and the input added after it?"
    assert block.attn.bias is bias, "the block should hand its position bias on to attention, but does not"


def test_drop_path_is_asked_for_both_branches():
    block = randomised(beitv2.Block(dim=6, num_heads=2, layer_scale=0.1))
    block.attn = Doubling()
    block.drop_path.forward = lambda branch: 0 * branch
    x = torch.randn(2, 5, 6)
    assert torch.equal(block(x), x), \
        "with drop_path dropping both branches the block should return its input, but does not: is drop_path around " \
        "each scaled branch, and around nothing else?"
