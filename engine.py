"""The plumbing that every training loop shares; nothing in here knows about images, masks or codes.

    launch, UserError          one clear sentence instead of a traceback, where a person can mend the mistake
    RunConfig, load_config     one YAML file and `section.key=value` on the command line, checked key by key
    rank, gather_in_order ...  torchrun and DistributedDataParallel, or one plain process
    Precision                  autocast and the fp16 gradient scaler
    parameter_groups ...       who decays, who learns how fast, and when
    Run                        one stage's run: its folder, steps, checkpoints, resume, metrics and progress bar
    knn_accuracy               a cheap look at what frozen features know
"""

import contextlib
import copy
import dataclasses
import difflib
import errno
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import types
import typing
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Callable, Iterator, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------
# Errors that a person can mend


class UserError(Exception):
    """A mistake of the person at the keyboard, or of their disk. The message says what is wrong and what to do."""


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


def launch(main: Callable[[], None], *expected: type[Exception]) -> None:
    """Run a script's `main`. UserError and the `expected` errors print one sentence and exit with 1."""
    try:
        main()
    except (UserError, *expected) as error:
        fail(" ".join(str(error).split()))
    except torch.OutOfMemoryError:
        fail("the device is out of memory: set a smaller device_batch_size (the result stays the same, but for "
             "BatchNorm's statistics in segment.py: gradients are accumulated), or model.checkpoint_activations=true")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        fail(f"cannot read or write '{error.filename or 'a file'}' ({error.strerror}): give it the right permissions, "
             f"free some space or choose another output_dir; the same command goes on from the last checkpoint")
    except RuntimeError as error:
        if world_size() == 1 or not any(words in str(error) for words in ("closed by peer", "reset by peer")):
            raise
        fail("another process has ended, and this one cannot go on alone")  # the other one says why
    except Interrupted as stop:
        fail(str(stop), status=130)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from the last checkpoint, if there was one", status=130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(sentence: str, status: int = 1) -> typing.NoReturn:
    """Say it once and leave. All ranks mostly fail alike, so the others wait, and torchrun ends them with the first.

    A rank that fails because another one has gone waits too, whatever its number.
    """
    if int(os.environ.get("RANK", 0)) > 0 or sentence.startswith("another process"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    sys.stdout.flush()
    print(f"{'stopped' if status == 130 else 'error'}: {sentence}", file=sys.stderr, flush=True)
    os._exit(status)  # a plain exit would wait for loader workers and for collectives that no one answers


# ----------------------------------------------------------------------------------------------------------------
# Configuration

SECTIONS = ("data", "model", "tokenizer", "pretrain", "finetune", "segment", "visualize")

# Types of options: what a value may be, smallest and largest included.
Count = Annotated[int, 1, math.inf]
Natural = Annotated[int, 0, math.inf]
Amount = Annotated[float, 0.0, math.inf]
Share = Annotated[float, 0.0, 1.0]


@dataclass
class RunConfig:
    """The keys at the top of a config, outside all sections."""

    output_dir: str = "runs/default"  # each stage writes OUTPUT_DIR/STAGE and looks there for the one before
    seed: Natural = 0  # of everything: initial weights, sample order, crops, masks, drop path
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: CUDA if there is a GPU
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the device has it, see Precision
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto: on CUDA


@dataclass
class OptimizerConfig:
    """What each stage's section says about its optimisation."""

    batch_size: Count = 1024  # images per optimizer step, over all devices; no other value follows from it
    device_batch_size: Natural = 0  # the most images that one device holds; more are accumulated. 0: no limit
    lr: Amount = 1e-3  # peak learning rate
    betas: tuple[Share, Share] = (0.9, 0.999)  # AdamW
    weight_decay: Amount = 0.05
    clip_grad: Amount = 0.0  # largest gradient norm; 0: not clipped
    log_every: Count = 20  # steps between two lines of metrics.jsonl: the only moments when host waits for device
    save_every: Count = 500  # steps between two checkpoints within an epoch; one more follows each epoch


@dataclass
class TrainConfig(OptimizerConfig):
    """The same for stages that count epochs and follow a cosine."""

    epochs: Count = 100
    min_lr: Amount = 1e-6  # where the cosine ends
    warmup_epochs: Amount = 5  # linear warm-up from 0


# A run may go on with other values of these: they change its speed or its place, and its result by rounding only.
FREE_TO_CHANGE = {"output_dir", "device", "precision", "compile", "root", "download", "workers", "device_batch_size",
                  "save_every", "checkpoint_activations", "eval_only", "overlays"}


def load_config(sections: dict[str, type], arguments: list[str] | None = None) -> types.SimpleNamespace:
    """Read `CONFIG.yaml [section.key=value ...]` into checked dataclasses.

    sections   the script's own: name -> dataclass. Other sections are checked by name only.
    returns    a namespace with the fields of RunConfig, one attribute per section, and `file`
    Raises UserError for a missing file, an unknown key (naming the nearest valid one) or a wrong type.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    script = Path(sys.argv[0]).name
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise UserError(f"name a config file first: torchrun {script} configs/demo.yaml [section.key=value ...]")
    file = arguments[0]
    try:
        values = yaml.safe_load(Path(file).read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(str(path) for path in Path("configs").glob("*.yaml"))) or "none in configs/"
        raise UserError(f"cannot read the config '{file}' ({getattr(error, 'strerror', None) or error}); configs "
                        f"here: {known}") from error
    except yaml.YAMLError as error:
        raise UserError(f"'{file}' is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"'{file}' must hold `section: {{key: value}}`, not a {type(values).__name__}")

    origin = {}  # keys that the command line sets
    for argument in arguments[1:]:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"'{argument}' on the command line is not of the form section.key=value")
        *parents, name = key.split(".")
        target = values
        for parent in parents:
            if target.get(parent) is None:  # missing, or a section without keys
                target[parent] = {}
            target = target[parent]
            if not isinstance(target, dict):
                raise UserError(f"'{key}' on the command line: '{parent}' is a value, not a section")
        try:
            target[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"'{argument}' on the command line has no valid value") from error
        origin[key] = "the command line"

    def source(key: str) -> str:
        return origin.get(key, f"'{file}'")

    config = types.SimpleNamespace(file=file)
    run_fields = {field.name for field in dataclasses.fields(RunConfig)}
    for key in values:
        if key not in run_fields and key not in SECTIONS:
            raise unknown_key(key, source(key), [*run_fields, *SECTIONS])
    for name, value in vars(fill(RunConfig, {k: v for k, v in values.items() if k in run_fields}, "", source)).items():
        setattr(config, name, value)
    for section, kind in sections.items():
        content = values.get(section)
        content = {} if content is None else content
        if not isinstance(content, dict):
            raise UserError(f"'{section}' in '{file}' must be a section with keys, not {content!r}")
        setattr(config, section, fill(kind, content, f"{section}.", source))
    return config


def unknown_key(key: str, source: str, valid: list[str]) -> UserError:
    nearest = difflib.get_close_matches(str(key), valid, n=1, cutoff=0)[0]
    return UserError(f"unknown key '{key}' in {source}; the nearest valid key is '{nearest}'")


def fill(kind: type, values: dict, prefix: str, source: Callable[[str], str]) -> Any:
    """Build the dataclass `kind` from `values`, checking names and types."""
    types_of = typing.get_type_hints(kind, include_extras=True)
    checked = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in types_of:
            raise unknown_key(key, source(key), [f"{prefix}{valid}" for valid in types_of])
        try:
            checked[name] = convert(value, types_of[name])
        except (TypeError, ValueError) as error:
            raise UserError(f"'{key}' in {source(key)} must be {error}, not {value!r}") from None
    return kind(**checked)


def convert(value: Any, kind: Any) -> Any:
    """Check one value against its declared type; the ValueError says what it must be."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else convert(value, arguments[0])
    if origin is Annotated:
        kind, smallest, largest = arguments
        value = convert(value, kind)
        if not smallest <= value <= largest:
            raise ValueError(f"at least {smallest}" + (f" and at most {largest}" if largest < math.inf else ""))
        return value
    if kind is str and value is None:  # `key=` on the command line
        return ""
    if origin is Literal:
        text = str(value).lower() if isinstance(value, bool) else value  # YAML reads true as a boolean
        if text not in arguments:
            raise ValueError("one of " + ", ".join(map(str, arguments)))
        return text
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)) or not value or (origin is tuple and len(value) != len(arguments)):
            raise ValueError(f"a list of {len(arguments) if origin is tuple else 'one or more'} values")
        return origin(convert(item, arguments[min(i, len(arguments) - 1)]) for i, item in enumerate(value))
    if kind is float:
        # YAML reads 5e-4 as a string. It also reads `yes` as a boolean, which Python would take for a number.
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        except (TypeError, ValueError):
            raise ValueError("a number") from None
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        raise ValueError({int: "a whole number", bool: "true or false", str: "text"}[kind])
    return value


