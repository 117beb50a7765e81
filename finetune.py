"""Stage 3, classification: what the pre-trained backbone is worth (paper section 3.2).

There are three ways to measure it. Each asks for something else:

    finetune        train all layers on labelled images, gently: how good a start has pre-training given?
    linear_probe    train one linear layer on frozen features: is what they know about classes easy to read?
    knn             train nothing: do images of one class lie next to each other?

    torchrun finetune.py configs/demo.yaml                                   # fine-tune all layers
    torchrun finetune.py configs/demo.yaml finetune.weights=none             # the same from scratch, to compare
    torchrun finetune.py configs/demo.yaml finetune.mode=linear_probe        # a linear classifier on frozen features
    torchrun finetune.py configs/demo.yaml finetune.mode=knn                 # nearest neighbours of frozen features
    torchrun finetune.py configs/demo.yaml finetune.mode=report              # a table of all of the above
    torchrun finetune.py configs/base.yaml finetune.eval_only=true finetune.weights=PATH_OR_URL

To use what was trained, on photos of your own:

    torchrun finetune.py configs/demo.yaml finetune.mode=predict finetune.images=PHOTO_OR_FOLDER    # five best classes
    torchrun finetune.py configs/demo.yaml finetune.mode=features finetune.images=PHOTO_OR_FOLDER   # as a tensor file
    torchrun finetune.py configs/demo.yaml finetune.mode=export     # weights for the published code, timm, transformers

`finetune`, `linear_probe` and `knn` write metrics.jsonl into OUTPUT_DIR/MODE/, or into OUTPUT_DIR/MODE_scratch/ for
`weights: none`. Those that train write last.pt there too, and fine-tuning also best.pt.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from beitv2 import (POOLINGS, Classifier, ModelConfig, ModelError, VisionTransformer, as_backbone, load_pretrained,
                    model_state, read_model)
from data import DataConfig, TrainSamples, ValSamples, normalize, to_unit
from support.datasets import open_datasets, open_val_folder, require_labels
from support.errors import UserError
from support.figures import results
from support.files import say_if_unfinished, stage_checkpoint
from support.frozen import Frozen, digest
from support.launch import launch
from support.loaders import ValLoader, evenly_chosen
from support.optimizers import clip_gradients, make_optimizer
from support.options import Amount, Beta, Count, PathText, Share, TrainConfig, load_config
from support.processes import all_reduce_sum, gather_in_order, say
from support.run import Run
from support.use import class_names, export, features, open_classifier, predict


@dataclass
class FinetuneConfig(TrainConfig):
    """The `finetune` section; the defaults are the paper's for base, pre-trained for 300 epochs."""

    mode: Literal["finetune", "linear_probe", "knn", "report", "predict", "features", "export"] = "finetune"
    # Path or URL. Empty: OUTPUT_DIR/pretrain/last.pt, or finetune/best.pt for eval_only, predict, features and export.
    # none: an untrained backbone, or OUTPUT_DIR/finetune_scratch/best.pt for these four.
    weights: PathText = ""
    eval_only: bool = False  # only validate, on images of all or some of the model's classes
    classes_file: PathText = ""  # names of the model's classes, one a line, where its checkpoint does not hold them
    images: PathText = ""  # predict and features: an image, a folder, or a pattern such as *.jpg
    blocks: list[Count] = field(default_factory=list)  # features: blocks, from 1, whose hidden states to save too
    epochs: Count = 100
    batch_size: Count = 1024
    lr: Amount = 5e-4
    min_lr: Amount = 1e-6
    warmup_epochs: Amount = 20
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    layer_decay: Share = 0.65  # a layer's learning rate is this times that of the layer above it
    drop_path: Share = 0.1
    pooling: Literal[tuple(POOLINGS)] = "mean"  # what is classified: the mean of the patches, or cls
    init_scale: Amount = 0.001  # factor on the head's initial weights
    crop_scale: tuple[Share, Share] = (0.08, 1.0)  # area of the random crop over that of the image
    rand_augment: bool = True
    erase: Share = 0.25  # probability of random erasing
    mixup: Amount = 0.8  # alpha of its beta distribution; 0: off
    cutmix: Amount = 1.0  # likewise; with both on, each batch gets one of them at random
    label_smoothing: Share = 0.1
    ema_decay: Share = 0.0  # evaluate a moving average of the weights; 0: the weights themselves
    probe_epochs: Count = 50  # linear_probe only
    probe_lrs: list[Amount] = field(default_factory=lambda: [0.01, 0.03, 0.1, 0.3, 1.0, 3.0])  # all in one pass
    knn_k: Count = 20  # knn only: how many neighbours vote


