"""Every kind of store gives the same values, and what cannot be read says so."""

import functools
import http.client
import json
import threading
import time
import warnings
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr

from atmossl.data.backends import open_store
from atmossl.data.catalog import SegmentEntry, load_catalog
from atmossl.data.chunks import Access
from atmossl.data.segment import Segment
from atmossl.data.store import open_segment
from atmossl.geometry import Box
from tests.synthetic import dataset

NAMES = ("temperature", "u_component_of_wind")
RECORD = dataset(steps=12)


def opened(location: str, format: str = "auto", names: dict[str, str] | None = None) -> Segment:
    return open_segment(
        "waves",
        open_store(SegmentEntry(location=location, format=format)),
        location,
        variables=NAMES,
        levels=(300, 850),
        variable_names=names,
        access=Access(retries=2, retry_wait_s=0.01),
    )


def check(segment: Segment) -> None:
    for name in NAMES:
        found = segment.read(name, (300, 850), 3, 6, segment.whole())
        expected = RECORD[name].isel(time=slice(3, 9)).sel(level=[300, 850])
        np.testing.assert_array_equal(found, expected.transpose("level", "time", ...))


def in_folder(path: Path) -> str:
    for part in range(3):
        RECORD.isel(time=slice(4 * part, 4 * part + 4)).to_netcdf(path / f"{part}.nc")
    return str(path)


def by_pattern(path: Path) -> str:
    return in_folder(path) + "/*.nc"


def in_zip(path: Path) -> str:
    with zarr.storage.ZipStore(path / "waves.zarr.zip", mode="w") as store:
        RECORD.to_zarr(store, consolidated=False)
    return str(path / "waves.zarr.zip")


def consolidated(path: Path) -> str:
    RECORD.to_zarr(path / "waves.zarr", zarr_format=2, consolidated=True)
    return str(path / "waves.zarr")


@pytest.mark.parametrize("made", [in_folder, by_pattern, in_zip, consolidated])
def test_files_and_folders_read_alike(tmp_path, made) -> None:
    check(opened(made(tmp_path)))


def test_icechunk_reads_alike(tmp_path) -> None:
    icechunk = pytest.importorskip("icechunk")
    storage = icechunk.local_filesystem_storage(str(tmp_path / "ice"))
    session = icechunk.Repository.create(storage).writable_session("main")
    RECORD.to_zarr(session.store, consolidated=False)
    session.commit("waves")
    check(opened(str(tmp_path / "ice"), "icechunk"))


def test_references_to_other_files_read_alike(tmp_path) -> None:
    """As kerchunk and virtualizarr write them: metadata inline, chunks as places in files."""
    RECORD.to_zarr(tmp_path / "waves.zarr", zarr_format=2, consolidated=False)
    references = {}
    for file in sorted((tmp_path / "waves.zarr").rglob("*")):
        key = file.relative_to(tmp_path / "waves.zarr").as_posix()
        if file.name.startswith(".z"):
            references[key] = file.read_text()
        elif file.is_file():
            references[key] = [str(file), 0, file.stat().st_size]
    path = tmp_path / "waves.json"
    path.write_text(json.dumps({"version": 1, "refs": references}))
    check(opened(str(path)))


def test_atmoreps_layout_reads_alike(tmp_path) -> None:
    group = zarr.open_group(tmp_path / "atmorep.zarr", mode="w")
    fields = np.stack([RECORD[name].values for name in NAMES], axis=1)
    group.create_array("data", data=fields, chunks=(4, 1, 1, 8, 16))
    group.create_array("data_sfc", data=fields[:, :, 0], chunks=(4, 1, 8, 16))
    group.create_array("time", data=RECORD["time"].values.astype("datetime64[s]").astype("int64"))
    group.create_array("lats", data=RECORD["latitude"].values)
    group.create_array("lons", data=RECORD["longitude"].values)
    group.attrs.update(
        fields=["temperature", "velocity_u"], fields_sfc=["t2m", "msl"], levels=[300, 500, 850]
    )
    segment = opened(str(tmp_path / "atmorep.zarr"), "atmorep")
    check(segment)


