"""The teachers: HOG and pixels, the renamed keys and positions of published weights, and modules of the user's own.

What the published networks compute is compared in test_parity.py.
"""

import dataclasses
import json
import math
import pickle
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision import models

sys.path.insert(0, str(Path(__file__).parent.parent))
import beitv2  # noqa: E402
import data  # noqa: E402
import finetune  # noqa: E402
import tokenizer  # noqa: E402
from support.datasets import open_datasets  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.files import file_sha256  # noqa: E402
from support.options import load_config  # noqa: E402
from support.teachers import (HOG, SHAPES_TEACHER, TEACHERS, Pixels, Teacher, about_teacher, convert_archive,  # noqa: E402
                              interpolate_positions, open_teacher, read_weights, rename_clip_keys, rename_dino_keys)

CODE = Path(__file__).parent.parent


def read_config(*changes: str):
    return load_config(tokenizer.SECTIONS, [str(CODE / "configs/demo.yaml"), *changes])


# -- The table --------------------------------------------------------------------------------------------------


def test_the_option_takes_what_stands_in_the_table():
    for name in TEACHERS:
        assert read_config(f"tokenizer.teacher={name}").tokenizer.teacher == name
    with pytest.raises(UserError, match=r"FILE.py:NAME, or one of clip_vitb16, .*nearest is 'dinov2_vits14'\), not"):
        read_config("tokenizer.teacher=dinov2_vit14")


def test_a_new_teacher_is_one_entry(monkeypatch):
    monkeypatch.setitem(TEACHERS, "eight", lambda config: HOG(patch_size=8))
    assert open_teacher(read_config("tokenizer.teacher=eight")).patch_size == 8


@pytest.mark.parametrize("name, grid, values", [  # as published, see the papers' tables of models
    ("clip_vitb16", 14, 86_192_640), ("dino_vits16", 14, 21_665_664), ("dino_vitb16", 14, 85_798_656),
    ("dinov2_vits14", 37, 22_056_576), ("dinov2_vitb14", 37, 86_580_480),
    ("dinov2_vits14_reg", 37, 22_056_576 + 4 * 384), ("dinov2_vitb14_reg", 37, 86_580_480 + 4 * 768)])
def test_sizes_of_published_teachers(name, grid, values):
    """The published number of values, but for the key biases that ours leaves out, and for what has no use here."""
    with torch.device("meta"):
        teacher = TEACHERS[name].build(grid)
    width, depth = teacher.backbone.embed_dim, teacher.backbone.depth
    ours = sum(parameter.numel() for parameter in teacher.parameters()) + depth * width
    mask_token = width if name.startswith("dinov2") else 0
    patch_bias = width if name.startswith("clip") else 0  # zero: CLIP has none
    assert ours + mask_token - patch_bias == values


# -- HOG --------------------------------------------------------------------------------------------------------


def test_hog_has_four_cells_three_colours_and_nine_orientations():
    teacher = HOG(patch_size=8)
    features = teacher(torch.rand(2, 3, 24, 24))
    assert features.shape == (2, 9, teacher.output_dim) and teacher.output_dim == 4 * 3 * 9


