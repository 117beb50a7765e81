"""Using what was trained, on images of one's own: classes, features and codes; and weights for other programs.

No reader of the method needs this file: each function opens a model, asks it about all images, and writes what it says.
"""

import os
import typing
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from beitv2 import (POOLINGS, Classifier, ModelConfig, VisionTransformer, dimensions, load_pretrained, model_state,
                    read_checkpoint, saved_section, timm_state)
from data import ValSamples, normalize, to_unit
from support.datasets import Images, open_files
from support.errors import UserError, explained
from support.files import save_atomically, stage_checkpoint
from support.loaders import ValLoader
from support.options import convert
from support.precision import Precision
from support.processes import gather_in_order, rank, say, setup_distributed, world_size
from support.transformers_format import write_transformers


# --- models from their checkpoints ------------------------------------------------------------------------------


def restored(kind: type, content: dict, section: str):
    """The section of the configuration that a checkpoint of ours was made with, as its dataclass `kind`; None for files
    that have none. Options that are younger than the file have their defaults."""
    saved, kinds = saved_section(content, section), typing.get_type_hints(kind, include_extras=True)
    try:
        return saved and kind(**{name: convert(value, kinds[name]) for name, value in saved.items() if name in kinds})
    except ValueError:  # another program, whose options have the names of ours, but other types
        return None


def read_trained(config) -> tuple[dict, dict[str, Tensor], Path]:
    """Read the checkpoint that `finetune.weights` names, or this experiment's best one.

    Returns its whole content, its tensors by name, and its path.
    """
    given = config.finetune.weights
    stage = "finetune_scratch" if given == "none" else "finetune"
    path = stage_checkpoint(config, stage, "" if given == "none" else given, "finetune.weights", "best.pt")
    content = read_checkpoint(path)
    return content, model_state(content, str(path)), path


def open_trained(config) -> tuple[VisionTransformer, list[str] | None]:
    """The model of `read_trained`, and the names of its classes if they are known.

    It is a Classifier if the checkpoint has a head for classes, and otherwise a VisionTransformer. A checkpoint of ours
    says what its model is. Published ones do not: there the configuration describes the model, and names of tensors
    tell how it pools.
    """
    content, state, path = read_trained(config)
    options = (restored(ModelConfig, content, "model") or config.model).backbone(config.data.image_size)
    if "head.weight" in state:
        model = Classifier(len(state["head.weight"]), pooling_of(content, state), **options)
        model.may_be_fresh = ()
    else:
        model = VisionTransformer(**options)
    say(load_pretrained(model, state, source=str(path)))
    return model.requires_grad_(False).eval(), class_names(config, content, state, path)


def pooling_of(content: dict, state: dict[str, Tensor]) -> str:
    """How a classifier pools: its checkpoint says it, or else the names of its tensors do."""
    by_name = "mean" if "fc_norm.weight" in state else "cls"
    return (saved_section(content, "finetune") or {}).get("pooling", by_name)


def class_names(config, content: dict, state: dict[str, Tensor], path: Path) -> list[str] | None:
    """The names of a classifier's classes, if its checkpoint or `finetune.classes_file` holds them."""
    classes = content.get("classes")
    classes = classes if isinstance(classes, list) else None  # another program may call their number so
    if file := config.finetune.classes_file:
        if not Path(file).is_file():
            raise UserError(f"finetune.classes_file names '{file}', and there is no such file")
        classes = [name.strip() for name in Path(file).read_text(errors="replace").splitlines() if name.strip()]
    outputs = len(state.get("head.weight", ()))
    if classes is not None and outputs and len(classes) != outputs:
        raise UserError(f"'{file or path}' names {len(classes)} classes, and the model has {outputs}: "
                        f"set finetune.classes_file=PATH to one name a line, in the order of the model's outputs")
    return classes


def open_classifier(config) -> tuple[Classifier, list[str] | None]:
    model, classes = open_trained(config)
    if not isinstance(model, Classifier):
        raise UserError("these weights have no classification head: fine-tune them first, or set finetune.weights to a "
                        "fine-tuned checkpoint")
    return model, classes


