"""What the pictures say: which patch has which code, which token attends to which, where a curve's points lie."""

import html
import json
import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

CODE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CODE))
import data  # noqa: E402
import pretrain  # noqa: E402
import tokenizer as vqkd  # noqa: E402
import visualize  # noqa: E402
from beitv2 import MaskedImageModel, VisionTransformer  # noqa: E402
from support.compare import read_curves  # noqa: E402
from support.datasets import Shapes  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.pictures import HIT, heat_map, line_chart, mask_picture, page, patch_with_context, scatter_chart, ticks, token_map  # noqa: E402


def config(**options):
    return types.SimpleNamespace(pretrain=pretrain.PretrainConfig(num_masked=5, min_block=2),
                                 visualize=visualize.VisualizeConfig(**options),
                                 data=data.DataConfig("shapes", image_size=16))


# -- codes --------------------------------------------------------------------------------------------------------


def test_examples_of_a_code_are_patches_that_have_it():
    """From as many images as possible: of ten images that all have the code twice, ten examples are one from each."""
    ids = torch.randint(0, 5, (10, 4, 4), generator=torch.Generator().manual_seed(0)) + 10
    ids[:, 1, 2], ids[:, 3, 0] = 7, 7
    for count in (3, 10):
        places = visualize.examples_of(ids, 7, count)
        assert len(places) == count == len({image for image, _, _ in places})
        assert all(ids[place] == 7 for place in places)
    assert len(set(visualize.examples_of(ids, 7, 14))) == 14
    assert len(set(visualize.examples_of(ids, 7, 99))) == 20
    assert visualize.examples_of(ids, 8, 3) == []


def test_codes_to_show():
    ids = torch.tensor([[[3, 3], [3, 5]], [[5, 1], [9, 3]]])
    assert visualize.choose_codes(ids, visualize.VisualizeConfig(num_codes=2), 12) == [3, 5]
    chosen = visualize.choose_codes(ids, visualize.VisualizeConfig(choose="random"), 12)
    assert sorted(chosen) == [1, 3, 5, 9]
    assert visualize.choose_codes(ids, visualize.VisualizeConfig(codes=[11, 0]), 12) == [11, 0]
    with pytest.raises(UserError, match="code 12, and the codebook has 12"):
        visualize.choose_codes(ids, visualize.VisualizeConfig(codes=[12]), 12)


def test_shares_of_classes():
    ids = torch.zeros(3, 2, 2, dtype=torch.int64)
    ids[0, 0], ids[1, 1, 1], ids[2, 0, 0] = 4, 4, 4
    shares = visualize.class_shares(ids, torch.tensor([2, 0, 2]), 4, 3)
    assert torch.allclose(shares, torch.tensor([0.25, 0, 0.75]))


def test_nearest_codes_are_those_of_the_highest_cosine():
    codebook = F.normalize(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [-1, 0]]), dim=1)
    (first, cosine), (second, zero) = visualize.nearest_codes(codebook, 0, 2)
    assert (first, second) == (1, 2) and cosine == pytest.approx(0.9 / math.hypot(0.9, 0.1)) and zero == pytest.approx(0)


def test_colours_belong_to_codes_for_good():
    codebook = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    colours = visualize.code_colours(codebook)
    assert colours.shape == (50, 3) and len({tuple(colour) for colour in colours}) == 50
    assert (colours == visualize.code_colours(codebook.clone())).all()
    picture = token_map(torch.tensor([[1, 2], [2, 3]]), colours, 3)
    assert picture.shape == (6, 6, 3) and (picture[:3, 3:] == colours[2]).all() and (picture[3:, 3:] == colours[3]).all()


def test_a_patch_with_its_surroundings():
    """Row 1, column 2 of 4-pixel patches: two pixels more on each side, and a frame around the patch."""
    image = torch.arange(256, dtype=torch.int64).view(1, 16, 16).expand(3, -1, -1).byte()
    picture = patch_with_context(image, 1, 2, 4, 4)
    assert picture.shape == (32, 32, 3)
    assert picture[0, 0, 0] == image[0, 2, 6] and picture[-1, -1, 0] == image[0, 9, 13]
    assert picture[16, 16, 0] == image[0, 6, 10]
    corner = patch_with_context(image, 0, 0, 4, 1)  # outside the image its edge goes on
    assert corner[0, 0, 0] == image[0, 0, 0]


def test_the_mean_patch_of_a_code():
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    ids = torch.tensor([[[0, 1], [0, 0]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]])
    expected = (images[0, :, :4, 4:].float() + images[1, :, :4, :4].float()) / 2
    assert torch.equal(visualize.mean_patch(images, ids, 1, 4), expected)


