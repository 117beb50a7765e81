"""Segmentation: annotations read and refused, joint augmentation, UperNet's shapes, sliding windows, mIoU.

Its runs, alone and in two processes, are in test_scripts.py.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

CODE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CODE))
import data  # noqa: E402
import segment  # noqa: E402
from beitv2 import ModelError  # noqa: E402
from support.datasets import SHAPES, found  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.pictures import paint, palette  # noqa: E402

IGNORE = segment.IGNORE


def config(root="", **options):
    defaults = dict(classes=["road", "tree", "sky"], crop_size=16, short_side=24, long_side=48)
    cfg = segment.SegmentConfig(**defaults | options)
    return types.SimpleNamespace(data=data.DataConfig("ade20k", root=str(root), workers=0), segment=cfg)


def write(root: Path, name="a", image=None, labels=None, split="training", ending=".jpg", **save) -> tuple[Path, Path]:
    """An image and its annotation: by default 24 x 32, its left half road, its right half tree."""
    labels = np.repeat([[0] * 16 + [1] * 16], 24, axis=0).astype(np.uint8) if labels is None else labels
    image = Image.fromarray(np.full((*labels.shape[:2], 3), 90, np.uint8)) if image is None else image
    paths = root / "images" / split / f"{name}{ending}", root / "annotations" / split / f"{name}.png"
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    image.save(paths[0], **save)
    Image.fromarray(labels).save(paths[1])
    return paths


def dataset(root: Path, **options) -> segment.AnnotatedFolder:
    return segment.AnnotatedFolder(str(root), "training", config(root, **options).segment)


# -- annotations --------------------------------------------------------------------------------------------------


def test_labels_as_they_stand(tmp_path):
    values = np.array([[0, 1, 2], [255, 2, 1]], np.uint8)
    write(tmp_path, labels=values)
    assert dataset(tmp_path).segmentation(0).tolist() == [[0, 1, 2], [IGNORE, 2, 1]]


def test_zero_as_unlabelled_and_another_number_to_ignore(tmp_path):
    write(tmp_path, labels=np.array([[0, 1, 2], [3, 255, 1]], np.uint8))
    assert dataset(tmp_path, reduce_zero_label=True).segmentation(0).tolist() == [[IGNORE, 0, 1], [2, IGNORE, 0]]
    write(tmp_path, labels=np.array([[0, 1, 11]], np.uint8))
    assert dataset(tmp_path, ignore_index=11).segmentation(0).tolist() == [[0, 1, IGNORE]]


def test_a_palette_png_holds_its_indices(tmp_path):
    _, path = write(tmp_path)
    mask = Image.fromarray(np.array([[2, 0], [1, 1]], np.uint8), mode="P")
    mask.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    mask.save(path)
    assert dataset(tmp_path).segmentation(0).tolist() == [[2, 0], [1, 1]]


@pytest.mark.parametrize("value, options, shown", [(3, {}, 3), (254, {}, 254), (4, {"reduce_zero_label": True}, 4)])
def test_a_label_outside_the_classes_names_the_file(tmp_path, value, options, shown):
    _, path = write(tmp_path, labels=np.array([[0, 1, value]], np.uint8))
    with pytest.raises(UserError, match=f"{path}' has the label {shown}, but segment.classes names 3"):
        dataset(tmp_path, **options).segmentation(0)


def test_annotations_that_are_none(tmp_path):
    _, path = write(tmp_path)
    Image.new("RGB", (32, 24)).save(path)
    with pytest.raises(UserError, match=f"{path}' is a colour picture"):
        dataset(tmp_path).segmentation(0)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=f"annotation '{path}' cannot be read"):
        dataset(tmp_path).segmentation(0)


def test_an_annotation_of_another_size_names_the_image(tmp_path):
    image, path = write(tmp_path)
    Image.new("L", (31, 24)).save(path)
    with pytest.raises(UserError, match=f"{image}' has 32 x 24 pixels, but its annotation has 31 x 24"):
        segment.CropSamples(dataset(tmp_path), 0, config().segment)[0, 0]
    with pytest.raises(UserError, match="31 x 24"):
        segment.WholeSamples(dataset(tmp_path), config().segment)[0]


def test_missing_annotations_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match=f"no folder '{tmp_path}/images/training'"):
        dataset(tmp_path)
    write(tmp_path, "a")
    _, path = write(tmp_path, "b")
    path.unlink()
    with pytest.raises(UserError, match="1 of 2 images .* the first is 'b.jpg': put b.png into"):
        dataset(tmp_path)
    for file in (tmp_path / "images/training").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="images/training' holds no image"):
        dataset(tmp_path)


def test_pictures_of_every_kind(tmp_path):
    """Grey, CMYK, 16 bits, and an animated GIF that calls itself a JPEG: each becomes RGB with the same brightness."""
    grey = Image.fromarray(np.full((24, 32), 90, np.uint8))
    write(tmp_path, "a", grey)
    write(tmp_path, "b", Image.fromarray(np.full((24, 32, 3), 90, np.uint8)).convert("CMYK"))
    write(tmp_path, "c", Image.fromarray(np.full((24, 32), 90 * 257, np.uint16)), ending=".png")
    write(tmp_path, "d", grey, ending=".gif", save_all=True, append_images=[Image.new("L", (32, 24))])
    (tmp_path / "images/training/d.gif").rename(tmp_path / "images/training/d.jpg")
    images = dataset(tmp_path)
    assert len(images) == 4
    for i in range(4):
        sample = segment.WholeSamples(images, config().segment)[i]
        assert sample["image"].shape == (3, 24, 32) and (sample["image"].float() - 90).abs().max() <= 3, images.name(i)


def test_shapes_come_with_their_masks():
    given = types.SimpleNamespace(data=data.DataConfig("shapes", image_size=32, train_images=10, val_images=3),
                                  segment=segment.SegmentConfig())
    train_set, val_set = (segment.open_split(given, split) for split in ("train", "val"))
    assert len(val_set) == 3 and given.segment.classes == ["background", *SHAPES]
    for i in range(10):
        assert set(np.unique(train_set.segmentation(i))) == {0, 1 + train_set.label(i)}


def test_data_sets_without_masks_are_refused():
    given = types.SimpleNamespace(data=data.DataConfig("cifar10"), segment=segment.SegmentConfig())
    with pytest.raises(UserError, match="cifar10 has no masks"):
        segment.open_split(given, "train")
    with pytest.raises(UserError, match="segment.classes lists 0 names"):
        segment.open_split(config(classes=[]), "val")


# -- augmentation -------------------------------------------------------------------------------------------------


class Painted:
    """Images whose grey says the label: 60 for class 0, 120 for 1, 180 for 2, in columns of random width."""

    def __init__(self, height=40, width=56):
        edges = sorted(np.random.default_rng(0).integers(8, width - 8, 2))
        self.labels = np.zeros((height, width), np.uint8)
        self.labels[:, edges[0]:], self.labels[:height // 2, edges[1]:] = 1, 2

    def __len__(self):
        return 1

    def name(self, index):
        return "painted"

    def load(self, index):
        return torch.from_numpy(60 + 60 * self.labels).expand(3, -1, -1)

    def segmentation(self, index):
        return self.labels


def view(**options) -> segment.CropSamples:
    samples = segment.CropSamples(Painted(), 0, config(**options).segment)
    samples.distort = lambda image: image
    return samples


def test_image_and_labels_are_augmented_together():
    """Scaled, cropped and flipped alike: away from edges, which interpolation blurs, grey and label agree."""
    crops = [view(crop_size=16, short_side=40, long_side=80)[0, 0]]
    crops += [view(crop_size=16, short_side=40, long_side=80)[epoch, 0] for epoch in range(1, 30)]
    for crop in crops:
        assert crop["image"].shape == (3, 16, 16) and crop["labels"].shape == (16, 16)
        expected = 60 + 60 * crop["labels"].float()
        wrong = (crop["image"][0].float() - expected).abs() > 12
        assert wrong.float().mean() < 0.2
    assert len({bytes(crop["labels"].numpy()) for crop in crops}) > 20, "every epoch has a crop of its own"


def test_a_sample_is_the_same_whenever_it_is_drawn():
    first, again = (segment.CropSamples(Painted(), 0, config().segment)[3, 0] for _ in range(2))
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["labels"], again["labels"])
    other = segment.CropSamples(Painted(), 1, config().segment)[3, 0]
    assert not torch.equal(first["image"], other["image"])


def test_colours_are_distorted_in_the_image_only():
    changed = 0
    for epoch in range(20):  # each of the four changes has a chance of one half
        plain, distorted = view()[epoch, 0], segment.CropSamples(Painted(), 0, config().segment)[epoch, 0]
        assert torch.equal(plain["labels"], distorted["labels"])
        changed += not torch.equal(plain["image"], distorted["image"])
    assert 15 <= changed < 20


def test_small_images_are_padded_with_what_counts_for_nothing():
    """At the right and the bottom, with the mean colour: as in evaluation, where it is an exact 0."""
    for epoch in range(10):
        crop = segment.CropSamples(Painted(), 0, config(crop_size=128, short_side=40, long_side=56).segment)[epoch, 0]
        padding = crop["labels"] == IGNORE
        assert 0 < padding.float().mean() < 1 and not padding[:20, :20].any() and padding[-1].all()
        assert crop["image"][:, padding].unique(dim=1).tolist() == [[round(255 * mean)] for mean in data.IMAGENET_MEAN]


def test_no_class_fills_more_than_three_quarters_of_a_crop_if_ten_tries_find_one():
    """An image that is class 0 but for a corner: without the rule, most crops would hold nothing else."""
    view_ = view()
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:, 48:] = 1
    shares = []
    for seed in range(40):
        torch.manual_seed(seed)
        _, crop = view_.crop(torch.zeros(3, 64, 64, dtype=torch.uint8), labels)
        shares.append(crop.float().mean().item())
    assert np.mean([0.25 <= share <= 0.75 for share in shares]) > 0.8
    plain = np.mean([0.25 <= labels[:, left:left + 16].float().mean() <= 0.75 for left in range(49)])
    assert plain < 0.25
    labels[:, 48:] = IGNORE  # unlabelled pixels are no class: such a crop is as good as any other, and ends the tries
    assert view_.crop(torch.zeros(3, 64, 64, dtype=torch.uint8), labels)[1].shape == (16, 16)


def test_sizes_fit_into_the_sides_with_their_aspect():
    cfg = segment.SegmentConfig(short_side=512, long_side=2048)
    assert segment.scaled_size(256, 512, cfg) == [512, 1024]
    assert segment.scaled_size(100, 1000, cfg) == [205, 2048]  # the long side limits
    assert segment.scaled_size(512, 683, cfg, factor=0.5) == [256, 342]


# -- the model ----------------------------------------------------------------------------------------------------

TINY = dict(image_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2)


def tiny(**options) -> segment.Segmenter:
    torch.manual_seed(0)
    return segment.Segmenter(3, **dict(feature_layers=(0, 1, 2, 3), **TINY) | options)


def test_shapes_of_the_pyramid_and_the_logits():
    model, sizes = tiny(), []
    model.decode_head.register_forward_pre_hook(lambda _, given: sizes.extend(x.shape[-1] for x in given[0]))
    logits, auxiliary = model.train()(torch.randn(2, 3, 32, 32))
    assert sizes == [16, 8, 4, 2], "four times, twice, once and half the grid"
    assert logits.shape == auxiliary.shape == (2, 3, 32, 32)
    assert model.eval()(torch.randn(2, 3, 32, 32))[1] is None


def test_the_pyramid_takes_the_blocks_that_are_named():
    """Counted from 0, finest first; the auxiliary head looks at the third."""
    model = tiny(feature_layers=(3, 0, 1, 2)).eval()
    x, seen = torch.randn(1, 3, 32, 32), []
    model.pyramid[2].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(x)
    hidden = model.embed(x)
    for block in model.blocks[:3]:
        hidden = block(hidden)
    assert torch.allclose(seen[0].flatten(2).transpose(1, 2), hidden[:, 1:], atol=1e-6)


def test_feature_layers_that_the_backbone_has_not():
    with pytest.raises(ModelError, match="blocks from 0 to 3"):
        tiny(feature_layers=(0, 1, 2, 4))


def test_blocks_that_nothing_follows_from_do_not_train():
    """Else several ranks would wait for their gradients."""
    model = tiny(feature_layers=(0, 1, 1, 2)).train()
    logits, auxiliary = model(torch.randn(2, 3, 32, 32))
    (logits.sum() + auxiliary.sum()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (not name.startswith("blocks.3.")), name


def test_a_crop_of_one_patch_is_refused():
    with pytest.raises(ModelError, match="at least 16"):
        tiny(image_size=8)


def test_unlabelled_pixels_do_not_count_in_the_loss():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    labels[0, :2] = IGNORE
    loss = segment.segmentation_loss(logits, labels)
    picked = -logits.log_softmax(dim=1).gather(1, labels.long().clamp(max=2)[:, None])[:, 0]
    assert torch.allclose(loss, picked[labels != IGNORE].mean())
    loss.backward()
    assert not logits.grad[0, :, :2].any() and logits.grad[1].any()
    assert segment.segmentation_loss(logits, torch.full((2, 4, 4), IGNORE, dtype=torch.uint8)) == 0


# -- evaluation ---------------------------------------------------------------------------------------------------


def test_one_window_is_a_single_forward():
    """For images no larger than the crop, padding included."""
    model = tiny().eval()
    for height, width in ((32, 32), (20, 32), (9, 17)):
        image = torch.randn(3, height, width)
        padded = torch.zeros(1, 3, 32, 32)
        padded[0, :, :height, :width] = image
        expected = model(padded)[0][0, :, :height, :width]
        assert torch.equal(segment.sliding_window(lambda x: model(x)[0], image, 32, 20), expected)


@pytest.mark.parametrize("height, width, crop, stride", [(40, 70, 32, 20), (64, 33, 32, 32), (100, 100, 32, 7)])
def test_windows_cover_every_pixel_and_are_averaged(height, width, crop, stride):
    """A predictor that knows positions: with the image holding its own coordinates, the mean over windows is exact."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    image, corners = torch.stack([y, x, torch.ones_like(x)]), []

    def predict(windows):
        assert windows.shape[1:] == (3, crop, crop)
        corners.extend((int(window[0, 0, 0]), int(window[1, 0, 0])) for window in windows)
        return windows[:, :2]

    assert torch.allclose(segment.sliding_window(predict, image, crop, stride), image[:2], atol=1e-4)
    tops, lefts = ({corner[axis] for corner in corners} for axis in (0, 1))
    for starts, length in ((tops, height), (lefts, width)):
        assert max(starts) == max(0, length - crop), "the last window is flush with the border"
        assert sorted(starts)[:-1] == [stride * i for i in range(len(starts) - 1)]


