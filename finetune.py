"""Stage 3, classification: what the pre-trained backbone is worth (paper section 3.2).

    torchrun finetune.py configs/demo.yaml                                   # fine-tune all layers
    torchrun finetune.py configs/demo.yaml finetune.weights=none             # the same from scratch, to compare
    torchrun finetune.py configs/demo.yaml finetune.mode=linear_probe        # a linear classifier on frozen features
    torchrun finetune.py configs/demo.yaml finetune.mode=knn                 # nearest neighbours of frozen features
    torchrun finetune.py configs/demo.yaml finetune.mode=report              # a table of all of the above
    torchrun finetune.py configs/base.yaml finetune.eval_only=true finetune.weights=PATH_OR_URL

And to use what was trained, on photos of your own:

    torchrun finetune.py configs/demo.yaml finetune.mode=predict finetune.images=PHOTO_OR_FOLDER    # five best classes
    torchrun finetune.py configs/demo.yaml finetune.mode=features finetune.images=PHOTO_OR_FOLDER   # as a tensor file
    torchrun finetune.py configs/demo.yaml finetune.mode=export     # weights for the published code, and for timm

Writes OUTPUT_DIR/MODE/, or OUTPUT_DIR/MODE_scratch/ for `weights: none`: metrics.jsonl, and last.pt and best.pt where
something is trained.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

import data
import engine
from beitv2 import (Classifier, ModelConfig, ModelError, VisionTransformer, load_pretrained, model_state,
                    read_checkpoint, read_model, timm_state)
from engine import Amount, Beta, Count, Share


@dataclass
class FinetuneConfig(engine.TrainConfig):
    """The `finetune` section; the defaults are the paper's for base, pre-trained for 300 epochs."""

    mode: Literal["finetune", "linear_probe", "knn", "report", "predict", "features", "export"] = "finetune"
    # Path or URL. Empty: OUTPUT_DIR/pretrain/last.pt, or finetune/best.pt for eval_only, predict, features and export.
    weights: str = ""  # none: an untrained backbone, or for these modes the run that started from one
    eval_only: bool = False  # only validate, on images whose classes may be some of those that the model knows
    classes_file: str = ""  # names of the model's classes, one a line, where its checkpoint does not hold them
    images: str = ""  # predict and features: an image, a folder, or a pattern such as *.jpg
    blocks: list[Count] = field(default_factory=list)  # features: blocks, from 1, whose hidden states to save too
    epochs: Count = 100
    batch_size: Count = 1024
    lr: Amount = 5e-4
    min_lr: Amount = 1e-6
    warmup_epochs: Amount = 20
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    layer_decay: Share = 0.65  # a layer learns this much slower than the one above it
    drop_path: Share = 0.1
    mean_pool: bool = True  # classify the mean of the patches; false: [CLS]
    init_scale: Amount = 0.001  # of the head's first weights
    crop_scale: tuple[Share, Share] = (0.08, 1.0)  # area of the random crop over that of the image
    rand_augment: bool = True
    erase: Share = 0.25  # probability of random erasing
    mixup: Amount = 0.8  # alpha of its beta distribution; 0: off
    cutmix: Amount = 1.0  # likewise; with both on, a coin decides for each batch
    label_smoothing: Share = 0.1
    ema_decay: Share = 0.0  # evaluate a moving average of the weights; 0: the weights themselves
    probe_epochs: Count = 50  # linear_probe only
    probe_lrs: list[Amount] = field(default_factory=lambda: [0.01, 0.03, 0.1, 0.3, 1.0, 3.0])  # all in one pass
    knn_k: Count = 20  # knn only: how many neighbours vote


SECTIONS = {"data": data.DataConfig, "model": ModelConfig, "finetune": FinetuneConfig}


