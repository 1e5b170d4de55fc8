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
from zarr.storage import LocalStore

from atmossl.data.backends import open_store
from atmossl.data.catalog import SegmentEntry, load_catalog
from atmossl.data.chunks import Access
from atmossl.data.inputs import open_input
from atmossl.data.segment import Segment
from atmossl.data.store import open_segment
from atmossl.geometry import Box
from tests.synthetic import dataset

NAMES = ("temperature", "u_component_of_wind")
RECORD = dataset(steps=12)
ACCESS = Access(retries=2, retry_wait_s=0.01)


def opened(
    location: str,
    format: str = "auto",
    names: dict[str, str] | None = None,
    options: dict | None = None,
) -> Segment:
    entry = SegmentEntry(location=location, format=format, storage_options=options or {})
    return open_segment(
        "waves",
        open_store(entry, ACCESS),
        location,
        variables=NAMES,
        levels=(300, 850),
        variable_names=names,
        access=ACCESS,
    )


def check(segment: Segment) -> None:
    for name in NAMES:
        found = segment.read(name, (300, 850), 3, 6, segment.whole())
        expected = RECORD[name].isel(time=slice(3, 9)).sel(level=[300, 850])
        np.testing.assert_array_equal(found, expected.transpose("level", "time", ...))
    np.testing.assert_array_equal(segment.times, RECORD["time"])
    np.testing.assert_allclose(segment.grid.latitude, RECORD["latitude"])


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


@pytest.mark.filterwarnings("ignore:Numcodecs codecs")
@pytest.mark.parametrize("kind", ["kerchunk", "icechunk"])
def test_references_that_virtualizarr_writes_read_alike(tmp_path, kind: str) -> None:
    """To compressed NetCDF files that xarray wrote, joined along time."""
    virtualizarr = pytest.importorskip("virtualizarr")
    parser = pytest.importorskip("virtualizarr.parsers").HDFParser()
    registry = pytest.importorskip("obspec_utils.registry").ObjectStoreRegistry
    obstore = pytest.importorskip("obstore.store")
    packed = {name: {"zlib": True, "chunksizes": (2, 3, 8, 16)} for name in NAMES}
    parts = []
    for part in range(2):
        file = tmp_path / f"{part}.nc"
        RECORD.isel(time=slice(6 * part, 6 * part + 6)).to_netcdf(file, encoding=packed)
        parts.append(
            virtualizarr.open_virtual_dataset(
                url=f"file://{file}",
                registry=registry({"file://": obstore.LocalStore()}),
                parser=parser,
                loadable_variables=["time", "level", "latitude", "longitude"],
            )
        )
    whole = xr.concat(parts, "time", coords="minimal", compat="override", join="override")
    if kind == "kerchunk":
        whole.vz.to_kerchunk(str(tmp_path / "waves.json"), format="json")
        check(opened(str(tmp_path / "waves.json")))
        return
    icechunk = pytest.importorskip("icechunk")
    prefix = f"file://{tmp_path}/"
    config = icechunk.RepositoryConfig.default()
    files = icechunk.local_filesystem_store(f"{tmp_path}/")
    config.set_virtual_chunk_container(icechunk.VirtualChunkContainer(prefix, files))
    storage = icechunk.local_filesystem_storage(str(tmp_path / "ice"))
    session = icechunk.Repository.create(storage, config).writable_session("main")
    whole.vz.to_icechunk(session.store)
    session.commit("references")
    location = str(tmp_path / "ice")
    check(opened(location, "icechunk", options={"virtual_chunks": [prefix]}))
    closed = opened(location, "icechunk")
    with pytest.raises(ValueError, match=f"{location}: cannot read temperature .*authorize"):
        closed.read("temperature", (300,), 0, 2, closed.whole())