def test_figures_agree_with_counting_pixel_by_pixel():
    generator = np.random.default_rng(0)
    labels, predictions = generator.integers(0, 5, (2, 30, 40))
    labels[:3] = IGNORE
    labels[labels == 3] = 2  # class 3 never occurs, but is predicted; class 5 neither
    confusion = segment.confusion_matrix(torch.tensor(labels), torch.tensor(predictions), 6)
    figures = segment.segmentation_figures(confusion)
    seen = labels != IGNORE
    ious, accuracies = [], []
    for c in range(5):
        true, found = (labels == c) & seen, (predictions == c) & seen
        ious.append((true & found).sum() / (true | found).sum())
        accuracies.append((true & found).sum() / true.sum() if true.any() else np.nan)
    assert abs(figures["miou"] - np.mean(ious)) < 1e-6
    assert abs(figures["mean_accuracy"] - np.nanmean(accuracies)) < 1e-6
    assert abs(figures["pixel_accuracy"] - (labels == predictions)[seen].mean()) < 1e-6
    assert np.allclose(figures["iou"][:5], ious) and figures["iou"][5].isnan() and figures["iou"][3] == 0


def test_the_schedule_rises_and_then_falls_to_zero():
    lr = segment.poly_schedule(2.0, iterations=100, warmup=10)
    assert len(lr) == 100 and lr[0] == 0 and lr[5] == pytest.approx(2 * 0.95 * 0.5)
    assert lr[50] == pytest.approx(1.0) and lr[99] == pytest.approx(0.02) and max(lr) == lr[10] == pytest.approx(1.8)


