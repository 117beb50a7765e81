"""support/datasets.py: folders and named data sets, decoding, drawn shapes, and sentences for what is missing."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop, to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
from support.datasets import (NAMED, PARTS, open_classes, open_dataset, open_datasets, open_files,  # noqa: E402
                              open_folder, parts_of_patches, read_image, require_labels, to_rgb)
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

    assert "nowhere' is not there" in sentence(tmp_path / "nowhere")
    assert "is a file" in sentence(tmp_path / "images/train/cat/000.png")
    (tmp_path / "flat/train").mkdir(parents=True)
    assert "there is no image in " in sentence(tmp_path / "flat") and "train/CLASS" in sentence(tmp_path / "flat")
    (tmp_path / "flat/one.jpg").touch(), (tmp_path / "flat/train").rmdir()
    assert "holds one image only" in sentence(tmp_path / "flat")
    (tmp_path / "flat/val").mkdir()
    assert "there is no image in " in sentence(tmp_path / "flat", "val")
    (tmp_path / "images/train/emu").mkdir()
    (tmp_path / "images/train/emu/a.gif").touch()
    (tmp_path / "images/val/emu").mkdir()
    assert "images/train/emu' holds no image" in sentence(tmp_path / "images")
    assert "passed over: 1 .gif" in sentence(tmp_path / "images")
    (tmp_path / "images/val/emu").rmdir()
    assert "only one of them has emu" in sentence(tmp_path / "images", "val")


@pytest.mark.parametrize("name", NAMED)
def test_sentence_for_a_named_data_set_that_is_not_there(name, tmp_path):
    with pytest.raises(UserError, match=rf"{name} is not .*set data.download=true"):
        open_dataset(data.DataConfig(name, root=str(tmp_path)), "train")


@pytest.mark.parametrize("error, shown", [(OSError("Network is unreachable"), "unreachable"), (EOFError(), "EOFError")])
def test_sentence_for_a_failed_download(tmp_path, monkeypatch, error, shown):
    def no_network(*_, **__):
        raise error
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for split in ("train", "val"):
        with pytest.raises(UserError, match=f"cifar10 could not be fetched .*{shown}"):
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
    assert np.array_equal(dataset.load(1), pixels[1].reshape(3, 32, 32))


# --- folders, with labels and without ----------------------------------------------------------------------------------


def touch(root: Path, *names: str) -> data.DataConfig:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return data.DataConfig("imagefolder", root=str(root))


def names_of(images, root: Path) -> list[str]:
    return [str(Path(images.name(i)).relative_to(root)) for i in range(len(images))]


def test_any_folder_of_images_is_a_data_set_without_labels(tmp_path, capsys):
    names = [f"{place}{i}.jpg" for i in range(50) for place in ("", "2023/", "2023/alps/")]
    config = touch(tmp_path / "photos", *names, "a.heic", "2023/b.HEIC", "c.gif", "READ ME", ".DS_Store")
    train, val = open_datasets(config)
    for images in (train, val):
        assert images.classes == [] and not images.labelled and set(images.labels) == {0}
    train_names, val_names = (names_of(images, tmp_path / "photos") for images in (train, val))
    assert sorted(train_names + val_names) == sorted(names) and 5 <= len(val) <= 25
    assert capsys.readouterr().out == (
        f"{len(train)} images without classes (so without k-NN, bag_knn and one_class) in {tmp_path}/photos, {len(val)} in "
        f"{tmp_path}/photos (held out, by a hash of the name); passed over: 2 .heic, 1 .gif, 1 without a suffix\n")

    # The same ones are held out in another place, one split alone, and after images were added.
    moved = touch(tmp_path / "elsewhere/photos", *reversed(names), *(f"new/{i}.jpg" for i in range(20)))
    moved.root += "/"
    held_out = names_of(open_dataset(moved, "val"), tmp_path / "elsewhere/photos")
    assert [name for name in held_out if not name.startswith("new")] == val_names
    assert not set(held_out) & set(names_of(open_dataset(moved, "train"), tmp_path / "elsewhere/photos"))


def test_few_images_are_divided_into_at_least_one_and_one(tmp_path):
    for number in range(30):
        for count in (2, 3):
            train, val = open_datasets(touch(tmp_path / f"{number}/{count}", *(f"{number}-{i}.png" for i in range(count))))
            assert len(train) + len(val) == count and len(train) > 0 and len(val) > 0


def test_folders_for_training_and_validation(tmp_path):
    def both(name, *files):
        return [names_of(images, tmp_path / name) for images in open_datasets(touch(tmp_path / name, *files))]

    assert both("1", "train/a.jpg", "val/x/b.jpg", "c.jpg") == [["train/a.jpg"], ["val/x/b.jpg"]]
    assert both("2", "cat/a.jpg", "val/b.jpg", "c.jpg") == [["c.jpg", "cat/a.jpg"], ["val/b.jpg"]]
    train, val = both("3", "train/a.jpg", "train/b.jpg", "c.jpg")
    assert sorted(train + val) == ["train/a.jpg", "train/b.jpg"] and train and val
    labelled = touch(tmp_path / "4", *(f"train/{name}/{i}.jpg" for name in ("cat", "dog") for i in range(50)))
    train, val = open_datasets(labelled)
    assert train.classes == val.classes == ["cat", "dog"] and len(train) + len(val) == 100 > len(train)
    for images in (train, val):
        assert [images.classes[k] for k in images.labels] == [name.split("/")[1] for name in names_of(images, tmp_path / "4")]


def test_what_is_hidden_is_neither_class_nor_image(tmp_path, capsys):
    config = folder(tmp_path, train=4, val=2)
    for hidden in (".thumbnails", "__MACOSX", "@eaDir", "cat/.ipynb_checkpoints", "cat/__MACOSX"):
        touch(tmp_path / "train", f"{hidden}/000.png")
    touch(tmp_path, "val/.thumbnails/0.jpg", "train/cat/._000.png", "train/loose.jpg", "train/cat/.DS_Store")
    train, val = open_datasets(config)
    assert train.classes == ["cat", "dog"] and len(train) == 4 and len(val) == 2
    assert capsys.readouterr().out == (
        f"4 images of 2 classes in {tmp_path}/train, 2 in {tmp_path}/val; passed over: 7 hidden, "
        f"1 outside of class folders\n")
    assert len(open_files(str(tmp_path / "train"))) == 5 and len(open_files(f"{tmp_path}/train/**/*.png")) == 4


def test_patterns_reach_into_folders_and_what_is_passed_over_is_named(tmp_path, capsys):
    touch(tmp_path, "0.jpg", "x/1.JFIF", "x/y/2.jpg", "x/note.txt", "__MACOSX/3.jpg", "only/4.gif")
    (tmp_path / "x/broken.png").symlink_to("nowhere")

    def found(pattern):
        return names_of(open_files(f"{tmp_path}/{pattern}"), tmp_path)

    assert found("**/*.jpg") == ["0.jpg", "x/y/2.jpg"]
    assert found("x/**") == found("x") == ["x/1.JFIF", "x/y/2.jpg"] and found("*.jpg") == ["0.jpg"]
    printed = capsys.readouterr()
    assert printed.out == "" and f"2 images in {tmp_path}/x; passed over: 1 .txt, 1 broken links" in printed.err
    assert found("only/*.gif") == ["only/4.gif"], "who names a file means it"
    with pytest.raises(UserError, match="there is no image at .*only'; passed over: 1 .gif: give the path"):
        found("only")


def test_links_in_a_circle_and_pipes_are_no_images(tmp_path):
    config = folder(tmp_path, train=4, val=2)
    for place in ("train", "val", "train/cat"):
        (tmp_path / place / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "train/cat/pipe.jpg")  # whoever reads it waits for a writer
    train, val = open_datasets(config)
    assert train.classes == ["cat", "dog"] and len(train) == 4 and len(val) == 2
    assert len(open_files(str(tmp_path))) == 6
    (tmp_path / "train/cat/circle.jpg").symlink_to("circle.jpg")  # as any broken link: an image that cannot be read
    assert len(open_dataset(config, "train")) == 5


def test_names_that_are_no_text(tmp_path):
    (tmp_path / "caf\udce9").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "caf\udce9/\udce9.jpg")
    images = open_files(f"{tmp_path}/**/*.jpg")
    assert images.name(0) == f"{tmp_path}/caf\udce9/\udce9.jpg" and images.load(0) is not None
    assert open_classes(str(tmp_path)).classes == ["caf\udce9"]


def test_what_needs_labels_says_so(tmp_path):
    folder(tmp_path, train=4, val=2)
    (labelled,) = open_folder(str(tmp_path), "train")
    require_labels(labelled, "fine-tuning"), require_labels(shapes(), "fine-tuning")
    (unlabelled,) = open_folder(str(tmp_path / "train"), "train")
    with pytest.raises(UserError, match="^fine-tuning needs the class of each image, .*ROOT/train/CLASS"):
        require_labels(unlabelled, "fine-tuning")
    (tmp_path / "train/dog").rename(tmp_path / "dog")
    with pytest.raises(UserError, match="has only 'cat': one class cannot be told from anything"):
        require_labels(open_classes(str(tmp_path / "train")), "fine-tuning")


def imagenette(root: Path) -> data.DataConfig:
    for split in ("train", "val"):
        for name in ("n01440764", "n02102040"):
            touch(root / "imagenette2", f"{split}/{name}/{name}_1.JPEG", f"{split}/{name}/._{name}_1.JPEG")
    return data.DataConfig("imagenette", root=str(root))


def test_a_named_data_set_that_is_not_whole(tmp_path):
    config = imagenette(tmp_path)
    train, val = open_datasets(config)
    assert len(train.classes) == 2 and list(train.labels) == list(val.labels) == [0, 1]
    (tmp_path / "imagenette2/val/n01440764").rename(tmp_path / "n01440764")
    with pytest.raises(UserError, match="imagenette is not whole .* only one of them has tench"):
        open_datasets(config)


@pytest.mark.parametrize("download", [False, True])
def test_the_root_of_a_named_data_set_is_the_folder_above(tmp_path, download):
    imagenette(tmp_path)
    for root in ("imagenette2", "imagenette2/train"):
        with pytest.raises(UserError, match=f"folder of imagenette itself: .* data.root={tmp_path}$"):
            open_datasets(data.DataConfig("imagenette", root=str(tmp_path / root), download=download))


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
    dataset = open_classes(str(tmp_path / "train"))
    assert len(dataset) == len(wanted)
    for i in range(len(dataset)):
        image, (left, right) = dataset.load(i).int(), wanted[Path(dataset.name(i)).name]
        assert dataset.load(i).dtype == torch.uint8 and image.shape == (3, 8, 8)
        for x, colour in ((1, left), (6, right)):
            assert (image[:, 4, x] - torch.tensor(colour)).abs().max() <= 6, (dataset.name(i), image[:, 4, x])


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_exif_that_is_broken_spoils_no_image(tmp_path, name):
    image = Image.new("RGB", (8, 4), (200, 30, 10))
    image.save(tmp_path / name, exif=b"Exif\0\0no such thing")
    loaded = read_image(os.fsencode(tmp_path / name)).int()
    assert loaded.shape == (3, 4, 8) and (loaded - torch.tensor([200, 30, 10])[:, None, None]).abs().max() <= 6


def by_pillow(path: Path) -> torch.Tensor:
    """What Pillow alone makes of a file."""
    with Image.open(path) as image:
        return pil_to_tensor(to_rgb(ImageOps.exif_transpose(image)))


def photo(width=150, height=113) -> Image.Image:
    """Something with soft and hard edges in all colours."""
    y, x = np.mgrid[0:height, 0:width] / 30
    waves = np.stack([np.sin(x + y), np.cos(x * y), np.sign(np.sin(3 * x)) * 0.5], axis=2)
    return Image.fromarray((128 + 100 * waves).astype(np.uint8))


@pytest.mark.parametrize("kind", [
    "rgb.jpg", "grey.jpg", "progressive.jpg", "subsampled.jpg", "full.jpg", "cmyk.jpg", "mpo.jpg", "rgb.png",
    "palette.png", "sixteen.png", "alpha.png", "webp.webp", "lies.png", "lies.jpg", "rest.jpg", "jfif.jfif"])
def test_every_kind_of_file_decodes_and_crops_as_pillow_does(tmp_path, kind):
    image, file = photo(), tmp_path / kind
    saved = {"grey.jpg": lambda: image.convert("L").save(file), "cmyk.jpg": lambda: image.convert("CMYK").save(file),
             "progressive.jpg": lambda: image.save(file, progressive=True),
             "subsampled.jpg": lambda: image.save(file, subsampling=2), "full.jpg": lambda: image.save(file, subsampling=0),
             "mpo.jpg": lambda: image.save(file, format="MPO", save_all=True, append_images=[image]),
             "palette.png": lambda: image.quantize(16).save(file), "alpha.png": lambda: image.convert("RGBA").save(file),
             "sixteen.png": lambda: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(file),
             "lies.png": lambda: image.save(file, format="JPEG"), "lies.jpg": lambda: image.save(file, format="PNG"),
             "jfif.jfif": lambda: image.save(file, format="JPEG"),
             "rest.jpg": lambda: (image.save(file), file.write_bytes(file.read_bytes() + b"more"))}
    saved.get(kind, lambda: image.save(file))()
    pixels, expected = read_image(os.fsencode(file)), by_pillow(file)
    assert pixels.dtype == torch.uint8 and pixels.shape == expected.shape == (3, 113, 150)
    assert (pixels.int() - expected.int()).abs().max() <= 1
    box = 10, 20, 80, 90, [64, 64], data.BICUBIC
    crops = resized_crop(pixels, *box), pil_to_tensor(resized_crop(to_pil_image(expected), *box))
    difference = (crops[0].int() - crops[1].int()).abs()
    assert difference.max() <= 2 and (difference > 1).float().mean() < 0.001


@pytest.mark.parametrize("orientation", range(9))  # 1 to 8 are known, 0 is none
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_photographs_are_turned_as_pillow_turns_them(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo().save(tmp_path / name, exif=exif)
    pixels = read_image(os.fsencode(tmp_path / name))
    assert torch.equal(pixels, by_pillow(tmp_path / name))
    assert pixels.shape[1:] == ((150, 113) if orientation > 4 else (113, 150))


@pytest.mark.parametrize("lost", [1, 2, 10, 300, 2000])
def test_truncated_photographs_fail_as_before(tmp_path, lost):
    photo().save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[:-lost])
    with pytest.raises(OSError, match="(?i)truncated"):
        read_image(os.fsencode(tmp_path / "a.jpg"))


@pytest.mark.parametrize("pixels", [np.linspace(0, 1, 64, dtype=np.float32), np.arange(64, dtype=np.int32),
                                    np.full(64, 2_000_000_000, np.int32)])
def test_numbers_without_a_known_white_are_refused(tmp_path, pixels):
    Image.fromarray(np.tile(pixels, (8, 1))).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="32-bit numbers: convert it to 8 or 16 bits"):
        read_image(os.fsencode(tmp_path / "a.tif"))


# --- shapes ------------------------------------------------------------------------------------------------------------


def test_photographs_are_turned_upright_wherever_they_are_used(tmp_path):
    """Phones store what the sensor sees, and write into the EXIF how to turn it (6: a quarter to the right)."""
    folder(tmp_path, train=2, val=2)
    file = tmp_path / "train/cat/000.png"
    picture = Image.open(file).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(file, exif=exif)
    upright = np.rot90(np.asarray(picture), -1)
    for images in (open_files(str(file)), open_classes(str(tmp_path / "train")), *open_folder(str(tmp_path), "train")):
        assert np.array_equal(images.load(0).permute(1, 2, 0), upright)


def test_a_link_that_points_upwards_counts_no_image_twice(tmp_path):
    folder(tmp_path, train=4, val=2)
    (tmp_path / "train/cat/up").symlink_to(tmp_path / "train")
    (tmp_path / "train/cat/again").symlink_to(tmp_path / "train/cat")
    (tmp_path / "more").mkdir()
    (tmp_path / "train/dog/001.png").rename(tmp_path / "more/001.png")
    (tmp_path / "train/dog/linked").symlink_to(tmp_path / "more")  # a link to elsewhere is followed
    (tmp_path / "train/cat/up").unlink()
    (images,) = open_folder(str(tmp_path), "train")
    assert sorted(os.path.basename(images.name(i)) for i in range(len(images))) == [f"{i:03d}.png" for i in range(4)]
    (tmp_path / "train/cat/up").symlink_to(tmp_path / "train")
    names = [open_files(str(tmp_path / "train")).name(i) for i in range(4)]
    assert len(open_files(str(tmp_path / "train"))) == 4 and len({os.path.realpath(name) for name in names}) == 4


def test_shapes_are_drawn_from_split_and_index_alone():
    few, many = shapes(count=20), shapes(count=40)
    order = [torch.stack([few.load(i) for i in range(20)]), torch.stack([many.load(i) for i in reversed(range(20))]).flip(0)]
    assert torch.equal(*order)
    assert len({image.numpy().tobytes() for image in order[0]}) == 20
    assert not torch.equal(few.load(0), shapes("val").load(0))
    assert set(few.labels) == set(range(len(few.classes))) and few.name(17) == "shapes/train/17"


def test_shapes_come_with_their_segmentation():
    dataset = shapes(count=200, size=64)
    for index in range(200):
        mask, image = dataset.segmentation(index), dataset.load(index).permute(1, 2, 0).numpy().astype(float)
        assert mask.shape == (64, 64) and mask.dtype == np.uint8
        inside = mask == dataset.label(index) + 1
        assert (inside | (mask == 0)).all() and 0.03 < inside.mean() < 0.7
        grey = image @ (0.299, 0.587, 0.114)  # the shape is lighter or darker than what lies around it
        assert abs(np.median(grey[inside]) - np.median(grey[~inside])) > 30, index


def test_a_linear_model_on_pixels_fails_on_shapes():
    def pixels(split, count):
        dataset = shapes(split, count, size=48)
        images = [dataset.load(i) for i in range(count)]
        return torch.stack(images).flatten(1).float() / 255, torch.from_numpy(dataset.labels)

    (x, y), (x_val, y_val) = pixels("train", 2000), pixels("val", 500)
    x, x_val = x - x.mean(0), x_val - x.mean(0)
    kernel, target = x @ x.T, torch.nn.functional.one_hot(y).float() - 0.1
    accuracies = []
    for ridge in (1.0, 100.0, 1000.0, 10000.0):
        weights = x.T @ torch.linalg.solve(kernel + ridge * torch.eye(len(x)), target)
        accuracies.append(float(((x_val @ weights).argmax(1) == y_val).float().mean()))
    assert max(accuracies) < 0.4, accuracies


def half_plane(angle: float, offset: float, side: int = 12) -> torch.Tensor:
    """bool [side, side]: the pixels beyond a line that passes the middle at this distance."""
    y, x = torch.meshgrid(*[torch.arange(side) - (side - 1) / 2] * 2, indexing="ij")
    return x * np.cos(angle) + y * np.sin(angle) > offset


def test_parts_of_patches():
    """A straight border at any angle is an edge, the corner of a square in the middle of a patch is a corner, and so is
    a narrow bar; a few pixels change neither background nor inside."""
    for angle in np.linspace(0, 2 * np.pi, 24, endpoint=False):
        for offset in (-4, 0, 4):
            assert parts_of_patches(half_plane(angle, offset)[None], 1) == PARTS.index("edge"), (angle, offset)
        corner = half_plane(angle, 0) & half_plane(angle + np.pi / 2, 0)
        bar = half_plane(angle, -2) & ~half_plane(angle, 2)
        for shape in (corner, ~corner, bar):
            assert parts_of_patches(shape[None], 1) == PARTS.index("corner"), angle
    speck = torch.zeros(12, 12, dtype=torch.bool)
    speck[3, 3:5] = True
    grid = torch.cat([torch.cat([speck, ~speck], dim=1), torch.cat([~speck, half_plane(1, 0)], dim=1)])
    assert parts_of_patches(torch.stack([grid, ~grid]), 2).tolist() == [[[0, 1], [1, 2]], [[1, 0], [0, 2]]]