def as_dict(config: types.SimpleNamespace) -> dict:
    """The configuration as plain values, for YAML and checkpoints."""
    values = {key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
              for key, value in vars(config).items() if key != "file"}
    return json.loads(json.dumps(values))  # tuples become lists


# ----------------------------------------------------------------------------------------------------------------
# Several processes, or one


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


def setup_distributed(device: str = "auto") -> torch.device:
    """Join the process group that torchrun announces, if any, and take this rank's device (NCCL on CUDA, else gloo)."""
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda was asked for, but there is no CUDA GPU here: set device=cpu or device=auto")
    use_cuda = torch.cuda.is_available() and device != "cpu"
    if use_cuda and local_world > torch.cuda.device_count():
        raise UserError(f"{local_world} processes on this machine want a GPU each, and it has "
                        f"{torch.cuda.device_count()}: lower torchrun's --nproc-per-node, or set device=cpu")
    if use_cuda:
        torch.cuda.set_device(local_rank)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    else:
        torch.set_num_threads(max(1, cores() // local_world))  # torchrun gives each process one thread: share all out
    if "RANK" in os.environ and not dist.is_initialized():
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
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def fetch(source: str, key: str, sha256: str = "") -> Path:
    """A local path of the file at `source`, which is a path or a URL (downloaded once, by one rank, and checked).

    key      the config key that can name a local file instead, for the error message
    sha256   the sum's hex digits, or their beginning, if known
    """
    if "://" not in source:
        if not Path(source).is_file():
            raise UserError(f"{key} names '{source}', and there is no such file")
        return Path(source)
    if not sha256 and (found := re.search(r"-([0-9a-f]{8,})\.[^/]*$", source)):
        sha256 = found[1]  # NAME-SUM.pth is torch.hub's custom, and that of the published tokenizers
    # A folder for each URL: many checkpoints are called last.pt.
    folder = hashlib.sha256(source.encode()).hexdigest()[:8]
    target = Path(torch.hub.get_dir()) / "checkpoints" / folder / source.rsplit("/", 1)[-1].split("?")[0]

    def download() -> None:
        if target.is_file() and (not sha256 or file_sha256(target).startswith(sha256)):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(source, str(target), sha256 or None, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot download {source} ({error}): download it where there is a network and set "
                            f"{key}=PATH") from error

    on_main(download)
    return target


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------
# Precision


class Precision:
    """Autocast, and for fp16 the gradient scaler that keeps small gradients from vanishing.

    auto is bf16 on devices that multiply it natively (GPUs since Ampere, CPUs with AMX or AVX512-BF16), fp16 with a
    scaler on older GPUs, and fp32 on other CPUs. Weights, optimizer and residual stream are fp32 in every case.
    """

    def __init__(self, name: str, device: torch.device):
        if name == "auto":
            if device.type == "cuda":
                name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
            else:
                name = "bf16" if cpu_has_bf16() else "fp32"
        self.name, self.device = name, device
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.name != "fp32")


def cpu_has_bf16() -> bool:
    """Whether the CPU has instructions for bf16 products; emulated ones would be slower than fp32."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check is not None and check() for check in checks)


# ----------------------------------------------------------------------------------------------------------------
# Optimisation: who decays, who learns how fast, and when


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Sort the trainable parameters into AdamW groups by weight decay and learning-rate scale.

    Vectors, biases, [CLS] and position embeddings do not decay; mask token and bias tables do, as published.
    With `layer_decay` < 1 (fine-tuning), lower layers learn more slowly, see `lr_scale`.
    """
    depth = len(getattr(model, "blocks", ()))
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bare = parameter.ndim == 1 or name.endswith(".bias") or name.split(".")[-1] in ("cls_token", "pos_embed")
        decay = 0.0 if bare else weight_decay
        scale = lr_scale(name, depth, layer_decay) if layer_decay < 1 else 1.0
        group = groups.setdefault((decay, scale), dict(params=[], names=[], weight_decay=decay, lr_scale=scale))
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def lr_scale(name: str, depth: int, layer_decay: float) -> float:
    """The share of the learning rate that the parameter `name` gets: layer_decay^(L + 1 - i), in layer i of L = `depth`.

    The embeddings ([CLS], mask token, positions, patches) are layer 0, block i is layer i, counted from 1, and all else
    is layer L + 1.
    """
    if name.startswith(("cls_token", "mask_token", "pos_embed", "patch_embed")):
        layer = 0
    elif name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1  # names count blocks from 0
    else:
        layer = depth + 1
    return layer_decay ** (depth + 1 - layer)


def make_optimizer(groups: list[dict], config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def cosine_schedule(base: float, final: float, epochs: int, steps_per_epoch: int, warmup_epochs: float) -> list[float]:
    """The value at every step: linear from 0 to `base` over the warm-up, then half a cosine down towards `final`."""
    warmup = min(round(warmup_epochs * steps_per_epoch), epochs * steps_per_epoch)
    rest = epochs * steps_per_epoch - warmup
    rise = [base * step / max(1, warmup - 1) for step in range(warmup)]
    fall = [final + 0.5 * (base - final) * (1 + math.cos(math.pi * step / rest)) for step in range(rest)]
    return rise + fall


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def seed_everything(*numbers: int) -> None:
    """Seed the default generators of CPU and GPUs from several numbers, which a hash keeps from colliding."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


# ----------------------------------------------------------------------------------------------------------------
# One stage's run


class Run:
    """One stage's run on this rank: where it computes, how far it is, what it has measured, how it goes on.

    A script uses it like this, and keeps forward, loss, backward and step in its own hands:

        run = Run("pretrain", config, config.pretrain)
        run.begin(loader, read_checkpoint, model=model, optimizer=optimizer)    # resumes by itself
        for epoch in run.epochs():
            for micro_batches in run.steps(epoch):              # one optimizer step each
                for batch in micro_batches:
                    loss = ...
                    run.backward(loss)
                    run.record(loss=loss)
                run.optimizer_step(optimizer)
            run.end_epoch(epoch, train={}, val={"loss": ...})   # validation; writes metrics and checkpoint
        run.finish()

    OUTPUT_DIR/STAGE receives last.pt, metrics.jsonl and config.yaml. At the start of each step the default
    generators are seeded from (seed, step, rank), and every sample has a generator of its own, so a checkpoint needs
    no generator's state, and an interrupted run ends exactly where an uninterrupted one does.
    """

    PROGRESS = ("step", "epochs_done", "window", "totals", "best")  # what a checkpoint says of how far the run is

    def __init__(self, stage: str, config: types.SimpleNamespace, train: OptimizerConfig):
        self.stage, self.config, self.train = stage, config, train
        # finetune's modes, and runs from scratch, have stages of their own.
        self.section = next((section for section in SECTIONS if stage.startswith(section)), "finetune")
        self.device = setup_distributed(config.device)
        self.precision = Precision(config.precision, self.device)
        self.autocast = self.precision.autocast
        self.folder = Path(config.output_dir) / stage
        on_main(self.prepare_folder)
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
        self.window: dict[str, list] = {}  # values of each metric since the last line of metrics.jsonl
        self.totals: dict[str, list] = {}  # [sum, count] of each metric in this epoch
        self.recent_losses: list[float] = []  # of the window before, to be told if the next one breaks
        self.best = -math.inf  # highest score of an epoch so far
        self.board = None  # TensorBoard's writer, on rank 0 and where it is installed
        self.notes: dict[str, Any] = {}  # plain values to go with every checkpoint, such as the classes' names
        self.ddp: nn.Module | None = None  # the model that exchanges gradients, with several ranks
        self.stop_signal: int | None = None  # SIGINT or SIGTERM, once this rank has received one

    def prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder '{self.folder}' ({error.strerror}): choose another output_dir")

    # -- models ---------------------------------------------------------------------------------------------------

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
            self.ddp = model
        return model

    # -- resume, checkpoints --------------------------------------------------------------------------------------

    @property
    def checkpoint_file(self) -> Path:
        return self.folder / "last.pt"

    def begin(self, loader: Any, read_checkpoint: Callable, **parts: Any) -> None:
        """Take the training data and the `parts` that a checkpoint must hold (anything with a state_dict)."""
        self.loader, self.parts = loader, parts
        self.steps_per_epoch = loader.batches_per_epoch // self.accumulation
        if self.steps_per_epoch == 0:
            raise UserError(f"the training set is smaller than one batch of {self.train.batch_size} images: "
                            f"lower {self.section}.batch_size or add images")
        self.total_steps = self.train.epochs * self.steps_per_epoch
        if on_main(self.checkpoint_file.is_file):  # one rank decides: all go on, or all start anew
            self.resume(read_checkpoint(self.checkpoint_file))
        if rank() == 0:
            keep_lines(self.folder / "metrics.jsonl", self.step, self.epochs_done)
        if self.epochs_done >= self.train.epochs:
            say(f"{self.stage}: finished already; its figures are in {self.folder / 'metrics.jsonl'}")
        if rank() == 0:
            (self.folder / "config.yaml").write_text(yaml.safe_dump(as_dict(self.config), sort_keys=False))
        if rank() == 0:
            self.board = open_board(self.folder, self.step)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request_stop)
        self.saved_step, self.window_start = self.step, time.perf_counter()
        self.waited = 0.0  # seconds spent waiting for data in this window

    def resume(self, state: dict) -> None:
        needed = {"config", "steps_per_epoch", "scaler", *self.PROGRESS, *self.parts}
        if missing := needed - state.keys():
            raise UserError(f"'{self.checkpoint_file}' is no checkpoint of this stage (it lacks "
                            f"{', '.join(sorted(missing))}): move it away, or choose another output_dir")
        # How the tokenizer was trained is the business of its own stage: its shape is checked when it is loaded.
        others = () if self.stage == "tokenizer" else ("tokenizer",)
        before, now = ({key: value for key, value in values.items() if key not in others}
                       for values in (state["config"], as_dict(self.config)))
        differences = [f"{key} was {old!r} and is {new!r}" for key, old, new in changed_keys(before, now)
                       if key.split(".")[-1] not in FREE_TO_CHANGE]
        if differences:
            raise UserError(f"'{self.checkpoint_file}' was made with another configuration ({'; '.join(differences)}): "
                            f"go back to it to continue, or start anew with another output_dir")
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise UserError(f"'{self.checkpoint_file}' was made with {state['steps_per_epoch']} steps per epoch, and "
                            f"these training images make {self.steps_per_epoch}: go back to the same images to "
                            f"continue, or start anew with another output_dir")
        for name, part in self.parts.items():
            try:
                part.load_state_dict(state[name])
            except (RuntimeError, ValueError) as error:  # another number of classes, mostly
                reason = str(error).splitlines()[-1].strip()
                raise UserError(f"'{self.checkpoint_file}' does not fit this {name} ({reason}): go back to the same "
                                f"data set to continue, or start anew with another output_dir") from error
        if state["scaler"]:  # empty if that part of the run needed none
            self.precision.scaler.load_state_dict(state["scaler"])
        for name in self.PROGRESS:
            setattr(self, name, state[name])
        if self.epochs_done < self.train.epochs:
            say(f"{self.stage}: going on from step {self.step} of {self.total_steps}")

    def save(self) -> None:
        """Write last.pt on rank 0, atomically: whatever happens, the previous one stays whole until then."""
        if rank() == 0:
            state = {key: part.state_dict() for key, part in self.parts.items()}
            state |= self.notes
            state |= {name: getattr(self, name) for name in self.PROGRESS}
            state |= dict(scaler=self.precision.scaler.state_dict(), steps_per_epoch=self.steps_per_epoch,
                          stage=self.stage, config=as_dict(self.config))
            save_atomically(state, self.checkpoint_file)
            if self.board is not None:
                self.board.flush()
        self.saved_step = self.step

    def save_model(self, name: str, model: nn.Module, val: dict[str, float]) -> None:
        """Write a model and its figures, without its training state, to OUTPUT_DIR/STAGE/NAME, on rank 0."""
        if rank() == 0:
            state = dict(model=model.state_dict(), val=val, stage=self.stage, step=self.step,
                         config=as_dict(self.config))
            save_atomically(state | self.notes, self.folder / name)

    def request_stop(self, number: int, frame: Any) -> None:
        if self.stop_signal is None:
            self.stop_signal, self.stop_time = number, time.monotonic()
            if rank() == 0:
                when = "this step" if world_size() == 1 else f"at most {self.train.log_every} steps"  # see `steps`
                print(f"\nstopping after {when} and saving; once more to stop at once", file=sys.stderr, flush=True)
        # Ctrl-C reaches us twice under torchrun: from the terminal, and from torchrun, which passes it on.
        elif time.monotonic() - self.stop_time > 3:
            raise KeyboardInterrupt

    # -- the loop -------------------------------------------------------------------------------------------------

    def epochs(self) -> range:
        return range(self.epochs_done, self.train.epochs)

    def steps(self, epoch: int) -> Iterator[Iterator[dict]]:
        """Yield one optimizer step's micro-batches after the other, from where the run stands in this epoch."""
        done = self.step - epoch * self.steps_per_epoch
        batches = self.loader.epoch(epoch, start=done * self.accumulation)
        self.bar = tqdm(total=self.steps_per_epoch, initial=done, desc=f"{self.stage} {epoch + 1}/{self.train.epochs}",
                        disable=None if rank() == 0 else True, leave=False, dynamic_ncols=True)
        for _ in range(done, self.steps_per_epoch):
            seed_everything(self.config.seed, self.step, rank())
            yield self.micro_batches(batches)
            self.step += 1
            self.bar.update()
            end_of_epoch = self.step % self.steps_per_epoch == 0
            log = self.step % self.train.log_every == 0 or end_of_epoch
            if log:
                self.flush(epoch)
            if (log or world_size() == 1) and self.asked_to_stop():  # asking the other ranks in each step would cost
                self.stop()
            # Validation may take long, and torchrun grants 30 seconds after Ctrl-C: the epoch is saved before it too.
            if end_of_epoch or (log and self.step - self.saved_step >= self.train.save_every):
                self.save()
        self.bar.close()

    def micro_batches(self, batches: Iterator[dict]) -> Iterator[dict]:
        """The batches of one optimizer step, on the device. Ranks exchange gradients after the last one only."""
        for part in range(self.accumulation):
            start = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - start
            more = part + 1 < self.accumulation
            with self.ddp.no_sync() if more and self.ddp else contextlib.nullcontext():
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

    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop. They must all stop at the same step, so they must all ask."""
        asked = self.stop_signal is not None
        if world_size() == 1:
            return asked
        return all_reduce_sum(torch.tensor([float(asked)], device=self.device)).item() > 0

    def stop(self) -> typing.NoReturn:
        self.check_finite({name: torch.stack([torch.as_tensor(v, dtype=torch.float32) for v in values]).cpu()
                           for name, values in self.window.items()})
        self.save()
        raise Interrupted(f"{self.stage} is saved at step {self.step} of {self.total_steps} in "
                          f"'{self.checkpoint_file}'; the same command goes on from there")

    # -- metrics --------------------------------------------------------------------------------------------------

    def record(self, **values: Tensor | float) -> None:
        """Note this step's metrics. Tensors stay on the device until the next line of metrics.jsonl."""
        for name, value in values.items():
            self.window.setdefault(name, []).append(value.detach().float() if isinstance(value, Tensor) else value)

    def flush(self, epoch: int) -> None:
        """Average the window over its steps and all ranks, and write a line. Here the host waits for the device."""
        seconds = time.perf_counter() - self.window_start
        names = sorted(self.window)
        values = [torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in self.window[name]])
                  for name in names]
        per_step = [len(v) for v in values]
        means = all_reduce_sum(torch.cat(values)).cpu() / world_size()
        values = dict(zip(names, means.split(per_step)))

        self.check_finite(values)
        line = {"epoch": epoch, "step": self.step}
        for name, value in values.items():
            value = value[value.isfinite()]  # a skipped fp16 step has no gradient norm
            if len(value):
                line[name] = value.mean().item()
                total = self.totals.setdefault(name, [0.0, 0])
                total[0], total[1] = total[0] + value.sum().item(), total[1] + len(value)
        line["images_per_second"] = round(len(self.window["lr"]) * self.train.batch_size / seconds, 1)
        line["data_wait"] = round(self.waited / seconds, 3)
        self.write(line)
        self.bar.set_postfix({key: f"{value:.4g}" for key, value in line.items() if key not in ("epoch", "step")})
        self.window, self.waited, self.window_start = {}, 0.0, time.perf_counter()

    def check_finite(self, values: dict[str, Tensor]) -> None:
        """End the run at a loss, or a gradient, that is not finite. (fp16 steps with such a gradient were skipped.)"""
        for name in ("loss",) if self.precision.scaler.is_enabled() else ("loss", "grad_norm"):
            value = values.get(name, torch.zeros(1))
            if not value.isfinite().all():
                first = int((~value.isfinite()).nonzero()[0])
                steps = len(values["lr"]) if "lr" in values else len(value)
                step = self.step - steps + first * steps // len(value) + 1
                recent = [*self.recent_losses, *values.get("loss", value)[:first].tolist()][-5:]
                told = ", ".join(f"{loss:.4g}" for loss in recent) or "none"
                warmup = "warmup_epochs" if hasattr(self.train, "warmup_epochs") else "warmup_iterations"
                advice = (f"start anew in another output_dir with a lower {self.section}.lr or a longer "
                          f"{self.section}.{warmup}")
                if self.precision.name != "fp32" and self.saved_step:
                    advice += f", or go on from the checkpoint of step {self.saved_step} with precision=fp32"
                raise UserError(f"the {name.replace('grad_norm', 'gradient')} is not finite at step {step} (the losses "
                                f"before: {told}): {advice}")
        self.recent_losses = values.get("loss", torch.zeros(0))[-5:].tolist()

    def write(self, line: dict) -> None:
        """Add a line to metrics.jsonl, and its numbers to TensorBoard's files where that is installed."""
        if rank() > 0:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for part, values in (("step", line), ("train", line.get("train", {})), ("val", line.get("val", {}))):
                for name, value in values.items():
                    if isinstance(value, float):
                        self.board.add_scalar(f"{part}/{name}", value, line["step"])

    def picture(self, name: str, pixels: Any) -> None:
        """Show TensorBoard, if there is one, a uint8 array [H, W, 3]."""
        if self.board is not None:
            self.board.add_image(name, pixels, self.step, dataformats="HWC")

    def end_epoch(self, epoch: int, train: dict[str, float], val: dict[str, float]) -> None:
        """Write the epoch's means and what was measured after it, save, and stop here if that was asked for."""
        train = {name: total / count for name, (total, count) in self.totals.items()} | train
        self.write({"epoch": epoch, "step": self.step, "train": train, "val": val})
        figures = [f"{name} {value:.4g}" for name, value in train.items() if name not in ("lr", "grad_norm")]
        figures += [f"val {name} {value:.4g}" for name, value in val.items()]
        say(f"{self.stage} epoch {epoch + 1}/{self.train.epochs}: {', '.join(figures)}")
        self.totals, self.epochs_done = {}, epoch + 1
        if self.epochs_done < self.train.epochs and self.asked_to_stop():
            self.stop()
        self.save()
        self.window_start = time.perf_counter()  # validation does not count as training time

    def finish(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)