def test_overlays_show_image_truth_and_prediction(tmp_path):
    labels = torch.tensor([[0, 1], [IGNORE, 2]], dtype=torch.uint8)
    image = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    paint(tmp_path / "y.png", image, [labels, torch.tensor([[0, 1], [2, 2]])])
    picture = np.asarray(Image.open(tmp_path / "y.png")).astype(int)
    assert picture.shape == (2, 6, 3)
    assert (picture[:, :2] == 100).all() and (picture[1, 2] == 100).all(), "unlabelled pixels show the image"
    assert (picture[0, 2:4] == picture[0, 4:6]).all() and (picture[1, 4] == picture[1, 5]).all()
    assert len({tuple(colour) for colour in palette()[:150]}) == 150


# -- what is in the masks -------------------------------------------------------------------------------------------


def surveyed(root: Path, capsys, kind="training", **options) -> str:
    """What `survey` says of ROOT/annotations/training."""
    given = config(root, **options)
    run = types.SimpleNamespace(config=given, device=torch.device("cpu"))
    segment.survey(run, segment.AnnotatedFolder(str(root), "training", given.segment), kind)
    return capsys.readouterr().out


def test_classes_that_never_occur_and_ignored_pixels_are_said(tmp_path, capsys):
    write(tmp_path, "a", labels=np.array([[0, 0, 0, 255]] * 2, np.uint8))
    write(tmp_path, "b", labels=np.array([[0, 0, 2, 2]] * 2, np.uint8))
    said = surveyed(tmp_path, capsys)
    assert "training: 2 annotations have 2 of 3 classes, and 12.5 % of the pixels are ignored (255)" in said
    assert "no training pixel has the class 'tree'" in said and "'sky'" not in said
    write(tmp_path, "a", labels=np.array([[0, 0, 0, 1]] * 2, np.uint8))
    assert "note" not in surveyed(tmp_path, capsys)
    assert "25 % of the pixels are ignored (2)" in surveyed(tmp_path, capsys, ignore_index=2)


