"""Losses of an ensemble against the truth, their weighted mean, and the terms of an objective.

Losses of single values (`LOSSES`) map an ensemble of members [..., member, value] and a target
[..., value] to [..., value]. They are right as soon as every single value is well distributed,
whatever its neighbours do. Losses of fields (`FIELD_LOSSES`) look at many values at once: means
over areas, differences of neighbours, waves, whole patches. They need members that are fields, as
`model.ensemble=noise` gives them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from atmossl.batch import Prediction

Members = Float[Tensor, "*batch member value"]
Values = Float[Tensor, "*batch value"]
_SMALLEST_STD = 1e-3


class Ensemble:
    """The members of an ensemble, with statistics that several losses share. Each is computed
    once, on first use."""

    # not cached properties, whose lock no compiler follows
    _mean_and_variance: tuple[Values, Values] | None = None
    _gap: Values | None = None

    def __init__(self, members: Members) -> None:
        self.members = members
        self.count = members.shape[-2]

    @property
    def mean_and_variance(self) -> tuple[Values, Values]:
        """Mean, and mean square of the departures from it."""
        if self._mean_and_variance is None:
            self._mean_and_variance = _MeanAndVariance.apply(self.members)  # type: ignore[assignment]
        return self._mean_and_variance  # type: ignore[return-value]

    @property
    def mean(self) -> Values:
        return self.mean_and_variance[0]

    @property
    def std(self) -> Values:
        """Standard deviation (n - 1), bounded from below."""
        self._needs_two()
        variance = self.mean_and_variance[1] * (self.count / (self.count - 1))
        return (variance + _SMALLEST_STD**2).sqrt()

    @property
    def gap(self) -> Values:
        """Sum of |x_i - x_j| over all pairs i < j, from the sorted members in O(m log m)."""
        self._needs_two()
        if self._gap is None:
            ordered = self.members.sort(dim=-2).values
            rank = torch.arange(self.count, device=ordered.device, dtype=ordered.dtype)
            self._gap = torch.einsum("...mv,m->...v", ordered, 2 * rank - (self.count - 1))
        return self._gap

    def distance(self, target: Values) -> Values:
        """Mean of |x_i - target| over members."""
        return (self.members - target.unsqueeze(-2)).abs().mean(dim=-2)

    def _needs_two(self) -> None:
        if self.count < 2:
            raise ValueError("this loss needs an ensemble: set model.num_members to at least 2")


class _MeanAndVariance(torch.autograd.Function):
    """Mean and mean square departure over members, with few passes over them and none of their
    size kept: x_i's gradient is g_mean / m + g_square 2 (x_i - mean) / m, for the departures sum
    to 0. On CPUs torch.var is ten times as slow."""

    @staticmethod
    def forward(ctx: Any, members: Tensor) -> tuple[Tensor, Tensor]:
        mean = members.mean(dim=-2)
        ctx.save_for_backward(members, mean)
        return mean, (members - mean.unsqueeze(-2)).square_().mean(dim=-2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        members, mean = ctx.saved_tensors
        of_mean, of_square = (g.unsqueeze(-2) / members.shape[-2] for g in gradients)
        return torch.addcmul(of_mean, members - mean.unsqueeze(-2), 2 * of_square)


Loss = Callable[[Ensemble, Values], Values]


def ensemble_mse(ensemble: Ensemble, target: Values) -> Values:
    """The squared error of every member, averaged over members (the ensemble term of AtmoRep).
    It equals the squared error of the mean plus the mean square departure from the mean."""
    return mean_mse(ensemble, target) + ensemble.mean_and_variance[1]


def mean_mse(ensemble: Ensemble, target: Values) -> Values:
    """Squared error of the ensemble mean."""
    return (ensemble.mean - target) ** 2


def statistical(ensemble: Ensemble, target: Values) -> Values:
    """AtmoRep's statistical loss (Lessig et al. 2023, arXiv 2308.13280, section on the loss):

        (1 - exp(-(y - mean)^2 / (2 std^2)))^2 + sqrt(std)

    with the mean and standard deviation of the ensemble: the unnormalised Gaussian is 1 when the
    truth is the mean; the second term keeps the spread from growing without bound.
    """
    std = ensemble.std
    likelihood = torch.exp(-0.5 * ((target - ensemble.mean) / std) ** 2)
    return (1.0 - likelihood) ** 2 + std.sqrt()


def gaussian_nll(ensemble: Ensemble, target: Values) -> Values:
    """Negative log-likelihood of the truth under the ensemble's normal distribution."""
    std = ensemble.std
    score = (target - ensemble.mean) / std
    return 0.5 * score**2 + std.log() + 0.5 * math.log(2 * math.pi)


