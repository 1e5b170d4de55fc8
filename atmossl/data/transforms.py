"""Invertible transforms of skewed variables, before normalisation."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from atmossl.setting_types import PositiveFloat

Kind = Literal["log", "sqrt"]


@dataclass(frozen=True)
class Transform:
    """`log`: sign(x) log(1 + |x| / scale), as Rasp and Thuerey (2021) for precipitation;
    `sqrt`: sign(x) sqrt(|x| / scale). scale: in the variable's units; far below it `log` is linear.

    Raises:
        ValueError: an unknown kind, or a scale that is not positive.
    """

    kind: Kind
    scale: PositiveFloat

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"transform {self.kind!r} does not exist; valid: {get_args(Kind)}")
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale} of a transform must be positive")

    def forward(self, values: np.ndarray) -> np.ndarray:
        size = np.abs(values) / np.asarray(self.scale, values.dtype)
        return np.sign(values) * (np.log1p(size) if self.kind == "log" else np.sqrt(size))

    def inverse(self, values: np.ndarray) -> np.ndarray:
        size = np.abs(values)
        size = np.expm1(size) if self.kind == "log" else size**2
        return np.sign(values) * size * np.asarray(self.scale, values.dtype)
