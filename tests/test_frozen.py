"""support/frozen.py: what a frozen network says of images that never change is computed once."""

import contextlib
import errno
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
from support import frozen  # noqa: E402
from support.errors import Interrupted, UserError  # noqa: E402
from support.frozen import Frozen, cache_folder  # noqa: E402
from support.loaders import TrainLoader, ValLoader  # noqa: E402
from test_data import shapes  # noqa: E402


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(frozen, "CACHE_BATCH", 16)


def mean_colours(images: torch.Tensor) -> torch.Tensor:
    return images.mean(dim=(2, 3))


def run_of(path: Path, **options):
    config = types.SimpleNamespace(output_dir=str(path), data=data.DataConfig(**dict(cache=str(path), views=2, workers=0)
                                                                              | options))
    return types.SimpleNamespace(config=config, device=torch.device("cpu"), compiles=False, stop=None,
                                 precision=types.SimpleNamespace(name="fp32"), autocast=contextlib.nullcontext)


def make(path: Path, ask=mean_colours, seed=3, scale=(0.08, 1.0), about="mean", dtype="float32", samples=None) -> Frozen:
    samples = samples or data.TrainSamples(shapes(), seed, 16, scale, num_masked=6, mask_grid=4, min_block=2, views=2)
    return Frozen(run_of(path), ask, "colours", samples, about, dtype)


def refuse(images: torch.Tensor):
    raise AssertionError("computed again")


def file_in(path: Path) -> Path:
    [file] = path.iterdir()
    return file


def test_crops_whose_answers_are_known_are_not_drawn_again(tmp_path, monkeypatch):
    """Where the file was there already, nobody knows yet which of them replace unreadable images."""
    samples = data.TrainSamples(shapes(), 3, 16, views=2)
    make(tmp_path, samples=samples)
    samples.wants_images, samples.fixed().kept = False, {}
    monkeypatch.setattr(data.FixedCrops, "__getitem__", refuse)
    loader = TrainLoader(samples, 8, seed=1)
    rows = torch.cat([batch["row"] for epoch in (0, 1) for batch in loader.epoch(epoch)])
    assert torch.equal(rows.sort().values, torch.arange(80))
    monkeypatch.undo()
    monkeypatch.setattr(frozen, "CACHE_BATCH", 16)
    again = data.TrainSamples(shapes(), 3, 16, views=2)
    make(tmp_path, refuse, samples=again)
    assert (again.fixed().drawn_from == -1).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_each_batch_gets_the_answers_for_its_own_crops(tmp_path, workers):
    samples = data.TrainSamples(shapes(), 3, 16, num_masked=6, mask_grid=4, min_block=2, views=2)
    colours = make(tmp_path, samples=samples)
    colours.ask = refuse  # from here on, the file answers
    loader = TrainLoader(samples, 8, seed=1, workers=workers)
    for epoch in (0, 1, 2):
        for batch in loader.epoch(epoch):
            assert torch.equal(colours(batch), mean_colours(batch["image"] / 255))
    val = data.ValSamples(shapes("val"), 16)
    colours = make(tmp_path, samples=val)
    batch = next(iter(ValLoader(val, 8, rank=1, world_size=2)))
    assert torch.equal(colours(batch), mean_colours(batch["image"] / 255))


@pytest.mark.parametrize("dtype, answer, given", [("float16", torch.float32, 0.25), ("int32", torch.int64, 7),
                                                  ("float32", torch.float32, 0.1)])
def test_answers_are_float32_or_int64_whatever_the_file_holds(tmp_path, dtype, answer, given):
    said = make(tmp_path, lambda images: torch.full((len(images), 2), given), dtype=dtype)({"row": torch.tensor([3, 79])})
    assert said.dtype == answer and torch.equal(said, torch.full((2, 2), given).to(answer))
    assert np.load(file_in(tmp_path)).dtype == dtype