def main() -> None:
    config = engine.load_config(SECTIONS)
    if config.finetune.eval_only and config.finetune.mode != "finetune":
        raise engine.UserError("finetune.eval_only is for finetune.mode=finetune: leave one of the two out")
    modes = {"finetune": evaluate_only if config.finetune.eval_only else finetune, "linear_probe": linear_probe,
             "knn": knn, "report": report, "predict": predict, "features": features, "export": export}
    modes[config.finetune.mode](config)


# ----------------------------------------------------------------------------------------------------------------
# Full fine-tuning


def finetune(config) -> None:
    cfg, size = config.finetune, config.data.image_size
    run = engine.Run(stage_folder(cfg), config, cfg)
    train_set, val_set = data.open_datasets(config.data)
    num_classes = len(train_set.classes)
    val_loader = open_val_loader(run, val_set)

    model = Classifier(num_classes, cfg.mean_pool, cfg.init_scale, drop_path=cfg.drop_path,
                       **config.model.backbone(size))
    load_weights(config, model, train_set.classes)
    model.to(run.device)
    parallel = run.prepare(model)
    optimizer = engine.make_optimizer(engine.parameter_groups(model, cfg.weight_decay, cfg.layer_decay), cfg)
    average = moving_average(model, cfg.ema_decay) if cfg.ema_decay else None

    view = data.TrainView(train_set, config.seed, size, cfg.crop_scale, rand_augment=cfg.rand_augment, erase=cfg.erase)
    loader = data.TrainLoader(view, run.device_batch, config.seed, workers=config.data.workers)
    run.notes = {"classes": train_set.classes}
    run.begin(loader, read_checkpoint, model=model, optimizer=optimizer, **({"average": average} if average else {}))
    lr = engine.cosine_schedule(cfg.lr, cfg.min_lr, cfg.epochs, run.steps_per_epoch, cfg.warmup_epochs)
    mix = batch_mixer(cfg, num_classes)

    for epoch in run.epochs():
        parallel.train()
        for micro_batches in run.steps(epoch):
            engine.set_lr(optimizer, lr[run.step])
            for batch in micro_batches:
                images = data.normalize(data.to_unit(batch["image"]))
                if cfg.erase:
                    images = data.erase_boxes(images, batch["erase"])
                images, labels = mix(images, batch["label"])  # labels: int64 [B], or shares of the classes [B, classes]
                with run.autocast():
                    logits = parallel(images)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=cfg.label_smoothing)
                run.backward(loss)
                main_label = labels.argmax(dim=1) if labels.ndim == 2 else labels
                run.record(loss=loss, accuracy=(logits.argmax(dim=1) == main_label).float().mean())
            run.optimizer_step(optimizer)
            if average:
                average.update_parameters(model)

        evaluated = average.module if average else model
        figures = evaluate(run, evaluated, val_loader)
        if figures["top1"] > run.best:
            run.best = figures["top1"]
            run.save_model("best.pt", evaluated, val=figures)
        run.end_epoch(epoch, train={}, val=figures)
    run.finish()


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, as its `module`: evaluated instead of the model, never trained."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)
    average.n_averaged.fill_(1)  # the weights before the first step count too; AveragedModel would replace them
    return average


def batch_mixer(cfg: FinetuneConfig, num_classes: int):
    """MixUp, CutMix, one of them by a coin, or neither: (images, labels) -> (images, labels)."""
    kinds = ((v2.MixUp, cfg.mixup), (v2.CutMix, cfg.cutmix))
    mixers = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
    return v2.RandomChoice(mixers) if mixers else lambda images, labels: (images, labels)