SECTIONS = {"data": DataConfig, "model": ModelConfig, "finetune": FinetuneConfig}


def main() -> None:
    config = load_config(SECTIONS)
    if config.finetune.eval_only and config.finetune.mode != "finetune":
        raise UserError("finetune.eval_only is for finetune.mode=finetune: leave one of the two out")
    modes = {"finetune": evaluate_only if config.finetune.eval_only else finetune, "linear_probe": linear_probe,
             "knn": knn, "report": report, "predict": predict, "features": features, "export": export}
    modes[config.finetune.mode](config)


# ----------------------------------------------------------------------------------------------------------------
# Act 1. Full fine-tuning
#
# All layers are trained on labelled images. There are two dangers. The first steps can destroy what pre-training has
# learned, because the new head still sends meaningless gradients: hence a tiny initial head, a long warm-up, and layer
# decay. And 86 million weights can learn a million images by heart: hence augmentation, mixing, and soft labels.


def finetune(config) -> None:
    """Fine-tune a classifier from pre-trained weights; validate after every epoch and keep the best."""
    cfg, size = config.finetune, config.data.image_size
    run = Run(stage_folder(cfg), config, cfg)
    train_set, val_set = open_datasets(config.data)
    require_labels(train_set, "fine-tuning")
    num_classes = len(train_set.classes)
    run.notes = {"classes": train_set.classes}
    samples = TrainSamples(train_set, config.seed, size, cfg.crop_scale, rand_augment=cfg.rand_augment, erase=cfg.erase)
    val_loader = open_val_loader(run, val_set)

    model = Classifier(num_classes, cfg.pooling, cfg.init_scale, drop_path=cfg.drop_path, **config.model.backbone(size))
    # The backbone comes from pre-training: its one bias table is copied into every block. Mask token, output layer and
    # aggregation head are dropped, and for `pooling: mean` the final norm. `fc_norm` and `head` stay as initialised.
    source = load_weights(config, model, train_set.classes)
    model.to(run.device)
    # Layer decay: each layer learns at `layer_decay` times the rate of the layer above it. Early layers see edges and
    # textures, which any task needs; late layers hold what is special to the task. With one rate for all, it would be
    # too high for the early layers or too low for the head. Block i of L, from 1, has the rate lr * decay^(L + 1 - i):
    #
    #     L = 12, decay 0.65, lr 5e-4
    #               fc_norm, head   block 12   block 11   block 6   block 3   block 1   patch embedding, [CLS]
    #     factor    1               0.65       0.42       0.049     0.013     0.0057    0.0037
    #     rate      5e-4            3.3e-4     2.1e-4     2.5e-5    6.7e-6    2.8e-6    1.8e-6
    #
    optimizer = make_optimizer(model, cfg, cfg.layer_decay)
    # A moving average often does better than the last weights, which still jump with each batch. No gradient moves it.
    average = copy.deepcopy(model).requires_grad_(False) if cfg.ema_decay else None

    # `parallel` is the model, compiled if asked for, and synchronised between processes if there are several.
    parts = dict(model=model, optimizer=optimizer) | ({"average": average} if average else {})
    parallel = run.begin(samples, source, example=(torch.zeros(1, 3, size, size),), **parts)
    lr = run.cosine_schedule()
    mix = batch_mixer(cfg, num_classes)

    for epoch in run.epochs():
        parallel.train()
        # A step is one update of the weights. If its batch does not fit into memory, it comes in several smaller
        # batches, whose gradients are added up; `last` is true for the last of them.
        for step, batch, last in run.micro_batches(epoch):
            # The rate rises from 0 during the warm-up, because AdamW has seen too few gradients at first to scale its
            # steps well. Then it falls along half a cosine. Each parameter group multiplies it by its layer's factor.
            for group in optimizer.param_groups:
                group["lr"] = lr[step] * group["lr_scale"]

            # uint8 [B, 3, S, S] -> [0, 1] -> ImageNet's mean and deviation. The backbone was pre-trained on images
            # normalised like this; with other numbers its features would be worse from the start.
            images = normalize(to_unit(batch["image"]))
            # Mixing comes last because it needs two finished images: each is mixed with another one of the batch.
            images, labels = mix(images, batch["label"])  # labels: int64 [B], or shares of the classes [B, classes]
            # Matrix products run in half precision where the device is good at it (`precision`).
            with run.autocast():
                logits = parallel(images)  # [B, classes]
            # Label smoothing (arXiv 1512.00567): 0.9 of the target goes to the right class, and 0.1 to all classes in
            # equal parts. A target of exactly 1 can never be reached: the logits would grow without end, and the model
            # would be sure even of its mistakes. In float32: half precision rounds small differences.
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=cfg.label_smoothing)
            run.backward(loss)  # with several ranks, the last micro-batch averages the gradients over them
            # Accuracy on mixed images counts the class with the larger share. It is lower than that on validation
            # images, which are not mixed, and serves only to see whether anything is learned.
            main_label = labels.argmax(dim=1) if labels.ndim == 2 else labels
            run.record(loss=loss, accuracy=(logits.argmax(dim=1) == main_label).float().mean())
            if last:
                run.scaler.unscale_(optimizer)
                grad_norm = clip_gradients(optimizer, cfg.clip_grad)
                run.scaler.step(optimizer)  # optimizer.step(), unless fp16 gradients have overflowed
                run.scaler.update()
                optimizer.zero_grad()
                run.record(lr=lr[step], grad_norm=grad_norm)
                if average:
                    update_average(average, model, cfg.ema_decay)

        evaluated = average or model
        figures = evaluate(run, evaluated, val_loader)
        if figures["top1"] > run.best:
            run.best = figures["top1"]
            run.save_model("best.pt", evaluated, val=figures)
        run.end_epoch(epoch, figures)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the exponential moving average of the weights: average <- decay * average + (1 - decay) * weights.

    The weights before the first step count too. (PyTorch's AveragedModel replaces them. To know whether a step is the
    first, it reads a counter from the device, so that the host has to wait in every step.)
    """
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def batch_mixer(cfg: FinetuneConfig, num_classes: int):
    """A function (images [B, 3, S, S], labels [B]) -> (mixed images, labels [B, classes]): MixUp or CutMix.

    MixUp (arXiv 1710.09412) adds two images, lam * a + (1 - lam) * b. CutMix (arXiv 1905.04899) pastes a rectangle of b
    into a. The label has the same shares: lam of a's class and 1 - lam of b's (for CutMix, shares of the area). lam
    comes from a beta distribution with parameter alpha, anew for each batch.

    Both make new images in every epoch, so that the training set cannot be learned by heart, and both ask for a
    prediction that changes gradually between classes. CutMix also hides parts, as random erasing does. With both on,
    one is chosen at random for each batch. With both off, images and labels stay as they are.
    """
    kinds = ((v2.MixUp, cfg.mixup), (v2.CutMix, cfg.cutmix))
    mixers = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
    return v2.RandomChoice(mixers) if mixers else lambda images, labels: (images, labels)


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, loader, columns: Tensor | None = None) -> dict[str, float]:
    """Loss, and top-1 and top-5 accuracy in [0,1], over the validation images.

    Each image counts once, for any number of ranks: every rank adds up its own images, then the sums are added over the
    ranks and divided by the number of images. A mean of the ranks' means would be wrong, as one may have an image less.

    columns   which logits belong to the labels 0, 1, 2, ... of the images; None: all, in order
    """
    model.eval()
    # The sums stay on the device until the end. Reading them in each batch would make the host wait each time.
    sums = torch.zeros(4, dtype=torch.float64, device=run.device)  # loss, hits at 1, hits at 5, images
    for batch in loader:
        images, labels = (batch[key].to(run.device, non_blocking=True) for key in ("image", "label"))
        with run.autocast():
            logits = model(normalize(to_unit(images)))
        logits = logits if columns is None else logits[:, columns]
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [B, 5]
        sums += torch.stack([loss.double(), hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=run.device)])
    loss, top1, top5, count = all_reduce_sum(sums).tolist()
    return {"loss": loss / count, "top1": top1 / count, "top5": top5 / count}


# ----------------------------------------------------------------------------------------------------------------
# Act 2. Frozen features: nearest neighbours, linear probe
#
# Fine-tuning changes the backbone, so it does not show what pre-training alone has learned. Here the backbone stays as
# it is, and each image becomes two vectors [D] after the final norm: [CLS], and the mean of the patches. In
# pre-training, plain masked prediction trains the patches, and only the aggregation head asks anything of [CLS]. So
# measuring both vectors, with the head and without it (pretrain.head_layers=0), shows what patch aggregation gives.


def open_backbone(run: Run) -> tuple[VisionTransformer, Path | None]:
    """The frozen backbone with its final norm: normalised images [B, 3, S, S] -> tokens [B, T, D]; and its checkpoint.

    No parameter gets a gradient, and nothing is random: an image always has the same features.
    """
    config = run.config
    model = VisionTransformer(**config.model.backbone(config.data.image_size))
    source = load_weights(config, model)
    return model.requires_grad_(False).eval().to(run.device), source


def pooled(tokens: Tensor) -> dict[str, Tensor]:
    """Normed tokens [B, T, D] -> one vector for each image, float32 [B, D], by the name of the pooling."""
    return {name: pool(tokens.float()) for name, pool in POOLINGS.items()}


@torch.no_grad()
def extract_features(run: Run, model: VisionTransformer, loader: Any, total: int) -> dict[str, Tensor]:
    """Frozen features of all images of the ranks' loaders, in the order of the data set, on every rank.

    total     number of images over all ranks
    returns   those of each pooling, "cls" and "mean", float32 [total, D], and "labels" int64 [total]. Images that
              cannot be read are left out
    """
    parts: dict[str, list] = {}
    for batch in loader:
        with run.autocast():
            tokens = model.features(normalize(to_unit(batch["image"].to(run.device, non_blocking=True))))
        about = {name: batch[name].to(run.device) for name in ("label", "readable") if name in batch}
        for name, part in (pooled(tokens) | about).items():
            parts.setdefault(name, []).append(part)
    features = {name: gather_in_order(torch.cat(part), total) for name, part in parts.items()}
    features["labels"] = features.pop("label")
    if "readable" in features:  # of a bank of training images
        readable = features.pop("readable")
        features = {name: values[readable] for name, values in features.items()}
    return features


@torch.no_grad()
def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20,
                 temperature: float = 0.07) -> float:
    """Accuracy in [0, 1] of k-NN: the share of `queries` [Q, D] whose class their k nearest in `bank` [N, D] vote for.

    Nothing is trained here, so the figure tells about the features alone: do images of one class lie close together?
    "Near" means a high cosine. The length of a feature says little about what is in the image. A near neighbour counts
    more than a far one: votes weigh exp(cosine / temperature), as in DINO (arXiv 2104.14294).
    """
    # Scaled to length 1, a product of two features is their cosine. Queries come in chunks: all cosines at once, Q x N
    # of them, may not fit in memory.
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    classes = int(bank_labels.max()) + 1
    hits = 0
    for chunk, truth in zip(queries.split(1024), labels.split(1024)):
        similarity, index = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)  # [q, k]
        votes = torch.zeros(len(chunk), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[index], (similarity / temperature).exp())
        hits += (votes.argmax(dim=1) == truth).sum().item()
    return hits / len(queries)


def knn_figures(bank: dict[str, Tensor], queries: dict[str, Tensor], k: int = 20) -> dict[str, float]:
    """knn_accuracy for each pooling: bank and queries are what extract_features gives."""
    return {kind: knn_accuracy(bank[kind], bank["labels"], queries[kind], queries["labels"], k) for kind in POOLINGS}


def knn(config) -> None:
    """k-NN accuracy of [CLS] and mean patch.

    Each validation image gets the class that its nearest training images vote for. Nothing is trained and nothing
    tuned, so the figure is the same every time, and takes one pass over the images.
    """
    run = Run(stage_folder(config.finetune), config, config.finetune)
    run.claim_folder()
    train_set, val_set = open_datasets(config.data)
    require_labels(train_set, "k-NN")
    model, _ = open_backbone(run)
    bank = extract_features(run, model, open_val_loader(run, train_set, strict=False), len(train_set))
    queries = extract_features(run, model, open_val_loader(run, val_set), len(val_set))
    run.write_alone(knn_figures(bank, queries, config.finetune.knn_k))


def knn_pulse(run: Run, model: VisionTransformer, train_set, val_set, images: int) -> dict[str, float]:
    """k-NN accuracy in [0,1] of the features of a model in training: a cheap look at what they know.

    Nothing is trained for this, so figures of all epochs can be compared. Labels are used only here: the model never
    sees them.

    images   how many training images to compare with, evenly spaced
    """
    model.eval()
    chosen = evenly_chosen(len(train_set), images)
    bank = extract_features(run, model, open_val_loader(run, train_set, strict=False, indices=chosen), len(chosen))
    queries = extract_features(run, model, open_val_loader(run, val_set), len(val_set))
    return {f"knn_{kind}": value for kind, value in knn_figures(bank, queries).items()}


class LinearProbes(nn.Module):
    """One linear classifier for each pooling ([CLS], mean patch) and learning rate, on features that BatchNorm scales.

    The numbers of a feature can be small in one backbone and large in another, and differ from channel to channel. SGD
    learns fast where they are large and hardly at all where they are small. So each backbone would need other learning
    rates, and one set of rates would favour some backbones. BatchNorm gives every channel mean 0 and deviation 1 (as
    MAE does, arXiv 2111.06377). It has no parameters of its own: a scale and a shift before a linear layer could only
    do what the weights and the bias of that layer can do already.

    The best learning rate is not known beforehand. The features cost nearly all the time and are the same for all
    heads, so six rates cost hardly more than one.

    widths   of the features, by pooling
    """

    def __init__(self, widths: dict[str, int], num_classes: int, num_lrs: int):
        super().__init__()
        self.norms = nn.ModuleDict({kind: nn.BatchNorm1d(width, affine=False) for kind, width in widths.items()})
        # The classifiers of all rates lie side by side in one layer, because many small products take longer.
        self.heads = nn.ModuleDict({kind: nn.Linear(width, num_lrs * num_classes) for kind, width in widths.items()})
        for heads in self.heads.values():
            nn.init.normal_(heads.weight, std=0.01)
            nn.init.zeros_(heads.bias)
        self.num_lrs = num_lrs

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features [B, D] by pooling -> logits [learning rates, B, classes] by pooling."""
        return {kind: heads(self.norms[kind](features[kind])).unflatten(1, (self.num_lrs, -1)).transpose(0, 1)
                for kind, heads in self.heads.items()}


