"""The inputs and targets of a ridge regression, for each task.

A sample is anchored at one time index of a run. Inputs lie at `input_offsets` steps from it and
targets at `target_offsets`; the regression learns target minus `trivial`, so that a strong penalty
falls back to the trivial answer. Targets are never read by `trivial`, nor by `inputs`.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from atmossl.evaluation.spatial import Coarsening
from atmossl.geometry import Grid
from atmossl.value_faults import as_written

Targets = Float[np.ndarray, "anchor target channel lat lon"]


@dataclass(frozen=True)
class Block:
    """A few consecutive times of one run, and the anchors among them.

    Attributes:
        signs: each channel's sign across a pole.
    """

    fields: Float[np.ndarray, "time channel lat lon"]
    anchors: Int[np.ndarray, " anchor"]
    grid: Grid
    signs: Float[np.ndarray, " channel"]

    def at(self, offset: int) -> Float[np.ndarray, "anchor channel lat lon"]:
        """Fields `offset` steps from every anchor."""
        return self.fields[self.anchors + offset]


class RidgeTask:
    """A task as inputs, targets and a trivial answer around an anchor time.

    factor: fine cells per input cell along each axis. is_forecast: whether the output has init and
    lead times; else it has plain times. hidden_channels: those that are targets only.
    """

    factor: int = 1
    is_forecast: bool = False
    hidden_channels: tuple[int, ...] = ()

    @property
    def input_offsets(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def target_offsets(self) -> tuple[int, ...]:
        return (0,)

    def trivial(self, block: Block) -> Targets:
        """The answer without a regression, on the fine grid."""
        raise NotImplementedError


@dataclass(frozen=True)
class RidgeForecast(RidgeTask):
    """Predicts states `leads` steps ahead from `history` steps that end now; its trivial answer
    is persistence."""

    history: int = 3
    leads: tuple[int, ...] = (1, 2)
    is_forecast = True

    def __post_init__(self) -> None:
        if self.history < 1 or not self.leads or min(self.leads) < 1:
            raise ValueError(
                f"history and leads must be 1 or more steps, got history={self.history}, "
                f"leads={as_written(self.leads)}"
            )

    @property
    def input_offsets(self) -> tuple[int, ...]:
        return tuple(range(1 - self.history, 1))

    @property
    def target_offsets(self) -> tuple[int, ...]:
        return self.leads

    def trivial(self, block: Block) -> Targets:
        return np.stack([block.at(0)] * len(self.leads), axis=1)


@dataclass(frozen=True)
class TemporalInterpolation(RidgeTask):
    """Predicts one hidden step from `neighbours` steps on each side; its trivial answer is the
    mean of the nearest two."""

    neighbours: int = 2

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be 1 or more steps, got {self.neighbours}")

    @property
    def input_offsets(self) -> tuple[int, ...]:
        steps = range(1, self.neighbours + 1)
        return (*(-step for step in reversed(steps)), *steps)

    def trivial(self, block: Block) -> Targets:
        return (0.5 * (block.at(-1) + block.at(1)))[:, None]


class _Around(RidgeTask):
    """Predicts the anchor's own step from this step and `neighbours` steps on each side."""

    neighbours: int

    @property
    def input_offsets(self) -> tuple[int, ...]:
        return tuple(range(-self.neighbours, self.neighbours + 1))


@dataclass(frozen=True)
class RidgeDownscaling(_Around):
    """Predicts all fine values of a block from block means, at the step itself and `neighbours`
    steps on each side.

    Trivially, bicubic interpolation of the block means. Every dataset handed in is at full
    resolution: the block means are taken here and nothing else of it is an input.
    """

    factor: int = 4
    neighbours: int = 1

    def __post_init__(self) -> None:
        if self.factor < 2 or self.neighbours < 0:
            raise ValueError(
                f"factor must be 2 or more and neighbours 0 or more, got factor={self.factor}, "
                f"neighbours={self.neighbours}"
            )

    def trivial(self, block: Block) -> Targets:
        coarsening = Coarsening(block.grid, self.factor)
        means = coarsening.block_mean(block.at(0))
        return coarsening.bicubic(means, block.signs[:, None, None])[:, None]


@dataclass(frozen=True)
class CrossVariable(_Around):
    """Predicts hidden channels from the other channels around the cell, at the step itself and
    `neighbours` steps on each side.

    Trivially, nothing: a strong penalty falls back to the mean of the latitude row.
    """

    hidden_channels: tuple[int, ...]
    neighbours: int = 0

    def __post_init__(self) -> None:
        if not self.hidden_channels or self.neighbours < 0:
            raise ValueError(
                f"hide one channel or more and take 0 neighbours or more, got "
                f"hidden_channels={self.hidden_channels}, neighbours={self.neighbours}"
            )

    def trivial(self, block: Block) -> Targets:
        return np.zeros_like(block.at(0))[:, None]


@dataclass(frozen=True)
class RidgeCorrection(RidgeTask):
    """Predicts an analysis from another model's fields around the cell, at the step itself and
    `history - 1` steps before it. Trivially, the other model's value.

    sources: for every channel, the one that is its trivial answer: for one of the analysis, the
    same variable and level of the other model; for one of the other model, itself.
    hidden_channels: those of the analysis.
    """

    sources: tuple[int, ...]
    hidden_channels: tuple[int, ...]
    history: int = 2

    @property
    def input_offsets(self) -> tuple[int, ...]:
        return tuple(range(1 - self.history, 1))

    def trivial(self, block: Block) -> Targets:
        return block.at(0)[:, list(self.sources)][:, None]
