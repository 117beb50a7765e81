"""Assignment 3: vector quantization."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import tokenizer as vqkd  # noqa: E402

pytestmark = pytest.mark.assignment(3)


def quantizer(codes: int = 8, dim: int = 4, **options) -> vqkd.Quantizer:
    torch.manual_seed(0)
    return vqkd.Quantizer(codes, dim, **options).train()


def nearest_of(monkeypatch, ids: torch.Tensor) -> None:
    """Let the quantizer's forward find these ids of nearest codes, so that a test needs nothing else."""
    monkeypatch.setattr(vqkd, "nearest_code", lambda z, codebook, *options: ids.flatten())


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# -- nearest_code -------------------------------------------------------------------------------------------------


def test_the_nearest_code_has_the_smallest_euclidean_distance():
    torch.manual_seed(0)
    z, codebook = torch.randn(200, 4), torch.randn(8, 4) * torch.linspace(0.2, 3, 8)[:, None]
    expected = (z[:, None] - codebook).square().sum(dim=2).argmin(dim=1)
    found = vqkd.nearest_code(z, codebook)
    assert found.shape == (200,) and found.dtype == torch.int64, \
        f"the ids of the codes nearest to z [200, 4] should be int64 [200], but are {found.dtype} {list(found.shape)}"
    wrong = (found != expected).sum().item()
    assert wrong == 0, \
        f"{wrong} of 200 vectors should have another code: does the code's own length count in |z - w|^2, and is the " \
        f"smallest distance taken?"


def test_the_nearest_codes_do_not_depend_on_the_chunks():
    torch.manual_seed(0)
    z, codebook = torch.randn(50, 4), torch.randn(8, 4)
    whole = vqkd.nearest_code(z, codebook, 100)
    for chunk in (1, 7):
        assert torch.equal(vqkd.nearest_code(z, codebook, chunk), whole), \
            f"chunks of {chunk} should give the same ids as one chunk, but do not"


# -- Quantizer.forward --------------------------------------------------------------------------------------------


def test_forward_returns_the_nearest_codes_of_the_direction_of_z(monkeypatch):
    q, seen = quantizer().eval(), []

    def nearest(z, codebook, *options):
        seen.append(z)
        return (z @ codebook.T).argmax(dim=1)

    monkeypatch.setattr(vqkd, "nearest_code", nearest)
    for images in (1, 2):  # ids [3] instead of [1, 3] raise no error on the way to this message; [6] and [2, 3] would
        z = torch.randn(images, 3, 4) * 5
        codes, ids, _ = q(z)
        assert ids.shape == (images, 3) and codes.shape == (images, 3, 4), \
            f"for z [{images}, 3, 4] the codes should be [{images}, 3, 4] and ids [{images}, 3], but are " \
            f"{list(codes.shape)} and {list(ids.shape)}: nearest_code returns a flat list of ids"
    lengths = seen[-1].norm(dim=-1)
    assert torch.allclose(lengths, torch.ones(6), atol=1e-5), \
        "z should have length 1 before its nearest code is looked for (equation 1), but has up to " \
        f"{lengths.max():.2f}: is the l2 normalisation missing?"
    assert torch.allclose(codes, q.embedding.weight[ids], atol=1e-5), \
        "the returned codes should be the rows `ids` of the codebook, but are not"


def test_forward_is_float32_under_autocast():
    q, z = quantizer(codes=512, dim=8).eval(), 0.1 * torch.randn(1, 200, 8)
    ids = q(z)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wrong = (q(z)[1] != ids).sum().item()
    assert wrong == 0, \
        f"under autocast {wrong} of 200 vectors get another code: is it turned off in forward, for float32 distances?"


def test_the_gradient_passes_straight_through(monkeypatch):
    q = quantizer().eval()
    nearest_of(monkeypatch, torch.tensor([[3, 1, 1]]))
    z = torch.randn(1, 3, 4, requires_grad=True)
    codes = q(z)[0]
    upstream = torch.randn(1, 3, 4)
    assert codes.requires_grad, \
        "the codes should pass a gradient on to z, but are cut off from it: is the straight-through estimator missing?"
    codes.backward(upstream)
    same = z.detach().clone().requires_grad_()
    F.normalize(same, dim=-1).backward(upstream)
    assert torch.allclose(z.grad, same.grad, atol=1e-5), \
        "the gradient of l2(z) should equal the gradient of the code, but differs by " \
        f"{difference(z.grad, same.grad):.2g}: is the straight-through estimator missing, or applied to z instead of " \
        "l2(z)?"


