from pathlib import Path

import torch
from torch import Tensor

import data
from beitv2 import Classifier, VisionTransformer, load_pretrained, model_state, read_model, timm_state
from support.datasets import open_files
from support.errors import UserError
from support.files import save_atomically, stage_checkpoint
from support.loaders import ValLoader
from support.precision import Precision
from support.processes import gather_in_order, rank, say, setup_distributed, world_size
from support.run import Run


def read_trained(config) -> tuple[dict, dict[str, Tensor], Path]:
    """Read the checkpoint that `finetune.weights` names, or this experiment's best one.

    Returns its whole content, its tensors by name, and its path.
    """
    given = config.finetune.weights
    stage = "finetune_scratch" if given == "none" else "finetune"
    path = stage_checkpoint(config, stage, "" if given == "none" else given, "finetune.weights", "best.pt")
    content = read_model(path, "model", config.model)
    return content, model_state(content, str(path)), path


def open_trained(config) -> tuple[VisionTransformer, list[str] | None]:
    """The model of `read_trained`, and the names of its classes if they are known.

    It is a Classifier if the checkpoint has a head for classes, and otherwise a VisionTransformer.
    """
    content, state, path = read_trained(config)
    options = config.model.backbone(config.data.image_size)
    if "head.weight" in state:
        model = Classifier(len(state["head.weight"]), mean_pool="fc_norm.weight" in state, **options)
        model.may_be_fresh = ()
    else:
        model = VisionTransformer(**options)
    say(load_pretrained(model, state, source=str(path)))
    classes = content.get("classes")
    if file := config.finetune.classes_file:
        if not Path(file).is_file():
            raise UserError(f"finetune.classes_file names '{file}', and there is no such file")
        classes = [name.strip() for name in Path(file).read_text(errors="replace").splitlines() if name.strip()]
    if classes is not None and isinstance(model, Classifier) and len(classes) != model.head.out_features:
        raise UserError(f"'{file}' names {len(classes)} classes, and the model has {model.head.out_features}: "
                               f"give it one name a line, in the order of the model's outputs")
    return model.requires_grad_(False).eval(), classes


def open_classifier(config) -> tuple[Classifier, list[str] | None]:
    model, classes = open_trained(config)
    if not isinstance(model, Classifier):
        raise UserError("these weights have no classification head: fine-tune them first, or set "
                               "finetune.weights to a fine-tuned checkpoint")
    return model, classes


@torch.no_grad()
def predict(config) -> None:
    """Print the five most likely classes of each image with their probabilities, and write predict/predictions.txt."""
    run = Run("predict", config, config.finetune)
    images = open_files(config.finetune.images)
    model, classes = open_classifier(config)
    model.to(run.device)
    parts = []
    for batch in ValLoader(data.ValView(images, run.config.data.image_size), run.device_batch, workers=config.data.workers):
        with run.autocast():
            logits = model(data.normalize(data.to_unit(batch["image"].to(run.device))))
        parts.append(logits.float().softmax(dim=1))
    shares, best = gather_in_order(torch.cat(parts), len(images)).topk(min(5, model.head.out_features), dim=1)
    lines = []
    for i, (row, ids) in enumerate(zip(shares.tolist(), best.tolist())):
        names = [classes[k] if classes else f"class {k}" for k in ids]
        lines.append(f"{images.name(i)}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in zip(names, row)))
    say("\n".join(lines))
    if rank() == 0:
        (run.folder / "predictions.txt").write_text("\n".join(lines) + "\n")


@torch.no_grad()
def features(config) -> None:
    """Write OUTPUT_DIR/features/features.pt, a dictionary of

    files     names of the images
    cls, mean float32 [images, D]: [CLS], and the mean of the patches, after the final norm (a fine-tuned model's mean
              is what its head sees)
    block_i   float32 [images, T, D], the hidden state after block i, for each i in `finetune.blocks`
    """
    run = Run("features", config, config.finetune)
    images = open_files(config.finetune.images)
    model, _ = open_trained(config)
    model.to(run.device)
    blocks = tuple(config.finetune.blocks)
    if blocks and max(blocks) > model.depth:
        raise UserError(f"finetune.blocks names block {max(blocks)}, and the model has {model.depth}")
    parts = {name: [] for name in ("cls", "mean", *(f"block_{i}" for i in blocks))}
    for batch in ValLoader(data.ValView(images, run.config.data.image_size), run.device_batch, workers=config.data.workers):
        x = data.normalize(data.to_unit(batch["image"].to(run.device)))
        with run.autocast():
            hidden, kept = model.forward_blocks(model.embed(x), model.shared_position_bias(), keep=blocks)
            tokens = model.norm(hidden)  # the identity if the model norms after pooling
            pooled = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(dim=1)}
            if getattr(model, "fc_norm", None) is not None:
                pooled = {name: model.fc_norm(value) for name, value in pooled.items()}
        for name, value in (pooled | {f"block_{i}": kept[i] for i in blocks}).items():
            # Hidden states need much memory, so they go to the CPU at once. With several ranks they must stay on the
            # device until the ranks have exchanged them.
            parts[name].append(value.float() if world_size() > 1 else value.float().cpu())
    saved = {name: gather_in_order(torch.cat(part), len(images)).cpu() for name, part in parts.items()}
    if rank() == 0:
        names = [images.name(i) for i in range(len(images))]
        save_atomically({"files": names} | saved, run.folder / "features.pt")
    say(f"features of {len(images)} images: {run.folder / 'features.pt'}")


def export(config) -> None:
    """Write the trained weights without optimizer: export/published.pth in the published form, timm.pth in timm's."""
    run = Run("export", config, config.finetune)
    folder = run.folder
    _, state, path = read_trained(config)
    if rank() == 0:
        save_atomically({"model": state}, folder / "published.pth")
        save_atomically(timm_state(state), folder / "timm.pth")
    say(f"{len(state)} tensors of '{path}': {folder / 'published.pth'}, and for timm {folder / 'timm.pth'}")


@torch.no_grad()
def encode(config, load_tokenizer) -> None:
    """Print the code grid of each image, or write {"files": names, "codes": int64 [images, grid, grid]} to a file."""
    cfg = config.tokenizer
    device = setup_distributed(config.device)
    images = open_files(cfg.images)
    loader = ValLoader(data.ValView(images, config.data.image_size), cfg.device_batch_size or 64,
                            workers=min(config.data.workers, len(images)))
    path = stage_checkpoint(config, "tokenizer", cfg.weights, "tokenizer.weights")
    model = load_tokenizer(config, path).to(device)
    precision, ids = Precision(config.precision, device), []
    for batch in loader:
        with precision.autocast():
            ids.append(model.token_ids(data.to_unit(batch["image"].to(device))))
    codes = gather_in_order(torch.cat(ids), len(images)).view(-1, model.grid, model.grid).cpu()
    names = [images.name(i) for i in range(len(images))]
    if cfg.output:
        if rank() == 0:
            Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
            save_atomically({"files": names, "codes": codes}, Path(cfg.output))
        say(f"codes of {len(names)} images: {cfg.output}")
    else:
        width = len(str(cfg.codebook_size - 1))
        for name, grid in zip(names, codes.tolist()):
            say("\n".join([name, *(" ".join(f"{code:>{width}}" for code in row) for row in grid)]))
