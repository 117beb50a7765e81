import contextlib
import hashlib
import json
import math
import time
import types
import typing
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support.errors import Interrupted, UserError, explained
from support.files import file_sha256, keep_lines, save_atomically
from support.launch import Stop
from support.options import FREE_TO_CHANGE, SECTIONS, OptimizerConfig, as_dict, changed_keys
from support.precision import Precision
from support.processes import all_reduce_sum, on_main, rank, say, setup_distributed, world_size


try:
    import fcntl
except ImportError:  # Windows: nothing there keeps two runs out of one folder
    fcntl = None


def seed_everything(*numbers: int) -> None:
    """Seed the default generators of CPU and GPUs from several numbers, which a hash keeps from colliding."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


class Metrics:
    """What a run measures: over a window of steps, for the next line; over an epoch; and the time it takes."""

    def __init__(self, file: Path, device: torch.device):
        self.file, self.device = file, device
        self.window: dict[str, list] = {}  # values of each metric since the last line
        self.totals: dict[str, list] = {}  # [sum, count] of each metric in this epoch
        self.board: Any = None  # TensorBoard's writer, on rank 0 and where it is installed
        self.start_clock()

    def start_clock(self) -> None:
        self.started, self.waited = time.perf_counter(), 0.0  # `waited`: seconds of waiting for data
        self.untimed = len(self.window.get("lr", ()))  # steps of this window that were done before an interruption

    def record(self, **values: Tensor | float) -> None:
        """Note this step's metrics."""
        for name, value in values.items():
            self.window.setdefault(name, []).append(value.detach().float() if isinstance(value, Tensor) else value)

    def read(self) -> dict[str, Tensor]:
        """The window's values of each metric, averaged over all ranks. Here the host waits for the device."""
        values = {name: torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in window])
                  for name, window in sorted(self.window.items())}
        return {name: (all_reduce_sum(value) / world_size()).cpu() for name, value in values.items()}

    def close_window(self, values: dict[str, Tensor], batch_size: int) -> dict[str, float]:
        """Add what `read` gave to the epoch; returns its means and the speed, and begins a new window."""
        seconds = time.perf_counter() - self.started
        means = {}
        for name, value in values.items():
            value = value[value.isfinite()]  # a skipped fp16 step has no gradient norm
            if len(value):
                means[name] = value.mean().item()
                total = self.totals.setdefault(name, [0.0, 0])
                total[0], total[1] = total[0] + value.sum().item(), total[1] + len(value)
        means["images_per_second"] = round((len(values["lr"]) - self.untimed) * batch_size / seconds, 1)
        means["data_wait"] = round(self.waited / seconds, 3)
        self.window = {}
        self.start_clock()
        return means

    def close_epoch(self) -> dict[str, float]:
        """The epoch's means over its steps."""
        means = {name: total / count for name, (total, count) in self.totals.items()}
        self.totals = {}
        return means

    def write(self, line: dict) -> None:
        """Add a line to metrics.jsonl, and its numbers to TensorBoard's files where that is installed."""
        if rank() > 0:
            return
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for part, values in (("step", line), ("train", line.get("train", {})), ("val", line.get("val", {}))):
                for name, value in values.items():
                    if isinstance(value, float):
                        self.board.add_scalar(f"{part}/{name}", value, line["step"])