def put_times(group: zarr.Group, name: str, form: str = "units") -> None:
    """Dates as such, which zarr 3 warns of, or as numbers with CF units."""
    seconds = RECORD["time"].values.astype("datetime64[s]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = group.create_array(name, data=seconds if form == "dates" else seconds.astype("i8"))
    if form == "units":
        array.attrs["units"] = "seconds since 1970-01-01"


@pytest.mark.parametrize("colatitude", [False, True])
@pytest.mark.parametrize("form", ["dates", "units", "numbers"])
def test_atmoreps_layout_reads_alike(tmp_path, form: str, colatitude: bool) -> None:
    group = zarr.open_group(tmp_path / "atmorep.zarr", mode="w")
    fields = np.stack([RECORD[name].values for name in NAMES], axis=1)
    group.create_array("data", data=fields, chunks=(4, 1, 1, 8, 16))
    group.create_array("data_sfc", data=fields[:, :, 0], chunks=(4, 1, 8, 16))
    put_times(group, "time", form)
    latitude = RECORD["latitude"].values
    group.create_array("lats", data=90.0 - latitude if colatitude else latitude)
    group.create_array("lons", data=RECORD["longitude"].values)
    group.attrs.update(
        fields=["temperature", "velocity_u"], fields_sfc=["t2m", "msl"], levels=[300, 500, 850]
    )
    location = str(tmp_path / "atmorep.zarr")
    if form == "numbers":
        with pytest.raises(ValueError, match="array time of int64 has no attribute units"):
            opened(location, "atmorep")
        return
    check(opened(location, "atmorep"))


def read_together(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the chunks that one read of both variables fetches; its values are checked."""
    fetched, get = [], LocalStore.get

    async def noted(self, key, *arguments, **options):
        fetched.append(key)
        return await get(self, key, *arguments, **options)

    out = {name: np.empty((2, 6, 8, 16), np.float32) for name in NAMES}
    places = ((300, 850), 3, 6, segment.whole())
    targets = {
        name: [segment.target(name, *places, functools.partial(_put, out[name]))] for name in NAMES
    }
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "get", noted)
        segment.read_into(targets)
    for name in NAMES:
        expected = RECORD[name].isel(time=slice(3, 9)).sel(level=[300, 850])
        np.testing.assert_array_equal(out[name], expected.transpose("level", "time", ...))
    return [key for key in fetched if "data/c/" in key]


def _put(out: np.ndarray, values: np.ndarray, index: tuple[slice, ...]) -> None:
    out[index] = values


@pytest.mark.parametrize(("together", "count"), [(2, 3), (1, 6)])
def test_fields_of_one_chunk_are_decoded_once(tmp_path, monkeypatch, together, count) -> None:
    """Chunks of four steps, all levels and one field or both."""
    group = zarr.open_group(tmp_path / "atmorep.zarr", mode="w")
    fields = np.stack([RECORD[name].values for name in NAMES], axis=1)
    group.create_array("data", data=fields, chunks=(4, together, 3, 8, 16))
    put_times(group, "time")
    for name, coordinate in (("lats", "latitude"), ("lons", "longitude")):
        group.create_array(name, data=RECORD[coordinate].values)
    group.attrs.update(fields=["temperature", "velocity_u"], levels=[300, 500, 850])
    segment = opened(str(tmp_path / "atmorep.zarr"), "atmorep")
    fetched = read_together(segment, monkeypatch)
    assert len(fetched) == len(set(fetched)) == count


def test_anemois_layout_reads_alike(tmp_path, monkeypatch) -> None:
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
    put_times(group, "dates")
    group.attrs["variables"] = names
    segment = opened(str(tmp_path / "anemoi.zarr"), "anemoi", {NAMES[0]: "t", NAMES[1]: "u"})
    check(segment)
    fetched = read_together(segment, monkeypatch)
    assert len(fetched) == len(set(fetched)) == 6  # of one step each, for both variables
    group["latitudes"][3] = 12.3
    with pytest.raises(ValueError, match="no regular latitude-longitude grid"):
        open_store(SegmentEntry(location=str(tmp_path / "anemoi.zarr"), format="anemoi"))


def test_arrays_that_grew_after_consolidation_are_whole(tmp_path) -> None:
    """The copy of all metadata in one file is out of date where a store was appended to."""
    first, second = RECORD.isel(time=slice(0, 6)), RECORD.isel(time=slice(6, 12))
    first.to_zarr(tmp_path / "waves.zarr", zarr_format=2, consolidated=True)
    second.to_zarr(tmp_path / "waves.zarr", append_dim="time", consolidated=False)
    check(opened(str(tmp_path / "waves.zarr")))


def anemoi_store(path: Path, names: list[str], members: int = 1, **attributes: Any) -> np.ndarray:
    """A store of random values, [time variable member cell]."""
    cells = np.random.default_rng(1).normal(280, 9, (12, len(names), members, 128))
    group = zarr.open_group(path, mode="w")
    group.create_array("data", data=cells.astype(np.float32), chunks=(2, 2, 1, 128))
    lat, lon = np.meshgrid(RECORD["latitude"], RECORD["longitude"], indexing="ij")
    group.create_array("latitudes", data=lat.ravel())
    group.create_array("longitudes", data=lon.ravel())
    put_times(group, "dates")
    group.attrs.update(variables=names, **attributes)
    return cells.astype(np.float32)


def test_what_anemoi_says_is_missing_is_missing(tmp_path, caplog) -> None:
    """A level that a parameter lacks, and dates without data, also where the store has values; a
    parameter at the surface and on levels is two variables."""
    dates = [f"{np.datetime64(RECORD['time'].values[n], 's')}" for n in (3, 7)]
    names = ["t_500", "z", "w_850", "t_850", "z_500", "z_850"]
    cells = anemoi_store(tmp_path / "a.zarr", names, missing_dates=dates)
    stored = open_store(SegmentEntry(location=str(tmp_path / "a.zarr")))  # known by its arrays
    expected = cells[:, :, 0].reshape(12, 6, 8, 16)
    expected[[3, 7]] = np.nan
    nothing = np.full_like(expected[:, 0], np.nan)
    variables = {
        "t": np.stack([expected[:, 0], expected[:, 3]], 1),
        "w": np.stack([nothing, expected[:, 2]], 1),
        "z_levels": expected[:, 4:6],
        "z": expected[:, 1],
    }
    names_of = {"t": "t", "w": "w", "z_levels": "z_levels"}
    segment = open_segment(
        "a", stored, "a", variables=list(names_of), levels=[500, 850], variable_names=names_of,
        may_miss=list(names_of),
    )  # fmt: skip
    for name, values in variables.items():
        np.testing.assert_array_equal(stored.dataset[name].values, values)
        if name in names_of:
            read = segment.read(name, (500, 850), 0, 12, segment.whole()).swapaxes(0, 1)
            np.testing.assert_array_equal(read, values)
    part = segment.read("t", (850,), 6, 3, Box(2, 5, 4, 6))
    np.testing.assert_array_equal(part[0], expected[6:9, 3, 2:6, 5:11])
    assert "w lacks levels 500 of" in caplog.text and "2 dates are missing" in caplog.text


def test_members_of_an_anemoi_store_are_chosen(tmp_path) -> None:
    cells = anemoi_store(tmp_path / "a.zarr", ["t_300", "t_500", "2t"], members=3)
    place, expected = str(tmp_path / "a.zarr"), cells.reshape(12, 3, 3, 8, 16)
    with pytest.raises(ValueError, match=r"further dimensions number;.*storage_options"):
        store = open_store(SegmentEntry(location=place))
        open_segment("a", store, place, variables=["t"], levels=[300])
    with pytest.raises(ValueError, match=r"further dimensions number;.*select"):
        open_input(place, {}, {}, {})
    for member in (0, 2):
        one = open_store(SegmentEntry(location=place, storage_options={"number": member}))
        np.testing.assert_array_equal(one.dataset["t"], expected[:, :2, member])
        read = one.arrays["2t"].read((slice(0, 12), slice(0, 8), slice(0, 16)))
        np.testing.assert_array_equal(read, expected[:, 2, member])
        lines: list[str] = []
        chosen = open_input(place, {}, {"number": member}, {}, lines.append)["2m_temperature"]
        np.testing.assert_array_equal(chosen.transpose("time", ...), expected[:, 2, member])
        assert any("leaves out 2 of 3 values of number" in line for line in lines)
    with pytest.raises(ValueError, match=r"number=3 is no member; valid: 0 to 2"):
        open_store(SegmentEntry(location=place, storage_options={"number": 3}))


@pytest.mark.parametrize(
    ("names", "words"), [(["t_500", "t_500"], "more than once"), (["t_500"], "1 names for 2")]
)
def test_names_that_hide_each_other_are_refused(tmp_path, names: list[str], words: str) -> None:
    anemoi_store(tmp_path / "a.zarr", ["t_500", "q_500"])
    zarr.open_group(tmp_path / "a.zarr").attrs["variables"] = names
    with pytest.raises(ValueError, match=words):
        open_store(SegmentEntry(location=str(tmp_path / "a.zarr"), format="anemoi"))


CHUNKS = f"{NAMES[0]}/c/"
METADATA = "waves.zarr/zarr.json"


class Faulty(SimpleHTTPRequestHandler):
    """Serves a folder, late and in small pieces as over a narrow link; what `failing` is part of
    fails `faults` times, with an error or half its bytes."""

    faults, failing = 0, ""
    seen: dict[str, int] = {}

    def do_GET(self) -> None:
        self.seen[self.path] = self.seen.get(self.path, 0) + 1
        time.sleep(0.02)
        if self.failing not in self.path or self.seen[self.path] > self.faults:
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
def served(folder: Path, faults: int, failing: str = CHUNKS):
    kind = type("Handler", (Faulty,), {"faults": faults, "failing": failing, "seen": {}})
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


@pytest.mark.parametrize("failing", [METADATA, "latitude/c/"])
def test_http_metadata_and_coordinates_are_tried_again(tmp_path, failing: str) -> None:
    RECORD.to_zarr(tmp_path / "waves.zarr", consolidated=True)
    with served(tmp_path, 2, failing) as url:
        check(opened(url))
    with served(tmp_path, 99, failing) as url:
        begun = time.monotonic()
        with pytest.raises(ValueError, match=rf"store {url} cannot be opened as zarr \(.*503"):
            open_store(SegmentEntry(location=url), Access(retries=2, retry_wait_s=0.1))
        assert time.monotonic() - begun >= 0.1 + 0.2
        with pytest.raises(ValueError, match="nothing_there"):  # at once
            open_store(SegmentEntry(location=url.replace("waves", "nothing_there")),
                       Access(retries=1, retry_wait_s=1000.0))  # fmt: skip


def test_an_http_store_that_goes_on_failing_is_named(tmp_path) -> None:
    RECORD.to_zarr(tmp_path / "waves.zarr", consolidated=True)
    with served(tmp_path, 99) as url:
        segment = opened(url)
        with pytest.raises(ValueError, match=rf"{url}: cannot read temperature between 2001-01"):
            segment.read("temperature", (300,), 0, 2, segment.whole())
        with pytest.raises(ValueError, match="nothing_there"):
            open_store(SegmentEntry(location=url.replace("waves", "nothing_there")))


class FaultyProxy(BaseHTTPRequestHandler):
    """In front of an S3 server: late, and what `failing` is part of fails `faults` times, with an
    error or with half its bytes."""

    port, faults, failing, seen = 0, 0, "", {}

    def do_GET(self) -> None:
        time.sleep(0.02)
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        chunk = self.failing in self.path and self.command == "GET"
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
def s3_server(folder: Path, faults: int, failing: str):
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
    kind = type(
        "Proxy", (FaultyProxy,), {"port": port, "faults": faults, "failing": failing, "seen": {}}
    )
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


@pytest.mark.parametrize(
    ("faults", "failing"), [(2, CHUNKS), (99, CHUNKS), (2, METADATA), (99, METADATA)]
)
def test_s3_is_tried_again_and_then_named(tmp_path, monkeypatch, faults: int, failing: str) -> None:
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    RECORD.to_zarr(tmp_path / "waves.zarr", consolidated=True)
    location = "s3://weather/waves.zarr"
    with s3_server(tmp_path, faults, failing) as options:
        entry = SegmentEntry(location=location, storage_options=options)
        if failing == METADATA and faults > ACCESS.retries:
            with pytest.raises(ValueError, match=f"store {location} cannot be opened as zarr"):
                open_store(entry, ACCESS)
            return
        segment = open_segment(
            "waves",
            open_store(entry, ACCESS),
            location,
            variables=NAMES,
            levels=(300, 850),
            access=ACCESS,
        )
        if faults <= ACCESS.retries:
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
