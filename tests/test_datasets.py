"""support/datasets.py: folders and named data sets, decoding, drawn shapes, and sentences for what is missing."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
from support.datasets import NAMED, open_dataset, open_files, open_folder  # noqa: E402
from support.errors import UserError  # noqa: E402
from test_data import folder, shapes  # noqa: E402


def test_sentences_for_missing_folders(tmp_path):
    config = folder(tmp_path / "images")
    assert open_dataset(config, "train").classes == ["cat", "dog"]
    assert len(open_dataset(config, "train")) == 40 and len(open_dataset(config, "val")) == 20

    def sentence(root, split="train"):
        with pytest.raises(UserError) as error:
            open_dataset(data.DataConfig("imagefolder", root=str(root)), split)
        assert "\n" not in str(error.value) and "data.root" in str(error.value)
        return str(error.value)

    assert "has no folder 'train'" in sentence(tmp_path / "nowhere")
    assert "is a file" in sentence(tmp_path / "images/train/cat/000.png")
    (tmp_path / "flat/train").mkdir(parents=True)
    assert "has no class folders" in sentence(tmp_path / "flat")
    (tmp_path / "images/train/emu").mkdir()
    assert "images/train/emu' holds no image" in sentence(tmp_path / "images")
    assert "only one of them has emu" in sentence(tmp_path / "images", "val")


@pytest.mark.parametrize("name", NAMED)
def test_sentence_for_a_named_data_set_that_is_not_there(name, tmp_path):
    with pytest.raises(UserError, match=rf"{name} is not .*set data.download=true"):
        open_dataset(data.DataConfig(name, root=str(tmp_path)), "train")


def test_sentence_for_a_failed_download(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("Network is unreachable")
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for split in ("train", "val"):
        with pytest.raises(UserError, match="cifar10 could not be fetched .*unreachable"):
            open_dataset(data.DataConfig("cifar10", root=str(tmp_path), download=True), split)


def test_a_named_data_set_opens(tmp_path):
    import pickle
    batches, meta = tmp_path / "cifar-10-batches-py", {"label_names": [f"class{i}" for i in range(10)]}
    batches.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for file in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (batches / file).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 1, 4, 1]}))
    (batches / "batches.meta").write_bytes(pickle.dumps(meta))
    with pytest.MonkeyPatch.context() as patch:  # our small files have other check sums
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        dataset = open_dataset(data.DataConfig("cifar10", root=str(tmp_path)), "train")
    assert len(dataset) == 20 and dataset.classes == meta["label_names"] and list(dataset.labels[:4]) == [3, 1, 4, 1]
    assert dataset.name(5) == "cifar10/train/5" and dataset.label(2) == 4
    assert np.array_equal(np.asarray(dataset.load(1)), pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))


# --- decoding --------------------------------------------------------------------------------------------------------


def test_every_kind_of_image_decodes_to_sensible_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 30, 10))
    half = red.convert("RGBA")
    half.paste((200, 30, 10, 0), (0, 0, 4, 8))  # the left half is transparent
    palette = half.quantize(4)
    assert palette.mode == "P"
    wanted = {}

    def save(name, image, left, right, **options):
        image.save(tmp_path / name, **options)
        wanted[name] = left, right

    save("rgb.png", red, (200, 30, 10), (200, 30, 10))
    save("grey.png", Image.new("L", (8, 8), 77), (77,) * 3, (77,) * 3)
    save("bits.png", Image.new("1", (8, 8), 1), (255,) * 3, (255,) * 3)
    save("sixteen.png", Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)), (100,) * 3, (100,) * 3)
    save("sixteen.tif", Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)), (100,) * 3, (100,) * 3)
    save("alpha.png", half, (255,) * 3, (200, 30, 10))
    save("palette.png", palette, (255,) * 3, (200, 30, 10))
    save("cmyk.jpg", red.convert("CMYK"), (200, 30, 10), (200, 30, 10), quality=100)
    (tmp_path / "train/all").mkdir(parents=True)
    for name in wanted:
        os.rename(tmp_path / name, tmp_path / "train/all" / name)
    dataset = open_dataset(data.DataConfig("imagefolder", root=str(tmp_path)), "train")
    assert len(dataset) == len(wanted)
    for i in range(len(dataset)):
        image, (left, right) = dataset.load(i), wanted[Path(dataset.name(i)).name]
        assert image.mode == "RGB" and image.size == (8, 8)
        for x, colour in ((1, left), (6, right)):
            assert np.abs(np.subtract(image.getpixel((x, 4)), colour)).max() <= 6, (dataset.name(i), image.getpixel((x, 4)))


# --- shapes ------------------------------------------------------------------------------------------------------------


def test_photographs_of_ones_own_are_turned_upright_and_data_sets_are_not(tmp_path):
    """Phones store what the sensor sees, and write into the EXIF how to turn it (6: a quarter to the right)."""
    folder(tmp_path, train=2, val=2)
    file = tmp_path / "train/cat/000.png"
    picture = Image.open(file).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(file, exif=exif)
    stored = np.asarray(picture)
    assert np.array_equal(np.asarray(open_files(str(file)).load(0)), np.rot90(stored, -1))
    assert np.array_equal(np.asarray(open_folder(str(tmp_path), "train").load(0)), stored)


def test_a_link_that_points_upwards_counts_no_image_twice(tmp_path):
    folder(tmp_path, train=4, val=2)
    (tmp_path / "train/cat/up").symlink_to(tmp_path / "train")
    (tmp_path / "train/cat/again").symlink_to(tmp_path / "train/cat")
    (tmp_path / "more").mkdir()
    (tmp_path / "train/dog/001.png").rename(tmp_path / "more/001.png")
    (tmp_path / "train/dog/linked").symlink_to(tmp_path / "more")  # a link to elsewhere is followed
    (tmp_path / "train/cat/up").unlink()
    images = open_folder(str(tmp_path), "train")
    assert sorted(os.path.basename(images.name(i)) for i in range(len(images))) == [f"{i:03d}.png" for i in range(4)]
    (tmp_path / "train/cat/up").symlink_to(tmp_path / "train")
    names = [open_files(str(tmp_path / "train")).name(i) for i in range(4)]
    assert len(open_files(str(tmp_path / "train"))) == 4 and len({os.path.realpath(name) for name in names}) == 4


def test_shapes_are_drawn_from_split_and_index_alone():
    few, many = shapes(count=20), shapes(count=40)
    order = [list(map(np.asarray, map(few.load, range(20)))), list(map(np.asarray, map(many.load, reversed(range(20)))))[::-1]]
    assert np.array_equal(*order)
    assert len({image.tobytes() for image in order[0]}) == 20
    assert not np.array_equal(np.asarray(few.load(0)), np.asarray(shapes("val").load(0)))
    assert set(few.labels) == set(range(len(few.classes))) and few.name(17) == "shapes/train/17"


def test_shapes_come_with_their_segmentation():
    dataset = shapes(count=200, size=64)
    for index in range(200):
        mask, image = dataset.segmentation(index), np.asarray(dataset.load(index)).astype(float)
        assert mask.shape == (64, 64) and mask.dtype == np.uint8
        inside = mask == dataset.label(index) + 1
        assert (inside | (mask == 0)).all() and 0.03 < inside.mean() < 0.7
        grey = image @ (0.299, 0.587, 0.114)  # the shape is lighter or darker than what lies around it
        assert abs(np.median(grey[inside]) - np.median(grey[~inside])) > 30, index


def test_a_linear_model_on_pixels_fails_on_shapes():
    def pixels(split, count):
        dataset = shapes(split, count, size=48)
        images = [torch.from_numpy(np.array(dataset.load(i))) for i in range(count)]
        return torch.stack(images).flatten(1).float() / 255, torch.from_numpy(dataset.labels)

    (x, y), (x_val, y_val) = pixels("train", 2000), pixels("val", 500)
    x, x_val = x - x.mean(0), x_val - x.mean(0)
    kernel, target = x @ x.T, torch.nn.functional.one_hot(y).float() - 0.1
    accuracies = []
    for ridge in (1.0, 100.0, 1000.0, 10000.0):
        weights = x.T @ torch.linalg.solve(kernel + ridge * torch.eye(len(x)), target)
        accuracies.append(float(((x_val @ weights).argmax(1) == y_val).float().mean()))
    assert max(accuracies) < 0.4, accuracies
