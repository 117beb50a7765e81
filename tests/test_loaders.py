"""support/loaders.py: epochs, ranks and workers, and what happens when images cannot be read."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
from support import loaders  # noqa: E402
from support.datasets import open_dataset, open_datasets  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.loaders import TrainLoader, ValLoader  # noqa: E402
from test_data import all_same, folder, full_samples, same, shapes, truncate  # noqa: E402


# --- epochs ----------------------------------------------------------------------------------------------------


def test_batches_are_the_same_for_any_number_of_workers():
    samples = full_samples(shapes(count=23))
    alone, helped = (TrainLoader(samples, 4, seed=1, workers=workers) for workers in (0, 2))
    assert alone.batches_per_epoch == 5
    for epoch in (0, 1):  # twice: the workers live on
        assert all_same(alone.epoch(epoch), helped.epoch(epoch))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_fixed_crops_hold_the_samples_that_were_asked_for(workers):
    samples = data.TrainSamples(shapes(count=23), 3, 16, jitter=0.4, num_masked=6, mask_grid=4, views=2)
    whole = [list(TrainLoader(samples, 4, seed=1, workers=workers).epoch(epoch)) for epoch in (0, 1)]
    for epoch, batches in enumerate(whole):
        assert len(batches) == 5
        for batch in batches:
            assert torch.equal(batch["row"], epoch * 23 + batch["index"]) and batch["row"].dtype == torch.int64
            assert torch.equal(batch["image"], samples.fixed().__getitems__(batch["row"].tolist())["image"])
            assert torch.equal(batch["label"], batch["index"] % 10)
    assert all_same(whole[1][2:], TrainLoader(samples, 4, seed=1).epoch(1, start=2))
    halves = [TrainLoader(samples, 2, seed=1, rank=rank, world_size=2).epoch(1) for rank in (0, 1)]
    for batch, even, odd in zip(whole[1], *halves):
        assert same(batch, {key: torch.stack([even[key], odd[key]], 1).flatten(0, 1) for key in batch})


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_want_no_images_are_the_same_without_them(tmp_path, workers):
    """An unreadable image is replaced here too, also where nothing was drawn before."""
    config = folder(tmp_path, train=120)
    truncate(tmp_path / "train/dog/007.png")
    samples = data.TrainSamples(open_dataset(config, "train"), 3, 16, views=2)
    whole = [list(TrainLoader(samples, 10, seed=1, workers=workers).epoch(epoch)) for epoch in (0, 1)]
    samples.wants_images = False
    loader = TrainLoader(samples, 10, seed=1, workers=workers)
    for epoch in (0, 1):
        expected = [{key: value for key, value in batch.items() if key != "image"} for batch in whole[epoch]]
        assert all_same(loader.epoch(epoch), expected)
    assert [samples.dataset.name(index) for index in loader.unreadable.named] == [str(tmp_path / "train/dog/007.png")]


def test_an_epoch_restarts_in_its_middle():
    samples = full_samples(shapes(count=23))
    whole = list(TrainLoader(samples, 4, seed=1).epoch(3))
    assert all_same(whole[2:], TrainLoader(samples, 4, seed=1).epoch(3, start=2))
    interrupted = TrainLoader(samples, 4, seed=1, workers=2)
    next(interrupted.epoch(3))  # left with samples under way
    assert all_same(whole[2:], interrupted.epoch(3, start=2))
    assert list(TrainLoader(samples, 4, seed=1).epoch(3, start=5)) == []


def test_epochs_are_shuffled_and_hold_each_image_once():
    loader = TrainLoader(data.TrainSamples(shapes(count=20), 0, 16), 4, seed=1)
    first, second = ([i for batch in loader.epoch(e) for i in batch["index"].tolist()] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20)) and first != second and first != sorted(first)


def test_two_ranks_see_together_what_one_sees():
    samples = full_samples(shapes(count=27))
    one = list(TrainLoader(samples, 8, seed=1).epoch(1))
    ranks = [list(TrainLoader(samples, 4, seed=1, rank=rank, world_size=2).epoch(1)) for rank in (0, 1)]
    assert len(one) == len(ranks[0]) == len(ranks[1]) == 3
    for whole, even, odd in zip(one, *ranks):
        together = {key: torch.stack([even[key], odd[key]], 1).flatten(0, 1) for key in whole}
        assert same(whole, together)


def test_more_ranks_than_images():
    samples = data.TrainSamples(shapes(count=3), 0, 16)
    with pytest.raises(UserError, match="4 process.* need 4 training images .* only 3"):
        TrainLoader(samples, 1, seed=0, world_size=4)
    with pytest.raises(UserError, match="only 3"):
        TrainLoader(samples, 4, seed=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_workers_leave_signals_to_the_parent(number, monkeypatch):
    monkeypatch.setattr(loaders, "share_of_cores", lambda: 2)  # there are at most as many workers
    loader = TrainLoader(data.TrainSamples(shapes(count=40), 0, 16), 2, seed=1, workers=2)
    epoch = loader.epoch(0)
    batches = [next(epoch), next(epoch)]  # one of each worker: so both have started, and ignore the signals
    workers = [process for process in multiprocessing.active_children() if process.daemon]  # others: test_course.py's
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, number)
    assert len(batches + list(epoch)) == 20


def test_an_unforeseen_error_ends_the_run_although_workers_ignore_signals():
    """Python would wait for the workers for ever: the traceback holds the loader, and so they are not told to end."""
    code = """