# -- predictions --------------------------------------------------------------------------------------------------


def test_hits_and_beliefs_are_those_of_the_model():
    torch.manual_seed(0)
    model = MaskedImageModel(vocab_size=9, early_layers=1, head_layers=1, image_size=16, patch_size=4, embed_dim=16,
                             depth=2, num_heads=2, rel_pos_bias="shared").eval()
    images, ids = torch.randint(0, 256, (3, 3, 16, 16)).byte(), torch.randint(0, 9, (3, 4, 4))
    said = visualize.predict_masked(model, images, ids, config())
    assert said.masked.shape == (3, 5) and said.top.shape == said.share.shape == (3, 5, 5)
    logits, head_logits = model(data.normalize(images / 255), said.masked)
    for i in range(3):
        for m in range(5):
            place = int(said.masked[i, m])
            assert said.truth[i, m] == ids[i, place // 4, place % 4]
            assert said.hits["backbone"][i, m] == (logits[i, m].argmax() == said.truth[i, m])
            assert said.hits["aggregation head"][i, m] == (head_logits[i, m].argmax() == said.truth[i, m])
            assert said.top[i, m].tolist() == logits[i, m].argsort(descending=True)[:5].tolist()
    assert torch.allclose(said.share, logits.softmax(dim=-1).gather(2, said.top), atol=1e-6)


def test_masks_and_hits_are_painted_where_they_are():
    image = torch.full((3, 16, 16), 77, dtype=torch.uint8)
    masked, hits = torch.tensor([1, 6, 15]), torch.tensor([True, False, True])
    grey = mask_picture(image, masked, None, 4, 2)
    painted = mask_picture(image, masked, hits, 4, 2)
    for place in range(16):
        top, left = place // 4 * 8, place % 4 * 8
        cells = [picture[top:top + 8, left:left + 8] for picture in (grey, painted)]
        if place not in masked:
            assert (cells[0] == 77).all() and (cells[1] == 77).all()
        else:
            assert (cells[0] == 128).all()
            colour = HIT if hits[masked.tolist().index(place)] else pretrain.MISS
            assert tuple(cells[1][1, 4]) == colour


# -- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(rel_pos_bias="shared"), dict(rel_pos_bias="per_block"), dict(num_registers=2)])
def test_attention_is_that_of_the_block(options):
    """Values weighted by it, through the output projection, are what the block's attention gives."""
    torch.manual_seed(0)
    model = VisionTransformer(image_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, **options).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    images = torch.randn(2, 3, 16, 16)
    maps = visualize.attention_maps(model, images, 2)
    tokens = 17 + options.get("num_registers", 0)
    assert maps.shape == (2, 2, tokens, tokens) and torch.allclose(maps.sum(dim=-1), torch.ones(2, 2, tokens), atol=1e-5)
    given = []
    attention = model.blocks[1].attn
    attention.register_forward_hook(lambda _, inputs, output: given.append((inputs[0], output)))
    model.features(images)
    x, output = given[0]
    _, _, values = attention.queries_keys_values(x)
    assert torch.allclose(attention.proj((maps @ values).transpose(1, 2).flatten(2)), output, atol=1e-4)


def test_a_heat_map_is_brightest_where_the_value_is_largest():
    values = torch.tensor([[0.1, 0.2], [0.9, 0.3]])
    picture = heat_map(values, 8).astype(int)
    assert picture.shape == (8, 8, 3)
    brightness = picture.sum(axis=-1)[2::4, 2::4]
    assert (brightness.argsort(axis=None) == values.numpy().argsort(axis=None)).all()


# -- pixels, features ---------------------------------------------------------------------------------------------


def test_the_pixel_decoder_learns_what_codes_say():
    """A tokenizer whose codes are the brightness of patches: after a few steps the decoder paints that brightness."""
    class Brightness(torch.nn.Module):
        grid = 4  # and no `encoder`: a TeacherTokenizer has none

        def __init__(self):
            super().__init__()
            self.quantize = types.SimpleNamespace(embedding=torch.nn.Embedding(4, 6))
            self.quantize.embedding.weight.requires_grad_(False)

        def token_ids(self, images):
            return (F.avg_pool2d(images.mean(dim=1), 4) * 3.999).long().flatten(1)

    torch.manual_seed(0)
    tokenizer = Brightness()
    view = data.TrainView(Shapes("train", 64, 16), 0, 16, (0.7, 1.0))
    decoder = visualize.train_pixel_decoder(tokenizer, view, 120, torch.device("cpu"))
    ids = torch.tensor([[[0, 3], [3, 0]]]).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    painted = decoder(F.embedding(ids, tokenizer.quantize.embedding.weight).permute(0, 3, 1, 2))[0].mean(dim=0)
    dark, bright = painted[:8, :8].mean(), painted[:8, 8:].mean()
    assert painted.shape == (16, 16) and bright > dark + 0.2


def test_principal_components_keep_the_most_of_the_variance():
    torch.manual_seed(0)
    features = torch.randn(100, 6) * torch.tensor([5.0, 3.0, 1, 1, 1, 1]) + 7
    points = visualize.principal_components(features)
    eigenvalues = torch.linalg.eigvalsh(features.T.cov()).flip(0)
    assert torch.allclose(points.T.cov(), torch.diag(eigenvalues[:2]), atol=1e-2)


def test_nearest_images():
    features = torch.tensor([[1.0, 0], [10, 1], [0, 1], [-1, 0], [1, 1]])
    assert visualize.nearest_images(features, 0, 3) == [1, 4, 2]


@pytest.mark.parametrize("teacher", ["hog", "pixels"])
def test_a_teacher_without_attention_is_left_out(teacher):
    wanted = config()
    wanted.device, wanted.threads, wanted.tokenizer = "cpu", 0, vqkd.TokenizerConfig(teacher=teacher)
    wanted.model = types.SimpleNamespace(patch_size=4)
    with pytest.raises(UserError, match=f"the teacher is {teacher}, which has no attention"):
        visualize.Models(wanted, types.SimpleNamespace(images=torch.zeros(1))).teacher()


# -- curves and the page ------------------------------------------------------------------------------------------


def test_curves_are_the_numbers_of_the_file(tmp_path):
    lines = [{"epoch": 0, "step": 20, "loss": 2.0, "lr": 0.1}, {"epoch": 0, "step": 40, "loss": 1.0, "lr": 0.2},
             {"epoch": 0, "step": 40, "train": {"loss": 1.5}, "val": {"top1": 0.25}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_curves(tmp_path) == {"step": {"loss": [(20, 2.0), (40, 1.0)], "lr": [(20, 0.1), (40, 0.2)]},
                                               "epoch": {"loss": [(1, 1.5)], "val top1": [(1, 0.25)]}}


def test_a_chart_puts_points_where_its_ticks_say():
    """Read the picture as a person does: by its ticks, a curve's points have their values."""
    points = [(0.0, 10.0), (50.0, 30.0), (100.0, 20.0)]
    svg = line_chart("Loss & more", {"a<b": points, "gap": [(0, math.nan)]}, "step", "loss")
    assert "Loss &amp; more" in svg and "a&lt;b" in svg and "gap" not in svg
    x_ticks = {float(text): float(x) for x, text in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([\d.]+)<', svg)}
    y_ticks = {float(text): float(y) - 4 for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)}
    assert len(x_ticks) >= 3 and len(y_ticks) >= 3

    def read(ticks, place):
        (a, at_a), (b, at_b) = min(ticks.items()), max(ticks.items())
        return a + (place - at_a) / (at_b - at_a) * (b - a)

    path = re.search(r'<path d="M([^"]*)" class="curve"', svg)[1]
    drawn = [tuple(map(float, place.split())) for place in path.split(" L")]
    read_back = [(read(x_ticks, x), read(y_ticks, y)) for x, y in drawn]
    assert np.allclose(read_back, points, atol=0.3)


@pytest.mark.parametrize("low, high", [(0, 1), (0.00001, 0.0015), (2.3, 2.31), (0, 0), (-5, 1200)])
def test_ticks_are_few_round_numbers_inside(low, high):
    marks = ticks(low, high if high > low else low + 1)
    assert 2 <= len(marks) <= 8 and all(low - 1e-9 <= mark <= max(high, low + 1) + 1e-9 for mark in marks)


def test_a_scatter_has_a_mark_for_each_point_and_class():
    labels = torch.tensor([0, 1, 1, 2])
    chart = scatter_chart("f", torch.randn(4, 2), labels, ["a", "b", "<c>"])
    assert chart.count('fill-opacity=".75"') == 4 + 3 and "&lt;c&gt;" in chart and "<c>" not in chart


def test_the_page_needs_nothing_else():
    whole = page("a & b", [("One", "<p>x</p>")])
    assert "a &amp; b" in whole and not re.search(r'(src|href)="(?!data:|#)', whole) and "<script" not in whole
