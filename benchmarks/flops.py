"""Floating-point operations of a ViT's matrix products, and what machines can do a second.

A multiplication and an addition are two. Everything else (norms, softmax, GELU, dropout, the optimiser) is
left out, as is usual for a share of the peak.
"""

import re
import time

import torch

from vitkd.models import ViTConfig

PEAKS = {
    "B200": {"float32": 75.0, "tf32": 1100.0, "bf16": 2250.0},
    "H200 NVL": {"float32": 60.0, "tf32": 417.5, "bf16": 835.5},
    "H200": {"float32": 67.0, "tf32": 494.5, "bf16": 989.5},
    "H100 PCIe": {"float32": 51.0, "tf32": 378.0, "bf16": 756.0},
    "H100 NVL": {"float32": 60.0, "tf32": 417.5, "bf16": 835.5},
    "H100": {"float32": 67.0, "tf32": 494.5, "bf16": 989.5},
    "A100": {"float32": 19.5, "tf32": 156.0, "bf16": 312.0},
    "L40S": {"float32": 91.6, "tf32": 183.0, "bf16": 362.0},
    "L40": {"float32": 90.5, "tf32": 90.5, "bf16": 181.0},
    "L4": {"float32": 30.3, "tf32": 60.0, "bf16": 121.0},
    "A10": {"float32": 31.2, "tf32": 62.5, "bf16": 125.0},
    "RTX 4090": {"float32": 82.6, "tf32": 82.6, "bf16": 165.2},
    "RTX 3090": {"float32": 35.6, "tf32": 35.6, "bf16": 71.0},
    "V100": {"float32": 15.7},
    "T4": {"float32": 8.1},
}
"""words of the device's name → TFLOP/s of dense products, as the makers state them; the first that fits"""
SIZE = 2048


def forward_flops(model: ViTConfig) -> int:
    """Of one image's logits."""
    heads = model.prefix * 2 * model.embed_dim * model.num_classes
    return _embedding(model) + model.depth * _block(model) + heads


def training_flops(model: ViTConfig) -> int:
    """Of one image's forward and backward pass; an image needs no gradient, a norm of its pixels does."""
    has_norm = model.patch_norm or model.tokenizer == "spt"
    return 3 * forward_flops(model) - (0 if has_norm else _embedding(model))


def scores_flops(model: ViTConfig, last: int) -> int:
    """Of one image's attention scores up to block `last`, of which only QKᵀ is computed."""
    inner, tokens = model.num_heads * model.head_dim, model.tokens
    queries_and_keys = 2 * tokens * model.embed_dim * 2 * inner
    return _embedding(model) + last * _block(model) + queries_and_keys + 2 * tokens**2 * inner


def _embedding(model: ViTConfig) -> int:
    views = 5 if model.tokenizer == "spt" else 1
    return 2 * model.grid**2 * views * model.channels * model.patch_size**2 * model.embed_dim


def _block(model: ViTConfig) -> int:
    inner, tokens = model.num_heads * model.head_dim, model.tokens
    projections = 2 * tokens * model.embed_dim * 4 * inner
    attention = 2 * 2 * tokens**2 * inner
    return projections + attention + 2 * tokens * model.embed_dim * 2 * model.mlp_dim


def known_peak(device_name: str, precision: str) -> float | None:
    """FLOP/s of a GPU of this name, or None if the table has it not; a slice's is not the card's."""
    if "MIG" in device_name:
        return None
    for name, rates in PEAKS.items():
        # A100 is also the end of RTX A1000's beginning, and A10 of A10G's.
        if re.search(rf"\b{name}\b", device_name) and precision in rates:
            return rates[precision] * 1e12
    return None


def measured_peak(device: torch.device, repeats: int = 5, size: int = SIZE) -> float:
    """FLOP/s of the quickest of some float32 products of two large square matrices."""
    a = torch.randn(size, size, device=device)
    quickest = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (a @ a).sum().item()
        quickest = min(quickest, time.perf_counter() - start)
    return 2 * size**3 / quickest
