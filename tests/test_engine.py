"""engine.py: configuration, several processes, precision, schedules, and a run that stops, fails, resumes and saves."""

import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from beitv2 import read_checkpoint  # noqa: E402
from beitv2 import parameter_groups  # noqa: E402
from support import processes  # noqa: E402
from support.errors import Interrupted, UserError  # noqa: E402
from support.files import fetch, keep_lines, read_lines, save_atomically, stage_checkpoint  # noqa: E402
from support.launch import STOP_SIGNALS, launch  # noqa: E402
from support.loaders import TrainLoader  # noqa: E402
from support.optimizers import cosine_schedule, make_optimizer, set_lr  # noqa: E402
from support.options import TrainConfig, as_dict, changed_keys, load_config  # noqa: E402
from support.precision import Precision, cpu_has_bf16  # noqa: E402
from support.processes import all_reduce_sum, gather_in_order, on_main, say, setup_distributed  # noqa: E402
from support.run import Metrics, Run, seed_everything  # noqa: E402


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run installs its own; pytest wants its own back."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- configuration -----------------------------------------------------------------------------------------------


@dataclass
class Options:
    rate: float = 0.5
    count: int = 3
    flag: bool = False
    name: str = "x"
    maybe: int | None = None
    pair: tuple[float, float] = (0.9, 0.999)
    kind: Literal["auto", "true", "false", "cuda"] = "auto"


def load(tmp_path, text: str, *overrides: str):
    (tmp_path / "c.yaml").write_text(text)
    return load_config({"data": Options}, [str(tmp_path / "c.yaml"), *overrides])


@pytest.mark.parametrize("text, field, value", [
    ("rate: 5e-4", "rate", 5e-4), ("rate: 2", "rate", 2.0), ("rate: '1.5'", "rate", 1.5), ("count: 4", "count", 4),
    ("flag: yes", "flag", True), ("name: '7'", "name", "7"), ("maybe: null", "maybe", None), ("maybe: 4", "maybe", 4),
    ("pair: [0.9, 1e-1]", "pair", (0.9, 0.1)), ("kind: cuda", "kind", "cuda"), ("kind: true", "kind", "true"),
])
def test_values_of_the_right_type(tmp_path, text, field, value):
    found = getattr(load(tmp_path, f"data: {{{text}}}").data, field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text, words", [
    ("rate: true", "a number, not True"), ("rate: fast", "a number, not 'fast'"), ("rate: [1]", "a number"),
    ("rate: null", "a number, not None"),
    ("count: 1.5", "a whole number, not 1.5"), ("count: true", "a whole number"), ("count: 1e3", "a whole number"),
    ("flag: 1", "true or false, not 1"), ("flag: 'yes'", "true or false"), ("name: 7", "text, not 7"),
    ("maybe: x", "a whole number"), ("pair: [0.9]", "a list of 2 values"), ("pair: 0.9", "a list of 2 values"),
    ("pair: [0.9, true]", "a number"), ("kind: cud", "one of auto, true, false, cuda"), ("kind: [auto]", "one of auto"),
])
def test_values_of_a_wrong_type(tmp_path, text, words):
    key = f"data.{text.split(':')[0]}"
    with pytest.raises(UserError) as error:
        load(tmp_path, f"data: {{{text}}}")
    assert f"'{key}'" in str(error.value) and "c.yaml" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("text, overrides, key, nearest", [
    ("data: {ratr: 1}", [], "data.ratr", "data.rate"), ("dta: {rate: 1}", [], "dta", "data"), ("sed: 1", [], "sed", "seed"),
    ("", ["data.cuont=1"], "data.cuont", "data.count"), ("", ["devise=cpu"], "devise", "device"),
    ("data: {zzz: 1}", [], "data.zzz", "data."), ("", ["dta.rate=1"], "dta.rate", "data.rate"),
    ("", ["data.rate.x=1"], "data.rate.x", "data.rate"), ("", ["finetune.lrr=1"], "finetune.lrr", "finetune.lr"), ("on: 1", [], "True", ""),
])
def test_an_unknown_key_is_told_with_the_nearest(tmp_path, text, overrides, key, nearest):
    with pytest.raises(UserError, match=f"unknown key '{key}'.* nearest valid key is '{nearest}") as error:
        load(tmp_path, text, *overrides)
    assert ("the command line" if overrides else "c.yaml") in str(error.value)


