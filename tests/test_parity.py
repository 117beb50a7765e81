"""Ours against the published code: every number of the parity files, in float32 on the CPU.

The files lie in tests/fixtures/parity; the environment variable BEITV2_PARITY names another folder of the same
format. All sizes are read from the files. Block masks have their statistics tested in test_data.py.
"""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import tokenizer  # noqa: E402
from beitv2 import ALWAYS_DROPPED_ENDS, Classifier, MaskedImageModel, ModelConfig, load_pretrained, masked_positions  # noqa: E402
from beitv2 import parameter_groups, resize_positions  # noqa: E402
from support.optimizers import cosine_schedule  # noqa: E402
from support.run import seed_everything  # noqa: E402
from support.teachers import TEACHERS, Teacher  # noqa: E402

TOLERANCE = 1e-5  # the design's: largest error over largest magnitude, per tensor
FOLDER = Path(os.environ.get("BEITV2_PARITY") or Path(__file__).parent / "fixtures" / "parity")
KINDS = ("mim", "classifier", "vqkd", "clip", "dino.", "dinov2_positions", "bias_table")
FILES = sorted(path.name for path in FOLDER.glob("*.pt"))

if not FOLDER.is_dir():
    if os.environ.get("BEITV2_PARITY"):  # a typo must not look like success
        raise FileNotFoundError(f"BEITV2_PARITY names '{FOLDER}', and there is no such folder")
    pytest.skip(f"there is no parity folder '{FOLDER}'", allow_module_level=True)


def files(kind: str) -> list[str]:
    return [name for name in FILES if name.startswith(kind)]


def read(name: str) -> dict:
    return torch.load(FOLDER / name, weights_only=True)


def recipe(key: str):
    return json.loads((FOLDER / "recipe.json").read_text())[key]


def assert_close(ours: Tensor, theirs: Tensor, what: str, floor: float = 1e-6) -> None:
    """Largest error over largest magnitude; `floor` is the magnitude under which a tensor counts as zero."""
    ours, theirs = torch.as_tensor(ours).detach().double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape, f"{what}: {list(ours.shape)} here, {list(theirs.shape)} there"
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=floor)).item()
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


def assert_gradients(model: torch.nn.Module, norms: dict[str, float], grads: dict[str, Tensor]) -> None:
    """The gradient's norm of every parameter, and some gradients whole.

    A gradient adds up terms far larger than itself (those of q_bias and of the bias tables pass a softmax, whose
    gradient sums to zero), so its rounding error follows the size of the terms: what is smaller than a thousandth of
    the largest norm in the model is measured against that thousandth.
    """
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = {name: norm for name, norm in norms.items() if not name.endswith("k_bias")}  # we have none, they get none
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * max(theirs.values())
    for name, norm in theirs.items():
        assert_close(ours[name].norm(), norm, f"norm of the gradient of {name}", floor)
    for name, grad in grads.items():
        assert_close(ours[name], grad, f"gradient of {name}", floor / math.sqrt(grad.numel()))


def assert_loads_key_for_key(model: torch.nn.Module, state: dict, fresh: tuple[str, ...] = ()) -> None:
    """Every published tensor finds its place, but for those that the design lists, and nothing is left untrained."""
    report = load_pretrained(model, state)
    assert report.resized == [] and tuple(report.fresh) == fresh
    assert all(name.endswith(ALWAYS_DROPPED_ENDS) for name in report.dropped)
    assert set(report.loaded) | set(report.dropped) == set(state)


def backbone(config: dict) -> dict:
    """VisionTransformer's keywords from a published configuration."""
    rel_pos_bias = "shared" if config.get("use_shared_rel_pos_bias") else "per_block" if config.get("use_rel_pos_bias") else None
    return dict(image_size=config["img_size"], patch_size=config["patch_size"], embed_dim=config["embed_dim"],
                depth=config["depth"], num_heads=config["num_heads"], mlp_ratio=config["mlp_ratio"],
                abs_pos_embed=config["use_abs_pos_emb"], layer_scale=config["init_values"], rel_pos_bias=rel_pos_bias)


def test_every_file_is_tested():
    """A folder with a file that no test reads, or without one of the kinds, must not pass in silence."""
    assert all(files(kind) for kind in KINDS) and (FOLDER / "recipe.json").is_file()
    assert sorted(name for kind in KINDS for name in files(kind)) == FILES


