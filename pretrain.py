"""Stage 2, masked image modeling: predict the codes of patches that are hidden (paper section 2.3).

    torchrun pretrain.py configs/demo.yaml                                   # one process, CPU or GPU
    torchrun --nproc-per-node 8 pretrain.py configs/base.yaml                # eight GPUs of one machine
    torchrun pretrain.py configs/imagenette.yaml pretrain.num_masked=40      # any option, from the command line

We hide about 40 % of the patches of an image, in rectangular blocks: a learned vector, the mask token, takes the place of
each. The network that we train is a Vision Transformer; here it is also called the *student*. It gets all N places of the
image, but nothing of what was in the hidden ones. For each of these it must name the code that the tokenizer of stage 1
gives to the patch. The tokenizer sees the whole image.

The codes are predicted twice. The first prediction reads the student's last layer, at the hidden place. The second one
comes from the aggregation head, a small transformer that is thrown away afterwards. It reads the final [CLS] token beside
the patch tokens of an early layer l (at a hidden place: what has become of the mask token by then). Both are scored in
the same way:

    loss = - mean over hidden patches i of  [ log p(code_i | visible patches) + log p(code_i | [CLS], early patches) ]

Why codes and not pixels? A network that must paint pixels spends its strength on textures. A code stands for what a
teacher such as CLIP sees in the patch, so naming it asks what the hidden part *is*.

Writes OUTPUT_DIR/pretrain/{last.pt, metrics.jsonl, config.yaml, epoch-NN.png}.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import data
import tokenizer as vqkd
from beitv2 import MaskedImageModel, ModelConfig, ModelError, masked_positions, parameter_groups, read_checkpoint
from finetune import extract_features, knn_accuracy
from support.datasets import open_datasets
from support.errors import UserError
from support.files import stage_checkpoint
from support.frozen import cache_folder
from support.launch import launch
from support.loaders import TrainLoader, ValLoader
from support.optimizers import cosine_schedule, make_optimizer, set_lr
from support.options import Amount, Beta, Count, Natural, Share, TrainConfig, load_config
from support.pictures import paint_epoch
from support.run import Run


@dataclass
class PretrainConfig(TrainConfig):
    """The `pretrain` section."""

    epochs: Count = 300
    batch_size: Count = 2048
    lr: Amount = 1.5e-3
    min_lr: Amount = 1e-5
    warmup_epochs: Amount = 10
    betas: tuple[Beta, Beta] = (0.9, 0.98)  # .999 for 1600 epochs
    clip_grad: Amount = 3.0
    drop_path: Share = 0.0  # .1 for 1600 epochs
    tokenizer_weights: str = ""  # a trained tokenizer, path or URL; empty: OUTPUT_DIR/tokenizer/last.pt
    num_masked: Count = 75  # masked patches per image: about 40 % of 196
    min_block: Natural = 16  # patches in the smallest block; 0: no blocks, single patches
    early_layers: Natural = 9  # l: the aggregation head sees the patches after this layer; the first layer is 1
    head_layers: Natural = 2  # transformer blocks of the aggregation head; 0: no such head
    shared_lm_head: bool = True  # both predictions through the same norm and output layer
    crop_scale: tuple[Share, Share] = (0.2, 1.0)  # area of the random crop over that of the image
    jitter: Amount = 0.4  # strength of the colour jitter
    knn_every: Natural = 10  # a k-NN measurement after so many epochs, and after the last; 0: never
    knn_images: Count = 20000  # training images that the k-NN compares with, evenly chosen


SECTIONS = {"data": data.DataConfig, "model": ModelConfig, "tokenizer": vqkd.TokenizerConfig,
            "pretrain": PretrainConfig}


# ----------------------------------------------------------------------------------------------------------------
# Act 1. The training loop (section 2.3, equation 3)


def main() -> None:
    config = load_config(SECTIONS)
    cfg, size = config.pretrain, config.data.image_size
    check_blocks(cfg, size // config.model.patch_size)
    run = Run("pretrain", config, cfg)

    # The tokenizer is frozen. It plays the part that labels play in supervised learning, but no person made them.
    # Only `model`, the student, learns. `parallel` is the same model, compiled and synchronised between processes if
    # asked for. `run` (Run) knows processes, devices, the log and checkpoints; none of that changes the method.
    train_set, val_set = open_datasets(config.data)
    run.source = stage_checkpoint(config, "tokenizer", cfg.tokenizer_weights, "pretrain.tokenizer_weights")
    tokenizer = vqkd.load_tokenizer(config, run.source).to(run.device)
    model = build_model(config).to(run.device)
    parallel = run.prepare(model)
    optimizer = make_optimizer(parameter_groups(model, cfg.weight_decay), cfg)

    # Each training sample brings its crop, the factors of its colour jitter, and its mask (data.block_mask).
    view = data.TrainView(train_set, config.seed, size, cfg.crop_scale, cfg.jitter, cfg.num_masked, model.grid,
                          cfg.min_block, views=config.data.views)
    if cache_folder(config):  # with a fixed number of crops, the tokenizer sees each crop only once
        view.attached["codes"] = vqkd.cached_codes(run, tokenizer, view)
    loader = TrainLoader(view, run.device_batch, config.seed, workers=config.data.workers)
    run.begin(loader, read_checkpoint, model=model, optimizer=optimizer)
    lr = cosine_schedule(cfg.lr, cfg.min_lr, cfg.epochs, run.steps_per_epoch, cfg.warmup_epochs)

    for epoch in run.epochs():
        parallel.train()
        # One turn of this loop is one optimizer step over `batch_size` images. They are spread over all processes.
        # If a process cannot hold its share at once, it takes it in several micro-batches and adds the gradients up.
        for micro_batches in run.steps(epoch):
            set_lr(optimizer, lr[run.step])
            for batch in micro_batches:
                # 1. The pixels. Random colours are augmentation, as the random crop: no image looks the same twice.
                images = data.to_unit(batch["image"])  # [B, 3, S, S] in [0,1]
                if cfg.jitter > 0:
                    images = data.color_jitter(images, batch["jitter"])

                # 2. The mask, as positions of hidden patches. Every image has the same number M of them. So all shapes
                #    are known before the step, and a compiled model never has to wait for a count.
                masked = masked_positions(batch["mask"], cfg.num_masked)  # [B, M], each in 0 .. N-1

                with run.autocast():
                    # 3. The question. The tokenizer sees the whole image and names the code of each patch. We ask only
                    #    about the hidden ones: a visible patch could be named by looking at it, and would teach little.
                    codes = codes_of(tokenizer, batch, images, config.data.views)  # [B, N], each in 0 .. K-1
                    codes = codes.gather(1, masked)  # [B, M]

                    # 4. Both predictions. The student gets ImageNet's normalisation, which fine-tuning will use too.
                    #    (The tokenizer got [0,1], which VQKD.encode scales as in its own training.)
                    logits, head_logits = parallel(data.normalize(images), masked)  # [B, M, K] each

                # 5. The score: a classification among K codes for each hidden patch. Accuracy is low even at the end
                #    (about 16 % for the paper's large model). Many codes fit a hidden patch, and only one is right.
                loss, accuracy = cross_entropy(logits, codes)
                run.record(mim_loss=loss, mim_accuracy=accuracy)

                # 6. The same score for the second prediction, with the same weight. Its gradient reaches the last
                #    layers only through [CLS]. This is what makes [CLS] a summary of the image (see MaskedImageModel).
                if head_logits is not None:
                    head_loss, head_accuracy = cross_entropy(head_logits, codes)
                    run.record(cls_loss=head_loss, cls_accuracy=head_accuracy)
                    loss = loss + head_loss
                run.record(loss=loss)
                run.backward(loss)  # adds to the gradients; the last micro-batch averages them over processes
            run.optimizer_step(optimizer)  # clip the gradients, step, clear

        # Loss and accuracy tell how well codes are guessed, not whether the features are of use. k-NN does.
        paint_epoch(run, model, tokenizer, val_set, epoch)
        last = epoch + 1 == cfg.epochs
        pulse = cfg.knn_every and ((epoch + 1) % cfg.knn_every == 0 or last)
        run.end_epoch(epoch, train={}, val=knn_pulse(run, model, train_set, val_set) if pulse else {})
    run.finish()


def check_blocks(cfg: PretrainConfig, grid: int) -> None:
    """UserError if no block can be as large as `min_block`: every mask would then consist of single patches."""
    largest = min(cfg.num_masked, (grid - 1) ** 2)
    if cfg.min_block > largest:
        raise UserError(f"pretrain.min_block is {cfg.min_block}, but with pretrain.num_masked={cfg.num_masked} of {grid} "
                        f"x {grid} patches no block can have more than {largest}: lower pretrain.min_block")


def codes_of(tokenizer: nn.Module, batch: dict, images: torch.Tensor, views: int) -> torch.Tensor:
    """The codes of a batch, int64 [B, N]: from the cache, if the batch brings them, or from the tokenizer.

    images   the batch after colour jitter, [B, 3, S, S] in [0,1]

    The paper's way: student and tokenizer see the same jittered pixels. With fixed views (`data.views`, not in the
    paper) a crop has one row of codes for the whole run, but a new jitter in each epoch. So the tokenizer then sees the
    crop without jitter.
    """
    if "codes" in batch:
        return batch["codes"].long()
    return tokenizer.token_ids(data.to_unit(batch["image"]) if views else images)


def build_model(config) -> MaskedImageModel:
    """The model that the sections `model`, `pretrain` and `data` describe."""
    cfg = config.pretrain
    return MaskedImageModel(config.tokenizer.codebook_size, cfg.early_layers, cfg.head_layers, cfg.shared_lm_head,
                            cfg.drop_path, **config.model.backbone(config.data.image_size, tables="shared"))


def cross_entropy(logits: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and accuracy in [0,1] of logits [B, M, K] against codes [B, M]: equation 3, a mean over hidden patches.

    The mean keeps the loss the same size for any number of hidden patches. In fp32: with 8192 codes, the sum inside
    the softmax would lose its small terms in half precision.
    """
    loss = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
    return loss, (logits.argmax(dim=-1) == codes).float().mean()


