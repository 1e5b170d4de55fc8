"""The way of one sample, from a store to a written field, as `atmossl/__init__.py` tells it."""

import numpy as np
import torch

from atmossl.batch import PRIMARY, collate_views, detokenise
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import open_segment
from atmossl.data.windows import Normaliser, read_window
from atmossl.geometry import Box
from atmossl.masking.base import make_view
from atmossl.masking.tasks import TemporalInterpolation
from atmossl.model.multiformer import Multiformer
from atmossl.objectives.masked import MaskedModelling
from tests.synthetic import dataset, spec


def test_one_sample() -> None:
    stream = spec(token=(1, 2, 4))
    store = dataset()
    segment = open_segment(
        "waves", store, "memory", variables=stream.variables, levels=stream.levels
    )
    normaliser = Normaliser({PRIMARY: compute_statistics([segment])})

    (window,) = read_window(segment, (stream,), normaliser, 3, 5, Box(2, 12, 4, 8))
    assert window.fields.shape == (2, 3, 5, 4, 8)  # variable level time lat lon
    assert window.lon.tolist() == [270, 292.5, 315, 337.5, 0, 22.5, 45, 67.5]

    view = make_view((window,), TemporalInterpolation(6), np.random.default_rng(0))
    (tokens,) = view.streams
    assert tokens.target.shape == (3, 5, 2, 2, 2 * 2 * 4)  # level nt nlat nlon patch
    assert tokens.hidden.sum() == tokens.hidden[:, 2].sum() == 3 * 2 * 2

    batch = collate_views([(view,)], [17])
    torch.manual_seed(0)
    model = Multiformer(
        streams=(stream,), dim=16, num_layers=2, num_decoder_layers=1, num_heads=2, num_members=4
    )
    losses = MaskedModelling(losses={"fair_crps": 1.0})(model, batch)
    assert losses.total > 0 and losses.prediction is not None
    (predicted,) = losses.prediction.streams
    assert predicted.members.shape == (1, 12, 4, 16)  # batch query member patch

    fields = detokenise(tokens.target, stream)
    values = normaliser.inverse(fields, stream).numpy()
    expected = store["temperature"].isel(
        time=slice(3, 8), latitude=slice(2, 6), longitude=[12, 13, 14, 15, 0, 1, 2, 3]
    )
    np.testing.assert_allclose(values[0], expected.transpose("level", ...), atol=1e-5)