def test_anemois_layout_reads_alike(tmp_path) -> None:
    names, rows = [], []
    for short, name in (("t", NAMES[0]), ("u", NAMES[1])):
        for level in (850, 300, 500):  # in no order
            names.append(f"{short}_{level}")
            rows.append(RECORD[name].sel(level=level).values.reshape(12, -1))
    names.append("2t")
    rows.append(rows[0])
    group = zarr.open_group(tmp_path / "anemoi.zarr", mode="w")
    cells = np.stack(rows, axis=1)[:, :, None]
    group.create_array("data", data=cells, chunks=(1, len(names), 1, cells.shape[-1]))
    lat, lon = np.meshgrid(RECORD["latitude"], RECORD["longitude"], indexing="ij")
    group.create_array("latitudes", data=lat.ravel())
    group.create_array("longitudes", data=lon.ravel())
    group.create_array("dates", data=RECORD["time"].values.astype("datetime64[s]").astype("int64"))
    group.attrs["variables"] = names
    check(opened(str(tmp_path / "anemoi.zarr"), "anemoi", {NAMES[0]: "t", NAMES[1]: "u"}))
    group["latitudes"][3] = 12.3
    with pytest.raises(ValueError, match="no regular latitude-longitude grid"):
        open_store(SegmentEntry(location=str(tmp_path / "anemoi.zarr"), format="anemoi"))


