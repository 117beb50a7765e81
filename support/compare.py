import html
import statistics
from pathlib import Path
from typing import Any

import yaml

from support.errors import UserError
from support.files import read_lines
from support.options import FREE_TO_CHANGE, SECTIONS
from support.pictures import line_chart, page


# title of a column, the stages that may have measured it (the first one that has), its name there, its unit
FIGURES = (("cosine loss", ("tokenizer",), "cosine_loss", 1), ("perplexity", ("tokenizer",), "perplexity", 1),
           ("bag of codes, k-NN %", ("tokenizer",), "bag_knn", 100),
           ("codes of one class %", ("tokenizer",), "one_class", 100),
           ("k-NN [CLS] %", ("knn", "pretrain"), ("cls", "knn_cls"), 100),
           ("k-NN mean %", ("knn", "pretrain"), ("mean", "knn_mean"), 100),
           ("probe [CLS] %", ("linear_probe",), "cls", 100), ("probe mean %", ("linear_probe",), "mean", 100),
           ("fine-tuning %", ("finetune",), "top1", 100), ("scratch %", ("finetune_scratch",), "top1", 100))


def figures_of(folder: Path, suffix: str = "") -> dict[str, float]:
    """The last value of each of FIGURES that a run has measured, by title; "_scratch": with an untrained backbone."""
    found = {}
    for title, stages, names, unit in FIGURES:
        for stage, name in zip(stages, [names] if isinstance(names, str) else names):
            value = last_figure(folder / f"{stage}{suffix}", name)
            if value is not None and title not in found:
                found[title] = unit * value
    return found