def test_binary_masks_of_0_and_255_are_refused(tmp_path, capsys):
    """255 is what counts for nothing: with it ignored there is one class only, which every model gets right."""
    two = dict(classes=["background", "lesion"])
    write(tmp_path, labels=np.array([[0, 0, 0, 255]] * 2, np.uint8))
    with pytest.raises(UserError, match="no class but 'background', and 25 % .* ignored .255.*must hold 0 and 1"):
        surveyed(tmp_path, capsys, **two)
    assert "no validation pixel has the class 'lesion'" in surveyed(tmp_path, capsys, "validation", **two)
    with pytest.raises(UserError, match="label 255, but .*masks of 0 and 255 must hold 0 and 1"):
        surveyed(tmp_path, capsys, ignore_index=254, **two)
    write(tmp_path, labels=np.array([[0, 0, 0, 1]] * 2, np.uint8))
    assert "2 of 2 classes" in surveyed(tmp_path, capsys, **two)


def test_a_validation_split_without_a_labelled_pixel_is_refused(tmp_path, capsys):
    write(tmp_path, labels=np.array([[0, 255]] * 2, np.uint8))
    with pytest.raises(UserError, match="validation annotations .*no labelled pixel, and 100 % .*255 and 0"):
        surveyed(tmp_path, capsys, "validation", reduce_zero_label=True)


