"""The scripts as a person runs them: in one process or several, interrupted and continued, and with mistakes.

Runs are tiny and happen in this process wherever a process of its own is not the point.
"""

import errno
import importlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.transforms.v2.functional import to_pil_image

CODE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CODE))
import beitv2  # noqa: E402
import data  # noqa: E402
import finetune  # noqa: E402
import pretrain  # noqa: E402
import segment  # noqa: E402
import tokenizer  # noqa: E402
import visualize  # noqa: E402
from beitv2 import ModelError  # noqa: E402
from support.datasets import SHAPES, Shapes, open_classes, open_files  # noqa: E402
from support.errors import Interrupted, UserError  # noqa: E402
from support.figures import last_values  # noqa: E402
from support.files import say_if_unfinished  # noqa: E402
from support.launch import STOP_SIGNALS, launch  # noqa: E402
from support.optimizers import cosine_schedule  # noqa: E402
from support.options import as_dict, load_config  # noqa: E402
from support.teachers import SHAPES_TEACHER  # noqa: E402
from support.teachers import HOG  # noqa: E402
from tests.steps import in_each_step  # noqa: E402

# 16 patches of 4 x 4 pixels; 8 steps of 8 images an epoch. 7 validation images: no two ranks have as many.
TINY = """
device: cpu
precision: fp32
data: {dataset: shapes, image_size: 16, train_images: 64, val_images: 7, workers: 0}
model: {embed_dim: 32, depth: 2, num_heads: 2, patch_size: 4}
tokenizer: {teacher: hog, embed_dim: 32, depth: 1, num_heads: 2, decoder_depth: 1, codebook_size: 16, codebook_dim: 8,
  ema_decay: 0.9, epochs: 2, batch_size: 8, lr: 1e-3, warmup_epochs: 1, crop_scale: [0.5, 1.0], log_every: 2, save_every: 4}
pretrain: {num_masked: 6, min_block: 2, early_layers: 1, head_layers: 1, epochs: 2, batch_size: 8, lr: 1e-3,
  warmup_epochs: 1, knn_every: 1, log_every: 2, save_every: 4}
segment: {crop_size: 16, stride: 8, short_side: 16, long_side: 16, feature_layers: [0, 0, 1, 1], iterations: 8,
  eval_every: 4, warmup_iterations: 2, batch_size: 4, lr: 1e-3, log_every: 2, save_every: 2, overlays: 2}
finetune: {epochs: 2, batch_size: 8, lr: 1e-3, warmup_epochs: 1, probe_epochs: 2, probe_lrs: [0.1, 1.0], log_every: 2,
  save_every: 4}
"""
SCRIPTS = ("tokenizer", "pretrain", "finetune")


@pytest.fixture(autouse=True)
def as_found():
    """A run takes over the signals, the arguments and the number of threads: put them back."""
    signals = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    arguments, threads = sys.argv, torch.get_num_threads()
    yield
    sys.argv = arguments
    torch.set_num_threads(threads)
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A run shares the processors out among its machine's ranks. Tiny models are fastest with one thread, as if
    there were as many ranks as processors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory, one_thread):
    """A folder with the tiny config, and in `base` all stages trained by it, for others to start from."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "tiny.yaml").write_text(TINY)
    signals = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for script in (*SCRIPTS, "segment"):
        start(script, folder, "base")
    for number, handler in signals.items():
        signal.signal(number, handler)
    return folder


def arguments(home: Path, output: str, *changes: str) -> list[str]:
    """Arguments for a run that writes to `output` and takes the stages before from `base`."""
    given = [f"pretrain.tokenizer_weights={home}/base/tokenizer/last.pt", f"finetune.weights={home}/base/pretrain/last.pt",
             f"segment.weights={home}/base/pretrain/last.pt"]
    return [str(home / "tiny.yaml"), f"output_dir={home / output}", *(given if output != "base" else []), *changes]


def start(script: str, home: Path, output: str, *changes: str) -> Path:
    """Run a script in this process, and name the folder of its output."""
    sys.argv = [f"{script}.py", *arguments(home, output, *changes)]
    importlib.import_module(script).main()
    return home / output


def sentence(script: str, *arguments: str) -> str:
    """The sentence with which a script refuses these arguments."""
    sys.argv = [f"{script}.py", *map(str, arguments)]
    with pytest.raises((UserError, ModelError)) as caught:
        importlib.import_module(script).main()
    text = " ".join(str(caught.value).split())
    assert 20 < len(text) < 800 and "Traceback" not in text
    return text


def refusal(script: str, home: Path, output: str, *changes: str) -> str:
    return sentence(script, *arguments(home, output, *changes))


def torchrun(processes: int, *command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                           *map(str, command)], cwd=CODE, env=os.environ | environment, capture_output=True, text=True,
                          timeout=300)


def metrics(stage: Path) -> list[dict]:
    """The lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("images_per_second", "data_wait")} for line in lines]


def checkpoint(file: Path) -> dict:
    content = torch.load(file, weights_only=True)
    content.pop("config")  # names another output_dir
    content.pop("source", None)  # the digest of the stage before, whose file names its output_dir too
    return content


def flat(value, name="") -> dict:
    """A nested checkpoint or line of metrics as {path: tensor or plain value}."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, inner in items for key, leaf in flat(inner, f"{name}/{part}").items()}
    return {name: value}


def differences(a, b, tolerance: float = 0.0) -> list[str]:
    """Where two nested values differ by more than `tolerance`, relative to the largest magnitude of each tensor."""
    a, b = flat(a), flat(b)
    found = [f"{key} is missing" for key in a.keys() ^ b.keys()]
    for key in a.keys() & b.keys():
        if not isinstance(a[key], (torch.Tensor, float)) or tolerance == 0:
            same = torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
            found += [] if same else [f"{key}: {a[key]} and {b[key]}"]
            continue
        x, y = (torch.as_tensor(value, dtype=torch.float64) for value in (a[key], b[key]))
        error = (x - y).abs().max() / x.abs().max().clamp(min=1e-6) if x.isfinite().all() else float(not x.equal(y))
        found += [] if error <= tolerance else [f"{key} differs by {error:.1e}"]
    return sorted(found)


# --- one process or two, whole batches or accumulated ---------------------------------------------------------

# What the ranks' generators draw would differ, so drop path and mixup are off; everything that a sample draws is on.
# Every step has its line. Codes are revived: half of those that k-means finds in 8 images soon have too few hits.
COMPARED = {
    "tokenizer": ["tokenizer.log_every=1", "tokenizer.ema_decay=0.5", "tokenizer.revive_below=4.0",
                  "tokenizer.mean_start=true", "data.views=2"],
    "pretrain": ["pretrain.log_every=1"],
    "finetune": ["finetune.log_every=1", "finetune.drop_path=0", "finetune.mixup=0", "finetune.cutmix=0",
                 "finetune.erase=0.5", "finetune.ema_decay=0.9"],
    "linear_probe": ["finetune.mode=linear_probe", "finetune.log_every=1"],
    "knn": ["finetune.mode=knn"],
}
TEACHER_CODES = ["tokenizer.encoder=teacher", "data.views=2", "pretrain.log_every=1", "pretrain.crop_scale=[0.5,1.0]"]
# Two ranks run all of these one after the other, in one pair of processes: most of the time is their start.
TWO_RANKS = """
import importlib, json, os, sys
code, plan, report = sys.argv[1:]
sys.path.insert(0, code)
import torch, beitv2, segment
from support import processes
from support.errors import Interrupted, UserError
from support.run import Run
from tests.steps import in_each_step
evaluate_segments = segment.evaluate
def evaluate(*given):
    confusion = evaluate_segments(*given)
    torch.save(confusion, f"{report}.confusion.{processes.rank()}")
    return confusion
segment.evaluate = evaluate
outcomes = {}
for name, script, interrupt_at, arguments in json.loads(plan):
    sys.argv = [script + ".py", *arguments]
    whole = Run.micro_batches
    if interrupt_at:
        def ask_one_rank_to_stop(run):
            if run.step + 1 == interrupt_at and processes.rank() == 1:
                os.kill(os.getpid(), 15)
        in_each_step(ask_one_rank_to_stop)
    try:
        importlib.import_module(script).main()
        outcomes[name] = "done"
    except (UserError, Interrupted, beitv2.ModelError) as error:
        outcomes[name] = type(error).__name__ + ": " + str(error)
    Run.micro_batches = whole
    with open(f"{report}.{processes.rank()}", "w") as file:
        json.dump(outcomes, file)