def options_of(folder: Path) -> dict[str, Any]:
    """The options of a run, {"section.key": value}, each section as the stage of that name was run with."""
    files = {path.parent.name: yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*/config.yaml"))}
    options = {}
    for stage in [*reversed(files), *(name for name in SECTIONS if name in files)]:  # a section's own stage last
        for section, values in files[stage].items():
            for key, value in values.items() if isinstance(values, dict) else ((None, values),):
                if key not in (*FREE_TO_CHANGE, "mode", "weights"):
                    options[f"{section}.{key}" if key else section] = value
    return {key: value for key, value in options.items() if key not in FREE_TO_CHANGE}


def group_runs(folders: list[Path]) -> dict[str, list[Path]]:
    """Runs that differ in nothing but their seed, and in where the files lie that they began with, under one name.

    The name tells the options in which the runs differ. Where that is not enough (two runs with the same seed), it is
    the folder's.
    """
    options = {folder: options_of(folder) for folder in folders}
    paths = ("seed", "pretrain.tokenizer_weights", "tokenizer.teacher_weights", "data.root")
    keys = sorted({key for values in options.values() for key in values} - set(paths))
    keys = [key for key in keys if len({repr(values[key]) for values in options.values() if key in values}) > 1]
    groups: dict[str, list[Path]] = {}
    for folder, values in options.items():
        name = ", ".join(f"{key}={values[key]}" for key in keys if key in values) or "all alike"
        groups.setdefault(name, []).append(folder)
    for name, members in list(groups.items()):
        seeds = [options[folder].get("seed") for folder in members]
        if len(set(seeds)) < len(seeds):
            del groups[name]
            groups |= {f"{folder}" + (f" ({name})" if keys else ""): [folder] for folder in members}
    return groups


def summary(folders: list[Path]) -> list[list[str]]:
    """A table of runs, its head first: a row for each group of runs, with means and standard deviations over seeds."""
    groups = {name: [figures_of(folder) for folder in members] for name, members in group_runs(folders).items()}
    titles = [title for title, *_ in FIGURES if any(title in run for runs in groups.values() for run in runs)]
    rows = [["runs that differ in", "seeds", *titles]]
    for name, runs in groups.items():
        rows.append([name, str(len(runs)), *(mean_and_deviation(title, runs) for title in titles)])
    return rows


def mean_and_deviation(title: str, runs: list[dict[str, float]]) -> str:
    """A cell of the table; behind it in brackets how many runs have measured it, if not all."""
    values, digits = [run[title] for run in runs if title in run], 4 if title == "cosine loss" else 1
    text = f"{statistics.mean(values):.{digits}f}" if values else "-"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text + (f" ({len(values)})" if 0 < len(values) < len(runs) else "")


def as_markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def as_html(rows: list[list[str]]) -> str:
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def compare(folders: list[Path]) -> Path:
    """Print a table of several runs, and write FIRST/compare.html: that table, and their curves, stage by stage."""
    rows = summary(folders)
    sections = [("Figures", as_html(rows) + "<p>Mean ± standard deviation over the seeds.</p>")]
    for stage in in_order({path.parent.name for folder in folders for path in folder.glob("*/metrics.jsonl")}):
        having = [folder for folder in folders if (folder / stage / "metrics.jsonl").is_file()]
        runs = {str(folder): read_curves(folder / stage) for folder in having}
        if content := charts(runs):
            sections.append((stage, content))
    if len(rows[0]) == 2 and len(sections) == 1:
        names = ", ".join(map(str, folders))
        raise UserError(f"there are no figures or curves in {names}: give the output_dir of runs")
    print(as_markdown(rows))
    path = folders[0] / "compare.html"
    path.write_text(page("BEiT v2: " + ", ".join(map(str, folders)), sections), encoding="utf-8", errors="replace")
    return path


def read_curves(folder: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """metrics.jsonl of a stage as curves {"step": {name: [(step, value)]}, "epoch": {name: [(epoch, value)]}}."""
    curves = {"step": {}, "epoch": {}}
    for line in read_lines(folder / "metrics.jsonl"):
        if "val" in line:
            values = line.get("train", {}) | {f"val {name}": value for name, value in line["val"].items()}
            x, kind = line["epoch"] + 1, "epoch"
        else:
            values, x, kind = {key: line[key] for key in line if key not in ("epoch", "step")}, line["step"], "step"
        for name, value in values.items():
            curves[kind].setdefault(name, []).append((x, value))
    return curves


def in_order(stages: set[str]) -> list[str]:
    """Stages as they follow each other, then the others by name."""
    order = ("tokenizer", "pretrain", "finetune", "finetune_scratch")
    return sorted(stages, key=lambda stage: (order.index(stage) if stage in order else len(order), stage))


# title, unit of y, against what, and the names that belong into one chart
CHARTS = (("Loss", "loss", "step", ("loss", "cosine_loss", "mim_loss", "cls_loss")),
          ("Loss of epochs", "loss", "epoch", ("loss", "cosine_loss", "val loss", "val cosine_loss")),
          ("Accuracy", "share of 1", "step", ("accuracy", "mim_accuracy", "cls_accuracy")),
          ("Accuracy of epochs", "share of 1", "epoch", (
              "accuracy", "mim_accuracy", "cls_accuracy", "val top1", "val top5", "val knn_cls", "val knn_mean",
              "val cls", "val mean", "val miou", "val pixel_accuracy")),
          ("Codes in use", "perplexity (codes)", "epoch", ("perplexity", "val perplexity", "batch_perplexity")),
          ("Codebook usage", "share of 1", "epoch", ("usage", "val usage")),
          ("Learning rate", "highest of all groups", "step", ("lr",)))


def charts(runs: dict[str, dict]) -> str:
    """The charts of one stage, "" if it took no steps; with several runs, {name: curves}, each curve bears its run's
    name too."""
    if not any(curves["step"] for curves in runs.values()):
        return ""
    drawn = []
    for title, unit, kind, names in CHARTS:
        series = {" ".join(filter(None, (run, name))): points for run, curves in runs.items()
                  for name, points in curves[kind].items() if name in names}
        drawn.append(line_chart(title, series, kind, unit))
    return f'<div class="charts">{"".join(drawn)}</div>'


def last_figure(folder: Path, name: str) -> float | None:
    """The last validation figure of that name in a stage's metrics.jsonl, if there is one."""
    path = folder / "metrics.jsonl"
    lines = read_lines(path) if path.is_file() else []
    values = [line["val"][name] for line in lines if name in line.get("val", {})]
    return values[-1] if values else None


def results(config) -> list[tuple[str, str, str]]:
    """What has been measured in OUTPUT_DIR: (title, with an untrained backbone, with the pre-trained one)."""
    def figure(folder: str, name: str) -> str:
        value = last_figure(Path(config.output_dir) / folder, name)
        return "-" if value is None else f"{100 * value:.1f} %"

    rows = [("k-NN, [CLS]", "knn", "cls"), ("k-NN, mean patch", "knn", "mean"),
            ("linear probe, [CLS]", "linear_probe", "cls"), ("linear probe, mean patch", "linear_probe", "mean"),
            ("fine-tuning", "finetune", "top1")]
    return [(title, figure(f"{folder}_scratch", name), figure(folder, name)) for title, folder, name in rows]