# --- stage 2: the pre-training model ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", files("mim"))
def test_masked_image_model(name):
    data = read(name)
    config = data["config"]
    model = MaskedImageModel(vocab_size=config["vocab_size"], early_layers=config["early_layers"],
                             head_layers=config["head_layers"], shared_lm_head=config["shared_lm_head"], **backbone(config))
    assert_loads_key_for_key(model, data["state_dict"])

    # Our shapes are static: one number of masked patches for all images of a batch. The published code's need not be.
    mask = data["mask"].flatten(1)  # [B, N]
    counts = mask.sum(dim=1).tolist()
    size = len(mask) if len(set(counts)) == 1 else 1
    logits_mim, logits_cls, features = [], [], []
    for images, part in zip(data["images"].split(size), mask.split(size)):
        masked = masked_positions(part, int(part[0].sum()))
        for kept, logits in zip((logits_mim, logits_cls), model(images, masked)):
            kept.append(logits.flatten(0, 1))  # masked patches in row order, as published
        tokens, _ = model.forward_blocks(model.embed(images, masked, model.mask_token), model.shared_position_bias())
        features.append(model.norm(tokens)[:, 1:])
    logits_mim, logits_cls, features = map(torch.cat, (logits_mim, logits_cls, features))
    assert_close(logits_mim, data["logits_mim"], "logits_mim")
    assert_close(logits_cls, data["logits_cls"], "logits_cls")
    assert_close(features, data["patch_features"], "patch_features")

    loss_mim, loss_cls = F.cross_entropy(logits_mim, data["labels"]), F.cross_entropy(logits_cls, data["labels"])
    assert_close(loss_mim, data["loss_mim"], "loss_mim")
    assert_close(loss_cls, data["loss_cls"], "loss_cls")
    (loss_mim + loss_cls).backward()
    assert_gradients(model, data["grad_norms"], data["grads"])


# --- stage 3: the classifier -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", files("classifier"))
def test_classifier(name):
    data = read(name)
    config = data["config"]
    model = Classifier(config["num_classes"], "mean" if config["use_mean_pooling"] else "cls", **backbone(config))
    assert_loads_key_for_key(model, data["state_dict"])

    states = data["hidden_states"]
    _, kept = model.forward_blocks(model.embed(data["images"]), model.shared_position_bias(),
                                   keep=tuple(range(1, len(states) + 1)))
    for layer, state in enumerate(states, start=1):
        assert_close(kept[layer], state, f"hidden state after block {layer}")
    logits = model(data["images"])
    assert_close(logits, data["logits"], "logits")
    loss = F.cross_entropy(logits, data["labels"])
    assert_close(loss, data["loss"], "loss")
    loss.backward()
    assert_gradients(model, data["grad_norms"], data["grads"])


# --- stage 1: VQ-KD and its teachers ---------------------------------------------------------------------------


def build_vqkd(data: dict) -> tokenizer.VQKD:
    config = data["config"]
    width = dict(embed_dim=config["embed_dim"], num_heads=config["num_heads"])
    model = tokenizer.VQKD(config["img_size"], config["patch_size"], width | dict(depth=config["encoder_depth"]),
                           width | dict(depth=config["decoder_depth"]), config["codebook_size"], config["codebook_dim"],
                           config["teacher_dim"], config["ema_decay"], config["commitment_beta"])
    # The published count of hits is dropped by name; ours is another (it starts at 1) and lives in our checkpoints only.
    assert_loads_key_for_key(model, data["state_dict"], fresh=("quantize.running_count",))
    return model


@pytest.mark.parametrize("name", files("vqkd"))
def test_vqkd_evaluation(name):
    data = read(name)
    model = build_vqkd(data).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images, features, expected = data["images01"], data["teacher_features"], data["eval"]
    with torch.no_grad():
        assert torch.equal(model.token_ids(images).flatten(1), data["token_ids"].flatten(1))
        codes, ids, commitment_loss = model.quantize(model.encode(images))
        assert torch.equal(ids.flatten(1), expected["ids"].flatten(1))
        assert_close(model.decode(codes), expected["reconstruction"], "reconstruction")
        cosine_loss, loss, _ = model(images, features)
    assert_close(cosine_loss, expected["rec_loss"], "reconstruction loss")
    assert_close(commitment_loss, expected["commit_loss"], "commitment loss")
    assert_close(loss, expected["commit_loss"], "commitment loss of the whole model")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "evaluation moved the model"