"""


ACCUMULATED = [stage for stage in COMPARED if stage != "knn"]
# BatchNorm sees what a rank holds, so that with two ranks on CPU segmentation takes other steps. What it has learned
# must be measured alike.
SEGMENTED = ["segment.eval_only=true", "data.val_images=5", "segment.weights=some-backbone.pt"]


def script_of(stage: str) -> str:
    return stage if stage in (*SCRIPTS, "segment") else "finetune"


@pytest.fixture(scope="module")
def two_ranks(home):
    """What two processes made of it, each with half of every batch: the outcome of each run on which both ranks agree."""
    plan = [(stage, script_of(stage), 0, arguments(home, "two", *changes)) for stage, changes in COMPARED.items()]
    # The same again in pieces: each rank's half of a batch in two parts.
    plan += [(f"{stage}_parts", script_of(stage), 0,
              arguments(home, "two_parts", *COMPARED[stage], f"{script_of(stage)}.device_batch_size=2"))
             for stage in ACCUMULATED]
    plan += [("segment", "segment", 0, arguments(home, "two")),
             ("segment_eval", "segment", 0, arguments(home, "base", *SEGMENTED))]
    again = arguments(home, "two_stopped", *COMPARED["pretrain"])
    plan += [("stopped", "pretrain", 3, again), ("continued", "pretrain", 0, again)]
    plan += [("teacher", "tokenizer", 0, arguments(home, "two_teacher", *TEACHER_CODES)),
             ("teacher_pretrain", "pretrain", 0, arguments(home, "two_teacher", *TEACHER_CODES, "pretrain.tokenizer_weights="))]
    few = ["data.train_images=1", "pretrain.batch_size=2"]
    plan += [("odd_batch", "pretrain", 0, arguments(home, "two_odd", "pretrain.batch_size=7")),
             ("one_image", "pretrain", 0, arguments(home, "two_few", *few)),
             ("one_val_image", "finetune", 0, arguments(home, "two_few", "finetune.mode=knn", "data.val_images=1"))]
    (home / "two_ranks.py").write_text(TWO_RANKS)
    done = torchrun(2, home / "two_ranks.py", CODE, json.dumps(plan), home / "outcomes")
    print(done.stderr)  # pytest shows it where a test fails
    first, second = (json.loads((home / f"outcomes.{rank}").read_text()) for rank in (0, 1))
    return {name: outcome for name, outcome in first.items() if second.get(name) == outcome}


def made_when_asked(home: Path, output: str, changes: dict[str, list[str]]):
    """A function from a stage to its folder, which runs the stage when it is first asked for."""
    def folder(stage: str) -> Path:
        if not (home / output / stage / "metrics.jsonl").exists():
            start(script_of(stage), home, output, *changes[stage])
        return home / output / stage
    return folder


@pytest.fixture(scope="module")
def one_rank(home):
    """The same runs in one process."""
    return made_when_asked(home, "one", COMPARED)


# Sums in another order differ by 1e-7 in each step, and by a few 1e-6 in the weights after 16, since AdamW divides
# small gradients by their own size. A mean over the wrong number, or one image twice, would show as 1e-2.
FIGURES, WEIGHTS = 1e-5, 1e-4


def assert_same_run(one: Path, other: Path):
    """Every figure of every step and epoch, and last.pt: weights, codebook, gradient averages, running counts."""
    assert metrics(one) and not differences(metrics(one), metrics(other), FIGURES)
    if (one / "last.pt").exists():  # k-NN has none
        assert not differences(checkpoint(one / "last.pt"), checkpoint(other / "last.pt"), WEIGHTS)


@pytest.mark.parametrize("stage", COMPARED)
def test_two_processes_do_what_one_does(home, one_rank, two_ranks, stage):
    """Losses, gradient norms, codebook, usage, perplexity, validation figures and final weights do not depend on
    the number of processes: k-means and revival of codes included, and an odd number of validation images."""
    assert two_ranks.get(stage) == "done"
    assert_same_run(one_rank(stage), home / "two" / stage)


@pytest.mark.parametrize("stage", ACCUMULATED)
def test_accumulated_gradients_are_those_of_the_whole_batch(home, one_rank, two_ranks, stage):
    """device_batch_size changes the memory a step takes, and nothing else; with two processes as with one. The linear
    probe's BatchNorm sees the whole batch."""
    script = script_of(stage)
    start(script, home, "parts", *COMPARED[stage], f"{script}.device_batch_size=3")  # 4 parts of 2
    assert_same_run(one_rank(stage), home / "parts" / stage)
    assert two_ranks.get(f"{stage}_parts") == "done"
    assert_same_run(one_rank(stage), home / "two_parts" / stage)


@pytest.mark.parametrize("stage, parts", [("tokenizer", ["cosine_loss", "commitment_loss"]),
                                          ("pretrain", ["mim_loss", "cls_loss"])])
def test_what_is_trained_is_the_sum_of_both_losses(one_rank, stage, parts):
    """Equations 2 and 3, each part with the weight 1."""
    lines = [line for line in metrics(one_rank(stage)) if "train" not in line]
    assert len(lines) == 16 and all(line[parts[0]] > 0 and line[parts[1]] > 0 for line in lines)
    for line in lines:
        assert line["loss"] == pytest.approx(line[parts[0]] + line[parts[1]], rel=1e-5)


def test_the_student_predicts_the_codes_of_the_patches_that_it_does_not_see(home, monkeypatch):
    """Image for image and patch for patch, of the same pixels. (Normalising and back may move a few codes.)"""
    seen = []
    forward, score = beitv2.MaskedImageModel.forward, pretrain.score
    monkeypatch.setattr(beitv2.MaskedImageModel, "forward",
                        lambda model, images, masked: seen.append([images, masked]) or forward(model, images, masked))
    monkeypatch.setattr(pretrain, "score", lambda logits, ids: seen[-1].append(ids) or score(logits, ids))
    monkeypatch.setattr(pretrain, "paint_epoch", lambda *_: None)
    start("pretrain", home, "targets", "pretrain.epochs=1", "pretrain.warmup_epochs=0", "pretrain.knn_every=0")
    teacher = tokenizer.build_vqkd(load_tiny(home), 108).eval()
    teacher.load_state_dict(torch.load(home / "base/tokenizer/last.pt", weights_only=True)["model"])
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    seen = [each for each in seen if len(each) > 2]  # those that were scored: the first one only counts operations
    assert len(seen) == 8
    right = [teacher.token_ids(images * std + mean).gather(1, masked) == codes
             for images, masked, *both in seen for codes in both]
    assert len(right) == 16 and torch.stack(right).float().mean() > 0.95


def test_kmeans_codes_of_the_teacher(home, two_ranks, monkeypatch):
    """`tokenizer.encoder: teacher`, in one process and in two. Stage 2 takes the features that stage 1 has left."""
    one, two = start("tokenizer", home, "teacher", *TEACHER_CODES), home / "two_teacher"
    figures = metrics(one / "tokenizer")[-1]["val"]
    assert figures["perplexity"] > 8 and figures["cosine_loss"] < 0.9 and 0 <= figures["bag_knn"] <= 1
    asked = []
    look = HOG.forward
    monkeypatch.setattr(HOG, "forward", lambda hog, images: asked.append(len(images)) or look(hog, images))
    start("pretrain", home, "teacher", *TEACHER_CODES, "pretrain.tokenizer_weights=")
    assert sum(asked) == 2 * (4 + 7), "after an epoch: its picture and its hits; never for training crops"
    assert two_ranks.get("teacher") == "done" and two_ranks.get("teacher_pretrain") == "done"
    assert_same_run(one / "tokenizer", two / "tokenizer")
    assert_same_run(one / "pretrain", two / "pretrain")
    codes = {name: tokenizer.load_tokenizer(config_of(home, *TEACHER_CODES), f"{home / name}/tokenizer/last.pt", "")[0]
             for name in ("teacher", "two_teacher")}
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(codes["teacher"].token_ids(images), codes["two_teacher"].token_ids(images))
    vqkd, _ = tokenizer.load_tokenizer(config_of(home, *TEACHER_CODES), f"{home}/base/tokenizer/last.pt", "")
    assert isinstance(vqkd, tokenizer.VQKD)  # the checkpoint says what it is
    page = start("visualize", home, "teacher", *TEACHER_CODES, "pretrain.tokenizer_weights=", "visualize.decoder_steps=2",
                 "visualize.images=8") / "report.html"
    assert "paints each image" in page.read_text()


def test_kmeans_codes_do_not_replace_a_trained_tokenizer(home):
    files = [home / "base/tokenizer" / name for name in ("last.pt", "metrics.jsonl", "config.yaml")]
    before = [file.read_bytes() for file in files]
    text = refusal("tokenizer", home, "base", "tokenizer.encoder=teacher", "data.views=2")
    assert "tokenizer.encoder was 'vqkd' and is 'teacher'" in text and "another output_dir" in text
    assert [file.read_bytes() for file in files] == before


def config_of(home: Path, *changes: str):
    return load_config(pretrain.SECTIONS, arguments(home, "none", *changes))


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain"])
def test_a_cache_changes_no_figure(home, stage):
    """With the same views: features in half precision cost 1e-3 at most, and codes nothing."""
    views = ["data.views=2", f"{stage}.jitter=0.4" if stage == "pretrain" else "tokenizer.mean_start=true"]
    cached, computed = (start(stage, home, name, *views, f"data.cache={where}") / stage
                        for name, where in (("cached", ""), ("computed", "none")))
    assert (home / "cached/cache").is_dir() and not (home / "computed/cache").exists()
    assert metrics(cached) and not differences(metrics(cached), metrics(computed), 1e-3)


@pytest.mark.parametrize("script, earlier, changes", [
    ("pretrain", "tokenizer", []), ("finetune", "pretrain", []), ("finetune", "pretrain", ["finetune.mode=linear_probe"]),
    ("segment", "pretrain", [])])
def test_a_stage_goes_on_only_from_the_weights_that_it_began_with(home, tmp_path, script, earlier, changes):
    """A probe of a run in its middle would else pass for one of its end, with "finished already"."""
    weights = tmp_path / "earlier.pt"
    shutil.copy(home / "base" / earlier / "last.pt", weights)
    key = "tokenizer_weights" if script == "pretrain" else "weights"
    given = [script, home, tmp_path / "run", *changes, f"{script}.{key}={weights}"]
    start(*given)
    start(*given)  # the same weights: finished already
    content = torch.load(weights, weights_only=True)
    next(value for name, value in content["model"].items() if name.endswith("weight")).add_(1e-3)
    torch.save(content, weights)
    assert f"'{weights}' does not hold any more" in refusal(*given)


@pytest.mark.parametrize("stage, peak, end, warmup", [
    ("tokenizer", 1e-3, 1e-5, 1), ("pretrain", 1e-3, 1e-5, 1), ("finetune", 1e-3, 1e-6, 1), ("linear_probe", 1.0, 0.0, 0)])
def test_the_learning_rate_follows_its_schedule(one_rank, stage, peak, end, warmup):
    """At each step, in the group that learns fastest."""
    rates = [line["lr"] for line in metrics(one_rank(stage)) if "train" not in line]
    assert rates == pytest.approx(cosine_schedule(peak, end, 2, 8, warmup), rel=1e-5)


