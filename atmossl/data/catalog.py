"""The catalog: named stores with their segments, splits, variable names, licence and citation.

Entries stand in the file of the package, in `atmossl_catalog.yaml` of the working folder, where
`atmossl data add` writes them, or in a file that is named. Where a name is expected, the path of a
store does as well: its entry is then what `atmossl.data.proposal` makes of it.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from atmossl.settings import Strict
from atmossl.value_faults import as_written, in_plain_words, listed, of_unquoted

Split = Literal["train", "validation", "test"]
Gaps = Literal["error", "split"]
LevelKind = Literal["pressure", "model"]
StoreFormat = Literal["auto", "zarr", "netcdf", "icechunk", "kerchunk", "atmorep", "anemoi"]
_COORDINATES = ("time", "level", "latitude", "longitude")
_SECRET = re.compile(r"key|secret|token|password|credential", re.I)
_Date = Annotated[str, BeforeValidator(str)]  # YAML makes date objects of plain dates


def check_name(name: str, key: str) -> None:
    """Raise ValueError for a name that neither zarr nor NetCDF can hold."""
    if not name.strip() or "/" in name or name in (".", "..") or not name.isprintable():
        raise ValueError(
            f"{key}: {name!r} cannot be a name in a store; valid: printable characters without /"
        )


class SegmentEntry(Strict):
    """One continuous record in the catalog. location: a path or URL; `package://` means the
    folder of the package; for NetCDF also a folder or a pattern. format: needed where `auto`
    cannot tell the format from the location."""

    location: str
    format: StoreFormat = "auto"
    storage_options: dict[str, Any] = Field(default_factory=dict)


class Period(Strict):
    """Part of a segment, from `start` to `end`, both included; a day, month or year counts as a
    whole. Without them it is the whole segment."""

    segment: str
    start: _Date = ""
    end: _Date = ""


class TrainingSettings(Strict):
    """The window and the streams with which a store is trained on by default: points of the
    window along each axis, and streams with the keys of conf/stream. lead_time, hidden_time: of the
    default masks and tasks, where the usual ones are no whole steps of the store."""

    window: dict[Literal["time", "lat", "lon"], int]
    stream: dict[str, dict[str, Any]]
    lead_time: str | None = None
    hidden_time: str | None = None


class CatalogEntry(Strict):
    """A named collection of segments on one grid with one time step.

    variables: canonical name -> name in the store. levels: pressure levels in hPa, or numbers of
        model levels where `levels_are` is `model`.
    coordinates: canonical coordinate (time, level, latitude, longitude) -> name in the store.
    gaps: what missing time steps do: `error`, or `split` the record into its unbroken parts, so
        that no window spans a gap.
    training: window and streams that fit the store; those of conf/ where there are none.
    made_by: the command that writes the stores, told where one is missing.
    """

    description: str
    segments: dict[str, SegmentEntry]
    splits: dict[Split, Annotated[tuple[Period, ...], Field(min_length=1)]]
    variables: dict[str, str]
    levels: tuple[int, ...] = ()
    levels_are: LevelKind = "pressure"
    coordinates: dict[str, str] = Field(default_factory=dict)
    gaps: Gaps = "error"
    training: TrainingSettings | None = None
    made_by: str = ""
    licence: str
    citation: str

    @model_validator(mode="after")
    def _coordinates_are_canonical(self) -> "CatalogEntry":
        unknown = sorted(set(self.coordinates) - set(_COORDINATES))
        if unknown:
            raise ValueError(
                f"coordinates {listed(unknown)} do not exist; valid: {listed(_COORDINATES)}"
            )
        return self

    @model_validator(mode="after")
    def _names_fit_stores(self) -> "CatalogEntry":
        for key in ("variables", "segments"):
            for name in getattr(self, key):
                check_name(name, key)
        return self

    @model_validator(mode="after")
    def _periods_name_segments(self) -> "CatalogEntry":
        for split, periods in self.splits.items():
            for period in periods:
                if period.segment not in self.segments:
                    raise ValueError(
                        f"splits.{split} names segment {period.segment!r}; "
                        f"valid: {listed(sorted(self.segments))}"
                    )
        return self


def find_file(name: str) -> Path:
    """A file or folder of this name: inside the installed package, or at the top of a checkout.

    The package's own comes first: the folder beside an installed package is site-packages, where
    other packages may have left a `conf`.
    """
    package = Path(str(resources.files("atmossl")))
    for candidate in (package / name, package.parent / name):
        if candidate.exists():
            return candidate
    raise ValueError(f"{name} is missing: looked in {package} and {package.parent}")


def resolve_location(location: str) -> str:
    """A location with `package://` replaced by the folder of the package."""
    if location.startswith("package://"):
        return str(Path(str(resources.files("atmossl"))) / location.removeprefix("package://"))
    return location


OWN_CATALOG = Path("atmossl_catalog.yaml")  # of the working folder


def load_catalog(path: Path | None = None) -> dict[str, CatalogEntry]:
    """All entries of a catalog file, by default those that ship with the package and those of
    `atmossl_catalog.yaml` in the working folder.

    Raises:
        ValueError: the file is missing, no YAML, an entry does not fit, or a name stands in both
            files; names file and key.
    """
    if path is not None:
        return _read(path)
    shipped = _read(find_file("data_catalog.yaml"))
    user_entries = _read(OWN_CATALOG) if OWN_CATALOG.is_file() else {}
    if twice := sorted(set(shipped) & set(user_entries)):
        raise ValueError(
            f"{OWN_CATALOG}: {listed(twice)} are entries of the package; give other names"
        )
    return {**shipped, **user_entries}


def _read(path: Path) -> dict[str, CatalogEntry]:
    if not path.exists():
        raise ValueError(f"data.catalog={path}: no such file")
    try:
        raw = deepcopy(_parsed(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a catalog ({yaml_fault(error)})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: not a catalog (needed: NAME: KEY: VALUE)")
    for name, entry in raw.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: not a catalog (needed for {name}: KEY: VALUE)")
    return {name: _entry(name, entry, path) for name, entry in raw.items()}


def yaml_fault(error: Exception) -> str:
    """What is wrong with a YAML file, and where, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or not problem:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


@lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
    """What a catalog's text holds. A command asks several times, and parsing takes long."""
    return yaml.safe_load(text)


def _entry(name: str, values: dict[str, Any], path: Path) -> CatalogEntry:
    try:
        return CatalogEntry(**values)
    except ValidationError as error:
        faults = [_fault(name, fault) for fault in error.errors()]
        raise ValueError(f"{path}: {'; '.join(dict.fromkeys(faults))}") from error


# The classes of what stands inside of an entry, by its key.
_INNER = {"segments": SegmentEntry, "splits": Period, "training": TrainingSettings}


def _fault(name: str, fault: Any) -> str:
    key = ".".join(str(part) for part in (name, *fault["loc"]))
    if fault["type"] == "missing":
        return f"{key}: is missing"
    if fault["type"] == "extra_forbidden":
        *place, unknown = fault["loc"]
        kind = _INNER[place[0]] if place else CatalogEntry
        close = get_close_matches(str(unknown), kind.model_fields, n=1)
        return f"{key}: unknown key{f'; did you mean {close[0]}?' if close else ''}"
    value = "" if isinstance(fault["input"], Mapping) else f"={as_written(fault['input'])}"
    value = "" if fault["type"] == "value_error" else value  # such a message has it itself
    return f"{key}{value}: {in_plain_words(fault)}{of_unquoted(fault)}"


def catalog_entry(name: str, path: Path | None = None) -> CatalogEntry:
    """The catalog entry of this name, or the entry that is made for the store at this path or URL.

    Raises:
        ValueError: there is neither; names the entries that there are. Or the store does not fit.
    """
    entries = load_catalog(path)
    if name in entries:
        return entries[name]
    if is_location(name):
        from atmossl.data.proposal import propose  # opens stores, which names need not

        return propose(name).entry
    close = get_close_matches(name, entries, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    raise ValueError(
        f"data.name={as_written(name)} is not in the catalog and no store lies there; "
        f"{meant}valid: {listed(sorted(entries))}, or the path of a store"
    )


@dataclass(frozen=True)
class StoreChoice:
    """Which stores a command reads, `data`. name: a catalog entry; None: the one of the checkpoint.
    catalog: its file; None: the one of the package."""

    name: str | None = None
    catalog: Path | None = None


def check_split(data: StoreChoice, split: str) -> None:
    """Raise ValueError for a catalog entry that does not exist or lacks the split; that of the
    checkpoint is not read here."""
    if data.name is not None:
        splits = catalog_entry(data.name, data.catalog).splits
        if split not in splits:
            raise ValueError(
                f"split={split} is not in data={data.name}; valid: {listed(sorted(splits))}"
            )


def is_location(name: str) -> bool:
    """Whether a name that is no catalog entry is the path, the pattern or the URL of a store."""
    return "://" in name or any(character in name for character in "/*") or Path(name).exists()


def is_shipped(name: str, path: Path | None) -> bool:
    """Whether this name, in the catalog of this file, is an entry of the package."""
    return path is None and name in _read(find_file("data_catalog.yaml"))


def remembered(entry: CatalogEntry) -> dict[str, Any]:
    """A catalog entry as plain values for the record of a checkpoint. Paths are absolute, and
    words that give access to a store are left out, since checkpoints are passed on."""
    values = entry.model_dump(mode="json", exclude_defaults=True)
    for segment in values["segments"].values():
        segment["location"] = absolute(segment["location"])
        options = segment.get("storage_options", {})
        segment["storage_options"] = {
            key: value
            for key, value in options.items()
            if value in ("anon", True, False) or not _SECRET.search(f"{key} {value}")
        }
    return values


def recalled(values: Mapping[str, Any]) -> CatalogEntry:
    """The catalog entry that `remembered` stored in a checkpoint.

    Raises:
        ValueError: its store is not where it was.
    """
    entry = CatalogEntry(**values)
    for segment in entry.segments.values():
        path = Path(resolve_location(segment.location))
        there = any(path.parent.glob(path.name)) if "*" in path.name else path.exists()
        if "://" not in segment.location and not there:
            raise ValueError(
                f"data: the checkpoint was trained on {path}, which is not there any more; say "
                "where it is: data=NAME data.catalog=FILE.yaml of an entry that does, or data=PATH"
            )
    return entry


def absolute(location: str) -> str:
    """A location as an absolute path; URLs stay as they are."""
    return location if "://" in location else str(Path(location).absolute())
