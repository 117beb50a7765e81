"""support/run.py and processes.py: a run that stops, fails, resumes and saves, its metrics, and two processes."""

import errno
import json
import math
import multiprocessing
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from beitv2 import read_checkpoint  # noqa: E402
from data import DataConfig  # noqa: E402
from support import processes  # noqa: E402
from support.errors import Interrupted, UserError  # noqa: E402
from support.files import read_lines  # noqa: E402
from support.launch import STOP_SIGNALS  # noqa: E402
from support.loaders import TrainLoader  # noqa: E402
from support.optimizers import clip_gradients, make_optimizer  # noqa: E402
from support.options import TrainConfig, load_config  # noqa: E402
from support.processes import all_reduce_sum, gather_in_order, on_main  # noqa: E402
from support.run import Metrics, Run, flops, seed_everything  # noqa: E402


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run installs its own; pytest wants its own back."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_seeds_of_neighbouring_steps_and_ranks_differ():
    draws = set()
    for numbers in [(seed, step, rank) for seed in range(2) for step in range(3) for rank in range(2)] + [(12, 3), (1, 23)]:
        seed_everything(*numbers)
        draws.add(torch.rand(1).item())
    seed_everything(1, 23)
    assert len(draws) == 14 and torch.rand(1).item() in draws


# --- a run -------------------------------------------------------------------------------------------------------

STEPS, BATCH = 6, 4  # per epoch; images per step


class ToyLoader:
    """Deals rows of a fixed table out as TrainLoader deals images out: rank r holds rows r, r + W, ..."""

    stream = TrainLoader.stream

    def __init__(self, poison: dict, device_batch: int, seed: int, workers: int):
        self.device_batch, self.poison = device_batch, poison  # poison: (epoch, global row) -> value
        self.batches_per_epoch = STEPS * BATCH // (device_batch * processes.world_size())

    def epoch(self, epoch: int, start: int = 0):
        x = torch.randn(STEPS * BATCH, 5, generator=torch.Generator().manual_seed(epoch))
        for (poisoned, row), value in self.poison.items():
            if poisoned == epoch:
                x[row] = value
        mine = x[processes.rank()::processes.world_size()].split(self.device_batch)
        for batch in mine[start:]:
            yield {"x": batch, "names": ["not a tensor"]}


def toy_run(folder, poison=None, dropout=0.0, optimizer_class=make_optimizer, **options):
    """A run that is ready for its loop: a linear model that learns to say the sum of five numbers."""
    text = {"epochs": 2, "batch_size": BATCH, "lr": 0.01, "log_every": 4, "save_every": 3} | options
    top = {"output_dir": str(folder), "device": "cpu", "precision": text.pop("precision", "fp32")}
    Path(folder).mkdir(exist_ok=True)
    file = Path(folder) / f"c{processes.rank()}.yaml"
    file.write_text(json.dumps(top | {"pretrain": text}))  # JSON is YAML
    config = load_config({"data": DataConfig, "pretrain": TrainConfig}, [str(file)])
    run = Run("pretrain", config, config.pretrain)
    model = nn.Sequential(nn.Dropout(dropout), nn.Linear(5, 1))
    optimizer = optimizer_class(model, config.pretrain)
    run.model, run.optimizer = model, optimizer
    with mock.patch("support.run.TrainLoader", ToyLoader):
        run.begin(poison or {}, model=model, optimizer=optimizer)
    return run


def toy_loss(run, batch: dict) -> torch.Tensor:
    return (run.parallel(batch["x"])[:, 0] - batch["x"].sum(dim=1)).square().mean()