def test_the_moving_average_holds_the_weights_of_all_steps(home, monkeypatch):
    """And best.pt holds the average."""
    passed, average = [], finetune.update_average

    def weights(model):
        return {name: value.detach().clone() for name, value in model.named_parameters()}

    def after_each_step(mean, model, decay):
        passed.extend([] if passed else [weights(mean)])  # those before the first step
        average(mean, model, decay)
        passed.append(weights(model))

    monkeypatch.setattr(finetune, "update_average", after_each_step)
    folder = start("finetune", home, "average", "finetune.ema_decay=0.9", "finetune.epochs=1", "finetune.warmup_epochs=0")
    expected = passed[0]
    for later in passed[1:]:
        expected = {name: 0.9 * value + 0.1 * later[name] for name, value in expected.items()}
    assert len(passed) == 9 and differences(expected, passed[-1], 1e-3)
    assert not differences(checkpoint(folder / "finetune/best.pt")["model"], expected, 1e-5)


def test_codes_are_revived_in_the_runs_compared(home, one_rank):
    """Else the comparisons above would say nothing about revival."""
    start("tokenizer", home, "unrevived", *COMPARED["tokenizer"], "tokenizer.revive_below=0.0")
    assert differences(metrics(one_rank("tokenizer")), metrics(home / "unrevived/tokenizer"), 0.01)


def test_two_processes_stop_together_and_continue(home, two_ranks):
    """A signal to one rank stops all at the same step; with the same command they end as if nothing had been."""
    assert two_ranks.get("stopped", "").startswith("Interrupted") and two_ranks.get("continued") == "done"
    whole, pieces = home / "two/pretrain", home / "two_stopped/pretrain"
    assert not differences(metrics(whole), metrics(pieces))
    assert not differences(checkpoint(whole / "last.pt"), checkpoint(pieces / "last.pt"))


def test_more_processes_than_images(two_ranks):
    """One training image cannot serve two processes. One validation image is counted once, or refused likewise."""
    assert two_ranks.get("one_image", "").startswith("UserError") and "training images" in two_ranks["one_image"]
    assert two_ranks.get("one_val_image", "a traceback").startswith(("done", "UserError"))


def test_batch_that_processes_cannot_share(two_ranks):
    assert two_ranks.get("odd_batch", "").startswith("UserError") and "pretrain.batch_size" in two_ranks["odd_batch"]


def test_segmentation_is_measured_alike_by_one_process_and_two(home, two_ranks, capsys):
    """Training under two processes runs to its end, and one checkpoint has one mIoU, of 5 images that two must share."""
    assert two_ranks.get("segment") == two_ranks.get("segment_eval") == "done"
    lines = metrics(home / "two/segment")
    assert [line["step"] for line in lines if "train" not in line] == [2, 4, 6, 8] and lines[-1]["val"]["miou"] > 0
    confusions = []
    original = segment.evaluate
    segment.evaluate = lambda *given: confusions.append(original(*given)) or confusions[0]
    try:
        start("segment", home, "base", *SEGMENTED)
    finally:
        segment.evaluate = original
    assert confusions[0].sum() == 5 * 16 * 16
    for rank in (0, 1):
        assert torch.equal(torch.load(home / f"outcomes.confusion.{rank}"), confusions[0])
    assert "mIoU" in capsys.readouterr().out


def test_mistakes_in_segmentation(home):
    """What would be a traceback, a table of nan, or a measurement of something else."""
    assert "at least two images" in refusal("segment", home, "wrong_segment", "segment.device_batch_size=1")
    assert "gaps between the windows" in refusal("segment", home, "wrong_segment", "segment.stride=17")
    assert "a multiple of the second" in refusal("segment", home, "wrong_segment", "segment.iterations=9")
    changed = "segment.eval_only=true", "segment.feature_layers=[0,1,1,1]"
    assert "trained with segment.feature_layers=[0, 0, 1, 1]" in refusal("segment", home, "base", *changed)
    assert "torchrun segment.py" in refusal("segment", home, "empty", "segment.eval_only=true")
    text = refusal("segment", home, "empty", "segment.eval_only=true", "segment.weights=none")
    assert "torchrun segment.py" in text and "segment.weights=none" in text
    assert "num_heads=4 here" in refusal("segment", home, "base", "segment.eval_only=true", "model.num_heads=4")


def test_segmentation_goes_on_from_another(home, capsys):
    """A second data set of the same classes may begin with all of a segmenter, of other classes with its pyramid."""
    weights = f"segment.weights={home}/base/segment/last.pt"
    start("segment", home, "second_segment", weights, "segment.iterations=4")
    assert "fresh" not in capsys.readouterr().out


# --- interrupted runs -------------------------------------------------------------------------------------------

# All there is of randomness, and everything a checkpoint must hold.
INTERRUPTED = {
    "segment": ["segment.drop_path=0.3", "segment.iterations=16", "segment.eval_every=8",
                "segment.save_every=4", "segment.batch_size=8", "data.train_images=40"],  # 5 steps an epoch, 8 a round
    "tokenizer": ["tokenizer.revive_below=1.0", "data.views=2"],
    "pretrain": ["pretrain.drop_path=0.3", "data.views=2"],
    "finetune": ["finetune.drop_path=0.3", "finetune.mixup=0.8", "finetune.cutmix=1.0", "finetune.rand_augment=true",
                 "finetune.erase=0.5", "finetune.ema_decay=0.9"],
    "linear_probe": ["finetune.mode=linear_probe"],
}


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it, so nothing is saved."""


def interrupt(monkeypatch, step: int, how: signal.Signals):
    """Interrupt the run in the middle of the given step, counted from 1 over the whole run."""
    def interrupted(run):
        if run.step + 1 == step:
            if how == signal.SIGKILL:
                raise Killed
            os.kill(os.getpid(), how)

    in_each_step(interrupted, monkeypatch.setattr)


@pytest.fixture(scope="module")
def uninterrupted(home):
    return made_when_asked(home, "whole", INTERRUPTED)


def assert_same_bits(whole: Path, pieces: Path):
    assert not differences(metrics(whole), metrics(pieces))
    steps = [line["step"] for line in metrics(pieces) if "train" not in line]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 16]
    for name in ("last.pt", "best.pt") if (whole / "best.pt").exists() else ("last.pt",):
        assert not differences(checkpoint(whole / name), checkpoint(pieces / name))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
@pytest.mark.parametrize("stage", INTERRUPTED)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(home, uninterrupted, monkeypatch, stage, how):
    """Interrupted in each of its two epochs, in the middle of a step, between two lines of metrics and between two
    checkpoints: weights, optimizer and metrics are the same to the bit, and each step has one line."""
    whole = uninterrupted(stage)
    command = script_of(stage), home, f"pieces_{how.name}", *INTERRUPTED[stage]
    folder = home / command[2] / stage
    for step, saved_step in ((7, 4), (13, 12)):
        with monkeypatch.context() as patch, pytest.raises(Killed if how == signal.SIGKILL else Interrupted):
            interrupt(patch, step, how)
            start(*command)
        if how != signal.SIGKILL:
            saved_step = step  # a signal lets the step end, and saves
        assert torch.load(folder / "last.pt", weights_only=True)["step"] == saved_step
    start(*command)
    assert_same_bits(whole, folder)


def test_a_signal_during_validation(home, uninterrupted, monkeypatch):
    """Validation ends, the epoch is saved, and then the run stops."""
    whole, validate = uninterrupted("finetune"), finetune.evaluate

    def evaluate(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(finetune, "evaluate", evaluate)
        start("finetune", home, "pieces_val", *INTERRUPTED["finetune"])
    start("finetune", home, "pieces_val", *INTERRUPTED["finetune"])
    assert_same_bits(whole, home / "pieces_val/finetune")


def test_killed_before_the_first_checkpoint(home, uninterrupted, monkeypatch):
    """The run starts afresh, k-means included, and forgets the lines it had written."""
    whole = uninterrupted("tokenizer")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt(patch, 3, signal.SIGKILL)
        start("tokenizer", home, "pieces_early", *INTERRUPTED["tokenizer"])
    assert metrics(home / "pieces_early/tokenizer") and not (home / "pieces_early/tokenizer/last.pt").exists()
    start("tokenizer", home, "pieces_early", *INTERRUPTED["tokenizer"])
    assert_same_bits(whole, home / "pieces_early/tokenizer")


# What torchrun, a shell or a cluster sends arrives at processes and their loader workers. To be sure of the moment,
# the script itself asks for it, at its seventh step.
SIGNALLED = """
import os, runpy, signal, sys, time
code, script, how, *arguments = sys.argv[1:]
sys.path.insert(0, code)
from tests.steps import in_each_step
os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # one thread, as in the runs to compare with
def in_step_7(run):
    if run.step + 1 == 7:
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getppid(), signal.Signals[how])  # torchrun tells its processes
        for _ in range(2000):  # 20 s: if none arrives, the run ends whole, and the test fails
            time.sleep(0 if run.stop.time else 0.01)
