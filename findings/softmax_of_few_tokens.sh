#!/usr/bin/env bash
# In bf16 on a CPU, attention's softmax over 15 tokens takes longer than over 32.
#
# One would believe: a softmax over fewer numbers takes less time, or, where numbers are computed in groups as wide as
# the vector registers, about as much. So a small image, cut into few patches, makes attention cheap.
#
# What happens: a row that is shorter than a register is computed number by number. A register of AVX-512 holds 32 numbers
# of bf16 (of AVX2 16). The gradient of a row of 15 takes many times as long as that of a row of 32, and so does, less
# so, the row itself. An image of 16 patches and [CLS], 17 tokens, is on the slow side of AVX-512. There the softmax took
# 13 % of a training step of a small Vision Transformer, and its products of queries, keys and values 7 %.
#
# Seen with torch 2.14.1, Python 3.11 (one core of an EPYC with AVX-512, both sizes with 100,000 rows; also with AVX2
# alone, ATEN_CPU_CAPABILITY=avx2: 2.1 and 6.6):
#   a row of 15 against one of 32: forward 3.4 times the time, backward 9.4 times
#   (asserted: backward takes more time, though there are fewer numbers)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.14.1 numpy
venv/bin/python - <<'PY'
import time

import torch

torch.set_num_threads(1)


def seconds(tokens):
    """The least seconds of the processor for a softmax over rows of so many numbers, and for its gradient."""
    logits = torch.randn(100_000, tokens).bfloat16().requires_grad_()
    upstream, best = torch.randn(100_000, tokens).bfloat16(), [float("inf")] * 2
    for _ in range(20):
        marks = [time.process_time()]
        weights = logits.softmax(dim=-1)
        marks.append(time.process_time())
        torch.autograd.grad(weights, logits, upstream)
        marks.append(time.process_time())
        best = [min(least, after - before) for least, before, after in zip(best, marks, marks[1:])]
    return best


(forward_15, backward_15), (forward_32, backward_32) = seconds(15), seconds(32)
print(f"a row of 15 against one of 32: forward {forward_15 / forward_32:.1f} times the time, "
      f"backward {backward_15 / backward_32:.1f} times")
assert backward_15 > backward_32, "this has changed"
PY