@pytest.mark.parametrize("name", files("vqkd"))
def test_vqkd_training_steps(name):
    """Loss, ids, gradients, codebook and hit counts over several optimizer steps."""
    data = read(name)
    model = build_vqkd(data).train()
    settings = dict(data["optimizer"])
    assert settings.pop("name") == "AdamW" and len(data["train_steps"]) > 0
    settings["betas"] = tuple(settings["betas"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)
    model.quantize.running_count.copy_(data["state_dict"]["quantize.cluster_size"])  # start from their count
    for number, expected in enumerate(data["train_steps"]):
        cosine_loss, commitment_loss, ids = model(data["images01"], data["teacher_features"])
        assert torch.equal(ids.flatten(1), expected["ids"].flatten(1)), f"ids of step {number}"
        assert_close(cosine_loss + commitment_loss, expected["loss"], f"loss of step {number}")
        assert_close(commitment_loss, expected["commit_loss"], f"commitment loss of step {number}")
        optimizer.zero_grad()
        (cosine_loss + commitment_loss).backward()
        if "grad_norms" in expected:
            assert_gradients(model, expected["grad_norms"], expected.get("grads", {}))
        optimizer.step()
        model.quantize.update(seed=number)
        assert_close(model.quantize.embedding.weight, expected["codebook"], f"codebook after step {number}")
        assert_close(model.quantize.running_count, expected["cluster_size"], f"hit counts after step {number}")


def build_teacher(data: dict, name: str) -> Teacher:
    """The entry `name` of the table, as small as the file's model, with its weights."""
    config = data["config"]
    if name == "clip_vitb16":
        size = (config["width"], config["layers"], config["heads"])
        grid, output_dim = config["input_resolution"] // config["patch_size"], config["output_dim"]
    else:
        size = (config["embed_dim"], config["depth"], config["num_heads"])
        grid, output_dim = config["img_size"] // config["patch_size"], None
    published = dataclasses.replace(TEACHERS[name], size=size, patch_size=config["patch_size"], output_dim=output_dim)
    teacher = published.build(grid)
    report = published.load(teacher, dict(data["state_dict"]), source=name)
    assert report.fresh == report.dropped == report.resized == []
    return teacher


@pytest.mark.parametrize("name", files("clip") + files("dino."))
def test_teacher(name):
    data = read(name)
    teacher = build_teacher(data, "clip_vitb16" if name.startswith("clip") else "dino_vitb16")
    with torch.no_grad():
        features = teacher.projection(teacher.backbone(data["images"])[:, 1:])
    assert_close(features, data["patch_features"], "patch features")

    # The way through the front door: images in [0,1], normalised by the teacher itself.
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (teacher.mean, teacher.std))
    assert_close(teacher(data["images"] * std + mean), data["patch_features"], "patch features from images in [0,1]")
    assert teacher.output_dim == data["patch_features"].shape[-1]