in_each_step(in_step_7)
sys.argv = [script + ".py", *arguments]
runpy.run_path(os.path.join(code, script + ".py"), run_name="__main__")
"""


@pytest.mark.parametrize("stage, how", [("tokenizer", "SIGKILL"), ("pretrain", "SIGINT"), ("finetune", "SIGTERM")])
def test_an_interrupted_torchrun(home, uninterrupted, stage, how):
    """torchrun sends signals on to whole process groups, loader workers among them: the run saves itself all the same,
    and says in one sentence what to do next."""
    whole = uninterrupted(stage)
    (home / "signalled.py").write_text(SIGNALLED)
    changes = [*INTERRUPTED[stage], "data.workers=1"]
    output = f"torchrun_{how}"
    done = torchrun(1, home / "signalled.py", CODE, stage, how, *arguments(home, output, *changes))
    assert done.returncode != 0
    saved_step = torch.load(home / output / stage / "last.pt", weights_only=True)["step"]
    if how == "SIGKILL":
        assert saved_step == 4
    else:
        assert saved_step == 7, done.stderr
        assert done.stderr.count("the same command goes on from there") == 1
        assert f"{stage}.py" not in done.stderr.partition("the same command goes on from there")[0]  # no traceback of ours
    start(stage, home, output, *INTERRUPTED[stage])
    assert_same_bits(whole, home / output / stage)


def test_a_reader_that_has_gone_ends_no_training(home):
    """`pretrain.py ... | head -1`"""
    command = [sys.executable, "pretrain.py", *arguments(home, "piped")]
    with subprocess.Popen(command, cwd=CODE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(timeout=100) == 0
    assert not differences(metrics(home / "base/pretrain"), metrics(home / "piped/pretrain"), FIGURES)


def test_a_finished_run_started_again(home, capsys):
    """It says so, and changes nothing."""
    files = {file: file.read_bytes() for file in (home / "base/pretrain").iterdir()}
    assert {file.name for file in files} == {"last.pt", "metrics.jsonl", "config.yaml", "epoch-01.png", "epoch-02.png"}
    start("pretrain", home, "base")
    assert "finished already" in capsys.readouterr().out
    assert files == {file: file.read_bytes() for file in (home / "base/pretrain").iterdir()}


def test_a_stage_that_starts_from_an_unfinished_one_says_so(home, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 3, signal.SIGTERM)
        start("tokenizer", home, "early")
    weights = home / "early/tokenizer/last.pt"
    start("pretrain", home, "early", f"pretrain.tokenizer_weights={weights}", "pretrain.epochs=1", "pretrain.warmup_epochs=0")
    assert f"note: '{weights}' is unfinished, at step 3 of 16" in capsys.readouterr().out


def test_a_changed_config_is_not_continued(home):
    """A run that goes on with other values than it began with would be neither of the two."""
    text = refusal("pretrain", home, "base", "pretrain.lr=2e-3", "tokenizer.codebook_dim=8", "pretrain.num_masked=5")
    assert "pretrain.lr was 0.001 and is 0.002" in text and "pretrain.num_masked was 6 and is 5" in text
    assert "codebook_dim" not in text and "output_dir" in text
    start("pretrain", home, "base", "data.workers=1", "pretrain.save_every=9")  # these change no result


def test_other_images_are_not_continued_with(home):
    """`data.root` may move, but the images must be as many: else the schedule and the order would be another's."""
    text = refusal("pretrain", home, "base", "data.val_images=7", "data.root=elsewhere", "pretrain.epochs=3")
    assert "pretrain.epochs was 2 and is 3" in text and "data.root" not in text
    root = home / "counted"
    for split, count in (("train", 24), ("val", 1)):
        picture(root, split, "cat", count)
    given = "data.dataset=imagefolder", f"data.root={root}"
    start("pretrain", home, "counted_run", *given)
    picture(root, "train", "cat", 32)
    text = refusal("pretrain", home, "counted_run", *given)
    assert "3 steps per epoch" in text and "make 4" in text and "output_dir" in text


def picture(root: Path, split: str, name: str, count: int):
    from PIL import Image
    (root / split / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (16, 16), (i, 2 * i, 3 * i)).save(root / split / name / f"{i}.png")


def test_a_training_image_that_cannot_be_read_ends_no_run(home, capfd):
    """Neither in a step nor in the k-NN pulse, which looks at training images once more: of 101, one may be broken."""
    picture(home / "broken", "train", "cat", 50)
    picture(home / "broken", "train", "dog", 51)
    for name in ("cat", "dog"):
        picture(home / "broken", "val", name, 2)
    (home / "broken/train/cat/7.png").write_bytes(b"no picture")
    given = "data.dataset=imagefolder", f"data.root={home}/broken"
    folder = start("pretrain", home, "broken_run", *given, "pretrain.batch_size=16", "pretrain.epochs=3") / "pretrain"
    hits = {"mim_accuracy", "cls_accuracy", "cls_accuracy_swapped", "cls_accuracy_mean"}
    assert metrics(folder)[-1]["val"].keys() == {"knn_cls", "knn_mean", *hits}
    assert "cat/7.png' cannot be read" in capfd.readouterr().err
    (home / "broken/val/cat/1.png").write_bytes(b"no picture")
    assert "val/cat/1.png' cannot be read" in refusal("pretrain", home, "broken_val", *given)


def test_images_without_labels_have_hits_and_no_knn(home):
    """One of 101 validation images cannot be read, and is left out."""
    for split in ("train", "val"):
        picture(home / "plain", split, ".", 101)
    (home / "plain/val/7.png").write_bytes(b"no picture")
    given = "data.dataset=imagefolder", f"data.root={home}/plain", "pretrain.epochs=1"
    folder = start("pretrain", home, "plain_run", *given) / "pretrain"
    figures = metrics(folder)[-1]["val"]
    assert figures.keys() == {"mim_accuracy", "cls_accuracy", "cls_accuracy_swapped", "cls_accuracy_mean"}
    for share in figures.values():  # of 6 hidden patches in 100 images
        assert 0 <= share <= 1 and abs(600 * share - round(600 * share)) < 1e-3


def test_a_collapsed_tokenizer_is_no_finished_one(home, monkeypatch, capsys):
    """Else the same command would say that it is finished, and pre-training would take it without a word."""
    figures = tokenizer.CodeUsage.figures
    monkeypatch.setattr(tokenizer.CodeUsage, "figures", lambda usage: figures(usage) | {"perplexity": 1.0})
    for _ in range(2):
        assert "collapsed" in refusal("tokenizer", home, "collapsed")
    content = torch.load(home / "collapsed/tokenizer/last.pt", weights_only=True)
    assert (content["step"], content["epochs_done"]) == (8, 0)
    say_if_unfinished(content, "last.pt")
    assert "'last.pt' is unfinished" in capsys.readouterr().out


class FinerQuantizer(tokenizer.Quantizer):
    """A patch's id says also whether its vector begins with a positive number: K codes, and 2 K ids."""

    @property
    def vectors(self):
        return self.embedding.weight.repeat_interleave(2, dim=0)

    def forward(self, z):
        codes, ids, loss = super().forward(z)
        ids = 2 * ids + (z[..., 0] > 0).long()
        self.counted = self.counted + ids.flatten().bincount(minlength=len(self.vectors)) if self.training else 0
        return codes, ids, loss

    def update(self, seed):
        super().update(seed)
        hits, self.counted = self.counted, 0
        return hits

    counted = 0


@pytest.mark.parametrize("kind", ["vqkd", "teacher"])
def test_ids_may_be_more_than_the_codes_of_one_codebook(home, kind, monkeypatch):
    """Whoever gives the tokenizer another quantizer gets its ids in stage 1's figures, in stage 2 and on the page."""
    monkeypatch.setattr(tokenizer, "Quantizer", FinerQuantizer)
    given = "pretrain.tokenizer_weights=", *(TEACHER_CODES if kind == "teacher" else ())
    folder = start("tokenizer", home, f"finer_{kind}", *given)
    last = metrics(folder / "tokenizer")[-1]
    used = [32 * last[part]["usage"] for part in ("train", "val") if part in last]
    assert used == pytest.approx([round(number) for number in used]) and (kind == "teacher" or used[0] > 16)
    start("pretrain", home, f"finer_{kind}", *given, "pretrain.epochs=1", "pretrain.warmup_epochs=0")
    saved = torch.load(folder / "pretrain/last.pt", weights_only=True)["model"]
    assert beitv2.MaskedImageModel.vocab_size(saved) == 32
    page = start("visualize", home, f"finer_{kind}", *given, "visualize.decoder_steps=2", "visualize.images=7")
    assert "of 32 codes occur" in (page / "report.html").read_text()


# --- mistakes: one clear sentence each --------------------------------------------------------------------------


def test_no_config():
    assert "name a config file first" in sentence("pretrain")
    text = sentence("pretrain", "configs/dmeo.yaml")
    assert "configs/dmeo.yaml" in text and "demo.yaml" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_typo_in_a_key(home, script):
    """The message names the key, where it stands, and the nearest valid one: on the command line, in the file."""
    text = refusal(script, home, "typo", f"{script}.epoch=3")
    assert f"'{script}.epoch'" in text and f"'{script}.epochs'" in text and "command line" in text
    file = home / "typo.yaml"
    file.write_text(TINY + "outputdir: here\n")
    text = sentence(script, file)
    assert "'outputdir'" in text and "'output_dir'" in text and str(file) in text
    file.write_text(TINY.replace("image_size", "imagesize"))
    text = sentence(script, file)
    assert "'data.imagesize'" in text and "'data.image_size'" in text and str(file) in text
    assert not (home / "typo").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_typo_in_a_key_of_another_script(home, script):
    """On the command line nobody else would see it. In the file, that other script does."""
    text = refusal(script, home, "typo", "segment.crop_sise=3")
    assert "'segment.crop_sise' in the command line" in text and "'segment.crop_size'" in text
    file = home / "typo.yaml"
    file.write_text(TINY.replace("crop_size", "crop_sise"))
    assert load_config(importlib.import_module(script).SECTIONS, [str(file)]).seed == 0


@pytest.mark.parametrize("change, must_be", [
    ("pretrain.epochs=ten", "whole number"), ("pretrain.epochs=1.5", "whole number"), ("pretrain.epochs=true", "whole number"),
    ("pretrain.lr=high", "number"), ("pretrain.lr=yes", "number"), ("pretrain.betas=0.9", "list of 2"),
    ("pretrain.betas=[0.9,0.95,0.99]", "list of 2"), ("pretrain.shared_lm_head=1", "true or false"),
    ("seed=-1", "at least 0"), ("seed=18446744073709551616", "at most 9223372036854775807"), ("data.workers=-1", "at least 0"), ("model.patch_size=0", "at least 1"),
    ("pretrain.drop_path=1.5", "at most 1"), ("pretrain.betas=[0.9,2]", "at most 0.999999"), ("pretrain.betas=[1,1]", "at most 0.999999"), ("pretrain.num_masked=0", "at least 1"),
    ("tokenizer.codebook_size=1", "at least 2"), ("finetune.lr=high", "number"),
    ("finetune.probe_lrs=3", "list of one or more"), ("data.dataset=shape", "shapes"), ("model.size=huge", "large"), ("seed=a", "whole number")])
def test_a_value_of_the_wrong_type(home, change, must_be):
    key, _, value = change.partition("=")
    text = refusal("pretrain", home, "typo", change)
    assert f"'{key}' in the command line must be" in text.replace(" on ", " in ") and must_be in text


