"""The tokenizer's own parts: the quantizer's bookkeeping, usage and collapse.

What the published code computes is compared in test_parity.py; the training loop, alone and in two processes, in
test_scripts.py.
"""

import contextlib
import math
import types

import pytest
import torch
import torch.nn.functional as F

import tokenizer as vqkd
from support.errors import UserError
from support.teacher_codes import TeacherTokenizer
from support.teachers import Pixels


def quantizer(codes=8, dim=4, **options) -> vqkd.Quantizer:
    torch.manual_seed(0)
    return vqkd.Quantizer(codes, dim, **options).train()


# -- The quantizer ----------------------------------------------------------------------------------------------


def test_nearest_code_is_that_of_brute_force_in_any_chunks():
    torch.manual_seed(0)
    z, codebook = torch.randn(50, 4), torch.randn(8, 4)
    expected = (z[:, None] - codebook).square().sum(dim=2).argmin(dim=1)
    for chunk in (1, 7, 100):
        assert torch.equal(vqkd.nearest_code(z, codebook, chunk), expected)


def test_the_gradient_passes_straight_through_to_z_and_never_to_the_codes():
    q = quantizer()
    z = torch.randn(2, 3, 4, requires_grad=True)
    codes, ids, _ = q(z)
    assert torch.allclose(codes, q.embedding(ids), atol=1e-6)
    weights = torch.randn(2, 3, 4)
    (codes * weights).sum().backward()
    same = z.detach().clone().requires_grad_()
    (F.normalize(same, dim=-1) * weights).sum().backward()
    assert torch.allclose(z.grad, same.grad) and q.embedding.weight.grad is None


def test_codes_move_once_per_step_from_summed_counts():
    """Two micro-batches and one update are one batch and one update; codes without a hit stay where they were."""
    parts, whole = quantizer(codes=32), quantizer(codes=32)
    z = torch.randn(4, 5, 4)
    before = parts.embedding.weight.clone()
    parts(z[:2]), parts(z[2:]), whole(z)
    hits = parts.update(seed=0)
    assert torch.equal(hits, whole.update(seed=0)) and hits.sum() == 20
    assert torch.allclose(parts.embedding.weight, whole.embedding.weight, atol=1e-6)
    moved = (parts.embedding.weight - before).abs().amax(dim=1) > 1e-6
    assert not moved[hits == 0].any() and moved[hits > 0].all()
    assert torch.allclose(parts.embedding.weight.norm(dim=1), torch.ones(32))


def test_evaluation_counts_and_moves_nothing():
    q = quantizer().eval()
    q(torch.randn(2, 3, 4))
    assert q.counts.sum() == 0 and q.sums.abs().sum() == 0 and not q.seen