@pytest.mark.parametrize("grid", [8, 14, 16, 24])
@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("teacher", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_positions_of_dinov2(teacher, kind, grid):
    """A checkpoint with the positions of the published 37 x 37 grid goes in: what the network then holds counts."""
    published = dataclasses.replace(TEACHERS[teacher], size=(8, 1, 2))
    model = published.build(grid)
    weights = {name.removeprefix("backbone."): value.clone() for name, value in model.state_dict().items()}
    for data in map(read, files("dinov2_positions")):
        name = f"{'registers' if teacher.endswith('_reg') else 'plain'}-{kind}"
        report = published.load(model, weights | {"pos_embed": data[f"{name}-in"]}, source=teacher)
        assert_close(model.backbone.pos_embed, data[f"{name}-{grid}"], f"positions of {name}, {grid} x {grid} patches")
        assert report.resized == ["backbone.pos_embed"]


# --- position bias at another image size -----------------------------------------------------------------------


@pytest.mark.parametrize("name", files("bias_table"))
def test_bias_tables_at_another_grid(name):
    """SOURCE-KIND-TARGET: a table of SOURCE^2 + 3 rows, as the published fine-tuning code brings it to TARGET^2 + 3."""
    tables, compared = read(name), 0
    for key, theirs in tables.items():
        source, kind, target = key.split("-")
        if target != "in":
            ours = resize_positions("relative_position_bias_table", tables[f"{source}-{kind}-in"], torch.empty_like(theirs))
            assert_close(ours, theirs, key)
            assert torch.equal(ours[-3:], tables[f"{source}-{kind}-in"][-3:])  # those of [CLS]
            compared += 1
    assert compared == 14


# --- the recipe ------------------------------------------------------------------------------------------------


def model_with(names: list[str], model_class, **options):
    """A tiny model with the parameters `names`: as deep as they say, with the switches that they show."""
    depth = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("blocks."))
    rel_pos_bias = "shared" if any(name.startswith("rel_pos_bias.") for name in names) else \
        "per_block" if "blocks.0.attn.relative_position_bias_table" in names else None
    return model_class(image_size=16, patch_size=8, embed_dim=8, depth=depth, num_heads=2, rel_pos_bias=rel_pos_bias,
                       abs_pos_embed="pos_embed" in names, layer_scale=0.1 * ("blocks.0.gamma_1" in names), **options)


def assert_groups(groups: list[dict], expected: dict[str, dict]) -> None:
    found = {name: group for group in groups for name in group["names"]}
    assert found.keys() == expected.keys()
    assert sum(len(group["names"]) for group in groups) == len(found), "a parameter is in two groups"
    for name, values in expected.items():
        assert found[name]["weight_decay"] == pytest.approx(values["weight_decay"], rel=1e-9), name
        assert found[name]["lr_scale"] == pytest.approx(values["lr_scale"], rel=1e-9), name


def test_parameter_groups_of_pretraining():
    expected = recipe("mim_param_groups")
    names = list(expected["groups"])
    head_layers = len({name.split(".")[1] for name in names if name.startswith("cls_pt_layers.")})
    model = model_with(names, MaskedImageModel, vocab_size=4, early_layers=1, head_layers=head_layers,
                       shared_lm_head="cls_pt_lm_head.weight" not in names)
    assert_groups(parameter_groups(model, expected["weight_decay"]), expected["groups"])


def test_parameter_groups_of_finetuning():
    expected = recipe("finetune_param_groups")
    names = list(expected["groups"])
    model = model_with(names, Classifier, num_classes=3, pooling="mean" if "fc_norm.weight" in names else "cls")
    assert model.depth == expected["depth"]
    assert_groups(parameter_groups(model, expected["weight_decay"], expected["layer_decay"]), expected["groups"])


def test_cosine_schedules():
    assert len(recipe("cosine_schedules")) > 0
    for schedule in recipe("cosine_schedules"):
        values = schedule.pop("values")
        assert cosine_schedule(**schedule) == pytest.approx(values, rel=1e-9, abs=1e-15)


def test_initialisation_of_base():
    """Mean, spread and limits of every fresh tensor of the base pre-training model.

    Both sides are samples of n values. Means differ by a standard error of std sqrt(2/n), standard deviations by
    less than std / sqrt(n) (that of a normal distribution; ours are cut short), extremes by about range / n, as all
    these distributions end abruptly. Six standard errors, and thirty n-ths, are allowed.
    """
    expected = recipe("base_mim_init")
    seed_everything(0)
    model = MaskedImageModel(**ModelConfig(size="base").backbone(image_size=224, tables="shared"))
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert sum(p.numel() for p in model.parameters()) == recipe("base_mim_params")
    for name, tensor in state.items():
        theirs, n = expected[name], tensor.numel()
        assert list(tensor.shape) == theirs["shape"], name
        std, spread = theirs["std"], theirs["max"] - theirs["min"]
        low, high = tensor.aminmax()
        assert tensor.mean().item() == pytest.approx(theirs["mean"], abs=6 * std * math.sqrt(2 / n) + 1e-7), name
        assert tensor.std().item() == pytest.approx(std, abs=6 * std / math.sqrt(n) + 1e-7), name
        assert low.item() == pytest.approx(theirs["min"], abs=30 * spread / n + 1e-7), name
        assert high.item() == pytest.approx(theirs["max"], abs=30 * spread / n + 1e-7), name