def test_one_class_is_refused(tmp_path):
    with pytest.raises(UserError, match="'lesion' only, and one class cannot .*: name the background too"):
        segment.open_split(config(tmp_path, classes=["lesion"], reduce_zero_label=True), "train")


def test_two_classes_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="lists 'b' twice: give each class a name of its own"):
        segment.open_split(config(tmp_path, classes=["a", "b", "c", "b"]), "train")


def test_the_table_says_over_which_classes_its_mean_is(capsys):
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    confusion[0, 0], confusion[1, 1], confusion[0, 2] = 6, 2, 2  # the third is only predicted, the fourth not even that
    segment.print_table(confusion, [*"abcd"])
    said = capsys.readouterr().out
    assert "mIoU 58.33 % (mean over 3 of 4 classes: 2 that occur, and 1 that are only predicted)" in said
    segment.print_table(torch.eye(3, dtype=torch.int64), [*"abc"])
    assert "mIoU 100.00 %, mean" in capsys.readouterr().out


# -- photos that are stored turned ----------------------------------------------------------------------------------


def write_turned(root: Path, labels: np.ndarray, name="a", ending=".jpg", tag=6) -> tuple[Path, Image.Image]:
    """A photo that is dark above and light below, 24 x 32 upright, stored turned with an EXIF tag, and a mask."""
    upright = Image.fromarray(np.repeat([[[40] * 3], [[200] * 3]], 16, axis=0).repeat(24, axis=1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = tag
    stored = upright.transpose(Image.Transpose.ROTATE_90) if tag == 6 else upright
    return write(root, name, stored, labels, ending=ending, exif=exif, quality=95)[0], upright


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".tif"])
def test_an_exif_tag_turns_the_image_to_its_annotation(tmp_path, capsys, ending):
    labels = np.repeat([[0], [1]], 16, axis=0).repeat(24, axis=1).astype(np.uint8)
    path, upright = write_turned(tmp_path, labels, ending=ending)
    image, mask = segment.load_pair(dataset(tmp_path), 0)
    assert image.shape == (3, 32, 24) and (mask.numpy() == labels).all()
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(upright)).max() <= 3
    said = surveyed(tmp_path, capsys)
    assert f"1 training images have an EXIF orientation tag, the first is '{path}'" in said


