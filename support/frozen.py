import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.errors import UserError
from support.loaders import loader_options, with_plain_errors
from support.processes import all_reduce_sum, on_main, rank, say, world_size


CACHE_BATCH = 128  # images of one pass through a frozen network that fills a cache


class Cache:
    """One value for each image of a data set that never changes, in a memory-mapped file that all ranks share.

    A frozen teacher says the same of the same crop each time. On a small machine this takes longer than a small student
    needs to learn from it. So each crop is shown to it once.

    cache[row] is the value of one image, a tensor of this `shape` on the CPU.

    folder   FOLDER/NAME-DIGEST receives values.npy, done.npy and about.json. The digest is that of `about`, of the
             number of images and of some of their pixels: other images, crops, sizes or networks have another.
    images   Dataset of {"image": uint8 [3, S, S]}
    about    what else the values depend on, in plain values
    shape    of one value; dtype: numpy's name of its type
    """

    def __init__(self, folder: Path, name: str, images: Dataset, about: dict, shape: tuple[int, ...], dtype: str):
        self.images = images
        rows = torch.linspace(0, len(images) - 1, min(64, len(images))).long().tolist()
        pixels = hashlib.sha256(b"".join(images[row]["image"].numpy().tobytes() for row in rows)).hexdigest()
        self.about = about | {"images": len(images), "pixels": pixels, "shape": list(shape), "dtype": dtype}
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:8]
        self.folder = Path(folder) / f"{name}-{digest}"
        on_main(lambda: self.make((len(images), *shape), dtype))
        self.open()

    def open(self) -> None:
        self.values = np.load(self.folder / "values.npy", mmap_mode="r+")
        self.done = np.load(self.folder / "done.npy", mmap_mode="r+")

    def __getstate__(self) -> dict:  # a loader's worker that is not forked opens the files itself
        return {name: value for name, value in vars(self).items() if name not in ("values", "done")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.open()

    def make(self, shape: tuple[int, ...], dtype: str) -> None:
        """Make the files, unless they are there and whole."""
        if self.folder.exists():
            try:
                values, done = (np.load(self.folder / name, mmap_mode="r") for name in ("values.npy", "done.npy"))
                if (values.shape, values.dtype, done.shape) == (shape, np.dtype(dtype), shape[:1]) \
                        and json.loads((self.folder / "about.json").read_text()) == self.about:
                    return
            except (FileNotFoundError, ValueError, EOFError):  # a missing, foreign, truncated or empty file
                pass
            say(f"note: '{self.folder}' is damaged, and is made anew")
            shutil.rmtree(self.folder, ignore_errors=True)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        say(f"cache of {shape[0]} images, {size / 2**20:,.0f} MiB: {self.folder}")
        unfinished = self.folder.with_name(f"{self.folder.name}.{os.getpid()}")  # so that no other run finds a half one
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            (unfinished / "about.json").write_text(json.dumps(self.about, indent=1))
            # Written, not only reserved: a memory-mapped file that finds the disk full kills the process.
            for name, rows, kind in (("values.npy", shape, dtype), ("done.npy", shape[:1], "bool")):
                with open(unfinished / name, "wb") as file:
                    header = dict(shape=rows, fortran_order=False, descr=np.lib.format.dtype_to_descr(np.dtype(kind)))
                    np.lib.format.write_array_header_1_0(file, header)
                    bytes_left = math.prod(rows) * np.dtype(kind).itemsize
                    while bytes_left:
                        bytes_left -= file.write(bytes(min(bytes_left, 2**24)))
            if not self.folder.exists():  # another run may have been quicker
                unfinished.rename(self.folder)
        except OSError as error:
            raise UserError(f"cannot write the cache '{self.folder}' of {size / 2**20:,.0f} MiB ({error.strerror}): "
                            f"free some space, set data.cache=FOLDER to one on another disk, or set data.cache=none to "
                            f"compute the values anew in each epoch") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def fill(self, compute, batch_size: int, device: torch.device, workers: int, title: str) -> "Cache":
        """Compute what is missing: `compute` takes a batch of `images`, on the device, and returns [B, *shape].

        Ranks share the work. If interrupted, it goes on where it was. Values come in blocks of `batch_size` rows that
        are computed together, so that they are the same to the bit however often that happened.
        """
        blocks = [range(first, min(first + batch_size, len(self.done))) for first in range(0, len(self.done), batch_size)]
        # One list for all ranks: a quick rank may write already while another still looks.
        missing = on_main(lambda: [rows for rows in blocks if not self.done[rows.start:rows.stop].all()])
        mine = missing[rank()::world_size()]
        loader = DataLoader(self.images, batch_sampler=mine, **loader_options(workers))
        bar = tqdm(with_plain_errors(loader), desc=title, total=len(mine), leave=False, dynamic_ncols=True,
                   disable=None if rank() == 0 else True)
        for rows, batch in zip(mine, bar):
            batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
            self.values[rows.start:rows.stop] = compute(batch).cpu().numpy()
            self.done[rows.start:rows.stop] = True
        all_reduce_sum(torch.zeros(1, device=device)).item()  # wait for all ranks
        if not self.done.all():
            raise UserError(f"the cache '{self.folder}' has gaps: give each machine a folder on a disk of its own with "
                            f"data.cache=FOLDER, or set data.cache=none")
        return self

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.values[row]))


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of a model's weights, by which a cache knows whose values it holds."""
    return hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values())).hexdigest()


def cache_folder(config) -> Path | None:
    """Where the run's caches lie; None if it has none."""
    if not config.data.views or config.data.cache == "none":
        return None
    return Path(config.data.cache or Path(config.output_dir) / "cache")
