"""What a task asks of a checkpoint that its training never did."""

from dataclasses import dataclass, replace

import numpy as np

from atmossl.batch import Corruption, StreamMask, TokenGrid, View
from atmossl.data.windows import WindowSize
from atmossl.geometry import TilePlan
from atmossl.masking.base import Layout, MaskingSampler

_NUM_DRAWS = 200


@dataclass(frozen=True)
class _Seen:
    """Features of masks. steps: most whole steps hidden. always: largest share of places hidden at
    every step. streams: whether a whole stream was hidden beside a visible one."""

    kinds: frozenset[str]
    factors: frozenset[int]
    steps: int
    always: float
    streams: bool

    @classmethod
    def of(cls, masks: list[StreamMask]) -> "_Seen":
        kinds = {Corruption(int(k)).name.lower() for m in masks for k in m.corruption.unique()}
        coarse = {
            m.coarsen_factor for m in masks if bool((m.corruption == Corruption.COARSEN).any())
        }
        # a coarse token is given, if less sharply, so it hides neither step nor place
        dark = [(m.corruption == Corruption.MASK) | (m.corruption == Corruption.DROP)
                for m in masks]  # fmt: skip
        whole = [bool(d.all()) for d in dark]
        return cls(
            kinds=frozenset(kinds - {"visible"}),
            factors=frozenset(coarse),
            steps=max(int(d.all(dim=3).all(dim=2).all(dim=0).sum()) for d in dark),
            always=max(float(d.all(dim=1).double().mean()) for d in dark),
            streams=any(whole) and not all(whole),
        )


def unseen(
    view: View, sampler: MaskingSampler, factor: int | None = None, *, stretch: float = 1.0
) -> list[str]:
    """How the view's mask goes beyond the draws of the sampler of the training, in sentences.

    factor: of the view's coarse tokens; not compared if None. stretch: the training's time step
    over that of the view, so that the sampler meets windows as in training.
    """
    layouts = tuple(
        Layout(stream.spec, _stretched(stream.grid, stretch)) for stream in view.streams
    )
    asked = _Seen.of([StreamMask(stream.corruption, factor or 1) for stream in view.streams])
    rng = np.random.default_rng(0)
    drawn = [_Seen.of(list(sampler(layouts, rng))) for _ in range(_NUM_DRAWS)]
    kinds = frozenset().union(*(d.kinds for d in drawn))
    factors = frozenset().union(*(d.factors for d in drawn))
    steps, always = max(d.steps for d in drawn), max(d.always for d in drawn)
    found = []
    if asked.kinds - kinds:
        found.append(f"tokens as {sorted(asked.kinds - kinds)}; training had {sorted(kinds)}")
    elif factor is not None and asked.factors - factors:
        found.append(f"cells coarsened by {sorted(asked.factors)}; training had {sorted(factors)}")
    if asked.steps > steps:
        found.append(f"{asked.steps} whole steps hidden; training hid {steps} at most")
    elif asked.always > always + 1e-9 and not asked.streams:
        found.append(
            f"{asked.always:.0%} of the places hidden at all steps; training hid {always:.0%} at "
            "most"
        )
    if asked.streams and not any(d.streams for d in drawn):
        found.append("a whole stream hidden; training always showed some of each")
    return found


def _stretched(grid: TokenGrid, times: float) -> TokenGrid:
    start = grid.time_hours[:1]
    return replace(
        grid,
        time_hours=start + (grid.time_hours - start) * times,
        time_extent=grid.time_extent * times,
    )


def untrained_window(tiles: TilePlan, trained: WindowSize) -> list[str]:
    """A sentence if the store's grid is smaller than the windows of the training."""
    had = f"training had {trained.lat or 'all'} x {trained.lon or 'all'}"
    if tiles.lat_size < trained.lat or tiles.lon_size < trained.lon:
        return [f"windows of {tiles.lat_size} x {tiles.lon_size} cells; {had}"]
    if not trained.lon and not tiles.grid.periodic:
        return [f"windows that do not close the circle of latitude; {had} cells"]
    return []


def untrained_step(step_hours: float, trained_hours: float | None) -> list[str]:
    """A sentence if the window's steps are not those of the training."""
    if trained_hours is None or abs(step_hours - trained_hours) < 1e-6:
        return []
    return [f"steps of {step_hours:g} h; training had {trained_hours:g} h"]