@torch.no_grad()
def knn_pulse(run: Run, model: MaskedImageModel, train_set, val_set) -> dict[str, float]:
    """k-NN accuracy in [0,1] of the frozen [CLS] and of the mean patch: a cheap look at what the features know.

    An image gets the class of those training images whose features are nearest. Nothing is trained for this, so the
    figure is honest at any moment. Labels are used only here, and the model never sees them.
    """
    model.eval()
    config = run.config
    chosen = torch.linspace(0, len(train_set) - 1, min(config.pretrain.knn_images, len(train_set))).long().tolist()
    features = []
    for dataset, indices in ((train_set, chosen), (val_set, range(len(val_set)))):
        view = data.ValView(dataset, config.data.image_size, strict=dataset is val_set)
        loader = ValLoader(view, run.device_batch, workers=config.data.workers, indices=indices)
        features.append(extract_features(
            run, lambda images: model.features(data.normalize(data.to_unit(images))), loader, len(indices)))
    bank, queries = features
    return {f"knn_{kind}": knn_accuracy(bank[kind], bank["labels"], queries[kind], queries["labels"])
            for kind in ("cls", "mean")}


# ----------------------------------------------------------------------------------------------------------------
# Act 2. A small picture of each epoch (a reader of the method may skip this)


if __name__ == "__main__":
    launch(main, ModelError)