@pytest.mark.parametrize("degrees", [0, 40, 90, 150])
def test_hog_of_a_ramp_points_along_its_gradient(degrees):
    """An image that grows in one direction has all its gradient in the bins around that direction."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    angle = math.radians(degrees)
    image = 0.5 + (x * math.cos(angle) + y * math.sin(angle)) / 100
    histogram = HOG(8)(image.expand(1, 3, 32, 32))[0, 5].view(3, 9, 4)  # an inner patch
    share = degrees / 180 * 9
    lower, upper = int(share) % 9, (int(share) + 1) % 9
    expected = torch.zeros(9)
    expected[lower], expected[upper] = 1 - share % 1, share % 1
    assert F.cosine_similarity(histogram[0, :, 0], expected - expected.mean(), dim=0) > 0.999
    assert torch.allclose(histogram, histogram[:1, :, :1].expand_as(histogram), atol=1e-3), "alike in colours and cells"


def test_hog_ignores_brightness_and_mirrors_with_the_image():
    teacher, images = HOG(8), torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(teacher(images), teacher(images * 0.5 + 0.3), atol=0.03)
    assert teacher(torch.full((1, 3, 16, 16), 0.3)).abs().max() == 0, "nothing to see in a flat image"
    mirrored = teacher(images.flip(-1)).view(2, 2, 3, 9, 2, 2).flip(1).flip(-1)
    orientations = [-bin % 9 for bin in range(9)]
    assert torch.allclose(mirrored[..., orientations, :, :].reshape(1, 4, -1), teacher(images), atol=1e-5)


def test_hog_refuses_patches_that_it_cannot_halve():
    with pytest.raises(beitv2.ModelError, match="even, not 7"):
        HOG(7)


# -- Pixels -----------------------------------------------------------------------------------------------------


def test_pixels_are_the_patch_itself_without_its_brightness_and_contrast():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    features = Pixels(4)(images)
    assert features.shape == (2, 4, 48)
    patch = images[1, :, 4:, :4].flatten()  # row by row: patch 2 is the lower left one
    expected = (patch - patch.mean()) / (patch.var(unbiased=False) + 1e-3).sqrt()
    assert torch.allclose(features[1, 2].sort().values, expected.sort().values, atol=1e-5)
    assert torch.allclose(Pixels(4)(0.5 * images + 0.2), features, atol=0.05)


# -- Teachers ---------------------------------------------------------------------------------------------------


def dinov2_checkpoint(teacher: Teacher) -> dict:
    """A DINOv2 file that holds this teacher: its names, a bias for the keys too, and a mask token."""
    state = {"mask_token": torch.zeros(1, 8)}
    for name, value in teacher.state_dict().items():
        name = name.removeprefix("backbone.").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        state[name] = torch.randn_like(value)
    for block in range(2):
        stem = f"blocks.{block}.attn."
        q, v = state.pop(stem + "q_bias"), state.pop(stem + "v_bias")
        state[stem + "qkv.bias"] = torch.cat([q, torch.randn_like(q), v])
    return state


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_dinov2_loads_key_for_key_with_and_without_registers(name):
    teacher = dataclasses.replace(TEACHERS[name], size=(8, 2, 2)).build(grid=2)
    state = dinov2_checkpoint(teacher)
    report = beitv2.load_pretrained(teacher, rename_dino_keys(dict(state)))
    assert not report.dropped and not report.fresh
    assert torch.equal(teacher.backbone.blocks[1].gamma_2, state["blocks.1.ls2.gamma"])
    assert torch.equal(teacher.backbone.blocks[1].attn.v_bias, state["blocks.1.attn.qkv.bias"][16:])
    features = teacher(torch.rand(1, 3, 32, 32))
    assert features.shape == (1, 4, 8), "a patch for each of ours, whatever the size of the image; no registers"


def bicubic(old: int, new: int, step: float) -> torch.Tensor:
    """The weights [new, old] of a cubic interpolation that reads at (i + .5) * step - .5; the border is repeated."""
    weights = torch.zeros(new, old)
    for i in range(new):
        place = (i + 0.5) * step - 0.5
        for neighbour in range(math.floor(place) - 1, math.floor(place) + 3):
            t, a = abs(place - neighbour), -0.75
            weight = (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4)
            weights[i, min(max(neighbour, 0), old - 1)] += weight
    return weights


@pytest.mark.parametrize("grid", [8, 12, 14, 24])
@pytest.mark.parametrize("name", ["clip_vitb16", "dino_vits16"])
def test_clip_and_dino_positions_are_read_by_the_published_factor(name, grid):
    torch.manual_seed(0)
    positions = torch.randn(1, 1 + 14**2, 3)
    ours = interpolate_positions(positions, grid, TEACHERS[name].antialias)
    assert torch.equal(ours[:, 0], positions[:, 0]), "[CLS] has no place"
    if grid == 14:
        assert ours is positions, "nothing changes at the grid of the training"
        return
    rows = bicubic(14, grid, 14 / (grid + 0.1))
    expected = torch.einsum("yi,xj,ijd->yxd", rows, rows, positions[0, 1:].view(14, 14, 3)).flatten(0, 1)
    assert torch.allclose(ours[0, 1:], expected, atol=1e-5)


def test_the_bias_of_the_keys_may_be_dropped():
    """Softmax over keys does not change when the same number is added to all logits of a query."""
    torch.manual_seed(0)
    q, k, v, bias = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4), torch.randn(4)
    attention = F.scaled_dot_product_attention
    assert torch.allclose(attention(q, k + bias, v), attention(q, k, v), atol=1e-6)


class Tower(torch.nn.Module):
    """A model with what CLIP has: a convolution, norms, attention, a parameter and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 4, stride=4, bias=False)
        self.blocks = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8))
        self.attn = torch.nn.MultiheadAttention(8, 2)
        self.proj = torch.nn.Parameter(torch.randn(8, 6).T)  # not contiguous
        self.register_buffer("input_resolution", torch.tensor(16))
        self.register_buffer("places", torch.arange(10)[4:7])  # in the middle of what is stored

    def forward(self, images):
        x = self.blocks(self.conv1(images).flatten(2).permute(2, 0, 1))
        return self.attn(x, x, x)[0] @ self.proj.T


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A TorchScript archive in half precision, as OpenAI's is, and the state dict that it holds."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("archive") / "ViT-B-16.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather see other formats; OpenAI's is this one
        traced = torch.jit.trace(Tower().requires_grad_(False), torch.rand(1, 3, 16, 16)).half()
        traced.save(path)
        return path, {name: value.clone() for name, value in traced.state_dict().items()}


