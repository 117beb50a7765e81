"""Several processes as one: who this process is, which device and threads it has, and what all of them exchange.

No reader of the method needs this file: with one process, nothing in it does anything to a batch.
"""

import contextlib
import ctypes
import math
import os
import sys
from typing import Any, Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from support.errors import UserError


ADVICE = "start several processes with torchrun, or one after `unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE`"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words: Any) -> None:
    """Print on rank 0 only, above a progress bar if there is one."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)), file=sys.stdout)
        sys.stdout.flush()


def cores() -> int:
    """The processors that this process may use, as far as the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_world_size() -> int:
    """How many processes of this run share this machine."""
    return from_environment("LOCAL_WORLD_SIZE", "1")


def share_of_cores() -> int:
    """The cores for each of them, at least one."""
    return max(1, cores() // max(1, local_world_size()))


def from_environment(name: str, default: str = "") -> int:
    """A whole number that a launcher such as torchrun leaves for its processes."""
    text = os.environ.get(name, default)
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"the environment has {name}={text!r}, which is no whole number: {ADVICE}")
    return int(text)


def is_announced() -> bool:
    """Whether a launcher has started this process as one of several. UserError if it says so by half."""
    if "RANK" not in os.environ:
        return False
    lacking = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if lacking:
        raise UserError(f"the environment has RANK, but not {', '.join(lacking)}: {ADVICE}")
    port, own, total = map(from_environment, ("MASTER_PORT", "RANK", "WORLD_SIZE"))
    if port > 65535:
        raise UserError(f"the environment has MASTER_PORT={port}, and ports end with 65535: set another one, or "
                        f"{ADVICE}")
    if own >= total:
        raise UserError(f"the environment has RANK={own} and WORLD_SIZE={total}, and ranks count from 0: {ADVICE}")
    return True


def keep_freed_memory() -> None:
    """Let the C library keep memory that was freed, for whoever asks next, instead of giving it back to the system.

    A training step frees and takes the same memory again and again. From the system each page of it comes as a fault,
    filled with zeros. That took 5 to 18 % of a small model's step on a CPU. Other systems than Linux stay as they are.
    """
    with contextlib.suppress(OSError, AttributeError):  # only glibc has this file and this function
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: up to 32 MiB, the most it takes, no block is a mapping of its own
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: up to 1 GiB stays at the end of the heap


def setup_distributed(device: str = "auto", threads: int = 0) -> torch.device:
    """Join the process group that torchrun announces, if any, and take this rank's device (NCCL on CUDA, else gloo).

    threads   of the CPU, for this process. 0: OMP_NUM_THREADS if the user set it, else an equal share of the cores
    """
    announced, local_rank, local_world = is_announced(), from_environment("LOCAL_RANK", "0"), local_world_size()
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda was asked for, but there is no CUDA GPU here: set device=cpu or device=auto")
    use_cuda = torch.cuda.is_available() and device != "cpu"
    wanted = max(local_world, local_rank + 1)  # a LOCAL_RANK may stand alone
    if use_cuda and wanted > torch.cuda.device_count():
        raise UserError(f"{wanted} processes on this machine want a GPU each, and it has "
                        f"{torch.cuda.device_count()}: lower torchrun's --nproc-per-node, or set device=cpu")
    if use_cuda:
        torch.cuda.set_device(local_rank)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    else:
        keep_freed_memory()
    # Where torchrun starts several processes, it sets OMP_NUM_THREADS to 1 if it is not set: then nobody has chosen.
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if threads or (not use_cuda and (not chosen or (chosen == "1" and local_world > 1))):
        torch.set_num_threads(min(threads or share_of_cores(), cores()))
    if announced and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo")
    return torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_in_order(tensor: Tensor, total: int | None = None) -> Tensor:
    """Collect the rows of all ranks, [n, ...] each, into their global order [total, ...].

    Samplers deal rows out like cards: rank r holds rows r, r+W, r+2W ... With `total`, ranks may differ by one row.
    """
    if world_size() == 1:
        return tensor
    rows = len(tensor) if total is None else math.ceil(total / world_size())
    padded = torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def broadcast_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0, such as BatchNorm's running statistics, which it would save too."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def on_main(function: Callable[[], Any]) -> Any:
    """Run `function` on rank 0 while the others wait, and give its result, or its UserError, to all."""
    outcome = [None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[0] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]