def open_board(folder: Path, step: int) -> Any:
    """TensorBoard's writer into `folder`, forgetting what came after `step`; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


class Run:
    """One stage's run on this rank. A script keeps forward, loss, backward and step in its own hands:

        run = Run("pretrain", config, config.pretrain)
        parallel = run.prepare(model)
        run.begin(loader, read_checkpoint, model=model, optimizer=optimizer)    # resumes by itself
        for epoch in run.epochs():
            for micro_batches in run.steps(epoch):              # one optimizer step each
                for batch in micro_batches:
                    loss = ...
                    run.backward(loss)
                    run.record(loss=loss)
                run.optimizer_step(optimizer)
            run.end_epoch(epoch, train={}, val={"loss": ...})   # writes metrics and checkpoint
        run.finish()

    OUTPUT_DIR/STAGE receives last.pt, metrics.jsonl and config.yaml. At the start of each step the default
    generators are seeded from (seed, step, rank), and every sample has a generator of its own, so a checkpoint needs
    no generator's state, and an interrupted run ends exactly where an uninterrupted one does.
    """

    def __init__(self, stage: str, config: types.SimpleNamespace, train: OptimizerConfig):
        self.stage, self.config, self.train = stage, config, train
        # finetune's modes, and runs from scratch, have stages of their own.
        self.section = next((section for section in SECTIONS if stage.startswith(section)), "finetune")
        self.device = setup_distributed(config.device)
        self.precision = Precision(config.precision, self.device)
        self.autocast = self.precision.autocast
        self.folder = Path(config.output_dir) / stage
        self.checkpoint_file = self.folder / "last.pt"
        with explained(f"cannot make the folder '{self.folder}'", "choose another output_dir", OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        seed_everything(config.seed)  # the same initial weights on all ranks
        say(f"{stage}: {world_size()} x {self.device.type}, {self.precision.name}, into {self.folder}")

        share, remainder = divmod(train.batch_size, world_size())
        if share == 0 or remainder:
            raise UserError(f"a batch of {train.batch_size} images cannot be shared by {world_size()} processes: "
                            f"choose {self.section}.batch_size a multiple of their number")
        limit = train.device_batch_size or share
        self.accumulation = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= limit)
        self.device_batch = share // self.accumulation  # images of one forward pass on this rank

        self.step = 0  # optimizer steps done
        self.epochs_done = 0  # trained and validated
        self.best = -math.inf  # highest score of an epoch so far
        self.metrics = Metrics(self.folder / "metrics.jsonl", self.device)
        self.record = self.metrics.record
        self.recent_losses: list[float] = []  # of the window before, to be told if the next one breaks
        self.notes: dict[str, Any] = {}  # plain values to go with every checkpoint, such as the classes' names
        self.source: Path | None = None  # the earlier stage's checkpoint from which this one begins
        self.parallel: nn.Module | None = None  # what `prepare` made

    def prepare(self, model: nn.Module) -> nn.Module:
        """The training-ready twin of a model that is on the device: compiled and synchronised over ranks, as asked."""
        if world_size() > 1 and self.device.type == "cuda":  # torch has it for GPUs only, and it must come first
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if self.config.compile == "true" or (self.config.compile == "auto" and self.device.type == "cuda"):
            model = torch.compile(model)
        if world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            with warnings.catch_warnings():
                # Buffers are counters of each rank's own. torch 2.15 has another name for this, which 2.6 has not.
                warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
                model = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False,
                                                gradient_as_bucket_view=True)
        self.parallel = model
        return model

    def begin(self, loader: Any, read_checkpoint: Callable, **parts: Any) -> None:
        """Take the training data and the `parts` that a checkpoint must hold (anything with a state_dict)."""
        self.loader, self.parts = loader, parts
        self.steps_per_epoch = loader.batches_per_epoch // self.accumulation
        if self.steps_per_epoch == 0:
            raise UserError(f"the training set is smaller than one batch of {self.train.batch_size} images: "
                            f"lower {self.section}.batch_size or add images")
        self.total_steps = self.train.epochs * self.steps_per_epoch
        self.source_digest = on_main(lambda: file_sha256(self.source)) if self.source else ""
        if on_main(self.occupy_folder):  # one rank decides: all go on, or all start anew
            self.resume(read_checkpoint(self.checkpoint_file))
        if self.epochs_done >= self.train.epochs:
            say(f"{self.stage}: finished already; its figures are in {self.metrics.file}")
        if rank() == 0:
            keep_lines(self.metrics.file, self.step, self.epochs_done)
            self.metrics.board = open_board(self.folder, self.step)
            self.write_config()
        # With one process the run can stop after any step. Asking the other ranks in each step would cost too much.
        self.stop = Stop("this step" if world_size() == 1 else f"at most {self.train.log_every} steps")
        self.saved_step = self.step
        self.metrics.start_clock()

    def occupy_folder(self) -> bool:
        """Keep other runs out of the folder as long as this process lives; whether there is a checkpoint to go on from.

        The lock is on config.yaml, which therefore stays open. It belongs to the process: `kill -9` gives it back, and
        loader workers do not inherit it. (`flock` would be inherited.) Where a file system has no locks, there is none.
        """
        if self.checkpoint_file.is_dir():
            raise UserError(f"'{self.checkpoint_file}' is a folder, and the checkpoint must go there: move it away, or "
                            f"choose another output_dir")
        self.config_file = open(self.folder / "config.yaml", "a")
        try:
            if fcntl:
                fcntl.lockf(self.config_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another run is writing into '{self.folder}': wait until it ends, or choose another "
                            f"output_dir") from None
        except OSError:
            pass
        return self.checkpoint_file.is_file()

    def claim_folder(self, read_checkpoint: Callable) -> None:
        """For a stage that takes no steps, instead of `begin`, and before it computes: see that its results will
        replace none but its own."""
        if on_main(self.occupy_folder):
            self.compare_config(read_checkpoint(self.checkpoint_file))

    def write_config(self) -> None:
        self.config_file.truncate(0)
        yaml.safe_dump(as_dict(self.config), self.config_file, sort_keys=False)
        self.config_file.flush()

    def compare_config(self, state: dict, *needed: str) -> None:
        """UserError if a checkpoint of this folder lacks an entry or was made with another configuration."""
        if missing := {"config", *needed} - state.keys():
            raise UserError(f"'{self.checkpoint_file}' is no checkpoint of this stage (it lacks "
                            f"{', '.join(sorted(missing))}): move it away, or choose another output_dir")
        # How the tokenizer was trained is the business of its own stage: its shape is checked when it is loaded.
        differences = [f"{key} was {old!r} and is {new!r}"
                       for key, old, new in changed_keys(state["config"], as_dict(self.config))
                       if key.split(".")[-1] not in FREE_TO_CHANGE
                       and (self.stage == "tokenizer" or key.split(".")[0] != "tokenizer")]
        if differences:
            raise UserError(f"'{self.checkpoint_file}' was made with another configuration ({'; '.join(differences)}): "
                            f"go back to it to continue, or start anew with another output_dir")

    def resume(self, state: dict) -> None:
        file, anew = f"'{self.checkpoint_file}'", "start anew with another output_dir"
        self.compare_config(state, "steps_per_epoch", "scaler", *self.progress(), *self.parts)
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise UserError(f"{file} was made with {state['steps_per_epoch']} steps per epoch, and these training "
                            f"images make {self.steps_per_epoch}: go back to the same images to continue, or {anew}")
        # Else a probe of unfinished pre-training would later pass for one of the finished one.
        if state.get("source", self.source_digest) != self.source_digest:
            raise UserError(f"{file} began from weights that '{self.source}' does not hold any more, because that "
                            f"stage has gone on or was run anew: remove the folder '{self.folder}' to begin from the "
                            f"weights of now, or choose another output_dir")
        for name, part in self.parts.items():  # another number of classes is what does not fit, mostly
            with explained(f"{file} does not fit this {name}", f"go back to the same data set to continue, or {anew}",
                           RuntimeError, ValueError):
                part.load_state_dict(state[name])
        if state["scaler"]:  # empty if that part of the run needed none
            self.precision.scaler.load_state_dict(state["scaler"])
        self.step, self.epochs_done, self.best = state["step"], state["epochs_done"], state["best"]
        self.metrics.window, self.metrics.totals = state["window"], state["totals"]
        if self.epochs_done < self.train.epochs:
            say(f"{self.stage}: going on from step {self.step} of {self.total_steps}")

    def progress(self) -> dict[str, Any]:
        """How far the run is: what a checkpoint holds beside the parts."""
        return dict(step=self.step, epochs_done=self.epochs_done, best=self.best, window=self.metrics.window,
                    totals=self.metrics.totals)

    def save(self) -> None:
        """Write last.pt on rank 0, atomically: whatever happens, the previous one stays whole until then."""
        self.saved_step = self.step
        if rank() == 0:
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            about = dict(scaler=self.precision.scaler.state_dict(), stage=self.stage, config=as_dict(self.config),
                         epochs=self.train.epochs, steps_per_epoch=self.steps_per_epoch, source=self.source_digest)
            save_atomically(parts | self.notes | self.progress() | about, self.checkpoint_file)
            if self.metrics.board is not None:
                self.metrics.board.flush()

    def save_model(self, name: str, model: nn.Module, val: dict[str, float]) -> None:
        """Write a model and its figures, without its training state, to OUTPUT_DIR/STAGE/NAME, on rank 0."""
        if rank() == 0:
            state = dict(model=model.state_dict(), val=val, stage=self.stage, step=self.step,
                         config=as_dict(self.config))
            save_atomically(state | self.notes, self.folder / name)

    def epochs(self) -> range:
        return range(self.epochs_done, self.train.epochs)

    def steps(self, epoch: int) -> Iterator[Iterator[dict]]:
        """Yield one optimizer step's micro-batches after the other, from where the run stands in this epoch."""
        done = self.step - epoch * self.steps_per_epoch
        batches = self.loader.epoch(epoch, start=done * self.accumulation)
        bar = tqdm(range(done, self.steps_per_epoch), initial=done, total=self.steps_per_epoch, leave=False,
                   desc=f"{self.stage} {epoch + 1}/{self.train.epochs}", disable=None if rank() == 0 else True,
                   dynamic_ncols=True)
        for _ in bar:
            seed_everything(self.config.seed, self.step, rank())
            yield self.micro_batches(batches)
            self.step += 1
            end_of_epoch = self.step % self.steps_per_epoch == 0
            log = self.step % self.train.log_every == 0 or end_of_epoch
            if log:
                values = self.read_finite()
                means = self.metrics.close_window(values, self.train.batch_size)
                self.metrics.write({"epoch": epoch, "step": self.step} | means)
                bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
            if (log or world_size() == 1) and self.stop.asked(self.device):
                self.interrupt()
            # Validation may take long, and torchrun grants 30 seconds after Ctrl-C: the epoch is saved before it too.
            if end_of_epoch or (log and self.step - self.saved_step >= self.train.save_every):
                self.save()

    def micro_batches(self, batches: Iterator[dict]) -> Iterator[dict]:
        """The batches of one optimizer step, on the device. Ranks exchange gradients after the last one only."""
        for part in range(1, self.accumulation + 1):
            start = time.perf_counter()
            batch = next(batches)
            self.metrics.waited += time.perf_counter() - start
            without_exchange = getattr(self.parallel, "no_sync", contextlib.nullcontext)
            with without_exchange() if part < self.accumulation else contextlib.nullcontext():
                yield {key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
                       for key, value in batch.items()}

    def backward(self, loss: Tensor) -> None:
        self.precision.scaler.scale(loss / self.accumulation).backward()

    def optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, step, clear; records the gradient norm and the highest learning rate of all groups."""
        scaler = self.precision.scaler
        scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.train.clip_grad or math.inf)
        scaler.step(optimizer)  # does nothing where fp16 gradients overflowed
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.record(lr=max(group["lr"] for group in optimizer.param_groups), grad_norm=norm)

    def read_finite(self) -> dict[str, Tensor]:
        """The window's metrics. A loss, or a gradient, that is not finite ends the run before it is saved.

        With fp16 the gradient may be infinite: the scaler has skipped that step.
        """
        values = self.metrics.read()
        for name in ("loss",) if self.precision.scaler.is_enabled() else ("loss", "grad_norm"):
            broken = (~values.get(name, torch.zeros(0)).isfinite()).nonzero()
            if len(broken):
                first, steps = int(broken[0]), len(values["lr"])  # a step may have several losses
                step = self.step - steps + first * steps // len(values[name]) + 1
                losses = [*self.recent_losses, *values["loss"][:first].tolist()][-5:]
                warmup = "warmup_epochs" if hasattr(self.train, "warmup_epochs") else "warmup_iterations"
                advice = (f"start anew in another output_dir with a lower {self.section}.lr or a longer "
                          f"{self.section}.{warmup}")
                if self.precision.name != "fp32" and self.saved_step:
                    advice += f", or go on from the checkpoint of step {self.saved_step} with precision=fp32"
                raise UserError(f"the {name.replace('grad_norm', 'gradient')} is not finite at step {step} (the losses "
                                f"before: {', '.join(f'{loss:.4g}' for loss in losses) or 'none'}): {advice}")
        self.recent_losses = values.get("loss", torch.zeros(0))[-5:].tolist()
        return values

    def interrupt(self) -> typing.NoReturn:
        self.read_finite()
        self.save()
        raise Interrupted(f"{self.stage} is saved at step {self.step} of {self.total_steps} in "
                          f"'{self.checkpoint_file}'; the same command goes on from there")

    def end_epoch(self, epoch: int, train: dict[str, float], val: dict[str, float]) -> None:
        """Write the epoch's means and what was measured after it, save, and stop here if that was asked for."""
        train = self.metrics.close_epoch() | train
        self.metrics.write({"epoch": epoch, "step": self.step, "train": train, "val": val})
        figures = [f"{name} {value:.4g}" for name, value in train.items() if name not in ("lr", "grad_norm")]
        figures += [f"val {name} {value:.4g}" for name, value in val.items()]
        say(f"{self.stage} epoch {epoch + 1}/{self.train.epochs}: {', '.join(figures)}")
        self.epochs_done = epoch + 1
        if self.epochs_done < self.train.epochs and self.stop.asked(self.device):
            self.interrupt()
        self.save()
        self.metrics.start_clock()  # validation does not count as training time

    def write_alone(self, val: dict[str, float]) -> None:
        """For a stage that takes no steps, after `claim_folder`: its configuration and figures replace earlier ones."""
        if rank() == 0:
            keep_lines(self.metrics.file, step=-1, epochs_done=0)
            self.write_config()
        self.metrics.write({"epoch": 0, "step": 0, "val": val})
        say(f"{self.stage}: {', '.join(f'{name} {value:.4g}' for name, value in val.items())}")

    def picture(self, name: str, pixels: Any) -> None:
        """Show TensorBoard, if there is one, a uint8 array [H, W, 3]."""
        if self.metrics.board is not None:
            self.metrics.board.add_image(name, pixels, self.step, dataformats="HWC")

    def finish(self) -> None:
        """Give the signals and the folder back."""
        self.stop.restore()
        if rank() == 0:
            self.config_file.close()
