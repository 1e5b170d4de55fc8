"""What networks have in common: latents with coordinates, pooling over the sphere."""

from dataclasses import replace

import numpy as np
import torch

from atmossl.batch import collate_views
from atmossl.masking.base import hide_nothing, make_view
from atmossl.masking.random import RandomMasking
from atmossl.model.kinds import NETWORKS
from atmossl.model.multiformer import Multiformer
from atmossl.model.network import Latent, StreamLatents
from tests.synthetic import spec, window

STREAMS = (spec("air"), spec("wind", variables=("u_component_of_wind",), token=(2, 4, 4)))
SIZES = {"dim": 16, "num_layers": 3, "num_decoder_layers": 1, "num_heads": 2, "num_members": 2}


def network() -> Multiformer:
    torch.manual_seed(0)
    return Multiformer(streams=STREAMS, **SIZES).eval()


def view(sampler=hide_nothing):
    windows = tuple(window(s, seed=n) for n, s in enumerate(STREAMS))
    views = (make_view(windows, sampler, np.random.default_rng(0)),)
    return collate_views([views], [0]).views[0]


def test_a_forward_pass_is_a_reconstruction_from_latents() -> None:
    model, here = network(), view(RandomMasking((0.5, 0.5)))
    with torch.no_grad():
        whole, apart = model(here), model.reconstruct(model.encode(here), here)
        predicted = model.predict(model.encode(here), here)
    for one, two in zip(whole.streams, apart.streams, strict=True):
        assert torch.equal(one.members, two.members)
        assert predicted.keys() == {"air", "wind"}
    for stream in here.streams:
        latents = predicted[stream.spec.name]
        assert latents.last.shape == (*stream.queries.index.shape, 16)


def test_latents_know_where_their_tokens_are() -> None:
    """Of visible tokens alone, in the order of their list."""
    here = view(RandomMasking((0.6, 0.6), {"drop": 1.0}))
    with torch.no_grad():
        encoded = network().encode(here)
    for stream in here.streams:
        found = encoded[stream.spec.name]
        assert len(found.layers) == network().num_encoder_layers == 3
        places = found.coordinates()
        shape, grid = stream.grid.shape, stream.grid
        for number in range(found.last.shape[1]):
            index = np.unravel_index(int(found.chosen.index[0, number]), shape)
            for name, axis in zip(("level_hpa", "time_hours", "lat", "lon"), index, strict=True):
                assert places[name][0, number] == getattr(grid, name)[0, axis]


def test_pooling_weighs_by_area_of_the_sphere() -> None:
    """The mean of sin^2 of latitude, against rows of equal area; what is padded counts nothing."""
    (stream,) = view().streams[:1]
    bare = StreamLatents((), stream.encoder_tokens, stream.grid)
    sines = torch.sin(torch.deg2rad(bare.coordinates()["lat"])) ** 2
    areas = bare.areas()
    num_layers, num_times = stream.grid.shape[:2]
    total = float(areas.sum()) / num_layers / num_times
    np.testing.assert_allclose(total, 4 * np.pi, rtol=1e-6)
    place = type("Place", (), {"chosen": stream.encoder_tokens})()
    latents = replace(bare, layers=(Latent(torch.stack([sines, 1 - sines], dim=-1), place),))
    pooled = network().pool({"air": latents, "wind": latents})
    edges = np.linspace(-1, 1, 10001)
    middle = (edges[1:] + edges[:-1]) / 2
    rows = np.degrees(np.arcsin(middle))  # of equal area
    lat = stream.grid.lat[0].double().numpy()
    nearest = np.abs(rows[:, None] - lat).argmin(axis=1)
    expected = float((np.sin(np.radians(lat[nearest])) ** 2).mean())
    np.testing.assert_allclose(pooled[0, [0, 2]], expected, rtol=1e-3)
    np.testing.assert_allclose(pooled[0, [1, 3]], 1 - expected, rtol=1e-3)
    half = replace(stream.encoder_tokens, valid=torch.zeros_like(stream.encoder_tokens.valid))
    assert float(StreamLatents((), half, stream.grid).areas().sum()) == 0.0


def test_a_network_tells_the_width_of_its_latents() -> None:
    model = Multiformer(streams=STREAMS, **SIZES, dims={"wind": 24})
    with torch.no_grad():
        latents = model.encode(view())
    assert model.widths == {name: stream.last.shape[-1] for name, stream in latents.items()}
    assert model.pool(latents).shape[1] == model.num_pooled == 16 + 24


def test_every_network_tells_training_its_parts() -> None:
    model = network()
    assert set(NETWORKS) == {"multiformer", "atmorep"}
    names = [name for name, _ in model.named_parameters()]
    depths = {name: model.depth(name) for name in names}
    assert {depth for name, depth in depths.items() if name.startswith("encoder.0.")} == {2}
    assert {depth for name, depth in depths.items() if name.startswith("embedding.")} == {3}
    assert {depth for name, depth in depths.items() if name.startswith("decoder.")} == {None}
    inside = {id(p) for block in model.blocks for p in block.parameters()}
    expected = {id(p) for n, p in model.named_parameters() if n.startswith(("encoder", "decoder"))}
    assert inside == expected
    assert all(any(name.startswith(f"{end}.") for name in names) for end in model.ends)
    for name, parameter in model.named_parameters():
        axis = model.patch_axis(name)
        if axis is not None:
            stream = next(s for s in STREAMS if s.name in name.split("."))
            assert parameter.shape[axis] % stream.patch == 0