def test_the_commitment_loss_pulls_z_and_leaves_the_codes_alone(monkeypatch):
    q = quantizer(commitment_beta=0.3).eval()  # not 1/D: a wrong mean should not look like a missing beta
    q.embedding.weight.requires_grad_(True)  # so that a gradient would show
    ids = torch.tensor([[3, 1, 1]])
    nearest_of(monkeypatch, ids)
    z = torch.randn(1, 3, 4, requires_grad=True)
    loss = q(z)[2]
    expected = 0.3 * (F.normalize(z, dim=-1) - q.embedding.weight[ids]).square().mean()
    assert loss.shape == (), f"the commitment loss should be one number, but is {list(loss.shape)}"
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-4), \
        f"the commitment loss should be beta times the mean square of l2(z) - code, {expected.item():.4f}, but is " \
        f"{loss.item():.4f}, {loss / expected:.2f} times as much: a mean over all elements, times commitment_beta " \
        "(here .3)?"
    assert loss.requires_grad, "the commitment loss should have a gradient for z, but has none: which side is detached?"
    pull, _ = torch.autograd.grad(loss, [z, q.embedding.weight], allow_unused=True)
    assert pull is not None and pull.abs().max() > 0, \
        "the commitment loss should pull z towards its code, but gives z no gradient: is the wrong side detached?"


def test_the_codebook_gets_no_gradient(monkeypatch):
    q = quantizer().eval()
    assert not q.embedding.weight.requires_grad, "the codebook should not want a gradient: it moves in `update`"
    ids = torch.tensor([[3, 1, 1]])
    nearest_of(monkeypatch, ids)
    z = torch.randn(1, 3, 4, requires_grad=True)
    before = q.embedding.weight.clone()
    codes, _, loss = q(z)
    (codes.sum() + loss).backward()
    assert torch.equal(q.embedding.weight, before) and q.embedding.weight.grad is None, \
        "forward and backward should leave the codebook alone, but it moved or got a gradient"


@pytest.mark.parametrize("training", [True, False])
def test_hits_are_counted_in_training_only(monkeypatch, training):
    q, calls = quantizer().train(training), []
    nearest_of(monkeypatch, torch.tensor([[3, 1, 1]]))
    monkeypatch.setattr(q, "count", lambda z, ids: calls.append((z, ids)))
    q(torch.randn(1, 3, 4, requires_grad=True))
    assert len(calls) == training, \
        f"forward should count hits once in training and never in evaluation, but {'in' if training else 'outside'} " \
        f"training it counts {len(calls)} times"
    for z, ids in calls:
        assert torch.allclose(z.norm(dim=-1), torch.ones(1, 3), atol=1e-5) and not z.requires_grad, \
            "what is counted should be l2(z), detached"


# -- Quantizer.count and update -----------------------------------------------------------------------------------


def hit(q: vqkd.Quantizer, z: torch.Tensor, ids: list[int]) -> None:
    q.count(F.normalize(z, dim=-1)[None], torch.tensor([ids]))


def test_count_adds_up_hits_and_vectors():
    q = quantizer()
    z = F.normalize(torch.randn(4, 4), dim=-1)
    hit(q, z[:3], [3, 1, 1])
    hit(q, z[3:], [1])
    assert q.counts.tolist() == [0, 3, 0, 1, 0, 0, 0, 0], \
        "after hits of 3, 1, 1 in one batch and of 1 in the next `counts` should be [0, 3, 0, 1, 0, 0, 0, 0], but is " \
        f"{q.counts.tolist()}: do hits add up, also when an id repeats inside a batch?"
    expected = torch.zeros(8, 4)
    expected[3], expected[1] = z[0], z[1:].sum(dim=0)
    assert torch.allclose(q.sums, expected, atol=1e-6), \
        "`sums` should hold the sum of the vectors that hit each code, but differs by " \
        f"{difference(q.sums, expected):.2g}: do they add up, also when an id repeats inside a batch?"