def test_the_command_line_wins_and_sections_of_others_are_left_alone(tmp_path):
    config = load(tmp_path, "seed: 3\ndata: {rate: 1, count: 5}\nsegment: {anything: 1}", "data.rate=2e-3", "seed=4",
                  "data.pair=[0.5, 0.6]", "data.name=a=b", "pretrain.epochs=1")
    assert (config.seed, config.data.rate, config.data.count, config.data.name) == (4, 2e-3, 5, "a=b")
    assert config.data.pair == (0.5, 0.6) and config.device == "auto" and not hasattr(config, "segment")


def test_an_empty_config_and_an_empty_section_have_the_defaults(tmp_path):
    assert load(tmp_path, "").data == load(tmp_path, "data:").data == Options()
    assert load(tmp_path, "data:  # all defaults", "data.count=7").data.count == 7


@pytest.mark.parametrize("text, overrides, words", [
    ("data: 5", [], "'data'.*section"), ("data: [rate]", [], "'data'.*section"), ("data: 5", ["data.rate=1"], "'data'"),
    ("- a", [], "list"), ("hello", [], "str"), ("data: {rate: [", [], "not valid YAML"), ("data: \trate", [], "not valid YAML"),
    ("", ["data.rate"], "'data.rate' on the command line"), ("", ["data.rate=["], "no valid value"), ("", ["data=5"], "'data'"),
])
def test_a_malformed_config(tmp_path, text, overrides, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, text, *overrides)