def toy_step(run) -> None:
    """What a loop does after the last micro-batch of a step."""
    run.scaler.unscale_(run.optimizer)
    grad_norm = clip_gradients(run.optimizer, run.train.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.record(grad_norm=grad_norm, lr=run.train.lr)


def toy_train(run, stop_at: int | None = None, stop_rank: int = 0, loss_of=None,
              how: signal.Signals = signal.SIGTERM) -> nn.Module:
    """The loop of the scripts. `stop_at`: the step in which the signal to stop arrives."""
    for epoch in run.epochs():
        for step, batch, last in run.micro_batches(epoch):
            loss = toy_loss(run, batch) if loss_of is None else loss_of(run.parallel(batch["x"])[:, 0])
            run.backward(loss)
            run.record(loss=loss)
            if last:
                if step + 1 == stop_at and processes.rank() == stop_rank:
                    signal.raise_signal(how)
                toy_step(run)
        run.end_epoch(epoch, {"score": float(epoch)})
    return run.model


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def losses(run) -> list[tuple]:
    """What is the same however often a run was interrupted: speed is not."""
    return [(line["step"], line.get("loss"), line.get("grad_norm"), line.get("train"), line.get("val")) for line in metrics(run)]


def assert_same_line(a: dict, b: dict) -> None:
    """Two lines of metrics.jsonl agree but for rounding; an epoch's line has its losses under `train`."""
    assert a.keys() == b.keys() and a["step"] == b["step"]
    for key in ("loss", "grad_norm", "lr"):
        assert a.get("train", a)[key] == pytest.approx(b.get("train", b)[key], rel=1e-5)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_a_run_writes_its_metrics(tmp_path):
    run = toy_run(tmp_path)
    model = toy_train(run)
    lines = metrics(run)
    assert [(line["step"], "val" in line) for line in lines] == [(4, False), (6, False), (6, True), (8, False), (12, False), (12, True)]
    # The epoch's figure is the mean over its six steps: four of them in the first line, two in the second.
    assert lines[2]["train"]["loss"] == pytest.approx((4 * lines[0]["loss"] + 2 * lines[1]["loss"]) / 6, rel=1e-6)
    assert lines[3]["epoch"] == 1 and lines[5]["val"] == {"score": 1.0} and lines[0]["lr"] == pytest.approx(0.01)
    assert lines[-1]["train"]["loss"] < lines[2]["train"]["loss"]
    state = read_checkpoint(run.checkpoint_file)
    assert state["step"] == 12 and torch.equal(state["model"]["1.weight"], model[1].weight)
    assert not list(run.folder.glob("*.part")) and (run.folder / "config.yaml").is_file()


@pytest.mark.parametrize("stop_at, limit", [(1, 0), (4, 0), (5, 2), (6, 0), (8, 2)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, stop_at, limit):
    """Stopped between two lines, at one, or at an epoch's end, with and without accumulation: the same weights to the
    bit, and each step's line once."""
    options = dict(dropout=0.5, device_batch_size=limit)
    whole = toy_run(tmp_path / "whole", **options)
    toy_train(whole)
    run = toy_run(tmp_path / "parts", **options)
    with pytest.raises(Interrupted, match=f"step {stop_at} of 12"):
        toy_train(run, stop_at)
    run = toy_run(tmp_path / "parts", **options)
    assert run.step == stop_at
    toy_train(run)
    assert same_weights(run.model, whole.model) and losses(run) == losses(whole)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    """Killed in step 8, after what step 8 measured but before anything was saved of it."""
    whole = toy_run(tmp_path / "whole", dropout=0.5)
    toy_train(whole)
    run = toy_run(tmp_path / "parts", dropout=0.5, save_every=100)
    with pytest.raises(ZeroDivisionError):
        for epoch in run.epochs():
            for step, batch, last in run.micro_batches(epoch):
                if step == 9:
                    raise ZeroDivisionError  # stands for kill -9
                loss = toy_loss(run, batch)
                run.backward(loss)
                run.record(loss=loss)
                toy_step(run)
            run.end_epoch(epoch, {"score": float(epoch)})
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 1, "step": 9, "lo')  # cut short
    assert metrics_steps_on_disk(run)[-1] == 8
    run = toy_run(tmp_path / "parts", dropout=0.5, save_every=100)
    assert run.step == 6
    toy_train(run)
    assert same_weights(run.model, whole.model) and losses(run) == losses(whole)


@pytest.mark.parametrize("written", [False, True])
def test_a_run_killed_in_validation_repeats_that_and_no_step(tmp_path, written):
    """`written`: killed after the epoch's line was written, but before the checkpoint that counts it as done."""
    whole = toy_run(tmp_path / "whole", dropout=0.5)
    toy_train(whole)
    run = toy_run(tmp_path / "parts", dropout=0.5, save_every=100)

    def killed(*args, **kwargs):
        if written:
            run.metrics.write({"epoch": 0, "step": run.step, "train": {"loss": 7.0}, "val": {"score": 7.0}})
        raise ZeroDivisionError  # stands for kill -9

    run.end_epoch = killed
    with pytest.raises(ZeroDivisionError):
        toy_train(run)
    run = toy_run(tmp_path / "parts", dropout=0.5, save_every=100)
    assert (run.step, run.epochs_done) == (6, 0)
    toy_train(run)
    assert same_weights(run.model, whole.model) and losses(run) == losses(whole)
    ends = [[line for line in metrics(one) if "val" in line] for one in (run, whole)]
    assert ends[0] == ends[1] and len(ends[0]) == 2


def metrics_steps_on_disk(run) -> list[int]:
    return [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def test_a_second_signal_stops_at_once_unless_it_is_the_same_one_passed_on(tmp_path):
    run = toy_run(tmp_path)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)  # torchrun passes Ctrl-C on to processes that had it from the terminal already
    run.stop.time -= 5
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert run.step == 0


def test_a_hangup_saves_and_stops(tmp_path):
    run = toy_run(tmp_path)
    with pytest.raises(Interrupted):
        toy_train(run, stop_at=3, how=signal.SIGHUP)
    assert read_checkpoint(run.checkpoint_file)["step"] == 3


def test_under_nohup_a_hangup_is_ignored(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run = toy_run(tmp_path)
    toy_train(run, stop_at=3, how=signal.SIGHUP)
    assert run.step == 12 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_finished_run_gives_the_signals_back(tmp_path):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    run = toy_run(tmp_path)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == [run.stop.hear] * 3
    toy_train(run)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def hold(folder, ready) -> None:
    """A run that lives on, as does one of its loader workers."""
    run = toy_run(folder)  # noqa: F841, its lock lives as long as it does
    worker = os.fork()
    if worker:
        ready.put((worker, run.step))
    signal.pause()


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    """The lock dies with its process: kill -9 blocks nobody, not even if a worker of the killed run survives it."""
    context = multiprocessing.get_context("spawn")  # a fork of a process in which torch has threads may hang
    ready = context.SimpleQueue()
    first = context.Process(target=hold, args=(tmp_path, ready))
    first.start()
    worker, _ = ready.get()
    try:
        with pytest.raises(UserError, match="another run is writing into '.*pretrain'.*output_dir"):
            toy_run(tmp_path)
        toy_run(tmp_path / "elsewhere")
        first.kill()
        first.join()
        os.kill(worker, 0)  # it is still there
        toy_train(toy_run(tmp_path))
    finally:
        first.kill()
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("without", ["the module", "the file system"])
def test_where_there_are_no_locks_a_run_goes_without(tmp_path, monkeypatch, without):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("support.run.fcntl", None) if without == "the module" else monkeypatch.setattr("fcntl.lockf", lockf)
    run = toy_run(tmp_path)
    toy_train(run)
    assert run.step == 12


def test_a_folder_in_the_checkpoints_place_is_noticed_at_the_start(tmp_path):
    (tmp_path / "pretrain" / "last.pt").mkdir(parents=True)
    with pytest.raises(UserError, match="last.pt' is a folder.*move it away"):
        toy_run(tmp_path)


def test_a_damaged_metrics_file_is_moved_aside(tmp_path, capsys):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\x80")
    run = toy_run(tmp_path)
    assert "metrics.jsonl' is no text" in capsys.readouterr().out
    toy_train(run)
    assert len(metrics(run)) == 6 and (run.folder / "metrics.damaged").read_bytes() == b"\xff\xfe\x00\x80"
    (run.folder / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\x80")
    assert read_lines(run.folder / "metrics.jsonl") == []  # for the table and the page


def test_a_finished_run_does_nothing_when_started_again(tmp_path):
    run = toy_run(tmp_path)
    toy_train(run)
    before = losses(run)
    again = toy_run(tmp_path)
    assert again.epochs_done == again.train.epochs
    toy_train(again)
    assert losses(again) == before and same_weights(again.model, run.model)


def test_the_speed_counts_only_steps_since_the_run_went_on(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path / "metrics.jsonl", torch.device("cpu"))
    metrics.window = {"lr": [0.1, 0.1, 0.1]}  # from the checkpoint
    clock = iter([100.0, 102.0, 102.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    metrics.start_clock()
    metrics.record(lr=0.1)
    metrics.end_step()
    assert metrics.close_window(metrics.read(), batch_size=8)["images_per_second"] == 4  # one step in two seconds


def test_another_configuration_is_refused_and_named(tmp_path):
    run = toy_run(tmp_path)
    with pytest.raises(Interrupted):
        toy_train(run, stop_at=4)
    with pytest.raises(UserError, match=r"pretrain\.lr was 0\.01 and is 0\.02") as error:
        toy_run(tmp_path, lr=0.02, device_batch_size=2)
    assert "device_batch_size" not in str(error.value)
    assert toy_run(tmp_path, device_batch_size=2, save_every=50).step == 4  # what does not change the result may change


@pytest.mark.parametrize("old, new", [("fp32", "bf16"), ("fp32", "fp16"), ("fp16", "fp32")])
def test_precision_may_change_between_two_parts_of_a_run(tmp_path, old, new):
    """`precision: auto` does so by itself where a run moves to another machine."""
    with pytest.raises(Interrupted):
        toy_train(toy_run(tmp_path, precision=old), stop_at=4)
    run = toy_run(tmp_path, precision=new)
    assert run.step == 4
    toy_train(run)
    assert metrics(run)[-1]["step"] == 12


@pytest.mark.parametrize("limit, accumulation, device_batch", [(0, 1, 4), (4, 1, 4), (3, 2, 2), (1, 4, 1), (100, 1, 4)])
def test_accumulation_follows_from_the_device_batch(tmp_path, limit, accumulation, device_batch):
    run = toy_run(tmp_path, device_batch_size=limit)
    assert (run.accumulation, run.device_batch, run.steps_per_epoch) == (accumulation, device_batch, STEPS)


def test_accumulated_gradients_give_the_same_run(tmp_path):
    whole, parts = toy_run(tmp_path / "whole", clip_grad=0.5), toy_run(tmp_path / "parts", clip_grad=0.5, device_batch_size=1)
    toy_train(whole), toy_train(parts)
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(metrics(whole), metrics(parts)):
        assert_same_line(a, b)


def test_gradients_are_clipped_and_the_norm_before_is_reported(tmp_path):
    """With plain gradient descent a step is as long as its clipped gradient."""
    moved, start = {}, {}
    for clip in (0.0, 0.25):
        run = toy_run(tmp_path / str(clip), clip_grad=clip, epochs=1, log_every=1,
                      optimizer_class=lambda model, config: torch.optim.SGD(model.parameters(), lr=1.0))
        _, batch, last = next(run.micro_batches(0))
        before = [p.detach().clone() for p in run.model.parameters()]
        assert last
        run.backward(toy_loss(run, batch))
        toy_step(run)
        run.metrics.end_step()
        moved[clip] = torch.cat([(p - q).flatten() for p, q in zip(run.model.parameters(), before)]).norm().item()
        start[clip] = run.metrics.window["grad_norm"][0].item()
        assert all(p.grad is None for p in run.model.parameters())
    assert start[0.25] == pytest.approx(start[0.0]) == pytest.approx(moved[0.0], rel=1e-4) and start[0.0] > 0.25
    assert moved[0.25] == pytest.approx(0.25, rel=1e-4)


class Attention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_operations_of_a_forward_pass():
    """Those of attention too, whatever kernel the device has for it. A product [a, b] x [b, c] has 2abc."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), Attention())
    assert flops(model, torch.zeros(1, 2, 5, 8)) == 2 * 10 * 8 * 8 + 2 * (2 * 2 * 5 * 5 * 8)
    assert model.training and all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_too_few_images_for_one_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyLoader, "epoch", None)
    monkeypatch.setitem(globals(), "STEPS", 0)
    with pytest.raises(UserError, match=r"smaller than one batch of 4 images: lower pretrain\.batch_size"):
        toy_run(tmp_path)


def test_an_output_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "pretrain").write_text("a file stands where the folder should be")
    with pytest.raises(UserError, match="output_dir"):
        toy_run(tmp_path)


@pytest.mark.parametrize("device_batch_size", [4, 2])
@pytest.mark.parametrize("row, step", [(0, 1), (9, 3), (23, 6)])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_step(tmp_path, row, step, device_batch_size):
    run = toy_run(tmp_path, poison={(1, row): math.nan}, device_batch_size=device_batch_size)
    with pytest.raises(UserError, match=f"not finite at step {STEPS + step} ") as error:
        toy_train(run)
    text = str(error.value)
    saved = read_checkpoint(run.checkpoint_file)
    assert f"step {saved['step']}" not in text and "lower pretrain.lr" in text  # in fp32 there is nothing to go on with
    assert all(value.isfinite().all() for value in saved["model"].values())
    # Lines are written after steps 6, 8 and 12. Told are the losses of the line before and of the steps since, the last
    # five at most.
    assert text.split("before: ")[1].split(")")[0].count(", ") + 1 == {1: 2, 3: 2, 6: 5}[step]


def test_the_losses_that_are_told_come_before_the_broken_one(tmp_path):
    """With fp16 the scaler skips the step, so the losses after it are finite again."""
    run = toy_run(tmp_path, poison={(0, 9): math.nan}, precision="fp16", log_every=6)
    with pytest.raises(UserError, match=r"not finite at step 3 \(the losses before: [\d.]+, [\d.]+\)"):
        toy_train(run)


def test_an_infinite_gradient_never_reaches_a_checkpoint(tmp_path):
    """A finite loss can have a gradient that is not (a square root at 0). Without a scaler to skip the step, the weights
    are gone after it, so the run must end before it saves them."""
    run = toy_run(tmp_path, save_every=1, log_every=1, epochs=1)
    with pytest.raises(UserError, match="not finite at step"):
        toy_train(run, loss_of=lambda prediction: (prediction * (run.step < 3)).square().mean().sqrt())
    assert all(value.isfinite().all() for value in read_checkpoint(run.checkpoint_file)["model"].values())


def test_a_skipped_fp16_step_does_not_poison_the_averages(tmp_path):
    """An overflow of the scaled gradients skips the step, halves the scale and leaves weights and averages sound."""
    run = toy_run(tmp_path, precision="fp16", log_every=6, epochs=1)
    huge = 1e30  # times 65536, the scale: beyond float32 once it is squared in the gradient's norm
    run.optimizer.zero_grad()
    skipped = []
    for step, batch, _ in run.micro_batches(0):
        before = [p.detach().clone() for p in run.model.parameters()]
        loss = toy_loss(run, batch)
        run.record(loss=loss)
        run.backward(loss * huge * huge if step == 2 else loss)
        toy_step(run)
        skipped.append(all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before)))
    assert skipped == [False, False, True, False, False, False]
    assert run.scaler.get_scale() == 65536 / 2
    line = metrics(run)[0]
    assert math.isfinite(line["loss"]) and 0 < line["grad_norm"] < 1e3
    assert run.metrics.totals["grad_norm"][1] == 5 and run.metrics.totals["loss"][1] == 6
    assert all(p.isfinite().all() for p in run.model.parameters())


# --- two processes -----------------------------------------------------------------------------------------------


def one_of_two(rank: int, folder: Path) -> None:
    """What each of two real processes does; the tests below look at what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))  # if they part ways, fail instead of waiting for half an hour
    found = {"sum": all_reduce_sum(torch.tensor([1.0, 10.0 * rank]))}
    for total in (1, 7, 8):
        rows = torch.arange(2 * total).view(total, 2)
        found[f"gather {total}"] = gather_in_order(rows[rank::2], total)
    found["gather without total"] = gather_in_order(torch.tensor([rank, rank + 2]))
    found["main"] = on_main(lambda: f"from {processes.rank()}")

    def fail():
        raise UserError("rank 0 says no")

    try:
        on_main(fail)
    except UserError as error:
        found["error"] = str(error)

    for limit in (0, 1):
        run = toy_run(folder / f"run{limit}", device_batch_size=limit)
        toy_train(run)
        found[f"weights {limit}"] = run.model.state_dict()
    run = toy_run(folder / "stopped")
    try:
        toy_train(run, stop_at=2, stop_rank=1)  # only one of them hears the signal
    except Interrupted:
        found["stopped at"] = run.step
    try:
        toy_run(folder / "odd", batch_size=3)
    except UserError as error:
        found["odd batch"] = str(error)
    try:
        # Row 1 of the table is rank 1's: rank 0 must notice as well.
        toy_train(toy_run(folder / "nan", poison={(0, 1): math.nan}))
    except UserError as error:
        found["nan"] = str(error)
    torch.save(found, folder / f"found{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
    return folder, [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_sum_and_gather_in_global_order(two):
    for found in two[1]:
        assert found["sum"].tolist() == [2, 10]
        for total in (1, 7, 8):
            assert found[f"gather {total}"].tolist() == torch.arange(2 * total).view(total, 2).tolist()
        assert found["gather without total"].tolist() == [0, 1, 2, 3]


def test_two_processes_share_what_the_first_one_did(two):
    for found in two[1]:
        assert found["main"] == "from 0" and found["error"] == "rank 0 says no"


@pytest.mark.parametrize("limit", [0, 1])
def test_two_processes_train_as_one(two, tmp_path, limit):
    """The same weights and metrics as one process with the whole batch; with accumulation, too."""
    folder, found = two
    one = toy_run(tmp_path)
    toy_train(one)
    for results in found:
        for name, value in one.model.state_dict().items():
            assert torch.allclose(results[f"weights {limit}"][name], value, rtol=1e-5, atol=1e-6)
    lines = [json.loads(line) for line in (folder / f"run{limit}" / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in metrics(one)]
    for ours, theirs in zip(lines, metrics(one)):
        assert_same_line(ours, theirs)


def test_two_processes_stop_at_the_same_step(two):
    assert [found["stopped at"] for found in two[1]] == [4, 4]  # they agree when the metrics are read: every 4 steps


def test_two_processes_fail_with_the_same_sentence(two):
    for found in two[1]:
        assert "not finite at step 1 " in found["nan"]
        assert "a batch of 3 images cannot be shared by 2 processes" in found["odd batch"]
