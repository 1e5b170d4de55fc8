"""Muon for the weight matrices, AdamW for everything else, as one optimiser."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from atmossl.training.distributed import like, whole

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest orthogonal matrix, by a quintic Newton-Schulz iteration: singular values
    end between about 0.7 and 1.2 (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).
    """
    a, b, c = _COEFFICIENTS
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix if wide else matrix.mT
    x = x / (torch.linalg.matrix_norm(x) + 1e-7)
    if x.dtype == torch.float32:
        x = x.bfloat16()  # the iteration is rough anyway, and its products cost as much as a step
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Groups with `muon=True` hold matrices, whose momentum is orthogonalised; their step is
    scaled to the size of Adam's (0.2 sqrt(max(rows, columns)), Liu et al. 2025, arXiv 2502.16982),
    so that one learning rate serves both."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "muon": False,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._muon if group["muon"] else self._adam
                update(parameter, group)
        return loss

    def _muon(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(state["momentum"], group["momentum"])  # Nesterov
        matrix = orthogonalise(whole(direction).flatten(1))
        scale = 0.2 * max(matrix.shape) ** 0.5
        update = like(matrix.view(parameter.shape), parameter)
        parameter.add_(update, alpha=-group["lr"] * scale)

    def _adam(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        state["step"] += 1
        one, two = group["betas"]
        state["mean"].lerp_(gradient, 1 - one)
        state["square"].lerp_(gradient.square(), 1 - two)
        mean = state["mean"] / (1 - one ** state["step"])
        square = state["square"] / (1 - two ** state["step"])
        parameter.addcdiv_(mean, square.sqrt().add_(1e-8), value=-group["lr"])
