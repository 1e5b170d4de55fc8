"""Fields to tokens and exactly back, and where the tokens are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atmossl.batch import (
    StreamSpec,
    StreamWindow,
    TokenSize,
    detokenise,
    patch_values,
    patch_weights,
    token_grid,
    tokenise,
)
from tests.synthetic import spec, window

small = st.integers(1, 3)


@settings(max_examples=60, deadline=None)
@given(token=st.tuples(small, small, small, small), counts=st.tuples(small, small, small, small))
def test_tokens_go_back_exactly(token: tuple, counts: tuple) -> None:
    size = TokenSize(time=token[1], lat=token[2], lon=token[3], level=token[0])
    num_levels = token[0] * counts[0]
    stream = StreamSpec("s", ("a", "b"), tuple(range(1, num_levels + 1)), size)
    points = [n * c for n, c in zip(token[1:], counts[1:], strict=True)]
    fields = torch.randn(2, 2, num_levels, *points)
    tokens = tokenise(fields, size)
    assert tokens.shape == (2, *counts, stream.patch)
    assert stream.token_shape(*points) == counts
    torch.testing.assert_close(detokenise(tokens, stream), fields, rtol=0, atol=0)


def test_a_token_holds_its_own_points() -> None:
    stream = spec(token=(2, 2, 4))
    fields = window(stream).fields
    tokens = tokenise(fields, stream.token_size)
    expected = fields[:, 1, 2:4, 4:6, 8:12].flatten()
    torch.testing.assert_close(tokens[1, 1, 2, 2], expected, rtol=0, atol=0)


def test_coordinates_are_the_means_of_the_points() -> None:
    stream = spec(token=(2, 2, 4))
    here = window(stream)
    grid = token_grid(here)
    assert grid.shape == (3, 2, 4, 4)
    assert grid.time_hours.tolist() == [3.0, 15.0]
    assert grid.lat[0] == here.lat[:2].mean()
    assert grid.lon[1] == here.lon[4:8].mean()
    assert (float(grid.time_extent), float(grid.lon_extent)) == (12.0, 90.0)


def test_longitudes_are_right_across_greenwich() -> None:
    stream = spec(token=(1, 2, 2))
    here = window(stream, lon=4)
    moved = StreamWindow(**{**vars(here), "lon": torch.tensor([340.0, 350.0, 0.0, 10.0])})
    assert token_grid(moved).lon.tolist() == [345.0, 5.0]
    assert float(token_grid(moved).lon_extent) == 20.0


def test_patch_weights_follow_latitude() -> None:
    stream = spec(token=(1, 2, 4))
    here = window(stream)
    as_field = here.weight[None, None, None, :, None].expand_as(here.fields)
    expected = tokenise(as_field.contiguous(), stream.token_size)[0, 0, :, 0]
    torch.testing.assert_close(patch_weights(here.weight, stream), expected)


def test_patch_values_follow_variable_and_level() -> None:
    stream = spec(token=(1, 2, 4))
    values = torch.arange(6.0).reshape(2, 3)
    spread = patch_values(values, stream)
    assert spread.shape == (3, stream.patch)
    assert spread[1].unique().tolist() == [1.0, 4.0]


def test_a_token_that_does_not_divide_the_window_is_named() -> None:
    with pytest.raises(ValueError, match=r"token_size.lat=2 does not divide data.window.lat=7"):
        spec(token=(1, 2, 4)).token_shape(4, 7, 16)
