"""One stage's run: it counts steps, deals out batches, seeds, logs, saves, and goes on where it was interrupted.

No reader of the method needs this file. The example at `Run` says how a loop uses it.
"""

import hashlib
import itertools
import json
import math
import time
import types
import warnings
from pathlib import Path
from typing import Any, Iterator, NoReturn

import torch
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from beitv2 import read_checkpoint
from support.errors import Interrupted, UserError, explained
from support.files import file_sha256, keep_lines, save_atomically
from support.launch import Stop
from support.loaders import TrainLoader
from support.optimizers import cosine_schedule
from support.options import FREE_TO_CHANGE, OptimizerConfig, as_dict, changed_options, section_of
from support.precision import Precision
from support.processes import all_reduce_sum, on_main, rank, say, setup_distributed, world_size

try:
    import fcntl
except ImportError:  # Windows: nothing there keeps two runs out of one folder
    fcntl = None


class Run:
    """One stage's run on this rank. A script keeps forward, loss, backward, clip and step in its own hands:

        run = Run("pretrain", config, config.pretrain)
        parallel = run.begin(samples, model=model, optimizer=optimizer)    # resumes by itself
        for epoch in run.epochs():
            for step, batch, last in run.micro_batches(epoch):  # `last`: of its optimizer step
                loss = ...
                run.backward(loss)
                if last:
                    ...                                         # clip, step, zero
                run.record(loss=loss)
            run.end_epoch(epoch, {"accuracy": ...})             # writes metrics and checkpoint

    OUTPUT_DIR/STAGE receives last.pt, metrics.jsonl and config.yaml. At the start of each step the default generators
    are seeded from (seed, step, rank), and every sample has a generator of its own. So a checkpoint needs no
    generator's state, and an interrupted run ends exactly where an uninterrupted one does.
    """

    def __init__(self, stage: str, config: types.SimpleNamespace, train: OptimizerConfig):
        self.stage, self.config, self.train = stage, config, train
        self.section = section_of(stage)
        self.device = setup_distributed(config.device, config.threads)
        self.precision = Precision(config.precision, self.device)
        self.autocast, self.scaler = self.precision.autocast, self.precision.scaler
        self.compiles = config.compile == "true" or (config.compile == "auto" and self.device.type == "cuda")
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
        warmup = "warmup_epochs" if hasattr(train, "warmup_epochs") else "warmup_iterations"
        self.cure = f"a lower {self.section}.lr or a longer {self.section}.{warmup}"  # if a loss is not finite
        self.stop: Stop | None = None  # hears signals, from `begin` on
        self.notes: dict[str, Any] = {}  # plain values to go with every checkpoint, such as the classes' names

    # --- before the first step -----------------------------------------------------------------------------------

    def parallel_twin(self, model: nn.Module) -> nn.Module:
        """The model, compiled and synchronised over ranks, as asked; it has the same weights."""
        if world_size() > 1 and self.device.type == "cuda":  # torch has it for GPUs only, and it must come first
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if self.compiles:
            model = torch.compile(model)
        if world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # Buffers are counters of each rank's own. torch 2.15 has another name for this, which 2.6 has not.
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
            model = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False,
                                            gradient_as_bucket_view=True)
        return model

    def begin(self, samples: Dataset, source: Path | None = None, example: tuple[Tensor, ...] = (),
              steps_per_epoch: int | None = None, **parts: Any) -> nn.Module:
        """Take the training samples, and what a checkpoint must hold: `parts`, anything with a state_dict. Goes on from
        the checkpoint of this folder if there is one. Returns the part "model" as the loop has to call it: compiled and
        synchronised over ranks, as asked.

        source            the earlier stage's checkpoint from which this one begins
        example           inputs for one image, by whose shapes the operations of a forward pass are counted
        steps_per_epoch   for runs that count steps: how many to do before each validation. Default: all images once
        """
        self.loader = TrainLoader(samples, self.device_batch, self.config.seed, workers=self.config.data.workers)
        self.parts, self.source = parts, source
        whole_steps = self.loader.batches_per_epoch // self.accumulation
        if whole_steps == 0:
            raise UserError(f"the training set is smaller than one batch of {self.train.batch_size} images: "
                            f"lower {self.section}.batch_size or add images")
        self.batches_per_epoch = whole_steps * self.accumulation  # of the loader; what makes no whole step is left out
        self.steps_per_epoch = steps_per_epoch or whole_steps
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
        if example:
            learn = sum(p.numel() for p in parts["model"].parameters() if p.requires_grad)
            say(f"{self.stage}: {learn / 1e6:.1f} M parameters learn; a forward pass takes "
                f"{flops(parts['model'], *example) / 1e9:.3g} GFLOPs per image")
        self.parallel = self.parallel_twin(parts["model"]) if "model" in parts else None
        return self.parallel

    def first_batches(self) -> list[dict]:
        """The batches of the first optimizer step, on the device."""
        return [self.on_device(batch) for batch in itertools.islice(self.loader.stream(0, self.batches_per_epoch),
                                                                    self.accumulation)]

    def on_device(self, batch: dict) -> dict:
        """A batch on the device, all but its `row`: caches lie in the host's memory, and asking the device takes time."""
        return {key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) and key != "row" else value
                for key, value in batch.items()}

    def cosine_schedule(self) -> list[float]:
        """The learning rate of each step of this run."""
        train = self.train
        return cosine_schedule(train.lr, train.min_lr, train.epochs, self.steps_per_epoch, train.warmup_epochs)

    def occupy_folder(self) -> bool:
        """Keep other runs out of the folder as long as this process lives; whether there is a checkpoint to go on from.

        The lock is on config.yaml, which therefore stays open. It belongs to the process: `kill -9` gives it back, and
        loader workers do not inherit it. (`flock` would be inherited.) Where a file system has no locks, there is none.
        """
        if self.checkpoint_file.is_dir():
            self.refuse("is a folder, and the checkpoint must go there", "move it away")
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

    def refuse(self, what: str, advice: str) -> NoReturn:
        """What lies in the place of this run's checkpoint is not its own."""
        raise UserError(f"'{self.checkpoint_file}' {what}: {advice}, or start anew with another output_dir")

    def claim_folder(self) -> None:
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
            self.refuse(f"is no checkpoint of this stage (it lacks {', '.join(sorted(missing))})", "move it away")
        # How the tokenizer was trained is the business of its own stage: its shape is checked when it is loaded.
        differences = [f"{key} was {old!r} and is {new!r}"
                       for key, old, new in changed_options(state["config"], self.config)
                       if key.split(".")[-1] not in FREE_TO_CHANGE
                       and (self.stage == "tokenizer" or key.split(".")[0] != "tokenizer")]
        if differences:
            self.refuse(f"was made with another configuration ({'; '.join(differences)})", "go back to it to continue")

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def resume(self, state: dict) -> None:
        self.compare_config(state, "steps_per_epoch", "scaler", *self.progress(), *self.parts)
        for name, here in self.notes.items():  # before the steps: another list of classes says more than their number
            if state.get(name, here) != here:
                self.refuse(f"was made for the {name} {shortened(state[name])}, and the data have {shortened(here)}",
                            "go back to these to continue")
        if state["steps_per_epoch"] != self.steps_per_epoch:
            self.refuse(f"was made with {state['steps_per_epoch']} steps per epoch, and these training images make "
                        f"{self.steps_per_epoch}", "go back to the same images to continue")
        # Else a probe of unfinished pre-training would later pass for one of the finished one.
        if state.get("source", self.source_digest) != self.source_digest:
            self.refuse(f"began from weights that '{self.source}' does not hold any more, because that stage has gone "
                        f"on or was run anew", f"remove the folder '{self.folder}' to begin from the weights of now")
        for name, part in self.parts.items():  # what does not fit is mostly another number of classes
            with explained(f"'{self.checkpoint_file}' does not fit this {name}", "go back to the same data set to "
                           "continue, or start anew with another output_dir", RuntimeError, ValueError):
                part.load_state_dict(state[name])
        if state["scaler"]:  # empty if that part of the run needed none
            self.scaler.load_state_dict(state["scaler"])
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
            about = dict(scaler=self.scaler.state_dict(), stage=self.stage, config=as_dict(self.config),
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

    # --- steps ---------------------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[int]:
        """The epochs that are left to do, from 0."""
        yield from range(self.epochs_done, self.train.epochs)
        self.stop.restore()
        if rank() == 0:
            self.config_file.close()  # gives the folder back

    def micro_batches(self, epoch: int) -> Iterator[tuple[int, dict, bool]]:
        """The batches of an epoch, on the device, from where the run stands: (step, batch, last).

        An optimizer step takes `accumulation` of them; `last` says that this one completes its step. Logging, saving
        and stopping happen here too, after the loop has dealt with that last one.
        """
        done = self.step - epoch * self.steps_per_epoch
        batches = self.loader.stream(self.step * self.accumulation, self.batches_per_epoch)
        bar = tqdm(range(done, self.steps_per_epoch), initial=done, total=self.steps_per_epoch, leave=False,
                   desc=f"{self.stage} {epoch + 1}/{self.train.epochs}", disable=None if rank() == 0 else True,
                   dynamic_ncols=True)
        self.metrics.start_clock()  # validation does not count as training time
        for _ in bar:
            seed_everything(self.config.seed, self.step, rank())
            for part in range(1, self.accumulation + 1):
                asked = time.perf_counter()
                batch = next(batches)
                self.metrics.waited += time.perf_counter() - asked
                last = part == self.accumulation
                if self.parallel is not None:
                    self.parallel.require_backward_grad_sync = last  # DDP: exchange gradients once a step
                yield self.step, self.on_device(batch), last
            self.step += 1
            self.metrics.end_step()
            end_of_epoch = self.step % self.steps_per_epoch == 0
            log = self.step % self.train.log_every == 0 or end_of_epoch
            if log:
                means = self.metrics.close_window(self.read_finite(), self.train.batch_size)
                self.metrics.write({"epoch": epoch, "step": self.step} | means)
                bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
            if (log or world_size() == 1) and self.stop.asked(self.device):
                self.interrupt()
            # Validation may take long, and torchrun grants 30 seconds after Ctrl-C: an epoch is saved before it.
            if end_of_epoch or (log and self.step - self.saved_step >= self.train.save_every):
                self.save()

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's share to the gradients."""
        self.scaler.scale(loss / self.accumulation).backward()

    def read_finite(self) -> dict[str, list[float]]:
        """The window's metrics. A loss, or a gradient, that is not finite ends the run before it is saved.

        With fp16 the gradient may be infinite: the scaler has skipped that step.
        """
        values = self.metrics.read()
        for name in ("loss",) if self.scaler.is_enabled() else ("loss", "grad_norm"):
            broken = [not math.isfinite(value) for value in values.get(name, [])]
            if any(broken):
                first = broken.index(True)
                step = self.step - len(broken) + first + 1
                losses = [*self.recent_losses, *values["loss"][:first]][-5:]
                advice = f"start anew in another output_dir with {self.cure}"
                if self.precision.name != "fp32" and self.saved_step:
                    advice += f", or go on from the checkpoint of step {self.saved_step} with precision=fp32"
                raise UserError(f"the {name.replace('grad_norm', 'gradient')} is not finite at step {step} (the losses "
                                f"before: {', '.join(f'{loss:.4g}' for loss in losses) or 'none'}): {advice}")
        self.recent_losses = values.get("loss", [])
        return values

    def interrupt(self) -> NoReturn:
        self.read_finite()
        self.save()
        raise Interrupted(f"{self.stage} is saved at step {self.step} of {self.total_steps} in "
                          f"'{self.checkpoint_file}'; the same command goes on from there")

    def end_epoch(self, epoch: int, val: dict[str, float], train: dict[str, float] | None = None) -> None:
        """Write the epoch's means and what was measured after it, and stop here if that was asked for.

        val     figures of the validation images; train: further figures of the training
        """
        train = self.metrics.close_epoch() | (train or {})
        self.metrics.write({"epoch": epoch, "step": self.step, "train": train, "val": val})
        figures = [f"{name} {value:.4g}" for name, value in train.items() if name not in ("lr", "grad_norm")]
        figures += [f"val {name} {value:.4g}" for name, value in val.items()]
        say(f"{self.stage} epoch {epoch + 1}/{self.train.epochs}: {', '.join(figures)}")
        self.epochs_done = epoch + 1
        if self.epochs_done == self.train.epochs:
            self.save()
        elif self.stop.asked(self.device):
            self.interrupt()

    def write_alone(self, val: dict[str, float]) -> None:
        """For a stage that takes no steps, after `claim_folder`: its configuration and figures replace earlier ones."""
        if rank() == 0:
            keep_lines(self.metrics.file, step=-1, epochs_done=0)
            self.write_config()
        self.metrics.write({"epoch": 0, "step": 0, "val": val})
        on_main(lambda: None)  # the others wait until the files are there
        say(f"{self.stage}: {', '.join(f'{name} {value:.4g}' for name, value in val.items())}")

    def picture(self, name: str, pixels: Any) -> None:
        """Show TensorBoard, if there is one, a uint8 array [H, W, 3]."""
        if self.metrics.board is not None:
            self.metrics.board.add_image(name, pixels, self.step, dataformats="HWC")


class Metrics:
    """What a run measures: over a window of steps, for the next line; over an epoch; and the time it takes.

    Values stay on the device until a line is due, since reading one makes the host wait for the device.
    """

    def __init__(self, file: Path, device: torch.device):
        self.file, self.device = file, device
        self.now: dict[str, list] = {}  # values of each metric in this step
        self.window: dict[str, list] = {}  # one value for each step since the last line
        self.totals: dict[str, list] = {}  # [sum, count] of each metric in this epoch
        self.board: Any = None  # TensorBoard's writer, on rank 0 and where it is installed
        self.start_clock()

    def start_clock(self) -> None:
        self.started, self.waited, self.timed_steps = time.perf_counter(), 0.0, 0  # waited: seconds, for data

    def record(self, **values: Tensor | float) -> None:
        """Note metrics of this step; what comes several times (micro-batches) is averaged."""
        for name, value in values.items():
            self.now.setdefault(name, []).append(value.detach().float() if isinstance(value, Tensor) else value)

    def end_step(self) -> None:
        for name, values in self.now.items():
            self.window.setdefault(name, []).append(sum(values) / len(values))
        self.now, self.timed_steps = {}, self.timed_steps + 1

    def read(self) -> dict[str, list[float]]:
        """The window's values of each metric, averaged over all ranks. Here the host waits for the device."""
        values = {name: torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in window])
                  for name, window in sorted(self.window.items())}
        return {name: (all_reduce_sum(value) / world_size()).tolist() for name, value in values.items()}

    def close_window(self, values: dict[str, list[float]], batch_size: int) -> dict[str, float]:
        """Add what `read` gave to the epoch; returns its means and the speed, and begins a new window."""
        seconds = time.perf_counter() - self.started
        means = {}
        for name, of_steps in values.items():
            finite = [value for value in of_steps if math.isfinite(value)]  # a skipped fp16 step has no gradient norm
            if finite:
                means[name] = sum(finite) / len(finite)
                total, count = self.totals.get(name, (0.0, 0))
                self.totals[name] = [total + sum(finite), count + len(finite)]
        means["images_per_second"] = round(self.timed_steps * batch_size / seconds, 1)
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


def seed_everything(*numbers: int) -> None:
    """Seed the default generators of CPU and GPUs from several numbers, which a hash keeps from colliding."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    seed = int.from_bytes(digest[:8], "little", signed=True)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():  # torch.manual_seed would note the whole call stack for GPUs that are not there
        torch.cuda.manual_seed_all(seed)


def shortened(names: list, most: int = 8) -> str:
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def flops(model: nn.Module, *inputs: Tensor) -> int:
    """Floating-point operations of a forward pass: counted on fake tensors, which have a shape and no numbers.

    Attention is counted as plain matrix products: torch's counter does not know the fused kernel of CPUs.
    """
    fake, was_training = FakeTensorMode(), model.training
    weights = {name: fake.from_tensor(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
    device = next(model.parameters()).device
    inputs = tuple(fake.from_tensor(value.to(device)) for value in inputs)
    with fake, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(model.eval(), weights, inputs)
    model.train(was_training)
    return counter.get_total_flops()
