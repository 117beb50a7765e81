"""What pictures and charts say: which patch is hidden and which a hit, where a curve's points lie."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

CODE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CODE))
from support.charts import bar_chart, curves_of, line_chart, read_curves, scatter_chart, ticks  # noqa: E402
from support.page import cells, page  # noqa: E402
from support.pictures import HIT, MISS, heat_map, mask_picture, patch_with_context  # noqa: E402


def test_a_patch_with_its_surroundings():
    """Row 1, column 2 of 4-pixel patches: two pixels more on each side, and a frame around the patch."""
    image = torch.arange(256, dtype=torch.int64).view(1, 16, 16).expand(3, -1, -1).byte()
    picture = patch_with_context(image, 1, 2, 4, 4)
    assert picture.shape == (32, 32, 3)
    assert picture[0, 0, 0] == image[0, 2, 6] and picture[-1, -1, 0] == image[0, 9, 13]
    assert picture[16, 16, 0] == image[0, 6, 10]
    corner = patch_with_context(image, 0, 0, 4, 1)  # outside the image its edge goes on
    assert corner[0, 0, 0] == image[0, 0, 0]


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
            colour = HIT if hits[masked.tolist().index(place)] else MISS
            assert tuple(cells[1][1, 4]) == colour


def test_a_heat_map_is_brightest_where_the_value_is_largest():
    values = torch.tensor([[0.1, 0.2], [0.9, 0.3]])
    picture = heat_map(values, 4).astype(int)
    assert picture.shape == (8, 8, 3)
    brightness = picture.sum(axis=-1)[2::4, 2::4]
    assert (brightness.argsort(axis=None) == values.numpy().argsort(axis=None)).all()


# -- curves and the page


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


def test_bars_are_as_long_as_their_shares():
    chart = bar_chart("a & b", {"<own>": 0.4, "other": 0.1, "none": 0.0})
    lengths = [float(width) for width in re.findall(r'width="([\d.]+)" height="20"', chart)]
    assert lengths[0] > 100 and np.allclose(lengths, [lengths[0], lengths[0] / 4, 0], atol=0.1)
    assert "40.0 %" in chart and "&lt;own&gt;" in chart and "a &amp; b" in chart and "<own>" not in chart
    assert 'width="0.0"' in bar_chart("t", {"none": 0.0})


@pytest.mark.parametrize("low, high", [(0, 1), (0.00001, 0.0015), (2.3, 2.31), (0, 0), (-5, 1200)])
def test_ticks_are_few_round_numbers_inside(low, high):
    marks = ticks(low, high if high > low else low + 1)
    assert 2 <= len(marks) <= 8 and all(low - 1e-9 <= mark <= max(high, low + 1) + 1e-9 for mark in marks)


def test_a_scatter_has_a_mark_for_each_point_and_class():
    labels = torch.tensor([0, 1, 1, 2])
    chart = scatter_chart("f", torch.randn(4, 2), labels, ["a", "b", "<c>"])
    assert chart.count('fill-opacity=".75"') == 4 + 3 and "&lt;c&gt;" in chart and "<c>" not in chart


def test_a_scatter_without_labels_has_one_colour_and_no_legend():
    chart = scatter_chart("f", torch.randn(5, 2), torch.arange(5), [])
    assert chart.count('fill-opacity=".75"') == chart.count('fill="#0072B2"') == 5 and "<span>" not in chart



def test_each_figure_is_in_the_chart_of_its_kind(tmp_path):
    """Whatever its pooling is called; learning rates of the probe, and figures that images without labels lack, in none."""
    lines = [{"epoch": 0, "step": 1, "loss": 2.0, "mim_loss": 1.0, "commitment_loss": 5.0, "mim_accuracy": 0.5},
             {"epoch": 0, "step": 1, "train": {"loss": 1.5}, "val": {"knn_both": 0.3, "both": 0.4, "both_lr": 3.0,
              "perplexity": 60.0, "usage": 1.0, "cosine_loss": 0.8, "top1": None, "bag_knn": 0.2,
              "mim_accuracy": 0.1, "cls_accuracy": 0.3, "cls_accuracy_swapped": 0.2}}]
    (tmp_path / "a/some").mkdir(parents=True)
    (tmp_path / "a/some/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (stage, content), = curves_of([tmp_path / "a"])
    found = {re.search(r'class="title">([^<]*)<', chart)[1]: re.findall(r"</svg> ([^<]*)<", chart)
             for chart in content.split('<div class="chart">')[1:]}
    assert stage == "some" and found == {
        "Loss": ["loss", "mim_loss"], "Loss of epochs": ["loss", "val cosine_loss"], "Accuracy": ["mim_accuracy"],
        "Hidden codes named rightly": ["val mim_accuracy", "val cls_accuracy", "val cls_accuracy_swapped"],
        "Accuracy of epochs": ["val knn_both", "val both", "val bag_knn"], "Codes in use": ["val perplexity"],
        "Codebook usage": ["val usage"]}


def test_a_stage_without_steps_has_no_curves(tmp_path):
    for stage, line in (("knn", {"epoch": 0, "step": 0, "val": {"cls": 0.5}}), ("pretrain", {"epoch": 0, "step": 1, "loss": 1.0}),
                        ("tokenizer", {"epoch": 0, "step": 1, "loss": 1.0})):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text(json.dumps(line))
    assert [stage for stage, _ in curves_of([tmp_path])] == ["tokenizer", "pretrain"]


def test_the_page_needs_nothing_else():
    whole = page("a & b", [("One", "<p>x</p>")])
    assert "a &amp; b" in whole and not re.search(r'(src|href)="(?!data:|#)', whole) and "<script" not in whole


def test_a_cell_carries_its_picture_and_escapes_its_text():
    import base64
    import io
    from PIL import Image
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    text = cells([(picture, "<i> & 5 %"), (picture, "")], smallest=3, alternative='"patch"')
    assert "<i>" not in text and text.count("&lt;i&gt; &amp; 5 %") == 2 and 'alt="&quot;patch&quot;"' in text
    image = Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]*)"', text)[1])))
    shown = np.asarray(image)
    assert shown.shape == (6, 6, 3), "enlarged to twice the smallest width"
    assert (shown[::3, ::3] == picture).all() and (shown[2::3, 2::3] == picture).all()
