"""Options: the types of their values, and how a config file and a command line become checked dataclasses.

No reader of the method needs this file: which options a script has stands in its own dataclass.
"""

import contextlib
import dataclasses
import difflib
import importlib
import json
import math
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from support.errors import UserError, explained
from support.optimizers import OPTIMIZERS


SECTIONS = ("data", "model", "tokenizer", "pretrain", "finetune", "segment", "visualize")


# Types of options. Numbers: the smallest and the largest value, both included. Text: a check that returns the value.
Count = Annotated[int, 1, math.inf]
Natural = Annotated[int, 0, math.inf]
Amount = Annotated[float, 0.0, math.inf]
Share = Annotated[float, 0.0, 1.0]
Beta = Annotated[float, 0.0, 0.999999]  # AdamW divides by 1 - beta, so 1 is too much


def home_expanded(path: str) -> str:
    """A path whose `~` is the home folder. A shell does this at the beginning of a word only, so not in
    `data.root=~/images`, and YAML not at all."""
    path = os.path.expanduser(path)
    if path.startswith("~"):
        raise ValueError("a path that begins with ~/ or with ~ and a user's name (or with ./~ for a file ~NAME)")
    return path


PathText = Annotated[str, home_expanded]  # a path, a pattern of paths or a URL


@dataclass
class RunConfig:
    """The keys at the top of a config, outside all sections."""

    output_dir: PathText = "runs/default"  # each stage writes OUTPUT_DIR/STAGE and looks there for the one before
    seed: Annotated[int, 0, 2**63 - 1] = 0  # of weights, order, crops (not those of data.views), masks, drop path
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: CUDA if there is a GPU
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the device has it, see Precision
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto: on CUDA
    threads: Natural = 0  # of the CPU, per process; 0: OMP_NUM_THREADS if set, else an equal share of the cores

    def check(self, config: types.SimpleNamespace) -> None:
        if not self.output_dir.strip():
            raise UserError("output_dir is empty: name a folder, such as output_dir=runs/mine")


@dataclass
class OptimizerConfig:
    """What each stage's section says about its optimisation."""

    batch_size: Count = 1024  # images per optimizer step, over all devices; no other value follows from it
    device_batch_size: Natural = 0  # the most images that one device holds; more are accumulated. 0: no limit
    optimizer: Literal[tuple(OPTIMIZERS)] = "adamw"  # a name of support/optimizers.py; the linear probe has SGD
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


# A run may go on with other values of these: they change its speed or its place. Its result changes by rounding only.
# The exception is what each device does with its own part of a batch: drop path and MixUp draw other random numbers,
# and BatchNorm sees other images.
FREE_TO_CHANGE = {"output_dir", "device", "precision", "compile", "threads", "root", "download", "cache", "workers",
                  "device_batch_size", "save_every", "checkpoint_activations", "eval_only", "overlays"}

# Options that had another name once, and what their values are called today: commands and runs from then still count.
RENAMED = {"finetune.mean_pool": ("finetune.pooling", {"True": "mean", "False": "cls"})}


def section_of(stage: str) -> str:
    """The section of a stage: finetune's modes, and runs from scratch, have stages of their own."""
    return next((section for section in SECTIONS if stage.startswith(section)), "finetune")


