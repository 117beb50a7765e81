#!/usr/bin/env bash
# torchvision's RandAugment moves an image by whole pixels, and interpolates all the same.
#
# One would believe: with interpolation=BICUBIC, TranslateX and TranslateY move an image by fractions of a pixel, since
# the magnitude is a real number. Or else they do not interpolate, since there is nothing between two pixels to find.
#
# What happens: the magnitude is cut to an integer, and the image goes through the whole bicubic filter. The result is
# bit for bit that of the nearest pixel, which takes less than a tenth of the time. AutoAugment, TrivialAugmentWide and
# AugMix call the same function. Two of RandAugment's fourteen operations are of this kind.
#
# Seen with torch 2.14.1, torchvision 0.29.1, Pillow 13.0.0, Python 3.11 (224 px, magnitude 9 of 11, all on one core):
#   TranslateX, TranslateY: the same pixels True True
#   nearest is quicker 17 to 50 times (5 times is asserted)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.14.1 torchvision==0.29.1 numpy pillow
venv/bin/python - <<'PY'
import time
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))


def moved(name, mode):
    """The result of RandAugment if it has but this operation to choose from, and the seconds of the processor."""
    space = {name: v2.RandAugment._AUGMENTATION_SPACE[name]}
    with mock.patch.object(v2.RandAugment, "_AUGMENTATION_SPACE", space):
        augment = v2.RandAugment(num_ops=1, magnitude=9, num_magnitude_bins=11, interpolation=mode)
        torch.manual_seed(0)
        result = np.asarray(augment(picture))
        start = time.process_time()
        for _ in range(50):
            augment(picture)
    return result, time.process_time() - start


same, ratios = [], []
for name in ("TranslateX", "TranslateY"):
    (bicubic, slow), (nearest, quick) = (moved(name, v2.InterpolationMode[mode]) for mode in ("BICUBIC", "NEAREST"))
    same.append(np.array_equal(bicubic, nearest))
    ratios.append(slow / quick)
print("TranslateX, TranslateY: the same pixels", *same)
print("nearest is quicker", *(f"{ratio:.0f}" for ratio in ratios), "times")
assert all(same) and min(ratios) > 5, "this has changed"
PY