def test_codes_are_fp32_under_autocast():
    """In half precision neighbouring codes fall together: ids must be those of float32."""
    q, z = quantizer(codes=512, dim=8), torch.randn(4, 64, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes, ids, loss = q(z)
    assert codes.dtype == loss.dtype == torch.float32
    assert torch.equal(ids, q(z)[1])


def test_dead_codes_return_on_vectors_of_the_batch_and_living_ones_stay():
    q = quantizer(codes=16, ema_decay=0.5, revive_below=0.3)
    with torch.no_grad():
        q.embedding.weight.copy_(F.normalize(torch.tensor([[1.0, 0.02 * i, 0, 0] for i in range(16)]), dim=1))
    z = torch.tensor([[-1.0, 0.1, 0, 0], [-1.0, 0, 0.1, 0]]).expand(1, 2, 4)
    for step in range(2):  # an unhit code's count falls from 1 to .5 to .25
        q(z)
        q.remember()
        dead = q.running_count.clone() * 0.5 + 0.5 * q.counts < 0.3
        before = q.embedding.weight.clone()
        q.update(seed=step)
    assert dead.sum() == 15, "one code, the nearest, has all the hits"
    assert (F.normalize(z[0], dim=1) @ q.embedding.weight[dead].T).amax(dim=0).min() > 0.999
    mean = F.normalize(F.normalize(z[0], dim=1).mean(dim=0), dim=0)
    averaged = F.normalize(0.5 * before[~dead] + 0.5 * mean, dim=1)
    assert torch.allclose(q.embedding.weight[~dead], averaged, atol=1e-6), "a living code only follows its average"
    assert torch.equal(q.running_count[dead], torch.ones(15)) and not q.seen


def test_kmeans_finds_separate_clusters_alike_for_every_order_of_magnitude():
    torch.manual_seed(1)
    centres = F.normalize(torch.randn(6, 16), dim=1)
    z = (centres.repeat(50, 1) + 0.05 * torch.randn(300, 16)) * torch.rand(300, 1).add(0.1)
    q = quantizer(codes=24, dim=16)
    q.init_from(z, seed=0)
    best = (centres @ q.embedding.weight.T).amax(dim=1)
    assert best.min() > 0.97 and torch.allclose(q.embedding.weight.norm(dim=1), torch.ones(24), atol=1e-5)


def test_kmeans_with_fewer_vectors_than_codes():
    q = quantizer(codes=24)
    q.init_from(torch.randn(5, 4), seed=0)
    assert q.embedding.weight.isfinite().all()


# -- Usage ------------------------------------------------------------------------------------------------------


def test_perplexity_is_the_number_of_equally_used_codes():
    assert vqkd.perplexity(torch.tensor([3.0, 3, 3, 0])).item() == pytest.approx(3)
    assert vqkd.perplexity(torch.tensor([7.0, 0, 0, 0])).item() == pytest.approx(1)
    p = torch.tensor([0.5, 0.25, 0.25])
    assert vqkd.perplexity(8 * p).item() == pytest.approx(math.exp(-(p * p.log()).sum()))


def test_usage_can_be_full_while_perplexity_shows_the_collapse():
    usage = vqkd.CodeUsage(100, torch.device("cpu"))
    usage.add(torch.ones(100))
    usage.add(torch.nn.functional.one_hot(torch.tensor(3), 100) * 1e6)
    figures = usage.figures()
    assert figures["usage"] == 1 and figures["perplexity"] < 1.01


def test_a_collapse_ends_the_run_with_advice_but_not_during_warm_up():
    vqkd.check_collapse(7.0, 1024, epoch=0, warmup_epochs=2)
    vqkd.check_collapse(500.0, 1024, epoch=5, warmup_epochs=2)
    with pytest.raises(UserError, match="about 7 are in use.*revive_below=0.1"):
        vqkd.check_collapse(7.0, 1024, epoch=1, warmup_epochs=2)
    with pytest.raises(UserError, match="of 64 codes about 2 are in use"):
        vqkd.check_collapse(2.1, 64, epoch=1, warmup_epochs=0)
    vqkd.check_collapse(1.9, 2, epoch=1, warmup_epochs=0)  # all of them


def test_a_mean_start_gives_the_mean_of_the_teacher_whatever_the_code():
    """`start_from_first_batch` on two micro-batches: the decoder's output is the teacher's mean direction everywhere."""
    torch.manual_seed(0)
    config = types.SimpleNamespace(seed=0, tokenizer=vqkd.TokenizerConfig(mean_start=True, kmeans_init=False))
    width = dict(embed_dim=8, depth=1, num_heads=2)
    model = vqkd.VQKD(16, 4, width, width, codebook_size=4, codebook_dim=4, teacher_dim=6)
    batches = [{"image": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)} for _ in range(2)]
    teacher = lambda images: images.flatten(1)[:, :96].view(-1, 16, 6) + 0.1  # noqa: E731
    run = types.SimpleNamespace(config=config, autocast=contextlib.nullcontext, first_batches=lambda: batches)
    codebook = model.quantize.embedding.weight.clone()
    vqkd.start_from_first_batch(run, model, lambda batch: teacher(batch["image"] / 255))
    assert torch.equal(model.quantize.embedding.weight, codebook)
    features = torch.cat([teacher(batch["image"] / 255) for batch in batches])  # [4, 16, 6]
    mean = F.normalize(features, dim=-1).mean(dim=(0, 1))
    assert torch.allclose(model.decode(torch.randn(3, 16, 4)), F.normalize(mean, dim=0).expand(3, 16, 6), atol=1e-6)


