"""How a script starts: its options, its processes, its precision, the files it is given, and how a mistake is told.

Read RunConfig, OptimizerConfig and TrainConfig to see what can be set; a new option is one more line in a dataclass,
here or at the top of a script. Skip the rest until something is refused.
"""

import contextlib
import dataclasses
import difflib
import errno
import hashlib
import importlib
import json
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import time
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Callable, Iterator, Literal

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------
# Mistakes. Each one that a person can mend ends as a UserError, and `launch` prints its sentence and no traceback. Skip
# this part unless you write a script of your own, which ends with `launch(main)`.


class UserError(Exception):
    """A mistake of the person at the keyboard, or of their disk. The message says what is wrong and what to do."""


@contextlib.contextmanager
def explained(what: str, advice: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn these errors of a library into a UserError: "WHAT (the library's reason): ADVICE"."""
    try:
        yield
    except errors as error:
        reason = textwrap.shorten(getattr(error, "strerror", None) or str(error), 400)
        raise UserError(f"{what} ({reason}): {advice}") from error


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


signals_heard: set[int] = set()  # those that asked this process to stop; engine.Stop adds them, `fail` looks here


class Unbreakable:
    """A stream that may lose its reader (a closed pipe or terminal): what it cannot print any more ends no training."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
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
    except torch.OutOfMemoryError:
        fail("the device is out of memory: set a smaller device_batch_size (gradients are accumulated; of the result "
             "only rounding and random numbers change, and in segment.py BatchNorm's statistics), or "
             "model.checkpoint_activations=true")
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


def leave_with_traceback(*error: Any) -> typing.NoReturn:
    """An error that nobody foresaw, such as one in code that you have just changed: show where it is, and leave."""
    sys.__excepthook__(*error)
    sys.stdout.flush()
    os._exit(1)  # Python itself would tell loader workers to end by SIGTERM, which they ignore, and wait for ever


def fail(sentence: str, status: int = 1) -> typing.NoReturn:
    """Say it once and leave. All ranks mostly fail alike, so the others wait, and torchrun ends them with the first.

    A rank that fails because another one has gone waits too, whatever its number. Where torchrun's SIGTERM was quicker
    than the failure, the rank that failed first has spoken already, and this one ends in silence.
    """
    waits = int(os.environ.get("RANK", 0)) > 0 or sentence.startswith("another process")
    if waits:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    sys.stdout.flush()
    if not (waits and signal.SIGTERM in signals_heard):
        print(f"{'stopped' if status == 130 else 'error'}: {sentence}", file=sys.stderr, flush=True)
    os._exit(status)  # a plain exit would wait for loader workers and for collectives that no one answers


# ----------------------------------------------------------------------------------------------------------------
# The options that all stages share. Read them once; each script adds those of its own section.

SECTIONS = ("data", "model", "tokenizer", "pretrain", "finetune", "segment", "visualize")

# Types of options: what a value may be, smallest and largest included.
Count = Annotated[int, 1, math.inf]
Natural = Annotated[int, 0, math.inf]
Amount = Annotated[float, 0.0, math.inf]
Share = Annotated[float, 0.0, 1.0]
Beta = Annotated[float, 0.0, 0.999999]  # AdamW divides by 1 - beta, so 1 is too much


@dataclass
class RunConfig:
    """The keys at the top of a config, outside all sections."""

    output_dir: str = "runs/default"  # each stage writes OUTPUT_DIR/STAGE and looks there for the one before
    seed: Annotated[int, 0, 2**63 - 1] = 0  # of weights, sample order, crops (not those of data.views), masks, drop path
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: CUDA if there is a GPU
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the device has it, see Precision
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto: on CUDA


@dataclass
class OptimizerConfig:
    """What each stage's section says about its optimisation."""

    batch_size: Count = 1024  # images per optimizer step, over all devices; no other value follows from it
    device_batch_size: Natural = 0  # the most images that one device holds; more are accumulated. 0: no limit
    lr: Amount = 1e-3  # peak learning rate
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # AdamW
    weight_decay: Amount = 0.05
    clip_grad: Amount = 0.0  # largest gradient norm; 0: not clipped
    log_every: Count = 20  # steps between two lines of metrics.jsonl: the only moments when host waits for device
    save_every: Count = 500  # steps between two checkpoints within an epoch, at the next line of metrics.jsonl


@dataclass
class TrainConfig(OptimizerConfig):
    """The same for stages that count epochs and follow a cosine."""

    epochs: Count = 100
    min_lr: Amount = 1e-6  # where the cosine ends
    warmup_epochs: Amount = 5  # linear warm-up from 0


# A run may go on with other values of these: they change its speed or its place. Its result changes by rounding only,
# but for what each device does with its own part of a batch: drop path's and MixUp's random numbers, and BatchNorm.
FREE_TO_CHANGE = {"output_dir", "device", "precision", "compile", "root", "download", "cache", "workers",
                  "device_batch_size", "save_every", "checkpoint_activations", "eval_only", "overlays"}


# ----------------------------------------------------------------------------------------------------------------
# Reading and checking. Every value gets a dotted key ("data.root") and is compared with the dataclass that declares
# that key. Skip this part unless a value is refused and you do not see why.


def load_config(sections: dict[str, type], arguments: list[str] | None = None) -> types.SimpleNamespace:
    """Read `CONFIG.yaml [section.key=value ...]` into checked dataclasses.

    sections   the script's own: name -> dataclass
    returns    a namespace with the fields of RunConfig, one attribute per section, and `file`
    Raises UserError for a missing file, an unknown key (naming the nearest valid one) or a wrong type.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise UserError(f"name a config file first: torchrun {Path(sys.argv[0]).name} configs/demo.yaml "
                        f"[section.key=value ...]")
    file, *changes = arguments
    values = read_yaml(file)
    source = dict.fromkeys(values, f"'{file}'")
    kinds = {"": RunConfig, **sections}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"'{change}' on the command line is not of the form section.key=value")
        with explained(f"'{change}' on the command line has no valid value", "write it as in YAML", yaml.YAMLError):
            values[key] = yaml.safe_load(text)
        source[key] = "the command line"
        # In the file, the sections of other scripts are left to those scripts. On the command line no other script will
        # ever see them, so a typo would be lost. The script that declares such a section is imported only here, when
        # it is needed: at the top of this file, the arrow from scripts to plumbing would run both ways.
        section = key.partition(".")[0]
        if section in SECTIONS and section not in kinds:
            kinds[section] = importlib.import_module(section).SECTIONS[section]

    declared = {f"{section}.{name}".lstrip("."): kind for section, fields in kinds.items()
                for name, kind in typing.get_type_hints(fields, include_extras=True).items()}
    for key, value in values.items():
        section = key.rpartition(".")[0]
        if key in SECTIONS:
            raise UserError(f"'{key}' in {source[key]} must be a section with keys, not {value!r}")
        if key in declared:
            try:
                values[key] = convert(value, declared[key])
            except ValueError as error:
                raise UserError(f"'{key}' in {source[key]} must be {error}, not {value!r}") from None
        elif section in kinds or section not in SECTIONS:
            valid = [name for name in (*declared, *SECTIONS) if name.rpartition(".")[0] == section] or list(declared)
            nearest = difflib.get_close_matches(key, valid, n=1, cutoff=0)[0]
            raise UserError(f"unknown key '{key}' in {source[key]}; the nearest valid key is '{nearest}'")

    def build(section: str, kind: type) -> Any:
        return kind(**{name: values[key] for key in values for parent, _, name in [key.rpartition(".")]
                       if parent == section})

    return types.SimpleNamespace(file=file, **vars(build("", RunConfig)),
                                 **{section: build(section, kind) for section, kind in sections.items()})


def read_yaml(file: str) -> dict[str, Any]:
    """The values of a config file by their dotted keys. What should be a section and is none keeps its name as key."""
    known = ", ".join(sorted(str(path) for path in Path("configs").glob("*.yaml"))) or "none in configs/"
    with explained(f"cannot read the config '{file}'", f"configs here: {known}", OSError, UnicodeDecodeError):
        text = Path(file).read_text(encoding="utf-8")
    with explained(f"'{file}' is not valid YAML", "correct it there", yaml.YAMLError):
        content = yaml.safe_load(text) or {}
    if not isinstance(content, dict):
        raise UserError(f"'{file}' must hold `section: {{key: value}}`, not a {type(content).__name__}")
    empty_sections = {key: {} for key, value in content.items() if key in SECTIONS and value is None}
    return dotted(content | empty_sections, SECTIONS)


def dotted(content: dict, sections: typing.Container | None = None) -> dict[str, Any]:
    """{"a": {"x": 1}, "b": 2} -> {"a.x": 1, "b": 2}; with `sections`, only these are opened."""
    values = {}
    for key, value in content.items():
        if isinstance(value, dict) and (sections is None or key in sections):
            values |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            values[str(key)] = value
    return values


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
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # YAML reads 5e-4 as a string
            value = float(value)
    # Python takes a boolean for a whole number.
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        raise ValueError({int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind])
    return value


def as_dict(config: types.SimpleNamespace) -> dict:
    """The configuration as plain values, for YAML and checkpoints."""
    values = {key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
              for key, value in vars(config).items() if key != "file"}
    return json.loads(json.dumps(values))  # tuples become lists


def changed_keys(old: dict, new: dict) -> list[tuple[str, Any, Any]]:
    """Where two configurations differ: (dotted key, value before, value now)."""
    old, new = dotted(old), dotted(new)
    return [(key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)]


# ----------------------------------------------------------------------------------------------------------------
# Several processes under torchrun, or one. Each function does nothing, or the obvious, in a single process; skip this
# part unless you run on several devices.


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


# ----------------------------------------------------------------------------------------------------------------
# Precision: in which numbers the device multiplies. Skip it; scripts only say `with run.autocast():`.


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
        if device.type == "cpu":
            # In bf16, the backward pass of PyTorch's fused attention for CPUs is slow: 10 ms for 16 images of 65 tokens,
            # where that of the plain matrix products, themselves in bf16, takes 2. (The switches are named after CUDA
            # and serve both.)
            torch.backends.cuda.enable_flash_sdp(name != "bf16")
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(name == "bf16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.name != "fp32")


def cpu_has_bf16() -> bool:
    """Whether the CPU has instructions for bf16 products; emulated ones would be slower than fp32."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check is not None and check() for check in checks)


# ----------------------------------------------------------------------------------------------------------------
# Files that a script is given: by path, by URL, or by an earlier stage. Skip it unless one is not found.


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
        if not target.is_file() or not file_sha256(target).startswith(sha256):
            target.parent.mkdir(parents=True, exist_ok=True)
            with explained(f"cannot download {source}", f"download it where there is a network and set {key}=PATH",
                           OSError, RuntimeError):
                torch.hub.download_url_to_file(source, str(target), sha256 or None, progress=sys.stderr.isatty())

    on_main(download)
    return target


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stage_checkpoint(config: types.SimpleNamespace, stage: str, given: str, key: str, name: str = "last.pt") -> Path:
    """Where an earlier stage's checkpoint lies: the one that `key` gives (path or URL), or OUTPUT_DIR/STAGE/NAME."""
    if given:
        return fetch(given, key)
    path = Path(config.output_dir) / stage / name
    if not path.is_file():
        script, scratch, _ = stage.partition("_scratch")
        # What was changed on the command line holds there too, but for what was asked of this script alone.
        own = Path(sys.argv[0]).stem
        changes = [shlex.quote(change) for change in sys.argv[2:] if not change.startswith(f"{own}.")]
        changes += [f"{script}.weights=none"] if scratch else []
        command = " ".join(["torchrun", f"{script}.py", config.file, *changes])
        raise UserError(f"there is no '{path}' yet: make it with `{command}`{key and f', or set {key}=PATH_OR_URL'}")
    return path


def say_if_unfinished(content: dict, path: Path) -> None:
    """Say so when a checkpoint of an earlier stage comes from a run that has not ended."""
    if content.get("epochs_done", 0) < content.get("epochs", 0):
        say(f"note: '{path}' is unfinished, at step {content['step']} of "
            f"{content['epochs'] * content['steps_per_epoch']}")