def test_an_annotation_of_the_image_as_it_is_stored_names_exif(tmp_path, capsys):
    path, _ = write_turned(tmp_path, np.repeat([[0] * 16 + [1] * 16], 24, axis=0).astype(np.uint8))
    expected = f"{path}' has 24 x 32 pixels when it is turned as its EXIF orientation tag .6. says, but its " \
               f"annotation has 32 x 24: they are turned against each other.* without the EXIF tag"
    with pytest.raises(UserError, match=expected):
        segment.load_pair(dataset(tmp_path), 0)
    with pytest.raises(UserError, match=expected):  # before training, not when its turn comes
        surveyed(tmp_path, capsys)
    Image.fromarray(np.full((32, 24, 3), 90, np.uint8)).save(path)  # without a tag
    with pytest.raises(UserError, match="24 x 32 pixels, but its annotation has 32 x 24: they are turned") as caught:
        segment.load_pair(dataset(tmp_path), 0)
    assert "EXIF" not in str(caught.value)


def test_a_tag_that_changes_no_size_is_named(tmp_path, capsys):
    """Upside down: the size fits whichever way the annotation was drawn."""
    labels = np.repeat([[0], [1]], 16, axis=0).repeat(24, axis=1).astype(np.uint8)
    write_turned(tmp_path, labels, "a", tag=1)
    path, upright = write_turned(tmp_path, labels, "b", tag=3)
    assert f"note: 1 training images have an EXIF orientation tag, the first is '{path}'" in surveyed(tmp_path, capsys)
    image, _ = segment.load_pair(dataset(tmp_path), 1)
    assert image[0, 0, 0] > 150, "the image obeys the tag"


# -- files beside the images ----------------------------------------------------------------------------------------


def test_files_that_are_no_images_are_passed_over_and_counted(tmp_path):
    write(tmp_path)
    folder = tmp_path / "images/training"
    for name in ("._a.jpg", "b.gif", "c.gif", "d.heic"):
        (folder / name).write_bytes(b"x")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails/a.jpg").write_bytes(b"x")
    images = dataset(tmp_path)
    assert len(images) == 1
    assert found(images).endswith("; passed over: 2 .gif, 2 hidden, 1 .heic")


