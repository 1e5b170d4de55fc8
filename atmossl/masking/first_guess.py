"""First guess of hidden values: linear in time between what is shown of the same place.

Where a whole token is shown or hidden, its points share their neighbours in time, which are then
found once per token, and only what is hidden is computed.
"""

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atmossl.batch import TokenSize


def guess_tokens(
    tokens: Float[Tensor, "level nt nlat nlon patch"],
    shown: Bool[Tensor, "level nt nlat nlon"],
    size: TokenSize,
) -> Float[Tensor, "level nt nlat nlon patch"]:
    """Shown tokens as they are, others by `interpolate_in_time`."""
    blocks = rearrange(
        tokens,
        "level nt nlat nlon (series pt point) -> level nt (nlat nlon) series pt point",
        pt=size.time,
        point=size.lat * size.lon,
    )
    guess = _fill(blocks, rearrange(shown, "level nt nlat nlon -> level nt (nlat nlon)"))
    return guess.reshape(tokens.shape)


def interpolate_in_time(
    source: Float[Tensor, "variable level time lat lon"],
    shown: Bool[Tensor, "*variable level time lat lon"],
) -> Float[Tensor, "variable level time lat lon"]:
    """Shown values as they are; others linear in time between shown ones of the same place, the
    nearest one beyond the first or last, and 0 where a place is never shown."""
    series = "variable level time lat lon -> (variable level) time (lat lon)"
    blocks = rearrange(source, series)[..., None, None, None]
    return _fill(blocks, rearrange(shown.expand(source.shape), series)).reshape(source.shape)


def _fill(
    blocks: Float[Tensor, "row nt place series pt point"], shown: Bool[Tensor, "row nt place"]
) -> Float[Tensor, "row nt place series pt point"]:
    """Blocks of `pt` steps, shown or hidden as a whole."""
    num_blocks, num_steps = shown.shape[1], blocks.shape[-2]
    before, after = _neighbours(shown)
    row, block, place = torch.nonzero(~shown, as_tuple=True)
    before, after = before[row, block, place], after[row, block, place]
    has_before, has_after = before >= 0, after < num_blocks
    known = has_before | has_after
    early = torch.where(has_before, before, after).clamp(0, num_blocks - 1)
    late = torch.where(has_after, after, before).clamp(0, num_blocks - 1)
    early_step = torch.where(has_before, num_steps - 1, 0)  # inside its block
    late_step = torch.where(has_after, 0, num_steps - 1)

    first = (early * num_steps + early_step)[:, None]
    span = ((late * num_steps + late_step)[:, None] - first).clamp_min(1)
    step = block[:, None] * num_steps + torch.arange(num_steps)
    share = ((step - first) / span).clamp(0.0, 1.0)  # [hidden pt]
    values = torch.lerp(  # [hidden series pt point]
        blocks[row, early, place, :, early_step][:, :, None],
        blocks[row, late, place, :, late_step][:, :, None],
        share[:, None, :, None],
    )
    values[~known] = 0.0
    filled = blocks.clone()
    filled[row, block, place] = values
    return filled


def _neighbours(
    shown: Bool[Tensor, "row nt place"],
) -> tuple[Int[Tensor, "row nt place"], Int[Tensor, "row nt place"]]:
    """The last shown block up to every block, -1 if none; the first from it on, nt if none."""
    visible = shown.numpy()
    num_blocks = visible.shape[1]
    number = np.arange(num_blocks)[:, None]
    before = np.maximum.accumulate(np.where(visible, number, -1), axis=1)
    after = np.where(visible, number, num_blocks)[:, ::-1]
    after = np.minimum.accumulate(after, axis=1)[:, ::-1]
    return torch.from_numpy(before), torch.from_numpy(after.copy())
