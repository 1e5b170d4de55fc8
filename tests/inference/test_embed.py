"""Latents lie where their tokens are, whatever the tiles, and are written as they are returned."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from atmossl.api import Model
from atmossl.batch import PRIMARY, StreamSpec, View
from atmossl.cli import main
from atmossl.data.statistics import compute_statistics
from atmossl.data.windows import Normaliser, WindowSize
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.embed import Embedder
from atmossl.model.network import Latent, Latents, Network, StreamLatents, TokenPlace
from tests.inference.oracle_models import STORE, segment
from tests.synthetic import spec

STEPS = 4
ONE = (spec("air", token=(2, 2, 4)),)
TWO = (
    spec("air", variables=("temperature",), token=(2, 2, 4)),
    spec("wind", variables=("u_component_of_wind",), levels=(500,), token=(1, 4, 4)),
)


class Known(Network):
    """Layer k of a token is k, its mean value, hours, level, latitude and longitude."""

    num_encoder_layers = 2

    def encode(self, view: View) -> Latents:
        latents = {}
        for stream in view.streams:
            assert stream.encoder_tokens is not None and stream.encoder_tokens.complete
            means = stream.source.mean(dim=-1).flatten(1)
            bare = StreamLatents((), stream.encoder_tokens, stream.grid)
            places = [value.float() for value in bare.coordinates().values()]
            place = TokenPlace({}, stream.encoder_tokens, stream.grid.shape, stream.grid.periodic)
            layers = tuple(
                Latent(torch.stack([torch.full_like(means, k), means, *places], dim=-1), place)
                for k in range(self.num_encoder_layers)
            )
            latents[stream.spec.name] = StreamLatents(layers, stream.encoder_tokens, stream.grid)
        return latents


def model(specs: tuple[StreamSpec, ...], lat: int, lon: int, **changes) -> Model:
    trained = TrainedModel(
        model=Known(),
        specs=specs,
        normaliser=Normaliser({PRIMARY: compute_statistics([segment()])}),
        window=WindowSize(STEPS, lat, lon),
        first_guess=True,
        data="waves",
        checkpoint_record={"objective": {"kind": "some.where.Reconstructing"}},
        digest="0",
        **changes,
    )
    return Model(trained, "cpu")


def token_means(stream: StreamSpec, latest: int) -> np.ndarray:
    """Mean normalised value of every token, from the store alone: [offset level lat lon]."""
    names, levels = list(stream.variables), list(stream.levels)
    fields = STORE[names].sel(level=levels).isel(time=slice(latest - STEPS + 1, latest + 1))
    statistics = compute_statistics([segment()])
    size, normal = stream.token_size, []
    for number, name in enumerate(names):
        mean, std = (
            statistics.select(stream, kind)[number][:, None, None] for kind in ("mean", "std")
        )
        normal.append((fields[name].values - np.asarray(mean)) / np.asarray(std))
    values = xr.DataArray(np.mean(normal, axis=0), dims=("time", "level", "lat", "lon"))
    return values.coarsen(time=size.time, lat=size.lat, lon=size.lon).mean().values


@pytest.mark.parametrize(
    ("lat", "lon", "overlap"), [(8, 0, 0.5), (4, 8, 0.5), (4, 8, 0.0), (8, 12, 0.7), (0, 16, 0.2)]
)
def test_latents_lie_where_their_tokens_are(lat: int, lon: int, overlap: float) -> None:
    """Whole circles and tiles that overlap, of which none shows in the blended field."""
    times = STORE["time"].values[[5, 8]]
    found = model(ONE, lat, lon).embed(STORE, times, layer=1, overlap=overlap)
    assert found["latents"].dims == (
        "init_time", "offset", "level", "latitude", "longitude", "feature",
    )  # fmt: skip
    assert dict(found.sizes) == {
        "init_time": 2, "offset": 2, "level": 3, "latitude": 4, "longitude": 4, "feature": 6,
    }  # fmt: skip
    values = found["latents"].transpose("feature", ...).values
    for case, latest in enumerate((5, 8)):
        expected = token_means(ONE[0], latest)
        np.testing.assert_allclose(values[1, case], expected, atol=2e-5)
    np.testing.assert_allclose(values[0], 1.0, rtol=1e-5)
    hours = (found["time"].values - np.datetime64(0, "s")) / np.timedelta64(1, "h")
    np.testing.assert_allclose(values[2], np.broadcast_to(
        hours[:, :, None, None, None], values[2].shape), rtol=1e-5)  # fmt: skip
    coarse = STORE.coarsen(latitude=2, longitude=4).mean()
    np.testing.assert_allclose(found["latitude"], coarse["latitude"], atol=1e-4)
    np.testing.assert_allclose(found["longitude"], coarse["longitude"], atol=1e-4)
    for row, name in enumerate(("level", "latitude", "longitude"), start=3):
        expected = found[name].broadcast_like(found["latents"].isel(feature=0, drop=True))
        expected = expected.transpose(*found["latents"].dims[:-1])
        np.testing.assert_allclose(values[row], expected, rtol=1e-5, atol=1e-4)
    # two time steps of 6 h in a token, centred 15 h and 3 h before the last step
    assert (found["offset"].values / np.timedelta64(1, "h")).tolist() == [-15.0, -3.0]


def test_of_a_blank_variable_the_encoder_sees_its_training_mean() -> None:
    """Which is 0 in normalised units, whatever the values."""
    shown = model(TWO, 4, 8).trained
    embedder = Embedder(shown, (segment(),), 0, 0.5, 3, "cpu")
    time = STORE["time"].values[7]
    before = embedder.fields(time)
    blank = replace(embedder, blank=("temperature", "specific_humidity")).fields(time)
    assert np.abs(before["air"].latents[..., 1]).max() > 0.1
    assert not blank["air"].latents[..., 1].any()
    np.testing.assert_array_equal(blank["wind"].latents, before["wind"].latents)


def test_one_pass_gives_the_latents_of_several_layers() -> None:
    used = model(TWO, 4, 8).trained
    embedder = Embedder(used, (segment(),), -1, 0.5, 3, "cpu")
    time = STORE["time"].values[7]
    both = embedder.fields_of_layers(time, (0, 1))
    for layer, fields in enumerate(both):
        alone = replace(embedder, layer=layer).fields(time)
        for name in ("air", "wind"):
            np.testing.assert_array_equal(fields[name].latents, alone[name].latents)
            np.testing.assert_allclose(fields[name].latents[..., 0], layer, atol=1e-5)


def test_a_withheld_stream_is_neither_seen_nor_written() -> None:
    used, time = model(TWO, 4, 8).trained, STORE["time"].values[7]
    whole = Embedder(used, (segment(),), -1, 0.5, 3, "cpu").fields(time)
    fields = Embedder(used, (segment(),), -1, 0.5, 3, "cpu", ("wind",)).fields(time)
    assert list(fields) == ["air"]
    np.testing.assert_array_equal(fields["air"].latents, whole["air"].latents)
    for withheld in (("winds",), ("wind", "air")):
        with pytest.raises(ValueError, match="streams are air, wind, of which one at least"):
            Embedder(used, (segment(),), -1, 0.5, 3, "cpu", withheld)


def test_streams_with_tokens_of_their_own_have_dims_of_their_own() -> None:
    found = model(TWO, 4, 8).embed(STORE, STORE["time"].values[7], layer=0)
    assert found["latents_air"].shape == (1, 2, 3, 4, 4, 6)
    assert found["latents_wind"].shape == (1, 4, 1, 2, 4, 6)
    np.testing.assert_allclose(
        found["latents_wind"].isel(feature_wind=1)[0], token_means(TWO[1], 7), atol=2e-5
    )
    assert found["level_wind"].values.tolist() == [500.0]
    assert found["latitude_air"].attrs["units"] == "degrees_north"


def test_latents_are_dated_in_the_calendar_of_the_record(tmp_path: Path) -> None:
    dates = xr.date_range("0001-02-27", periods=12, freq="6h", calendar="noleap", use_cftime=True)
    record = STORE.assign_coords(time=dates)
    written = model(ONE, 4, 8).embed(record, dates[[6, 8]], output=tmp_path / "latents.zarr")
    assert written["init_time"].values.tolist() == dates[[6, 8]].tolist()
    valid = written["time"].isel(init_time=1).values  # of the two tokens in time of a window
    assert [f"{date:%m-%dT%H}" for date in valid] == ["02-28T09", "02-28T21"]
    assert {date.calendar for date in valid} == {"noleap"}


def test_longitudes_of_latents_ascend_in_a_region_across_greenwich() -> None:
    """Columns of 22.5 degrees, from 270 E to 67.5 E; a token has four of them."""
    region = STORE.isel(longitude=[12, 13, 14, 15, 0, 1, 2, 3])
    found = model(ONE, 4, 8).embed(region, STORE["time"].values[7])
    assert found["longitude"].values.tolist() == [303.75, 393.75]
    whole = model(ONE, 4, 8).embed(STORE, STORE["time"].values[7])
    means, of_whole = (x["latents"].isel(feature=1) for x in (found, whole))
    np.testing.assert_allclose(means, of_whole.isel(longitude=[3, 0]), atol=1e-5)


def test_what_is_written_is_what_is_returned(tmp_path: Path) -> None:
    used = model(TWO, 4, 8)
    (tmp_path / "latents.zarr").mkdir()  # an empty folder is no output
    written = used.embed(STORE, None, output=tmp_path / "latents.zarr")
    assert written.sizes["init_time"] == STORE.sizes["time"] - STEPS + 1
    some = STORE["time"].values[[3, 6]]
    returned = used.embed(STORE, some)
    xr.testing.assert_allclose(written.sel(init_time=some).load(), returned)
    for name in returned.variables:
        assert written[name].attrs == returned[name].attrs
    with pytest.raises(ValueError, match="exists"):
        used.embed(STORE, some, output=tmp_path / "latents.zarr")


def test_what_cannot_be_embedded_is_named(tmp_path: Path) -> None:
    used, last = model(ONE, 4, 8), STORE["time"].values[-1]
    with pytest.raises(ValueError, match="layer=2; valid: -2 to 1"):
        used.embed(STORE, last, layer=2)
    with pytest.raises(ValueError, match="a window has 4"):
        used.embed(STORE, STORE["time"].values[1])
    with pytest.raises(ValueError, match="must end in .zarr"):
        used.embed(STORE, last, output=tmp_path / "latents.nc")
    with pytest.raises(ValueError, match="6 columns, which tokens of 4 cells do not fill"):
        used.embed(STORE.isel(longitude=slice(0, 6)), last)
    with pytest.raises(ValueError, match="Reconstructing.*did not learn to embed; it can recon"):
        model(ONE, 4, 8, provides=frozenset({"reconstruct"})).embed(STORE, last)


@pytest.mark.e2e
def test_the_command_writes_latents(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "latents.zarr"
    date = "1959-02-12T00"
    arguments = ["embed", f"init_time={date}", "layer=0", "accelerator=cpu", f"output={output}"]
    assert main(arguments) == 0
    found = xr.open_zarr(output, decode_timedelta=True)
    assert found["latents"].shape == (1, 5, 1, 16, 32, 192)
    assert np.isfinite(found["latents"].values).all()
    assert main(arguments) == 2 and "exists" in capsys.readouterr().err
    assert main(["embed", "layer=9", f"init_time={date}", f"output={tmp_path / 'o.zarr'}"]) == 2
    assert "layer=9; valid: -2 to 1" in capsys.readouterr().err
