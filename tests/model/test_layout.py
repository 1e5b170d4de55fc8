"""Lists, grids and frames hold the same tokens; attention along axes is masked attention."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from atmossl.batch import TokenIndex
from atmossl.model.attention import attend_factorised, attend_temporally
from atmossl.model.blocks import GatedConvolution
from atmossl.model.layout import Latent, from_frames, gather, scatter, to_frames

SHAPE = (2, 3, 4, 6)  # level nt nlat nlon


def chosen_tokens(rate: float, seed: int = 0, batch: int = 2) -> TokenIndex:
    generator = torch.Generator().manual_seed(seed)
    return TokenIndex.of(torch.rand((batch, *SHAPE), generator=generator) <= rate)


def latent(features: torch.Tensor, chosen: TokenIndex, *, periodic: bool = False) -> Latent:
    turn = torch.zeros(2, len(features), 1, features.shape[1], features.shape[2])
    return Latent(features, turn, chosen, SHAPE, periodic)


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
    assert index.frames.kept.tolist() == [5, 6]
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
    """Exact attention of single tokens, float64, with the axes written as a mask."""
    place = torch.arange(144) % 24
    plane = torch.arange(144) // 24
    same_place, same_plane = (x[:, None] == x[None] for x in (place, plane))
    heads = []
    for head in range(4):
        allowed = same_place if head < num_columns else same_plane
        visible = allowed[None] & present[:, None]
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
    generator = torch.Generator().manual_seed(1)
    chosen, context = chosen_tokens(0.6, 3), chosen_tokens(rate, 4)
    query, key, value = torch.randn(3, 2, 4, 144, 8, dtype=torch.float64, generator=generator)
    expected = reference(query, key, value, context.chosen.flatten(1), num_columns)

    def listed(heads: torch.Tensor, index: TokenIndex) -> torch.Tensor:
        return torch.stack([gather(heads[:, n], index) for n in range(4)], dim=1)

    x = latent(torch.zeros(2, chosen.index.shape[1], 8), chosen)
    memory = latent(torch.zeros(2, context.index.shape[1], 8), context)
    out = function(listed(query, chosen), listed(key, context), listed(value, context), x, memory)
    valid = chosen.valid[:, None, :, None]
    torch.testing.assert_close(out * valid, listed(expected, chosen) * valid)


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
