"""How much memory a training step takes on a GPU. Made the tables of docs/gpus.md.

    python docs/memory.py configs/base.yaml configs/large.yaml                   (more options: compile=false)

Where there is a GPU, the step runs on it, and its memory and speed are measured, with the `device_batch_size` of the
config. The images are there already: loading them is not measured.

Without a GPU the memory is counted. The step runs on fake tensors, which have a shape and a type but no numbers, so
that nothing is computed. We add up the bytes of all tensors that live at the same time: weights, gradients, the state
of AdamW, what the backward pass needs again, half-precision copies, frozen networks. What a real GPU needs on top is
not counted: CUDA itself (about half a GB), gaps between tensors, scratch space inside kernels. What torch.compile saves
is not counted either.

The tensors claim to be on the CPU, because PyTorch runs no backward pass on a GPU that is not there. Their sizes are
the same.
"""

import sys
import time
import weakref
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import finetune  # noqa: E402
import pretrain  # noqa: E402
import tokenizer as vqkd  # noqa: E402
from beitv2 import Classifier, masked_positions, score, take  # noqa: E402
from support.launch import launch  # noqa: E402
from support.optimizers import make_optimizer  # noqa: E402
from support.options import load_config  # noqa: E402
from support.teachers import TEACHERS  # noqa: E402

SECTIONS = vqkd.SECTIONS | pretrain.SECTIONS | finetune.SECTIONS
IMAGES = (16, 32, 64, 128)  # of one forward pass


class PeakMemory(TorchDispatchMode):
    """Follows the bytes of all tensors that are made while it is on: `now`, and at most, `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()  # views share the storage of the tensor they show a part of

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return result

    def free(self, size: int) -> None:
        self.now -= size


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """The kernel that PyTorch takes on a GPU for a bias that is learned: it never holds all B x H x T x T logits.

    But its backward pass makes a gradient of the bias for each image, [B, H, T, T]. Without a bias PyTorch takes flash
    attention, which keeps as much for the backward pass as this one.
    """
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, torch.is_grad_enabled())[0]


def half_precision() -> torch.autocast:
    return torch.autocast(torch.get_default_device().type, torch.bfloat16)


# Each stage's forward pass as in its script: returns the model, and a function from images in [0,1] to the loss.


def tokenizer_stage(config):
    teacher = TEACHERS[config.tokenizer.teacher].build(config.data.image_size // config.model.patch_size)
    model = vqkd.build_vqkd(config, teacher.output_dim)

    def loss_of(images: Tensor) -> Tensor:
        with half_precision():
            cosine_loss, commitment_loss, _ = model(images, teacher(images))
            return cosine_loss + commitment_loss

    return model, loss_of


def pretrain_stage(config):
    cfg = config.pretrain
    tokenizer = vqkd.build_vqkd(config, teacher_dim=512).requires_grad_(False).eval()
    model = pretrain.build_model(config, tokenizer.num_ids)

    def loss_of(images: Tensor) -> Tensor:
        images = data.color_jitter(images, torch.ones(len(images), 3))
        masked = masked_positions(torch.ones(len(images), model.num_patches, dtype=torch.bool), cfg.num_masked)
        with half_precision():
            ids = take(tokenizer.token_ids(images), masked)
            predictions = model(data.normalize(images), masked)
        return sum(score(logits, ids)[0] for logits in predictions)

    return model, loss_of


def finetune_stage(config):
    cfg, classes = config.finetune, 1000
    model = Classifier(classes, cfg.pooling, cfg.init_scale, drop_path=cfg.drop_path,
                       **config.model.backbone(config.data.image_size))

    def loss_of(images: Tensor) -> Tensor:
        with half_precision():
            logits = model(data.normalize(images))
        return F.cross_entropy(logits.float(), torch.ones(len(images), classes), label_smoothing=cfg.label_smoothing)

    return model, loss_of


STAGES = {"tokenizer": tokenizer_stage, "pretrain": pretrain_stage, "finetune": finetune_stage}


def training_step(config, stage: str, images: int) -> Callable[[], None]:
    """A step of `stage` with micro-batches of so many images, on the default device; all that it needs is there."""
    cfg = getattr(config, stage)
    model, loss_of = STAGES[stage](config)
    optimizer = make_optimizer(model, cfg)
    # AdamW's state comes with the first step, and from a step's second micro-batch on there are gradients too.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    batch = torch.zeros(images, 3, config.data.image_size, config.data.image_size, dtype=torch.uint8)
    if torch.get_default_device().type == "cuda" and config.compile != "false":
        model.compile()  # in place; as support/run.py does

    def step() -> None:
        loss_of(data.to_unit(batch)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or torch.inf)
        optimizer.step()

    return step


def measure(config, stage: str) -> tuple[float, float]:
    """GB (10^9 bytes) that tensors on the GPU take at most in a step of `stage`, and images per second."""
    images = getattr(config, stage).device_batch_size
    with torch.device("cuda"):
        step = training_step(config, stage, images)
        for _ in range(3):  # the first ones choose kernels and compile
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        for _ in range(10):
            step()
        torch.cuda.synchronize()
        speed = 10 * images / (time.perf_counter() - begin)
    data.channels.cache_clear()  # so that the next stage finds an empty GPU
    torch.compiler.reset()
    return torch.cuda.max_memory_allocated() / 1e9, speed


def step_memory(config, stage: str, images: int) -> float:
    """GB that a GPU would hold at most in a step of `stage` with micro-batches of so many images, without it."""
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = memory_efficient_attention
    try:
        with FakeTensorMode(), PeakMemory() as memory:
            training_step(config, stage, images)()
    finally:
        F.scaled_dot_product_attention = attention
        data.channels.cache_clear()  # it holds fake tensors
    return memory.peak / 1e9


def main() -> None:
    files = [word for word in sys.argv[1:] if "=" not in word]
    options = [word for word in sys.argv[1:] if "=" in word]
    columns = ["GB per GPU"] + [f"{images} images" for images in IMAGES]
    if on_gpu := torch.cuda.is_available():
        columns = ["measured", "images", "GB", "images per second"]
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for file in files:
        for stage in STAGES:
            for recomputed in (False, True):
                if stage == "tokenizer" and (recomputed or file != files[0]):
                    continue  # it always keeps its activations, and is the same in both configs
                config = load_config(SECTIONS, [file, f"model.checkpoint_activations={recomputed}", *options])
                if on_gpu:
                    size, speed = measure(config, stage)
                    row = f"{getattr(config, stage).device_batch_size} | {size:.1f} | {speed:,.0f}"
                else:
                    row = " | ".join(f"{step_memory(config, stage, images):.1f}" for images in IMAGES)
                title = f"{Path(file).stem}, {stage}{', checkpoint_activations' if recomputed else ''}"
                print(f"| {title} | {row} |", flush=True)


if __name__ == "__main__":
    launch(main)
