"""Samples to batches: shuffled and dealt out to ranks and workers, and what becomes of images that cannot be read.

No reader of the method needs this file: a loop takes batches from it, the same for any number of ranks and workers.
"""

import itertools
import signal
import sys

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, default_collate

from support import processes
from support.errors import UserError
from support.launch import STOP_SIGNALS
from support.processes import share_of_cores


def evenly_chosen(total: int, number: int) -> list[int]:
    """The places of `number` of `total` images, or of all if there are fewer."""
    return torch.linspace(0, total - 1, min(number, total)).long().tolist()


class TrainLoader:
    """Epochs of device batches of `samples`: shuffled, in the same order for any number of ranks and workers.

    A rank is one of W training processes, usually one for each GPU. batch_size is that of one device batch: global
    batch / (ranks * accumulation steps). Rank r takes the positions r, r + W, r + 2W, ... of the shuffled order. So the
    batches number b of all ranks hold together the images that a single process with the whole batch would take as its
    batch b: an experiment means the same on one GPU and on eight. If each rank took one long piece of the order
    instead, every batch would be another one.

    Images that do not fill a batch at the end of an epoch are left out, so that all batches have one shape. Each epoch
    is shuffled anew, so others are left out next time. rank and world_size default to those of the process group.
    """

    def __init__(self, samples: Dataset, batch_size: int, seed: int, rank=None, world_size=None, workers=0):
        rank = processes.rank() if rank is None else rank
        world_size = processes.world_size() if world_size is None else world_size
        self.unreadable = Unreadable(samples.dataset, len(samples) / world_size, "training images")
        self.batches = EpochBatches(samples, batch_size, seed, rank, world_size)
        self.batches_per_epoch = len(samples) // world_size // batch_size
        if self.batches_per_epoch == 0:
            raise UserError(f"{world_size} process(es) with {batch_size} images each need {world_size * batch_size} "
                            f"training images at once, but there are only {len(samples)}: lower the batch size or use "
                            f"fewer processes")
        self.loader = DataLoader(samples, batch_sampler=self.batches, persistent_workers=workers > 0,
                                 **loader_options(workers))

    def epoch(self, epoch: int, start: int = 0):
        """Yields the batches of an epoch from number `start` on: TrainSamples's entries, as tensors [B, ...].

        A resumed run starts in the middle: batches before `start` are skipped by their numbers, and nothing is
        decoded for them. UserError when more than 1 % of the images turn out to be unreadable.
        """
        self.batches.epoch, self.batches.start = epoch, start
        self.unreadable.met = set()
        for batch in with_plain_errors(self.loader):
            self.unreadable.add(batch.pop("unreadable"), "replaced by another image")
            yield batch

    def stream(self, first: int, per_epoch: int):
        """Yields batches without end, from number `first` on: each epoch gives `per_epoch`, and drops the others."""
        while True:
            epoch, start = divmod(first, per_epoch)
            for batch in itertools.islice(self.epoch(epoch, start), per_epoch - start):
                first += 1
                yield batch


class Unreadable:
    """Images that cannot be read: each one is named once, and too many end the run.

    images   how many this rank reads in one pass; kind: what they are. Those that cannot be read are counted pass by
             pass, because a rank meets other images in each epoch, and after some epochs all of them
    """

    def __init__(self, dataset, images: float, kind: str):
        self.dataset, self.images, self.kind = dataset, images, kind
        self.met: set[int] = set()  # in this pass
        self.named: set[int] = set()

    def add(self, numbers: torch.Tensor, fate: str) -> None:
        """Count images by their places in the data set; a negative number is none."""
        met = {number for number in numbers.tolist() if number >= 0}
        for number in sorted(met - self.named):
            print(f"warning: '{self.dataset.name(number)}' cannot be read, {fate}", file=sys.stderr)
        self.met, self.named = self.met | met, self.named | met
        # A few broken files do no harm. Many mean that something is wrong, such as a disk or an unfinished copy. In a
        # folder that was divided into training and validation, all its images count, or one of twenty would be 5 %.
        if met and 100 * len(self.met) * len(self.dataset) > self.images * self.dataset.total:
            raise UserError(f"{len(self.met)} of {self.images:.0f} {self.kind} cannot be read, among them "
                            f"'{self.dataset.name(min(self.met))}': that is more than 1 %, so repair or remove them "
                            f"first")