def fair_crps(ensemble: Ensemble, target: Values) -> Values:
    """Fair kernel CRPS (Ferro 2014, eq. for m members; unbiased in the ensemble size):

        mean_i |x_i - y| - sum_{i<j} |x_i - x_j| / (m (m - 1))

    Both terms carry gradients.
    """
    gap, count = ensemble.gap, ensemble.count
    return ensemble.distance(target) - gap / (count * (count - 1))


def crps(ensemble: Ensemble, target: Values) -> Values:
    """CRPS of the ensemble taken as a distribution (Hersbach 2000; Gneiting and Raftery 2007):

        mean_i |x_i - y| - sum_{i<j} |x_i - x_j| / m^2

    The one for a tail whose members are fixed functions of the input: they settle on the quantiles
    (i - 1/2) / m, and a normal distribution's eight have 0.99 of its spread. Under `fair_crps`,
    meant for random draws, they settle on (i - 1) / (m - 1), and the outermost two run away.
    """
    return ensemble.distance(target) - ensemble.gap / ensemble.count**2


def almost_fair_crps(ensemble: Ensemble, target: Values) -> Values:
    """95 % fair and 5 % usual CRPS (Lang et al. 2024, arXiv 2412.15832, eq. 4, alpha = 0.95). With
    few members the fair one alone is blind to all members but two where one of them is the truth.
    """
    return 0.95 * fair_crps(ensemble, target) + 0.05 * crps(ensemble, target)


Window = Float[Tensor, "batch level time lat lon"]
WindowMembers = Float[Tensor, "batch member level time lat lon"]


@dataclass(frozen=True)
class FieldEnsemble:
    """The ensemble and the truth of one stream's window, with variables and levels along one axis.
    Members are the truth wherever nothing is hidden.

    weight: what every cell counts: its relative area where a value is hidden and was observed, else
        0. area: the relative areas of all cells that were observed.
    periodic: the window closes the circle of longitude.
    """

    members: WindowMembers
    target: Window
    weight: Window
    area: Window
    periodic: bool


# values and what each counts, of the same shape
FieldLoss = Callable[[FieldEnsemble], tuple[Tensor, Tensor]]


def area_crps(fields: FieldEnsemble, size: int) -> tuple[Tensor, Tensor]:
    """Almost fair CRPS of means over `size` x `size` cells. An area counts by what it hides; areas
    that do not fit whole are left out."""
    area = _pooled(fields.area, size)
    smallest = torch.finfo(area.dtype).tiny

    def mean(values: Tensor, areas: Tensor, total: Tensor) -> Tensor:
        return _pooled(values * areas, size) / total.clamp_min(smallest)

    members = mean(fields.members, fields.area[:, None], area[:, None])
    values = _each(members, mean(fields.target, fields.area, area))
    return values, _pooled(fields.weight, size)


def difference_crps(fields: FieldEnsemble) -> tuple[Tensor, Tensor]:
    """Almost fair CRPS of the differences between neighbours along longitude and along latitude.
    A difference counts by the mean of its two cells, if both were observed."""
    pairs = [_apart(fields, axis) for axis in ("lon", "lat")]
    values = [_each(members, target).flatten() for members, target, _ in pairs]
    return torch.cat(values), torch.cat([weight.flatten() for *_, weight in pairs])


def spectral_crps(fields: FieldEnsemble) -> tuple[Tensor, Tensor]:
    """Almost fair CRPS of the real and imaginary parts of every zonal wave along every row of a
    window that closes the circle. Rows count by the share that they hide. The transform keeps
    sums of squares, so that the value of a wave has the unit of a cell's value."""
    return _of_waves(fields, *_waves(fields))


def relative_spectral_crps(fields: FieldEnsemble) -> tuple[Tensor, Tensor]:
    """The values of `spectral_crps`, each over the root mean square of that wave in the truth (by
    variable and level, over the batch, its times and rows). Short waves hold a thousandth of a
    field's variance, so that no other loss sees whether members have them; here all waves count
    alike."""
    members, target = _waves(fields)
    size = target.square().sum(dim=-1, keepdim=True).mean(dim=(0, 2, 3), keepdim=True).sqrt()
    size = size.clamp_min(_SMALLEST_STD)
    return _of_waves(fields, members / size.unsqueeze(1), target / size)


