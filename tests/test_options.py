"""support/options.py: what a config file and a command line may say, and how two configurations are compared."""

import importlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from beitv2 import ModelError  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.options import (PathText, TrainConfig, as_dict, changed_options, defaults_of, dotted,  # noqa: E402
                             load_config)


@dataclass
class Options:
    rate: float = 0.5
    count: int = 3
    flag: bool = False
    name: str = "x"
    maybe: int | None = None
    pair: tuple[float, float] = (0.9, 0.999)
    kind: Literal["auto", "true", "false", "cuda"] = "auto"
    note: str | None = None
    words: list[str] = field(default_factory=list)
    place: PathText = ""


def load(tmp_path, text: str, *overrides: str):
    (tmp_path / "c.yaml").write_text(text)
    return load_config({"data": Options}, [str(tmp_path / "c.yaml"), *overrides])


@pytest.mark.parametrize("text, field, value", [
    ("rate: 5e-4", "rate", 5e-4), ("rate: 2", "rate", 2.0), ("rate: '1.5'", "rate", 1.5), ("count: 4", "count", 4),
    ("flag: yes", "flag", True), ("name: '7'", "name", "7"), ("maybe: null", "maybe", None), ("maybe: 4", "maybe", 4),
    ("pair: [0.9, 1e-1]", "pair", (0.9, 0.1)), ("kind: cuda", "kind", "cuda"), ("kind: true", "kind", "true"),
    ("rate: 010", "rate", 10.0), ("rate: 1.5e+3", "rate", 1500.0), ("rate: -0.0", "rate", 0.0), ("count: 0x10", "count", 16),
    ("count: 1_000", "count", 1000), ("name: '2024-11-27'", "name", "2024-11-27"), ("note: null", "note", None),
])
def test_values_of_the_right_type(tmp_path, text, field, value):
    found = getattr(load(tmp_path, f"data: {{{text}}}").data, field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text, words", [
    ("rate: true", "a number, not True"), ("rate: fast", "a number, not 'fast'"), ("rate: [1]", "a number"),
    ("rate: null", "a number, not None"), ("rate: .nan", "a finite number"), ("rate: -.inf", "a finite number"),
    ("rate: nan", "a finite number"), ("rate: 1.0e+999", "a finite number"), ("rate: '١'", "a number, not '١'"),
    ("rate: 1:30", "a number, not '1:30'"), ("rate: 1:30.5", "a number, not '1:30.5'"), (f"rate: 1{400 * '0'}", "a number"),
    ("count: 010", "a whole number, not '010'"), ("count: 1:30", "a whole number, not '1:30'"), (f"count: {5000 * '9'}", "a whole number"),
    ("count: '٣'", "a whole number"), ("words: [a, 7]", "text, not"), ("words: [a, true]", "text, not"), ("words: []", "one or more"),
    ("name: 2024-11-27", "put it in quotes"), ("name: 7.5", "text, not 7.5: put it in quotes"), ("place: 7", "put it in quotes"),
    ("place: ~nobody_of_this_name/x", "a user's name"),
    ("count: 1.5", "a whole number, not 1.5"), ("count: true", "a whole number"), ("count: 1e3", "a whole number"),
    ("flag: 1", "true or false, not 1"), ("flag: 'yes'", "true or false"), ("name: 7", "text, not 7"),
    ("maybe: x", "a whole number"), ("pair: [0.9]", "a list of 2 values"), ("pair: 0.9", "a list of 2 values"),
    ("pair: [0.9, true]", "a number"), ("kind: cud", "one of auto, true, false, cuda"), ("kind: [auto]", "one of auto"),
])
def test_values_of_a_wrong_type(tmp_path, text, words):
    key = f"data.{text.split(':')[0]}"
    with pytest.raises(UserError) as error:
        load(tmp_path, f"data: {{{text}}}")
    assert f"'{key}'" in str(error.value) and "c.yaml" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("text, overrides, key, nearest", [
    ("data: {ratr: 1}", [], "data.ratr", "data.rate"), ("dta: {rate: 1}", [], "dta", "data"), ("sed: 1", [], "sed", "seed"),
    ("", ["data.cuont=1"], "data.cuont", "data.count"), ("", ["devise=cpu"], "devise", "device"),
    ("data: {zzz: 1}", [], "data.zzz", "data."), ("", ["dta.rate=1"], "dta.rate", "data.rate"),
    ("", ["data.rate.x=1"], "data.rate.x", "data.rate"), ("", ["finetune.lrr=1"], "finetune.lrr", "finetune.lr"), ("on: 1", [], "True", ""),
    ("", [".seed=1"], r"\.seed", "seed"),
])
def test_an_unknown_key_is_told_with_the_nearest(tmp_path, text, overrides, key, nearest):
    with pytest.raises(UserError, match=f"unknown key '{key}'.* nearest valid key is '{nearest}") as error:
        load(tmp_path, text, *overrides)
    assert ("the command line" if overrides else "c.yaml") in str(error.value)


