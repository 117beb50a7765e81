"""Which runs are one experiment, which figures they have, and what the table of several runs says."""

import copy
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import yaml

CODE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CODE))
import finetune  # noqa: E402
import segment  # noqa: E402
import visualize  # noqa: E402
from support.compare import group_runs, mean_and_deviation  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.figures import figures_of, results, run_figures, titles_of  # noqa: E402

SECTIONS = visualize.SECTIONS | segment.SECTIONS
CONFIG = dict(output_dir="runs/x", seed=0, device="cpu", data=dict(image_size=16, train_images=400), model=dict(depth=2))


def write(folder: Path, stage: str, *figures: dict, **changes) -> None:
    """A stage of a run, as a script leaves it: a line of metrics for each of `figures`, and CONFIG with `changes`."""
    (folder / stage).mkdir(parents=True)
    (folder / stage / "metrics.jsonl").write_text("".join(
        json.dumps(dict(epoch=epoch, step=1, val=values)) + "\n" for epoch, values in enumerate(figures)))
    config = copy.deepcopy(CONFIG)
    for name, values in changes.items():
        config[name] = config.get(name, {}) | values if isinstance(values, dict) else values
    (folder / stage / "config.yaml").write_text(yaml.safe_dump(config))


def groups(*folders: Path) -> dict[str, list[str]]:
    found = group_runs(list(folders), SECTIONS)
    assert len({name for name, _ in found}) == len(found), "two rows of one name"
    return {name: [folder.name for folder in members] for name, members in found}


# -- which runs are one experiment --------------------------------------------------------------------------------


def test_runs_that_differ_in_seed_and_places_are_one_experiment(tmp_path):
    for seed in (0, 1, 2):
        write(tmp_path / str(seed), "tokenizer", tokenizer=dict(epochs=3, teacher_weights=f"{seed}.pt"), seed=seed)
        write(tmp_path / str(seed), "pretrain", seed=seed, output_dir=f"runs/{seed}", device="cuda", precision="bf16",
              data=dict(root=f"there/{seed}", workers=seed, cache=str(seed)),
              pretrain=dict(tokenizer_weights=f"{seed}/last.pt", device_batch_size=seed))
    assert groups(*(tmp_path / str(seed) for seed in (0, 1, 2))) == {"all alike": ["0", "1", "2"]}


def test_an_option_that_an_older_run_lacks_has_its_default(tmp_path):
    """Not any value at all: a run from before `head_layers` is alike to one with 2, the default, and to no other."""
    write(tmp_path / "old", "pretrain", pretrain=dict(epochs=4))
    write(tmp_path / "same", "pretrain", pretrain=dict(epochs=4, head_layers=2, betas=[0.9, 0.98]), seed=1)
    write(tmp_path / "other", "pretrain", pretrain=dict(epochs=4, head_layers=0), seed=2)
    assert groups(tmp_path / "old", tmp_path / "same", tmp_path / "other") == {
        "pretrain.head_layers=2": ["old", "same"], "pretrain.head_layers=0": ["other"]}


def test_an_option_that_is_not_declared_keeps_runs_apart(tmp_path):
    """Such as one of a branch of the code, looked at with a build that does not know it."""
    write(tmp_path / "adamw", "pretrain", pretrain=dict(epochs=4))
    write(tmp_path / "lion", "pretrain", pretrain=dict(epochs=4, optimiser="lion"), seed=1)
    found = groups(tmp_path / "adamw", tmp_path / "lion")
    assert list(found.values()) == [["adamw"], ["lion"]] and "pretrain.optimiser=lion" in found


