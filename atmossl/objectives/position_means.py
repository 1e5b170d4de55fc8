"""Compares a prediction with the mean of its target at every position. A network that knows
where a token lies, but nothing of the state, is not better than this mean."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atmossl.batch import TokenGrid, TokenIndex

NUM_BINS = 1024  # positions beyond so many share a mean with others


def position_bins(grid: TokenGrid, chosen: TokenIndex) -> Int[Tensor, "batch token"]:
    """A number below `NUM_BINS` for the position (level, latitude, longitude) of every chosen
    token, the same in any window and at any time."""
    _, num_times, num_lat, num_lon = grid.shape
    index = chosen.index
    lat = grid.lat.gather(1, index // num_lon % num_lat)
    lon = grid.lon.gather(1, index % num_lon) % 360.0
    height, width = grid.lat_extent[:, None], grid.lon_extent[:, None]
    rows, columns = (180.0 / height).round().long() + 1, (360.0 / width).round().long() + 1
    level = index // (num_times * num_lat * num_lon)
    # centres lie at whole or half tokens from the pole and the meridian: neither is a number's edge
    row, column = ((lat + 90.0) / height + 0.25).long(), (lon / width + 0.25).long()
    return ((level * rows + row) * columns + column) % NUM_BINS


def position_sums(
    predicted: Float[Tensor, "batch token value"],
    target: Float[Tensor, "batch token value"],
    weight: Float[Tensor, "batch token"] | Float[Tensor, "batch token value"],
    bins: Int[Tensor, "batch token"],
) -> Float[Tensor, "bin sums"]:
    """What one batch adds for every position: the number of tokens with weight, squared errors,
    weights, weighted squares of the target, and the weighted target itself, value by value."""
    weight = weight if weight.ndim == target.ndim else weight[..., None]
    weight = weight.expand_as(target).double()
    error = (weight * (predicted - target).double() ** 2).sum(dim=-1)
    square = (weight * target.double() ** 2).sum(dim=-1)
    count = (weight > 0).any(dim=-1).double()
    columns = [count, error, square]
    values = torch.cat([torch.stack(columns, dim=-1), weight, weight * target], dim=-1)
    sums = values.new_zeros(NUM_BINS, values.shape[-1])
    return sums.index_add_(0, bins.flatten(), values.flatten(0, 1))


def position_ratio(sums: Float[Tensor, "bin sums"]) -> Float[Tensor, ""]:
    """The RMSE of the prediction over that of the mean of all other tokens at the same position."""
    count, error, square = sums[:, :3].unbind(dim=1)
    weight, target = sums[:, 3:].chunk(2, dim=1)
    around = square - (target**2 / weight.clamp_min(1e-12)).sum(dim=1)
    unbiased = around * count / (count - 1).clamp_min(1.0)
    several = count > 1.5
    tiny = torch.finfo(sums.dtype).tiny
    return (error[several].sum() / unbiased[several].sum().clamp_min(tiny)).sqrt().float()


Sums = Mapping[str, Mapping[str, Tensor]]
_MARK = "position:"


def split_positions(
    sums: Sums,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """The sums by task in two parts: those whose names begin with `position:`, without this
    beginning, and all others."""
    marked = {
        task: {k.removeprefix(_MARK): v for k, v in task_sums.items() if k.startswith(_MARK)}
        for task, task_sums in sums.items()
    }
    unmarked = {
        task: {k: v for k, v in task_sums.items() if not k.startswith(_MARK)}
        for task, task_sums in sums.items()
    }
    return marked, unmarked


def position_ratios(
    sums: Mapping[str, Mapping[str, Float[Tensor, "bin sums"]]],
) -> dict[str, Float[Tensor, ""]]:
    """`position_ratio/TASK/STREAM` for positions that were seen twice, and the mean of these."""
    values = {
        f"position_ratio/{task}/{stream}": position_ratio(of_stream)
        for task, by_stream in sums.items()
        for stream, of_stream in by_stream.items()
        if bool((of_stream[:, 0] > 1.5).any())
    }
    mean = torch.stack(list(values.values())).mean() if values else None
    return values if mean is None else values | {"position_ratio/mean": mean}
