"""Members of the cells of a token belong together."""

import numpy as np
import torch

from atmossl.inference.tiles import coherent
from tests.synthetic import spec


def test_members_have_one_order_in_all_cells_of_a_token() -> None:
    """The network's own order differs from cell to cell and is that of no neighbour: waves of the
    length of a token, of which nothing is left where the spread is the same everywhere."""
    rng = np.random.default_rng(0)
    offsets = np.linspace(-1.0, 1.0, 6)
    orders = [rng.permutation(6) for _ in range(4)]
    fields = np.zeros((2, 6, 1, 3, 1, 4, 8))  # batch member variable level step lat lon
    for cell, order in enumerate(orders):
        here = np.s_[..., cell // 2 :: 2, cell % 2 :: 2]
        fields[here] = offsets[order][:, None, None, None, None, None]
    fields += np.linspace(0.0, 40.0, 8)  # a field that all members share
    stream = spec("t", variables=("temperature",), token=(1, 2, 2))
    found = coherent(torch.from_numpy(fields), stream).numpy()
    np.testing.assert_array_equal(np.sort(found, axis=1), np.sort(fields, axis=1))
    np.testing.assert_array_equal(found[..., ::2, ::2], fields[..., ::2, ::2])
    assert np.ptp(found - np.linspace(0.0, 40.0, 8), axis=(-2, -1)).max() < 1e-12
    single = spec("t", variables=("temperature",), token=(1, 1, 1))
    np.testing.assert_array_equal(coherent(torch.from_numpy(fields), single), fields)
