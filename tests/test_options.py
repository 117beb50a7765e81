"""support/options.py: what a config file and a command line may say, and how two configurations are compared."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.errors import UserError  # noqa: E402
from support.options import as_dict, changed_keys, load_config  # noqa: E402


@dataclass
class Options:
    rate: float = 0.5
    count: int = 3
    flag: bool = False
    name: str = "x"
    maybe: int | None = None
    pair: tuple[float, float] = (0.9, 0.999)
    kind: Literal["auto", "true", "false", "cuda"] = "auto"


def load(tmp_path, text: str, *overrides: str):
    (tmp_path / "c.yaml").write_text(text)
    return load_config({"data": Options}, [str(tmp_path / "c.yaml"), *overrides])


@pytest.mark.parametrize("text, field, value", [
    ("rate: 5e-4", "rate", 5e-4), ("rate: 2", "rate", 2.0), ("rate: '1.5'", "rate", 1.5), ("count: 4", "count", 4),
    ("flag: yes", "flag", True), ("name: '7'", "name", "7"), ("maybe: null", "maybe", None), ("maybe: 4", "maybe", 4),
    ("pair: [0.9, 1e-1]", "pair", (0.9, 0.1)), ("kind: cuda", "kind", "cuda"), ("kind: true", "kind", "true"),
])
def test_values_of_the_right_type(tmp_path, text, field, value):
    found = getattr(load(tmp_path, f"data: {{{text}}}").data, field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text, words", [
    ("rate: true", "a number, not True"), ("rate: fast", "a number, not 'fast'"), ("rate: [1]", "a number"),
    ("rate: null", "a number, not None"),
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
    ("- a", [], "list"), ("hello", [], "str"), ("data: {rate: [", [], "not valid YAML"), ("data: \trate", [], "not valid YAML"),
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


def test_as_dict_is_plain(tmp_path):
    values = as_dict(load(tmp_path, "data: {count: 5}"))
    assert values["data"]["count"] == 5 and values["data"]["pair"] == [0.9, 0.999] and "file" not in values
    assert json.loads(json.dumps(values)) == values


def test_changed_keys():
    old, new = {"a": {"x": 1, "y": 2}, "b": 3, "c": 1}, {"a": {"x": 1, "y": 5}, "b": 3, "d": 2}
    assert list(changed_keys(old, new)) == [("a.y", 2, 5), ("c", 1, None), ("d", None, 2)]
