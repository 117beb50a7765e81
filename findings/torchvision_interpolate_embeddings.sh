#!/usr/bin/env bash
# torchvision's interpolate_embeddings puts positions where no other library does, and changes the weights it was given.
#
# One would believe: interpolate_embeddings(image_size, patch_size, state_dict) returns new weights for another image
# size, with position embeddings resized as in ViT, DINO, timm and transformers; the old weights stay for the next size.
#
# What happens: it interpolates with align_corners=True, so the centres of the corner patches fall together, not the
# borders of the image. And it writes into the dictionary that it got, and returns that one: a loop over image sizes
# resizes what it has resized before, and the model of the original size does not load any more.
#
# Seen with torch 2.14.1, torchvision 0.29.1, Python 3.11, for random positions, 14 x 14 to 24 x 24:
#   0.000 away from aligned corners, 0.264 away from aligned borders (relative)
#   the old dictionary now holds 577 positions; it held 197
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.14.1 torchvision==0.29.1
venv/bin/python - <<'PY'
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torchvision.models.vision_transformer import interpolate_embeddings

torch.manual_seed(0)
old = torch.randn(1, 1 + 14**2, 64)
weights = OrderedDict({"encoder.pos_embedding": old})
new = interpolate_embeddings(24 * 16, 16, weights)["encoder.pos_embedding"][:, 1:]


def away(align_corners):
    places = old[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
    places = F.interpolate(places, size=24, mode="bicubic", align_corners=align_corners).flatten(2).transpose(1, 2)
    return ((new - places).norm() / places.norm()).item()


corners, borders = away(True), away(False)
held = weights["encoder.pos_embedding"].shape[1]
print(f"{corners:.3f} away from aligned corners, {borders:.3f} away from aligned borders (relative)")
print(f"the old dictionary now holds {held} positions; it held {old.shape[1]}")
assert corners < 1e-5 and borders > 0.2 and held == 577, "this has changed"
PY
