"""Using what was trained: models from their checkpoints, and one loop over images, some of which cannot be read.

The same by the scripts' commands is in test_scripts.py.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

CODE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CODE))
import beitv2  # noqa: E402
import finetune  # noqa: E402
import tokenizer  # noqa: E402
from data import ValSamples, normalize, to_unit  # noqa: E402
from support import use  # noqa: E402
from support.datasets import open_files  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.options import as_dict, load_config  # noqa: E402

SMALL = """
device: cpu
precision: fp32
data: {image_size: 16, workers: 0}
model: {embed_dim: 16, depth: 2, num_heads: 4, patch_size: 4}
tokenizer: {embed_dim: 16, depth: 1, num_heads: 2, decoder_depth: 1, codebook_size: 16, codebook_dim: 8}
finetune: {device_batch_size: 2}
"""
OPTIONS = dict(image_size=16, patch_size=4, embed_dim=16, depth=2, layer_scale=0.1, rel_pos_bias="per_block")
CLASSES = ["cat", "dog", "caf\udce9"]  # the last one's folder had a name of Latin-1


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def photos(tmp_path):
    """Five photos, and what a Mac and an interrupted download have left among them."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "caf\udce9.png", "d.png", "more/e.png")):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        with open(folder / name, "wb") as file:
            Image.fromarray(pixels).save(file, "JPEG" if name.endswith("jpg") else "PNG")
    (folder / "._a.png").write_bytes(b"\0")
    return folder


def configured(tmp_path: Path, photos: Path, *changes: str, script=finetune):
    (tmp_path / "small.yaml").write_text(SMALL)
    section = script.__name__
    return load_config(script.SECTIONS, [str(tmp_path / "small.yaml"), f"output_dir={tmp_path}/out",
                                         f"{section}.images={photos}", *changes])


def save_classifier(tmp_path: Path, photos: Path, num_heads=4, pooling="mean", file="best.pt", ours=True):
    """A classifier with random weights, and the checkpoint that a run of ours, or another program, wrote of it."""
    torch.manual_seed(num_heads)
    model = beitv2.Classifier(3, pooling, init_scale=50.0, num_heads=num_heads, **OPTIONS).eval()
    for table in (block.attn.relative_position_bias_table for block in model.blocks):
        torch.nn.init.normal_(table)
    content = {"model": model.state_dict()}
    if ours:
        config = configured(tmp_path, photos, f"model.num_heads={num_heads}", f"finetune.pooling={pooling}")
        content |= {"config": as_dict(config), "classes": CLASSES}
    (tmp_path / "out/finetune").mkdir(parents=True, exist_ok=True)
    torch.save(content, tmp_path / "out/finetune" / file)
    return model


def inputs(photos: Path) -> torch.Tensor:
    samples = ValSamples(open_files(str(photos)), 16)
    return normalize(to_unit(torch.stack([samples[i]["image"] for i in range(len(samples))])))


def lines(tmp_path: Path) -> list[str]:
    return (tmp_path / "out/predict/predictions.txt").read_text(encoding="utf-8").splitlines()


@torch.no_grad()
def expected(model, images: torch.Tensor, classes=tuple(map(use.printable, CLASSES))) -> list[str]:
    shares, best = model(images).softmax(dim=1).topk(3)
    return [", ".join(f"{classes[k]} {100 * p:.1f} %" for k, p in zip(ids, row))
            for ids, row in zip(best.tolist(), shares.tolist())]


# -- models from their checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", beitv2.POOLINGS)
def test_a_checkpoint_says_what_its_model_is(tmp_path, photos, pooling):
    """Its heads, depth, patches and pooling: the configuration says something else, and does not count."""
    model = save_classifier(tmp_path, photos, num_heads=2, pooling=pooling)
    config = configured(tmp_path, photos, "model.num_heads=4", "model.depth=7", "model.patch_size=8",
                        f"finetune.pooling={'cls' if pooling == 'mean' else 'mean'}")
    opened, classes = use.open_trained(config)
    images = inputs(photos)
    with torch.no_grad():
        assert torch.equal(opened(images), model(images)) and classes == CLASSES


@pytest.mark.parametrize("pooling", beitv2.POOLINGS)
def test_published_weights_are_described_by_the_configuration(tmp_path, photos, pooling):
    model = save_classifier(tmp_path, photos, num_heads=2, pooling=pooling, file="published.pth", ours=False)
    weights = f"finetune.weights={tmp_path}/out/finetune/published.pth"
    config = configured(tmp_path, photos, "model.num_heads=2", weights)
    opened, classes = use.open_trained(config)
    with torch.no_grad():
        assert torch.equal(opened(inputs(photos)), model(inputs(photos))) and classes is None


