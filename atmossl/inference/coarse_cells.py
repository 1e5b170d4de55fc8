"""The coarse cells that a downscaling is given, and how far fine fields are from them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from atmossl.data.variables import AMOUNTS
from atmossl.geometry import Box
from atmossl.inference.plan import Fields, Plan, Source
from atmossl.masking.cells import coarsen, with_coarse_means
from atmossl.masking.tasks import Downscaling


@dataclass(frozen=True)
class CoarseCells:
    """The given coarse cells under some rows of a downscaling.

    given: [level lat lon] of every variable at the written step. weight: relative areas of the fine
    rows. are_draws: members are draws of noise. closes_circle: of the fine grid.
    """

    task: Downscaling
    given: dict[str, Float[Tensor, "level lat lon"]]
    weight: Float[Tensor, "lat"]
    are_draws: bool
    closes_circle: bool

    @classmethod
    def read(cls, plan: Plan, source: Source, names: Iterable[str], rows: slice) -> "CoarseCells":
        """Read them from the record, which itself is fine or coarse."""
        task, num_lon = plan.task.downscaling, plan.grid.shape[1]
        assert task is not None
        step, factor = source.start + plan.steps_before, task.factor
        box = Box(rows.start, 0, rows.stop - rows.start, num_lon)
        if task.coarse_input:
            box = Box(box.lat_start // factor, 0, box.lat_size // factor, num_lon // factor)
        weight, given = torch.from_numpy(plan.grid.weights[rows]), {}
        for name in names:
            read = source.segment.read(name, plan.trained.level_values[name], step, 1, box)
            values = torch.from_numpy(read)[:, 0].double()
            given[name] = values if task.coarse_input else coarsen(values, weight, factor)
        return cls(task, given, weight, plan.trained.model.any_member, plan.grid.periodic)

    def kept(self, fields: Fields) -> Fields:
        """Fields [step member level lat lon] with the given means, unless the task says not to: in
        every draw of noise; for a tail in the mean, since its values of single cells would lose
        spread."""
        if self.task.consistent is False:
            return fields
        kept = {}
        for name, given in self.given.items():
            members = torch.from_numpy(fields[name]).double()
            fine = members if self.are_draws else members.mean(dim=1, keepdim=True)
            moved = with_coarse_means(
                fine,
                given,
                self.weight,
                self.task.factor,
                is_amount=name in AMOUNTS,
                closes_circle=self.closes_circle,
            )
            kept[name] = (moved if self.are_draws else members + (moved - fine)).float().numpy()
        return kept

    def departure(self, fields: Fields) -> dict[str, float]:
        """The mean square difference of coarse cells from the given ones, per variable: of the
        members, or of the ensemble mean of a tail."""
        departure, factor = {}, self.task.factor
        area = self.weight.unflatten(0, (-1, factor)).sum(1)[:, None]
        for name, given in self.given.items():
            members = torch.from_numpy(fields[name]).double()
            fine = members if self.are_draws else members.mean(dim=1)
            difference = given - coarsen(fine, self.weight, factor)
            known = torch.where(difference.isnan(), 0.0, area)
            departure[name] = float((difference.nan_to_num() ** 2 * known).sum() / known.sum())
        return departure