def load_config(sections: dict[str, type], arguments: list[str] | None = None) -> types.SimpleNamespace:
    """Read `CONFIG.yaml [section.key=value ...]` into checked dataclasses.

    sections   the script's own: name -> dataclass. Its method `check(config)`, if there is one, sees that the values
               fit together. It is called here, so before anything is computed
    returns    a namespace with the fields of RunConfig, one attribute per section, and `file`
    Raises UserError for a missing file, an unknown key (naming the nearest valid one) or a wrong type.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise UserError(f"name a config file first: torchrun {Path(sys.argv[0]).name} configs/demo.yaml "
                        f"[section.key=value ...]")
    file, *changes = arguments
    # Each value with the place where it stands.
    given = {key: (value, f"'{file}'") for key, value in read_yaml(file).items()}

    # In the file, the sections of other scripts are left to those scripts. On the command line no other script will
    # ever see them, so a typo would be lost. The script that declares such a section is imported only here, when it is
    # needed: at the top of this file, the arrow from scripts to plumbing would run both ways.
    kinds = {"": RunConfig, **sections}
    for change in changes:
        if "=" not in change:
            raise UserError(f"'{change}' on the command line is not of the form section.key=value")
        section = change.partition(".")[0]
        if section in SECTIONS and section not in kinds:
            kinds[section] = importlib.import_module(section).SECTIONS[section]
    declared = {f"{section}.{name}".lstrip("."): kind for section, fields in kinds.items()
                for name, kind in get_type_hints(fields, include_extras=True).items()}
    for key, text in (change.split("=", 1) for change in changes):
        value = unquoted(text) if is_text(declared.get(key)) else parse_yaml(
            text, f"'{key}={text}' on the command line has no valid value", "write it as in YAML")
        given |= {name: (today, "the command line") for name, today in renamed({key: value}).items()}

    parts = {section: kind() for section, kind in kinds.items()}
    for key, (value, source) in given.items():
        section, _, name = key.rpartition(".")
        if key in SECTIONS:
            raise UserError(f"'{key}' in {source} must be a section with keys, not {value!r}")
        if key in declared:
            try:
                setattr(parts[section], name, convert(value, declared[key]))
            except ValueError as error:
                hint = ": put it in quotes" if str(error) == "text" and not isinstance(value, dict) else ""
                raise UserError(f"'{key}' in {source} must be {error}, not {value!r}{hint}") from None
        elif section in kinds or section not in SECTIONS:
            valid = [name for name in (*declared, *SECTIONS) if name.rpartition(".")[0] == section] or list(declared)
            nearest = difflib.get_close_matches(key, valid, n=1, cutoff=0)[0]
            raise UserError(f"unknown key '{key}' in {source}; the nearest valid key is '{nearest}'")

    config = types.SimpleNamespace(file=file, **vars(parts[""]), **{section: parts[section] for section in sections})
    for section in ("", *sections):
        if hasattr(parts[section], "check"):
            parts[section].check(config)
    return config


class Loader(yaml.SafeLoader):
    """YAML as people read it: `010` and `1:30` are text, where YAML 1.1 takes them for the numbers 8 and 90."""

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        with contextlib.suppress(ValueError):
            return int(node.value, 0)
        return node.value if ":" in node.value or node.tag.endswith("int") else self.construct_yaml_float(node)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_number)
Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_number)


def parse_yaml(text: str, what: str, advice: str) -> Any:
    """The value of a YAML text. UserError, in one sentence, for one that is not valid or that has a key twice."""
    # PyYAML has plain ValueErrors for a month 13, and RecursionError for a thousand brackets.
    with explained(what, advice, yaml.YAMLError, ValueError, RecursionError):
        loader = Loader(text)
        node = loader.get_single_node()
        refuse_doubles(node, what)
        return loader.construct_document(node) if node else None


def refuse_doubles(node: yaml.Node | None, what: str, prefix: str = "", lines: dict[str, int] | None = None) -> None:
    """UserError if a key stands twice: PyYAML would lose the first. `a: {b: 1}` and `a.b: 1` are the same key."""
    lines = {} if lines is None else lines
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            raise UserError(f"{what} ('{name}' stands twice, in lines {lines[name]} and {line}): keep one of the two")
        lines[name] = line
        if not prefix:  # sections hold options, and these hold no keys
            refuse_doubles(value, what, f"{name}.", lines)


def read_yaml(file: str) -> dict[str, Any]:
    """The values of a config file by their dotted keys. What should be a section and is none keeps its name as key."""
    known = ", ".join(sorted(str(path) for path in Path("configs").glob("*.yaml"))) or "none in configs/"
    with explained(f"cannot read the config '{file}'", f"configs here: {known}", OSError, UnicodeDecodeError):
        text = Path(file).read_text(encoding="utf-8-sig")  # some editors begin a file with a mark, the BOM
    content = parse_yaml(text, f"'{file}' is not valid YAML", "correct it there") or {}
    if not isinstance(content, dict):
        raise UserError(f"'{file}' must hold `section: {{key: value}}`, not a {type(content).__name__}")
    return dotted(content)


def dotted(content: dict) -> dict[str, Any]:
    """{"data": {"x": 1}, "seed": 2} -> {"data.x": 1, "seed": 2}, under today's names; an empty section has no keys."""
    values = {}
    for key, value in content.items():
        if key in SECTIONS and (value is None or isinstance(value, dict)):
            values |= {f"{key}.{name}": inner for name, inner in (value or {}).items()}
        else:
            values[str(key)] = value
    return renamed(values)


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Options, by their dotted keys, under today's names."""
    result = {}
    for key, value in values.items():
        name, today = RENAMED.get(key, (key, {}))
        result[name] = today.get(str(value), value)
    return result


def is_text(kind: Any) -> bool:
    """Whether a declared type is text. On the command line it is taken as it stands: YAML would read `photos #2`,
    `*.jpg` and `2024` otherwise."""
    wrapped = get_origin(kind) in (Annotated, types.UnionType, Union)
    return kind is str or (wrapped and is_text(get_args(kind)[0]))


def unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def convert(value: Any, kind: Any) -> Any:
    """Check one value against its declared type; the ValueError says what it must be."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        return None if value is None else convert(value, arguments[0])
    if origin is Annotated:
        kind, *limits = arguments
        value = convert(value, kind)
        if callable(limits[0]):  # a check of the option's own, which returns the value
            return limits[0](value)
        smallest, largest = limits
        if not smallest <= value <= largest:
            raise ValueError(f"at least {smallest}" + (f" and at most {largest}" if largest < math.inf else ""))
        return value
    if kind is str and value is None:  # `key:` in a file
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
            value = float(value) if str(value).isascii() else value  # Python reads the digits of all scripts
    # Python takes a boolean for a whole number.
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        raise ValueError({int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind])
    if kind is float and not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def as_dict(config: types.SimpleNamespace) -> dict:
    """The configuration as plain values, for YAML and checkpoints."""
    values = {key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
              for key, value in vars(config).items() if key != "file"}
    return json.loads(json.dumps(values))  # tuples become lists


def defaults_of(sections: dict[str, type]) -> dict[str, Any]:
    """The declared defaults of RunConfig and of these sections, by their dotted keys."""
    parts = {name: kind() for name, kind in sections.items()}
    return dotted(as_dict(types.SimpleNamespace(**vars(RunConfig()), **parts)))


def changed_options(saved: dict, config: types.SimpleNamespace) -> list[tuple[str, Any, Any]]:
    """Where a saved configuration (of `as_dict`) differs from `config`: (dotted key, value before, value now).

    An option that is newer than the run counts as what it was when the run was made: its default.
    """
    sections = {name: type(part) for name, part in vars(config).items() if dataclasses.is_dataclass(part)}
    old, new = defaults_of(sections) | dotted(saved), dotted(as_dict(config))
    return [(key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)]