def assert_same_tensors(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


@pytest.mark.filterwarnings("error")
def test_an_archive_is_read_without_torchscript(archive, monkeypatch):
    path, expected = archive
    monkeypatch.setattr(torch.jit, "load", None)
    assert len(expected) == 12 and expected["proj"].dtype == torch.float16
    assert_same_tensors(read_weights(path), expected)


def test_an_archive_becomes_a_plain_state_dict_in_one_command(archive, tmp_path, monkeypatch):
    path, expected = archive
    command = [sys.executable, "-W", "error", "-m", "support.teachers", str(path), str(tmp_path / "plain.pt")]
    done = subprocess.run(command, cwd=CODE, capture_output=True, text=True)
    assert done.returncode == 0 and "12 tensors" in done.stdout, done.stderr
    assert_same_tensors(torch.load(tmp_path / "plain.pt", weights_only=True), expected)
    monkeypatch.setattr(sys, "argv", ["teachers.py", str(path)])
    with pytest.raises(UserError, match="name two files"):
        convert_archive()


def rewritten(path: Path, target: Path, pickled: bytes) -> Path:
    """The same archive with another data.pkl."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            copy.writestr(name, pickled if name.endswith("/data.pkl") else source.read(name))
    return target


def test_no_code_of_an_archive_is_run(archive, tmp_path):
    """Neither what a pickle asks to be called, nor what stands in the archive's own classes."""
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    path, _ = archive
    for name, harmful in (("call.pt", pickle.dumps(Harmful())), ("name.pt", pickle.dumps(sys.exit)),
                          ("broken.pt", b"\x80\x02cno"), ("number.pt", pickle.dumps(1))):
        with pytest.raises(UserError, match=f"cannot read the TorchScript archive '.*{name}'"):
            read_weights(rewritten(path, tmp_path / name, harmful))
    assert not (tmp_path / "touched").exists()


def clip_weights(width: int = 8) -> dict:
    """A tiny CLIP ViT with 2 x 2 patches of 16 pixels, under OpenAI's names."""
    torch.manual_seed(0)
    shapes = {"class_embedding": [width], "positional_embedding": [5, width], "proj": [width, 6],
              "conv1.weight": [width, 3, 16, 16], "ln_pre.weight": [width], "ln_pre.bias": [width],
              "ln_post.weight": [width], "ln_post.bias": [width]}
    for name, shape in {"ln_1.weight": [width], "ln_1.bias": [width], "ln_2.weight": [width], "ln_2.bias": [width],
                        "attn.in_proj_weight": [3 * width, width], "attn.in_proj_bias": [3 * width],
                        "attn.out_proj.weight": [width, width], "attn.out_proj.bias": [width],
                        "mlp.c_fc.weight": [4 * width, width], "mlp.c_fc.bias": [4 * width],
                        "mlp.c_proj.weight": [width, 4 * width], "mlp.c_proj.bias": [width]}.items():
        shapes[f"transformer.resblocks.0.{name}"] = shape
    return {f"visual.{name}": torch.randn(shape) for name, shape in shapes.items()} | {"logit_scale": torch.ones([])}


@pytest.mark.parametrize("gelu, activation, words", [
    ("auto", beitv2.QuickGELU, "QuickGELU is assumed.*clip.pt.*set tokenizer.teacher_gelu=exact"),
    ("quick", beitv2.QuickGELU, "^QuickGELU is used, as"), ("exact", torch.nn.GELU, "^exact GELU is used, as")])
def test_which_gelu_clip_weights_get_is_chosen_and_said(tmp_path, monkeypatch, capsys, gelu, activation, words):
    """Weights of OpenAI and of others have the same names and shapes, and need different functions."""
    small = dataclasses.replace(TEACHERS["clip_vitb16"], size=(8, 1, 2), output_dim=6)
    monkeypatch.setitem(TEACHERS, "clip_vitb16", small)
    torch.save({"state_dict": clip_weights()}, tmp_path / "clip.pt")  # in the frame that open_clip's training writes
    changes = ["tokenizer.teacher=clip_vitb16", f"tokenizer.teacher_weights={tmp_path / 'clip.pt'}",
               "data.image_size=32", "model.patch_size=16"]
    config = read_config(*changes, f"tokenizer.teacher_gelu={gelu}")
    teacher = open_teacher(config)
    assert isinstance(teacher.backbone.blocks[0].mlp.act, activation)
    assert re.search(words, capsys.readouterr().out, re.MULTILINE)
    assert teacher(torch.rand(1, 3, 32, 32)).shape == (1, 4, 6)

    openai = dataclasses.replace(small, sha256=file_sha256(tmp_path / "clip.pt"))
    monkeypatch.setitem(TEACHERS, "clip_vitb16", openai)
    open_teacher(read_config(*changes))
    assert "GELU" not in capsys.readouterr().out, "nothing is assumed of OpenAI's own file"


def test_the_gelu_of_other_teachers_is_no_choice():
    with pytest.raises(UserError, match="teacher_gelu=exact is for CLIP's weights, and the teacher is 'hog'"):
        open_teacher(read_config("tokenizer.teacher=hog", "tokenizer.teacher_gelu=exact"))


def test_clip_weights_without_an_image_tower_are_refused():
    with pytest.raises(UserError, match="no image tower"):
        rename_clip_keys({"transformer.x": torch.zeros(1)})


@pytest.mark.parametrize("content", [{}, {"config": None}, {"config": "base.yaml"}, {"config": {"model": None}},
                                     {"config": {"model": {"arch": "beit"}}}, {"config": {"model": {"size": "huge"}}}])
def test_a_student_that_another_program_wrote_is_refused(tmp_path, content):
    torch.save({"model": {"norm.weight": torch.ones(2)}} | content, tmp_path / "student.pt")
    config = read_config("tokenizer.teacher=beitv2", f"tokenizer.teacher_weights={tmp_path / 'student.pt'}")
    with pytest.raises(UserError, match="student.pt' does not say what model it holds"):
        open_teacher(config)
    with pytest.raises(UserError, match="needs a checkpoint of ours: set tokenizer.teacher_weights=PATH"):
        open_teacher(read_config("tokenizer.teacher=beitv2"))


def taught_by(model: torch.nn.Module, section: beitv2.ModelConfig, file: Path) -> Teacher:
    """Saves a model of ours as our scripts do, and opens it as a teacher of 6 x 6 patches."""
    torch.save({"model": model.state_dict(), "config": {"model": dataclasses.asdict(section)}}, file)
    return open_teacher(read_config("tokenizer.teacher=beitv2", "data.image_size=48", "model.patch_size=8",
                                    f"tokenizer.teacher_weights={file}"))


def test_a_student_of_ours_is_a_teacher(tmp_path):
    """Rebuilt from what its checkpoint says, on the tokenizer's grid, whatever the patches of the next student."""
    torch.manual_seed(0)
    section = beitv2.ModelConfig(embed_dim=8, depth=1, num_heads=2, patch_size=4, rel_pos_bias=False,
                                 abs_pos_embed=True)
    student = beitv2.MaskedImageModel(vocab_size=5, early_layers=1, head_layers=0,
                                      **section.backbone(24, tables="shared"))
    teacher = taught_by(student, section, tmp_path / "student.pt")
    images = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        expected = student.features((images - torch.tensor(teacher.mean).view(3, 1, 1))
                                    / torch.tensor(teacher.std).view(3, 1, 1))
    assert torch.allclose(teacher(images), expected[:, 1:], atol=1e-5) and teacher.output_dim == 8


def test_a_fine_tuned_model_of_ours_is_a_teacher(tmp_path):
    """It norms the mean of its patches; as a teacher it norms each patch, with the same norm."""
    torch.manual_seed(0)
    section = beitv2.ModelConfig(embed_dim=8, depth=1, num_heads=2, patch_size=4, abs_pos_embed=True)
    model = beitv2.Classifier(3, **section.backbone(24))
    torch.nn.init.normal_(model.fc_norm.weight)
    teacher = taught_by(model, section, tmp_path / "model.pt")
    images = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        expected = model.fc_norm(model.features(data.normalize(images))[:, 1:])
    assert torch.allclose(teacher(images), expected, atol=1e-5)


def test_the_teacher_of_the_demo_knows_the_shapes():
    """Its file is small, fits the demo's patches, and was trained on what the drawing program draws today."""
    assert SHAPES_TEACHER.stat().st_size <= 10**6
    config = read_config("data.train_images=300", "data.val_images=200")
    teacher, features, labels = open_teacher(config), [], []
    for dataset in open_datasets(config.data):
        samples = data.ValSamples(dataset, config.data.image_size)
        images = torch.stack([samples[i]["image"] for i in range(len(samples))])
        features.append(teacher(data.to_unit(images)))  # [n, N, D]
        labels.append(torch.from_numpy(dataset.labels))
    assert features[0].shape[1:] == (16, teacher.output_dim)
    bank, queries = (part.mean(dim=1) for part in features)
    assert finetune.knn_accuracy(bank, labels[0], queries, labels[1]) > 0.95
    patch = [F.normalize(part[:, 5], dim=1) for part in features]  # one patch alone tells the shape too
    assert finetune.knn_accuracy(patch[0], labels[0], patch[1], labels[1]) > 0.5


# -- Modules of the user's own ------------------------------------------------------------------------------------

GOOD = """
import torch

class Mean(torch.nn.Module):
    output_dim = 3

    def __init__(self, grid, image_size):
        super().__init__()
        self.grid, self.scale = grid, torch.nn.Parameter(torch.ones(3))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, images):
        maps = torch.nn.functional.adaptive_avg_pool2d(images, self.grid)
        return self.dropout(maps.flatten(2).transpose(1, 2) * self.scale)
"""


def own_teacher(folder: Path, code: str, *changes: str, name: str = "Mean"):
    """The teacher of a file with this code, on images of 6 x 6 patches of 8 pixels."""
    (folder / "mine.py").write_text(code)
    config = read_config(f"tokenizer.teacher={folder}/mine.py:{name}", "data.image_size=48", "model.patch_size=8",
                         *changes)
    return open_teacher(config), config


def test_what_the_users_module_returns_is_looked_at_in_each_batch(tmp_path):
    """Its first batch may fit by chance: here it has two images."""
    teacher, _ = own_teacher(tmp_path, GOOD.replace("images, self.grid)", "images[:2], self.grid)"))
    with pytest.raises(UserError, match=r"mine.py' maps images \[3, 3, 48, 48\] to \[2, 36, 3\], not to \[3, 36, 3\]"):
        teacher(torch.rand(3, 3, 48, 48))


def test_a_module_of_the_users_own_is_frozen_and_asked_as_it_is(tmp_path):
    teacher, _ = own_teacher(tmp_path, GOOD)
    images = torch.rand(2, 3, 48, 48)
    features = teacher(images.clone().requires_grad_())
    assert teacher.output_dim == 3 and not features.requires_grad and not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.allclose(features[:, 7], images[:, :, 8:16, 8:16].mean(dim=(2, 3))), "patch 7 is the second of row two"


@pytest.mark.parametrize("old, new, message", [
    ("self.grid)", "self.grid + 1)", r"maps images \[2, 3, 48, 48\] to \[2, 49, 3\], not to \[2, 36, 3\]"),
    ("self.dropout(maps", "tuple(maps", "returns a tuple: it must return a tensor"),
    ("* self.scale)", "* float('nan'))", "numbers that are not finite"),
    ("* self.scale)", "* 255).long()", "type torch.int64: features must be floating point"),
    ("maps = ", "torch.set_grad_enabled(True); images.requires_grad_(); maps = ", "keeps a gradient"),
    ("output_dim = 3", "width = 3", "needs an attribute `output_dim`"),
    ("output_dim = 3", "output_dim = 0", "a whole number, at least 1"),
    ("output_dim = 3", "output_dim = True", "a whole number, at least 1"),
    ("class Mean(torch.nn.Module)", "class Other(torch.nn.Module)", "has no function or class 'Mean'; it has Other"),
    ("class Mean(torch.nn.Module)", "def Mean(grid, size): return 7\nclass Other(torch.nn.Module)",
     r"Mean\(grid, image_size\) of '.*mine.py' must return an nn.Module, not a int"),
    ("import torch", "import sys; sys.path = []", "the code of the teacher '.*' ended with NameError"),
    ("import torch", "import torch\nraise SystemExit('usage: mine.py')", r"ended with SystemExit \(usage: mine.py\)"),
    ("import torch", "import torch, no_such_package", r"ended with ModuleNotFoundError \(No module named 'no_such_"),
    ("super().__init__()", "super().__init__(); 1 / 0", r"Mean\(grid, image_size\) of the teacher .* with ZeroDiv"),
    ("maps = ", "raise ValueError('bad weather'); maps = ", r"forward of the teacher '.*' ended with ValueError \(bad"),
])
def test_a_misfit_of_the_users_module_is_one_sentence_with_the_files_name(tmp_path, capfd, old, new, message):
    assert old in GOOD
    path, was_on = list(sys.path), torch.is_grad_enabled()
    with pytest.raises(UserError, match=message) as error:
        own_teacher(tmp_path, GOOD.replace(old, new, 1))
    sys.path[:] = path
    assert torch.is_grad_enabled() == was_on
    assert "mine.py" in str(error.value)
    ended = "ended with" in str(error.value)
    shown = capfd.readouterr().err
    assert ("Traceback" in shown and "mine.py" in shown) == ended, "its own traceback, and no other"


def test_a_file_or_a_name_that_is_missing_is_refused_when_the_configuration_is_read(tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    for value in ("nowhere.py:Mean", f"{tmp_path}/mine.py", f"{tmp_path}/mine.py:a b"):
        with pytest.raises(UserError, match="must be FILE.py:NAME with a file that is there.*not '.*py"):
            read_config(f"tokenizer.teacher={value}")


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(GOOD)
    assert read_config("tokenizer.teacher=~/mine.py:Mean").tokenizer.teacher == f"{tmp_path}/mine.py:Mean"


def test_options_that_a_module_of_the_users_own_cannot_heed_are_refused(tmp_path):
    with pytest.raises(UserError, match="teacher_weights is not for the teacher '.*mine.py', which opens its weights"):
        own_teacher(tmp_path, GOOD, "tokenizer.teacher_weights=weights.pt")
    with pytest.raises(UserError, match="teacher_gelu=quick is for CLIP's weights, and .* is '.*mine.py:Mean'"):
        own_teacher(tmp_path, GOOD, "tokenizer.teacher_gelu=quick")


def test_a_cache_knows_the_file_and_the_weights_of_a_teacher(tmp_path):
    (tmp_path / "elsewhere").mkdir()

    def about(code=GOOD, folder=tmp_path):
        teacher, config = own_teacher(folder, code)
        return json.dumps(about_teacher(config, teacher), sort_keys=True)

    assert about() == about() == about(folder=tmp_path / "elsewhere")
    assert about() != about(GOOD + "# another file"), "what the code computes may have changed"
    weights = "import torch; WEIGHT = torch.load('weight.pt')\n" + GOOD.replace("torch.ones(3)", "WEIGHT")
    found = []
    for value in (1.0, 2.0):
        torch.save(torch.full([3], value), tmp_path / "weight.pt")
        found.append(about(weights.replace("weight.pt", str(tmp_path / "weight.pt"))))
    assert found[0] != found[1], "the same file with other weights"

    half = GOOD.replace("torch.ones(3)", "torch.ones(3, dtype=torch.bfloat16)")
    assert about(half) != about(half + "# and its weights are read in any type")

    hog, pixels = (read_config(f"tokenizer.teacher={name}") for name in ("hog", "pixels"))
    assert about_teacher(hog, open_teacher(hog)) != about_teacher(pixels, open_teacher(pixels)), "both have no weights"
    clip = TEACHERS["clip_vitb16"]
    clip = dataclasses.replace(clip, size=(8, 1, 2), output_dim=6).build(grid=2)
    quick, exact = (about_teacher(read_config("tokenizer.teacher=clip_vitb16", f"tokenizer.teacher_gelu={gelu}"), clip)
                    for gelu in ("auto", "exact"))
    assert quick != exact, "GELU has no weights"


# -- The examples in the documents --------------------------------------------------------------------------------


def example(document: str, line: str) -> str:
    """The Python block of a document that holds this line."""
    blocks = re.findall(r"```python\n(.*?)```", (CODE / document).read_text(), re.DOTALL)
    found = [block for block in blocks if f"{line}\n" in block]
    assert len(found) == 1, f"{document} has {len(found)} examples with '{line}'"
    return found[0]


def test_the_page_on_teachers_names_all_of_them():
    page = (CODE / "docs/teachers.md").read_text()
    assert all(name.removesuffix("_reg") in page for name in TEACHERS)


@pytest.mark.parametrize("grid", [6, 14])
def test_readmes_torchvision_teacher(tmp_path, monkeypatch, grid):
    """Patch i of the teacher is patch i of ours, and its features are those of torchvision's own encoder."""
    def small(image_size=224):  # one layer, and so quick; what the example relies on is the same
        return models.VisionTransformer(image_size, 16, num_layers=1, num_heads=12, hidden_dim=768, mlp_dim=64)

    monkeypatch.setattr(models.vision_transformer, "vit_b_16", small)
    torch.manual_seed(0)
    vit = small()
    torch.save(vit.state_dict(), tmp_path / "vit_b_16.pth")
    monkeypatch.chdir(tmp_path)
    code = example("README.md", "class ViT(torch.nn.Module):")
    teacher, _ = own_teacher(tmp_path, code, f"data.image_size={8 * grid}", name="ViT")
    images = torch.rand(1, 3, 16 * grid, 16 * grid)  # at the teacher's own size nothing is resized
    features = teacher(images)
    assert features.shape == (1, grid**2, 768)
    if grid == 14:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        with torch.no_grad():
            tokens = vit.eval().get_submodule("conv_proj")((images - mean) / std).flatten(2).transpose(1, 2)
            expected = vit.encoder(torch.cat([vit.class_token, tokens], dim=1))[:, 1:]
        assert torch.allclose(features, expected, atol=1e-4)


def test_the_spectrum_teacher(tmp_path):
    teacher, _ = own_teacher(tmp_path, example("docs/change.md", "class Spectrum(torch.nn.Module):"), name="Spectrum")
    waves = torch.sin(torch.arange(48) * 2 * math.pi / 4).expand(1, 3, 48, 48)  # two periods in each patch of 8
    assert (teacher(waves).argmax(dim=-1) == 2).all()


@pytest.mark.parametrize("model, patch", [
    ("vit_small_patch16_dinov3", 16), ("vit_base_patch32_siglip_256", 32), ("vit_small_patch14_reg4_dinov2", 14)])
def test_the_timm_teacher(tmp_path, model, patch):
    """With registers, without [CLS], with other patches: grids agree, and features are those of timm's own way."""
    pytest.importorskip("timm", reason="timm is not installed")
    code = example("docs/change.md", "class Timm(torch.nn.Module):")
    assert "pretrained=True" in code
    code = code.replace("pretrained=True", "pretrained=False")
    code += f"\n\ndef chosen(grid, image_size):\n    return Timm(grid, image_size, '{model}')\n"
    torch.manual_seed(0)
    teacher, _ = own_teacher(tmp_path, code, name="chosen")
    own = teacher.module.model
    images = torch.rand(1, 3, 6 * patch, 6 * patch)
    mean, std = (torch.tensor(own.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        maps = own.forward_intermediates((images - mean) / std, indices=1, norm=True, intermediates_only=True)[0]
    assert maps.shape == (1, teacher.output_dim, 6, 6), "a patch for each of ours"
    assert torch.allclose(teacher(images), maps.flatten(2).transpose(1, 2), atol=1e-4)
