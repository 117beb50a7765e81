"""The folder for transformers: what is in its files, and that transformers computes what our model computes."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from beitv2 import Classifier, MaskedImageModel, take  # noqa: E402
from support.transformers_format import write_safetensors, write_transformers  # noqa: E402

TINY = dict(image_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2)
OPTIONS = [dict(rel_pos_bias="per_block", layer_scale=0.1), dict(abs_pos_embed=True, layer_scale=0.1),
           dict(rel_pos_bias="shared", abs_pos_embed=True, mlp_ratio=2.0), dict()]
TABLE = "relative_position_bias.relative_position_bias_table"


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Fresh models have zero biases and tables, behind which a mistake could hide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    assert begin % 8 == 0
    header, tensors, end = json.loads(content[8:begin]), {}, 0
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert entry["dtype"] == "F32" and entry["data_offsets"][0] == end  # no gaps: readers refuse them
        end = entry["data_offsets"][1]
        part = bytearray(content[begin + entry["data_offsets"][0]:begin + end])
        tensors[name] = torch.frombuffer(part, dtype=torch.float32).view(entry["shape"])
    assert begin + end == len(content)
    return tensors


def test_tensors_in_the_file(tmp_path):
    """Parts of other tensors and half precision too."""
    tensors = {"a": torch.arange(12.0).view(3, 4)[:, 1:3], "ü": torch.tensor([0.1]).half(), "b": torch.ones(1, 2, 1)}
    write_safetensors(tensors, tmp_path / "x.safetensors")
    found = read_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value.float()) for name, value in tensors.items())


def test_names_and_configuration_of_a_classifier(tmp_path):
    """What shapes say is taken from them, whatever the arguments say."""
    state = randomised(Classifier(3, **TINY, **OPTIONS[0])).state_dict()
    assert write_transformers(state, tmp_path, 16, 224, "mean", ["a", "b", "c"]) == "BeitForImageClassification"
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = read_safetensors(tmp_path / "model.safetensors")
    expected = dict(model_type="beit", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
                    image_size=16, patch_size=4, layer_norm_eps=1e-6, use_mean_pooling=True,
                    use_relative_position_bias=True, use_shared_relative_position_bias=False,
                    use_absolute_position_embeddings=False,
                    id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    assert {name: config[name] for name in expected} == expected and config["layer_scale_init_value"] > 0
    layer = "beit.encoder.layer.1."
    key, table = state["blocks.1.attn.qkv.weight"][16:32], state["blocks.1.attn.relative_position_bias_table"]
    assert torch.equal(tensors[f"{layer}attention.attention.key.weight"], key)
    assert torch.equal(tensors[f"{layer}attention.attention.{TABLE}"], table)
    assert torch.equal(tensors[f"{layer}attention.output.dense.bias"], state["blocks.1.attn.proj.bias"])
    assert torch.equal(tensors[f"{layer}output.dense.weight"], state["blocks.1.mlp.fc2.weight"])
    assert torch.equal(tensors["beit.pooler.layernorm.weight"], state["fc_norm.weight"])
    assert len(tensors) == len(state) + 2 * 3  # one matrix becomes three in each block


def test_without_names_and_without_positions(tmp_path):
    state = randomised(Classifier(2, "cls", **TINY)).state_dict()
    write_transformers(state, tmp_path, 2, 32, "cls", [])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "class 0", "1": "class 1"} and config["layer_scale_init_value"] == 0
    assert (config["num_attention_heads"], config["image_size"], config["use_mean_pooling"]) == (2, 32, False)
    assert "beit.layernorm.weight" in read_safetensors(tmp_path / "model.safetensors")


def test_models_that_transformers_does_not_have(tmp_path):
    """Another pooling, no head, another kind of transformer: nothing is written."""
    classifier = randomised(Classifier(2, **TINY)).state_dict()
    headless = {name: value for name, value in classifier.items() if not name.startswith("head.")}
    foreign = {name: value for name, value in classifier.items() if not name.endswith("q_bias")}
    other = {"weight": torch.ones(1)}
    for state, pooling in ((classifier, "both"), (headless, "mean"), (foreign, "mean"), (other, "cls")):
        assert write_transformers(state, tmp_path / "none", 2, 16, pooling, []) is None
    assert not (tmp_path / "none").exists()


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def opened(transformers, kind: str, folder: Path) -> torch.nn.Module:
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, nothing unexpected
    return model.eval()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-6 * ours.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_classifier_in_transformers(transformers, tmp_path, pooling, options):
    model, images = randomised(Classifier(3, pooling, **TINY, **options)), torch.randn(2, 3, 16, 16)
    kind = write_transformers(model.state_dict(), tmp_path, 2, 16, pooling, ["a", "b", "c"])
    theirs = opened(transformers, kind, tmp_path)
    assert_same(model(images), theirs(images).logits)
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(rel_pos_bias="shared", layer_scale=0.1),
                                     dict(abs_pos_embed=True, shared_lm_head=False)], ids=str)
def test_the_pretrained_model_in_transformers(transformers, tmp_path, options):
    """The backbone's own prediction; the aggregation head's has no place there."""
    model = randomised(MaskedImageModel(vocab_size=11, early_layers=1, head_layers=2, **TINY, **options))
    theirs = opened(transformers, write_transformers(model.state_dict(), tmp_path, 2, 16, "cls", []), tmp_path)
    images, masked = torch.randn(2, 3, 16, 16), torch.tensor([[0, 3, 6, 12], [1, 2, 9, 15]])
    mask = torch.zeros(2, 16, dtype=torch.bool).scatter(1, masked, True)
    assert_same(model(images, masked)[0], take(theirs(images, bool_masked_pos=mask).logits, masked))
