"""How a script starts and ends: an error that its user can correct is told in one sentence, and a signal saves the run.

No reader of the method needs this file: it calls the script's `main`, and has no part in what that does.
"""

import contextlib
import errno
import os
import signal
import sys
import time
from typing import Any, Callable, NoReturn

import torch
import torch.distributed as dist

from support.errors import Interrupted, UserError
from support.processes import all_reduce_sum, rank, world_size


signals_heard: set[int] = set()  # those that asked this process to stop; Stop adds them, `fail` looks here


# What PyTorch says when the machine lacks something, and our sentence for it; the first one that fits.
MACHINE = [
    (("OutOfMemoryError",),
     "the device is out of memory: set a smaller device_batch_size (gradients are then added up over several passes, "
     "which changes the result by rounding and other random numbers only; in segment.py BatchNorm's statistics change "
     "too), or model.checkpoint_activations=true"),
    (("InvalidCxxCompiler", "No working C++ compiler", "Failed to find C compiler", "CppCompileError",
      "Cannot find a working triton installation"),
     "torch.compile finds no compiler here that works: install a C++ compiler, such as g++, or set compile=false"),
    (("allocate shared memory", "insufficient shared memory", "out of shared memory", "Bus error"),
     "the loader workers are out of shared memory (/dev/shm): set data.workers=0, or in Docker give more of it with "
     "`docker run --shm-size=8g`"),
    (("is killed by signal", "exited unexpectedly"),
     "a loader worker was killed, probably because memory ran out: set fewer data.workers; the same command goes on "
     "from the last checkpoint"),
    (("ancdata", "Too many open files"),
     "this shell allows too few open files: raise the limit with `ulimit -n 65536`, or set data.workers=0"),
    (("allocate memory", "MemoryError"),
     "the computer is out of memory: set a smaller device_batch_size or fewer data.workers"),
    (("client socket has timed out", "client socket has failed", "waiting for clients"),
     "the processes did not all meet at MASTER_ADDR and MASTER_PORT: start WORLD_SIZE of them with torchrun, or one "
     "after `unset RANK`"),
    (("EADDRINUSE", "address already in use"),
     "another program uses the port where the processes were to meet: give torchrun another one, such as "
     "--master-port=29501"),
]


class Unbreakable:
    """A stream that may lose its reader (a closed pipe or terminal): what it cannot print any more ends no training.

    What its encoding does not have, such as a file name that is no UTF-8, is printed as \\xNN or \\udcNN.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            try:
                self.stream.write(text)
            except UnicodeEncodeError as error:
                self.stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def launch(main: Callable[[], None], *expected: type[Exception]) -> None:
    """Run a script's `main`. UserError and the `expected` errors print one sentence and exit with 1."""
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    sys.excepthook = leave_with_traceback
    try:
        main()
    except (UserError, *expected) as error:
        fail(" ".join(str(error).split()))
    except (RuntimeError, OSError, MemoryError) as error:
        if sentence := about_machine(error):
            fail(sentence)
        raise
    except Interrupted as stop:
        fail(str(stop), status=130)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from the last checkpoint, if there was one", status=130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def about_machine(error: Exception) -> str:
    """The sentence for an error that comes from the machine and not from the code, or ""."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return (f"cannot read or write '{error.filename or 'a file'}' ({error.strerror}): give it the right "
                f"permissions, free some space or choose another output_dir; the same command goes on from the last "
                f"checkpoint")
    said = f"{type(error).__name__}: {error}"
    if world_size() > 1 and ("closed by peer" in said or "reset by peer" in said):
        return "another process has ended, and this one cannot go on alone"  # the other one says why
    return next((sentence for words, sentence in MACHINE if any(word in said for word in words)), "")


def leave_with_traceback(*error: Any) -> NoReturn:
    """An error that nobody foresaw, such as one in code that you have just changed: show where it is, and leave."""
    sys.__excepthook__(*error)
    sys.stdout.flush()
    os._exit(1)  # Python itself would tell loader workers to end by SIGTERM, which they ignore, and wait forever


def fail(sentence: str, status: int = 1) -> NoReturn:
    """Say it once and leave. Ranks usually fail alike, so the others wait, and torchrun ends them with the first.

    A rank that fails because another one has gone waits too, whatever its number. Where torchrun's SIGTERM was quicker
    than the failure, the rank that failed first has spoken already, and this one ends in silence.
    """
    several = "WORLD_SIZE" in os.environ  # a RANK alone is a mistake, and nobody else will speak
    waits = (several and os.environ.get("RANK", "0") != "0") or sentence.startswith("another process")
    if waits:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    sys.stdout.flush()
    if not (waits and signal.SIGTERM in signals_heard):
        print(f"{'stopped' if status == 130 else 'error'}: {sentence}", file=sys.stderr, flush=True)
    os._exit(status)  # a plain exit would wait for loader workers and for collectives that no one answers


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stop:
    """Hears the signals until `restore`. `when` tells a person how soon the run will end."""

    def __init__(self, when: str):
        self.when, self.time = when, None  # time: when the first one was heard
        self.before = {number: signal.signal(number, self.hear) for number in STOP_SIGNALS
                       if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT}  # nohup ignores SIGHUP

    def hear(self, number: int, frame: Any) -> None:
        signals_heard.add(number)
        if self.time is None:
            self.time = time.monotonic()
            if rank() == 0:
                print(f"\nstopping after {self.when} and saving; once more to stop at once", file=sys.stderr)
        # Ctrl-C reaches us twice under torchrun: from the terminal, and from torchrun, which passes it on.
        elif time.monotonic() - self.time > 3:
            raise KeyboardInterrupt

    def asked(self, device: torch.device) -> bool:
        """Whether any rank has heard one. All ranks must stop at the same step, so all must ask together."""
        if world_size() == 1:
            return self.time is not None  # asked after each step: a tensor would make the host wait for the device
        return all_reduce_sum(torch.tensor(float(self.time is not None), device=device)).item() > 0

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