def test_a_config_that_is_not_there(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for arguments in ([], ["data.rate=1"], ["--help"], [str(tmp_path / "none.yaml")], [str(tmp_path)], [str(tmp_path / "binary.yaml")]):
        with pytest.raises(UserError, match="config"):
            load_config({"data": Options}, arguments)


def test_as_dict_is_plain(tmp_path):
    values = as_dict(load(tmp_path, "data: {count: 5}"))
    assert values["data"]["count"] == 5 and values["data"]["pair"] == [0.9, 0.999] and "file" not in values
    assert json.loads(json.dumps(values)) == values


# --- errors that a person can mend -------------------------------------------------------------------------------


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


# --- files from elsewhere ----------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """torch.hub's cache, in a folder of this test's own."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path
    torch.hub.set_dir(before)


def published(folder: Path, content: bytes) -> tuple[str, str]:
    """A file with a URL that works without a network, and its SHA-256."""
    folder.mkdir(exist_ok=True)
    (folder / "w.pth").write_bytes(content)
    return (folder / "w.pth").as_uri(), hashlib.sha256(content).hexdigest()


def test_fetch_downloads_once_and_checks(hub):
    url, sha256 = published(hub / "there", b"weights")
    path = fetch(url, "a.weights", sha256)
    assert path.read_bytes() == b"weights"
    (hub / "there" / "w.pth").unlink()
    assert fetch(url, "a.weights", sha256) == path  # without the network now
    assert fetch(str(path), "a.weights") == path  # a local path serves as well


def test_fetch_refuses_a_file_with_another_sum(hub):
    url, _ = published(hub / "there", b"weights")
    with pytest.raises(UserError, match="a.weights=PATH"):
        fetch(url, "a.weights", "0" * 64)
    assert not list((hub / "hub").rglob("w.pth"))


def test_fetch_checks_a_file_that_is_already_there(hub):
    url, sha256 = published(hub / "there", b"weights")
    fetch(url, "a.weights", sha256).write_bytes(b"spoiled")
    try:
        assert fetch(url, "a.weights", sha256).read_bytes() == b"weights"  # downloaded again, or ...
    except UserError:
        pass  # ... refused


def test_fetch_knows_the_sum_that_a_name_carries(hub):
    """NAME-SUM.pth, as the published tokenizers are called: the sum's first digits are checked unasked."""
    url, sha256 = published(hub / "there", b"weights")
    for name, fits in ((f"a-{sha256[:8]}.pth", True), ("a-d5036aa7.pth", False), ("a-large.pth", True)):
        Path(url.removeprefix("file://")).with_name(name).write_bytes(b"weights")
        renamed = url.replace("w.pth", name)
        if fits:
            assert fetch(renamed, "a.weights").read_bytes() == b"weights"
        else:
            with pytest.raises(UserError, match="a.weights=PATH"):
                fetch(renamed, "a.weights")


def test_fetch_does_not_confuse_two_files_of_one_name(hub):
    first, second = published(hub / "one", b"1")[0], published(hub / "two", b"2")[0]
    assert fetch(first, "k").read_bytes() == b"1" and fetch(second, "k").read_bytes() == b"2"


def test_fetch_and_stage_checkpoint_say_what_is_missing(hub, monkeypatch):
    with pytest.raises(UserError, match="a.weights.*none.pth"):
        fetch(str(hub / "none.pth"), "a.weights")
    with pytest.raises(UserError, match="a.weights=PATH"):
        fetch((hub / "none.pth").as_uri(), "a.weights")

    config = load(hub, f"output_dir: {hub}/run")
    with pytest.raises(UserError, match=r"torchrun tokenizer.py .*c.yaml.*, or set p\.t="):
        stage_checkpoint(config, "tokenizer", "", "p.t")
    # The command repeats what was changed on the command line, but for the options of the script that asks.
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "c.yaml", f"output_dir={hub}/run", "tokenizer.epochs=2",
                                      "data.root=a b", "pretrain.epochs=3"])
    with pytest.raises(UserError, match=f"c.yaml output_dir={hub}/run tokenizer.epochs=2 'data.root=a b'`, or"):
        stage_checkpoint(config, "tokenizer", "", "p.t")
    (hub / "run" / "tokenizer").mkdir(parents=True)
    (hub / "run" / "tokenizer" / "last.pt").touch()
    assert stage_checkpoint(config, "tokenizer", "", "p.t") == hub / "run" / "tokenizer" / "last.pt"
    assert stage_checkpoint(config, "tokenizer", str(hub / "c.yaml"), "p.t") == hub / "c.yaml"


# --- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, has_bf16, name", [("cpu", True, "bf16"), ("cpu", False, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp16")])
@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler|.*CUDA is not available")
def test_precision_auto(device, has_bf16, name, monkeypatch):
    monkeypatch.setattr("support.precision.cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation)
    assert Precision("auto", torch.device(device)).name == name


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_by_name(name, dtype):
    precision = Precision(name, torch.device("cpu"))
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert precision.scaler.is_enabled() == (name == "fp16")


@pytest.mark.parametrize("name, fused", [("bf16", False), ("fp32", True)])
def test_attention_on_a_cpu_is_fused_except_in_bf16_where_its_gradient_is_slow(name, fused):
    precision = Precision(name, torch.device("cpu"))
    q = torch.randn(2, 3, 5, 8, dtype=precision.dtype, requires_grad=True)
    attended = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert ("FlashAttention" in attended.grad_fn.name()) == fused
    Precision("fp32", torch.device("cpu"))  # the switch is the process's


def test_cpu_has_bf16_survives_a_torch_without_the_question(monkeypatch):
    assert isinstance(cpu_has_bf16(), bool)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert cpu_has_bf16() is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_an_error():
    with pytest.raises(UserError, match="device=cpu"):
        setup_distributed("cuda")


# --- schedules and parameter groups ------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup_epochs, peak", [(0, 0), (1, 6), (2.5, 17)])
def test_the_schedule_rises_to_its_base_and_falls_towards_its_end(warmup_epochs, peak):
    values = cosine_schedule(1.0, 0.1, epochs=10, steps_per_epoch=7, warmup_epochs=warmup_epochs)
    assert len(values) == 70 and max(values) == values[peak] == 1.0
    assert all(a < b for a, b in zip(values[:peak], values[1:])) and all(a >= b for a, b in zip(values[peak:], values[peak + 1:]))
    assert values[0] == (1.0 if peak == 0 else 0.0) and 0.1 < values[-1] < 0.11


def test_a_warmup_longer_than_the_run():
    assert cosine_schedule(1.0, 0.0, epochs=2, steps_per_epoch=2, warmup_epochs=5) == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_frozen_parameters_have_no_group_and_nested_ones_keep_their_kind():
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "frozen": nn.Linear(2, 2).requires_grad_(False)})
    model.encoder.cls_token = nn.Parameter(torch.zeros(1, 1, 2))
    decays = {name: group["weight_decay"] for group in parameter_groups(model, 0.05) for name in group["names"]}
    assert decays == {"encoder.weight": 0.05, "encoder.bias": 0, "encoder.cls_token": 0}


