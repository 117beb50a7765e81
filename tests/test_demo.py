"""The demo's last table, and what is claimed of its stored runs."""

import importlib.util
import statistics
from pathlib import Path

import pytest

CODE = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("docs_demo", CODE / "docs/demo.py")
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)

from support.figures import figures_of  # noqa: E402


def mean_of(runs: str, title: str) -> float:
    return statistics.mean(figures_of(CODE / f"docs/demo/{runs}-{seed}")[title] for seed in range(3))


def test_the_last_table_compares_with_hog_and_without_training(capsys):
    demo.compare_teachers(CODE / "docs/demo/shapes-1")
    head, *rows = capsys.readouterr().out.strip().split("\n")
    assert head.split() == ["validation", "images", "untrained", "HOG", "codes", "codes", "of", "this", "run"]
    assert [row.split("  ")[0] for row in rows] == ["k-NN [CLS]", "k-NN mean", "probe [CLS]", "probe mean", "fine-tuning"]
    untrained, hog, here = (float(value) for value in rows[0].replace("%", "").split()[-3:])
    assert here == pytest.approx(figures_of(CODE / "docs/demo/shapes-1")["k-NN [CLS] %"], abs=0.051)
    assert hog == pytest.approx(figures_of(CODE / "docs/demo/hog-0")["k-NN [CLS] %"], abs=0.051)
    assert untrained == pytest.approx(figures_of(CODE / "docs/demo/shapes-1", "_scratch")["k-NN [CLS] %"], abs=0.051)


def test_codes_of_a_teacher_that_knows_shapes_teach_more():
    assert mean_of("shapes", "k-NN [CLS] %") > 65 and mean_of("shapes", "probe [CLS] %") > 75
    for title in ("k-NN [CLS] %", "k-NN mean %", "probe [CLS] %", "probe mean %", "fine-tuning %"):
        assert mean_of("shapes", title) - mean_of("hog", title) > 25, title
