"""Stage 3, classification: what the pre-trained backbone is worth (paper section 3.2).

    torchrun finetune.py configs/demo.yaml                                   # fine-tune all layers
    torchrun finetune.py configs/demo.yaml finetune.weights=none             # the same from scratch, to compare
    torchrun finetune.py configs/demo.yaml finetune.mode=linear_probe        # a linear classifier on frozen features
    torchrun finetune.py configs/demo.yaml finetune.mode=knn                 # nearest neighbours of frozen features
    torchrun finetune.py configs/demo.yaml finetune.mode=report              # a table of all of the above
    torchrun finetune.py configs/base.yaml finetune.eval_only=true finetune.weights=PATH_OR_URL

Writes OUTPUT_DIR/MODE/, or OUTPUT_DIR/MODE_scratch/ for `weights: none`: metrics.jsonl, and last.pt and best.pt where
something is trained.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

import data
import engine
from beitv2 import (Classifier, ModelConfig, ModelError, VisionTransformer, check_dimensions, load_pretrained,
                    read_checkpoint)
from engine import Amount, Count, Share


@dataclass
class FinetuneConfig(engine.TrainConfig):
    """The `finetune` section; the defaults are the paper's for base, pre-trained for 300 epochs."""

    mode: Literal["finetune", "linear_probe", "knn", "report"] = "finetune"
    weights: str = ""  # path or URL; empty: OUTPUT_DIR/pretrain/last.pt; none: an untrained backbone
    eval_only: bool = False  # only validate `weights`, or OUTPUT_DIR/finetune/best.pt if that is empty
    epochs: Count = 100
    batch_size: Count = 1024
    lr: Amount = 5e-4
    min_lr: Amount = 1e-6
    warmup_epochs: Amount = 20
    betas: tuple[Share, Share] = (0.9, 0.999)
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
        raise engine.UserError(f"finetune.eval_only is for finetune.mode=finetune: leave one of the two out")
    modes = {"finetune": finetune, "linear_probe": linear_probe, "knn": knn, "report": report}
    modes[config.finetune.mode](config)


# ----------------------------------------------------------------------------------------------------------------
# Full fine-tuning


