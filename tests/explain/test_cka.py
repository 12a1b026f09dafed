"""Linear CKA is the published formula, over batches and for several models at once."""

import math

import numpy as np
import pytest
import torch

from vitkd.explain.measures.distances import CKASums, linear_cka


def literal_cka(x, y):
    """By HSIC (Gretton et al. 2005) of the linear kernels, as Kornblith et al. 2019 define it."""
    n = len(x)
    centring = np.eye(n) - np.ones((n, n)) / n

    def hsic(k, kernel):
        return np.trace(k @ centring @ kernel @ centring) / (n - 1) ** 2

    k, kernel = x @ x.T, y @ y.T
    return hsic(k, kernel) / math.sqrt(hsic(k, k) * hsic(kernel, kernel))


class TestCKA:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3
    y = torch.randn(40, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.3 * x[:, :1]

    def test_is_the_literal_formula(self):
        assert linear_cka(self.x, self.y) == pytest.approx(literal_cka(self.x.numpy(), self.y.numpy()))
        assert 0.05 < linear_cka(self.x, self.y) < 0.95

    def test_ignores_rotation_scale_and_shift(self):
        rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
        changed = 7 * self.x @ rotation + 100
        assert linear_cka(changed, self.y) == pytest.approx(linear_cka(self.x, self.y))
        assert linear_cka(changed, self.x) == pytest.approx(1)

    def test_does_not_ignore_other_maps(self):
        stretched = self.x * torch.tensor([10.0, 1, 1, 1, 1, 1])
        assert linear_cka(stretched, self.x) < 0.9

    def test_is_the_same_over_batches(self):
        sums = CKASums([("x", "y")])
        for x, y in zip(self.x.split([1, 14, 25]), self.y.split([1, 14, 25]), strict=True):
            sums.add({"x": x, "y": y})
        assert sums.value("x", "y") == pytest.approx(linear_cka(self.x, self.y), rel=1e-12)

    def test_takes_tokens(self):
        sums = CKASums([("x", "y")])
        sums.add({"x": self.x.view(8, 5, 6), "y": self.y.view(8, 5, 9)})
        assert sums.value("x", "y") == pytest.approx(linear_cka(self.x, self.y), rel=1e-12)

    def test_constant_features_have_none(self):
        assert math.isnan(linear_cka(torch.full((7, 3), 0.1), self.y[:7]))
        assert math.isnan(linear_cka(self.x[:7], torch.full((7, 3), 1e6)))
        assert math.isnan(CKASums([("x", "y")]).value("x", "y"))

    def test_several_share_what_they_have_in_common(self):
        z = self.x.flip(0) + self.y[:, :6]
        features = {"x": self.x, "y": self.y, 0: z}
        sums = CKASums([("x", "y"), (0, "y"), (0, "x")])
        for start in range(0, 40, 8):
            sums.add({name: each[start : start + 8] for name, each in features.items()} | {"unasked": None})
        for one, other in (("x", "y"), (0, "y"), (0, "x")):
            expected = literal_cka(features[one].numpy(), features[other].numpy())
            assert sums.value(one, other) == pytest.approx(expected)

    def test_needs_the_same_examples(self):
        with pytest.raises(ValueError, match=r"\[40, 6\] and \[39, 9\] are not"):
            linear_cka(self.x, self.y[1:])

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_a_gpu_gives_the_same(self):
        assert linear_cka(self.x.cuda(), self.y.cuda()) == pytest.approx(linear_cka(self.x, self.y))