def test_gradients_have_the_strides_of_their_weights():
    """Else DistributedDataParallel copies them, and warns in each process."""
    model = vqkd.VQKD(64, 16, dict(embed_dim=192, depth=1, num_heads=3), dict(embed_dim=192, depth=1, num_heads=3),
                      codebook_size=16, codebook_dim=32, teacher_dim=6)
    model.decode(torch.randn(16, 16, 32)).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is None or weight.grad.stride() == weight.stride(), name


# -- codes to compare with ---------------------------------------------------------------------------


def test_kmeans_codes_of_a_teacher_are_the_nearest_means_of_its_features():
    torch.manual_seed(0)
    model = TeacherTokenizer(Pixels(4), 2, vqkd.Quantizer(5, 48), about={}).eval()
    images = torch.rand(3, 3, 8, 8)
    features = Pixels(4)(images)
    cosine = F.normalize(features, dim=-1) @ model.vectors.T  # [3, 4, 5]
    assert torch.equal(model.token_ids(images), cosine.argmax(dim=-1))
    loss, _, ids = model(images, features)
    assert torch.equal(ids, cosine.argmax(dim=-1)) and torch.allclose(loss, 1 - cosine.amax(dim=-1).mean(), atol=1e-6)


def test_a_bag_of_codes_forgets_order_and_tames_frequent_codes():
    ids = torch.tensor([[0, 2, 2, 2, 2], [2, 0, 2, 2, 2]])
    assert torch.equal(vqkd.bag_of_ids(ids, 4), torch.tensor([[1.0, 0, 2, 0]]).expand(2, 4))


def test_the_bag_of_codes_tells_whether_codes_mean_anything():
    """Codes that name an image's class give all of its neighbours that class; constant codes leave it to chance."""
    labels = torch.arange(40) % 4

    def accuracy(code_of, knn=True, classes=4):
        class Model(torch.nn.Module):
            num_ids = 8

            def token_ids(self, images):
                return code_of((images[:, 0, 0, 0] * 255).long())[:, None].expand(-1, 16)

            def forward(self, images, features):
                return torch.tensor(0.5), None, self.token_ids(images)

        class Loader(list):
            chosen = range(len(labels))

        images = labels[:, None, None, None].expand(-1, 3, 4, 4).to(torch.uint8)
        batches = Loader({"image": i, "label": l if classes else 0 * l, "readable": l >= 0} for i, l in zip(images.split(7), labels.split(7)))
        run = types.SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext)
        return vqkd.evaluate(run, Model(), lambda batch: None, batches, batches if knn else None, classes)

    meaningful, empty = accuracy(lambda label: label + 3), accuracy(lambda label: 0 * label)
    assert meaningful["bag_knn"] == 1 and empty["bag_knn"] == 0.25
    assert meaningful["one_class"] == 1 and empty["one_class"] == 0
    assert accuracy(lambda label: label.clamp(min=1))["one_class"] == 1  # two classes share code 1, half and half
    assert accuracy(lambda label: (label == 3).long())["one_class"] == 0.5  # three classes share code 0
    unlabelled = accuracy(lambda label: label + 3, knn=False, classes=0)
    assert unlabelled.keys() == {"cosine_loss", "usage", "perplexity"} and unlabelled["usage"] == 4 / 8
    assert abs(meaningful["perplexity"] - 4) < 1e-6 and meaningful["cosine_loss"] == 0.5
    without = accuracy(lambda label: label + 3, knn=False)
    assert without == {name: value for name, value in meaningful.items() if name != "bag_knn"}
    unlabelled = accuracy(lambda label: label + 3, knn=False, classes=0)
    assert unlabelled.keys() == {"cosine_loss", "usage", "perplexity"} and unlabelled["usage"] == 4 / 8