def test_set_lr_keeps_the_scales():
    groups = [dict(params=[nn.Parameter(torch.ones(1))], lr_scale=scale) for scale in (1.0, 0.25)]
    optimizer = make_optimizer(groups, TrainConfig())
    set_lr(optimizer, 0.4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.1]


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

    def __init__(self, run: Run, poison: dict | None = None):
        self.device_batch, self.poison = run.device_batch, poison or {}  # poison: (epoch, global row) -> value
        self.batches_per_epoch = STEPS * BATCH // (run.device_batch * processes.world_size())

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
    config = load_config({"pretrain": TrainConfig}, [str(file)])
    run = Run("pretrain", config, config.pretrain)
    model = nn.Sequential(nn.Dropout(dropout), nn.Linear(5, 1))
    optimizer = optimizer_class(parameter_groups(model, 0.05), config.pretrain)
    run.model, run.optimizer, run.parallel = model, optimizer, run.prepare(model)
    run.begin(ToyLoader(run, poison), read_checkpoint, model=model, optimizer=optimizer)
    return run


def toy_train(run, stop_at: int | None = None, stop_rank: int = 0, loss_of=None,
              how: signal.Signals = signal.SIGTERM) -> nn.Module:
    """The loop of the scripts. `stop_at`: the step in which the signal to stop arrives."""
    for epoch in run.epochs():
        for micro_batches in run.steps(epoch):
            for batch in micro_batches:
                x = batch["x"]
                prediction = run.parallel(x)[:, 0]
                loss = (prediction - x.sum(dim=1)).square().mean() if loss_of is None else loss_of(prediction)
                run.backward(loss)
                run.record(loss=loss)
            if run.step + 1 == stop_at and processes.rank() == stop_rank:
                signal.raise_signal(how)
            run.optimizer_step(run.optimizer)
        run.end_epoch(epoch, train={}, val={"score": float(epoch)})
    run.finish()
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
            for micro_batches in run.steps(epoch):
                if run.step == 9:
                    raise ZeroDivisionError  # stands for kill -9
                for batch in micro_batches:
                    loss = (run.parallel(batch["x"])[:, 0] - batch["x"].sum(dim=1)).square().mean()
                    run.backward(loss)
                    run.record(loss=loss)
                run.optimizer_step(run.optimizer)
            run.end_epoch(epoch, train={}, val={"score": float(epoch)})
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
    assert len(again.epochs()) == 0
    toy_train(again)
    assert losses(again) == before and same_weights(again.model, run.model)