def open_board(folder: Path, step: int) -> Any:
    """TensorBoard's writer into `folder`, forgetting what came after `step`; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint beside `path` and rename it when it is whole, so that no reader ever sees half of one."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write the checkpoint '{path}' ({reason}): free some space, then give the same command "
                        f"to go on from the checkpoint before") from error


def read_lines(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, but for a last one that was cut short, or is being written just now."""
    lines = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def keep_lines(path: Path, step: int, epochs_done: int) -> None:
    """Drop what an interrupted run measured after its last checkpoint: it is about to be measured again."""
    if not path.is_file():
        return
    part = path.with_suffix(".part")
    kept = [line for line in read_lines(path)
            if line["step"] <= step and (line["epoch"] < epochs_done or "val" not in line)]
    part.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    os.replace(part, path)


def changed_keys(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after


def stage_checkpoint(config: types.SimpleNamespace, stage: str, given: str, key: str, name: str = "last.pt") -> Path:
    """Where an earlier stage's checkpoint lies: the one that `key` gives (path or URL), or OUTPUT_DIR/STAGE/NAME."""
    if given:
        return fetch(given, key)
    path = Path(config.output_dir) / stage / name
    if not path.is_file():
        script, scratch, _ = stage.partition("_scratch")
        raise UserError(f"there is no '{path}' yet: make it with `torchrun {script}.py {config.file}"
                        f"{f' {script}.weights=none' if scratch else ''}`{key and f', or set {key}=PATH_OR_URL'}")
    return path


def say_if_unfinished(content: dict, path: Path) -> None:
    """Say so when a checkpoint of an earlier stage comes from a run that has not ended."""
    section = content.get("config", {}).get(content.get("stage"))
    if section and "epochs_done" in content:
        total = section["iterations"] if "iterations" in section else section["epochs"] * content["steps_per_epoch"]
        if content["epochs_done"] * content["steps_per_epoch"] < total:
            say(f"note: '{path}' is unfinished, at step {content['step']} of {total}")


# ----------------------------------------------------------------------------------------------------------------
# Evaluation


class MeanOfWeights:
    """An exponential moving average of a model's weights: evaluated instead of the model, never trained."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = copy.deepcopy(model).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        averages, values = list(self.model.state_dict().values()), list(model.state_dict().values())
        torch._foreach_lerp_(averages, values, 1 - self.decay)

    def state_dict(self) -> dict:
        return self.model.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state)


@torch.no_grad()
def extract_features(run: Run, tokens_of: Callable[[Tensor], Tensor], loader: Any, total: int) -> dict[str, Tensor]:
    """Frozen features of all images that the ranks' loaders deal out, in order, on every rank.

    tokens_of   uint8 images [B, 3, S, S] -> normed tokens [B, T, D], [CLS] first
    total       number of images over all ranks
    returns     "cls" [total, D], "mean" of the patches [total, D], float32, and "labels" int64 [total]
    """
    parts = {"cls": [], "mean": [], "labels": []}
    for batch in loader:
        with run.autocast():
            tokens = tokens_of(batch["image"].to(run.device, non_blocking=True)).float()
        parts["cls"].append(tokens[:, 0])
        parts["mean"].append(tokens[:, 1:].mean(dim=1))
        parts["labels"].append(batch["label"].to(run.device))
    return {name: gather_in_order(torch.cat(part), total) for name, part in parts.items()}


@torch.no_grad()
def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20,
                 temperature: float = 0.07) -> float:
    """Share in [0, 1] of `queries` [Q, D] whose class the k nearest of `bank` [N, D] by cosine vote for.

    Votes weigh exp(cosine / temperature), as in DINO (arXiv 2104.14294). In chunks: Q x N need not fit in memory.
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    classes = int(bank_labels.max()) + 1
    hits = 0
    for chunk, truth in zip(queries.split(1024), labels.split(1024)):
        similarity, index = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)  # [q, k]
        votes = torch.zeros(len(chunk), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[index], (similarity / temperature).exp())
        hits += (votes.argmax(dim=1) == truth).sum().item()
    return hits / len(queries)
