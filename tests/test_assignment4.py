"""Assignment 4: VQ-KD, the teacher, the decoder and the loss."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import tokenizer as vqkd  # noqa: E402
from support.teachers import HOG  # noqa: E402

pytestmark = pytest.mark.assignment(4)


class Noting(nn.Module):
    """Stands in for a part of the model: notes its input, and returns what it was given to return."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        self.input = x
        return self.output(x) if callable(self.output) else self.output


def vq_kd(**parts) -> vqkd.VQKD:
    """A VQ-KD of 3 x 3 patches, width 8, codes of 4 numbers and a teacher of 5, with some parts replaced."""
    torch.manual_seed(0)
    small = dict(embed_dim=8, depth=1, num_heads=2)
    model = vqkd.VQKD(12, 4, small, small, codebook_size=6, codebook_dim=4, teacher_dim=5)
    with torch.no_grad():
        for layer in (model.encode_task_layer, model.decode_task_layer):
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape))
    for name, part in parts.items():
        setattr(model, name, part)
    return model.eval()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# -- HOG ----------------------------------------------------------------------------------------------------------


def ramp(degrees: float, size: int = 32, strength: float = 0.01) -> torch.Tensor:
    """An image [1, 3, S, S] that grows in one direction, counted from the x axis towards the y axis."""
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    angle = math.radians(degrees)
    return (0.5 + strength * (x * math.cos(angle) + y * math.sin(angle))).expand(1, 3, size, size)


def test_hog_has_a_feature_for_each_patch():
    features = HOG(8)(torch.rand(2, 3, 24, 24))
    assert features.shape == (2, 9, 108), \
        "HOG of 3 x 3 patches should be [B, N, 3 colours * 9 orientations * 4 cells] = [2, 9, 108], but is " \
        f"{list(features.shape)}"


@pytest.mark.parametrize("degrees", [0, 40, 50, 90, 150, 220])
def test_hog_counts_the_orientation_of_the_gradient(degrees):
    """The features of a patch are 3 colours x 9 orientations x 4 cells. 40 and 220 degrees are one orientation."""
    histogram = HOG(8)(ramp(degrees))[0, 5].view(3, 9, 4)[0, :, 0]
    share = degrees % 180 / 180 * 9
    expected = torch.zeros(9)
    expected[int(share) % 9] += 1 - share % 1
    expected[(int(share) + 1) % 9] += share % 1
    likeness = F.cosine_similarity(histogram, expected - expected.mean(), dim=0).item()
    assert likeness > 0.99, \
        f"a ramp at {degrees} degrees should vote for orientation {share:.2f} of 9, shared by the two bins around " \
        f"it, but the largest bin is {histogram.argmax()} and the cosine with what is expected {likeness:.2f}: nine " \
        "bins over 180 degrees?"


def test_hog_ignores_contrast_and_centres_its_histograms():
    weak, strong = (HOG(8)(ramp(30, strength=s))[0, 5] for s in (0.008, 0.016))
    assert difference(weak, strong) < 0.4 * strong.abs().max(), \
        f"half the contrast should give nearly the same features, but they differ by {difference(weak, strong):.2f} " \
        f"of {strong.abs().max():.2f}: is each histogram divided by its length + .01?"
    mean = strong.view(3, 9, 4).mean(dim=1).abs().max().item()
    assert mean < 1e-4, f"the nine orientations of a cell should have the mean 0, but have {mean:.2g}: subtract it"
    flat = HOG(8)(torch.full((1, 3, 16, 16), 0.3)).abs().max().item()
    assert flat == 0, f"a flat image should have no features, but has {flat:.2g}"


def test_hog_keeps_patches_and_cells_in_their_places():
    """A flat image with one bright pixel, in the lower left cell of patch 6 of 4 x 4."""
    image = torch.full((1, 3, 32, 32), 0.5)
    image[..., 14, 17] += 0.3
    features = HOG(8)(image)[0]
    strongest = features.norm(dim=1).argmax().item()
    assert strongest == 6, f"a gradient in patch 6 of a grid of 4 x 4 should show in patch 6, but shows in {strongest}"
    cell = features[6].view(3, 9, 4).norm(dim=(0, 1)).argmax().item()
    assert cell == 2, f"cells should be counted row by row, so that lower left is 2, but it is {cell}"


# -- VQKD.encode and token_ids ------------------------------------------------------------------------------------


def test_the_encoder_sees_images_from_minus_one_to_one():
    encoder = Noting(torch.randn(2, 9, 8))
    model = vq_kd(encoder=encoder)
    images = torch.rand(2, 3, 12, 12)
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    z = model.encode(images)
    low, high = encoder.input.min().item(), encoder.input.max().item()
    assert torch.allclose(encoder.input, 2 * images - 1, atol=1e-6), \
        f"the encoder should see images in [-1, 1], but sees {low:.2f} to {high:.2f}: they come in [0, 1]"
    expected = model.encode_task_layer(encoder.output)
    assert z.shape == (2, 9, 4), \
        f"z should be [B, N, C] = [2, 9, 4], but is {list(z.shape)}: is encode_task_layer missing?"
    assert torch.allclose(z, expected, atol=1e-5), "z should be encode_task_layer of the encoder's features, but is not"


