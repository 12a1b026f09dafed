"""What a stacked student drops depends on its own stream alone."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from vitkd.models.dropout import Dropout, drop_by
from vitkd.train.stacked.dropout import GeneratorStreams, KeyedStreams

P = 0.3

# Triton's interpreter has to be asked for before Triton is imported.
BY_KERNEL = """
import numpy as np
import torch
from vitkd.train.stacked.philox import dropped


def philox(key, counter):
    '''Philox4x32-10 (Salmon et al. 2011): four 32-bit numbers from a 64-bit key and a 128-bit counter.'''
    k0, k1, (c0, c1, c2, c3) = key % 2**32, key >> 32, counter
    for _ in range(10):
        high, low = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (low >> 32) ^ c1 ^ k0, low % 2**32, (high >> 32) ^ c3 ^ k1, high % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


x = torch.randn(3, 7, 301, requires_grad=True)
seeds, step = torch.tensor([1, 2**40 + 5, 3]), torch.zeros((), dtype=torch.int64)

y = dropped(x, seeds, step, 1, 0.3)
y.sum().backward()

torch.testing.assert_close(x.grad * x, y)
values = x.grad[x.grad != 0]
torch.testing.assert_close(values, torch.full_like(values, 1 / 0.7))
share = (y == 0).float().mean((1, 2))
assert ((share - 0.3).abs() < 5 * (0.21 / 2107) ** 0.5).all(), share
masks = {
    "as before": dropped(x, seeds, step, 1, 0.3),
    "another place": dropped(x, seeds, step, 2, 0.3),
    "another step": dropped(x, seeds, step + 1, 1, 0.3),
    "other seeds": dropped(x, seeds + 1, step, 1, 0.3),
}
same = [name for name, other in masks.items() if torch.equal(other == 0, y == 0)]
assert same == ["as before"], same
drawn = [number for four in range(527) for number in philox(2**40 + 5, (four, 1, 0, 0))][:2107]
assert np.array_equal(np.array(drawn) >= round(0.3 * 2**32), (y[1] != 0).flatten().numpy())
alone = dropped(x[1:2], seeds[1:2], step, 1, 0.3)
assert torch.equal(alone[0], y[1])
torch.testing.assert_close(dropped(x.double(), seeds, step, 1, 0.3), y.double(), rtol=1e-6, atol=0)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_masks_by_tritons_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}

    ended = subprocess.run([sys.executable, "-c", BY_KERNEL], env=environment, capture_output=True, text=True)

    assert ended.returncode == 0, ended.stderr


def test_on_the_cpu_each_student_drops_what_it_drops_alone():
    x = torch.randn(3, 5, 7)
    together = Dropout(P)
    drop_by(GeneratorStreams([4, 5, 6]).drop, [together])

    first, second = together(x), together(x)

    for student, seed in enumerate([4, 5, 6]):
        torch.manual_seed(seed)
        alone = Dropout(P)
        assert torch.equal(alone(x[student]), first[student])
        assert torch.equal(alone(x[student]), second[student])


def test_streams_go_on_where_they_were_saved():
    streams, x = GeneratorStreams([4, 5]), torch.ones(2, 50)
    streams.drop(x, P)
    state = streams.state_dict()
    expected = streams.drop(x, P)

    resumed = GeneratorStreams([0, 0])
    resumed.load_state_dict(state)

    assert torch.equal(resumed.drop(x, P), expected)


def test_streams_go_on_from_the_step_of_another_device():
    on_cpu, on_gpu = GeneratorStreams([4, 5]), KeyedStreams([4, 5], torch.device("cpu"))
    for _ in range(3):
        on_cpu.next_step()
    on_gpu.load_state_dict(on_cpu.state_dict())
    on_gpu.next_step()

    back = GeneratorStreams([4, 5])
    back.load_state_dict(on_gpu.state_dict())

    assert (int(on_gpu.step), back.step) == (4, 4)
    assert torch.equal(back.drop(torch.ones(2, 50), P), on_cpu.drop(torch.ones(2, 50), P)), "from their seeds"
