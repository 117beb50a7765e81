"""support/frozen.py: what a frozen network says of images that never change is computed once."""

import errno
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.frozen import Cache, cache_folder  # noqa: E402
from support.loaders import TrainLoader, ValLoader  # noqa: E402
from test_data import shapes  # noqa: E402


def mean_colours(batch: dict) -> torch.Tensor:
    return batch["image"].float().mean(dim=(2, 3))


def make_cache(path: Path, seed=3, scale=(0.08, 1.0), compute=mean_colours, **about) -> Cache:
    crops = data.FixedCrops(data.TrainView(shapes(), seed, 16, scale, views=2))
    cache = Cache(path, "colours", crops, {"network": "mean"} | about, (3,), "float32")
    return cache.fill(compute, 16, torch.device("cpu"), 0, "colours")


def refuse(batch: dict):
    raise AssertionError("computed again")


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_values_arrive_with_their_sample(tmp_path, workers):
    view = data.TrainView(shapes(), 3, 16, num_masked=6, mask_grid=4, views=2)
    view.attached["colours"] = make_cache(tmp_path)
    loader = TrainLoader(view, 8, seed=1, workers=workers)
    for epoch in (0, 1, 2):
        for batch in loader.epoch(epoch):
            assert torch.equal(batch["colours"], mean_colours(batch))
    val = data.ValView(shapes("val"), 16)
    val.attached["colours"] = Cache(tmp_path, "colours", val, {}, (3,), "float32").fill(
        mean_colours, 7, torch.device("cpu"), 0, "colours")
    batch = next(iter(ValLoader(val, 8, rank=1, world_size=2)))
    assert torch.equal(batch["colours"], mean_colours(batch))


def test_a_cache_reaches_a_worker_that_is_not_forked(tmp_path):
    cache = make_cache(tmp_path)
    assert torch.equal(pickle.loads(pickle.dumps(cache))[7], cache[7]) and len(pickle.dumps(cache)) < 10**6


def test_a_cache_is_computed_once_and_goes_on_where_it_was(tmp_path):
    computed = []

    def interrupted(batch):
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(mean_colours(batch))
        return computed[-1]

    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path, compute=interrupted)
    pieces = make_cache(tmp_path, compute=lambda batch: computed.append(None) or mean_colours(batch))
    assert len(computed) == 5  # 80 crops in blocks of 16, none of them twice
    whole = make_cache(tmp_path / "whole")
    assert all(torch.equal(pieces[row], whole[row]) for row in range(80))
    make_cache(tmp_path, compute=refuse)


def test_other_crops_networks_or_data_sets_have_a_cache_of_their_own(tmp_path):
    first = make_cache(tmp_path)
    for other in (make_cache(tmp_path, scale=(0.5, 1.0)), make_cache(tmp_path, network="median")):
        assert other.folder != first.folder
    crops = data.FixedCrops(data.TrainView(shapes(size=40), 3, 16, views=2))  # as many images, but others
    assert Cache(tmp_path, "colours", crops, {"network": "mean"}, (3,), "float32").folder != first.folder
    assert make_cache(tmp_path, compute=refuse).folder == first.folder
    assert make_cache(tmp_path, seed=4, compute=refuse).folder == first.folder  # a run's seed changes no crop


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "no text", "missing"])
def test_a_damaged_cache_is_noticed_and_made_anew(tmp_path, capsys, damage):
    first = make_cache(tmp_path)
    values = [first[row] for row in range(80)]
    file = first.folder / ("about.json" if damage == "no text" else "values.npy")
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 10)
    elif damage == "empty":  # what a machine that lost its power leaves behind
        os.truncate(file, 0)
    elif damage == "foreign":
        np.save(file, np.zeros((80, 4), np.float32))
    elif damage == "no text":
        file.write_bytes(b"\xff\x00")
    else:
        file.unlink()
    again = make_cache(tmp_path)
    assert "is damaged, and is made anew" in capsys.readouterr().out
    assert all(torch.equal(again[row], value) for row, value in enumerate(values))


def test_a_cache_that_cannot_be_read_now_is_not_thrown_away(tmp_path, monkeypatch):
    cache = make_cache(tmp_path)

    def too_many_files(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(np, "load", too_many_files)
    with pytest.raises(OSError, match="Too many"):
        make_cache(tmp_path)
    monkeypatch.undo()
    assert make_cache(tmp_path, compute=refuse).folder == cache.folder


def test_two_runs_that_start_at_once_share_one_cache(tmp_path, monkeypatch):
    """While one run still writes its empty files, another finds no half ones: it makes its own, and is first."""
    write, first = np.lib.format.write_array_header_1_0, []

    def slow(file, header):
        if not first:
            first.append(None)
            monkeypatch.setattr(os, "getpid", lambda: 12345)  # the other run is another process
            first.append(make_cache(tmp_path))
            monkeypatch.undo()
        write(file, header)

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", slow)
    second = make_cache(tmp_path, compute=refuse)  # the first one has done the work
    assert second.folder == first[1].folder and list(tmp_path.iterdir()) == [second.folder]
    assert torch.equal(second[79], first[1][79])


def test_a_cache_with_gaps_is_not_used(tmp_path):
    """Such as on a network disk, where one machine's writes may undo another's."""
    crops = data.FixedCrops(data.TrainView(shapes(), 3, 16, views=2))
    cache = Cache(tmp_path, "colours", crops, {}, (3,), "float32")

    def compute(batch):
        cache.done[:5] = False
        return mean_colours(batch)

    with pytest.raises(UserError, match="has gaps.*data.cache=FOLDER"):
        cache.fill(compute, 16, torch.device("cpu"), 0, "colours")


def test_a_full_disk_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    def full(file, header):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(UserError, match="cannot write the cache .*No space left.*free some space.*data.cache=none"):
        make_cache(tmp_path, compute=refuse)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    make_cache(tmp_path)


def test_where_caches_lie():
    def folder_of(**options):
        return cache_folder(types.SimpleNamespace(output_dir="runs/x", data=data.DataConfig(**options)))

    assert folder_of() is None and folder_of(views=2, cache="none") is None
    assert folder_of(views=2) == Path("runs/x/cache") and folder_of(views=2, cache="shared") == Path("shared")