def linear_probe(config) -> None:
    """Train linear classifiers on the frozen features of augmented images, with all learning rates in one pass.

    The only augmentation is crop and flip: a linear layer is too small to learn the images by heart.

    Each rank computes the features of its part of the batch. Then all ranks exchange them, and every rank trains all
    heads on the whole batch, in the same order. The heads are small enough for that. So the result does not depend on
    the number of ranks. (BatchNorm alone, on each rank's part, would use the mean and deviation of a smaller batch.)
    """
    cfg = config.finetune
    run = Run(stage_folder(cfg), config, dataclasses.replace(cfg, epochs=cfg.probe_epochs, lr=1.0, min_lr=0.0,
                                                             warmup_epochs=0))
    train_set, val_set = open_datasets(config.data)
    require_labels(train_set, "a linear probe")
    run.notes = {"classes": train_set.classes}
    run.cure = "lower finetune.probe_lrs"
    if run.train.batch_size == 1:
        raise UserError("BatchNorm needs at least two images at once: raise finetune.batch_size for a linear probe")
    backbone, source = open_backbone(run)
    widths = {kind: part.shape[1] for kind, part in pooled(torch.zeros(1, 2, backbone.embed_dim)).items()}
    probes = LinearProbes(widths, len(train_set.classes), len(cfg.probe_lrs)).to(run.device)
    # SGD's step is its rate times a sum of gradients. So a head whose loss is multiplied by a rate learns with this rate.
    rates = torch.tensor(cfg.probe_lrs, device=run.device).repeat(len(widths))  # [heads]
    # `fused`: with fp16, the device itself decides whether to skip a step. Else the host would wait for the answer.
    optimizer = torch.optim.SGD(probes.parameters(), lr=1.0, momentum=0.9, fused=True)

    samples = TrainSamples(train_set, config.seed, config.data.image_size, cfg.crop_scale, views=config.data.views)
    run.begin(samples, source, probes=probes, optimizer=optimizer)
    lr = run.cosine_schedule()
    # The backbone's features of a batch, side by side, float32 [B, sum of widths]: computed once where crops are fixed.
    features_of = Frozen(run, lambda images: torch.cat([*pooled(backbone(normalize(images))).values()], dim=1),
                         "pooled", samples, [digest(backbone), *widths], "float32")
    samples.wants_images = features_of.values is None  # else all features are known already
    val = extract_features(run, backbone, open_val_loader(run, val_set), len(val_set))

    for epoch in run.epochs():
        probes.train()
        parts = []
        for step, batch, last in run.micro_batches(epoch):
            optimizer.param_groups[0]["lr"] = lr[step]
            parts.append((features_of(batch), batch["label"]))  # [b, widths], [b]
            if last:
                # All micro-batches of all ranks together: one batch, so no loss is divided by the number of parts.
                features, labels = (gather_in_order(torch.cat(part)) for part in zip(*parts))
                parts.clear()
                logits = probes(dict(zip(widths, features.split([*widths.values()], dim=1))))
                logits = torch.cat([*logits.values()])  # [heads, B, classes]
                losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
                losses = losses.view(len(logits), -1).mean(dim=1)
                # Each loss depends on one head only. So the gradient of the sum gives each head the gradient of its own
                # loss, times its rate.
                run.scaler.scale((rates * losses).sum()).backward()
                run.scaler.unscale_(optimizer)
                grad_norm = clip_gradients(optimizer, cfg.clip_grad)
                run.scaler.step(optimizer)
                run.scaler.update()
                optimizer.zero_grad()
                run.record(loss=losses.min(), lr=lr[step], grad_norm=grad_norm)

        probes.eval()
        figures = {}
        with torch.no_grad():
            for kind, logits in probes(val).items():
                hits = (logits.argmax(dim=-1) == val["labels"]).float().mean(dim=1).tolist()  # one for each rate
                # The best rate is chosen on the validation images themselves, as is usual for linear probes. The figure
                # is therefore a little too good, for the untrained backbone as well.
                figures |= {kind: max(hits), f"{kind}_lr": cfg.probe_lrs[hits.index(max(hits))]}
        run.end_epoch(epoch, figures)


