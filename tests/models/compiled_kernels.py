"""The kernels compiled for an H100, on any machine; `test_kernels.py` runs this file."""

from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vitkd.models.kernels import attention, philox, pointwise

H100, SHARED_MEMORY = GPUTarget("cuda", 90, 32), 227 * 1024
"""bytes that the blocks of a multiprocessor share"""
NUMBERS = {"images": "i32", "place": "i32", "dropped": "i32", "scale": "fp32", "n": "i32"}
NUMBERS |= {"R": "i32", "C": "i32", "epsilon": "fp32"}
TYPES = {"seeds": "*i64", "step": "*i64", "allowed": "*u8", "inverse": "*fp32", "d_inverse": "*fp32"}
TYPES |= {"scores_out": "*fp32", "d_scores": "*fp32"} | NUMBERS
TYPES |= dict.fromkeys(["w", "b", "dw", "db"], "*fp32")


def compiled(kernel: Any, dtype: str, constants: dict[str, Any]) -> Any:
    """`kernel` with its other tensors of `dtype`, aligned as PyTorch has them; n and C divisible by 16."""
    types = ["constexpr" if name in constants else TYPES.get(name, f"*{dtype}") for name in kernel.arg_names]
    round_ones = [
        name in ("n", "C") or each.startswith("*") for name, each in zip(kernel.arg_names, types, strict=True)
    ]
    aligned = {(i,): [["tt.divisibility", 16]] for i, is_round in enumerate(round_ones) if is_round}
    values = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
    signature = dict(zip(kernel.arg_names, types, strict=True))
    made = triton.compile(ASTSource(kernel, signature, values, aligned), target=H100)
    assert made.metadata.shared <= SHARED_MEMORY / 2, "two blocks at least"
    return made


NOTHING = dict.fromkeys(["inverse", "allowed", "d_inverse", "seeds", "step", "scores_out", "d_scores"])


@pytest.mark.parametrize("kernel", [attention._attend, attention._attend_backward])
@pytest.mark.parametrize(
    ("dtype", "tokens", "precision", "absent"),
    [
        ("fp32", 17, "tf32", {}),
        ("fp32", 32, "ieee", NOTHING),
        ("bf16", 17, "tf32", {}),
        ("fp16", 2, "tf32", {}),
    ],
)
def test_attention(kernel, dtype, tokens, precision, absent):
    constants = attention.constants(tokens, 4, 64) | {"PRECISION": precision} | absent

    binary = compiled(
        kernel, dtype, {name: constants[name] for name in kernel.arg_names if name in constants}
    )

    assert ("mma" in binary.asm["ptx"]) == (precision == "tf32"), "tensor cores"


def test_dropout():
    assert "ld.global.v4" in compiled(philox._drop, "fp32", {"LANES": philox.LANES}).asm["ptx"]


@pytest.mark.parametrize("kernel", [pointwise._norm, pointwise._norm_backward])
def test_layer_norm(kernel):
    assert ".v4" in compiled(kernel, "fp32", {"ROWS": 64, "COLUMNS": 64}).asm["ptx"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "absent", [{}, dict.fromkeys(["residual", "h", "seeds", "step"])], ids=["all", "least"]
)
@pytest.mark.parametrize("kernel", [pointwise._finish, pointwise._finish_backward])
def test_what_follows_a_product(kernel, absent, dtype):
    absent = {name: absent[name] for name in kernel.arg_names if name in absent}
    if kernel is pointwise._finish:
        absent.pop("h", None)

    assert ".v4" in compiled(kernel, dtype, {"ROWS": 32, "COLUMNS": 128} | absent).asm["ptx"]