def test_count_keeps_the_vectors_if_codes_are_revived():
    z = F.normalize(torch.randn(2, 3, 4), dim=-1)
    q = quantizer(revive_below=0.5)
    q.count(z, torch.tensor([[3, 1, 1], [0, 2, 1]]))
    kept = q.latest
    assert kept is not None, "with `revive_below` above 0 count should keep z as `latest`, but keeps nothing"
    assert kept.shape == z.shape and torch.equal(kept, z), \
        f"count should keep z [2, 3, 4] as it is as `latest`, but keeps {list(kept.shape)} or other values"
    q = quantizer()
    q.count(z, torch.tensor([[3, 1, 1], [0, 2, 1]]))
    assert q.latest is None and not q.seen, \
        "without revival (`revive_below` 0) count should keep no vectors: they would only fill the memory"


def test_update_moves_codes_towards_the_mean_of_what_hit_them():
    q = quantizer(ema_decay=0.9)
    before = q.embedding.weight.clone()
    z = F.normalize(torch.randn(5, 4), dim=-1)
    q.counts[:] = torch.tensor([0, 0, 3, 0, 0, 2, 0, 0.0])
    q.sums[2], q.sums[5] = z[:3].sum(dim=0), z[3:].sum(dim=0)
    hits = q.update(seed=0)
    for code in (0, 1, 3, 4, 6, 7):
        assert torch.equal(q.embedding.weight[code], before[code]), \
            "a code that nothing hit should stay where it is, but moved"
    for code, mean in ((2, z[:3].mean(dim=0)), (5, z[3:].mean(dim=0))):
        expected = F.normalize(0.9 * before[code] + 0.1 * F.normalize(mean, dim=0), dim=0)
        length = q.embedding.weight[code].norm().item()
        assert abs(length - 1) < 1e-4, f"codes should keep length 1, but one has {length:.3f}: normalise after moving"
        assert torch.allclose(q.embedding.weight[code], expected, atol=1e-5), \
            "a code that was hit should be l2(decay w + (1 - decay) l2(mean of its vectors)), but differs by " \
            f"{difference(q.embedding.weight[code], expected):.2g}: is the mean normalised, and decay the share that " \
            "stays?"
    assert hits.tolist() == [0, 0, 3, 0, 0, 2, 0, 0], \
        f"update should return the hits of this step, [0, 0, 3, 0, 0, 2, 0, 0], but returns {hits.tolist()}"
    assert q.counts.sum() == 0 and q.sums.abs().sum() == 0, \
        "after update `counts` and `sums` should be zero for the next step, but are not"


def test_the_running_count_is_an_average_of_hits():
    q = quantizer(ema_decay=0.9)
    q.counts[2] = 5.0
    q.update(seed=0)
    expected = torch.full((8,), 0.9)
    expected[2] = 0.9 + 0.1 * 5
    assert torch.allclose(q.running_count, expected), \
        f"running_count should be decay * running_count + (1 - decay) * hits, {expected[2]:.2f} for a code with 5 " \
        f"hits and .90 for one without, but is {q.running_count[2]:.2f} and {q.running_count[0]:.2f}"


def test_dead_codes_start_anew_on_vectors_of_the_batch():
    q = quantizer(codes=8, revive_below=0.5, ema_decay=0.9)
    q.running_count[:4] = 0.1  # these four are dead, and nothing hits them
    before = q.embedding.weight.clone()
    z = F.normalize(torch.randn(6, 4), dim=-1)
    q.seen.append(z[None])
    q.update(seed=3)
    for code in range(8):
        distance = (z - q.embedding.weight[code]).norm(dim=1).min().item()
        if code < 4:
            assert distance < 1e-4, \
                f"a code whose running count is below revive_below should be put on a vector of the batch, but is " \
                f"{distance:.2f} away from the nearest one"
        else:
            assert torch.equal(q.embedding.weight[code], before[code]), "a living code should not be put elsewhere"
    assert len(q.embedding.weight[:4].unique(dim=0)) == 4, \
        "four dead codes should get four different vectors, but some share one"
    assert torch.allclose(q.running_count[:4], torch.ones(4)), \
        f"a revived code should begin with a running count of 1, but has {q.running_count[0]:.2f}: it would die " \
        "again at once"
    assert not q.seen, "after update `seen` should be empty, but still holds vectors"


