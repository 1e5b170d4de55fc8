"""Unions of token masks: what one of several masks hides is hidden, and what all show is shown."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from atmossl.batch import Corruption, StreamMask, StreamSpec
from atmossl.masking.base import Points, TokenLayout, points_of, share_known


def union(
    masks: Sequence[tuple[StreamMask, ...]], layouts: tuple[TokenLayout, ...]
) -> tuple[StreamMask, ...]:
    """The union of masks, per stream. A masked token stays masked where another mask would coarsen
    it. All masks of tasks that coarsen do so by one factor."""
    return tuple(
        _union_of_stream(of_stream, layout.spec)
        for *of_stream, layout in zip(*masks, layouts, strict=True)
    )


def _union_of_stream(masks: Sequence[StreamMask], spec: StreamSpec) -> StreamMask:
    by_task = [m for m in masks if _is_coarse(m).any() and (m.points is None or m.coarse_by_task)]
    factors = {mask.coarsen_factor for mask in by_task}
    assert len(factors) <= 1, factors
    if all(mask.points is None for mask in masks):
        return StreamMask(_least_shown(masks), coarsen_factor=max(factors, default=1))
    hidden = reduce(torch.logical_or, [_hidden_points(mask, spec) for mask in masks])
    share = share_known(hidden, spec)
    if not by_task:
        # several masks may together hide every point of a token
        corruption = torch.where(share == 0, int(Corruption.MASK), _least_shown(masks))
        factor = max(mask.coarsen_factor for mask in masks)
        return StreamMask(corruption, coarsen_factor=factor, points=hidden)
    # There is one factor, that of the task. Tokens that are hidden in part and that the task shows
    # as they are could be coarse by another one only, so they are hidden as a whole.
    corruption = _least_shown(by_task)
    dark = (share == 0) | ((share < 1) & (corruption != Corruption.COARSEN))
    return StreamMask(
        torch.where(dark, int(Corruption.MASK), corruption),
        coarsen_factor=factors.pop(),
        points=hidden,
        coarse_by_task=True,
    )


def _least_shown(masks: Sequence[StreamMask]) -> Tensor:
    """For every token, the corruption that shows least of it."""
    known_by = torch.tensor([3, 0, 0, 1, 1, 2, 2])  # by Corruption: how much a token still shows
    assert len(known_by) == len(Corruption)
    corruption = masks[0].corruption
    for mask in masks[1:]:
        less = known_by[mask.corruption] < known_by[corruption]
        corruption = torch.where(less, mask.corruption, corruption)
    return corruption


def _hidden_points(mask: StreamMask, spec: StreamSpec) -> Points:
    return points_of(_is_dark(mask.corruption), spec) if mask.points is None else mask.points


def _is_coarse(mask: StreamMask) -> Tensor:
    return mask.corruption == Corruption.COARSEN


def _is_dark(corruption: Tensor) -> Tensor:
    """Which tokens show nothing of their values."""
    return (corruption == Corruption.MASK) | (corruption == Corruption.DROP)