def test_the_speed_counts_only_steps_since_the_run_went_on(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path / "metrics.jsonl", torch.device("cpu"))
    metrics.window = {"lr": [0.1, 0.1, 0.1]}  # from the checkpoint
    clock = iter([100.0, 102.0, 102.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    metrics.start_clock()
    metrics.record(lr=0.1)
    assert metrics.close_window(metrics.read(), batch_size=8)["images_per_second"] == 4  # one step in two seconds
    assert metrics.untimed == 0


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
                      optimizer_class=lambda groups, config: torch.optim.SGD([p for g in groups for p in g["params"]], lr=1.0))
        steps = run.steps(0)
        batch = next(next(steps))
        before = [p.detach().clone() for p in run.model.parameters()]
        run.backward((run.model(batch["x"])[:, 0] - batch["x"].sum(dim=1)).square().mean())
        run.optimizer_step(run.optimizer)
        moved[clip] = torch.cat([(p - q).flatten() for p, q in zip(run.model.parameters(), before)]).norm().item()
        start[clip] = run.metrics.window["grad_norm"][0].item()
        assert all(p.grad is None for p in run.model.parameters())
    assert start[0.25] == pytest.approx(start[0.0]) == pytest.approx(moved[0.0], rel=1e-4) and start[0.0] > 0.25
    assert moved[0.25] == pytest.approx(0.25, rel=1e-4)


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
    # Lines are written after steps 6, 8 and 12. Told are the losses of the line before and of the steps since, one per
    # micro-batch, the last five at most.
    told = {1: 2, 3: 2, 6: 5}[step] * run.accumulation
    assert text.split("before: ")[1].split(")")[0].count(", ") + 1 == min(told, 5)


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
    for micro_batches in run.steps(0):
        before = [p.detach().clone() for p in run.model.parameters()]
        for batch in micro_batches:
            loss = (run.parallel(batch["x"])[:, 0].float() - batch["x"].sum(dim=1)).square().mean()
            run.record(loss=loss)
            run.backward(loss * huge * huge if run.step == 2 else loss)
        run.optimizer_step(run.optimizer)
        skipped.append(all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before)))
    assert skipped == [False, False, True, False, False, False]
    assert run.precision.scaler.get_scale() == 65536 / 2
    line = metrics(run)[0]
    assert math.isfinite(line["loss"]) and 0 < line["grad_norm"] < 1e3
    assert run.metrics.totals["grad_norm"][1] == 5 and run.metrics.totals["loss"][1] == 6
    assert all(p.isfinite().all() for p in run.model.parameters())


# --- checkpoints on disk -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("numbers", [10, 1_000_000])
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, numbers):
    """/dev/full refuses every write as a full disk does: small files at the end, large ones half-way."""
    path = tmp_path / "last.pt"
    save_atomically({"x": torch.ones(3)}, path)
    (tmp_path / "last.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write the checkpoint '.*last.pt'.*free some space"):
        save_atomically({"x": torch.zeros(numbers)}, path)
    assert torch.equal(read_checkpoint(path)["x"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    save_atomically({"x": torch.zeros(2)}, path)  # space again
    assert torch.equal(read_checkpoint(path)["x"], torch.zeros(2))


def test_a_folder_that_has_gone(tmp_path):
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        save_atomically({}, tmp_path / "gone" / "last.pt")


def test_keep_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    keep_lines(path, 3, 1)  # nothing to do, no error
    lines = ['{"epoch": 0, "step": 1}', '{"epoch": 0, "step": 1, "val": {}}', '{"epoch": 1, "step": 3, "loss": 0.5}',
             '{"epoch": 1, "step": 3, "val": {}}', '{"epoch": 2, "step": 4}', '{"epoch": 2, "step": 5, "lo']
    path.write_text("\n".join(lines))
    keep_lines(path, 3, 1)
    assert path.read_text().splitlines() == lines[:3] and path.read_text().endswith("\n")
    assert list(tmp_path.iterdir()) == [path]


def test_changed_keys():
    old, new = {"a": {"x": 1, "y": 2}, "b": 3, "c": 1}, {"a": {"x": 1, "y": 5}, "b": 3, "d": 2}
    assert list(changed_keys(old, new)) == [("a.y", 2, 5), ("c", 1, None), ("d", None, 2)]


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
