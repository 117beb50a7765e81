"""The demo: all stages on images that draw themselves, one after the other in one process. `make demo` runs it.

    python docs/demo.py configs/demo.yaml [section.key=value ...]

The same as the commands at the top of configs/demo.yaml, which start Python anew for each step, but with a page of
pictures instead of segmentation. Stopped with Ctrl-C, it goes on with the same command; steps that are done say so.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetune  # noqa: E402
import pretrain  # noqa: E402
import tokenizer  # noqa: E402
import visualize  # noqa: E402
from beitv2 import ModelError  # noqa: E402
from support.figures import figures_of, shown  # noqa: E402
from support.launch import launch  # noqa: E402
from support.options import load_config  # noqa: E402
from support.processes import say  # noqa: E402

# What is done, by which script with which options, and its share of the time in per cent.
STEPS = [
    ("tokenizer: learn the words", tokenizer, [], 31),
    ("pre-training: predict the words of what is hidden", pretrain, [], 47),
    ("k-NN, untrained", finetune, ["finetune.mode=knn", "finetune.weights=none"], 1),
    ("k-NN, pre-trained", finetune, ["finetune.mode=knn"], 1),
    ("linear probe, untrained", finetune, ["finetune.mode=linear_probe", "finetune.weights=none"], 4),
    ("linear probe, pre-trained", finetune, ["finetune.mode=linear_probe"], 4),
    ("fine-tuning, untrained", finetune, ["finetune.weights=none"], 5),
    ("fine-tuning, pre-trained", finetune, [], 5),
    ("results", finetune, ["finetune.mode=report"], 0),
    ("pictures of what was learned, on one page", visualize, ["visualize.decoder_steps=0"], 2),
]


# What another teacher gives: seed 0 of the same commands with tokenizer.teacher=hog.
HOG = Path(__file__).resolve().parent / "demo" / "hog-0"


def main() -> None:
    arguments, start, done = sys.argv[1:], time.monotonic(), 0
    total = sum(share for *_, share in STEPS)
    for number, (title, script, options, share) in enumerate(STEPS, 1):
        left = ""
        if done:
            seconds = (time.monotonic() - start) * (total - done) / done
            left = f" (about {seconds / 60:.1f} minutes left)" if share else ""
        say(f"\n--- step {number} of {len(STEPS)}, {title}{left}")
        sys.argv = [f"{script.__name__}.py", *arguments, *options]
        script.main()
        done += share
    compare_teachers(Path(load_config(visualize.SECTIONS).output_dir))


def compare_teachers(folder: Path) -> None:
    """Print what this run has reached beside what the same student learned from HOG's codes."""
    columns = figures_of(folder, "_scratch"), figures_of(HOG), figures_of(folder)
    say(f"\n{'validation images':<22}{'untrained':>12}{'HOG codes':>14}{'codes of this run':>20}")
    for title in (title for title in columns[-1] if all(title in column for column in columns)):
        values = [f"{shown(title, column[title])} %" for column in columns]  # what all three have are percentages
        say(f"{title.removesuffix(' %'):<22}{values[0]:>12}{values[1]:>14}{values[2]:>20}")


if __name__ == "__main__":
    launch(main, ModelError)
