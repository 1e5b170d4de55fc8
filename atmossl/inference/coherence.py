"""Members that are one field each, rather than one value for each cell of a token.

The loss of training looks at one value at a time, so nothing tells which value of a cell belongs to
which of its neighbour. The network learns an order of members for every cell of a token, the same
for all tokens, which shows as waves of the length of a token.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from atmossl.batch import StreamSpec

_BY_CELL = (
    "batch member variable level step (nlat plat) (nlon plon)"
    " -> batch member variable level step nlat nlon (plat plon)"
)


def coherent(
    fields: Float[Tensor, "batch member variable level step lat lon"], spec: StreamSpec
) -> Float[Tensor, "batch member variable level step lat lon"]:
    """The same values at every point, ordered such that all cells of a token rank the members as
    its first cell does. No score of single points changes.

    Source: ensemble copula coupling, Schefzik et al. (2013), Statistical Science 28, 616-640.
    """
    size = spec.token_size
    if size.lat * size.lon == 1 or fields.shape[1] == 1:
        return fields
    sizes = {"plat": size.lat, "plon": size.lon}
    cells = rearrange(fields, _BY_CELL, **sizes)
    rank = cells[..., :1].argsort(dim=1).argsort(dim=1)
    ordered = torch.gather(cells.sort(dim=1).values, 1, rank.expand(cells.shape))
    return rearrange(ordered, " -> ".join(reversed(_BY_CELL.split(" -> "))), **sizes)
