"""Devices and the precision that each is fast in."""

from __future__ import annotations

import pytest
import torch

from nanoqwen.distributed import pick_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({}, torch.float32),
        ({"avx2": True}, torch.float32),
        ({"avx512_bf16": True, "avx512_vnni": True}, torch.float32),  # measured: half the rate of fp32
        ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_on_a_cpu_is_bf16_only_where_products_of_tiles_exist(
    features: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert pick_dtype("auto", CPU)[0] == dtype
    assert pick_dtype("bfloat16", CPU) == (torch.bfloat16, "as asked")
