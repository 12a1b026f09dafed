"""Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

Not timm's: timm is optional, and its step waits for a learning rate that lies on the device, so that no CUDA
graph could hold it. Nor Muon: PyTorch's waits as well, and takes single matrices and nothing else.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LionOptimizer(torch.optim.Optimizer):
    """Every weight moves by lr, in the direction of the sign of its momentum.

        u = sign(β₁ m + (1 − β₁) g),   w ← w − lr (u + weight_decay · w),   m ← β₂ m + (1 − β₂) g

    As PyTorch's fused optimisers it takes no step where the tensor `found_inf`, if it has been set, is not 0;
    the host does not wait to know.

    Args:
        params: parameters, or groups of them.
        fused: whether `found_inf` may be set.
    """

    found_inf: Tensor

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step(parameters, group)
        return loss

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        gradients, taken = self._gradients(parameters)
        moments = [self._moment(parameter) for parameter in parameters]
        updates = torch._foreach_mul(moments, beta1)
        torch._foreach_add_(updates, gradients, alpha=1 - beta1)
        torch._foreach_sign_(updates)
        rate = group["lr"] * taken
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_mul_(updates, -rate)
        torch._foreach_add_(parameters, updates)
        torch._foreach_mul_(moments, 1 - (1 - beta2) * taken)
        torch._foreach_add_(moments, torch._foreach_mul(gradients, (1 - beta2) * taken))

    def _gradients(self, parameters: list[Tensor]) -> tuple[list[Tensor], float | Tensor]:
        """The gradients, finite where they are not to count, and 1 if the step is taken, else 0."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not hasattr(self, "found_inf"):
            return gradients, 1.0
        return [g.nan_to_num(0, 0, 0) for g in gradients], (self.found_inf == 0).float()

    def _moment(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        moment: Tensor = state["exp_avg"]
        return moment
