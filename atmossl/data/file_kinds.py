"""What a file holds, by its first bytes: names tell too little (`gfs.t00z.pgrb2.0p25.f006`)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

GRIB, NETCDF, ZIP = "GRIB", "NetCDF", "a zip archive"
_ENDINGS = (".grib", ".grib1", ".grib2", ".grb", ".grb1", ".grb2", ".nc", ".nc4", ".cdf")
ZARR_METADATA = ("zarr.json", ".zgroup", ".zmetadata")
_BEGINNINGS = {
    b"CDF\x01": NETCDF,
    b"CDF\x02": NETCDF,
    b"CDF\x05": NETCDF,
    b"\x89HDF\r\n\x1a\n": NETCDF,
    b"PK\x03\x04": ZIP,
    b"PK\x05\x06": ZIP,
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ\x00": "compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"\x1f\x9d": "compressed: unpack it first",
    b"\x0e\x03\x13\x01": "HDF 4: convert it to NetCDF first",
}
_HEAD = 4096  # bulletin headers may precede the first GRIB message


@dataclass(frozen=True)
class DataFiles:
    """The GRIB and NetCDF files of a folder or pattern; what was passed over, with the reason."""

    files: tuple[Path, ...]
    passed_over: tuple[str, ...]


def kind_of(path: Path) -> str:
    """`GRIB`, `NetCDF`, `a zip archive`, or in words why it can be none of them."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "empty"
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    at = head.find(b"GRIB")
    while at >= 0:
        if head[at + 7 : at + 8] in (b"\x01", b"\x02"):  # the edition
            return GRIB
        at = head.find(b"GRIB", at + 1)
    if any(head[n : n + 8] == b"\x89HDF\r\n\x1a\n" for n in (512, 1024, 2048)):
        return NETCDF
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    return "neither GRIB nor NetCDF by its first bytes"


def is_zarr(path: Path) -> bool:
    """Whether a folder is a zarr store, of format 2 or 3."""
    return path.is_dir() and any((path / name).exists() for name in ZARR_METADATA)


def data_files(location: str) -> DataFiles:
    """Of a folder, or of a pattern, those that are not hidden.

    Raises:
        ValueError: a file whose ending promises data that are not there.
    """
    path = Path(location)
    paths: Iterable[Path] = path.iterdir() if path.is_dir() else path.parent.glob(path.name)
    files, passed_over = [], []
    for entry in sorted(entry for entry in paths if not entry.name.startswith(".")):
        kind = "a folder" if entry.is_dir() else kind_of(entry)
        if kind in (GRIB, NETCDF):
            files.append(entry)
        elif entry.suffix in _ENDINGS and not entry.is_dir():
            raise ValueError(f"input {entry}: the file is {kind}; remove it or fetch it again")
        else:
            passed_over.append(f"{entry.name} ({kind})")
    return DataFiles(tuple(files), tuple(passed_over))
