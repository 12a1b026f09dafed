"""How alike two models' features are, whatever basis each has them in.

Shapes: N examples (images times tokens), D and D' features.
"""

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

Name = Hashable


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of features [N, D] and [N, D'] of the same N examples, 0 to 1.

    ‖YᵀX‖² / (‖XᵀX‖·‖YᵀY‖) in Frobenius norms, the features centred (Kornblith et al. 2019): unmoved by
    rotation and isotropic scaling of either. NaN if the features of either are constant.
    """
    sums = CKASums([("x", "y")])
    sums.add({"x": x, "y": y})
    return sums.value("x", "y")


class CKASums:
    """`linear_cka` of named features over batches: only D × D' matrices are kept, however many examples.

    Args:
        pairs: the names that are compared with each other.
    """

    def __init__(self, pairs: Sequence[tuple[Name, Name]]) -> None:
        self._names = [*dict.fromkeys(name for pair in pairs for name in pair)]
        self._products = [*dict.fromkeys([*pairs, *((name, name) for name in self._names)])]
        self._count = 0
        self._means: dict[Name, Tensor] = {}
        """[D]"""
        self._scatters: dict[tuple[Name, Name], Tensor] = {}
        """[D, D']: Σ (x − x̄)(y − ȳ)ᵀ"""

    def add(self, features: Mapping[Name, Tensor]) -> None:
        """Add features [..., D] of the same examples under their names, for instance tokens [B, T, D].

        Raises ValueError if the examples cannot be the same.
        """
        first = features[self._names[0]]
        for name in self._names:
            if features[name].shape[:-1] != first.shape[:-1]:
                shapes = f"{[*first.shape]} and {[*features[name].shape]}"
                raise ValueError(f"features {shapes} are not of the same examples")
        # float64, which MPS has not.
        dtype = torch.float32 if first.device.type == "mps" else torch.float64
        flat = {name: features[name].detach().to(dtype).flatten(0, -2) for name in self._names}
        means = {name: each.mean(0) for name, each in flat.items()}
        centred = {name: each - means[name] for name, each in flat.items()}
        scatters = {(x, y): centred[x].mT @ centred[y] for x, y in self._products}
        self._merge(first.shape[:-1].numel(), means, scatters)

    def value(self, x: Name, y: Name) -> float:
        """The alignment of everything added; NaN before anything was, or if one is constant."""
        if not self._count or self._is_constant(x) or self._is_constant(y):
            return math.nan
        xy, xx, yy = (
            torch.linalg.matrix_norm(self._scatters[pair]).item() for pair in ((x, y), (x, x), (y, y))
        )
        return min(xy**2 / (xx * yy), 1.0)

    def _merge(
        self, count: int, means: Mapping[Name, Tensor], scatters: Mapping[tuple[Name, Name], Tensor]
    ) -> None:
        if not self._count:
            self._count, self._means, self._scatters = count, {**means}, {**scatters}
            return
        # Chan et al. 1979: scatter about the common mean without the cancellation in Σxyᵀ − n·x̄ȳᵀ.
        total = self._count + count
        shifts = {name: means[name] - self._means[name] for name in self._names}
        for (x, y), scatter in scatters.items():
            apart = torch.outer(shifts[x], shifts[y]) * (self._count * count / total)
            self._scatters[x, y] += scatter + apart
        for name, shift in shifts.items():
            self._means[name] = self._means[name] + shift * (count / total)
        self._count = total

    def _is_constant(self, name: Name) -> bool:
        """Whether nothing but the rounding of the mean is left of these features."""
        mean = self._means[name]
        variation = self._scatters[name, name].trace().item()
        size = self._count * mean.square().sum().item()
        return variation <= (100 * torch.finfo(mean.dtype).eps) ** 2 * size
