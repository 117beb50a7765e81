"""Precision: which numbers a device computes with, and what keeps half precision from losing small gradients.

No reader of the method needs this file: the loops say `run.autocast()`, and in fp32 that does nothing.
"""

import torch


class Precision:
    """Autocast, and for fp16 the gradient scaler that keeps small gradients from vanishing.

    auto is bf16 on devices that multiply it natively (GPUs since Ampere, CPUs with AMX or AVX512-BF16), fp16 with a
    scaler on older GPUs, and fp32 on other CPUs. Weights, optimizer and residual stream are fp32 in every case.
    """

    def __init__(self, name: str, device: torch.device):
        if name == "auto":
            if device.type == "cuda":
                name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
            else:
                name = "bf16" if cpu_has_bf16() else "fp32"
        self.name, self.device = name, device
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        if device.type == "cpu":
            # In bf16, the backward pass of PyTorch's fused attention for CPUs is slow: 10 ms for 16 images of 65
            # tokens, where that of plain matrix products in bf16 takes 2. (The switches are named after CUDA and serve
            # both.)
            torch.backends.cuda.enable_flash_sdp(name != "bf16")
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(name == "bf16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.name != "fp32")


def cpu_has_bf16() -> bool:
    """Whether the CPU has instructions for bf16 products; emulated ones would be slower than fp32."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check is not None and check() for check in checks)
