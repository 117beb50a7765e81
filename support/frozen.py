"""What a frozen network says of images: asked anew for each batch, or once, if the images never change.

No reader of the method needs this file: `Frozen` is called like the network itself, and gives what it would give.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import FixedCrops, ValSamples, to_unit
from support.errors import Interrupted, UserError, explained
from support.loaders import evenly_chosen, loader_options, with_plain_errors
from support.processes import all_reduce_sum, on_main, rank, say, world_size
from support.run import Run

CACHE_BATCH = 128  # images of one pass that fills a cache


class Frozen:
    """A frozen network, asked about batches of one kind of samples.

        ids_of = Frozen(run, tokenizer.token_ids, "ids", samples, digest(tokenizer), "int32")
        ids = ids_of(batch, images)  # [B, N]

    A frozen teacher says the same of the same crop each time, and on a small machine this takes longer than a small
    student needs to learn from it. So with fixed crops (`data.views`) it is asked about each of them once, when this
    object is made, and a file keeps the answers. All ranks share the file, and the work of filling it.

    ask     images in [0, 1], [B, 3, S, S] -> a tensor [B, ...]
    name    begins the file's name, and tells people what it holds
    samples a TrainSamples or ValSamples; its `fixed()` are the images that never change, or None
    about   whatever else the answers depend on, such as the network's weights, in plain values
    dtype   of the file, numpy's name; answers come back as float32 or int64
    """

    def __init__(self, run: Run, ask: Callable[[Tensor], Tensor], name: str, samples: Dataset, about, dtype: str):
        self.run, self.images = run, samples.fixed()
        # The last batch of validation images is smaller, and would be compiled a second time.
        self.ask = torch.compile(ask) if run.compiles and not isinstance(samples, ValSamples) else ask
        self.values: np.ndarray | None = None
        if self.images is not None and cache_folder(run.config):
            self.values = self.computed(name, about, dtype)

    def __call__(self, batch: dict, images: Tensor | None = None) -> Tensor:
        """The answer for a batch that is on the device, [B, ...].

        images   what the network is to see, if the crops are new each time; default: the batch's. Of fixed crops it
                 always sees the crop itself, whatever was done to its colours since
        """
        if self.values is None:
            return self.asked(batch["image"] if images is None or self.images is not None else images)
        answer = torch.from_numpy(self.values[batch["row"].cpu().numpy()])
        return widened(answer.to(self.run.device, non_blocking=True))

    @torch.no_grad()
    def asked(self, images: Tensor) -> Tensor:
        """What the network itself says of images, uint8 or in [0, 1]."""
        with self.run.autocast():
            return widened(self.ask(to_unit(images)))

    def computed(self, name: str, about, dtype: str) -> np.ndarray:
        """The answers for all images, [images, ...], in a memory-mapped file: what is missing in it is computed now.

        The file's name holds a digest of `about`, of the number of images and of some of their pixels: other images,
        crops, sizes or networks have another file. Values come in blocks that are computed together, so they are the
        same to the bit however often this was interrupted.
        """
        run, images = self.run, self.images
        some = evenly_chosen(len(images), 64)
        pixels = torch.stack([images[row]["image"] for row in some])
        seen = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        described = [about, len(images), dtype, run.precision.name, seen]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:8]
        path = cache_folder(run.config) / f"{name}-{digest}.npy"
        unset = -np.inf if np.dtype(dtype).kind == "f" else -1  # in place of what is missing: no network here gives it

        def make() -> None:
            if not is_whole(path, len(images), dtype):
                answer = self.asked(pixels[:1].to(run.device))
                make_file(path, len(images), np.full(answer.shape, unset, dtype))

        on_main(make)
        values = np.load(path, mmap_mode="r+")
        blocks = [range(first, min(first + CACHE_BATCH, len(values))) for first in range(0, len(values), CACHE_BATCH)]

        def missing() -> list[range]:
            """The blocks that are not written yet. A block is written from its first number to its last."""
            return [rows for rows in blocks if values[rows[-1]].flat[-1] == unset]

        mine = on_main(missing)[rank()::world_size()]  # a quick rank may write already while another still looks
        loader = DataLoader(images, batch_sampler=mine, **loader_options(run.config.data.workers))
        drawn_from = torch.zeros(len(images), dtype=torch.int32, device=run.device)  # plus 1; 0: not drawn here
        bar = tqdm(with_plain_errors(loader), desc=f"{name} of {len(images)} images", total=len(mine), leave=False,
                   dynamic_ncols=True, disable=None if rank() == 0 else True)
        for rows, batch in zip(mine, bar):
            if run.stop and run.stop.time is not None:  # a signal was heard; steps would obey it, but this may take long
                raise Interrupted(f"'{path}' keeps what was computed; the same command goes on from there")
            values[rows.start:rows.stop] = self.asked(batch["image"].to(run.device)).cpu().numpy()
            drawn_from[rows.start:rows.stop] = batch["index"].int() + 1
        drawn_from = all_reduce_sum(drawn_from).cpu() - 1  # here all ranks wait for each other
        if isinstance(images, FixedCrops):
            images.drawn_from = drawn_from
        if missing():
            raise UserError(f"the cache '{path}' has gaps: give each machine a folder on a disk of its own with "
                            f"data.cache=FOLDER, or set data.cache=none")
        return values


def widened(answer: Tensor) -> Tensor:
    """A network's answer as float32 (numpy knows no bf16) or int64."""
    return answer.float() if answer.is_floating_point() else answer.long()


def is_whole(path: Path, rows: int, dtype: str) -> bool:
    """Whether the file is there with so many rows. A damaged one is removed."""
    if not path.exists():
        return False
    with contextlib.suppress(ValueError, EOFError):  # truncated or empty
        values = np.load(path, mmap_mode="r")
        if (len(values), values.dtype) == (rows, np.dtype(dtype)):
            return True
    say(f"note: '{path}' is damaged, and is made anew")
    path.unlink()
    return False


def make_file(path: Path, rows: int, row: np.ndarray) -> None:
    """Make the file of an array [rows, ...] whose rows are all `row`, [1, ...]."""
    size = f"{rows * row.nbytes / 2**20:,.0f} MiB"
    say(f"cache of {rows} images, {size}: {path}")
    part = path.with_name(f"{path.name}.{os.getpid()}")  # so that no other run finds half a file
    with explained(f"cannot write the cache '{path}' of {size}", "free some space, set data.cache=FOLDER to one on "
                   "another disk, or set data.cache=none to compute the values anew in each epoch", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Written, not only reserved: a memory-mapped file that finds the disk full kills the process.
            with open(part, "wb") as file:
                header = np.lib.format.header_data_from_array_1_0(np.broadcast_to(row, (rows, *row.shape[1:])))
                np.lib.format.write_array_header_1_0(file, header)
                for first in range(0, rows, 1024):
                    file.write(row.tobytes() * min(1024, rows - first))
            if not path.exists():  # another run may have been quicker
                part.rename(path)
        finally:
            part.unlink(missing_ok=True)


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights, by which a cache knows whose answers it holds."""
    values = (value.cpu().flatten().view(torch.uint8) for value in model.state_dict().values())  # numpy knows no bf16
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()


def cache_folder(config) -> Path | None:
    """Where the run's caches lie; None if it has none."""
    if not config.data.views or config.data.cache == "none":
        return None
    return Path(config.data.cache or Path(config.output_dir) / "cache")
