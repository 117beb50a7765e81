"""Stage 2, masked image modeling: predict the ids of the codes of hidden patches (paper section 2.3).

    torchrun pretrain.py configs/demo.yaml                                   # one process, CPU or GPU
    torchrun --nproc-per-node 8 pretrain.py configs/base.yaml                # eight GPUs of one machine
    torchrun pretrain.py configs/imagenette.yaml pretrain.num_masked=40      # any option, from the command line

We hide about 40 % of the patches of an image, in rectangular blocks: a learned vector, the mask token, takes the place
of each. The network that we train is a Vision Transformer; here it is also called the *student*. It gets one token for
each patch, but for a hidden (or masked) one only the mask token, which says nothing of the pixels. For each masked
patch it must predict the id of the code that the tokenizer of stage 1 gives it. The tokenizer sees the whole image.

The ids are predicted twice. The first prediction reads the student's last layer, at the masked position. The second one
comes from the aggregation head, a small transformer that is thrown away afterwards. It reads the final [CLS] token
together with the patch tokens of an early layer l (at a masked position: the mask token after l blocks). Both have the
same loss:

    loss = - mean over hidden patches i of  [ log p(id_i | visible patches) + log p(id_i | [CLS], early patches) ]

Why codes and not pixels? A network that must predict pixels spends most of its capacity on textures. A code stands for
what a teacher such as CLIP sees in the patch, so to predict it the network must know what the hidden part *is*.

One image of 224 pixels on its way through the paper's base model:

    image                                     [3, 224, 224]
    ids of all patches, from the tokenizer    [196]           only those of the 75 hidden patches are asked for
    [CLS] and 14 x 14 patches, 75 hidden      [197, 768]      12 blocks see all 197, the last MLP only 76 of them
    at the masked positions, after block 12   [75, 768]
    prediction 1                              [75, 8192]      final norm and output layer
    final [CLS], patches after block 9        [197, 768]      the aggregation head, 2 blocks
    prediction 2                              [75, 8192]      the same norm and output layer, at the masked positions

Writes OUTPUT_DIR/pretrain/{last.pt, metrics.jsonl, config.yaml, epoch-NN.png}.
"""

from dataclasses import dataclass

import torch
from torch import nn

from beitv2 import MaskedImageModel, ModelConfig, ModelError, dimensions, masked_positions, score
from data import DataConfig, TrainSamples, check_num_masked, jittered, normalize
from finetune import knn_pulse
from support.cls_swap import masked_accuracy
from support.datasets import open_datasets
from support.epoch_picture import paint_epoch
from support.errors import UserError
from support.launch import launch
from support.optimizers import clip_gradients, make_optimizer
from support.options import Amount, Beta, Count, Natural, PathText, Share, TrainConfig, load_config
from support.run import Run
from tokenizer import TokenizerConfig, load_tokenizer


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
    tokenizer_weights: PathText = ""  # a trained tokenizer, path or URL; empty: OUTPUT_DIR/tokenizer/last.pt
    num_masked: Count = 75  # masked patches per image: about 40 % of 196
    mask_ratio: Share = 0.0  # share of the patches to mask, instead of num_masked; 0: num_masked counts
    min_block: Natural = 16  # patches in the smallest block; 0: no blocks, single patches
    early_layers: Natural = 9  # l: the aggregation head sees the patches after this layer; the first layer is 1
    head_layers: Natural = 2  # transformer blocks of the aggregation head; 0: no such head
    shared_lm_head: bool = True  # both predictions through the same norm and output layer; false: two of each
    crop_scale: tuple[Share, Share] = (0.2, 1.0)  # area of the random crop over that of the image
    jitter: Amount = 0.4  # strength of the colour jitter
    knn_every: Natural = 10  # k-NN and what [CLS] tells the head, after so many epochs and the last; 0: never
    knn_images: Count = 20000  # training images that the k-NN compares with, evenly spaced

    def check(self, config) -> None:
        """Called when the configuration is read. UserError if masks do not fit the image, or a layer is not there."""
        grid = config.data.image_size // config.model.patch_size
        if self.mask_ratio:  # from here on only num_masked is used, so both options can describe the same run
            self.num_masked, self.mask_ratio = max(1, round(self.mask_ratio * grid**2)), 0.0
        if hasattr(config, "visualize"):  # a page of pictures needs no pre-training
            return
        check_num_masked(self.num_masked, grid)
        largest = min(self.num_masked, (grid - 1) ** 2)
        if self.min_block > largest:  # almost no block would fit
            raise UserError(f"pretrain.min_block is {self.min_block}, but with {self.num_masked} masked patches of "
                            f"{grid} x {grid} no block can have more than {largest}: lower pretrain.min_block")
        depth = dimensions(config.model)["depth"]
        if self.head_layers and not 1 <= self.early_layers <= depth:
            raise UserError(f"pretrain.early_layers is {self.early_layers}, but the backbone has {depth} blocks: "
                            f"choose a layer from 1 to {depth}")


SECTIONS = {"data": DataConfig, "model": ModelConfig, "tokenizer": TokenizerConfig, "pretrain": PretrainConfig}


def main() -> None:
    train(load_config(SECTIONS))