# ----------------------------------------------------------------------------------------------------------------
# Act 3. Using what was trained. A reader of the method may skip this.


def evaluate_only(config) -> None:
    """Validate a classifier on images of all its classes, or of some of them.

    ImageNet-A and ImageNet-R, for example, hold 200 of the 1000 classes. Only the logits of these 200 then compete.
    """
    run = Run(stage_folder(config.finetune), config, config.finetune)
    val_set = open_val_folder(config.data)
    if not val_set.labelled:
        require_labels(val_set, "validation")
    model, classes = open_classifier(config)
    columns = class_columns(val_set.classes, classes, model.head.out_features).to(run.device)
    figures = evaluate(run, model.to(run.device), open_val_loader(run, val_set), columns)
    say(f"{len(val_set)} images of {len(columns)} of the model's {model.head.out_features} classes: "
        + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))


def class_columns(wanted: list[str], known: list[str] | None, outputs: int) -> Tensor:
    """The place of each wanted class among the model's outputs, int64 [wanted]. UserError if one is not there."""
    if known is None:
        if len(wanted) != outputs:
            raise UserError(f"the images have {len(wanted)} classes and the model {outputs}, whose names the "
                            f"checkpoint does not hold: set finetune.classes_file=PATH to a list of them, one a "
                            f"line (for ImageNet-1k, its 1000 folder names in alphabetical order)")
        return torch.arange(outputs)
    if unknown := sorted(set(wanted) - set(known)):
        raise UserError(f"the model does not know the class '{unknown[0]}'"
                        f"{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}: class folders must be "
                        f"named as its classes are, such as '{known[0]}'")
    return torch.tensor([known.index(name) for name in wanted])