class EpochBatches:
    """The batch sampler: it gives the workers lists of (epoch, index), one list for each batch.

    TrainLoader sets `epoch` and `start` before each pass. The order of an epoch follows from seed + epoch alone. The
    epoch is handed on with each index, because the worker needs it to seed the sample.
    """

    def __init__(self, samples: Dataset, batch_size: int, seed: int, rank: int, world_size: int):
        self.sampler = DistributedSampler(samples, world_size, rank, shuffle=True, seed=seed, drop_last=True)
        self.batches = BatchSampler(self.sampler, batch_size, drop_last=True)
        self.epoch, self.start = 0, 0

    def __iter__(self):
        self.sampler.set_epoch(self.epoch)
        for batch in itertools.islice(self.batches, self.start, None):
            yield [(self.epoch, index) for index in batch]


def loader_options(workers: int) -> dict:
    """Options that all loaders share."""
    # A DataLoader draws a seed for its workers. Without a generator of its own it would take it from the default one,
    # and so change the random numbers of the training loop.
    return dict(num_workers=min(workers, share_of_cores()), worker_init_fn=start_worker,
                pin_memory=torch.cuda.is_available(), generator=torch.Generator(), collate_fn=collate)


def collate(samples: list[dict] | dict) -> dict:
    """A list of samples as one batch; what is a batch already stays as it is."""
    return samples if isinstance(samples, dict) else default_collate(samples)


def start_worker(_: int):
    """Prepare a new worker process."""
    # Ctrl-C reaches all processes of a terminal. Only the main one reacts: it saves, then ends its workers.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # There may be as many workers as cores. If each used several threads, they would only take turns.
    torch.set_num_threads(1)


def with_plain_errors(loader: DataLoader):
    """The loader's batches. PyTorch wraps a worker's UserError into its traceback; this gets the sentence out again."""
    try:
        yield from loader
    except UserError as error:
        # The traceback holds the loader in a reference cycle. Python would clean it up late, and then wait 5 s for each
        # worker. Without the traceback, the workers end at once.
        error.__traceback__ = None
        raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None


class ValLoader:
    """Batches of all samples, or of those in `indices`. All ranks together have each image exactly once.

    Rank r of W has positions r, r + W, r + 2W, ... A rank may have one image fewer than another: if it were given one
    more to make them equal, that image would count twice in the accuracy. With batch_size None, images come one by one.

    UserError if there are more ranks than images, or, while iterating, if an image cannot be read. If they are not
    strict, such images are named, `readable` is False for them, and the error comes when they are more than 1 %.
    """

    def __init__(self, samples: Dataset, batch_size: int | None, rank=None, world_size=None, workers=0, indices=None):
        rank = processes.rank() if rank is None else rank
        world_size = processes.world_size() if world_size is None else world_size
        self.chosen = range(len(samples)) if indices is None else indices
        if len(self.chosen) < world_size:  # every rank raises it; else the others would wait for this one forever
            raise UserError(f"{len(self.chosen)} image(s) to evaluate cannot be shared by {world_size} processes: use "
                            f"fewer processes, or add validation images")
        mine = self.chosen[rank::world_size]
        self.unreadable = Unreadable(samples.dataset, len(self.chosen) / world_size, "images")
        self.loader = DataLoader(samples, batch_size, sampler=mine, **loader_options(workers))

    def __iter__(self):
        self.unreadable.met = set()
        for batch in with_plain_errors(self.loader):
            if "readable" in batch:
                self.unreadable.add(batch["index"][~batch["readable"]], "left out")
            yield batch
