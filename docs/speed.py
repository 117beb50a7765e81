"""Times of an older clone of this repository over those of this one, part by part, for docs/speed.md.

    python docs/speed.py OLDER_CLONE            # all parts: half an hour or more on a busy core
    python docs/speed.py OLDER_CLONE hog mask   # only parts whose names begin like this

Each clone works in a process of its own, with one thread. Both take turns, so that a busy machine slows both alike, and
what counts is the time of the processor, not that of the clock. Each figure is a median over the rounds.
"""

import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 3
# Small pieces of the real runs: a step takes as long in them. Images are drawn shapes, with one crop of each, which is
# drawn in the first epoch and kept. `pixels` stands in for CLIP, whose answers are cached.
SMALL = ["data.views=1", "data.val_images=64", "tokenizer.epochs=3", "tokenizer.warmup_epochs=9",
         "tokenizer.knn_images=0", "pretrain.epochs=3", "pretrain.knn_every=0", "finetune.weights=none",
         "finetune.epochs=3", "finetune.probe_epochs=3", "device=cpu"]
RUNS = {"demo": ["data.train_images=640"],
        "imagenette": ["data.train_images=192", "data.dataset=shapes", "tokenizer.teacher=pixels"]}
STAGES = {"tokenizer": "tokenizer", "pretrain": "pretrain", "finetune": "finetune", "probe": "finetune"}
PARTS = {
    "tokenizer sample": "a sample at 224 px from a JPEG of 500 x 375: tokenizer",
    "pretrain sample": "the same for pre-training, with mask",
    "finetune sample": "the same for fine-tuning, RandAugment and erased box",
    "mask": "`block_mask`, 75 of 14 x 14",
    "hog": "HOG of 128 crops of 48 px",
} | {f"{run} {stage}": f"{run}.yaml, a step of {name}" for run in RUNS for stage, name in
     (("tokenizer", "the tokenizer, features cached"), ("pretrain", "pre-training, codes cached"),
      ("finetune", "fine-tuning"), ("probe", "the linear probe, features cached"))}


def main(older: str, chosen: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder))
        shutil.copytree(Path(older) / "configs", Path(folder) / "configs")  # recipes change: both clones take the older
        clones = [Clone(older, Path(folder) / "old"), Clone(Path(__file__).parents[1], Path(folder) / "new")]
        print("| part | older, ms | now, ms | ratio |\n|---|---|---|---|")
        for part, title in PARTS.items():
            if chosen and not part.startswith(tuple(chosen)):
                continue
            rounds = [[clone.time(part) for clone in clones] for _ in range(ROUNDS)]
            old, new = (1000 * statistics.median(times) for times in zip(*rounds))
            ratio = statistics.median(old / new for old, new in rounds)
            print(f"| {title} | {old:.3g} | {new:.3g} | {ratio:.2f} |", flush=True)


def make_photos(folder: Path) -> None:
    """Smooth random pictures as JPEG: like photographs, they have more to say in low frequencies than in high ones."""
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    for number in range(20):
        picture = sum(np.asarray(Image.fromarray(rng.integers(0, 256, (size * 3 // 4, size, 3), dtype=np.uint8))
                                 .resize((500, 375), Image.BICUBIC), dtype=np.float32) / 4 for size in (4, 16, 64, 256))
        path = folder / f"photos/train/{'ab'[number % 2]}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)


class Clone:
    """A process that works with the code of one clone, and answers the name of a part with its time in seconds."""

    def __init__(self, clone: str | Path, folder: Path):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(clone).resolve())}
        self.process = subprocess.Popen([sys.executable, __file__, "--clone", folder.resolve()], cwd=clone, text=True,
                                        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def time(self, part: str) -> float:
        print(part, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the clone of '{self.process.args[-1].name}' has ended: see above")
        return float(answer)


# --- in a clone's process: what is called by other names in an older one has both here -------------------------


def serve(folder: Path) -> None:
    for part in map(str.strip, sys.stdin):
        with contextlib.redirect_stdout(io.StringIO()):
            first, last = part.split(" ") if " " in part else (part, "")
            seconds = (time_samples(folder, first) if last == "sample" else time_mask() if part == "mask" else
                       time_hog() if part == "hog" else time_steps(folder, first, last))
        print(seconds, flush=True)


def timed(work, times: int) -> float:
    work()
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


def time_samples(folder: Path, stage: str) -> float:
    import data
    try:
        from support.datasets import open_dataset
    except ImportError:
        from data import open_dataset
    with contextlib.suppress(ImportError):
        from support.processes import keep_freed_memory
        keep_freed_memory()  # as a run does before it starts its workers
    samples = getattr(data, "TrainSamples", None) or data.TrainView
    options = {"tokenizer": {}, "pretrain": dict(crop_scale=(0.2, 1.0), jitter=0.4, num_masked=75, mask_grid=14),
               "finetune": dict(rand_augment=True, erase=0.25)}[stage]
    config = data.DataConfig(dataset="imagefolder", root=str(folder.parent / "photos"))
    made = samples(open_dataset(config, "train"), 0, 224, **options)
    return timed(lambda: [made[epoch, index] for epoch in range(4) for index in range(len(made))], 4) / (4 * len(made))


def time_mask() -> float:
    from data import block_mask
    return timed(lambda: block_mask(14, 75), 300)


def time_hog() -> float:
    import torch
    try:
        from support.teachers import HOG
    except ImportError:
        from tokenizer import HOG
    images = torch.rand(128, 3, 48, 48)
    return timed(lambda: HOG(12)(images), 10)


def time_steps(folder: Path, run: str, stage: str) -> float:
    """The median over the steps of a small run: from one optimizer step to the next, with data, log and all.

    The first of three epochs does not count, because it also draws the images.
    """
    import importlib

    from torch.optim.optimizer import register_optimizer_step_post_hook
    ends = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.process_time()))
    output = folder / run
    for script in ["tokenizer", "pretrain"] if stage == "pretrain" else [STAGES[stage]]:
        if script == STAGES[stage]:  # the tokenizer serves all rounds of pre-training
            shutil.rmtree(output if script == "finetune" else output / stage, ignore_errors=True)
            ends.clear()
        mode = ["finetune.mode=linear_probe"] if stage == "probe" else []
        config = str(folder.parent / f"configs/{run}.yaml")
        sys.argv = [f"{script}.py", config, *SMALL, *RUNS[run], *mode, f"output_dir={output}"]
        importlib.import_module(script).main()
    hook.remove()
    ends = ends[len(ends) // 3:]
    return statistics.median(after - before for before, after in zip(ends, ends[1:]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--clone"]:
        serve(Path(sys.argv[2]))
    elif len(sys.argv) > 1:
        main(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(__doc__)