def test_z_is_float32_under_autocast():
    model = vq_kd(encoder=Noting(torch.randn(2, 9, 8).bfloat16()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = model.encode(torch.rand(2, 3, 12, 12))
    assert z.dtype == torch.float32, \
        f"z should be float32 even under autocast, or neighbouring codes fall together, but is {z.dtype}"


def test_token_ids_are_the_codes_numbers():
    ids = torch.arange(18).view(2, 9) % 6
    model = vq_kd(quantize=Noting((torch.zeros(2, 9, 4), ids, torch.zeros(()))), encoder=Noting(torch.randn(2, 9, 8)))
    found = model.token_ids(torch.rand(2, 3, 12, 12))
    assert isinstance(found, torch.Tensor) and torch.equal(found, ids), \
        "token_ids should be the ids that the quantizer returns for z, int64 [B, N], but are something else"
    assert torch.allclose(model.quantize.input, model.encode_task_layer(model.encoder.output), atol=1e-5), \
        "the quantizer should see z, what `encode` returns"


# -- VQKD.decode --------------------------------------------------------------------------------------------------


def test_the_decoder_sees_the_codes_as_an_image():
    """Patch 5 of 3 x 3 lies in row 1 and column 2."""
    decoder = Noting(torch.randn(2, 9, 8))
    model = vq_kd(decoder=decoder)
    codes = torch.randn(2, 9, 4)
    prediction = model.decode(codes)
    assert decoder.input.shape == (2, 4, 3, 3), \
        "the decoder should see a grid of codes [B, C, grid, grid] = [2, 4, 3, 3], but sees " \
        f"{list(decoder.input.shape)}"
    assert torch.allclose(decoder.input[:, :, 1, 2], codes[:, 5], atol=1e-6), \
        "code 5 of a grid of 3 x 3 should stand in row 1 and column 2, but does not: is the grid filled row by row, " \
        "and C moved to the front before it is cut?"
    expected = model.decode_task_layer(decoder.output)
    assert prediction.shape == (2, 9, 5) and torch.allclose(prediction, expected, atol=1e-5), \
        "the prediction should be decode_task_layer of the decoder's output, [B, N, teacher_dim] = [2, 9, 5], but " \
        f"is another one, {list(prediction.shape)}"


# -- VQKD.forward -------------------------------------------------------------------------------------------------


def test_the_decoder_sees_codes_and_the_encoder_learns():
    """The codes are 2 z here. So a decoder that sees z gives another loss, and cut off codes give z no gradient."""
    torch.manual_seed(0)
    z = torch.randn(2, 9, 4, requires_grad=True)
    ids = torch.zeros(2, 9, dtype=torch.int64)
    model = vq_kd(quantize=Noting(lambda z: (2 * z, ids, torch.tensor(0.0))))
    seen = []
    model.encode = lambda images: z
    model.decode = lambda codes: seen.append(codes) or F.pad(codes, (0, 1))
    loss = model(torch.rand(2, 3, 12, 12), torch.randn(2, 9, 5))[0]
    assert seen and torch.allclose(seen[0], 2 * z), \
        "the decoder should see the codes and nothing else, but sees something else: does z bypass the quantizer?"
    assert loss.requires_grad, "the cosine loss should have a gradient for the encoder, but has none"
    loss.backward()
    assert z.grad is not None and z.grad.abs().max() > 0, "the cosine loss should have a gradient for the encoder"


def with_prediction(prediction: torch.Tensor) -> vqkd.VQKD:
    """A VQ-KD that predicts these features, with a commitment loss of .25."""
    ids = torch.zeros(2, 9, dtype=torch.int64)
    model = vq_kd(quantize=Noting(lambda z: (torch.ones(2, 9, 4), ids, torch.tensor(0.25))))
    model.encode = lambda images: torch.zeros(2, 9, 4)
    model.decode = lambda codes: prediction
    return model


def test_the_loss_is_one_minus_the_cosine():
    torch.manual_seed(0)
    prediction, teacher = torch.randn(2, 9, 5), torch.randn(2, 9, 5) * torch.rand(2, 9, 1)
    loss, commitment, ids = with_prediction(prediction)(torch.rand(2, 3, 12, 12), teacher)
    cosine = (F.normalize(prediction, dim=-1) * F.normalize(teacher, dim=-1)).sum(dim=-1)  # [B, N]
    assert loss.shape == (), f"the cosine loss should be one number, but is {list(loss.shape)}"
    assert abs(loss.item() - (1 - cosine.mean()).item()) < 1e-4, \
        f"the cosine loss should be the mean over patches of 1 - cos(prediction, teacher), {1 - cosine.mean():.4f}, " \
        f"but is {loss.item():.4f}: a cosine for each patch, over the features?"
    assert commitment.item() == 0.25, \
        f"the commitment loss should be that of the quantizer, .25, but is {commitment.item():.3f}"
    assert ids.shape == (2, 9) and ids.dtype == torch.int64, \
        f"the ids should be those of the quantizer, int64 [2, 9], but are {ids.dtype} {list(ids.shape)}"


@pytest.mark.parametrize("factor, expected", [(1.0, 0.0), (3.0, 0.0), (-1.0, 2.0)])
def test_the_loss_depends_on_directions_only(factor, expected):
    torch.manual_seed(0)
    teacher = torch.randn(2, 9, 5)
    loss = with_prediction(factor * teacher)(torch.rand(2, 3, 12, 12), teacher)[0].item()
    assert abs(loss - expected) < 1e-4, \
        f"for a prediction of {factor:g} times the teacher's features the loss should be {expected:g}, but is " \
        f"{loss:.3f}"