def test_the_command_line_wins_and_sections_of_others_are_left_alone(tmp_path):
    config = load(tmp_path, "seed: 3\ndata: {rate: 1, count: 5}\nsegment: {anything: 1}", "data.rate=2e-3", "seed=4",
                  "data.pair=[0.5, 0.6]", "data.name=a=b", "pretrain.epochs=1")
    assert (config.seed, config.data.rate, config.data.count, config.data.name) == (4, 2e-3, 5, "a=b")
    assert config.data.pair == (0.5, 0.6) and config.device == "auto" and not hasattr(config, "segment")


def test_an_empty_config_and_an_empty_section_have_the_defaults(tmp_path):
    assert load(tmp_path, "").data == load(tmp_path, "data:").data == Options()
    assert load(tmp_path, "data:  # all defaults", "data.count=7").data.count == 7


@pytest.mark.parametrize("text, overrides, words", [
    ("data: 5", [], "'data'.*section"), ("data: [rate]", [], "'data'.*section"), ("data: 5", ["data.rate=1"], "'data'"),
    ("- a", [], "list"), ("hello", [], "str"), ("data: {rate: [", [], "not valid YAML"), ("seed: 2024-13-41", [], "not valid YAML"), (600 * "[", [], "not valid YAML"), ("data: \trate", [], "not valid YAML"),
    ("", ["data.rate"], "'data.rate' on the command line"), ("", ["data.rate=["], "no valid value"), ("", ["data=5"], "'data'"),
])
def test_a_malformed_config(tmp_path, text, overrides, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, text, *overrides)