def test_without_a_cache_fixed_crops_are_seen_as_they_are_and_new_ones_as_the_student_sees_them():
    for views, seen in ((2, 0.0), (0, 1.0)):
        samples = data.TrainSamples(shapes(), 3, 16, jitter=0.4, views=views)
        colours = Frozen(run_of(Path("nowhere"), views=views, cache="none"), mean_colours, "colours", samples, "", "float32")
        batch = {"image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "row": torch.tensor([0, 1])}
        assert torch.equal(colours(batch, torch.ones(2, 3, 16, 16)), torch.full((2, 3), seen))
        assert torch.equal(colours(batch), torch.zeros(2, 3))


def test_answers_have_no_gradient(tmp_path):
    layer = torch.nn.Linear(3, 2)
    samples = data.TrainSamples(shapes(), 3, 16)
    asked = Frozen(run_of(tmp_path, views=0), lambda images: layer(mean_colours(images)), "x", samples, "", "float32")
    assert not asked({"image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}).requires_grad


def test_a_cache_is_computed_once_and_goes_on_where_it_was(tmp_path):
    computed = []

    def interrupted(images):
        if len(images) > 1:
            if len(computed) == 3:
                raise KeyboardInterrupt
            computed.append(None)
        return mean_colours(images)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, interrupted)
    pieces = make(tmp_path, lambda images: computed.append(None) or mean_colours(images))
    assert len(computed) == 5  # 80 crops in blocks of 16, none of them twice
    assert np.array_equal(pieces.values, make(tmp_path / "whole").values) and len(pieces.values) == 80
    make(tmp_path, refuse)


def test_a_signal_ends_the_filling_of_a_cache_and_loses_nothing(tmp_path):
    run, asked = run_of(tmp_path), []
    run.stop = types.SimpleNamespace(time=None)

    def ask(images: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        run.stop.time = 1.0 if len(asked) == 3 else None  # heard while the second block is computed
        return mean_colours(images)

    samples = data.TrainSamples(shapes(), 3, 16, views=2)
    with pytest.raises(Interrupted, match="keeps what was computed; the same command goes on from there"):
        Frozen(run, ask, "colours", samples, "mean", "float32")
    assert asked == [1, 16, 16]  # the first one tells the shape
    asked.clear()
    run.stop = types.SimpleNamespace(time=None)
    again = Frozen(run, lambda images: asked.append(len(images)) or mean_colours(images), "colours", samples, "mean",
                   "float32")
    assert asked == [16, 16, 16] and np.isfinite(again.values).all()  # 80 crops: two blocks were kept


def test_other_crops_networks_or_data_sets_have_a_cache_of_their_own(tmp_path):
    make(tmp_path)
    for number, options in enumerate((dict(scale=(0.5, 1.0)), dict(about="median"), dict(dtype="float16"), dict(
            samples=data.TrainSamples(shapes(size=40), 3, 16, views=2))), 2):  # the last: as many images, but others
        make(tmp_path, **options)
        assert len(list(tmp_path.iterdir())) == number
    make(tmp_path, refuse)
    make(tmp_path, refuse, seed=4)  # a run's seed changes no crop


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "no array"])
def test_a_damaged_cache_is_noticed_and_made_anew(tmp_path, capsys, damage):
    values = np.array(make(tmp_path).values)
    file = file_in(tmp_path)
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 10)
    elif damage == "empty":  # what a machine that lost its power leaves behind
        os.truncate(file, 0)
    elif damage == "foreign":
        np.save(file, np.zeros((79, 3), np.float32))
    else:
        file.write_bytes(b"\xff\x00")
    again = make(tmp_path)
    assert "is damaged, and is made anew" in capsys.readouterr().out
    assert np.array_equal(again.values, values)


def test_a_cache_that_cannot_be_read_now_is_not_thrown_away(tmp_path, monkeypatch):
    make(tmp_path)

    def too_many_files(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(np, "load", too_many_files)
    with pytest.raises(OSError, match="Too many"):
        make(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(frozen, "CACHE_BATCH", 16)
    make(tmp_path, refuse)


def test_two_runs_that_start_at_once_share_one_cache(tmp_path, monkeypatch):
    """While one run still writes its empty file, another finds no half one: it makes its own, and is first."""
    write, first = np.lib.format.write_array_header_1_0, []

    def slow(file, header):
        if not first:
            first.append(None)
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 12345)  # the other run is another process
                first.append(make(tmp_path))
        write(file, header)

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", slow)
    second = make(tmp_path, lambda images: mean_colours(images) if len(images) == 1 else refuse(images))
    assert file_in(tmp_path) and np.array_equal(second.values, first[1].values)


def test_a_cache_with_gaps_is_not_used(tmp_path):
    """Such as on a network disk, where one machine's writes may undo another's."""
    def undo(images):
        for file in tmp_path.iterdir():
            np.load(file, mmap_mode="r+")[:16] = -np.inf
        return mean_colours(images)

    with pytest.raises(UserError, match="has gaps.*data.cache=FOLDER"):
        make(tmp_path, undo)


def test_a_full_disk_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    def full(file, header):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(UserError, match="cannot write the cache .*No space left.*free some space.*data.cache=none"):
        make(tmp_path, lambda images: mean_colours(images) if len(images) == 1 else refuse(images))
    assert not list(tmp_path.iterdir())


def test_a_file_where_the_cache_should_lie_is_one_sentence(tmp_path):
    (tmp_path / "note.txt").touch()
    with pytest.raises(UserError, match="cannot write the cache .*note.txt.*set data.cache=FOLDER"):
        make(tmp_path / "note.txt")


def test_where_caches_lie():
    def folder_of(**options):
        return cache_folder(types.SimpleNamespace(output_dir="runs/x", data=data.DataConfig(**options)))

    assert folder_of() is None and folder_of(views=2, cache="none") is None
    assert folder_of(views=2) == Path("runs/x/cache") and folder_of(views=2, cache="shared") == Path("shared")