def test_each_section_is_that_of_the_stage_which_used_it(tmp_path):
    """Later stages repeat the sections of earlier ones, and may have been called without their options."""
    for name, seed, epochs in (("long", 0, 3), ("short", 1, 1)):
        write(tmp_path / name, "tokenizer", tokenizer=dict(epochs=epochs), seed=seed)
        write(tmp_path / name, "pretrain", tokenizer=dict(epochs=1), pretrain=dict(epochs=2), seed=seed)
        write(tmp_path / name, "knn", tokenizer=dict(epochs=1), pretrain=dict(epochs=2 + seed), seed=seed)
    assert groups(tmp_path / "long", tmp_path / "short") == {
        "tokenizer.epochs=3": ["long"], "tokenizer.epochs=1": ["short"]}


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain", "linear_probe"])
def test_an_option_that_differs_in_one_stage_alone_keeps_runs_apart(tmp_path, stage):
    for name, seed in (("a", 0), ("b", 1)):
        for each in ("tokenizer", "pretrain", "linear_probe"):
            images = 100 if (name, each) == ("b", stage) else 400
            write(tmp_path / name, each, data=dict(train_images=images), seed=seed)
    assert groups(tmp_path / "a", tmp_path / "b") == {
        "data.train_images=400": ["a"], f"data.train_images=100 ({stage})": ["b"]}


def test_the_modes_of_finetune_have_options_of_their_own(tmp_path):
    """Each stage was called by itself: k-NN with another number of neighbours, though fine-tuning does not use it."""
    for name, seed, k in (("a", 0, 20), ("b", 1, 5)):
        write(tmp_path / name, "finetune", seed=seed)
        write(tmp_path / name, "knn_scratch", finetune=dict(mode="knn", knn_k=k), seed=seed)
    assert groups(tmp_path / "a", tmp_path / "b") == {
        "finetune.knn_k=20": ["a"], "finetune.knn_k=5 (knn_scratch)": ["b"]}


def test_a_run_may_have_gone_further_than_another(tmp_path):
    write(tmp_path / "whole", "tokenizer", tokenizer=dict(epochs=3))
    write(tmp_path / "whole", "pretrain", pretrain=dict(epochs=4))
    write(tmp_path / "begun", "tokenizer", tokenizer=dict(epochs=3), seed=1)
    write(tmp_path / "other", "tokenizer", tokenizer=dict(epochs=5), seed=2)
    assert groups(tmp_path / "begun", tmp_path / "whole", tmp_path / "other") == {
        "tokenizer.epochs=3": ["begun", "whole"], "tokenizer.epochs=5": ["other"]}


def test_a_run_that_agrees_with_one_of_a_group_must_agree_with_all(tmp_path):
    """The middle one has but stage 1, so it cannot make one experiment of the two beside it."""
    for name, seed, masked in (("few", 0, 6), ("none", 1, None), ("many", 2, 9)):
        write(tmp_path / name, "tokenizer", seed=seed)
        if masked:
            write(tmp_path / name, "pretrain", pretrain=dict(num_masked=masked), seed=seed)
    assert list(groups(tmp_path / "few", tmp_path / "none", tmp_path / "many").values()) == [["few", "none"], ["many"]]
    assert list(groups(tmp_path / "none", tmp_path / "few", tmp_path / "many").values()) == [["none", "few"], ["many"]]


def test_runs_without_a_common_stage_are_no_experiment(tmp_path):
    write(tmp_path / "a", "tokenizer")
    write(tmp_path / "b", "finetune_scratch", seed=1)
    assert sorted(groups(tmp_path / "a", tmp_path / "b").values()) == [["a"], ["b"]]


def test_a_tokenizer_from_elsewhere_is_known_from_stage_2(tmp_path):
    """Its file may lie anywhere; the size of its codebook is an option of the experiment all the same."""
    for name, seed, size in (("a", 0, 64), ("b", 1, 64), ("c", 2, 256)):
        write(tmp_path / name, "pretrain", tokenizer=dict(codebook_size=size), seed=seed,
              pretrain=dict(tokenizer_weights=f"{name}.pt"))
    assert groups(*(tmp_path / name for name in "abc")) == {
        "tokenizer.codebook_size=64": ["a", "b"], "tokenizer.codebook_size=256": ["c"]}