def _waves(fields: FieldEnsemble) -> tuple[Tensor, Tensor]:
    """The zonal waves of members and truth, [... lat wave part] with real and imaginary parts."""
    members, target = (
        torch.view_as_real(torch.fft.rfft(field.float(), dim=-1, norm="ortho"))
        for field in (fields.members, fields.target)
    )
    return members, target


def _of_waves(fields: FieldEnsemble, members: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    values = _each(members.flatten(-2), target.flatten(-2))
    return values, fields.weight.sum(dim=-1, keepdim=True).expand_as(values) / values.shape[-1]


def variogram(fields: FieldEnsemble) -> tuple[Tensor, Tensor]:
    """Variogram score of order 1/2 (Scheuerer and Hamill 2015, doi 10.1175/MWR-D-14-00269.1, eq. 8)
    of neighbours along longitude and latitude:

        (mean_i |x_i(a) - x_i(b)|^(1/2) - |y(a) - y(b)|^(1/2))^2
    """
    values, weights = [], []
    for axis in ("lon", "lat"):
        members, target, weight = _apart(fields, axis)
        # bounded from below, where the root has no derivative
        roots = (members.abs() + _SMALLEST_STD).sqrt().mean(dim=1)
        values.append((roots - (target.abs() + _SMALLEST_STD).sqrt()).square().flatten())
        weights.append(weight.flatten())
    return torch.cat(values), torch.cat(weights)


def energy(fields: FieldEnsemble) -> tuple[Tensor, Tensor]:
    """Fair energy score (Gneiting and Raftery 2007, eq. 22) of every column: all variables and
    levels of 4 x 4 cells as one vector,

        mean_i |x_i - y| - sum_{i<j} |x_i - x_j| / (m (m - 1)),

    over the root of the number of its values; cells that are shown add nothing. Of columns that do
    not fit whole nothing counts."""

    def columns(values: Tensor) -> Tensor:
        values = _whole(values * fields.area.sqrt().to(values).unsqueeze(1), _PATCH)
        return rearrange(
            values,
            "batch member level time (nlat lat) (nlon lon) "
            "-> batch member time nlat nlon (level lat lon)",
            lat=_PATCH,
            lon=_PATCH,
        )

    members, target = columns(fields.members), columns(fields.target[:, None])
    count = members.shape[1]
    if count < 2:
        raise ValueError("the energy score needs at least 2 members: set model.num_members")
    distance = _norm(members - target).mean(dim=1)
    first, second = torch.triu_indices(count, count, offset=1, device=members.device)
    spread = _norm(members[:, first] - members[:, second]).sum(dim=1)
    values = (distance - spread / (count * (count - 1))) / math.sqrt(members.shape[-1])
    return values, _pooled(fields.weight, _PATCH).sum(dim=1)


_PATCH = 4  # cells along latitude and longitude of one vector of the energy score


def _norm(values: Tensor) -> Tensor:
    """The length of vectors, with a finite derivative at 0."""
    return (values.square().sum(dim=-1) + _SMALLEST_STD**2).sqrt() - _SMALLEST_STD


def _each(members: WindowMembers, target: Window) -> Window:
    """The almost fair CRPS of every value."""
    flat = rearrange(members, "batch member ... -> batch member (...)")
    return almost_fair_crps(Ensemble(flat), target.flatten(1)).view_as(target)


def _whole(values: Tensor, size: int) -> Tensor:
    """The values without the last rows and columns that fill no area of `size` x `size` cells."""
    num_lat, num_lon = (count // size * size for count in values.shape[-2:])
    return values[..., :num_lat, :num_lon]


def _pooled(values: Tensor, size: int) -> Tensor:
    """Sums over areas of `size` x `size` cells."""
    return reduce(
        _whole(values, size),
        "... (nlat lat) (nlon lon) -> ... nlat nlon", "sum", lat=size, lon=size,
    )  # fmt: skip


def _apart(fields: FieldEnsemble, axis: Literal["lat", "lon"]) -> tuple[Tensor, Tensor, Tensor]:
    """Differences of neighbours, of members and of the truth, and the weight of each difference."""
    dim = -1 if axis == "lon" else -2
    closed = axis == "lon" and fields.periodic

    def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
        if closed:
            return values, values.roll(-1, dims=dim)
        length = values.shape[dim] - 1
        return values.narrow(dim, 0, length), values.narrow(dim, 1, length)

    (x, next_x), (y, next_y) = neighbours(fields.members), neighbours(fields.target)
    weight, next_weight = neighbours(fields.weight)
    area, next_area = neighbours(fields.area)
    observed = (area > 0) & (next_area > 0)
    return next_x - x, next_y - y, (weight + next_weight) / 2 * observed


LossName = Literal[
    "ensemble_mse",
    "mean_mse",
    "statistical",
    "gaussian_nll",
    "fair_crps",
    "crps",
    "almost_fair_crps",
    "area_crps_2",
    "area_crps_4",
    "area_crps_8",
    "difference_crps",
    "spectral_crps",
    "relative_spectral_crps",
    "variogram",
    "energy",
]
LOSSES: dict[LossName, Loss] = {
    "ensemble_mse": ensemble_mse,
    "mean_mse": mean_mse,
    "statistical": statistical,
    "gaussian_nll": gaussian_nll,
    "fair_crps": fair_crps,
    "crps": crps,
    "almost_fair_crps": almost_fair_crps,
}
AREAS = {f"area_crps_{size}": size for size in (2, 4, 8)}  # cells along one side
FIELD_LOSSES: dict[str, FieldLoss] = {
    **{name: partial(area_crps, size=size) for name, size in AREAS.items()},
    "difference_crps": difference_crps,
    "spectral_crps": spectral_crps,
    "relative_spectral_crps": relative_spectral_crps,
    "variogram": variogram,
    "energy": energy,
}


def weighted_mean(
    values: Float[Tensor, "*batch"],
    weight: Float[Tensor, "*batch"],
    total: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Sum of weight * value over the sum of weights, or over `total`; 0 where no weight is left."""
    total = weight.sum() if total is None else total
    return (values * weight).sum() / total.clamp_min(torch.finfo(total.dtype).tiny)


@dataclass(frozen=True)
class LatentPrediction:
    """Predicted and true latents of one stream's hidden tokens, the weight of each token, and a
    number that tokens at the same position share."""

    stream: str
    predicted: Float[Tensor, "batch query feature"]
    target: Float[Tensor, "batch query feature"]
    weight: Float[Tensor, "batch query"]
    bins: Int[Tensor, "batch query"]


@dataclass(frozen=True)
class Losses:
    """The terms of a loss by name, scalars, each a mean over one batch; and what was predicted, for
    metrics and pictures: fields, latents, pooled latents of every view, scores of choices (the
    logarithms of their chances up to a constant), or none of them.

    factors: of every term in the total, which is the terms' weighted mean.
    parts: of an objective that is made of several, the losses of each.
    by_sample: of every sample and term, the sum of weighted values and the sum of their weights, so
    that the loss of some samples can be told. None: the objective does not tell.
    """

    terms: tuple[tuple[str, Float[Tensor, ""]], ...]
    factors: tuple[float, ...]
    prediction: Prediction | None = None
    latents: tuple[LatentPrediction, ...] = ()
    pooled: tuple[Float[Tensor, "batch feature"], ...] = ()
    scores: Float[Tensor, "batch choice"] | None = None
    parts: tuple["Losses", ...] = ()
    by_sample: Float[Tensor, "batch term two"] | None = None

    @property
    def total(self) -> Float[Tensor, ""]:
        """The weighted mean of the terms, which training minimises."""
        pairs = zip(self.factors, self.terms, strict=True)
        total = sum(factor * value for factor, (_, value) in pairs)
        assert isinstance(total, Tensor), "the loss has no term: no stream with role predict"
        return total / sum(self.factors)

    def scaled(self, shares: Float[Tensor, "term"]) -> Self:
        """The losses with every term times its share."""
        pairs = zip(self.terms, shares.unbind(), strict=True)
        return replace(self, terms=tuple((name, value * share) for (name, value), share in pairs))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.terms)

    def values(self) -> Float[Tensor, "loss"]:
        """The total and then the terms, detached from the graph."""
        return torch.stack([self.total, *(value for _, value in self.terms)]).detach()
