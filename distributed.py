"""The machine: which device computes, and in which precision."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, else an Apple GPU, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype to compute in, why). `auto` is the narrowest that the device is fast at."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "this GPU has bf16 matrix units"
        return torch.float16, "this GPU is older than bf16 matrix units"
    if device.type == "mps":
        return torch.float32, "safe on every Apple GPU"
    # Without these instructions a bf16 matrix product takes about five times as long as an fp32 one.
    features = getattr(torch.cpu, "get_capabilities", dict)()
    if features.get("amx_bf16") or features.get("avx512_bf16"):
        return torch.bfloat16, "this CPU has bf16 instructions"
    return torch.float32, "this CPU has no bf16 instructions"
