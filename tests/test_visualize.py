"""What the page says: which patch has which code, which token attends to which."""

import dataclasses
import html
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

CODE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CODE))
import data  # noqa: E402
import pretrain  # noqa: E402
import tokenizer as vqkd  # noqa: E402
import visualize  # noqa: E402
from beitv2 import Classifier, MaskedImageModel, VisionTransformer, take  # noqa: E402
from support.cls_swap import another_image  # noqa: E402
from support.datasets import Shapes  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.pixel_decoder import train_pixel_decoder  # noqa: E402
from support.words import most_frequent  # noqa: E402


def config(**options):
    return types.SimpleNamespace(pretrain=pretrain.PretrainConfig(num_masked=5, min_block=2),
                                 visualize=visualize.VisualizeConfig(**options),
                                 data=data.DataConfig("shapes", image_size=16))


def masks(count: int, wanted) -> torch.Tensor:
    return data.fixed_masks(count, 4, wanted.pretrain)


# -- codes --------------------------------------------------------------------------------------------------------


def test_codes_to_show():
    ids = torch.tensor([[[3, 3], [3, 5]], [[5, 1], [9, 3]]])
    assert visualize.choose_codes(ids, visualize.VisualizeConfig(num_codes=2), 12) == [3, 5]
    chosen = visualize.choose_codes(ids, visualize.VisualizeConfig(choose="random"), 12)
    assert sorted(chosen) == [1, 3, 5, 9]
    assert visualize.choose_codes(ids, visualize.VisualizeConfig(codes=[11, 0]), 12) == [11, 0]
    with pytest.raises(UserError, match="code 12, and the codebook has 12"):
        visualize.choose_codes(ids, visualize.VisualizeConfig(codes=[12]), 12)


def test_an_image_without_labels_is_called_by_its_file():
    seen = visualize.Seen(torch.zeros(2, 3, 8, 8), torch.tensor([1, 0]), ["a/x.jpg", "a/y.jpg"], ["cat", "dog"])
    assert [seen.caption(i) for i in (0, 1)] == ["dog", "cat"]
    seen.classes = []
    assert [seen.caption(i) for i in (0, 1)] == ["x.jpg", "y.jpg"]


# -- predictions --------------------------------------------------------------------------------------------------