@torch.no_grad()
def evaluate(run: engine.Run, model: nn.Module, loader, columns: Tensor | None = None) -> dict[str, float]:
    """Loss, and top-1 and top-5 accuracy in [0,1], over the validation images; each counts once, however many ranks.

    columns   which logits belong to the labels 0, 1, 2, ... of the images; None: all, in order
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=run.device)  # loss, hits at 1, hits at 5, images
    for batch in loader:
        images, labels = (batch[key].to(run.device, non_blocking=True) for key in ("image", "label"))
        with run.autocast():
            logits = model(data.normalize(data.to_unit(images)))
        logits = logits if columns is None else logits[:, columns]
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [B, 5]
        sums += torch.stack([loss.double(), hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=run.device)])
    loss, top1, top5, count = engine.all_reduce_sum(sums).tolist()
    return {"loss": loss / count, "top1": top1 / count, "top5": top5 / count}


# ----------------------------------------------------------------------------------------------------------------
# Frozen features: nearest neighbours, linear probe


def open_backbone(run: engine.Run) -> nn.Module:
    """The frozen backbone with its final norm, as a function of uint8 images: tokens [B, T, D]."""
    config = run.config
    model = VisionTransformer(**config.model.backbone(config.data.image_size))
    load_weights(config, model)
    return model.requires_grad_(False).eval().to(run.device)


@torch.no_grad()
def extract_features(run: engine.Run, tokens_of: Callable[[Tensor], Tensor], loader: Any,
                     total: int) -> dict[str, Tensor]:
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
    return {name: engine.gather_in_order(torch.cat(part), total) for name, part in parts.items()}


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


def frozen_features(run: engine.Run, model: nn.Module, dataset, strict=True) -> dict[str, Tensor]:
    """Features of a data set's images as the validation crops them; see extract_features."""
    return extract_features(run, lambda images: model(data.normalize(data.to_unit(images))),
                            open_val_loader(run, dataset, strict), len(dataset))


def knn(config) -> None:
    """k-NN accuracy of [CLS] and mean patch: validation images against all training images."""
    run = engine.Run(stage_folder(config.finetune), config, config.finetune)
    train_set, val_set = data.open_datasets(config.data)
    model = open_backbone(run)
    bank, queries = frozen_features(run, model, train_set, strict=False), frozen_features(run, model, val_set)
    figures = {kind: knn_accuracy(bank[kind], bank["labels"], queries[kind], queries["labels"],
                                  config.finetune.knn_k) for kind in ("cls", "mean")}
    engine.on_main(lambda: engine.keep_lines(run.metrics.file, step=-1, epochs_done=0))
    run.metrics.write({"epoch": 0, "step": 0, "val": figures})
    engine.say(f"k-NN accuracy: [CLS] {figures['cls']:.4f}, mean patch {figures['mean']:.4f}")