def test_a_config_that_is_not_there(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for arguments in ([], ["data.rate=1"], ["--help"], [str(tmp_path / "none.yaml")], [str(tmp_path)], [str(tmp_path / "binary.yaml")]):
        with pytest.raises(UserError, match="config"):
            load_config({"data": Options}, arguments)


@pytest.mark.parametrize("text, value", [
    ("*.jpg", "*.jpg"), ("photos #2", "photos #2"), ("2024", "2024"), ("2024-11-27", "2024-11-27"), ("007", "007"),
    ("a: b", "a: b"), ("@x", "@x"), ("[a] b", "[a] b"), ("[a]", "[a]"), ("{a: b}", "{a: b}"), ("true", "true"), ("null", "null"),
    ("", ""), ("''", ""), ("'a b'", "a b"), ('"*.jpg"', "*.jpg"), ("'", "'"), ("'a\"", "'a\""), ("''a''", "'a'"),
    ("a=b", "a=b"), (" a ", " a "), ("1e3", "1e3"), ("~x", "~x"), ("&a !b %c |", "&a !b %c |"), ("caf\udce9", "caf\udce9"), ("a\tb", "a\tb"),
])
def test_text_on_the_command_line_is_taken_as_it_stands(tmp_path, text, value):
    found = load(tmp_path, "", f"data.name={text}", f"data.note={text}").data
    assert (found.name, found.note) == (value, value)


def test_other_types_on_the_command_line_are_read_as_yaml(tmp_path):
    found = load(tmp_path, "", "data.words=['a #1', \"7\"]", "data.count=4 # four", "data.flag=yes", "data.kind=true", "data.maybe=null").data
    assert (found.words, found.count, found.flag, found.kind, found.maybe) == (["a #1", "7"], 4, True, "true", None)
    for change in ("data.count=@x", "data.words=a", "data.rate=2024-13-41", "data.count=" + 600 * "["):
        with pytest.raises(UserError, match=f"'{change.split('=')[0]}"):
            load(tmp_path, "", change)


@pytest.mark.parametrize("text, name, lines", [
    ("data: {rate: 1}\nseed: 3\ndata: {count: 2}", "data", "1 and 3"), ("seed: 3\nseed: 3", "seed", "1 and 2"),
    ("data:\n  rate: 1\n  count: 2\n  rate: 2", "data.rate", "2 and 4"), ("data: {rate: 1,\n 'rate': 2}", "data.rate", "1 and 2"),
    ("segment:\n  lr: 1\n  lr: 1", "segment.lr", "2 and 3"), ("data: {rate: 1}\ndata.rate: 2", "data.rate", "1 and 2"),
    ("data:\ndata: {rate: 1}", "data", "1 and 2"),
])
def test_a_key_that_stands_twice(tmp_path, text, name, lines):
    with pytest.raises(UserError, match=rf"c\.yaml.*'{name}' stands twice, in lines {lines}\)"):
        load(tmp_path, text)


def test_one_name_in_two_sections_and_a_merged_mapping_stand_once(tmp_path):
    text = "data: &shared {rate: 1, count: 2}\nsegment: {<<: *shared, rate: 3}\npretrain: {rate: 1}"
    assert load(tmp_path, text, "data.rate=4", "data.rate=5").data.rate == 5  # on the command line the last one counts


def test_a_tilde_is_the_home_folder_in_paths_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load(tmp_path, "output_dir: ~/runs\ndata: {place: ~/photos/**/*.jpg, name: ~/x}")
    assert (config.output_dir, config.data.place, config.data.name) == ("/home/me/runs", "/home/me/photos/**/*.jpg", "~/x")
    config = load(tmp_path, "", "output_dir=~", "data.place='~/#2'")
    assert (config.output_dir, config.data.place) == ("/home/me", "/home/me/#2")
    for same in ("https://a.b/~c/d.pt", "none", "", "a~/b", "./~", "runs/~x"):
        assert load(tmp_path, "", f"data.place={same}").data.place == same


@pytest.mark.parametrize("given", ["output_dir: ''", "output_dir:", "output_dir: '  '"])
def test_an_empty_output_dir(tmp_path, given):
    with pytest.raises(UserError, match="output_dir is empty"):
        load(tmp_path, given)


def test_a_file_that_begins_with_a_byte_order_mark(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfseed: 3\r\ndata: {count: 2}\r\n")
    config = load_config({"data": Options}, [str(tmp_path / "c.yaml")])
    assert (config.seed, config.data.count) == (3, 2)


def test_a_section_checks_itself_with_the_whole_configuration(tmp_path):
    @dataclass
    class Checked(Options):
        def check(self, config):
            if config.seed == 4:
                raise UserError(f"count {config.finetune.count} and seed 4")
            self.count = config.finetune.count + config.seed

    def both(*changes):
        (tmp_path / "c.yaml").write_text("finetune: {count: 5}")
        return load_config({"data": Checked, "finetune": Options}, [str(tmp_path / "c.yaml"), *changes])

    assert both("seed=2").data.count == 7
    with pytest.raises(UserError, match="count 5 and seed 4"):
        both("seed=4")


def test_as_dict_is_plain(tmp_path):
    values = as_dict(load(tmp_path, "data: {count: 5}"))
    assert values["data"]["count"] == 5 and values["data"]["pair"] == [0.9, 0.999] and "file" not in values
    assert json.loads(json.dumps(values)) == values


def test_changed_options(tmp_path):
    now = load(tmp_path, "seed: 3\ndata: {count: 5, rate: 0.1}")
    before = as_dict(now) | {"seed": 4, "gone": 1}
    before["data"] |= {"count": 2, "lost": 6}
    now.new = 7
    assert changed_options(before, now) == [("data.count", 2, 5), ("data.lost", 6, None), ("gone", 1, None),
                                            ("new", None, 7), ("seed", 4, 3)]


def test_a_run_from_before_an_option_has_its_default(tmp_path):
    now = load(tmp_path, "data: {count: 5, rate: 0.1}\npretrain: {epochs: 3}")
    before = as_dict(now)
    del before["data"]["pair"], before["threads"]
    assert changed_options(before, now) == []

    now.data.pair, now.threads = (0.5, 0.5), 2  # an option that the old run had not, and that is not at its default now
    changed = [("data.pair", [0.9, 0.999], [0.5, 0.5]), ("threads", 0, 2)]
    assert changed_options(before, now) == changed

    for lacking in ({key: value for key, value in before.items() if key != "data"}, before | {"data": None}):
        assert changed_options(lacking, now) == [("data.count", 3, 5), ("data.pair", [0.9, 0.999], [0.5, 0.5]),
                                                 ("data.rate", 0.5, 0.1), ("threads", 0, 2)]
    other = {"segment": {"lr": 3}, "gone": 1}  # what this script does not declare stays
    assert changed_options(before | other, now) == sorted([*changed, ("segment.lr", 3, None), ("gone", 1, None)])
    assert "segment" not in before


def test_defaults_are_those_of_an_empty_config(tmp_path):
    assert defaults_of({"data": Options}) == dotted(as_dict(load(tmp_path, "")))
    assert defaults_of({"pretrain": TrainConfig})["pretrain.optimizer"] == "adamw"


# --- what the sections of the scripts check before anything is computed ------------------------------------------

TINY = """
data: {dataset: shapes, image_size: 16}
model: {embed_dim: 32, depth: 2, num_heads: 2, patch_size: 4}
tokenizer: {embed_dim: 32, depth: 1, num_heads: 2}
pretrain: {num_masked: 6, min_block: 2, early_layers: 1}
segment: {crop_size: 16}
"""
STAGES = ("tokenizer", "pretrain", "finetune", "segment", "visualize")


def tiny(tmp_path, script: str, *changes: str):
    (tmp_path / "c.yaml").write_text(TINY)
    return load_config(importlib.import_module(script).SECTIONS, [str(tmp_path / "c.yaml"), *changes])


@pytest.mark.parametrize("script, change, words", [
    *((script, "data.image_size=18", "18 pixels.*patches of 4.*such as 16 for data.image_size") for script in STAGES if script != "segment"),
    ("pretrain", "data.image_size=1", "such as 4 for data.image_size"), ("segment", "segment.crop_size=27", "such as 28 for segment.crop_size"),
    *((script, "model.num_heads=5", "32 does not divide among 5.*model.embed_dim") for script in STAGES),
    ("tokenizer", "tokenizer.num_heads=5", "32 does not divide among 5.*tokenizer.embed_dim"),
    ("pretrain", "pretrain.num_masked=17", "17 masked patches are more than the 16"),
    ("pretrain", "pretrain.min_block=7", "no block can have more than 6"),
    ("pretrain", "pretrain.early_layers=3", "early_layers is 3.*2 blocks"), ("pretrain", "pretrain.early_layers=0", "early_layers is 0"),
    *((script, f"{script}.crop_scale=[1,0.2]", rf"{script}.crop_scale is \[1.0, 0.2\]") for script in STAGES[:3]),
    ("pretrain", "pretrain.crop_scale=[0,1]", "both above 0"),
])
def test_values_that_do_not_fit_together(tmp_path, script, change, words):
    with pytest.raises((UserError, ModelError), match=words):
        tiny(tmp_path, script, change)


@pytest.mark.parametrize("script, changes", [
    ("segment", ["data.image_size=18"]),  # it looks at crops of segment.crop_size
    ("pretrain", ["pretrain.head_layers=0", "pretrain.early_layers=9"]),  # no aggregation head, no early layer
    ("visualize", ["pretrain.num_masked=75", "pretrain.early_layers=9"]),  # a page without pre-training
    ("pretrain", ["pretrain.num_masked=16", "pretrain.min_block=9"]),
])
def test_values_that_fit_as_far_as_they_are_used(tmp_path, script, changes):
    tiny(tmp_path, script, *changes)


@pytest.mark.parametrize("script", ["pretrain", "visualize"])
@pytest.mark.parametrize("ratio, masked", [(0.4, 6), (0.5, 8), (1, 16), (0.01, 1), (0.0, 6)])
def test_mask_ratio_becomes_a_number_of_patches(tmp_path, script, ratio, masked):
    found = tiny(tmp_path, script, f"pretrain.mask_ratio={ratio}", "pretrain.num_masked=6", "pretrain.min_block=0").pretrain
    assert found.num_masked == masked
    same = tiny(tmp_path, script, f"pretrain.num_masked={masked}", "pretrain.min_block=0").pretrain
    assert found == same  # so a run is the same run, whichever of the two was given


def test_paths_of_all_sections_know_the_home_folder(tmp_path, monkeypatch):
    """Every option that names files: a new one must be PathText too."""
    monkeypatch.setenv("HOME", "/home/me")
    names = {"data": ["root", "cache"], "tokenizer": ["weights", "images", "output", "teacher_weights"],
             "pretrain": ["tokenizer_weights"], "finetune": ["weights", "classes_file", "images"], "segment": ["weights", "checkpoint"]}
    for section, keys in names.items():
        script = "tokenizer" if section == "data" else section
        config = tiny(tmp_path, script, *(f"{section}.{key}=~/x/*.y" for key in keys))
        assert {getattr(getattr(config, section), key) for key in keys} == {"/home/me/x/*.y"}


def test_an_option_that_had_another_name_once_still_counts(tmp_path):
    """On the command line, in a file, and in the configuration that an old run has saved."""
    import finetune
    (tmp_path / "c.yaml").write_text("finetune: {mean_pool: true}")
    for changes, pooling in ([], "mean"), (["finetune.mean_pool=false"], "cls"), (["finetune.pooling=cls"], "cls"):
        config = load_config(finetune.SECTIONS, [str(tmp_path / "c.yaml"), *changes])
        assert config.finetune.pooling == pooling
    saved = as_dict(config)
    del saved["finetune"]["pooling"]
    assert changed_options(saved | {"finetune": saved["finetune"] | {"mean_pool": False}}, config) == []
    old = saved | {"finetune": saved["finetune"] | {"mean_pool": True}}
    assert changed_options(old, config) == [("finetune.pooling", "mean", "cls")]
    with pytest.raises(UserError, match="'finetune.pooling' in the command line must be one of cls, mean, not 3"):
        load_config(finetune.SECTIONS, [str(tmp_path / "c.yaml"), "finetune.mean_pool=3"])