def revival(seed: int, vectors: int = 8, global_seed: int = 0) -> torch.Tensor:
    """Where eight dead codes go, if there are so many vectors in the batch."""
    q = quantizer(codes=8, revive_below=0.5)
    q.running_count[:] = 0.1
    q.seen.append(batch_of(vectors))
    torch.manual_seed(global_seed)
    q.update(seed=seed)
    return q.embedding.weight.detach()


def batch_of(vectors: int, dim: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return F.normalize(torch.randn(1, vectors, dim, generator=generator), dim=-1)


def test_dead_codes_share_no_vector():
    for seed in range(5):
        different = len(revival(seed).unique(dim=0))
        assert different == 8, \
            f"eight dead codes and eight vectors: each code should get one of its own, but some share one and only " \
            f"{different} are used"


def test_revival_draws_by_its_seed_alone():
    found = [revival(seed, vectors=100, global_seed=number) for number, seed in enumerate((0, 1, 2, 0))]
    assert torch.equal(found[0], found[3]), \
        "the same seed should revive codes on the same vectors, but does not: draw from a generator of your own"
    assert not torch.equal(found[0], found[1]) or not torch.equal(found[0], found[2]), \
        "different seeds should revive codes on different vectors, but seeds 0, 1 and 2 choose alike: is `seed` used?"


def test_revival_looks_at_the_running_count_after_this_step():
    q = quantizer(codes=2, revive_below=0.5, ema_decay=0.9)
    q.running_count[:] = torch.tensor([0.52, 0.48])
    q.counts[1] = 5.0
    q.sums[1] = 5 * q.embedding.weight[1]
    before, z = q.embedding.weight.clone(), batch_of(6)
    q.seen.append(z)
    q.update(seed=0)
    moved = [not torch.allclose(new, old, atol=1e-4) for new, old in zip(q.embedding.weight, before)]
    assert moved == [True, False], \
        "with decay .9 and revive_below .5, a code whose running count falls from .52 to .468 should be revived, and " \
        "one that rises from .48 to .93 should not: average running_count before you look for dead codes"


# -- Several processes: the two functions of support/processes.py behave as if a second one took part -------------


def test_update_adds_up_counts_and_sums_of_all_processes(monkeypatch):
    q = quantizer(codes=4, ema_decay=0.9)
    before, z = q.embedding.weight.clone(), batch_of(1)[0, 0]
    q.counts[0], q.sums[0] = 2.0, 2 * z
    # The other process has hit the next code, with the same vectors.
    monkeypatch.setattr(vqkd, "all_reduce_sum", lambda tensor: tensor.add_(tensor.roll(1, dims=0)))
    hits = q.update(seed=0)
    assert hits.tolist() == [2, 2, 0, 0], \
        "with 2 hits of code 0 here and 2 of code 1 in another process update should count [2, 2, 0, 0], but counts " \
        f"{hits.tolist()}: call all_reduce_sum for `counts`"
    for code in (0, 1):
        assert torch.allclose(q.embedding.weight[code], F.normalize(0.9 * before[code] + 0.1 * z, dim=0), atol=1e-5), \
            "a code that another process hit should follow its vectors, but does not: call all_reduce_sum for " \
            "`sums`"


def test_dead_codes_may_take_the_vectors_of_all_processes(monkeypatch):
    q, shapes = quantizer(codes=8, revive_below=0.5), []

    def gather(tensor, total=None):
        shapes.append(list(tensor.shape))
        return torch.stack([tensor, -tensor], dim=1).flatten(0, 1)  # the other process has seen the opposite

    monkeypatch.setattr(vqkd, "gather_in_order", gather)
    q.running_count[:] = 0.1
    z = batch_of(4).view(2, 2, 4)  # two micro-batches of an image with two patches
    q.seen += [z[:1], z[1:]]
    q.update(seed=0)
    assert shapes, "update should gather `seen` over all processes: call gather_in_order"
    assert all(len(shape) == 3 for shape in shapes), \
        f"gather_in_order should get the images as rows, [B, N, C], but gets {shapes[0]}: flatten afterwards"
    distance = torch.cdist(torch.cat([z, -z]).flatten(0, 1), q.embedding.weight).min(dim=1).values.max()
    assert distance < 1e-4, \
        "eight dead codes should take the four vectors of this process and the four of another, but do not: is the " \
        "result of gather_in_order used?"


# -- Quantizer.init_from ------------------------------------------------------------------------------------------


def clusters(count: int = 4, each: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of different lengths around `count` directions that are far apart; and these directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(count)
    z = directions.repeat_interleave(each, dim=0) + 0.05 * torch.randn(count * each, count, generator=generator)
    return z * (0.5 + torch.rand(len(z), 1, generator=generator)), directions


def best_start(q: vqkd.Quantizer, z: torch.Tensor, directions: torch.Tensor) -> float:
    """k-means may end in a bad place. Of ten seeds, the best one's largest distance from a direction to its code."""
    worst = []
    for seed in range(10):
        q.init_from(z, seed=seed)
        worst.append(torch.cdist(directions, q.embedding.weight).min(dim=1).values.max().item())
    return min(worst)


def test_k_means_finds_clusters():
    z, directions = clusters()
    distance = best_start(quantizer(codes=4, dim=4), z, directions)
    assert distance < 0.05, \
        "k-means over four clusters should put a code into each, but the best of ten seeds misses one by " \
        f"{distance:.2f}"


def test_k_means_codes_have_length_one_whatever_the_vectors():
    q = quantizer(codes=6, dim=4)
    z, _ = clusters()
    q.init_from(3 * z, seed=0)
    lengths = q.embedding.weight.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(6), atol=1e-4), \
        f"after k-means the codes should have length 1, but have {lengths.min():.2f} to {lengths.max():.2f}"


def test_k_means_averages_directions():
    q = quantizer(codes=1, dim=2)
    q.init_from(torch.tensor([[8.0, 0], [0, 1]]), seed=0)
    assert torch.allclose(q.embedding.weight, torch.full((1, 2), 0.5**0.5), atol=1e-4), \
        "the one code of the vectors [8, 0] and [0, 1] should be [.71, .71], whatever their lengths, but is " \
        f"[{q.embedding.weight[0, 0]:.2f}, {q.embedding.weight[0, 1]:.2f}]: z needs l2 before k-means"


def test_k_means_with_more_codes_than_different_vectors():
    """Codes without a vector stay where they are: a mean over nothing is no number."""
    q = quantizer(codes=8, dim=4)
    q.init_from(torch.eye(4)[:3].repeat(2, 1), seed=0)
    assert q.embedding.weight.isfinite().all(), \
        "with 8 codes and 3 different vectors some codes have no vector: they should stay finite, but do not"
    lengths = q.embedding.weight.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(8), atol=1e-4), \
        f"codes without a vector should stay where they are, with length 1, but one has {lengths.min():.2f}"


def test_k_means_depends_on_its_seed_alone():
    z, _ = clusters()
    a, b = quantizer(codes=6), quantizer(codes=6)
    a.init_from(z, seed=5)
    torch.manual_seed(99)
    b.init_from(z, seed=5)
    assert torch.equal(a.embedding.weight, b.embedding.weight), \
        "the same seed should give the same codes, but does not: draw from a generator of your own"


# -- perplexity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts, expected", [([5, 5, 5, 5], 4.0), ([7, 0, 0, 0], 1.0), ([3, 3, 0, 0], 2.0),
                                              ([6, 2, 0, 0], math.exp(-.75 * math.log(.75) - .25 * math.log(.25)))])
def test_perplexity_says_how_many_codes_are_in_use(counts, expected):
    found = vqkd.perplexity(torch.tensor(counts, dtype=torch.float64))
    assert isinstance(found, torch.Tensor) and found.ndim == 0, \
        f"perplexity should return a tensor without dimensions, but returns {type(found).__name__}"
    found = found.item()
    assert math.isclose(found, expected, rel_tol=1e-4), \
        f"the perplexity of hits {counts} should be exp(entropy) = {expected:.3f}, but is {found:.3f}: with a " \
        "logarithm to base e, and 0 log 0 = 0?"