class LinearProbes(nn.Module):
    """One linear classifier for each feature ([CLS], mean patch) and learning rate, on features that BatchNorm scales.

    The norm has no parameters of its own: without it, each backbone would need learning rates of another order.
    """

    def __init__(self, dim: int, num_classes: int, num_lrs: int):
        super().__init__()
        self.norms = nn.ModuleDict({kind: nn.BatchNorm1d(dim, affine=False) for kind in ("cls", "mean")})
        self.heads = nn.ModuleDict({kind: nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(num_lrs))
                                    for kind in ("cls", "mean")})
        for head in (*self.heads["cls"], *self.heads["mean"]):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Features [B, D] by kind -> logits [2 * learning rates, B, classes], [CLS] first."""
        logits = []
        for kind in ("cls", "mean"):
            normed = self.norms[kind](features[kind])
            logits += [head(normed) for head in self.heads[kind]]
        return torch.stack(logits)


def linear_probe(config) -> None:
    """Train linear classifiers on the frozen features of augmented images, with all learning rates in one pass.

    The heads are so small that every rank trains all of them on the whole batch, gathered in order: nothing then
    depends on the number of ranks, BatchNorm included.
    """
    cfg = config.finetune
    schedule = dataclasses.replace(cfg, epochs=cfg.probe_epochs)
    run = engine.Run(stage_folder(cfg), config, schedule)
    train_set, val_set = data.open_datasets(config.data)
    backbone = open_backbone(run)
    probes = LinearProbes(backbone.embed_dim, len(train_set.classes), len(cfg.probe_lrs)).to(run.device)
    groups = [dict(params=[*cls.parameters(), *mean.parameters()], lr_scale=lr)
              for cls, mean, lr in zip(probes.heads["cls"], probes.heads["mean"], cfg.probe_lrs)]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)

    view = data.TrainView(train_set, config.seed, config.data.image_size, cfg.crop_scale)
    loader = data.TrainLoader(view, run.device_batch, config.seed, workers=config.data.workers)
    run.begin(loader, read_checkpoint, probes=probes, optimizer=optimizer)
    lr = engine.cosine_schedule(1.0, 0.0, schedule.epochs, run.steps_per_epoch, warmup_epochs=0)
    val = frozen_features(run, backbone, val_set)

    for epoch in run.epochs():
        for micro_batches in run.steps(epoch):
            engine.set_lr(optimizer, lr[run.step])
            probes.train()
            parts = []
            for batch in micro_batches:
                with torch.no_grad(), run.autocast():
                    tokens = backbone(data.normalize(data.to_unit(batch["image"]))).float()
                parts.append((tokens[:, 0], tokens[:, 1:].mean(dim=1), batch["label"]))
            cls, mean, labels = (engine.gather_in_order(torch.cat(part)) for part in zip(*parts))
            losses = torch.stack([F.cross_entropy(logits, labels) for logits in probes(dict(cls=cls, mean=mean))])
            # The heads share no parameter, so each sees its own loss only.
            run.precision.scaler.scale(losses.sum()).backward()
            run.record(loss=losses.min())
            run.optimizer_step(optimizer)

        probes.eval()
        with torch.no_grad():
            hits = [(logits.argmax(dim=1) == val["labels"]).float().mean().item() for logits in probes(val)]
        figures = {}
        for kind, scores in (("cls", hits[:len(cfg.probe_lrs)]), ("mean", hits[len(cfg.probe_lrs):])):
            figures[kind] = max(scores)
            figures[f"{kind}_lr"] = cfg.probe_lrs[scores.index(max(scores))]
        run.end_epoch(epoch, train={}, val=figures)
    run.finish()


# ----------------------------------------------------------------------------------------------------------------
# Using what was trained


def read_trained(config) -> tuple[dict, dict[str, Tensor], Path]:
    """The checkpoint that `finetune.weights` names, or this experiment's best one: its content, tensors and path."""
    given = config.finetune.weights
    stage = "finetune_scratch" if given == "none" else "finetune"
    path = engine.stage_checkpoint(config, stage, "" if given == "none" else given, "finetune.weights", "best.pt")
    content = read_model(path, "model", config.model)
    return content, model_state(content, str(path)), path


def open_trained(config) -> tuple[VisionTransformer, list[str] | None]:
    """That checkpoint as a classifier if it has a head, else as a backbone; and the names of its classes, if known."""
    content, state, path = read_trained(config)
    options = config.model.backbone(config.data.image_size)
    if "head.weight" in state:
        model = Classifier(len(state["head.weight"]), mean_pool="fc_norm.weight" in state, **options)
        model.may_be_fresh = ()
    else:
        model = VisionTransformer(**options)
    engine.say(load_pretrained(model, state, source=str(path)))
    classes = content.get("classes")
    if file := config.finetune.classes_file:
        if not Path(file).is_file():
            raise engine.UserError(f"finetune.classes_file names '{file}', and there is no such file")
        classes = [name.strip() for name in Path(file).read_text(errors="replace").splitlines() if name.strip()]
    if classes is not None and isinstance(model, Classifier) and len(classes) != model.head.out_features:
        raise engine.UserError(f"'{file}' names {len(classes)} classes, and the model has {model.head.out_features}: "
                               f"give it one name a line, in the order of the model's outputs")
    return model.requires_grad_(False).eval(), classes


