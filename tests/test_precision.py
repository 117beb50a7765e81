"""support/precision.py: which numbers a device computes with."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.precision import Precision, cpu_has_bf16  # noqa: E402


@pytest.mark.parametrize("device, has_bf16, name", [("cpu", True, "bf16"), ("cpu", False, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp16")])
@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler|.*CUDA is not available")
def test_precision_auto(device, has_bf16, name, monkeypatch):
    monkeypatch.setattr("support.precision.cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation)
    assert Precision("auto", torch.device(device)).name == name


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_by_name(name, dtype):
    precision = Precision(name, torch.device("cpu"))
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert precision.scaler.is_enabled() == (name == "fp16")


@pytest.mark.parametrize("name, fused", [("bf16", False), ("fp32", True)])
def test_attention_on_a_cpu_is_fused_except_in_bf16_where_its_gradient_is_slow(name, fused):
    precision = Precision(name, torch.device("cpu"))
    q = torch.randn(2, 3, 5, 8, dtype=precision.dtype, requires_grad=True)
    attended = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert ("FlashAttention" in attended.grad_fn.name()) == fused
    Precision("fp32", torch.device("cpu"))  # the switch is the process's


def test_cpu_has_bf16_survives_a_torch_without_the_question(monkeypatch):
    assert isinstance(cpu_has_bf16(), bool)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert cpu_has_bf16() is False
