"""Several runs in one table, with a row for all seeds of an experiment, and their curves: `visualize.py RUN RUN ...`.

No reader of the method needs this file.
"""

import statistics
from pathlib import Path
from typing import Any

import yaml

from support.charts import curves_of
from support.errors import UserError, explained
from support.figures import run_figures, shown, titles_of
from support.options import FREE_TO_CHANGE, defaults_of, dotted, section_of
from support.page import page, table

# Runs that differ in these only are one experiment: they say where files lie, and how a stage is called.
PLACES = {"tokenizer_weights", "teacher_weights", "weights", "checkpoint", "images", "output", "classes_file"}


def options_of(folder: Path, sections: dict[str, type]) -> tuple[dict[tuple[str, str], dict[str, Any]], dict[str, int]]:
    """What a run was made with: {(stage, section): {key: value}}, and the seed of each stage.

    A stage's config.yaml holds more sections than the stage has used. Counted are its own one, `data`, `model`, and the
    keys outside all sections (section ""). A run that took a tokenizer from elsewhere has no such stage of its own.
    Then what stage 2 was told of the tokenizer counts. A key that a file lacks has its declared default: the run may be
    older than the option.

    sections   the dataclass of each section
    """
    defaults = defaults_of(sections)
    configs = {file.parent.name: defaults | read_config(file) for file in sorted(folder.glob("*/config.yaml"))}
    used = [(stage, section, config) for stage, config in configs.items()
            for section in ("", "data", "model", section_of(stage))]
    if "pretrain" in configs and "tokenizer" not in configs:
        used.append(("tokenizer", "tokenizer", configs["pretrain"]))
    options = {}
    for stage, section, config in used:
        options[stage, section] = {key: value for key, value in config.items() if key.rpartition(".")[0] == section
                                   and key.rpartition(".")[2] not in FREE_TO_CHANGE | PLACES | {"seed"}}
    return options, {stage: config["seed"] for stage, config in configs.items()}


def read_config(file: Path) -> dict[str, Any]:
    """The options of a run's config.yaml by their dotted keys."""
    advice = "mend it, or leave this run out"
    with explained(f"cannot read '{file}'", advice, OSError, UnicodeDecodeError, yaml.YAMLError):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("data"), dict):
        raise UserError(f"'{file}' is not the configuration of a run of this project: {advice}")
    return dotted(content)


def group_runs(folders: list[Path], sections: dict[str, type]) -> list[tuple[str, list[Path]]]:
    """(name, runs) for each experiment: its runs differ in nothing but seeds, PLACES and what is FREE_TO_CHANGE.

    One run may have gone further than another, so they are compared in the stages that both have. Without a common one,
    nothing tells that two runs belong together. Two runs with the same seeds are no two measurements either: they get
    rows of their own. The name tells in which options the experiments differ. Where that is not enough, the folders do.
    """
    about = {folder: options_of(folder, sections) for folder in folders}
    groups: list[tuple[dict, list[Path]]] = []
    for folder, (options, seeds) in about.items():
        for known, members in groups:
            alike = all(known[part] == options[part] for part in known.keys() & options.keys())
            # A member without a common stage has no other seed there, so this is false for it.
            if alike and all(any(about[member][1].get(stage, seed) != seed for stage, seed in seeds.items())
                             for member in members):
                known |= options
                members.append(folder)
                break
        else:
            groups.append((dict(options), [folder]))
    names = [name_of(known, differences([options for options, _ in about.values()])) for known, _ in groups]
    return [(name if name and names.count(name) == 1 else "all alike" if len(groups) == 1 else
             ", ".join(map(str, members)) + (f" ({name})" if name else ""), members)
            for name, (_, members) in zip(names, groups)]


def differences(runs: list[dict[tuple[str, str], dict[str, Any]]]) -> set[tuple[str, str]]:
    """(stage, section.key) of the options in which runs differ that both have the stage."""
    return {(part[0], key) for options in runs for part, values in options.items() for key, value in values.items()
            if any(other[part].get(key) != value for other in runs if part in other)}


def name_of(options: dict[tuple[str, str], dict[str, Any]], differing: set[tuple[str, str]]) -> str:
    """The differing options of a run, each with its stages in brackets if other stages of the run had another value."""
    stages: dict[str, dict[str, list[str]]] = {}  # of each key and value
    for (stage, _), values in options.items():
        for key, value in values.items():
            stages.setdefault(key, {}).setdefault(str(value), []).append(stage)
    return ", ".join(f"{key}={value}" + (f" ({', '.join(where)})" if len(by_value) > 1 else "")
                     for key, by_value in sorted(stages.items()) for value, where in by_value.items()
                     if any((stage, key) in differing for stage in where))


def mean_and_deviation(title: str, runs: list[dict[str, float]]) -> str:
    """A cell of the table; behind it in brackets how many runs have measured it, if not all."""
    values = [run[title] for run in runs if title in run]
    text = shown(title, statistics.mean(values)) if values else "-"
    if len(values) > 1:
        text += f" ± {shown(title, statistics.stdev(values))}"
    return text + (f" ({len(values)})" if 0 < len(values) < len(runs) else "")


def as_markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def compare(folders: list[Path], sections: dict[str, type]) -> Path:
    """Print a table of several runs, and write ./compare.html: that table, and their curves, stage by stage.

    sections   the dataclass of each section of a config file
    """
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        if not any(folder.glob("*/metrics.jsonl")):
            raise UserError(f"there are no figures or curves in '{folder}': give the output_dir of runs")
    groups = [(name, [run_figures(folder) for folder in members]) for name, members in group_runs(folders, sections)]
    titles = titles_of([run for _, runs in groups for run in runs])
    rows = [[name, str(len(runs)), *(mean_and_deviation(title, runs) for title in titles)] for name, runs in groups]
    rows.insert(0, ["runs that differ in", "seeds", *titles])
    path = Path("compare.html").resolve()
    content = page("BEiT v2: " + ", ".join(map(str, folders)), [
        ("Figures", table(rows) + "<p>Mean ± standard deviation over the seeds.</p>"), *curves_of(folders)])
    print(as_markdown(rows))
    with explained(f"cannot write '{path}'", "go to a folder where you may write", OSError):
        path.write_text(content, encoding="utf-8", errors="replace")
    return path
