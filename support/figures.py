"""Which figures a run has measured, from the metrics.jsonl of its stages: for the report, the page and the comparison.

No reader of the method needs this file.
"""

import math
import re
from pathlib import Path

from support.files import read_lines

# Title of a figure, the stage that measures it, and its name there. A title may have several stages: the first one that
# has measured it counts. What stands in brackets of the name is the pooling, and takes its place in the title.
FIGURES = (
    ("cosine loss", "tokenizer", "cosine_loss"),
    ("perplexity", "tokenizer", "perplexity"),
    ("bag of codes, k-NN %", "tokenizer", "bag_knn"),
    ("codes of one class %", "tokenizer", "one_class"),
    ("k-NN {} %", "knn", "(.+)"),
    ("k-NN {} %", "pretrain", "knn_(.+)"),
    ("probe {} %", "linear_probe", "(.+)(?<!_lr)"),
    ("fine-tuning %", "finetune", "top1"),
    ("segmentation mIoU %", "segment", "miou"),
)
UNTRAINED = "untrained: "  # before a title: with an untrained backbone


def figures_of(folder: Path, suffix: str = "", stages: set[str] | None = None) -> dict[str, float]:
    """The last value of each figure that a run has measured, by its title; percentages as 0 to 100.

    suffix   "_scratch": of the stages that began with an untrained backbone
    stages   look at these only; None: at all
    """
    found = {}
    for title, stage, name in FIGURES:
        if stages is None or stage in stages:
            for measured, value in last_values(folder / f"{stage}{suffix}").items():
                if match := re.fullmatch(name, measured):
                    poolings = (pooling.replace("cls", "[CLS]") for pooling in match.groups())
                    found.setdefault(title.format(*poolings), 100 * value if title.endswith("%") else value)
    return found


def last_values(stage_folder: Path) -> dict[str, float]:
    """The last validation figure of each name in a stage's metrics.jsonl; {} where there is none."""
    path, values = stage_folder / "metrics.jsonl", {}
    for line in read_lines(path) if path.is_file() else []:
        values |= line.get("val", {})
    # Images without labels have no accuracy: null or NaN stands for it.
    return {name: value for name, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)}


def titles_of(runs: list[dict[str, float]]) -> list[str]:
    """The titles that occur in the figures of these runs, in the order of FIGURES, UNTRAINED ones beside their own."""
    beginnings = [title.partition("{")[0] for title, *_ in FIGURES]
    return sorted({title for run in runs for title in run}, key=lambda title: (
        next(i for i, text in enumerate(beginnings) if title.removeprefix(UNTRAINED).startswith(text)),
        title.removeprefix(UNTRAINED), title))


def run_figures(folder: Path) -> dict[str, float]:
    """The figures of a run, with those of its untrained backbone under titles of their own."""
    untrained = {f"{UNTRAINED}{title}": value for title, value in figures_of(folder, "_scratch").items()}
    return figures_of(folder) | untrained


def shown(title: str, value: float) -> str:
    return f"{value:.4f}" if title == "cosine loss" else f"{value:.1f}"


def results(folder: Path) -> list[tuple[str, str, str]]:
    """What has been measured in OUTPUT_DIR: (title, with an untrained backbone, with the pre-trained one)."""
    columns = figures_of(folder, "_scratch"), figures_of(folder)
    return [(title.removesuffix(" %"), *("-" if title not in column else
                                         shown(title, column[title]) + (" %" if title.endswith("%") else "")
                                         for column in columns))
            for title in titles_of(list(columns))]
