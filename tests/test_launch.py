"""support/launch.py, errors.py and processes.py: what a person reads when a script cannot go on."""

import errno
import io
import os
import sys
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.errors import Interrupted, UserError  # noqa: E402
from support.launch import launch  # noqa: E402
from support.processes import say, setup_distributed  # noqa: E402


@pytest.mark.parametrize("error, status, words", [
    (UserError("first\n  second"), 1, "error: first second"), (KeyError("expected"), 1, "error: 'expected'"),
    (OSError(errno.ENOSPC, "No space left on device", "m.jsonl"), 1, "cannot read or write 'm.jsonl' (No space left on device)"),
    (torch.OutOfMemoryError("CUDA"), 1, "device_batch_size"), (KeyboardInterrupt(), 130, "stopped: interrupted"),
    (Interrupted("saved at step 3"), 130, "stopped: saved at step 3"),
])
def test_launch_says_one_sentence(error, status, words, monkeypatch, capsys):
    def leave(status):
        raise SystemExit(status)

    def main():
        raise error

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        launch(main, KeyError)
    out = capsys.readouterr().err
    assert left.value.code == status and words in out and out.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_what_cannot_be_printed_ends_nothing(monkeypatch, number):
    """A closed pipe, a lost terminal, a log file on a full disk."""
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

        def flush(self):
            self.write("")

    done = []

    def main():
        say("hello")
        print("a warning", file=sys.stderr, flush=True)
        for i in tqdm(range(2), disable=False):
            done.append(i)

    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    launch(main)
    assert done == [0, 1]


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EIO, "I/O error")])
def test_launch_lets_bugs_through(error):
    with pytest.raises(type(error)):
        launch(lambda: (_ for _ in ()).throw(error))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_an_error():
    with pytest.raises(UserError, match="device=cpu"):
        setup_distributed("cuda")
