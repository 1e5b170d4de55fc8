"""Downscaling against its coarse input: how far the prediction departs from it, and a remedy."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from atmossl.data.segment import Segment
from atmossl.geometry import Box, Grid
from atmossl.masking.base import coarsen, repeat_coarse
from atmossl.masking.tasks import Downscaling


@dataclass(frozen=True)
class CoarseCells:
    """The coarse cells that a downscaling is given, of a fine record or of a coarse one.

    grid: of the prediction. levels: in hPa, of every variable.
    """

    grid: Grid
    task: Downscaling
    levels: Mapping[str, tuple[int, ...]]

    def compare(
        self, fields: dict[str, np.ndarray], segment: Segment, step: int, rows: slice
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """The fields [step member level lat lon] of some rows, corrected if the task says so, and
        per variable the mean square of what their coarse cells lack of the given ones then."""
        factor = self.task.factor
        weight = torch.from_numpy(self.grid.weights[rows]).float()
        corrected, departure = {}, {}
        for name, values in fields.items():
            fine = torch.from_numpy(values)
            given = self._given(name, segment, step, rows, weight)
            missing = given - coarsen(fine, weight, factor)
            if self.task.consistent:
                fine = fine + repeat_coarse(missing, factor)
                missing = given - coarsen(fine, weight, factor)
            area = weight.unflatten(0, (-1, factor)).sum(1)
            mean_square = (missing.double() ** 2 * area[:, None]).mean() / area.mean()
            departure[name] = float(mean_square)
            corrected[name] = fine.numpy()
        return corrected, departure

    def _given(
        self, name: str, segment: Segment, step: int, rows: slice, weight: torch.Tensor
    ) -> torch.Tensor:
        """Coarse cells [level lat lon] of one variable at one step of the record."""
        factor, num_lon = self.task.factor, self.grid.shape[1]
        box = Box(rows.start, 0, rows.stop - rows.start, num_lon)
        if self.task.coarse_input:
            box = Box(box.lat_start // factor, 0, box.lat_size // factor, num_lon // factor)
        values = torch.from_numpy(segment.read(name, self.levels[name], step, 1, box))[:, 0]
        return values if self.task.coarse_input else coarsen(values, weight, factor)