def test_the_same_seed_twice_is_not_two_seeds(tmp_path):
    for name, masked in (("a", 6), ("b", 6), ("c", 9)):
        write(tmp_path / name, "pretrain", pretrain=dict(num_masked=masked))
    assert groups(*(tmp_path / name for name in "abc")) == {
        f"{tmp_path}/a (pretrain.num_masked=6)": ["a"], f"{tmp_path}/b (pretrain.num_masked=6)": ["b"],
        "pretrain.num_masked=9": ["c"]}
    assert groups(tmp_path / "a", tmp_path / "b") == {f"{tmp_path}/a": ["a"], f"{tmp_path}/b": ["b"]}
    write(tmp_path / "d", "pretrain", pretrain=dict(num_masked=6), seed=1)
    assert list(groups(*(tmp_path / name for name in "dab")).values()) == [["d", "a"], ["b"]], "another one than d, not than a"


@pytest.mark.parametrize("content", [b"", b"- 1\n- 2\n", b"a: [1,\n", b"name: other\nversion: 3\n", b"data: here\n",
                                     b"\xff\xfe\x00"])
def test_a_config_that_no_run_has_written_is_refused_in_one_sentence(tmp_path, content):
    write(tmp_path / "a", "pretrain")
    (tmp_path / "a/pretrain/config.yaml").write_bytes(content)
    with pytest.raises(UserError, match="pretrain/config.yaml.*: mend it, or leave this run out") as error:
        group_runs([tmp_path / "a"], SECTIONS)
    assert "\n" not in str(error.value)


def test_a_config_that_cannot_be_read_is_refused(tmp_path):
    write(tmp_path / "a", "pretrain")
    (tmp_path / "a/pretrain/config.yaml").unlink()
    (tmp_path / "a/pretrain/config.yaml").mkdir()
    with pytest.raises(UserError, match="cannot read"):
        group_runs([tmp_path / "a"], SECTIONS)


# -- the table ----------------------------------------------------------------------------------------------------