def test_options_that_are_younger_than_a_checkpoint_have_their_defaults():
    model = {"size": "base", "embed_dim": None, "depth": 3, "num_heads": None, "an_option_of_old": 1}
    content = {"config": {"model": model}}
    assert use.restored(beitv2.ModelConfig, content, "model") == beitv2.ModelConfig(depth=3)
    assert use.restored(beitv2.ModelConfig, {"model": {}}, "model") is None


@pytest.mark.parametrize("change", [{"patch_size": "16"}, {"rel_pos_bias": 1}, {"depth": 0}, {"num_heads": [4]}])
def test_sections_with_values_of_other_types_are_no_configuration(change):
    content = {"config": {"model": {"size": "base", "embed_dim": None, "depth": 3, "num_heads": None} | change}}
    assert use.restored(beitv2.ModelConfig, content, "model") is None


@pytest.mark.parametrize("config", [None, "base.yaml", {"model": "beit", "finetune": {"pooling": "avg"}}])
def test_weights_of_another_program_are_described_by_the_configuration(tmp_path, photos, config):
    """It may use our names for things of its own."""
    model = save_classifier(tmp_path, photos, ours=False)
    content = {"model": model.state_dict(), "config": config, "classes": 3, "epochs": 300}
    torch.save(content, tmp_path / "out/finetune/best.pt")
    opened, classes = use.open_trained(configured(tmp_path, photos))
    with torch.no_grad():
        assert torch.equal(opened(inputs(photos)), model(inputs(photos))) and classes is None


def test_names_that_are_not_as_many_as_the_classes(tmp_path, photos):
    save_classifier(tmp_path, photos)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match="names.txt' names 2 classes, and the model has 3"):
        use.predict(configured(tmp_path, photos, f"finetune.classes_file={tmp_path}/names.txt"))


# -- images that cannot be read, and names that are no text ----------------------------------------------------------


def test_predictions_of_all_images_but_those_that_cannot_be_read(tmp_path, photos, monkeypatch):
    """The others have theirs, in order, and the sentence at the end says what is missing. Names of any bytes are
    printed, also on a terminal that takes nothing but UTF-8."""
    model = save_classifier(tmp_path, photos)
    want = expected(model, inputs(photos))
    assert len(set(want)) == 5
    names = ["a.png", "b.jpg", "caf\\xe9.png", "d.png", "more/e.png"]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict"))
    use.predict(configured(tmp_path, photos))
    assert lines(tmp_path) == [f"{photos}/{name}: {text}" for name, text in zip(names, want)]
    assert sys.stdout.buffer.getvalue().decode().splitlines()[-5:] == lines(tmp_path)

    for name in ("b.jpg", "more/e.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:90])
    with pytest.raises(UserError, match=r"b.jpg' cannot be read .* \(and 1 more of 5 cannot be read\); the "
                                        r"classes of the others are in '.*predictions.txt'"):
        use.predict(configured(tmp_path, photos))
    assert lines(tmp_path) == [f"{photos}/{names[i]}: {want[i]}" for i in (0, 2, 3)]


@pytest.mark.parametrize("name, shown", [("a b.jpg", "a b.jpg"), ("日本.jpg", "日本.jpg"), ("caf\udce9", "caf\\xe9"),
                                         ("a\nb\tc", "a\\nb\\tc"), ("\x1b[31mred", "\\x1b[31mred")])
def test_a_name_is_printed_on_one_line(name, shown):
    assert use.printable(name) == shown


def test_nothing_is_written_if_no_image_can_be_read(tmp_path, photos):
    save_classifier(tmp_path, photos)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for what in (use.predict, use.features):
        with pytest.raises(UserError, match="broken.jpg' cannot be read .*: repair or remove it$"):
            what(configured(tmp_path, tmp_path / "broken.jpg"))
    assert not (tmp_path / "out/predict").exists() and not (tmp_path / "out/features").exists()


@torch.no_grad()
def test_features_of_what_can_be_read(tmp_path, photos, monkeypatch):
    """Of each pooling there is, one more included; what the head sees; hidden states. Files keep their names' bytes."""
    model = save_classifier(tmp_path, photos)
    images = inputs(photos)
    (photos / "b.jpg").write_bytes(b"no image")
    both = lambda tokens: torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)  # noqa: E731
    monkeypatch.setitem(beitv2.POOLINGS, "both", both)
    with pytest.raises(UserError, match="b.jpg' cannot be read .*; the features of the others are in"):
        use.features(configured(tmp_path, photos, "finetune.blocks=[2]"))
    saved = torch.load(tmp_path / "out/features/features.pt", weights_only=True)
    assert saved["files"] == [f"{photos}/{name}" for name in ("a.png", "caf\udce9.png", "d.png", "more/e.png")]
    kept = images[[0, 2, 3, 4]]
    assert torch.allclose(model.head(saved["mean"]), model(kept), atol=1e-5)
    tokens = model.features(kept)
    assert torch.allclose(saved["block_2"], tokens, atol=1e-5) and saved["block_2"].shape == (4, 17, 16)
    assert torch.allclose(saved["cls"], model.fc_norm(tokens[:, 0]), atol=1e-5)
    assert torch.allclose(saved["both"], both(tokens), atol=1e-5)


