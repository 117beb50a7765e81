#!/usr/bin/env bash
# The same DINOv2 weights see three different position embeddings at 224 pixels: as published, in transformers, in timm.
#
# One would believe: timm and transformers hold the published DINOv2 models, so with the same weights and the same image
# of 224 pixels (16 x 16 patches; the weights come with 37 x 37 positions) they add the same positions.
#
# What happens, for the models without registers: the published code interpolates by the scale factor (16 + .1) / 37,
# without antialias. transformers resizes to the size 16 x 16, without antialias. timm resizes to the size with
# antialias, which was the way of the models with registers. For those all three agree.
#
# Seen with torch 2.14.1, timm 1.0.31, transformers 5.24.0, Python 3.11, for random positions:
#   without registers: transformers 0.298 and timm 0.816 away from the published positions (relative)
#   with registers: transformers 0.000 and timm 0.000 away
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0
venv/bin/python - <<'PY'
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

torch.manual_seed(0)
weights = torch.randn(1, 1 + 37**2, 64)
grid = weights[:, 1:].transpose(1, 2).unflatten(2, (37, 37))


def as_table(places):
    return torch.cat([weights[:, :1], places.flatten(2).transpose(1, 2)], dim=1)


def in_transformers(config_class, model_class):
    model = model_class(config_class(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=518,
                                     patch_size=14))
    model.embeddings.position_embeddings.data.copy_(weights)
    with torch.no_grad():
        return model.embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + 16**2, 64), 224, 224)


def away(ours, published):
    return ((ours - published).norm() / published.norm()).item()


timm = resample_abs_pos_embed(weights, [16, 16])
plain = as_table(F.interpolate(grid, scale_factor=(16 + 0.1) / 37, mode="bicubic"))
registers = as_table(F.interpolate(grid, size=(16, 16), mode="bicubic", antialias=True))
there = in_transformers(Dinov2Config, Dinov2Model)
there_too = in_transformers(Dinov2WithRegistersConfig, Dinov2WithRegistersModel)
numbers = [away(there, plain), away(timm, plain), away(there_too, registers), away(timm, registers)]
print("without registers: transformers {:.3f} and timm {:.3f} away from the published positions (relative)\n"
      "with registers: transformers {:.3f} and timm {:.3f} away".format(*numbers))
assert 0.2 < numbers[0] < 0.4 and 0.7 < numbers[1] < 0.9 and max(numbers[2:]) < 1e-4, "this has changed"
PY
