"""support/launch.py, errors.py and processes.py: what a person reads when a script cannot go on."""

import errno
import io
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.errors import Interrupted, UserError  # noqa: E402
from support.launch import launch  # noqa: E402
from support.loaders import loader_options  # noqa: E402
from support.processes import say, setup_distributed  # noqa: E402


@pytest.mark.parametrize("error, status, words", [
    (UserError("first\n  second"), 1, "error: first second"), (KeyError("expected"), 1, "error: 'expected'"),
    (OSError(errno.ENOSPC, "No space left on device", "m.jsonl"), 1, "cannot read or write 'm.jsonl' (No space left on device)"),
    (torch.OutOfMemoryError("CUDA"), 1, "device_batch_size"), (KeyboardInterrupt(), 130, "stopped: interrupted"),
    (Interrupted("saved at step 3"), 130, "stopped: saved at step 3"),
    (RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found in None"), 1, "compile=false"),
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), 1, "compile=false"),
    (RuntimeError("Caught RuntimeError in worker 0\nunable to allocate shared memory(shm) for file </torch_1>"), 1, "data.workers=0"),
    (RuntimeError("unexpected bus error (insufficient shared memory (shm))"), 1, "--shm-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
                  "shared memory."), 1, "--shm-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 1, "fewer data.workers"),
    (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), 1, "fewer data.workers"),
    (RuntimeError("The client socket has timed out after 5000ms while trying to connect to (far, 29531)."), 1, "did not all meet"),
    (RuntimeError("Timed out after 6 seconds waiting for clients. 1/2 clients joined."), 1, "did not all meet"),
    (OSError(errno.EMFILE, "Too many open files"), 1, "ulimit -n"), (RuntimeError("received 0 items of ancdata"), 1, "ulimit -n"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 1, "the computer is out of memory"),
    (MemoryError(), 1, "the computer is out of memory"),
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


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EIO, "I/O error"), RuntimeError("shape mismatch"),
                                   RuntimeError("connection reset by peer")])  # with one process there is no peer
def test_launch_lets_bugs_through(error):
    with pytest.raises(type(error)):
        launch(lambda: (_ for _ in ()).throw(error))


@pytest.mark.parametrize("encoding, shown", [("utf-8", "caf\\udce9.jpg é"), ("ascii", "caf\\udce9.jpg \\xe9"), ("latin-1", "caf\\udce9.jpg é")])
def test_names_that_a_terminal_cannot_show_are_escaped(monkeypatch, encoding, shown):
    """A file name in Latin-1 on a terminal that is strict about UTF-8."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    launch(lambda: say("caf\udce9.jpg é"))
    assert raw.getvalue().decode(encoding) == shown + "\n"


# --- what launchers leave in the environment ---------------------------------------------------------------------

WHOLE = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="1")


@pytest.mark.parametrize("environment, words", [
    ({"RANK": "0"}, ["RANK", "WORLD_SIZE, MASTER_ADDR, MASTER_PORT", "torchrun"]),
    ({"RANK": "1", "WORLD_SIZE": "2"}, ["MASTER_ADDR, MASTER_PORT", "torchrun"]), (WHOLE | {"MASTER_ADDR": ""}, ["MASTER_ADDR"]),
    (WHOLE | {"WORLD_SIZE": "two"}, ["WORLD_SIZE='two'"]), (WHOLE | {"RANK": "-1"}, ["RANK='-1'"]), (WHOLE | {"RANK": ""}, ["RANK=''"]),
    (WHOLE | {"MASTER_PORT": "99999"}, ["MASTER_PORT=99999", "65535"]),
    (WHOLE | {"RANK": "1"}, ["RANK=1 and WORLD_SIZE=1"]), (WHOLE | {"LOCAL_RANK": "a"}, ["LOCAL_RANK='a'"]),
    (WHOLE | {"LOCAL_WORLD_SIZE": "1.5"}, ["LOCAL_WORLD_SIZE='1.5'"]), (WHOLE | {"MASTER_PORT": "x"}, ["MASTER_PORT='x'"]),
])
def test_an_environment_that_announces_processes_by_half(monkeypatch, environment, words):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        setup_distributed("cpu")
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("environment", [{"LOCAL_RANK": "3"}, {"LOCAL_WORLD_SIZE": "4"}])
def test_more_processes_than_gpus(monkeypatch, environment):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes on this machine want a GPU each, and it has 2"):
        setup_distributed("cuda")


@pytest.mark.parametrize("rank", ["1", "abc"])
def test_a_lone_rank_speaks_at_once(monkeypatch, capsys, rank):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("nobody else will speak"))
    monkeypatch.setattr(os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    with pytest.raises(SystemExit):
        launch(lambda: setup_distributed("cpu"))
    assert "unset RANK" in capsys.readouterr().err


@pytest.mark.parametrize("variable, processes, asked, threads", [
    (None, 1, 0, 8), (None, 2, 0, 4), ("1", 1, 0, None), ("3", 1, 0, None), ("1", 2, 0, 4), ("3", 2, 0, None), (None, 3, 0, 2),
    (None, 99, 0, 1), ("1", 1, 5, 5), ("3", 2, 5, 5), (None, 1, 5, 5), (None, 1, 10**30, 8),
])
def test_threads(monkeypatch, variable, processes, asked, threads):
    """8 cores; OMP_NUM_THREADS=1 beside several processes is torchrun's own. None: torch's number, which follows it."""
    chosen = []
    monkeypatch.setattr("support.processes.cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.delenv("RANK", raising=False)
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    setup_distributed("cpu", asked)
    assert chosen == ([] if threads is None else [threads])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep memory")
def test_a_step_on_the_cpu_finds_the_memory_that_the_last_one_has_freed():
    program = """
import resource, torch
from support.processes import setup_distributed
setup_distributed("cpu", 1)
def step():
    blocks = [torch.zeros(2**20) for _ in range(40)]  # 40 blocks of 4 MiB: 40,960 pages
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, env=environment,
                          capture_output=True, text=True)
    assert int(done.stdout) < 40960, done.stderr  # without it 80,000 and more


@pytest.mark.parametrize("processes, asked, workers", [(1, 0, 0), (1, 3, 3), (1, 99, 8), (2, 8, 4), (3, 8, 2), (16, 8, 1), (16, 0, 0)])
def test_loader_workers_share_the_cores_of_a_machine(monkeypatch, processes, asked, workers):
    monkeypatch.setattr("support.processes.cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert loader_options(asked)["num_workers"] == workers


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_an_error():
    with pytest.raises(UserError, match="device=cpu"):
        setup_distributed("cuda")