# ----------------------------------------------------------------------------------------------------------------
# Act 4. What all modes share, and the table of results


def stage_folder(cfg: FinetuneConfig) -> str:
    """Runs from an untrained backbone have a folder of their own, so that the table can compare both."""
    return cfg.mode + ("_scratch" if cfg.weights == "none" else "")


def load_weights(config, model: nn.Module, classes: list[str] | None = None) -> Path | None:
    """Load `finetune.weights` into the model, or what this experiment's stage 2 has written. Returns the file's path.

    `none` loads nothing.

    The head is loaded only if it was trained for the same `classes`. A file that does not name its classes (published
    and exported ones do not, but `finetune.classes_file` can) may be for others, even if it has as many outputs.
    """
    if config.finetune.weights == "none":
        return None
    path = stage_checkpoint(config, "pretrain", config.finetune.weights, "finetune.weights")
    content = read_model(path, "model", config.model)
    say_if_unfinished(content, path)
    state = model_state(content, str(path))
    if classes is None:
        state = as_backbone(state)
    head = []
    if classes is not None and (names := class_names(config, content, state, path)) != classes:
        head = [name for name in state if name.startswith("head.")]
    report = load_pretrained(model, {name: state[name] for name in state if name not in head}, source=str(path))
    report.dropped += head
    say(report)
    if head:
        say("the head is dropped: " + ("it was trained for other classes" if names else "the file does not name its "
            "classes, so they may be others (finetune.classes_file=PATH names them)"))
    return path


def open_val_loader(run: Run, dataset, strict=True, indices=None) -> ValLoader:
    """Validation batches of a data set, or of its images `indices`: resized, cropped in the centre, nothing random."""
    samples = ValSamples(dataset, run.config.data.image_size, strict)
    return ValLoader(samples, run.device_batch, workers=run.config.data.workers, indices=indices)


def report(config) -> None:
    """Print the table of results."""
    if not (rows := results(Path(config.output_dir))):
        raise UserError(f"nothing has been measured in '{config.output_dir}' yet: begin with `torchrun tokenizer.py "
                        f"{config.file}`")
    for title, untrained, trained in [("validation images", "untrained", "pre-trained"), *rows]:
        say(f"{title:<26}{untrained:>12}{trained:>14}")


if __name__ == "__main__":
    launch(main, ModelError)