def test_a_stage_without_the_one_before(home):
    """The message is the command that makes what is missing."""
    config, empty = home / "tiny.yaml", f"output_dir={home}/empty"
    assert f"torchrun tokenizer.py {config}" in sentence("pretrain", config, empty)
    for mode in ("finetune", "linear_probe", "knn"):
        assert f"torchrun pretrain.py {config}" in sentence("finetune", config, empty, f"finetune.mode={mode}")
    assert "best.pt" in sentence("finetune", config, empty, "finetune.eval_only=true")


def test_wrong_paths(home):
    folder = "data.dataset=imagefolder", f"data.root={home}/nowhere"
    for script in SCRIPTS:
        text = refusal(script, home, "wrong", *folder)
        assert f"{home}/nowhere" in text and "data.root" in text
    text = refusal("pretrain", home, "wrong", "pretrain.tokenizer_weights=no.pt")
    assert "pretrain.tokenizer_weights" in text and "'no.pt'" in text
    text = refusal("finetune", home, "wrong", "finetune.weights=no.pt")
    assert "finetune.weights" in text and "'no.pt'" in text
    text = refusal("tokenizer", home, "wrong", "tokenizer.teacher=dino_vits16", "tokenizer.teacher_weights=no.pt")
    assert "tokenizer.teacher_weights" in text and "'no.pt'" in text
    (home / "file").write_text("")
    assert f"{home}/file" in refusal("pretrain", home, "wrong", f"output_dir={home}/file/run")


class Spy:
    """Its pickle would leave a file behind if it were run."""

    def __reduce__(self):
        return os.mkdir, ("spied",)


def foreign_files(folder: Path):
    """Files that are no checkpoint of ours, by name."""
    folder.mkdir(exist_ok=True)
    whole = (folder.parent / "base/tokenizer/last.pt").read_bytes()
    contents = {"half": whole[:len(whole) // 2], "most": whole[:-100], "start": whole[:50], "empty": b"",
                "text": b"<!DOCTYPE html>\n", "random": bytes(range(256)) * 8, "code": pickle.dumps(Spy(), protocol=2)}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    torch.save(Spy(), folder / "code.pt")
    torch.save([torch.zeros(3)], folder / "list.pt")
    torch.save({"a": 1}, folder / "plain.pt")
    torch.save({"weight": torch.zeros(3)}, folder / "tensors.pt")
    return sorted(file for file in folder.iterdir())


def test_truncated_and_foreign_checkpoints(home, monkeypatch):
    """As weights to start from, and as the run's own last.pt: the message names the file, and no file runs code."""
    monkeypatch.chdir(home)
    for file in foreign_files(home / "foreign"):
        text = refusal("pretrain", home, "wrong", f"pretrain.tokenizer_weights={file}")
        assert str(file) in text
        text = refusal("finetune", home, "wrong", f"finetune.weights={file}")
        assert str(file) in text
        own = home / "wrong/tokenizer/last.pt"
        own.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, own)
        assert str(own) in refusal("tokenizer", home, "wrong")
    assert not Path("spied").exists()


def test_a_checkpoint_of_another_stage(home):
    """A tokenizer is no backbone, and a backbone no tokenizer."""
    text = refusal("finetune", home, "wrong", f"finetune.weights={home}/base/tokenizer/last.pt")
    assert "base/tokenizer/last.pt" in text and "encoder." in text
    text = refusal("pretrain", home, "wrong", f"pretrain.tokenizer_weights={home}/base/pretrain/last.pt")
    assert "base/pretrain/last.pt" in text and "mask_token" in text


def test_a_checkpoint_of_another_model_or_codebook(home):
    """The message names what differs, with both sizes."""
    torch.save({"model": checkpoint(home / "base/tokenizer/last.pt")["model"]}, home / "published.pth")  # without a config
    given = f"pretrain.tokenizer_weights={home}/published.pth"
    text = refusal("pretrain", home, "wrong", given, "tokenizer.codebook_size=32")
    assert "quantize.embedding.weight is [16, 8] there and [32, 8] here" in text and "published.pth" in text
    for key, before in (("embed_dim", 32), ("depth", 2), ("num_heads", 2)):
        text = refusal("finetune", home, "wrong", f"model.{key}={2 * before}")
        assert f"model.{key}={before} there, model.{key}={2 * before} here" in text and "base/pretrain/last.pt" in text
    # Published files do not say what they are.
    torch.save({"model": checkpoint(home / "base/pretrain/last.pt")["model"]}, home / "published.pth")
    given = f"finetune.weights={home}/published.pth"
    assert "[1, 1, 32] there and [1, 1, 64] here" in refusal("finetune", home, "wrong", given, "model.embed_dim=64")
    assert "blocks.2." in refusal("finetune", home, "wrong", given, "model.depth=3")
    assert "blocks.1." in refusal("finetune", home, "wrong", given, "model.depth=1")


def test_stage_two_needs_no_option_of_stage_one(home, capsys):
    """The checkpoint says what tokenizer it holds, and that counts: heads too, which change no tensor's shape."""
    asked = [f"tokenizer.{option}" for option in ("codebook_size=32", "codebook_dim=4", "embed_dim=64", "depth=2",
                                                  "num_heads=4", "decoder_depth=2", "teacher=pixels")]
    models = [tokenizer.load_tokenizer(config_of(home, *changes), f"{home}/base/tokenizer/last.pt", "")[0]
              for changes in ([], asked)]
    assert "codes: K = 16, 8 numbers each" in capsys.readouterr().out
    images = torch.rand(2, 3, 16, 16)
    assert models[1].encoder.blocks[0].attn.num_heads == 2 and models[1].num_ids == 16
    assert torch.equal(models[0].token_ids(images), models[1].token_ids(images))


def test_a_teacher_of_another_shape_than_the_student(home):
    """One of our own checkpoints says itself what it is. Whom a tokenizer learned from does not matter later on."""
    given = "tokenizer.teacher=beitv2", f"tokenizer.teacher_weights={home}/base/pretrain/last.pt"
    changes = "model.embed_dim=48", "model.depth=1", "model.num_heads=3"
    start("tokenizer", home, "own_teacher", *given, *changes)
    weights = f"pretrain.tokenizer_weights={home}/own_teacher/tokenizer/last.pt"
    start("pretrain", home, "own_teacher", *given, *changes, weights)
    assert "beitv2" in refusal("tokenizer", home, "wrong_teacher", "tokenizer.teacher=beitv2")
    torch.save({"model": checkpoint(home / "base/pretrain/last.pt")["model"]}, home / "nameless.pth")
    text = refusal("tokenizer", home, "wrong_teacher", *given[:1], f"tokenizer.teacher_weights={home}/nameless.pth")
    assert "does not say what model it holds" in text


def test_an_empty_class_folder(home):
    from PIL import Image
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (home / "pets" / split / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(home / "pets" / split / "cat" / "a.png")
    for script in SCRIPTS:
        assert "pets/train/dog" in refusal(script, home, "wrong_pets", "data.dataset=imagefolder", f"data.root={home}/pets")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_image_size_that_patches_do_not_divide(home, script):
    text = refusal(script, home, "wrong_size", "data.image_size=18")
    assert "18" in text and "4" in text and "patch" in text


def test_numbers_of_masked_patches_that_cannot_be(home):
    text = refusal("pretrain", home, "wrong_masks", "pretrain.num_masked=17")
    assert "num_masked" in text and "17" in text and "16 patches" in text


@pytest.mark.parametrize("masked, smallest, largest", [(6, 99, 6), (16, 10, 9)])
def test_blocks_that_never_fit(home, masked, smallest, largest):
    """Every mask would become single patches. (A block leaves at least one row and one column of the grid free.)"""
    said = refusal("pretrain", home, "blocks", f"pretrain.num_masked={masked}", f"pretrain.min_block={smallest}")
    assert f"no block can have more than {largest}" in said and "lower pretrain.min_block" in said


def test_a_crop_scale_the_wrong_way_round(home):
    assert "crop_scale is [1.0, 0.2]" in refusal("pretrain", home, "wrong_crop", "pretrain.crop_scale=[1,0.2]")


def test_a_layer_that_the_backbone_has_not(home):
    assert "early_layers is 9" in refusal("pretrain", home, "wrong_layer", "pretrain.early_layers=9")


def test_fewer_images_than_a_batch(home):
    for script in SCRIPTS:
        text = refusal(script, home, "wrong_batch", "data.train_images=5")
        assert "8" in text and "5" in text and "batch" in text


def test_a_full_disk(home, monkeypatch):
    """/dev/full takes no byte. The message names the file; the checkpoint before stays, and the run goes on from it."""
    output = home / "full"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 3, signal.SIGTERM)
        start("pretrain", home, "full")
    before = (output / "pretrain/last.pt").read_bytes()
    (output / "pretrain/last.part").symlink_to("/dev/full")
    text = refusal("pretrain", home, "full")
    assert f"{output}/pretrain/last.pt" in text and "free some space" in text and os.strerror(errno.ENOSPC) in text
    assert (output / "pretrain/last.pt").read_bytes() == before
    start("pretrain", home, "full")
    assert not differences(metrics(home / "base/pretrain"), metrics(output / "pretrain"))