def finetune(config) -> None:
    cfg, size = config.finetune, config.data.image_size
    run = engine.Run(stage_folder(cfg), config, cfg)
    train_set, val_set = data.open_datasets(config.data)
    num_classes = len(train_set.classes)
    val_loader = open_val_loader(run, val_set)

    backbone = config.model.backbone(size) | dict(rel_pos_bias="per_block" if config.model.rel_pos_bias else None)
    model = Classifier(num_classes, cfg.mean_pool, cfg.init_scale, drop_path=cfg.drop_path, **backbone)
    if cfg.eval_only:
        model.may_be_fresh = ()  # a classifier with an untrained head has nothing to evaluate
        weights = str(run.folder / "best.pt") if cfg.weights in ("", "none") else cfg.weights
        engine.say(load_pretrained(model, engine.fetch(weights, "finetune.weights")))
        figures = evaluate(run, model.to(run.device), val_loader)
        engine.say(", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        return
    load_weights(config, model)
    model.to(run.device)
    parallel = run.prepare(model)
    optimizer = engine.make_optimizer(engine.parameter_groups(model, cfg.weight_decay, cfg.layer_decay), cfg)
    average = engine.MeanOfWeights(model, cfg.ema_decay) if cfg.ema_decay else None

    view = data.TrainView(train_set, config.seed, size, cfg.crop_scale, rand_augment=cfg.rand_augment, erase=cfg.erase)
    loader = data.TrainLoader(view, run.device_batch, config.seed, workers=config.data.workers)
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
                average.update(model)

        evaluated = average.model if average else model
        figures = evaluate(run, evaluated, val_loader)
        if figures["top1"] > run.best:
            run.best = figures["top1"]
            run.save_model("best.pt", evaluated, classes=train_set.classes, val=figures)
        run.end_epoch(epoch, train={}, val=figures)
    run.finish()


def batch_mixer(cfg: FinetuneConfig, num_classes: int):
    """MixUp, CutMix, one of them by a coin, or neither: (images, labels) -> (images, labels)."""
    kinds = ((v2.MixUp, cfg.mixup), (v2.CutMix, cfg.cutmix))
    mixers = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
    return v2.RandomChoice(mixers) if mixers else lambda images, labels: (images, labels)


@torch.no_grad()
def evaluate(run: engine.Run, model: nn.Module, loader) -> dict[str, float]:
    """Loss, and top-1 and top-5 accuracy in [0,1], over the validation images; each counts once, however many ranks."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=run.device)  # loss, hits at 1, hits at 5, images
    for batch in loader:
        images, labels = (batch[key].to(run.device, non_blocking=True) for key in ("image", "label"))
        with run.autocast():
            logits = model(data.normalize(data.to_unit(images)))
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
    model = VisionTransformer(rel_pos_bias="per_block" if config.model.rel_pos_bias else None,
                              **config.model.backbone(config.data.image_size))
    load_weights(config, model)
    return model.requires_grad_(False).eval().to(run.device)


def frozen_features(run: engine.Run, model: nn.Module, dataset, strict=True) -> dict[str, Tensor]:
    """Features of a data set's images as the validation crops them; see engine.extract_features."""
    return engine.extract_features(run, lambda images: model(data.normalize(data.to_unit(images))),
                                   open_val_loader(run, dataset, strict), len(dataset))


def knn(config) -> None:
    """k-NN accuracy of [CLS] and mean patch: validation images against all training images."""
    run = engine.Run(stage_folder(config.finetune), config, config.finetune)
    train_set, val_set = data.open_datasets(config.data)
    model = open_backbone(run)
    bank, queries = frozen_features(run, model, train_set, strict=False), frozen_features(run, model, val_set)
    figures = {kind: engine.knn_accuracy(bank[kind], bank["labels"], queries[kind], queries["labels"],
                                         config.finetune.knn_k) for kind in ("cls", "mean")}
    engine.on_main(lambda: engine.keep_lines(run.folder / "metrics.jsonl", -1))
    run.write({"epoch": 0, "step": 0, "val": figures})
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
# What all of them share


def stage_folder(cfg: FinetuneConfig) -> str:
    return cfg.mode + ("_scratch" if cfg.weights == "none" else "")


def load_weights(config, model: nn.Module) -> None:
    """Fill the model from `finetune.weights`, or from this experiment's own stage 2; `none` leaves it as it is."""
    if config.finetune.weights == "none":
        return
    path = engine.stage_checkpoint(config, "pretrain", config.finetune.weights, "finetune.weights")
    content = read_checkpoint(path)
    check_dimensions(content, path, "model", config.model)
    engine.say_if_unfinished(content, path)
    engine.say(load_pretrained(model, content, source=str(path)))


def open_val_loader(run: engine.Run, dataset, strict=True) -> data.ValLoader:
    view = data.ValView(dataset, run.config.data.image_size, strict)
    return data.ValLoader(view, run.device_batch, workers=run.config.data.workers)


def report(config) -> None:
    """Print what has been measured in OUTPUT_DIR, with an untrained backbone and with the pre-trained one."""
    def figure(folder: str, name: str) -> str:
        path = Path(config.output_dir) / folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        values = [line["val"][name] for line in lines if name in line.get("val", {})]
        return f"{100 * values[-1]:.1f} %" if values else "-"

    rows = [("k-NN, [CLS]", "knn", "cls"), ("k-NN, mean patch", "knn", "mean"),
            ("linear probe, [CLS]", "linear_probe", "cls"), ("linear probe, mean patch", "linear_probe", "mean"),
            ("fine-tuning", "finetune", "top1")]
    engine.say(f"{'validation accuracy':<26}{'untrained':>12}{'pre-trained':>14}")
    for title, folder, name in rows:
        engine.say(f"{title:<26}{figure(f'{folder}_scratch', name):>12}{figure(folder, name):>14}")


if __name__ == "__main__":
    engine.launch(main, ModelError)