# --- the loop over images ---------------------------------------------------------------------------------------


class OrError(Dataset):
    """samples[index] with an entry more: `error` is "", or why the image cannot be read. The others are then `instead`.

    One broken file in a thousand must not take the results of the others.
    """

    def __init__(self, samples: Dataset, **instead):
        self.samples, self.dataset, self.instead = samples, samples.dataset, instead

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        try:
            return self.samples[index] | {"error": ""}
        except UserError as error:
            return self.instead | {"index": index, "error": str(error)}


@torch.no_grad()
def ask_about(images: Images, config, cfg, device: torch.device, ask: Callable[[Tensor], dict[str, Tensor]]):
    """Ask a model about each image that can be read.

    cfg       the section whose `device_batch_size` counts (0: 64 images)
    ask       images in [0, 1], [B, 3, S, S] -> answers by name, each [B, ...]
    returns   names of the images; answers by name, each [images, ...] on the CPU, in order, on all ranks; and why the
              other images cannot be read, by their number
    """
    size = config.data.image_size
    samples = OrError(ValSamples(images, size), image=torch.zeros(3, size, size, dtype=torch.uint8), label=0, row=0)
    loader = ValLoader(samples, cfg.device_batch_size or 64, workers=min(config.data.workers, len(images)))
    precision, parts, errors = Precision(config.precision, device), {}, {}
    for batch in loader:
        errors |= {index: error for index, error in zip(batch["index"].tolist(), batch["error"]) if error}
        with precision.autocast():
            answers = ask(to_unit(batch["image"].to(device)))
        for name, value in answers.items():
            value = value.float() if value.is_floating_point() else value
            # Hidden states need much memory, so they go to the CPU at once. With several ranks they must stay on the
            # device until the ranks have exchanged them.
            parts.setdefault(name, []).append(value if world_size() > 1 else value.cpu())
    errors = from_all_ranks(errors)
    readable = [i for i in range(len(images)) if i not in errors]
    if not readable:
        refuse_unreadable(errors, len(images))
    answers = {name: gather_in_order(torch.cat(part), len(images)).cpu()[readable] for name, part in parts.items()}
    return [images.name(i) for i in readable], answers, errors


def from_all_ranks(part: dict) -> dict:
    """One dictionary of what all ranks have."""
    parts = [part]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, part)
    return {key: value for part in parts for key, value in part.items()}


def refuse_unreadable(errors: dict[int, str], total: int, rest: str = "") -> None:
    """UserError if images could not be read: at the end, when the others have their results; `rest` says where.

    So a script that calls ours learns it from the exit status. All ranks know all `errors`.
    """
    if errors:
        first = errors[min(errors)]
        others = f" (and {len(errors) - 1} more of {total} cannot be read)" if len(errors) > 1 else ""
        raise UserError(first + others + (f"; {rest}" if rest and len(errors) < total else ""))


