"""Fields of a window on coarser and finer cells: means over coarse cells, interpolation, and what
another model says on the cells and steps of a window."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from atmossl.batch import PRIMARY, StreamSpec, StreamWindow, token_grid

_HALO = 2  # coarse columns that the cubic interpolation reads on each side
_WHOLE = 0.999  # share of observed values below which an interpolated value counts as missing


def coarsen(
    fields: Float[Tensor, "*axes lat lon"], weight: Float[Tensor, "lat"], factor: int
) -> Float[Tensor, "*axes coarse_lat coarse_lon"]:
    """Area-weighted mean over blocks of factor x factor cells (conservative coarsening).

    Raises:
        ValueError: the factor does not divide the window.
    """
    num_lat, num_lon = fields.shape[-2:]
    if num_lat % factor or num_lon % factor:
        raise ValueError(
            f"coarsen factor {factor} does not divide the window of {num_lat} x {num_lon} cells"
        )
    weighted = fields * weight[:, None]
    sums = weighted.unflatten(-1, (-1, factor)).sum(-1).unflatten(-2, (-1, factor)).sum(-2)
    return sums / (weight.unflatten(-1, (-1, factor)).sum(-1)[:, None] * factor)


def repeat_coarse(coarse: Tensor, factor: int) -> Tensor:
    """A fine field in which every cell has the value of its coarse cell."""
    return coarse.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def interpolate_cells(
    fields: Float[Tensor, "*axes coarse_lat coarse_lon"], size: tuple[int, int]
) -> Float[Tensor, "*axes lat lon"]:
    """Bicubic interpolation to the centres of `size` smaller cells, edges repeated."""
    flat = fields.flatten(0, -3)[:, None]
    fine = functional.interpolate(flat, size=size, mode="bicubic", align_corners=False)
    return fine[:, 0].unflatten(0, fields.shape[:-2])


def with_coarse_means(
    fine: Float[Tensor, "*axes level lat lon"],
    coarse: Float[Tensor, "level coarse_lat coarse_lon"],
    weight: Float[Tensor, "lat"],
    factor: int,
    *,
    is_amount: bool,
    closes_circle: bool,
) -> Float[Tensor, "*axes level lat lon"]:
    """A fine field whose coarse cells have the given means; one whose mean is not known stays as it
    is. What the means of a row of coarse cells lack is added as a smooth curve along longitude that
    has these means (`spread_along_row`), the same on all its fine rows; in a row with unknown means
    to all cells of a coarse cell alike. An amount, such as precipitation, is multiplied instead
    wherever the sum would fall below 0 (both constraints: Harder et al. 2023, JMLR 24,
    "Hard-constrained deep learning for climate downscaling", section 3). weight: relative areas of
    the rows. closes_circle: whether the last column lies beside the first."""
    lacking = coarse - coarsen(fine, weight, factor)
    row_is_known, lacking = lacking.isfinite().all(dim=-1, keepdim=True), lacking.nan_to_num()
    smooth = spread_along_row(lacking, factor, closes_circle=closes_circle)
    along_row = torch.where(row_is_known, smooth, lacking.repeat_interleave(factor, dim=-1))
    shifted = fine + along_row.repeat_interleave(factor, dim=-2)
    if not is_amount:
        return shifted
    below = shifted.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor)).amin(dim=(-3, -1)) < 0
    positive = fine.clamp_min(0)
    mean = coarsen(positive, weight, factor)
    scaled = torch.where(
        repeat_coarse(mean > 0, factor),
        positive * repeat_coarse(coarse / mean.clamp_min(torch.finfo(mean.dtype).tiny), factor),
        repeat_coarse(coarse, factor),
    )
    return torch.where(repeat_coarse(below & (coarse >= 0), factor), scaled, shifted)


def spread_along_row(
    means: Float[Tensor, "*axes coarse_lon"], factor: int, *, closes_circle: bool
) -> Float[Tensor, "*axes lon"]:
    """Values whose means over blocks of `factor` are the given ones: the most likely ones of a
    Gaussian process along the row (block kriging, Cressie 1993, section 3.2, of all blocks), whose
    power falls with the fourth power of the wavenumber beyond the waves that the means resolve. So
    no edges of blocks are seen. A row that does not close the circle is continued by its mirror
    image.

    In Fourier space a wave of the means is the sum of the waves k of the row that look alike on the
    blocks, each weakened and shifted by the mean over a block, h(k). Of power p(k), each has the
    part p(k) h*(k) / sum p |h|^2 of it.
    """
    if not closes_circle:
        mirrored = torch.cat([means, means.flip(-1)], dim=-1)
        whole = spread_along_row(mirrored, factor, closes_circle=True)
        return whole[..., : means.shape[-1] * factor]
    num_coarse = means.shape[-1]
    wave = torch.fft.fftfreq(num_coarse * factor, 1 / (num_coarse * factor), dtype=means.dtype)
    cells = torch.arange(factor, dtype=means.dtype)
    angle = 2 * torch.pi * wave * cells[:, None] / (num_coarse * factor)
    response = torch.polar(torch.ones_like(angle), angle).mean(0)
    power = (1 + (2 * wave / num_coarse) ** 2) ** -2
    among = (power * response.abs() ** 2).unflatten(0, (factor, num_coarse)).sum(0)
    share = power * response.conj() / among.repeat(factor)
    waves = torch.cat([torch.fft.fft(means)] * factor, dim=-1)
    return torch.fft.ifft(waves * share * factor).real


def other_models(specs: Sequence[StreamSpec]) -> tuple[StreamSpec, ...]:
    """The streams that give what another model says of a field that is predicted."""
    predicted = {
        (name, level)
        for spec in specs
        if spec.role == "predict" and spec.data == PRIMARY
        for name in spec.variables
        for level in spec.level_values
    }
    return tuple(
        spec
        for spec in specs
        if spec.role == "input"
        and spec.data != PRIMARY
        and any((n, level) in predicted for n in spec.variables for level in spec.level_values)
    )


def other_model_guess(
    window: StreamWindow, windows: Sequence[StreamWindow]
) -> Float[Tensor, "variable level time lat lon"]:
    """What other models say of the fields of a window, on its cells and steps, in standard
    deviations from their own mean; 0, the climatological mean, of what none of them has."""
    guess = torch.zeros_like(window.fields)
    if window.spec.role != "predict":
        return guess
    chosen = {spec.name for spec in other_models([w.spec for w in windows])}
    for other in windows:
        if other.spec.name not in chosen:
            continue
        fields = _on_window(other, window)
        for row, name in enumerate(window.spec.variables):
            for column, level in enumerate(window.spec.level_values):
                if name in other.spec.variables and level in other.spec.level_values:
                    place = other.spec.variables.index(name), other.spec.level_values.index(level)
                    guess[row, column] = fields[place]
    return guess


def _on_window(other: StreamWindow, window: StreamWindow) -> Tensor:
    """The fields of a window on the cells and steps of another one of the same air; 0 where values
    are missing."""
    if other.valid is None:
        return _on_cells(_at_times(other.fields, other, window), window)
    there = other.valid.to(other.fields)
    fields, share = (
        _on_cells(_at_times(values, other, window), window)
        for values in (other.fields * there, there.expand_as(other.fields))
    )
    return torch.where(share > _WHOLE, fields, 0.0)


def _at_times(fields: Tensor, other: StreamWindow, window: StreamWindow) -> Tensor:
    """Linear in time between the steps of the other window; the first and last are repeated."""
    have, wanted = other.time_hours.double(), window.time_hours.double()
    if have.shape == wanted.shape and bool(torch.equal(have, wanted)):
        return fields
    late = torch.searchsorted(have, wanted).clamp(1, len(have) - 1)
    share = ((wanted - have[late - 1]) / (have[late] - have[late - 1])).clamp(0.0, 1.0)
    before, after = fields[..., late - 1, :, :], fields[..., late, :, :]
    return torch.lerp(before, after, share.to(fields)[:, None, None])


def _on_cells(fields: Tensor, window: StreamWindow) -> Tensor:
    """Cubic interpolation to finer cells, with edges repeated but for a closed circle of longitude;
    means over cells that are finer than those of the window."""
    num_lat, num_lon = window.fields.shape[-2:]
    if fields.shape[-2:] == (num_lat, num_lon):
        return fields
    if fields.shape[-1] > num_lon:
        flat = fields.flatten(0, -4)
        means = functional.interpolate(flat, size=(num_lat, num_lon), mode="area")
        return means.unflatten(0, fields.shape[:-3])
    if not token_grid(window).periodic:
        return interpolate_cells(fields, (num_lat, num_lon))
    wide = torch.cat([fields[..., -_HALO:], fields, fields[..., :_HALO]], dim=-1)
    beyond = _HALO * num_lon // fields.shape[-1]
    fine = interpolate_cells(wide, (num_lat, num_lon + 2 * beyond))
    return fine[..., beyond : beyond + num_lon]