# -- whole runs -----------------------------------------------------------------------------------------------------

SMALL = """
device: cpu
precision: fp32
data: {dataset: ade20k, workers: 0}
model: {embed_dim: 16, depth: 4, num_heads: 2, patch_size: 8}
segment: {weights: none, crop_size: 32, stride: 20, short_side: 32, long_side: 64, feature_layers: [0, 1, 2, 3],
  iterations: 2, eval_every: 1, warmup_iterations: 1, batch_size: 2, lr: 1e-3, reduce_zero_label: true,
  classes: [road, tree], overlays: 1}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A data set of four pairs in each split, a config, and a segmenter trained with them."""
    folder = tmp_path_factory.mktemp("segment")
    (folder / "small.yaml").write_text(SMALL)
    for split in ("training", "validation"):
        for i in range(4):
            noise = np.random.default_rng(i).integers(0, 90, (40, 48, 3), dtype=np.uint8)
            labels = np.zeros((40, 48), np.uint8)
            labels[4:, :20], labels[4:, 20:] = 1, 2
            write(folder / "set", str(i), Image.fromarray(noise + 60 * labels[..., None]), labels, split, ".png")
    start(folder)
    return folder


def start(home: Path, *changes: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))  # one thread
        patch.setattr(sys, "argv", ["segment.py", str(home / "small.yaml"), f"data.root={home / 'set'}",
                                    f"output_dir={home / 'out'}", *changes])
        segment.main()


def test_training_says_what_is_in_the_masks_and_keeps_the_best(home):
    lines = [json.loads(line) for line in (home / "out/segment_scratch/metrics.jsonl").read_text().splitlines()]
    scores = [line["val"]["miou"] for line in lines if "val" in line]
    best = torch.load(home / "out/segment_scratch/best.pt", weights_only=True)
    assert len(scores) == 2 and best["val"]["miou"] == max(scores) and best["classes"] == ["road", "tree"]


def test_the_best_model_is_saved_even_if_nothing_can_be_measured(home, tmp_path, monkeypatch):
    for i in range(4):
        write(tmp_path / "set", str(i), labels=np.full((40, 48), 255, np.uint8), split="validation")
        write(tmp_path / "set", str(i), labels=np.repeat([[1] * 24 + [2] * 24], 40, axis=0).astype(np.uint8))
    (tmp_path / "small.yaml").write_text(SMALL)
    with pytest.raises(UserError, match="validation annotations .* no labelled pixel"):
        start(tmp_path)
    assert not (tmp_path / "out/segment_scratch/last.pt").exists()
    monkeypatch.setattr(segment, "survey", lambda *given: None)
    start(tmp_path)
    assert math.isnan(torch.load(tmp_path / "out/segment_scratch/best.pt", weights_only=True)["val"]["miou"])


def test_eval_only_needs_the_validation_split_only(home, tmp_path, capsys):
    for kind in ("images", "annotations"):
        shutil.copytree(home / "set" / kind / "validation", tmp_path / kind / "validation")
    start(home, "segment.eval_only=true", f"data.root={tmp_path}")
    said = capsys.readouterr().out
    best = torch.load(home / "out/segment_scratch/best.pt", weights_only=True)["val"]
    assert f"mIoU {100 * best['miou']:.2f} %" in said and f"accuracy {100 * best['pixel_accuracy']:.2f} %" in said
    assert "validation: 4 annotations have 2 of 2 classes, and 10 % of the pixels are ignored (255 and 0)" in said


def opened(home: Path) -> segment.Segmenter:
    model = segment.Segmenter(2, (0, 1, 2, 3), image_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2,
                              layer_scale=0.1, rel_pos_bias="per_block")
    model.load_state_dict(torch.load(home / "out/segment_scratch/best.pt", weights_only=True)["model"])
    return model.eval()


