#!/usr/bin/env bash
# A model's FLOPs, counted by PyTorch, lack its attention where the model is on a CPU.
#
# One would believe: torch.utils.flop_counter.FlopCounterMode counts scaled_dot_product_attention, since it has formulas
# for the fused kernels. The operations of a model do not depend on the device on which they are counted.
#
# What happens: it has formulas for the fused kernels of GPUs only. On a CPU the function calls a kernel of another name,
# which counts as nothing. A Vision Transformer that is counted before it is moved to the GPU seems cheaper than it is,
# the more so the longer its sequence. With plain matrix products, sdpa_kernel(SDPBackend.MATH), attention is counted:
# 4 T^2 D operations for T tokens of width D.
#
# Seen with torch 2.14.1, Python 3.11 (batch 1, 12 heads, 197 tokens, 64 numbers for each head):
#   fused kernel of the CPU: 0 FLOPs
#   plain matrix products: 119221248 FLOPs
#   4 T^2 D: 119221248
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.14.1 numpy
venv/bin/python - <<'PY'
import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

heads, tokens, width = 12, 197, 64
q, k, v = torch.randn(3, 1, heads, tokens, width).unbind()


def count(kernel):
    with torch.no_grad(), kernel, FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(q, k, v)
    return counter.get_total_flops()


fused, plain = count(contextlib.nullcontext()), count(sdpa_kernel(SDPBackend.MATH))
expected = 4 * tokens**2 * heads * width
print(f"fused kernel of the CPU: {fused} FLOPs")
print(f"plain matrix products: {plain} FLOPs")
print(f"4 T^2 D: {expected}")
assert fused == 0 and plain == expected, "this has changed"
PY
