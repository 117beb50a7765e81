#!/usr/bin/env bash
# Position embeddings that are enlarged depend on `antialias`, which is said to matter for shrinking only.
#
# One would believe: antialias=True widens the kernel when an image gets smaller. When it gets larger there is nothing
# to filter, so F.interpolate(..., mode="bicubic") gives the same with and without it. (In bilinear mode it does.)
#
# What happens: bicubic interpolation uses another cubic with antialias (a = -0.5, as Pillow) than without (a = -0.75,
# as OpenCV). Enlarging 14 x 14 random position embeddings to 24 x 24 differs by 8 % of their size. So a library that
# always sets antialias=True, as timm's resample_abs_pos_embed does, enlarges otherwise than the code of DINO, which
# never does.
#
# Seen with torch 2.14.1, timm 1.0.31, Python 3.11:
#   bilinear, 14 to 24: relative difference 0.0000
#   bicubic, 14 to 24: relative difference 0.0798
#   timm: the same as with antialias
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.14.1 torchvision==0.29.1 timm==1.0.31
venv/bin/python - <<'PY'
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

torch.manual_seed(0)
positions = torch.randn(1, 64, 14, 14)


def difference(mode):
    plain, smoothed = (F.interpolate(positions, size=24, mode=mode, antialias=a) for a in (False, True))
    return ((plain - smoothed).norm() / plain.norm()).item()


bilinear, bicubic = difference("bilinear"), difference("bicubic")
print(f"bilinear, 14 to 24: relative difference {bilinear:.4f}")
print(f"bicubic, 14 to 24: relative difference {bicubic:.4f}")
table = torch.cat([torch.zeros(1, 1, 64), positions.flatten(2).transpose(1, 2)], dim=1)
timm = resample_abs_pos_embed(table, [24, 24])[:, 1:].transpose(1, 2).unflatten(2, (24, 24))
same = torch.allclose(timm, F.interpolate(positions, size=24, mode="bicubic", antialias=True), atol=1e-5)
print("timm: the same as with antialias" if same else "timm: neither, or without antialias")
assert bilinear < 1e-5 and 0.05 < bicubic < 0.12 and same, "this has changed"
PY