@torch.no_grad()
def test_codes_of_what_can_be_read(tmp_path, photos, capsys):
    config = configured(tmp_path, photos, f"tokenizer.output={tmp_path}/codes.pt", script=tokenizer)
    model = tokenizer.build_vqkd(config, 108).eval()
    (tmp_path / "out/tokenizer").mkdir(parents=True)
    torch.save({"model": model.state_dict(), "config": as_dict(config)}, tmp_path / "out/tokenizer/last.pt")
    samples = ValSamples(open_files(str(photos)), 16)
    want = model.token_ids(to_unit(torch.stack([samples[i]["image"] for i in (0, 2, 3, 4)]))).view(4, 4, 4)
    assert len(want.unique()) > 4
    (photos / "b.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="b.jpg' cannot be read .*; the codes of the others are in .*codes.pt"):
        use.encode(config, tokenizer.load_tokenizer)
    saved = torch.load(tmp_path / "codes.pt", weights_only=True)
    assert torch.equal(saved["codes"], want) and len(saved["files"]) == 4
    with pytest.raises(UserError, match="b.jpg' cannot be read .*: repair or remove it$"):
        use.encode(configured(tmp_path, photos, script=tokenizer), tokenizer.load_tokenizer)
    printed = capsys.readouterr().out.partition(f"{photos}/caf\\xe9.png\n")[2].splitlines()[:4]
    assert [[int(number) for number in row.split()] for row in printed] == want[1].tolist()


@pytest.mark.parametrize("ours", [True, False])
def test_an_export_for_transformers(tmp_path, photos, capsys, ours):
    """Heads, pooling and classes are those of the checkpoint, and of the configuration where it does not say them."""
    model = save_classifier(tmp_path, photos, num_heads=2, pooling="cls", ours=ours)
    use.export(configured(tmp_path, photos, "finetune.pooling=mean"))
    folder = tmp_path / "out/export/transformers"
    written = json.loads((folder / "config.json").read_text())
    assert written["num_attention_heads"] == 2 and written["use_mean_pooling"] is False and written["image_size"] == 16
    want = ["cat", "dog", "caf\\xe9"] if ours else ["class 0", "class 1", "class 2"]
    assert list(written["id2label"].values()) == want
    size = 4 * sum(value.numel() for value in model.state_dict().values())
    assert size < (folder / "model.safetensors").stat().st_size < size + 20_000
    assert f"for transformers.BeitForImageClassification '{folder}'" in capsys.readouterr().out


def test_an_export_of_a_model_that_transformers_does_not_have(tmp_path, photos, capsys):
    state = save_classifier(tmp_path, photos).state_dict()
    headless = {name: value for name, value in state.items() if not name.startswith("head")}
    torch.save(headless, tmp_path / "out/finetune/best.pt")
    use.export(configured(tmp_path, photos))
    assert sorted(os.listdir(tmp_path / "out/export")) == ["published.pth", "timm.pth"]
    assert "transformers" not in capsys.readouterr().out


def test_two_processes_share_the_images(tmp_path, photos):
    """An odd number of them, one unreadable, which only one of the two has met: results as of one process."""
    save_classifier(tmp_path, photos)
    (photos / "b.jpg").write_bytes(b"no image")
    with pytest.raises(UserError) as alone:
        use.predict(configured(tmp_path, photos))
    want = lines(tmp_path)
    assert len(want) == 4
    (tmp_path / "out/predict/predictions.txt").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               CODE / "finetune.py", tmp_path / "small.yaml", f"output_dir={tmp_path}/out", "finetune.mode=predict",
               f"finetune.images={photos}"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200, cwd=CODE)
    assert done.returncode == 1 and str(alone.value) in done.stderr
    assert lines(tmp_path) == want