def test_a_table_of_runs_has_a_row_for_all_seeds_of_an_experiment(tmp_path, capsys, monkeypatch):
    """Runs that differ in the seed, or in where their files lie, are one row; the others are named by what differs."""
    for name, seed, masked, top1, probe in (("a0", 0, 6, 0.5, 0.75), ("a1", 1, 6, 0.6, None), ("b0", 0, 9, 0.4, None)):
        changed = dict(seed=seed, output_dir=name, data=dict(workers=seed))
        write(tmp_path / name, "finetune", dict(top1=0.1), dict(top1=top1), **changed)
        write(tmp_path / name, "linear_probe", *[dict(cls=probe)] if probe else [], **changed)
        write(tmp_path / name, "pretrain", dict(knn_cls=0.3), **changed,
              pretrain=dict(num_masked=masked, tokenizer_weights=f"{name}/last.pt"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", ["visualize.py", "../a0", "../a1", "../b0", "../a0/"])
    visualize.main()
    printed = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed[:4]]
    assert rows[0] == ["runs that differ in", "seeds", "k-NN [CLS] %", "probe [CLS] %", "fine-tuning %"]
    assert rows[2] == ["pretrain.num_masked=6", "2", "30.0 ± 0.0", "75.0 (1)", "55.0 ± 7.1"]
    assert rows[3] == ["pretrain.num_masked=9", "1", "30.0", "-", "40.0"]
    assert printed[4:] == [str(here / "compare.html")] and list(tmp_path.glob("**/*.html")) == [here / "compare.html"]
    assert "<td>55.0 ± 7.1</td>" in (here / "compare.html").read_text()


def test_a_folder_that_is_no_run_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a", "tokenizer", dict(cosine_loss=0.5))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "mistyped"):
        monkeypatch.setattr(sys, "argv", ["visualize.py", "a", name])
        with pytest.raises(UserError, match=f"no figures or curves in '{name}'"):
            visualize.main()
    assert not Path("compare.html").exists()


# -- figures ------------------------------------------------------------------------------------------------------


def test_figures_are_the_last_ones_under_one_name_for_all_tables(tmp_path, capsys):
    """Of k-NN, a measurement of its own counts more than that beside pre-training; poolings are those that there are."""
    write(tmp_path, "tokenizer", dict(cosine_loss=0.5, perplexity=10.0), dict(cosine_loss=0.25, perplexity=20.0))
    write(tmp_path, "pretrain", dict(knn_cls=0.1, knn_mean=0.2), {}, dict(knn_cls=0.25, knn_mean=0.5, cls_accuracy=0.9))
    write(tmp_path, "knn", dict(cls=0.375))
    write(tmp_path, "linear_probe", dict(cls=0.5, cls_lr=3.0, both=0.625, both_lr=0.1))
    write(tmp_path, "linear_probe_scratch", dict(both=0.125, both_lr=0.1))
    write(tmp_path, "segment", dict(miou=0.75, iou=[0.5, 1]))
    expected = {"cosine loss": 0.25, "perplexity": 20.0, "k-NN [CLS] %": 37.5, "k-NN mean %": 50, "probe [CLS] %": 50,
                "probe both %": 62.5, "segmentation mIoU %": 75}
    assert figures_of(tmp_path) == expected
    assert figures_of(tmp_path, "_scratch") == {"probe both %": 12.5}
    assert figures_of(tmp_path, stages={"pretrain", "tokenizer"}) == {
        "cosine loss": 0.25, "perplexity": 20.0, "k-NN [CLS] %": 25, "k-NN mean %": 50}
    both = run_figures(tmp_path)
    assert both == expected | {"untrained: probe both %": 12.5}
    assert titles_of([{"fine-tuning %": 1}, both]) == [
        "cosine loss", "perplexity", "k-NN [CLS] %", "k-NN mean %", "probe [CLS] %", "probe both %",
        "untrained: probe both %", "fine-tuning %", "segmentation mIoU %"]
    table = results(tmp_path)
    assert ("probe both", "12.5 %", "62.5 %") in table and ("probe [CLS]", "-", "50.0 %") in table
    assert ("cosine loss", "-", "0.2500") in table and ("perplexity", "-", "20.0") in table
    finetune.report(types.SimpleNamespace(output_dir=str(tmp_path), file="x.yaml"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["validation", "images", "untrained", "pre-trained"] and len(lines) == 1 + len(table)
    assert ["probe", "both", "12.5", "%", "62.5", "%"] in lines


def test_images_without_labels_have_no_accuracy(tmp_path):
    """Their figures are null, NaN or not there, and the tables hold what is left."""
    write(tmp_path, "pretrain", dict(knn_cls=None, knn_mean=float("nan")))
    write(tmp_path, "tokenizer", dict(cosine_loss=0.5, bag_knn=None))
    assert run_figures(tmp_path) == {"cosine loss": 0.5} and results(tmp_path) == [("cosine loss", "-", "0.5000")]


def test_a_report_of_nothing(tmp_path):
    with pytest.raises(UserError, match="nothing has been measured in .*torchrun tokenizer.py x.yaml"):
        finetune.report(types.SimpleNamespace(output_dir=str(tmp_path), file="x.yaml"))


def test_a_cell_has_mean_and_deviation():
    runs = [{"a %": 1.0, "cosine loss": 0.5}, {"a %": 2.0}, {"a %": 3.0, "b": 4}]
    assert mean_and_deviation("a %", runs) == "2.0 ± 1.0"
    assert mean_and_deviation("cosine loss", runs) == "0.5000 (1)" and mean_and_deviation("c", runs) == "-"


def test_the_tables_of_the_ablations_that_lie_in_the_repository(monkeypatch, capsys):
    """A block shows the figures of its own stages, and k-NN in the row without a stage 2 too."""
    spec = importlib.util.spec_from_file_location("ablations", CODE / "docs/ablations.py")
    ablations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ablations)
    monkeypatch.setattr(ablations, "FOLDER", CODE / "docs/ablations")
    ablations.print_tables()
    targets, _, _, codebook = capsys.readouterr().out.strip().split("\n\n")
    heads = [[cell.strip() for cell in table.splitlines()[0].strip("|").split("|")] for table in (targets, codebook)]
    assert heads[0][3:] == ["k-NN [CLS] %", "k-NN mean %", "probe [CLS] %", "probe mean %", "fine-tuning %"]
    assert heads[1][3:5] == ["cosine loss", "perplexity"] and "k-NN [CLS] %" not in heads[1]
    nothing = next(line for line in targets.splitlines() if line.startswith("| nothing"))
    assert "| 3 |" in nothing and " - |" not in nothing