import data, tests.test_data as these
from support.loaders import TrainLoader
from support.launch import launch

def main():
    loader = TrainLoader(data.TrainSamples(these.shapes(), 0, 16), 2, seed=1, workers=2)
    for batch in loader.epoch(0):
        batch["a typing error"]

launch(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(data.__file__).parent, capture_output=True, text=True,
                          timeout=100)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("KeyError: 'a typing error'")


def test_the_loader_leaves_the_default_generator_alone():
    loader = TrainLoader(full_samples(shapes()), 4, seed=1)
    before = torch.get_rng_state()
    list(loader.epoch(0)), list(ValLoader(data.ValSamples(shapes(), 16), 4))
    assert torch.equal(torch.get_rng_state(), before)


# --- validation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_validation_image_counts_once(world_size):
    loaders = [ValLoader(data.ValSamples(shapes("val", 10), 16), 3, rank, world_size) for rank in range(world_size)]
    batches = [batch for loader in loaders for batch in loader]
    assert sorted(i for batch in batches for i in batch["index"].tolist()) == list(range(10))
    assert len(batches) == sum(len(loader.loader) for loader in loaders)
    assert all(torch.equal(batch["label"], batch["index"] % 10) for batch in batches)


def test_a_chosen_few_are_divided_among_the_ranks():
    loaders = [ValLoader(data.ValSamples(shapes("val", 10), 16), 2, rank, 2, indices=[7, 1, 4]) for rank in (0, 1)]
    assert [[i for batch in loader for i in batch["index"].tolist()] for loader in loaders] == [[7, 4], [1]]
    with pytest.raises(UserError, match="cannot be shared by 2 processes"):  # on every rank, or one would wait for ever
        ValLoader(data.ValSamples(shapes("val", 10), 16), 2, 0, 2, indices=[7])


# --- broken images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_training_image_is_named_and_replaced(tmp_path, capsys, workers):
    config = folder(tmp_path, train=120)
    broken = tmp_path / "train/dog/007.png"
    truncate(broken)
    dataset = open_dataset(config, "train")
    loader = TrainLoader(data.TrainSamples(dataset, 0, 16), 10, seed=0, workers=workers)
    for epoch in (0, 1):
        batches = list(loader.epoch(epoch))
        indices = torch.cat([batch["index"] for batch in batches]).tolist()
        labels = torch.cat([batch["label"] for batch in batches]).tolist()
        assert len(indices) == 120 and str(broken) not in map(dataset.name, indices)
        assert labels == [dataset.label(i) for i in indices], "the label must be the replacement's"
    assert {dataset.name(i) for i in loader.unreadable.named} == {str(broken)}
    assert capsys.readouterr().err.count(str(broken)) == 1


