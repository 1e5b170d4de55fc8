"""Lists, grids and frames hold the same tokens; attention along axes is masked attention."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from atmossl.batch import TokenIndex
from atmossl.model import blocks
from atmossl.model.blocks import (
    GatedConvolution,
    attend,
    attend_factorised,
    attend_in_windows,
    attend_temporally,
)
from atmossl.model.network import Latent, TokenPlace, from_frames, gather, scatter, to_frames

SHAPE = (2, 3, 4, 6)  # level nt nlat nlon


def chosen_tokens(rate: float, seed: int = 0, batch: int = 2) -> TokenIndex:
    generator = torch.Generator().manual_seed(seed)
    return TokenIndex.of(torch.rand((batch, *SHAPE), generator=generator) <= rate)


def latent(features: torch.Tensor, chosen: TokenIndex, *, periodic: bool = False) -> Latent:
    turn = torch.zeros(2, len(features), 1, features.shape[1], features.shape[2])
    return Latent(features, TokenPlace({features.shape[2]: turn}, chosen, SHAPE, periodic))


@given(rate=st.floats(0.0, 1.0), seed=st.integers(0, 99))
def test_lists_go_to_grids_and_frames_and_back(rate: float, seed: int) -> None:
    chosen = chosen_tokens(rate, seed)
    grid = torch.arange(2.0 * 144 * 5).view(2, 144, 5) + 1
    listed = gather(grid, chosen)
    valid = chosen.valid[..., None]
    assert torch.equal(gather(scatter(listed, chosen), chosen) * valid, listed * valid)
    assert torch.equal(scatter(listed, chosen), grid * chosen.chosen.flatten(1)[..., None])
    assert torch.equal(from_frames(to_frames(listed, chosen), chosen) * valid, listed * valid)


def test_only_frames_with_a_chosen_token_are_kept() -> None:
    chosen = torch.zeros((2, *SHAPE), dtype=torch.bool)
    chosen[0, 1, 2, 0, 3] = chosen[1, 0, 0, 1, 1] = True
    index = TokenIndex.of(chosen)
    assert index.frames.numbers.tolist() == [5, 6]
    frames = to_frames(torch.ones(2, 1, 1), index)
    assert frames.shape == (2, 1, 4, 6)
    assert frames[0, 0, 0, 3] == frames[1, 0, 1, 1] == 1
    assert frames.sum() == 2


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    present: torch.Tensor,
    num_columns: int,
) -> torch.Tensor:
    """With the axes written as a mask: columns for the first heads, planes for the others."""
    place, plane = torch.arange(144) % 24, torch.arange(144) // 24
    same_place, same_plane = (x[:, None] == x[None] for x in (place, plane))
    allowed = [same_place if head < num_columns else same_plane for head in range(4)]
    return masked(query, key, value, present, allowed)


def masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    present: torch.Tensor,
    allowed: list[torch.Tensor],
) -> torch.Tensor:
    """Exact attention of single tokens, float64; `allowed`: [query key] of every head."""
    heads = []
    for head in range(4):
        visible = allowed[head][None] & present[:, None]
        score = query[:, head] @ key[:, head].mT / query.shape[-1] ** 0.5
        weight = torch.exp(score) * visible
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-300)
        heads.append(weight @ value[:, head])
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize(
    ("function", "num_columns"), [(attend_factorised, 2), (attend_temporally, 4)]
)
@pytest.mark.parametrize("rate", [1.0, 0.5, 0.1])
def test_attention_along_axes_is_masked_attention(function, num_columns: int, rate: float) -> None:
    compare(function, lambda *tensors: reference(*tensors, num_columns), rate)


def compare(function, expected, rate: float, *, periodic: bool = False) -> None:
    """`function` on lists of chosen tokens against `expected` on the whole grid."""
    generator = torch.Generator().manual_seed(1)
    chosen, context = chosen_tokens(min(1.0, rate + 0.2), 3), chosen_tokens(rate, 4)
    query, key, value = torch.randn(3, 2, 4, 144, 8, dtype=torch.float64, generator=generator)

    def listed(heads: torch.Tensor, index: TokenIndex) -> torch.Tensor:
        return torch.stack([gather(heads[:, n], index) for n in range(4)], dim=1)

    x = latent(torch.zeros(2, chosen.index.shape[1], 8), chosen, periodic=periodic)
    memory = latent(torch.zeros(2, context.index.shape[1], 8), context, periodic=periodic)
    out = function(listed(query, chosen), listed(key, context), listed(value, context), x, memory)
    valid = chosen.valid[:, None, :, None]
    whole = expected(query, key, value, context.chosen.flatten(1))
    torch.testing.assert_close(out * valid, listed(whole, chosen) * valid)


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("size", [(2, 2, 3), (3, 3, 4), (1, 2, 5), (9, 9, 9)])
def test_attention_in_windows_is_masked_attention(
    size: tuple[int, int, int], periodic: bool, rate: float
) -> None:
    """Each token's window, worked out from its place alone."""
    places = [(n // 24 % 3, n // 6 % 4, n % 6) for n in range(144)]

    def window_of(place: tuple[int, int, int], shifted: bool) -> tuple[int, ...]:
        found = []
        for axis, (position, tokens) in enumerate(zip(place, SHAPE[1:], strict=True)):
            edge = min(size[axis], tokens)
            moved = position + (edge // 2 if shifted and tokens > edge else 0)
            found.append((moved % tokens if periodic and axis == 2 else moved) // edge)
        return tuple(found)

    allowed = []
    for head in range(4):
        windows = [window_of(place, head >= 2) for place in places]
        allowed.append(torch.tensor([[one == two for two in windows] for one in windows]))
    compare(
        partial(attend_in_windows, size=size),
        lambda *tensors: masked(*tensors, allowed),
        rate,
        periodic=periodic,
    )


def test_more_samples_than_a_gpu_launches_at_once_are_split(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 7, 2, 20, 8, dtype=torch.float64, generator=generator)
    valid = torch.rand(7, 20, generator=generator) < 0.5
    expected = [attend(query, key, value, present) for present in (None, valid)]
    monkeypatch.setattr(blocks, "_MOST_ROWS", 3)
    for present, at_once in zip((None, valid), expected, strict=True):
        torch.testing.assert_close(attend(query, key, value, present), at_once)


def test_shifted_windows_cross_the_seam_where_the_circle_closes() -> None:
    value = torch.zeros(1, 2, 144, 1)
    value[:, :, 5] = 1.0  # the last longitude of the first row
    everything = chosen_tokens(2.0, batch=1)
    seen = {}
    for periodic in (False, True):
        x = latent(torch.zeros(1, 144, 8), everything, periodic=periodic)
        zeros = torch.zeros(1, 2, 144, 8)
        out = attend_in_windows(zeros, zeros, value, x, x, size=(3, 4, 2))
        seen[periodic] = out[0, 1, 0, 0] > 0
    assert seen[True] and not seen[False]


def test_a_gated_convolution_turns_with_the_circle() -> None:
    torch.manual_seed(0)
    layer = GatedConvolution(5, 7, 3)
    everything = chosen_tokens(2.0)
    fields = torch.randn(2, 6, 4, 6, 5)
    turned = fields.roll(2, dims=3)
    one, two = (
        layer(latent(x.flatten(1, 3), everything, periodic=True)).view(2, 6, 4, 6, 5)
        for x in (fields, turned)
    )
    torch.testing.assert_close(one.roll(2, dims=3), two)
    edge = layer(latent(turned.flatten(1, 3), everything)).view(2, 6, 4, 6, 5)
    assert not torch.allclose(edge[:, :, :, 0], two[:, :, :, 0])


def test_a_gated_convolution_is_a_gated_product_of_neighbours() -> None:
    """Against one token's own 3 x 3 neighbours, multiplied out."""
    torch.manual_seed(0)
    layer = GatedConvolution(5, 7, 3).double()
    fields = torch.randn(2, 6, 4, 6, 5, dtype=torch.float64)
    out = layer(latent(fields.flatten(1, 3), chosen_tokens(2.0))).view(2, 6, 4, 6, 5)
    patch = fields[1, 2, 1:4, 2:5].flatten()
    weight = layer.expand.weight.permute(0, 2, 3, 1).flatten(1)
    gate, values = (weight @ patch + layer.expand.bias).chunk(2)
    expected = layer.contract(functional.gelu(gate) * values)
    torch.testing.assert_close(out[1, 2, 2, 3], expected)