@torch.no_grad()
def test_predict_writes_masks_and_overlays_of_images_without_annotations(home, tmp_path):
    """Numbered as the annotations are, at each image's own size; two images of one name have two masks; a file that
    is no image is named, and the others get their masks. The model is the checkpoint's, whatever the config says."""
    photos = tmp_path / "photos"
    for name, size in (("a/x.png", (48, 40)), ("b/x.png", (70, 33))):
        (photos / name).parent.mkdir(parents=True)
        noise = np.random.default_rng(size[0]).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / name)
    (photos / "a/._x.png").write_bytes(b"x")
    given = "segment.mode=predict", f"segment.images={photos}"
    start(home, *given, "model.num_heads=4", "model.depth=2", "segment.classes=[a,b,c]",
          "segment.reduce_zero_label=false",
          f"segment.checkpoint={home}/out/segment_scratch/best.pt", f"output_dir={tmp_path}/out")
    model, folder = opened(home), tmp_path / "out/predict_masks"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png")) == \
        ["masks/a/x.png", "masks/b/x.png", "overlays/a/x.png", "overlays/b/x.png"]
    cfg = segment.SegmentConfig(crop_size=32, stride=20, short_side=32, long_side=64)
    seen = set()
    for name in ("a/x.png", "b/x.png"):
        image = torch.from_numpy(np.array(Image.open(photos / name))).permute(2, 0, 1)
        scaled = TF.resize(image, segment.scaled_size(*image.shape[1:], cfg))
        logits = segment.sliding_window(lambda x: model(x)[0], data.normalize(data.to_unit(scaled)), 32, 20)
        expected = segment.resize(logits[None], image.shape[1:])[0].argmax(dim=0) + 1
        mask = Image.open(folder / "masks" / name)
        assert mask.mode == "L" and (np.asarray(mask) == expected.numpy()).all()
        assert Image.open(folder / "overlays" / name).size == (2 * mask.width, mask.height)
        seen |= set(np.unique(np.asarray(mask)))
    assert seen == {1, 2}, "else this proves little"

    (photos / "b/broken.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="b/broken.jpg' cannot be read .*; the masks of the others are in .*/new/"):
        start(home, *given, f"segment.checkpoint={home}/out/segment_scratch/best.pt", f"output_dir={tmp_path}/new")
    assert len(list((tmp_path / "new/predict_masks/masks").rglob("*.png"))) == 2


def test_predict_wants_a_segmenter(home, tmp_path):
    torch.save({"model": opened(home).state_dict()}, tmp_path / "nameless.pth")
    with pytest.raises(UserError, match="nameless.pth' does not say with which classes it was trained"):
        start(home, "segment.mode=predict", f"segment.images={home}/set", f"segment.checkpoint={tmp_path}/nameless.pth")
    with pytest.raises(UserError, match="torchrun segment.py"):
        start(home, "segment.mode=predict", f"segment.images={home}/set", f"output_dir={tmp_path}")
    with pytest.raises(UserError, match="leave one of the two out"):
        start(home, "segment.mode=predict", "segment.eval_only=true")


def test_names_of_results():
    assert segment.result_names(["/x/a/1.jpg", "/x/b/1.jpg", "/x/2.png"]) == ["a/1", "b/1", "2"]
    assert segment.result_names(["/x/a/1.jpg"]) == ["1"]
    assert segment.result_names(["/x/1.jpg", "/x/1.png", "/x/2.png"]) == ["1.jpg", "1.png", "2.png"]


@torch.no_grad()
def test_classes_in_chunks_give_what_all_at_once_give():
    model, cfg = tiny().eval(), config(crop_size=32, stride=20).segment
    image = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    precision = types.SimpleNamespace(autocast=contextlib.nullcontext)
    logits = segment.sliding_window(lambda x: model(x)[0], data.normalize(data.to_unit(image)), 32, 20)
    expected = segment.resize(logits[None], (91, 77))[0].argmax(dim=0)
    for chunk in (1, 2, 8):
        assert torch.equal(segment.segmented(precision, model, image, (91, 77), cfg, chunk), expected)
    assert len(expected.unique()) == 3