class Faulty(SimpleHTTPRequestHandler):
    """Serves a folder, late and in small pieces as over a narrow link; every chunk fails `faults`
    times, with an error or half its bytes."""

    faults = 0
    seen: dict[str, int] = {}

    def do_GET(self) -> None:
        self.seen[self.path] = self.seen.get(self.path, 0) + 1
        time.sleep(0.02)
        chunk = "/c/" in self.path and NAMES[0] in self.path
        if not chunk or self.seen[self.path] > self.faults:
            super().do_GET()
        elif self.seen[self.path] % 2:
            self.send_error(503)
        else:
            whole = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[: len(whole) // 2])
            self.close_connection = True

    def copyfile(self, source: Any, outputfile: Any) -> None:
        while piece := source.read(4096):
            outputfile.write(piece)
            outputfile.flush()
            time.sleep(0.0005)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@contextmanager
def served(folder: Path, faults: int):
    kind = type("Handler", (Faulty,), {"faults": faults, "seen": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/waves.zarr"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("faults", [0, 2])
def test_http_errors_and_truncated_bodies_are_tried_again(tmp_path, faults: int) -> None:
    RECORD.to_zarr(tmp_path / "waves.zarr", consolidated=True)
    with served(tmp_path, faults) as url:
        check(opened(url))


def test_an_http_store_that_goes_on_failing_is_named(tmp_path) -> None:
    RECORD.to_zarr(tmp_path / "waves.zarr", consolidated=True)
    with served(tmp_path, 99) as url:
        segment = opened(url)
        with pytest.raises(ValueError, match=rf"{url}: cannot read temperature between 2001-01"):
            segment.read("temperature", (300,), 0, 2, segment.whole())
        with pytest.raises(ValueError, match="nothing_there"):
            open_store(SegmentEntry(location=url.replace("waves", "nothing_there")))


class FaultyProxy(BaseHTTPRequestHandler):
    """In front of an S3 server: late, and every chunk of one variable fails `faults` times, with
    an error or with half its bytes."""

    port, faults, seen = 0, 0, {}

    def do_GET(self) -> None:
        time.sleep(0.02)
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        chunk = f"{NAMES[0]}/c/" in self.path and self.command == "GET"
        count = self.seen[self.path] = self.seen.get(self.path, 0) + chunk
        faulty = chunk and count <= self.faults
        self.send_response(503 if faulty and count % 2 else answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("connection", "transfer-encoding", "date", "server"):
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if faulty else body)
        self.close_connection = faulty

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@contextmanager
def s3_server(folder: Path, faults: int):
    """Storage options for bucket `weather`, which holds the store in the folder."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    inner = moto.ThreadedMotoServer("127.0.0.1", port=0)
    inner.start()
    port = inner.get_host_and_port()[1]
    direct = {"client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}"}}
    files = s3fs.S3FileSystem(**direct)
    files.makedirs("weather", exist_ok=True)  # moto keeps buckets beyond a server
    files.put(str(folder / "waves.zarr"), "weather/waves.zarr", recursive=True)
    kind = type("Proxy", (FaultyProxy,), {"port": port, "faults": faults, "seen": {}})
    outer = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=outer.serve_forever, daemon=True)
    thread.start()
    try:
        yield {
            "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{outer.server_address[1]}"},
            "config_kwargs": {"retries": {"max_attempts": 1}},  # ours are what is tested
        }
    finally:
        outer.shutdown()
        outer.server_close()
        thread.join()
        inner.stop()


@pytest.mark.parametrize("faults", [0, 2, 99])
def test_s3_is_tried_again_and_then_named(tmp_path, monkeypatch, faults: int) -> None:
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    RECORD.to_zarr(tmp_path / "waves.zarr", consolidated=True)
    location = "s3://weather/waves.zarr"
    with s3_server(tmp_path, faults) as options:
        store = open_store(SegmentEntry(location=location, storage_options=options))
        access = Access(retries=2, retry_wait_s=0.01)
        segment = open_segment(
            "waves", store, location, variables=NAMES, levels=(300, 850), access=access
        )
        if faults <= access.retries:
            check(segment)
            return
        with pytest.raises(ValueError) as refused:
            segment.read(NAMES[0], (300,), 0, 2, segment.whole())
    message = str(refused.value)
    assert message.startswith(f"{location}: cannot read {NAMES[0]} between 2001-01-01")
    assert "chunk (time 0, level 0, latitude 0, longitude 0)" in message and "\n" not in message


@pytest.mark.parametrize("format", ["zarr", "netcdf", "icechunk", "kerchunk", "atmorep", "anemoi"])
def test_what_is_no_store_is_refused_in_one_line(tmp_path, format: str) -> None:
    (tmp_path / "file.bin").write_bytes(b"no store")
    location = str(tmp_path / "file.bin")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="file.bin") as refused:
        warnings.simplefilter("ignore")
        open_store(SegmentEntry(location=location, format=format))
    assert "\n" not in str(refused.value)


# What the public stores' own metadata say, written down by hand: order of dimensions, sizes, levels
# and first and last time (WeatherBench 2's and ARCO-ERA5's documentation).
_WB2_LEVELS = [50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 850, 925, 1000]
_ARCO_LEVELS = [
    *(1, 2, 3, 5, 7, 10, 20, 30, 50, 70, *range(100, 251, 25), *range(300, 751, 50)),
    *range(775, 1001, 25),
]
_WB2_DIMS = ("time", "level", "longitude", "latitude")
_PUBLIC = {
    "weatherbench2_64x32": {
        "dims": _WB2_DIMS,
        "time": pd.date_range("1959-01-01", "2021-12-31T18", freq="6h"),
        "level": _WB2_LEVELS,
        "latitude": np.arange(-87.1875, 90, 5.625),
        "longitude": np.arange(0, 360, 5.625),
    },
    "weatherbench2_240x121": {
        "dims": _WB2_DIMS,
        "time": pd.date_range("1959-01-01", "2021-12-31T18", freq="6h"),
        "level": _WB2_LEVELS,
        "latitude": np.linspace(-90, 90, 121),
        "longitude": np.arange(0, 360, 1.5),
    },
    "arco_era5": {
        "dims": ("time", "level", "latitude", "longitude"),
        "time": pd.date_range("1900-01-01", "2050-12-31T23", freq="h"),
        "level": _ARCO_LEVELS,
        "latitude": np.linspace(90, -90, 721),
        "longitude": np.arange(0, 360, 0.25),
    },
}
_PUBLIC_UNITS = {
    "temperature": "K",
    "u_component_of_wind": "m s**-1",
    "v_component_of_wind": "m s**-1",
    "geopotential": "m**2 s**-2",
    "specific_humidity": "kg kg**-1",
}


@pytest.mark.parametrize("name", _PUBLIC)
def test_catalog_entries_match_the_stores_metadata(name: str) -> None:
    """Every split of the entry opens on a store of that shape, whose values take no memory."""
    layout = dict(_PUBLIC[name])
    dims = layout.pop("dims")
    assert len(_ARCO_LEVELS) == 37 and len(_PUBLIC["arco_era5"]["time"]) == 1323648
    assert len(_PUBLIC["weatherbench2_64x32"]["time"]) == 92044
    shape = tuple(len(layout[dim]) for dim in dims)
    nothing = np.broadcast_to(np.float32(0), shape)
    fields = {stored: (dims, nothing, {"units": unit}) for stored, unit in _PUBLIC_UNITS.items()}
    entry = load_catalog()[name]
    segment = open_segment(
        name,
        xr.Dataset(fields, layout),
        name,
        variables=list(entry.variables),
        levels=entry.levels,
        variable_names=entry.variables,
    )
    assert segment.grid.shape == (len(layout["latitude"]), len(layout["longitude"]))
    assert (np.diff(segment.grid.latitude) > 0).all() and segment.grid.periodic
    found = segment.read("temperature", entry.levels, 5, 2, Box(0, 0, 2, 3))
    assert found.shape == (len(entry.levels), 2, 2, 3)
    for periods in entry.splits.values():
        for period in periods:
            for end in (period.start, period.end):
                assert np.datetime64(end) in segment.times, (name, end)
