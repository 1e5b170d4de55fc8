"""The distance of two states in the latents of a trained network: as a loss, and as a score.

After AtmoDist (Hoffmann and Lessig 2022, arXiv 2202.01897, section 4), whose representation serves
as a loss for downscaling: states that the network finds far apart in time are far apart.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from atmossl.batch import View
from atmossl.model.network import Latents, Network


def distance(network: Network, first: View, second: View) -> Float[Tensor, "batch"]:
    """RMS difference of the normalised last latents of two views of equal shape with gradients to
    both; the mean is over features, tokens by area, and streams. 0 for equal states; about the
    square root of 2 for unrelated ones.

    network: its weights get gradients, too, unless they are frozen.
    """
    return latent_distance(network.encode(first), network.encode(second))


def latent_distance(first: Latents, second: Latents) -> Float[Tensor, "batch"]:
    """The `distance` of two sets of latents. Its gradient is finite everywhere, despite the
    root."""
    squares = []
    for name, latents in first.items():
        weight = latents.areas()
        apart = squared_difference(latents.last, second[name].last)
        squares.append((weight * apart).sum(dim=1) / weight.sum(dim=1).clamp_min(1e-12))
    square = torch.stack(squares).mean(dim=0)
    return torch.where(square > 0, square.clamp_min(1e-12).sqrt(), torch.zeros_like(square))


def squared_difference(
    first: Float[Tensor, "*token feature"], second: Float[Tensor, "*token feature"]
) -> Float[Tensor, "*token"]:
    """The squared difference of two latents, each normalised over its features; the mean over
    the features."""
    first, second = (functional.layer_norm(x.float(), x.shape[-1:]) for x in (first, second))
    return (first - second).square().mean(dim=-1)
