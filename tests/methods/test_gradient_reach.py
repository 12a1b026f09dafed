"""What attention alone (alpha = 0) teaches: the chosen heads' queries and keys, and all that lies below."""

import pytest
import torch
from torch import Tensor

from vitkd.data import Batch
from vitkd.methods.maps.granularity import Block, Encoder, Granularity, Head
from vitkd.methods.maps.losses import CE, JS, KL, MSE, ReverseKL
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.optim import AdamW, Constant
from vitkd.train.module import DistillModule

HEADS, HEAD_DIM = 3, 4


def gradients(tiny, granularity: Granularity, loss, alpha: float = 0.0) -> dict[str, Tensor]:
    """The student's gradients after one batch; those that are None count as zero."""
    student = tiny(depth=4, num_heads=HEADS, head_dim=HEAD_DIM, qkv_bias=True).build()
    teacher = tiny(depth=8, num_heads=4).build()
    objective = AttentionObjective(granularity.pairs(student.attention, teacher.attention), loss)
    module = DistillModule(
        student, AdamW(), Constant(), teacher=teacher, objective=objective, alpha=alpha
    ).train()
    batch = Batch(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]), torch.arange(4))

    module.losses(batch).total.backward()

    assert all(p.grad is None for p in teacher.parameters())
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in student.named_parameters()}


def qkv_rows(of: str, heads: list[int]) -> list[int]:
    """The rows of a block's QKV projection that make the queries, keys or values of `heads`."""
    first = "qkv".index(of) * HEADS * HEAD_DIM
    return [first + head * HEAD_DIM + i for head in heads for i in range(HEAD_DIM)]


@pytest.mark.parametrize("loss", [MSE(), CE(), KL(), ReverseKL(), JS()], ids=repr)
@pytest.mark.parametrize(
    ("granularity", "block", "heads"),
    [
        (Head(blocks=[1], heads=[[2, 0]]), 1, [2]),
        (Head(blocks=[2], heads=[[0, 3], [2, 1]]), 2, [0, 2]),
        (Block(), 3, [0, 1, 2]),
        (Encoder(), 3, [0, 1, 2]),
    ],
    ids=repr,
)
def test_gradients_end_at_the_chosen_heads_queries_and_keys(tiny, granularity, loss, block, heads):
    reached = gradients(tiny, granularity, loss)

    weight = reached.pop(f"blocks.{block}.attention.qkv.weight")
    bias = reached.pop(f"blocks.{block}.attention.qkv.bias")
    chosen = qkv_rows("q", heads) + qkv_rows("k", heads)
    others = [row for row in range(len(weight)) if row not in chosen]
    assert (weight[chosen] != 0).all()
    assert (bias[qkv_rows("q", heads)] != 0).all()
    assert not weight[others].any()
    assert not bias[others].any()

    below = ("tokenizer", "cls", "positions", *(f"blocks.{i}." for i in range(block)))
    for name, gradient in reached.items():
        expected = name.startswith((*below, f"blocks.{block}.attention.norm"))
        assert gradient.any() == expected, name


def test_with_labels_everything_learns(tiny):
    assert all(g.any() for g in gradients(tiny, Head(blocks=[0]), KL(), alpha=0.5).values())


def test_distributions_ignore_key_biases_and_scores_do_not(tiny):
    """A key bias shifts a whole row of scores, which the softmax cancels."""
    of_kl, of_mse = (gradients(tiny, Block(), loss)["blocks.3.attention.qkv.bias"] for loss in (KL(), MSE()))
    keys = qkv_rows("k", [0, 1, 2])

    assert of_kl[keys].abs().max() < 1e-6
    assert (of_mse[keys].abs() > 1e-6).all()