def test_a_full_disk_as_torch_reports_it(home, monkeypatch):
    """Some versions of torch say so in a RuntimeError."""
    def save(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", save)
    text = refusal("pretrain", home, "full_torch")
    assert "full_torch/pretrain/last.pt" in text and "free some space" in text
    assert {file.name for file in (home / "full_torch/pretrain").iterdir()} == {"config.yaml", "metrics.jsonl"}


def test_a_full_disk_for_metrics(home, monkeypatch, capfd):
    """`launch` has a sentence for files other than checkpoints, too."""
    (home / "full_lines/pretrain").mkdir(parents=True)
    (home / "full_lines/pretrain/metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    sys.argv = ["pretrain.py", *arguments(home, "full_lines")]
    with pytest.raises(SystemExit, match="1"):
        launch(pretrain.main, ModelError)
    lines = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and os.strerror(errno.ENOSPC) in lines[0]


def assert_one_sentence(done: subprocess.CompletedProcess, *parts: str):
    """Exit code 1, one `error:` line that holds the parts, and no traceback of ours beside torchrun's summary."""
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(part in lines[0] for part in parts), done.stderr
    before = done.stderr.partition(lines[0])[0]
    assert "Traceback" not in before
    assert not re.search(rf'File "{re.escape(str(CODE))}/\w+\.py"', done.stderr)  # torchrun's own may be in CODE/.venv


@pytest.mark.parametrize("mistake, parts", [("data.image_size=18", ["patch"]), ("data.rooot=x", ["data.rooot", "data.root"])])
def test_two_processes_say_a_mistake_once(home, mistake, parts):
    """Before they know of each other, and after."""
    assert_one_sentence(torchrun(2, "tokenizer.py", *arguments(home, "mistake", mistake)), *parts)


def test_what_one_of_two_processes_meets_is_said_once(home):
    """The disk is full for rank 0, which alone writes checkpoints; the other one must not end in a traceback."""
    (home / "full_two/tokenizer").mkdir(parents=True)
    (home / "full_two/tokenizer/last.part").symlink_to("/dev/full")
    done = torchrun(2, "tokenizer.py", *arguments(home, "full_two"))
    assert_one_sentence(done, "full_two/tokenizer/last.pt", "free some space")


@pytest.mark.parametrize("told", [False, True])
def test_a_rank_that_was_told_to_stop_before_it_failed_is_silent(told):
    """torchrun has ended another one, which has spoken: its signal may come before what that one's end does to this."""
    code = f"""
import os, signal, time
from support.launch import Stop, fail
time.sleep = lambda seconds: None
stop = Stop("this step")
if {told}:
    os.kill(os.getpid(), signal.SIGTERM)
fail("another process has ended, here")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=CODE, env={**os.environ, "RANK": "1"}, capture_output=True,
                          text=True)
    assert done.returncode == 1
    assert ("error: another process has ended, here" in done.stderr) == (not told)


def test_base_without_imagenet_and_network(home):
    """The message says what is missing and how to get it. No network: a proxy that nobody answers."""
    nowhere = "http://127.0.0.1:9"
    done = torchrun(1, "pretrain.py", "configs/base.yaml", f"output_dir={home}/imagenet", f"data.root={home}/nowhere",
                    http_proxy=nowhere, https_proxy=nowhere, HTTPS_PROXY=nowhere, no_proxy="", NO_PROXY="",
                    TORCH_HOME=str(home / "hub"))
    assert_one_sentence(done, "data.root", f"{home}/nowhere")


# --- configs, evaluation ----------------------------------------------------------------------------------------


TEACHER = CODE / "configs/shapes_teacher.yaml"  # an experiment for finetune.py alone


@pytest.mark.parametrize("config", sorted({*CODE.glob("configs/*.yaml")} - {TEACHER}), ids=lambda file: file.stem)
@pytest.mark.parametrize("script", sorted(file.stem for file in CODE.glob("*.py") if "SECTIONS = " in file.read_text()
                                          and file.stem not in ("engine", "start", "data", "beitv2")))
def test_every_config_suits_every_script(script, config):
    """And begins with what it is for. No section says what no script reads."""
    load_config(importlib.import_module(script).SECTIONS, [str(config)])
    assert config.read_text().startswith("# ")
    sections = yaml.safe_load(config.read_text()).keys()
    assert sections >= {"output_dir", "data", "model"}
    assert "segment" in sections or sections >= {"tokenizer", "pretrain", "finetune"}


def test_the_config_of_the_demos_teacher_is_what_its_file_was_made_with():
    config = load_config(finetune.SECTIONS, [str(TEACHER)])
    made_with = torch.load(SHAPES_TEACHER, weights_only=True)["config"]
    assert made_with == as_dict(config) and TEACHER.read_text().startswith("# ")


def test_eval_only_repeats_the_figures_of_the_best_checkpoint(home, uninterrupted, capsys):
    """Without weights it takes best.pt of this experiment, here the average of the weights, and trains nothing."""
    best = torch.load(uninterrupted("finetune") / "best.pt", weights_only=True)
    tops = [line["val"]["top1"] for line in metrics(uninterrupted("finetune")) if "val" in line]
    assert best["val"]["top1"] == max(tops)
    before = sorted(os.listdir(home / "whole/finetune"))
    for weights in ("", home / "whole/finetune/best.pt"):
        capsys.readouterr()
        start("finetune", home, "whole", "finetune.eval_only=true", f"finetune.weights='{weights}'")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in best["val"].items())
        assert capsys.readouterr().out.splitlines()[-1] == f"7 images of 10 of the model's 10 classes: {shown}"
    assert sorted(os.listdir(home / "whole/finetune")) == before
    text = refusal("finetune", home, "whole", "finetune.eval_only=true")  # a pre-trained model has no head
    assert "no classification head" in text


def test_from_scratch_has_a_folder_of_its_own(home, capsys):
    """So both ways can be compared in one experiment, and the report shows them side by side."""
    for mode in ("finetune", "linear_probe", "knn"):
        start("finetune", home, "scratch", f"finetune.mode={mode}", "finetune.weights=none", "finetune.epochs=1",
              "finetune.probe_epochs=1")
        start("finetune", home, "scratch", f"finetune.mode={mode}", "finetune.epochs=1", "finetune.probe_epochs=1")
        untrained, trained = (metrics(home / "scratch" / name)[-1]["val"] for name in (f"{mode}_scratch", mode))
        assert untrained.keys() == trained.keys() and untrained != trained
    capsys.readouterr()
    start("finetune", home, "scratch", "finetune.mode=report")
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("fine-tuning"))
    figures = [metrics(home / "scratch" / name)[-1]["val"]["top1"] for name in ("finetune_scratch", "finetune")]
    assert row.split()[1:] == [word for value in figures for word in (f"{100 * value:.1f}", "%")]


def test_eval_only_of_a_run_from_scratch(home, capsys):
    """`weights: none` means the run from scratch there, too."""
    start("finetune", home, "evaluated", "finetune.weights=none", "finetune.epochs=1")
    start("finetune", home, "evaluated", "finetune.weights=none", "finetune.epochs=1", "finetune.eval_only=true")
    best = torch.load(home / "evaluated/finetune_scratch/best.pt", weights_only=True)
    assert f"top1 {best['val']['top1']:.4f}" in capsys.readouterr().out.splitlines()[-1]


def test_no_loss_that_is_not_finite_goes_on(home):
    """The run ends with the step, the losses before and advice."""
    text = refusal("finetune", home, "diverged", "finetune.lr=1e30", "finetune.weights=none", "finetune.warmup_epochs=0")
    assert "not finite at step 2" in text and "losses before: 2.30" in text
    assert "a lower finetune.lr or a longer finetune.warmup_epochs" in text
    text = refusal("finetune", home, "diverged", "finetune.mode=linear_probe", "finetune.probe_lrs=[1e38]")
    assert "not finite at step" in text and "lower finetune.probe_lrs" in text  # its own rates, and no warm-up


def test_initial_weights_depend_on_the_seed_alone(home):
    """Runs that compare teachers begin alike, though opening a teacher or a tokenizer draws numbers too."""
    def initial(script: str, teacher: str, seed: int = 0) -> torch.Tensor:
        output, still = f"initial-{teacher}-{seed}", [f"{script}.{key}=0" for key in ("lr", "min_lr")]
        folder = start(script, home, output, f"tokenizer.teacher={teacher}", "tokenizer.teacher_weights=", f"seed={seed}",
                       f"{script}.epochs=1", *still,
                       f"pretrain.tokenizer_weights={home / output}/tokenizer/last.pt")
        model = torch.load(folder / script / "last.pt", weights_only=True)["model"]
        return model[{"tokenizer": "encoder.blocks.0.mlp.fc1.weight", "pretrain": "blocks.0.mlp.fc1.weight"}[script]]

    for script in ("tokenizer", "pretrain"):
        assert initial(script, "hog").equal(initial(script, "shapes"))
        assert not initial(script, "shapes", seed=1).equal(initial(script, "shapes"))


# --- using what was trained ---------------------------------------------------------------------------------------


def photos(home: Path) -> Path:
    """A folder of pictures of all kinds, one of them in a sub-folder."""
    from PIL import Image
    folder = home / "photos"
    (folder / "more").mkdir(parents=True, exist_ok=True)
    set_ = Shapes("val", 6, 20)
    for i, name in enumerate(("a.png", "b.jpg", "c.webp", "d.png", "more/e.png")):
        to_pil_image(set_.load(i)).convert("L" if name == "d.png" else "RGB").save(folder / name)
    (folder / "notes.txt").write_text("no image")
    Image.new("CMYK", (30, 20)).save(folder / "f.jpg")
    return folder


def trained(home: Path) -> tuple[finetune.Classifier, torch.Tensor]:
    """The fine-tuned model of `base`, and the photos as it sees them, [6, 3, 16, 16]."""
    content = torch.load(home / "base/finetune/best.pt", weights_only=True)
    model = finetune.Classifier(10, image_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, layer_scale=0.1,
                                rel_pos_bias="per_block")
    model.load_state_dict(content["model"])
    images = open_files(str(photos(home)))
    samples = data.ValSamples(images, 16)
    return model.eval(), torch.stack([data.normalize(samples[i]["image"] / 255) for i in range(len(images))])


@torch.no_grad()
def test_predict_names_the_five_best_classes(home, capsys):
    model, images = trained(home)
    start("finetune", home, "base", "finetune.mode=predict", f"finetune.images={photos(home)}")
    shares, best = model(images).softmax(dim=1).topk(5)
    lines = [line for line in capsys.readouterr().out.splitlines() if "photos" in line]
    assert [line.partition(": ")[0].rpartition("photos/")[2] for line in lines] == \
        ["a.png", "b.jpg", "c.webp", "d.png", "f.jpg", "more/e.png"]
    for line, row, ids in zip(lines, shares.tolist(), best.tolist()):
        assert line.partition(": ")[2] == ", ".join(f"{list(SHAPES)[k]} {100 * p:.1f} %" for k, p in zip(ids, row))
    assert (home / "base/predict/predictions.txt").read_text().splitlines() == lines
    start("finetune", home, "base", "finetune.mode=predict", f"finetune.images={photos(home)}/*.jpg")
    assert capsys.readouterr().out.count("photos/") == 2


@torch.no_grad()
def test_features_are_what_the_head_sees_and_the_hidden_states(home):
    model, images = trained(home)
    start("finetune", home, "base", "finetune.mode=features", f"finetune.images={photos(home)}", "finetune.blocks=[1,2]")
    saved = torch.load(home / "base/features/features.pt", weights_only=True)
    assert saved.keys() == {"files", "cls", "mean", "block_1", "block_2"} and len(saved["files"]) == 6
    assert torch.allclose(model.head(saved["mean"]), model(images), atol=1e-5)
    assert saved["block_1"].shape == (6, 17, 32)
    assert torch.allclose(model.fc_norm(saved["block_2"][:, 1:].mean(dim=1)), saved["mean"], atol=1e-5)
    weights = f"finetune.weights={home}/base/pretrain/last.pt"
    start("finetune", home, "pretrained", "finetune.mode=features", f"finetune.images={photos(home)}", weights)
    other = torch.load(home / "pretrained/features/features.pt", weights_only=True)
    assert other["cls"].shape == (6, 32) and not torch.allclose(other["mean"], saved["mean"], atol=1e-2)
    assert "block 3, and the model has 2" in refusal("finetune", home, "base", "finetune.mode=features",
                                                     f"finetune.images={photos(home)}", "finetune.blocks=[3]")


def test_encode_prints_and_saves_code_grids(home, capsys):
    given = "tokenizer.mode=encode", f"tokenizer.images={photos(home)}"
    start("tokenizer", home, "base", *given)
    printed = capsys.readouterr().out
    start("tokenizer", home, "base", *given, f"tokenizer.output={home}/codes.pt")
    saved = torch.load(home / "codes.pt", weights_only=True)
    assert saved["codes"].shape == (6, 4, 4) and saved["codes"].dtype == torch.int64
    assert saved["files"][5] == f"{home}/photos/more/e.png"
    for name, grid in zip(saved["files"], saved["codes"].tolist()):
        rows = printed.partition(f"{name}\n")[2].splitlines()[:4]
        assert [[int(code) for code in row.split()] for row in rows] == grid
    model = tokenizer.build_vqkd(load_tiny(home), 108).eval()
    model.load_state_dict(torch.load(home / "base/tokenizer/last.pt", weights_only=True)["model"])
    samples = data.ValSamples(open_files(f"{home}/photos"), 16)
    assert torch.equal(model.token_ids(torch.stack([samples[i]["image"] / 255 for i in range(6)])).view(6, 4, 4), saved["codes"])


def load_tiny(home: Path):
    return load_config(pretrain.SECTIONS, [str(home / "tiny.yaml")])


@pytest.mark.parametrize("decoder_depth, width", [(1, 48), (3, 20)])
def test_published_tokenizers_with_other_decoders_and_teachers_encode(home, decoder_depth, width):
    """The one-layer decoder, and DINO's 768 features instead of CLIP's 512, in small: the file says which it is."""
    config = load_tiny(home)
    config.tokenizer.decoder_depth = decoder_depth
    model = tokenizer.build_vqkd(config, width)
    state = {name: value for name, value in model.state_dict().items() if name != "quantize.running_count"}
    state |= {"quantize.cluster_size": torch.zeros(16), "quantize.embedding.initted": torch.ones(1),
              "quantize.embedding.cluster_size": torch.zeros(16), "quantize.embedding.embed_avg": torch.zeros(16, 8),
              "teacher_model.proj": torch.zeros(3), "scaling_layer.shift": torch.zeros(3)}
    torch.save({"model": state, "epoch": 99}, home / "vqkd.pth")
    start("tokenizer", home, "published", "tokenizer.mode=encode", f"tokenizer.images={photos(home)}/a.png",
          f"tokenizer.weights={home}/vqkd.pth", f"tokenizer.output={home}/published.pt")
    image = data.ValSamples(open_files(f"{home}/photos/a.png"), 16)[0]["image"][None] / 255
    codes = torch.load(home / "published.pt", weights_only=True)["codes"]
    assert torch.equal(codes.flatten(1), model.eval().token_ids(image))


def test_mistakes_in_images_to_use(home):
    for script, given in (("finetune", ["finetune.mode=predict"]), ("finetune", ["finetune.mode=features"]),
                          ("tokenizer", ["tokenizer.mode=encode"])):
        assert "there is no image at 'nowhere'" in refusal(script, home, "base", *given, f"{script}.images=nowhere")
        (home / "spoiled.jpg").write_bytes(b"no image")
        assert "spoiled.jpg' cannot be read" in refusal(script, home, "base", *given, f"{script}.images={home}/spoiled.jpg")
    weights = f"finetune.weights={home}/base/pretrain/last.pt"
    assert "no classification head" in refusal("finetune", home, "used", "finetune.mode=predict", weights,
                                               f"finetune.images={photos(home)}")
    assert "torchrun finetune.py" in refusal("finetune", home, "empty", "finetune.weights=", "finetune.mode=predict",
                                             f"finetune.images={photos(home)}")


def test_evaluation_on_some_of_the_classes(home, capsys):
    """Class folders without splits, of three of the ten classes: only their logits compete, found by name."""
    root, validation = home / "subset", Shapes("val", 40, 16)
    names = ["star", "heart", "ring"]
    for i in range(40):
        if validation.classes[validation.label(i)] in names:
            folder = root / validation.classes[validation.label(i)]
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(validation.load(i)).save(folder / f"{i}.png")
    given = "finetune.eval_only=true", "data.dataset=imagefolder", f"data.root={root}"
    start("finetune", home, "base", *given)
    shown = capsys.readouterr().out
    assert "12 images of 3 of the model's 10 classes" in shown
    model, _ = trained(home)
    images = open_classes(str(root))
    samples = data.ValSamples(images, 16)
    columns = [list(SHAPES).index(name) for name in images.classes]
    with torch.no_grad():
        logits = torch.stack([model(data.normalize(samples[i]["image"][None] / 255))[0] for i in range(12)])[:, columns]
    assert f"top1 {(logits.argmax(dim=1) == torch.tensor(images.labels)).float().mean():.4f}" in shown
    (root / "ring").rename(root / "unicorn")
    assert "does not know the class 'unicorn'" in refusal("finetune", home, "base", *given)
    # Published weights bring no names: then a file must.
    (root / "unicorn").rename(root / "ring")
    torch.save({"model": model.state_dict()}, home / "nameless.pth")
    nameless = *given, f"finetune.weights={home}/nameless.pth"
    assert "finetune.classes_file=PATH" in refusal("finetune", home, "base", *nameless)
    (home / "names.txt").write_text("\n".join(SHAPES) + "\n")
    start("finetune", home, "base", *nameless, f"finetune.classes_file={home}/names.txt")
    assert shown.partition(": loss")[2] == capsys.readouterr().out.partition(": loss")[2]
    (home / "names.txt").write_text("cat\ndog\n")
    assert "names 2 classes, and the model has 10" in refusal("finetune", home, "base", *nameless,
                                                              f"finetune.classes_file={home}/names.txt")


def test_a_second_fine_tuning(home, capsys):
    """From a fine-tuned model: backbone and norm are kept, the head only if the classes are the same ones. At another
    resolution the bias tables are resized."""
    weights = f"finetune.weights={home}/base/finetune/best.pt"
    start("finetune", home, "second", weights, "finetune.epochs=1", "finetune.warmup_epochs=0", "data.image_size=32",
          "model.patch_size=4")
    shown = capsys.readouterr().out
    assert "resized 2 " in shown and "relative_position_bias_table" in shown and "fresh" not in shown
    for root, count in ((home / "ten_pets", 10), (home / "two_pets", 2)):
        for i in range(count):
            picture(root, "train", f"pet{i}", 8)
            picture(root, "val", f"pet{i}", 1)
        start("finetune", home, f"second_{count}", weights, "finetune.epochs=1", "finetune.warmup_epochs=0",
              "data.dataset=imagefolder", f"data.root={root}")
        shown = capsys.readouterr().out
        assert "dropped 2 (head.bias, head.weight); fresh 2 (head.bias, head.weight)" in shown and "fc_norm" not in shown
        content = torch.load(home / f"second_{count}/finetune/last.pt", weights_only=True)
        assert content["classes"] == [f"pet{i}" for i in range(count)] and len(content["model"]["head.weight"]) == count


def test_a_head_without_names_of_classes(home, capsys):
    """As many outputs may be other classes. So training drops the head and says so; a file of names keeps it."""
    torch.save({"model": checkpoint(home / "base/finetune/best.pt")["model"]}, home / "exported.pth")
    given = f"finetune.weights={home}/exported.pth", "finetune.epochs=1", "finetune.warmup_epochs=0"
    start("finetune", home, "nameless", *given)
    shown = capsys.readouterr().out
    assert "dropped 2 (head.bias, head.weight); fresh 2 (head.bias, head.weight)" in shown
    assert "the head is dropped: the file does not name its classes" in shown and "finetune.classes_file=PATH" in shown
    (home / "order.txt").write_text("\n".join(SHAPES) + "\n")
    start("finetune", home, "named", *given, f"finetune.classes_file={home}/order.txt")
    shown = capsys.readouterr().out
    assert "head" not in shown.partition("loaded")[2].partition("\n")[0] and "the head is dropped" not in shown
    (home / "order.txt").write_text("\n".join([*SHAPES][::-1]) + "\n")  # the same names for other outputs
    start("finetune", home, "turned", *given, f"finetune.classes_file={home}/order.txt")
    assert "the head is dropped: it was trained for other classes" in capsys.readouterr().out


def test_frozen_features_of_a_fine_tuned_model(home, capsys):
    """k-NN and probe take fine-tuned weights too."""
    start("finetune", home, "tuned_knn", "finetune.mode=knn", f"finetune.weights={home}/base/finetune/best.pt")
    assert "dropped 2 (head.bias, head.weight)" in capsys.readouterr().out


def timm_keys(kind: str) -> dict[str, list[int]]:
    """Names and shapes of timm's beitv2_base_patch16_224, without those of the other kind."""
    lines = (CODE / "tests/fixtures/timm_beitv2_base_patch16_224.txt").read_text().splitlines()
    keys = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, kinds, *shape = line.split()
            if kinds in (kind, "both"):
                for block in range(12) if ".N." in name else [0]:
                    keys[name.replace(".N.", f".{block}.")] = [int(size) for size in shape]
    return keys


@torch.no_grad()
def test_exported_weights_have_the_names_and_shapes_of_timm(home):
    """A base model, fine-tuned and pre-trained, through the export command; and what comes back is the same model."""
    config = home / "base_size.yaml"
    config.write_text("device: cpu\n")
    options = dict(image_size=224, layer_scale=0.1)
    classifier = finetune.Classifier(1000, rel_pos_bias="per_block", **options)
    torch.save({"model": classifier.state_dict()}, home / "classifier.pth")
    pretrained = beitv2.MaskedImageModel(rel_pos_bias="shared", **options)
    pretrained.rel_pos_bias.relative_position_bias_table.normal_()
    torch.save({"model": pretrained.state_dict()}, home / "pretrained.pth")
    for kind, model in (("classifier", classifier), ("pretrained", pretrained)):
        sys.argv = ["finetune.py", str(config), f"output_dir={home}/exported_{kind}", "finetune.mode=export",
                    f"finetune.weights={home}/{kind}.pth"]
        finetune.main()
        timm = torch.load(home / f"exported_{kind}/export/timm.pth", weights_only=True)
        assert {name: list(value.shape) for name, value in timm.items()} == timm_keys(kind)
        published = torch.load(home / f"exported_{kind}/export/published.pth", weights_only=True)
        assert not differences(published, {"model": model.state_dict()})
    for i in range(12):
        assert torch.equal(timm[f"blocks.{i}.attn.relative_position_bias_table"],
                           pretrained.rel_pos_bias.relative_position_bias_table)
    backbone = finetune.VisionTransformer(rel_pos_bias="per_block", **options).eval()
    backbone.load_state_dict(timm)
    image = torch.randn(1, 3, 224, 224)
    assert torch.allclose(backbone(image), pretrained.eval().features(image), atol=1e-4)


# --- the page -----------------------------------------------------------------------------------------------------


def visualized(home: Path, output: str, *changes: str) -> str:
    given = "visualize.images=7", "visualize.decoder_steps=3", "visualize.shown=2"
    sys.argv = ["visualize.py", *arguments(home, output, *given, *changes)]
    visualize.main()
    return (home / output / "report.html").read_text()


def test_a_page_of_a_whole_run(home):
    page = visualized(home, "base")
    titles = [title for title, _ in visualize.TITLES]
    assert all(f"<h2>{title}</h2>" in page for title in titles) and page.count("Left out") == 0
    assert "the teacher is hog" in page, "which alone has no attention to show"
    assert page.count("<img ") > 20 and page.count("<svg viewBox") > 8
    sizes = [len(image) for image in re.findall(r'base64,([^"]*)"', page)]
    assert max(sizes) > 500


def test_what_a_run_lacks_is_named_with_its_command(home):
    sys.argv = ["visualize.py", str(home / "tiny.yaml"), f"output_dir={home}/nothing"]
    with pytest.raises(UserError, match="torchrun tokenizer.py"):
        visualize.main()
    (home / "begun").mkdir()
    shutil.copytree(home / "base/tokenizer", home / "begun/tokenizer")
    sys.argv[2] = f"output_dir={home}/begun"
    sys.argv += ["visualize.images=7", "visualize.decoder_steps=0"]
    visualize.main()
    page = (home / "begun/report.html").read_text()
    assert "code " in page and page.count("torchrun pretrain.py") >= 2 and "visualize.decoder_steps=600" in page


def test_a_model_of_another_number_of_heads_is_not_drawn(home):
    """Its tensors would fit, and the attention maps would be wrong."""
    page = visualized(home, "base", "model.num_heads=4")
    refused = "Left out: &#x27;{}/base/{}&#x27; was made with another model (model.num_heads=2 there, model.num_heads=4 here)"
    assert refused.format(home, "pretrain/last.pt") in page
    assert "<h2>Codebook words</h2>" in page and "code " in page, "what does not need that model is there"


def test_names_of_classes_are_escaped(home):
    root = home / "odd"
    for split in ("train", "val"):
        picture(root, split, "<b>&cat", 8)
        for i in range(8):
            (root / split / "<b>&cat" / f"{i}.png").rename(root / split / "<b>&cat" / f'{i}"<i>.png')
    shutil.copytree(home / "base/tokenizer", home / "odd_run/tokenizer")
    page = visualized(home, "odd_run", "data.dataset=imagefolder", f"data.root={root}", "data.image_size=16")
    assert "&lt;b&gt;&amp;cat" in page and "&quot;&lt;i&gt;.png" in page
    assert "<b>&cat" not in page and "<i>" not in page
    visualized(home, "odd_run", "data.dataset=imagefolder", f"data.root={root}", "visualize.images=1")  # no direction, no neighbour


def test_a_line_that_is_being_written(home):
    """Looking at a run that goes on, or was killed."""
    shutil.copytree(home / "base", home / "live")
    for stage in ("tokenizer", "finetune"):
        with open(home / "live" / stage / "metrics.jsonl", "a") as file:
            file.write('{"epoch": 1, "step": 17, "lo')
    assert "Codebook usage" in visualized(home, "live")


def test_the_fine_tuned_model_is_that_of_the_run(home):
    """Not what finetune.weights names: with it, fine-tuning begins."""
    config = load_tiny(home)
    config.finetune, config.output_dir = finetune.FinetuneConfig(weights=f"{home}/base/pretrain/last.pt"), str(home / "base")
    model, _ = visualize.Models(config, None).finetuned
    best = torch.load(home / "base/finetune/best.pt", weights_only=True)["model"]
    assert torch.equal(model.head.weight, best["head.weight"])


def test_curves_of_several_runs(home, tmp_path, monkeypatch):
    shutil.copytree(home / "base/pretrain", home / "again/pretrain")
    sys.argv = ["visualize.py", str(home / "base"), str(home / "again")]
    monkeypatch.chdir(tmp_path)
    visualize.main()
    page = (tmp_path / "compare.html").read_text()
    for run in ("base", "again"):
        assert f"{home}/{run} loss" in page


def test_a_comparison_of_nothing(tmp_path):
    assert "no figures or curves" in sentence("visualize", tmp_path)


def test_each_epoch_has_its_picture(home):
    from PIL import Image
    for epoch in (1, 2):
        with Image.open(home / f"base/pretrain/epoch-0{epoch}.png") as image:
            assert image.size == (4 * 16, 4 * 16), "image, mask and two heads; four images"


def test_tensorboard_gets_numbers_and_pictures(home, monkeypatch):
    """Where it is installed. Here it is played by a list."""
    class Board(list):
        def add_scalar(self, name, value, step):
            self.append((name, value, step))

        def add_image(self, name, pixels, step, dataformats):
            self.append((name, pixels.shape, step))

        def flush(self):
            pass

    board = Board()
    monkeypatch.setattr("support.run.open_board", lambda folder, step: board)
    folder = start("pretrain", home, "board") / "pretrain"
    lines = metrics(folder)
    assert ("step/loss", lines[0]["loss"], 2) in board and ("val/knn_cls", lines[-1]["val"]["knn_cls"], 16) in board
    assert [entry for entry in board if entry[0] == "masks and hits"] == [("masks and hits", (64, 64, 3), step) for step in (8, 16)]


# -- The ablations ------------------------------------------------------------------------------------------------


def test_the_ablations_run_each_row_once_and_print_its_figures(home, monkeypatch, capsys):
    """Stopped in the middle, the same command goes on; a row that leaves stage 1 alone takes the default's tokenizer."""
    spec = importlib.util.spec_from_file_location("ablations", CODE / "docs/ablations.py")
    ablations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ablations)
    monkeypatch.setattr(ablations, "CONFIG", str(home / "tiny.yaml"))
    monkeypatch.setattr(ablations, "FOLDER", home / "ablations")
    rows = [row for row in ablations.TARGETS if row[1] in ("default", "pixels", "none")] + [ablations.AGGREGATION[1]]
    monkeypatch.setattr(ablations, "BLOCKS", [("Tiny", rows, [ablations.KNN, ablations.PROBE], (0, 1)),
                                              ("Words", ablations.CODEBOOK[:2], [], (0,))])
    whole, started = pretrain.main, []

    def interrupted():
        started.append(sys.argv)
        if len(started) == 2:
            raise KeyboardInterrupt
        whole()

    monkeypatch.setattr(pretrain, "main", interrupted)
    monkeypatch.setattr(sys, "argv", ["ablations.py"])
    with pytest.raises(KeyboardInterrupt):
        ablations.main()
    before = (home / "ablations/default-0/pretrain/metrics.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["ablations.py"])
    ablations.main()
    assert (home / "ablations/default-0/pretrain/metrics.jsonl").stat().st_mtime_ns == before
    assert len(started) == 7  # default, pixels and no head with two seeds, and the one that was interrupted
    from_default = f"pretrain.tokenizer_weights={home}/ablations/default-1/tokenizer/last.pt"
    assert [from_default in arguments for arguments in started[-2:]] == [False, True]
    assert "pretrain.head_layers=0" in started[-1] and "tokenizer.teacher=pixels" in started[-2]

    tables = capsys.readouterr().out.split("\n\n")[-2:]
    monkeypatch.setattr(sys, "argv", ["ablations.py", "seeds=1,x"])
    with pytest.raises(UserError, match="seeds=x: the seeds are 0, 1, 2"):
        ablations.main()
    found = [last_values(home / f"ablations/default-{seed}/pretrain")["knn_cls"] for seed in (0, 1)]
    row = next(line for line in tables[0].splitlines() if "default" in line)
    assert f"| 2 | {100 * sum(found) / 2:.1f} ± " in row
    scratch = last_values(home / "ablations/none-0/linear_probe_scratch")
    assert "cls" in scratch and "nothing" in tables[0] and "cosine loss" in tables[1] and "K = 64" in tables[1]
