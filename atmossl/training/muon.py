"""Muon for the weight matrices and AdamW for all other parameters, as one optimiser."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from atmossl.model.network import half_is_fast

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_lists: Any = torch  # its operations on lists of tensors have no public names
_MOST_VALUES = 2**27  # of matrices that are computed together, for memory


def orthogonalise(
    matrices: Float[Tensor, "*matrix row column"], steps: int = 5
) -> Float[Tensor, "*matrix row column"]:
    """Roughly the nearest orthogonal matrices, by a quintic Newton-Schulz iteration: singular
    values end between about 0.7 and 1.2 (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon).
    """
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    if x.dtype == torch.float32 and half_is_fast(x.device):
        x = x.bfloat16()  # the iteration is rough anyway, and its products cost as much as a step
    x = x.flatten(0, -3) if x.ndim > 2 else x[None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(matrices.shape).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """One optimiser for two kinds of parameters. Groups with `muon=True` hold matrices, whose
    momentum is orthogonalised; their step is scaled to the size of Adam's (0.2 sqrt(max(rows,
    columns)), Liu et al. 2025, arXiv 2502.16982), so that one learning rate serves both. All
    other groups are updated by AdamW."""

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
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            _lists._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            (self._muon if group["muon"] else self._adam)(parameters, group)
        return loss

    def _states(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        states = [self.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        return [state[name] for state in states]

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        # late: loads torch's distributed tensors, which validating a configuration does not need
        from atmossl.training.distributed import like, whole

        momenta, gradients = self._states(parameters, "momentum"), _gradients(parameters)
        _lists._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        for together in alike(parameters):
            weights, gradients = [parameters[n] for n in together], _gradients(parameters, together)
            nesterov = _lists._foreach_lerp(
                gradients, [momenta[n] for n in together], group["momentum"]
            )
            matrices = orthogonalise(torch.stack([whole(d).flatten(1) for d in nesterov]))
            scale = 0.2 * max(matrices.shape[1:]) ** 0.5
            updates = [
                like(matrix.view(p.shape), p) for matrix, p in zip(matrices, weights, strict=True)
            ]
            _lists._foreach_add_(weights, updates, alpha=-group["lr"] * scale)

    def _adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = _gradients(parameters)
        means, squares = (self._states(parameters, name) for name in ("mean", "square"))
        steps = []
        for parameter in parameters:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            steps.append(state["step"])
        beta1, beta2 = group["betas"]
        _lists._foreach_lerp_(means, gradients, 1 - beta1)
        _lists._foreach_lerp_(squares, _lists._foreach_mul(gradients, gradients), 1 - beta2)
        mean = _lists._foreach_div(means, [1 - beta1**step for step in steps])
        square = _lists._foreach_div(squares, [1 - beta2**step for step in steps])
        _lists._foreach_sqrt_(square)
        _lists._foreach_add_(square, 1e-8)
        _lists._foreach_addcdiv_(parameters, mean, square, value=-group["lr"])


def _gradients(parameters: list[Tensor], chosen: Iterable[int] | None = None) -> list[Tensor]:
    """The gradients of all parameters, or of those numbered `chosen`, without parameters that
    have none."""
    numbers = range(len(parameters)) if chosen is None else chosen
    gradients = [parameters[n].grad for n in numbers]
    return [gradient for gradient in gradients if gradient is not None]


def alike(parameters: list[Tensor]) -> list[list[int]]:
    """Groups of parameters of equal shape, by their numbers, whose matrices are multiplied
    together, as far as memory goes."""
    groups: dict[torch.Size, list[list[int]]] = {}
    for number, parameter in enumerate(parameters):
        parts = groups.setdefault(parameter.shape, [[]])
        if (len(parts[-1]) + 1) * parameter.numel() > _MOST_VALUES and parts[-1]:
            parts.append([])
        parts[-1].append(number)
    return [numbers for parts in groups.values() for numbers in parts]
