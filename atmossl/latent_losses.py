"""Losses and measures of latents alone, without fields: what contrastive learning,
self-distillation and joint embedding optimise, and how one sees that latents collapsed.

Latents are `[sample feature]` in float32. Losses that compare the samples of a batch with each
other take the samples of all ranks from `gathered`, so that several ranks compute what one rank
with all samples would, gradients included.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Latents = Float[Tensor, "sample feature"]
Scalar = Float[Tensor, ""]


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(x: Tensor) -> Tensor:
    """The samples of all ranks one after the other, along the first axis. Gradients go back to
    the samples' own rank. Every rank must have equally many samples."""
    gathered_values = _Gather.apply(x) if is_distributed() else x
    assert isinstance(gathered_values, Tensor)
    return gathered_values


def _own_rows(samples: int, device: torch.device) -> Int[Tensor, "sample"]:
    """The positions of this rank's samples among the gathered ones."""
    number = dist.get_rank() if is_distributed() else 0
    return torch.arange(number * samples, (number + 1) * samples, device=device)


class _Gather(torch.autograd.Function):
    """A rank's samples get the sum of the gradients that all ranks have for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore
        del ctx
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def nt_xent(
    first: Latents,
    second: Latents,
    *,
    temperature: float = 0.5,
    no_negatives: Bool[Tensor, "sample sample"] | None = None,
) -> Scalar:
    """Normalised temperature-scaled cross entropy of matched pairs (Chen et al. 2020, equation 1).

    Each of the 2 N latents has to find its partner among the 2 N - 1 others. Where all are equal it
    is ln(2 N - 1).

    no_negatives: pairs of samples (of all ranks) that must not count as different, such as states
        of one run within some days; a sample's own partner always counts.
    """
    latents = torch.stack([gathered(first), gathered(second)])  # [view all feature]
    num_all = latents.shape[1]
    latents = F.normalize(latents, dim=-1).flatten(0, 1)
    rows_here = _own_rows(len(first), first.device)
    anchors = torch.cat([rows_here, rows_here + num_all])
    partners = torch.cat([rows_here + num_all, rows_here])
    similarity = latents[anchors] @ latents.T / temperature
    ignored = torch.zeros_like(similarity, dtype=torch.bool)
    if no_negatives is not None:
        ignored = no_negatives[rows_here].repeat(2, 2).clone()
    rows = torch.arange(len(anchors), device=first.device)
    ignored[rows, anchors] = True  # a latent is not its own partner
    ignored[rows, partners] = False
    return F.cross_entropy(similarity.masked_fill(ignored, -math.inf), partners)


def vicreg(
    first: Latents,
    second: Latents,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Scalar:
    """Variance, invariance and covariance regularisation (Bardes et al. 2022, equations 1 to 6).

    Pairs are alike, every feature has a standard deviation of at least 1 over the batch, and
    features are uncorrelated. Constant latents cost 24.75, from sqrt(0 + 1e-4).
    """
    views = [gathered(first), gathered(second)]
    total = invariance * F.mse_loss(views[0], views[1])
    for view in views:
        centred = view - view.mean(dim=0)
        deviation = (view.var(dim=0) + 1e-4).sqrt()
        cov = centred.T @ centred / (len(view) - 1)
        off_diagonal = cov.pow(2).sum() - cov.diagonal().pow(2).sum()
        # both terms of the two views: their mean for the variance, their sum for the covariance
        total = total + variance * F.relu(1 - deviation).mean() / 2
        total = total + covariance * off_diagonal / view.shape[1]
    return total


def barlow_twins(first: Latents, second: Latents, *, redundancy: float = 5e-3) -> Scalar:
    """The correlations of features between the views, made the identity (Zbontar et al. 2021,
    equation 1). Latents of rank one, correlated everywhere, cost redundancy * D * (D - 1)."""
    standard = []
    for view in (gathered(first), gathered(second)):
        centred = view - view.mean(dim=0)
        standard.append(centred / (centred.pow(2).mean(dim=0) + 1e-12).sqrt())
    correlation = standard[0].T @ standard[1] / len(standard[0])
    diagonal = correlation.diagonal()
    off_diagonal = correlation.pow(2).sum() - diagonal.pow(2).sum()
    return (1 - diagonal).pow(2).sum() + redundancy * off_diagonal


def simsiam(predicted: Latents, target: Latents) -> Scalar:
    """Negative cosine of a prediction and the other view's latent, which gets no gradient (Chen and
    He 2021, equation 1): -1 if aligned, 0 if orthogonal."""
    return -F.cosine_similarity(predicted, target.detach(), dim=-1).mean()


def distillation(
    student: Float[Tensor, "sample prototype"],
    teacher: Float[Tensor, "sample prototype"],
    *,
    temperature: float = 0.1,
) -> Scalar:
    """Cross entropy of the student's softmax with the teacher's probabilities (Caron et al. 2021,
    equation 1). Equal logits of the student cost ln(number of prototypes)."""
    return -(teacher.detach() * F.log_softmax(student / temperature, dim=-1)).sum(dim=-1).mean()


@torch.no_grad()
def sinkhorn(
    logits: Float[Tensor, "sample prototype"],
    *,
    temperature: float | Float[Tensor, ""] = 0.05,
    iterations: int = 3,
) -> Float[Tensor, "sample prototype"]:
    """The teacher's probabilities, balanced so that every prototype is used equally over the
    batch of all ranks (Caron et al. 2020, SwAV). Works on logarithms in float32, so nothing
    overflows."""
    scores = gathered(logits.float()) / temperature
    for _ in range(iterations):
        scores = scores - scores.logsumexp(dim=0, keepdim=True)
        scores = scores - scores.logsumexp(dim=1, keepdim=True)
    return scores[_own_rows(len(logits), logits.device)].exp()


def koleo(latents: Latents) -> Scalar:
    """Kozachenko-Leonenko entropy of directions (Sablayrolles et al. 2019): mean negative logarithm
    of the distance to the nearest other of all ranks; -ln(2) / 2 of orthonormal latents."""
    rows_here = _own_rows(len(latents), latents.device)
    unit = F.normalize(gathered(latents), dim=-1)
    with torch.no_grad():
        cosines = (unit @ unit.T).fill_diagonal_(-2)
        nearest = cosines[rows_here].argmax(dim=1)
    return -(unit[rows_here] - unit[nearest]).norm(dim=-1).clamp_min(1e-8).log().mean()


def sigreg(
    latents: Latents, directions: Float[Tensor, "feature slice"], *, points: int = 33
) -> Scalar:
    """How far latents are from an isotropic standard Gaussian, by the Epps-Pulley test along random
    directions (LeJEPA, Balestriero and LeCun 2025): the squared distance of the characteristic
    functions, weighted by exp(-t^2 / 2), times the number of samples, mean over directions.

    latents: of all ranks, see `gathered`. directions: columns of any length, normalised here.
    """
    sliced = latents @ F.normalize(directions, dim=0)  # [sample slice]
    t = torch.linspace(-6.0, 6.0, points, device=latents.device)
    phase = sliced[..., None] * t
    gaussian = torch.exp(-(t**2) / 2)
    real = phase.cos().mean(dim=0) - gaussian
    imaginary = phase.sin().mean(dim=0)
    distance = torch.trapezoid((real**2 + imaginary**2) * gaussian, t, dim=-1)
    return len(latents) * distance.mean()


def batch_anomalies(
    latents: Float[Tensor, "sample token feature"],
) -> Float[Tensor, "sample token feature"]:
    """Departures from every token's mean over the samples, scaled to the variance that
    independent samples have."""
    count = len(latents)
    return (latents - latents.mean(dim=0)) * (count / max(count - 1, 1)) ** 0.5


@torch.no_grad()
def rankme(latents: Latents) -> Scalar:
    """Effective rank: exponential of the entropy of the singular values' shares (Garrido et al.
    2023, RankMe), from 1 to the smaller size."""
    values = torch.linalg.svdvals(latents.double())
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(share).sum().exp().float()


@torch.no_grad()
def lidar(latents: Float[Tensor, "sample view feature"], *, ridge: float = 1e-4) -> Scalar:
    """Effective rank of the scatter between samples, measured in units of the scatter between views
    of one sample (Thilak et al. 2024, LiDAR, equations 1 to 4)."""
    latents = latents.double()
    means = latents.mean(dim=1)
    within = latents - means[:, None]
    num_samples, num_views, size = latents.shape
    scatter_within = torch.einsum("svi,svj->ij", within, within) / (num_samples * (num_views - 1))
    scatter_within += ridge * torch.eye(size, dtype=latents.dtype, device=latents.device)
    centred = means - means.mean(dim=0)
    values, vectors = torch.linalg.eigh(scatter_within)
    whitened = centred @ vectors / values.sqrt()
    powers = torch.linalg.svdvals(whitened) ** 2
    share = powers / powers.sum().clamp_min(torch.finfo(powers.dtype).tiny)
    return torch.special.entr(share).sum().exp().float()


@torch.no_grad()
def alignment(first: Latents, second: Latents) -> Scalar:
    """Mean squared distance of the directions of matched latents (Wang and Isola 2020): 0 if equal,
    2 if orthogonal."""
    return (F.normalize(first, dim=-1) - F.normalize(second, dim=-1)).pow(2).sum(dim=-1).mean()


@torch.no_grad()
def uniformity(latents: Latents) -> Scalar:
    """Logarithm of the mean of exp(-2 d^2) over all pairs of directions (Wang and Isola 2020): 0 if
    all are equal, the more negative the more evenly they cover the sphere."""
    distances = torch.pdist(F.normalize(latents, dim=-1)).pow(2)
    return distances.mul(-2).exp().mean().log()
