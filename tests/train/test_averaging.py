"""What a Trainer here is made of."""

import pytest
import torch

from vitkd.train.fit import warm_average


@pytest.mark.parametrize(("count", "kept"), [(1, 2 / 11), (10, 11 / 20), (990, 991 / 1000), (10**6, 0.999)])
def test_an_average_forgets_the_first_weights_soon_and_the_late_ones_slowly(count, kept):
    averaged, current = torch.tensor([1.0]), torch.tensor([0.0])

    moved = warm_average(0.999)(averaged, current, torch.tensor(count))

    assert moved.item() == pytest.approx(kept)