def train(config) -> None:
    cfg, size = config.pretrain, config.data.image_size
    run = Run("pretrain", config, cfg)  # handles processes, devices, log and checkpoints; knows nothing of the method

    # Each training sample brings its crop, the factors of its colour jitter, and its mask (data.block_mask).
    train_set, val_set = open_datasets(config.data)
    samples = TrainSamples(train_set, config.seed, size, cfg.crop_scale, cfg.jitter, cfg.num_masked,
                           size // config.model.patch_size, cfg.min_block, views=config.data.views)

    # The tokenizer is frozen. Its ids serve as labels, but no person made them.
    tokenizer, source = load_tokenizer(config, cfg.tokenizer_weights, "pretrain.tokenizer_weights")

    # Only the student learns. `student` is the same model as `model`, compiled if asked for, and synchronised between
    # processes if there are several.
    model = build_model(config, tokenizer.num_ids).to(run.device)
    optimizer = make_optimizer(model, cfg)
    example = torch.zeros(1, 3, size, size), torch.zeros(1, cfg.num_masked, dtype=torch.int64)
    student = run.begin(samples, source, example, model=model, optimizer=optimizer)
    lr = run.cosine_schedule()
    targets_of = tokenizer.targets(run, samples)

    for epoch in run.epochs():
        student.train()
        # One optimizer step looks at `batch_size` images, spread over all processes. If a process cannot hold its share
        # at once, it takes it in several micro-batches and adds the gradients up; `last` is true for the last of them.
        for step, batch, last in run.micro_batches(epoch):
            for group in optimizer.param_groups:
                group["lr"] = lr[step] * group["lr_scale"]

            # 1. The pixels. Random colours are augmentation, like the random crop: an image never looks the same twice
            #    (but with `data.views` its crops come back).
            images = jittered(batch)  # [B, 3, S, S] in [0,1]

            # 2. The mask, as positions of hidden patches. Every image has the same number M of them. So all shapes are
            #    known before the step, and nothing has to wait until the masked patches are counted.
            masked = masked_positions(batch["mask"], cfg.num_masked)  # [B, M], each in 0 .. N-1

            # 3. The question. The tokenizer sees the whole image and names the code of each patch. We ask only about
            #    the hidden ones: a visible patch could be named by looking at it, and would teach little. (With
            #    `data.views` the tokenizer sees the crop without jitter, whose ids never change.)
            targets = targets_of(batch, images, masked)  # ids [B, M], each in 0 .. K-1

            # 4. Both predictions. The student gets ImageNet's normalisation, which fine-tuning will use too. (The
            #    tokenizer got [0,1], which VQKD.encode scales as in its own training.)
            with run.autocast():
                predictions = student(normalize(images), masked)  # one or two: logits [B, M, K]

            # 5. The score: a classification among K ids for each hidden patch, for both predictions with the same
            #    weight. The gradient of the second one, "cls", reaches the last layers only through [CLS]: this is to
            #    make [CLS] a summary of the image (see MaskedImageModel). Accuracy is low even at the end (about 16 %
            #    for the paper's large model): many codes fit a hidden patch, and only one is right.
            loss = 0.0
            for name, logits in zip(model.prediction_names, predictions, strict=True):
                part, hits = score(logits, targets)
                loss = loss + part
                run.record(**{f"{name}_loss": part, f"{name}_accuracy": hits.float().mean()})
            run.record(loss=loss)

            # 6. The step. Gradients of micro-batches add up, each divided by their number. With the last micro-batch
            #    they are averaged over processes.
            run.backward(loss)
            if last:
                run.scaler.unscale_(optimizer)
                grad_norm = clip_gradients(optimizer, cfg.clip_grad)
                run.scaler.step(optimizer)  # optimizer.step(), unless fp16 gradients have overflowed
                run.scaler.update()
                optimizer.zero_grad()
                run.record(lr=lr[step], grad_norm=grad_norm)

        run.end_epoch(epoch, measure(run, model, tokenizer, train_set, val_set, epoch))


def build_model(config, num_ids: int) -> MaskedImageModel:
    """The student that the sections `model`, `pretrain` and `data` describe, for a codebook of K = `num_ids` codes."""
    cfg = config.pretrain
    return MaskedImageModel(num_ids, cfg.early_layers, cfg.head_layers, cfg.shared_lm_head, cfg.drop_path,
                            **config.model.backbone(config.data.image_size, tables="shared"))


def measure(run: Run, model: MaskedImageModel, tokenizer: nn.Module, train_set, val_set, epoch: int) -> dict:
    """After an epoch: a small picture, and every `knn_every` epochs figures of validation images.

    Loss and accuracy tell how well ids are predicted, and accuracy with a foreign [CLS] what the head takes from [CLS]
    (support/cls_swap.py). None of them tells whether the features are useful; k-NN tells that."""
    cfg = run.config.pretrain
    paint_epoch(run, model, tokenizer, val_set, epoch)
    last = epoch + 1 == cfg.epochs
    if not cfg.knn_every or not ((epoch + 1) % cfg.knn_every == 0 or last):
        return {}
    figures = masked_accuracy(run, model, tokenizer, val_set)
    if len(train_set.classes) > 1:
        figures |= knn_pulse(run, model, train_set, val_set, cfg.knn_images)
    return figures


if __name__ == "__main__":
    launch(main, ModelError)