def printable(name: str) -> str:
    """A file's name on one line: bytes that are no UTF-8, line ends and codes of a terminal become \\xNN or \\n."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def output_folder(config, name: str) -> Path:
    """OUTPUT_DIR/NAME, which is made if it is missing."""
    folder = Path(config.output_dir) / name
    with explained(f"cannot make the folder '{folder}'", "choose another output_dir", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- what is asked ----------------------------------------------------------------------------------------------


def predict(config) -> None:
    """Print the five most likely classes of each image with their probabilities, and write predict/predictions.txt."""
    cfg, device = config.finetune, setup_distributed(config.device, config.threads)
    images = open_files(cfg.images)
    model, classes = open_classifier(config)
    model.to(device)
    names, answers, errors = ask_about(images, config, cfg, device, lambda x: {"logits": model(normalize(x))})
    shares, best = answers["logits"].softmax(dim=1).topk(min(5, model.head.out_features), dim=1)
    lines = []
    for name, row, ids in zip(names, shares.tolist(), best.tolist()):
        known = [classes[k] if classes else f"class {k}" for k in ids]
        lines.append(printable(f"{name}: " + ", ".join(f"{each} {100 * p:.1f} %" for each, p in zip(known, row))))
    say("\n".join(lines))
    file = output_folder(config, "predict") / "predictions.txt"
    if rank() == 0:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    refuse_unreadable(errors, len(images), f"the classes of the others are in '{file}'")


def features(config) -> None:
    """Write OUTPUT_DIR/features/features.pt, a dictionary of

    files     names of the images
    cls, mean float32 [images, D]: [CLS], and the mean of the patches, after the final norm (of a fine-tuned model, one
              of them is what its head sees)
    block_i   float32 [images, T, D], the hidden state after block i, for each i in `finetune.blocks`
    """
    cfg, device = config.finetune, setup_distributed(config.device, config.threads)
    images, blocks = open_files(cfg.images), tuple(cfg.blocks)
    model, _ = open_trained(config)
    model.to(device)
    if blocks and max(blocks) > model.depth:
        raise UserError(f"finetune.blocks names block {max(blocks)}, and the model has {model.depth}")
    def ask(x: Tensor) -> dict[str, Tensor]:
        hidden, kept = model.forward_blocks(model.embed(normalize(x)), model.shared_position_bias(), keep=blocks)
        tokens = model.norm(hidden)  # the identity if the model norms after pooling
        pooled = {name: pool(tokens) for name, pool in POOLINGS.items()}
        if isinstance(model, Classifier):
            fits = model.head.in_features
            pooled = {name: model.fc_norm(x) if x.shape[1] == fits else x for name, x in pooled.items()}
        return pooled | {f"block_{i}": kept[i] for i in blocks}

    names, answers, errors = ask_about(images, config, cfg, device, ask)
    file = output_folder(config, "features") / "features.pt"
    if rank() == 0:
        save_atomically({"files": names} | answers, file)
    say(f"features of {len(names)} images: {file}")
    refuse_unreadable(errors, len(images), f"the features of the others are in '{file}'")


def encode(config, load_tokenizer: Callable) -> None:
    """Print the ids of each image's patches as a grid, or write {"files": names, "codes": int64 [images, grid, grid]}
    to `tokenizer.output`."""
    cfg, device = config.tokenizer, setup_distributed(config.device, config.threads)
    images = open_files(cfg.images)
    model, _ = load_tokenizer(config, cfg.weights, "tokenizer.weights")
    model.to(device)
    names, answers, errors = ask_about(images, config, cfg, device, lambda x: {"ids": model.token_ids(x)})
    grids = answers["ids"].unflatten(1, (model.grid, model.grid))
    if cfg.output:
        if rank() == 0:
            Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
            save_atomically({"files": names, "codes": grids}, Path(cfg.output))
        say(f"codes of {len(names)} images: {cfg.output}")
    else:
        width = len(str(model.num_ids - 1))
        for name, grid in zip(names, grids.tolist()):
            say("\n".join([printable(name), *(" ".join(f"{id_:>{width}}" for id_ in row) for row in grid)]))
    refuse_unreadable(errors, len(images), f"the codes of the others are in '{cfg.output}'" if cfg.output else "")


def export(config) -> None:
    """Write the trained weights, without optimizer, into OUTPUT_DIR/export:

    published.pth   in the published form
    timm.pth        in timm's
    transformers/   the folder that `from_pretrained` of the library transformers opens, if it knows such a model
    """
    content, state, path = read_trained(config)
    section = restored(ModelConfig, content, "model") or config.model
    classes = [printable(name) for name in class_names(config, content, state, path) or ()]
    setup_distributed(config.device, config.threads)
    folder = output_folder(config, "export")
    if rank() == 0:
        save_atomically({"model": state}, folder / "published.pth")
        save_atomically(timm_state(state), folder / "timm.pth")
        kind = write_transformers(state, folder / "transformers", dimensions(section)["num_heads"],
                                  config.data.image_size, pooling_of(content, state), classes)
        others = f", for transformers.{kind} '{folder / 'transformers'}'" if kind else ""
        say(f"{len(state)} tensors of '{path}': {folder / 'published.pth'}, for timm {folder / 'timm.pth'}{others}")