def test_a_stream_runs_over_the_ends_of_epochs():
    """27 images make 3 batches of 8, of which 2 are asked for: the stream is the same wherever it begins."""
    def indices(batches):
        return [batch["index"].tolist() for batch in batches]

    samples = data.TrainSamples(shapes(count=27), 0, 16)
    for per_epoch in (2, 3):
        whole = TrainLoader(samples, 8, seed=0)
        expected = [batch for epoch in range(4) for batch in indices(whole.epoch(epoch))[:per_epoch]]
        for first in range(5):
            stream = TrainLoader(samples, 8, seed=0).stream(first, per_epoch)
            assert indices(itertools.islice(stream, 3)) == expected[first:first + 3]


def test_each_rank_may_meet_its_share_of_unreadable_images():
    """Of 800 images, 1 % is 8: for each of four ranks, which sees 200 of them in an epoch, it is 2."""
    loader = TrainLoader(data.TrainSamples(shapes(count=800), 0, 16), 4, seed=0, rank=3, world_size=4)
    loader.unreadable.add(torch.tensor([4, -1, 7, 4]), "replaced")
    loader.unreadable.met = set()  # the next epoch: each rank will have met all 8 some day
    loader.unreadable.add(torch.tensor([5, 3]), "replaced")
    with pytest.raises(UserError, match="3 of 200 .* more than 1 %"):
        loader.unreadable.add(torch.tensor([4]), "replaced")


def test_held_out_images_count_as_a_part_of_their_folder(tmp_path):
    """Two broken files of 200 are 1 %, wherever the hash puts them."""
    for i in range(200):
        (tmp_path / f"{i}.jpg").touch()
    for images in open_datasets(data.DataConfig("imagefolder", root=str(tmp_path))):
        loader = ValLoader(data.ValSamples(images, 16, strict=False), 4)
        loader.unreadable.add(torch.tensor([3, 4]), "left out")
        with pytest.raises(UserError, match="3 of .* more than 1 %"):
            loader.unreadable.add(torch.tensor([5]), "left out")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_left_out_of_a_bank(tmp_path, capsys, workers):
    config = folder(tmp_path, train=120)
    truncate(tmp_path / "train/dog/007.png")
    dataset = open_dataset(config, "train")
    batches = list(ValLoader(data.ValSamples(dataset, 16, strict=False), 50, workers=workers))
    readable, index = (torch.cat([batch[name] for batch in batches]) for name in ("readable", "index"))
    assert index.tolist() == list(range(120))
    assert [dataset.name(i) for i in index[~readable]] == [f"{tmp_path}/train/dog/007.png"]
    assert capsys.readouterr().err == f"warning: '{tmp_path}/train/dog/007.png' cannot be read, left out\n"
    for file in (tmp_path / "train/dog").iterdir():
        truncate(file)
    with pytest.raises(UserError, match="of 120 images cannot be read.* more than 1 %"):
        list(ValLoader(data.ValSamples(dataset, 16, strict=False), 50, workers=workers))


def test_too_many_unreadable_training_images_end_the_run(tmp_path):
    config = folder(tmp_path, train=120)
    truncate(tmp_path / "train/dog/007.png")
    (tmp_path / "train/cat/010.png").write_text("no image at all")
    loader = TrainLoader(data.TrainSamples(open_dataset(config, "train"), 0, 16), 10, seed=0)
    with pytest.raises(UserError, match="2 of 120 training images cannot be read"):
        list(loader.epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_unreadable_images(tmp_path, workers):
    config = folder(tmp_path, train=8)
    for file in (tmp_path / "train").rglob("*.png"):
        truncate(file)
    loader = TrainLoader(data.TrainSamples(open_dataset(config, "train"), 0, 16), 4, seed=0, workers=workers)
    with pytest.raises(UserError, match=r"^ten images in a row cannot be read[^\n]*\.png[^\n]*$"):
        list(loader.epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_validation_image_is_an_error(tmp_path, workers):
    config = folder(tmp_path)
    truncate(tmp_path / "val/cat/004.png")
    with pytest.raises(UserError, match=r"^the image '.*val/cat/004.png' cannot be read[^\n]*$"):
        list(ValLoader(data.ValSamples(open_dataset(config, "val"), 16), 4, workers=workers))