def open_classifier(config) -> tuple[Classifier, list[str] | None]:
    model, classes = open_trained(config)
    if not isinstance(model, Classifier):
        raise engine.UserError("these weights have no classification head: fine-tune them first, or set "
                               "finetune.weights to a fine-tuned checkpoint")
    return model, classes


def evaluate_only(config) -> None:
    """Validate a classifier on images of all its classes or some of them, such as ImageNet-A, -R and -Sketch have."""
    run = engine.Run(stage_folder(config.finetune), config, config.finetune)
    val_set = data.open_val_folder(config.data)
    model, classes = open_classifier(config)
    columns = class_columns(val_set.classes, classes, model.head.out_features).to(run.device)
    figures = evaluate(run, model.to(run.device), open_val_loader(run, val_set), columns)
    engine.say(f"{len(val_set)} images of {len(columns)} of the model's {model.head.out_features} classes: "
               + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))


def class_columns(wanted: list[str], known: list[str] | None, outputs: int) -> Tensor:
    """Where each wanted class stands among the model's outputs, int64 [wanted]. UserError if it is not there."""
    if known is None:
        if len(wanted) != outputs:
            raise engine.UserError(f"the images have {len(wanted)} classes and the model {outputs}, whose names the "
                                   f"checkpoint does not hold: set finetune.classes_file=PATH to a list of them, one a "
                                   f"line (for ImageNet-1k, its 1000 folder names in alphabetical order)")
        return torch.arange(outputs)
    if unknown := sorted(set(wanted) - set(known)):
        raise engine.UserError(f"the model does not know the class '{unknown[0]}'"
                               f"{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}: class folders must be "
                               f"named as its classes are, such as '{known[0]}'")
    return torch.tensor([known.index(name) for name in wanted])


@torch.no_grad()
def predict(config) -> None:
    """Name the five likeliest classes of each image, with probabilities; also in predict/predictions.txt."""
    run = engine.Run("predict", config, config.finetune)
    images = data.open_files(config.finetune.images)
    model, classes = open_classifier(config)
    model.to(run.device)
    parts = []
    for batch in open_val_loader(run, images):
        with run.autocast():
            logits = model(data.normalize(data.to_unit(batch["image"].to(run.device))))
        parts.append(logits.float().softmax(dim=1))
    shares, best = engine.gather_in_order(torch.cat(parts), len(images)).topk(min(5, model.head.out_features), dim=1)
    lines = []
    for i, (row, ids) in enumerate(zip(shares.tolist(), best.tolist())):
        names = [classes[k] if classes else f"class {k}" for k in ids]
        lines.append(f"{images.name(i)}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in zip(names, row)))
    engine.say("\n".join(lines))
    if engine.rank() == 0:
        (run.folder / "predictions.txt").write_text("\n".join(lines) + "\n")


@torch.no_grad()
def features(config) -> None:
    """Write OUTPUT_DIR/features/features.pt, a dictionary of

    files     names of the images
    cls, mean float32 [images, D]: [CLS], and the mean of the patches, after the final norm (a fine-tuned model's mean
              is what its head sees)
    block_i   float32 [images, T, D], the hidden state after block i, for each i in `finetune.blocks`
    """
    run = engine.Run("features", config, config.finetune)
    images = data.open_files(config.finetune.images)
    model, _ = open_trained(config)
    model.to(run.device)
    blocks = tuple(config.finetune.blocks)
    if blocks and max(blocks) > model.depth:
        raise engine.UserError(f"finetune.blocks names block {max(blocks)}, and the model has {model.depth}")
    parts = {name: [] for name in ("cls", "mean", *(f"block_{i}" for i in blocks))}
    for batch in open_val_loader(run, images):
        x = data.normalize(data.to_unit(batch["image"].to(run.device)))
        with run.autocast():
            hidden, kept = model.forward_blocks(model.embed(x), model.shared_position_bias(), keep=blocks)
            tokens = model.norm(hidden)  # the identity if the model norms after pooling
            pooled = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(dim=1)}
            if getattr(model, "fc_norm", None) is not None:
                pooled = {name: model.fc_norm(value) for name, value in pooled.items()}
        for name, value in (pooled | {f"block_{i}": kept[i] for i in blocks}).items():
            # On the device only if the ranks' parts must still be gathered: hidden states are many.
            parts[name].append(value.float() if engine.world_size() > 1 else value.float().cpu())
    saved = {name: engine.gather_in_order(torch.cat(part), len(images)).cpu() for name, part in parts.items()}
    if engine.rank() == 0:
        names = [images.name(i) for i in range(len(images))]
        engine.save_atomically({"files": names} | saved, run.folder / "features.pt")
    engine.say(f"features of {len(images)} images: {run.folder / 'features.pt'}")