def test_hits_and_beliefs_are_those_of_the_model():
    torch.manual_seed(0)
    model = MaskedImageModel(vocab_size=9, early_layers=1, head_layers=1, image_size=16, patch_size=4, embed_dim=16,
                             depth=2, num_heads=2, rel_pos_bias="shared").eval()
    images, ids = torch.randint(0, 256, (3, 3, 16, 16)).byte(), torch.randint(0, 9, (3, 4, 4))
    said = visualize.predict_masked(model, images, ids, masks(3, config()))
    assert said.masked.shape == said.truth.shape == (3, 5)
    assert said.hits.keys() == said.top.keys() == said.share.keys() == {"mim", "cls"}
    for name, logits in zip(model.prediction_names, model(data.normalize(images / 255), said.masked)):
        assert said.top[name].shape == said.share[name].shape == (3, 5, 5)
        for i in range(3):
            for m in range(5):
                place = int(said.masked[i, m])
                assert said.truth[i, m] == ids[i, place // 4, place % 4]
                assert said.hits[name][i, m] == (logits[i, m].argmax() == said.truth[i, m])
                assert said.top[name][i, m].tolist() == logits[i, m].argsort(descending=True)[:5].tolist()
        assert torch.allclose(said.share[name], logits.softmax(dim=-1).gather(2, said.top[name]), atol=1e-6)


# -- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(rel_pos_bias="shared"), dict(rel_pos_bias="per_block"), dict(num_registers=2)])
def test_attention_is_that_of_the_block(options):
    """Values weighted by it, through the output projection, are what the block's attention gives."""
    torch.manual_seed(0)
    model = VisionTransformer(image_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, **options).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    images = torch.randn(2, 3, 16, 16)
    maps = visualize.attention_maps(model, images, 2)
    tokens = 17 + options.get("num_registers", 0)
    assert maps.shape == (2, 2, tokens, tokens) and torch.allclose(maps.sum(dim=-1), torch.ones(2, 2, tokens), atol=1e-5)
    given = []
    attention = model.blocks[1].attn
    attention.register_forward_hook(lambda _, inputs, output: given.append((inputs[0], output)))
    model.features(images)
    x, output = given[0]
    _, _, values = attention.queries_keys_values(x)
    assert torch.allclose(attention.proj((maps @ values).transpose(1, 2).flatten(2)), output, atol=1e-4)


# -- pixels, features ---------------------------------------------------------------------------------------------


def test_the_pixel_decoder_learns_what_codes_say():
    """A tokenizer whose codes are the brightness of patches: after a few steps the decoder paints that brightness."""
    class Brightness(torch.nn.Module):
        grid = 4  # and no `encoder`: a TeacherTokenizer has none

        def __init__(self):
            super().__init__()
            self.vectors = torch.randn(4, 6)

        def token_ids(self, images):
            return (F.avg_pool2d(images.mean(dim=1), 4) * 3.999).long().flatten(1)

    torch.manual_seed(0)
    tokenizer = Brightness()
    samples = data.TrainSamples(Shapes("train", 64, 16), 0, 16, (0.7, 1.0))
    decoder = train_pixel_decoder(tokenizer, samples, 120, torch.device("cpu"))
    ids = torch.tensor([[[0, 3], [3, 0]]]).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    painted = decoder(ids)[0].mean(dim=0)
    dark, bright = painted[:8, :8].mean(), painted[:8, 8:].mean()
    assert painted.shape == (16, 16) and bright > dark + 0.2


def test_principal_components_keep_the_most_of_the_variance():
    torch.manual_seed(0)
    features = torch.randn(100, 6) * torch.tensor([5.0, 3.0, 1, 1, 1, 1]) + 7
    points = visualize.principal_components(features)
    eigenvalues = torch.linalg.eigvalsh(features.T.cov()).flip(0)
    assert torch.allclose(points.T.cov(), torch.diag(eigenvalues[:2]), atol=1e-2)


def test_nearest_images():
    features = torch.tensor([[1.0, 0], [10, 1], [0, 1], [-1, 0], [1, 1]])
    assert visualize.nearest_images(features, 0, 3) == [1, 4, 2]


@pytest.mark.parametrize("teacher", ["hog", "pixels"])
def test_a_teacher_without_attention_is_left_out(teacher):
    wanted = config()
    wanted.device, wanted.threads, wanted.tokenizer = "cpu", 0, vqkd.TokenizerConfig(teacher=teacher)
    wanted.model = types.SimpleNamespace(patch_size=4)
    with pytest.raises(UserError, match=f"the teacher is {teacher}, which has no attention"):
        visualize.Models(wanted, types.SimpleNamespace(images=torch.zeros(1))).teacher


# -- sections of the page -----------------------------------------------------------------------------------------


@pytest.fixture
def parts():
    """(config, seen, models) of twelve images of three classes, with real ids and a real model of stage 2."""
    torch.manual_seed(0)
    wanted = config(num_codes=3, shown=4)
    seen = visualize.Seen(torch.randint(0, 256, (12, 3, 16, 16)).byte(), torch.arange(12) % 3,
                          [f"x/{i}.png" for i in range(12)], ["cat", "<dog>", "owl"])
    model = MaskedImageModel(vocab_size=9, early_layers=1, head_layers=1, image_size=16, patch_size=4, embed_dim=16,
                             depth=2, num_heads=2).eval()
    models = types.SimpleNamespace(ids=torch.randint(0, 9, (12, 4, 4)), vectors=torch.randn(9, 5), pretrained=model)
    return wanted, seen, models


class NothingYet:
    """Models of a run that has done stage 1 alone."""

    def __init__(self, models):
        self.ids, self.vectors = models.ids, models.vectors

    def __getattr__(self, name):
        raise UserError(f"there is no {name} <yet>")


def test_one_image_goes_through_all_stages_and_the_others_beside_it(parts):
    wanted, seen, models = parts
    models.finetuned = Classifier(3, image_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2).eval(), seen.classes
    page = visualize.way_section(*parts)
    chosen = visualize.shown_images(wanted, seen)
    said = visualize.predict_masked(models.pretrained, seen.images[chosen], models.ids[chosen], masks(12, wanted)[chosen])
    assert page.count("<img ") == 4 * 5 + 2 * 3 * 6, "image, codes, mask and two predictions; three patches, six pictures each"
    for name, title in (("mim", "backbone"), ("cls", "aggregation head")):
        for j in range(4):
            assert f"<figcaption>{title}: {int(said.hits[name][j].sum())} right</figcaption>" in page
        for m in range(3):
            code, share = int(said.top[name][0, m, 0]), float(said.share[name][0, m, 0])
            mark = " ✓" if code == said.truth[0, m] else ""
            assert f"<figcaption>{code}: {100 * share:.0f} %{mark}</figcaption>" in page
    assert "&lt;dog&gt; " in page.partition("sees in the whole image")[2] and "<dog>" not in page


def test_what_is_missing_leaves_the_codes(parts):
    wanted, seen, models = parts
    page = visualize.way_section(wanted, seen, NothingYet(models))
    assert page.count("<img ") == 4 * 2 and "there is no pretrained &lt;yet&gt;" in page and "no finetuned" in page


def test_images_without_labels_are_shown_without_classes(parts):
    """A section that would name classes says once that it cannot."""
    wanted, seen, models = parts
    for section in (visualize.words_section, visualize.neighbours_section):
        labelled = section(*parts)
        assert "cat" in labelled and visualize.NO_LABELS not in labelled
        bare = section(wanted, dataclasses.replace(seen, classes=[]), models)
        assert bare.count(visualize.NO_LABELS) == 1 and "cat" not in bare
        assert bare.count("<img ") == labelled.count("<img ") > 10


def test_words_of_drawn_shapes_are_named_by_shape_and_part(parts):
    """Codes that are the parts themselves are pure by part."""
    wanted, _, models = parts
    wanted.data, wanted.tokenizer = data.DataConfig("shapes", image_size=48, val_images=50, workers=0), vqkd.TokenizerConfig()
    wanted.model, wanted.tokenizer.teacher = types.SimpleNamespace(patch_size=12), "hog"
    seen = visualize.look(wanted)
    models.ids = ids = seen.parts
    page = visualize.words_section(wanted, seen, models)
    own, chance = re.findall(r"<td>([\d.]+)\s%</td>", page.partition("the tokenizer&#x27;s codes")[2])[2:4]
    assert own == "100.0" and 20 < float(chance) < 80
    edges = seen.labels[:, None, None].expand_as(ids)[ids == 2]
    shapes = most_frequent(edges, seen.classes)
    assert f"<b>code 2:</b> edge 100\N{NO-BREAK SPACE}%; shapes: {shapes}<br>" in page
    assert "<b>code 0:</b> background 100\N{NO-BREAK SPACE}%<br>" in page
    assert "k-means of HOG features" in page and "k-means of the teacher" not in page


def test_parts_are_those_of_the_crop_that_is_shown(parts, monkeypatch):
    """Where the picture is the drawn shape in white, patches inside are white and those of background black."""
    wanted, _, _ = parts
    wanted.data, wanted.model = data.DataConfig("shapes", image_size=48, val_images=50, workers=0), types.SimpleNamespace(
        patch_size=12)
    white = lambda self, i: torch.from_numpy(255 * self.segmentation(i).clip(0, 1)).expand(3, -1, -1)  # noqa: E731
    monkeypatch.setattr(Shapes, "load", white)
    monkeypatch.setattr(Shapes, "drawn_crops", {})  # none is kept from other tests
    seen = visualize.look(wanted)
    patches = seen.images[:, 0].unfold(1, 12, 12).unfold(2, 12, 12).flatten(3).float().mean(dim=-1)  # [n, grid, grid]
    assert patches[seen.parts == 0].max() < 10 < 245 < patches[seen.parts == 1].min()
    assert [int((seen.parts == part).sum()) > 20 for part in range(4)] == [True] * 4


def test_purity_of_images_that_were_not_drawn_is_not_shown(parts):
    page = visualize.words_section(*parts)
    assert "purity" not in page and "in images of " in page


# -- [CLS] --------------------------------------------------------------------------------------------------------


def test_the_bars_and_pictures_of_cls_are_its_hits(parts, monkeypatch):
    wanted, seen, models = parts
    generator, asked = torch.Generator().manual_seed(0), []
    hits = {name: torch.rand(12, 5, generator=generator) < share for name, share in (
        ("mim_accuracy", 0.9), ("cls_accuracy", 0.7), ("cls_accuracy_swapped", 0.5), ("cls_accuracy_mean", 0.3))}
    assert len({float(hit.float().mean()) for hit in hits.values()}) == 4
    monkeypatch.setattr(visualize, "hits_by_cls", lambda model, batches, readable: asked.extend(batches) or hits)
    page = visualize.cls_section(*parts)

    masked = masks(12, wanted)
    for given, expected in zip(zip(*asked, strict=True), (seen.images, masked, take(models.ids.flatten(1), masked))):
        assert torch.equal(torch.cat(given), expected)
    shares = [f"{100 * hits[name].float().mean():.1f} %" for name in hits]
    assert re.findall(r">([\d.]+ %)</text>", page) == shares[1:] and f"The backbone names {shares[0]}" in page
    lost = (hits["cls_accuracy"].sum(dim=1) - hits["cls_accuracy_swapped"].sum(dim=1)) / 0.05  # of five, in points
    assert f"Own less foreign: {lost.mean():.2f} ± {lost.std() / 12**0.5:.2f} points" in page
    chosen, givers = visualize.shown_images(wanted, seen), another_image(12)
    expected = [text for i in chosen for text in (
        seen.caption(i), f"its own [CLS]: {int(hits['cls_accuracy'][i].sum())} right",
        f"another image: {seen.caption(int(givers[i]))}",
        f"with its [CLS]: {int(hits['cls_accuracy_swapped'][i].sum())} right")]
    assert re.findall("<figcaption>(.*?)</figcaption>", page) == [html.escape(text) for text in expected]
    assert page.count("<img ") == 4 * 4


def test_the_page_asks_the_model_itself(parts):
    """In float32 on the page's images, with the model's own head."""
    shares = re.findall(r">([\d.]+) %</text>", visualize.cls_section(*parts))
    assert len(shares) == 3 and all(0 <= float(share) <= 100 for share in shares)


def test_a_model_without_a_head_has_no_cls_to_exchange(parts):
    wanted, seen, models = parts
    models.pretrained = MaskedImageModel(vocab_size=9, head_layers=0, image_size=16, patch_size=4, embed_dim=16,
                                         depth=2, num_heads=2)
    with pytest.raises(UserError, match="without an aggregation head"):
        visualize.cls_section(wanted, seen, models)