def export(config) -> None:
    """Write the trained weights alone: export/published.pth under the published names, export/timm.pth under timm's."""
    run = engine.Run("export", config, config.finetune)
    folder = run.folder
    _, state, path = read_trained(config)
    if engine.rank() == 0:
        engine.save_atomically({"model": state}, folder / "published.pth")
        engine.save_atomically(timm_state(state), folder / "timm.pth")
    engine.say(f"{len(state)} tensors of '{path}': {folder / 'published.pth'}, and for timm {folder / 'timm.pth'}")


# ----------------------------------------------------------------------------------------------------------------
# What all of them share


def stage_folder(cfg: FinetuneConfig) -> str:
    return cfg.mode + ("_scratch" if cfg.weights == "none" else "")


def load_weights(config, model: nn.Module, classes: list[str] | None = None) -> None:
    """Fill the model from `finetune.weights`, or from this experiment's own stage 2; `none` leaves it as it is.

    The head of a model that was fine-tuned for other `classes` stays fresh, even if there are as many of them.
    """
    if config.finetune.weights == "none":
        return
    path = engine.stage_checkpoint(config, "pretrain", config.finetune.weights, "finetune.weights")
    content = read_model(path, "model", config.model)
    engine.say_if_unfinished(content, path)
    state = model_state(content, str(path))
    if classes is None and "fc_norm.weight" in state:
        # A fine-tuned model norms after pooling. As a backbone it has to norm before, as all others do.
        state = {name.replace("fc_norm.", "norm."): value for name, value in state.items()}
    others = classes is not None and content.get("classes", classes) != classes
    head = [name for name in state if name.startswith("head.") and others]
    report = load_pretrained(model, {name: state[name] for name in state if name not in head}, source=str(path))
    report.dropped += head
    engine.say(report)


def open_val_loader(run: engine.Run, dataset, strict=True) -> data.ValLoader:
    view = data.ValView(dataset, run.config.data.image_size, strict)
    return data.ValLoader(view, run.device_batch, workers=run.config.data.workers)


def results(config) -> list[tuple[str, str, str]]:
    """What has been measured in OUTPUT_DIR: (title, with an untrained backbone, with the pre-trained one)."""
    def figure(folder: str, name: str) -> str:
        path = Path(config.output_dir) / folder / "metrics.jsonl"
        lines = engine.read_lines(path) if path.is_file() else []
        values = [line["val"][name] for line in lines if name in line.get("val", {})]
        return f"{100 * values[-1]:.1f} %" if values else "-"

    rows = [("k-NN, [CLS]", "knn", "cls"), ("k-NN, mean patch", "knn", "mean"),
            ("linear probe, [CLS]", "linear_probe", "cls"), ("linear probe, mean patch", "linear_probe", "mean"),
            ("fine-tuning", "finetune", "top1")]
    return [(title, figure(f"{folder}_scratch", name), figure(folder, name)) for title, folder, name in rows]


def report(config) -> None:
    """Print the table of results."""
    for row in [("validation accuracy", "untrained", "pre-trained"), *results(config)]:
        engine.say(f"{row[0]:<26}{row[1]:>12}{row[2]:>14}")


if __name__ == "__main__":
    engine.launch(main, ModelError)
