"""Reads GRIB files. Every message has a place of its own in the result, or the file is refused.

The headers of all messages are read once (cfgrib's index). From them follows which messages are
wanted, whether two of them claim one place, and what is left out, before any value is decoded.
cfgrib then makes a lazy dataset of every variable. It knows nothing of points that run along
longitudes of constant number first or from east to west, so the axes and the order of the values
are set here, from the scanning mode (WMO code table: GRIB 1 table 8, GRIB 2 flag table 3.4).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
import xarray as xr

from atmossl.value_faults import as_written

Tell = Callable[[str], object]
Header = Mapping[str, Any]
_GRIDS = ("regular_ll", "regular_gg")
# Keys of which all messages of one variable have one value; the first that differs is advised.
_SHARED = ("typeOfLevel", "dataType", "stepType", "paramId", "edition", "centre", "subCentre")
_SHARED_GRID = ("numberOfPoints", "uvRelativeToGrid", "md5GridSection")
_GRID_KEYS = (
    *("gridType", "Ni", "Nj", "scanningMode", "uvRelativeToGrid"),
    *("latitudeOfFirstGridPointInDegrees", "longitudeOfFirstGridPointInDegrees"),
    *("latitudeOfLastGridPointInDegrees", "longitudeOfLastGridPointInDegrees"),
    *("iDirectionIncrementInDegrees", "jDirectionIncrementInDegrees", "shapeOfTheEarth"),
)
# What makes up the place of a message; keys that tell two messages of one place apart, the most
# usual first; and keys that follow from the values, and so choose nothing.
_PLACE = ("time", "step", "number", "level:float", "directionNumber", "frequencyNumber")
_TELLING = (
    *("stepRange", "dataType", "typeOfLevel", "stepType", "expver", "stream", "type", "class"),
    *("hdate", "referenceDate", "modelVersionDate", "channel", "topLevel", "bottomLevel"),
    *("parameterCategory", "parameterNumber", "shortName", "generatingProcessIdentifier"),
    *("typeOfProcessedData", "productDefinitionTemplateNumber", "second"),
)
_OF_VALUES = (
    *("offset", "totalLength", "max", "min", "maximum", "minimum", "average", "avg", "const", "sd"),
    *("standardDeviation", "skewness", "kurtosis", "isConstant", "referenceValue", "values"),
    *(
        "binaryScaleFactor",
        "decimalScaleFactor",
        "bitsPerValue",
        "numberOfValues",
        "numberOfMissing",
    ),
    *("numberOfCodedValues", "numberOfDataPoints", "getNumberOfValues", "packingError"),
    *("unpackedError", "referenceValueError", "7777", "codedValues", "bitmap", "packingType"),
)
_STEP_UNIT, _CALENDAR = "indicatorOfUnitOfTimeRange", (3, 4, 5, 6, 7)  # months to centuries
_ABSENT = ("undef", "unknown", None)
_BY_COLUMNS, _ALTERNATING = 32, 16
_RESERVED = {1: 31, 2: 15}  # bits of scanningMode by edition that no regular grid has
_MAX_SHOWN = 6


class NoSuchMessage(ValueError):
    """No message of a file has the values that the filters want."""


@dataclass(frozen=True)
class Messages:
    """Some messages of one file. rows: the header values by key, and the messages that have
    them."""

    file: str
    index: Any  # cfgrib's FileIndex of the whole file
    rows: tuple[tuple[Header, list[Any]], ...]

    @classmethod
    def scan(cls, file: str, filters: Mapping[str, Any]) -> Self:
        """The headers of all messages, with the keys of the filters.

        Raises:
            ValueError: a message is truncated or damaged.
        """
        from cfgrib import cfmessage, dataset, messages

        more = {"time", "step", "stepRange", "second", _STEP_UNIT, *filters}
        keys = sorted({*dataset.INDEX_KEYS, *more})
        stream = messages.FileStream(file, errors="raise")
        try:
            index = messages.FileIndex.from_indexpath_or_filestream(
                stream, keys, indexpath="", computed_keys=cfmessage.COMPUTED_KEYS
            )
        except EOFError as error:
            raise ValueError(f"input {file}: it holds no whole GRIB message") from error
        except Exception as error:
            why = " ".join(str(error).split())
            raise ValueError(
                f"input {file}: a GRIB message is truncated or damaged ({why})"
            ) from error
        rows = [(dict(zip(keys, values, strict=True)), ids) for values, ids in index.iter_index()]
        return cls(file, index, tuple(rows))

    def where(self, chosen: Callable[[Header], bool]) -> Self:
        return replace(self, rows=tuple(row for row in self.rows if chosen(row[0])))

    def values(self, key: str) -> list[Any]:
        return list(dict.fromkeys(header[key] for header, _ in self.rows))

    def __len__(self) -> int:
        return sum(len(ids) for _, ids in self.rows)

    def first(self) -> Any:
        return self.index.get_field(self.rows[0][1][0])

    def filtered(self, filters: Mapping[str, Any]) -> Self:
        """The messages whose keys have the values of the filters; a filter may list several values.

        Raises:
            NoSuchMessage: no message has a value; names those that there are.
        """
        chosen = self
        for key, values in filters.items():
            choices = values if isinstance(values, list | tuple) else [values]
            fitting = chosen.where(
                lambda header, k=key, c=choices: any(_same(header[k], v) for v in c)
            )
            if not fitting.rows:
                have = [value for value in chosen.values(key) if value not in _ABSENT]
                advice = f"valid: {_listed(have)}" if have else "no message has that key"
                raise NoSuchMessage(
                    f"input {self.file}: filters.{key}={as_written(values)}: {advice}"
                )
            chosen = fitting
        return chosen

    def by_name(self) -> dict[str, Self]:
        """The messages of every variable, by the name that cfgrib gives it."""
        named: dict[str, list[Any]] = {}
        for parameter in self.values("paramId"):
            first = self.where(lambda header, p=parameter: header["paramId"] == p).first()
            names = [first.get(key, "unknown") for key in ("cfVarName", "shortName")]
            name = next((name for name in names if name not in _ABSENT), "unknown")
            named.setdefault(str(name), []).append(parameter)
        return {
            name: self.where(lambda header, p=parameters: header["paramId"] in p)
            for name, parameters in named.items()
        }


def open_grib(
    file: str, filters: Mapping[str, Any], canonical_name: Callable[[str], str | None], tell: Tell
) -> tuple[list[xr.Dataset], list[str]]:
    """A lazy dataset of every variable that is wanted, and the names of all in the file.

    canonical_name: the variable that a name in the file stands for; None if it is not wanted.
    tell: is told what is left out or missing, a line each.

    Raises:
        ValueError: a damaged message, a grid of another type, or two messages that claim one
            place; names file, variable, date, and the keys that differ.
    """
    whole = Messages.scan(file, filters)
    _check_between(whole, tell)
    chosen = whole.filtered(filters)
    if len(chosen) < len(whole):
        tell(f"filters leave out {len(whole) - len(chosen)} of {len(whole)} GRIB messages")
    named = chosen.by_name()
    variables: dict[str, str] = {}
    for name in named:
        canonical = canonical_name(name)
        if canonical in variables:
            raise ValueError(
                f"input {file}: {variables[canonical]} and {name} both are {canonical}; choose "
                f"with variables.{canonical}={name}"
            )
        if canonical is not None:
            variables[canonical] = name
    for canonical, name in variables.items():
        _check_places(named[name], f"{canonical} ({name})", tell)
    return [_dataset(named[name]) for name in variables.values()], list(named)


def _same(value: Any, written: Any) -> bool:
    """Whether a header has a value as users write it: 1 means expver 0001."""
    if str(value) == str(written):
        return True
    try:
        return float(value) == float(written)
    except (TypeError, ValueError):
        return False


def _listed(values: Iterable[Any]) -> str:
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    more = f" and {len(shown) - _MAX_SHOWN} more" if len(shown) > _MAX_SHOWN else ""
    return ", ".join(shown[:_MAX_SHOWN]) + more


def _check_between(messages: Messages, tell: Tell) -> None:
    """Check that no damaged message hides between the messages or after the last one. ecCodes
    would skip it without a word."""
    ids = (number for _, ids in messages.rows for number in ids)
    starts = sorted({number[0] if isinstance(number, tuple) else number for number in ids})
    path = Path(messages.file)
    with path.open("rb") as file:
        end, stray = 0, 0
        for start in [*starts, path.stat().st_size]:
            if end is not None and start > end:
                file.seek(end)
                between = file.read(start - end)
                if b"GRIB" in between or b"7777" in between:
                    raise ValueError(
                        f"input {path}: a GRIB message at byte {end} is truncated or damaged"
                    )
                stray += len(between.strip(b"\0"))
            file.seek(start)
            length = _length(file.read(16))
            end = start + length if length else None
    if stray:
        tell(f"{stray} bytes between GRIB messages are no part of any and are not read")


def _length(head: bytes) -> int:
    """The length of a message in bytes by its section 0; 0 where GRIB 1 does not tell, as above
    8 MB."""
    if head[7:8] == b"\2":
        return int.from_bytes(head[8:16], "big")
    length = int.from_bytes(head[4:7], "big")
    return 0 if length & 0x800000 else length


def _check_places(messages: Messages, variable: str, tell: Tell) -> None:
    """Check that no two messages of a variable claim one place, and that all lie on one known grid.

    Raises:
        ValueError: names the keys that differ and the filter that chooses.
    """
    where = f"input {messages.file}: {variable}"
    for grid in messages.values("gridType"):
        if grid not in _GRIDS:
            raise ValueError(
                f"{where} lies on a grid of type {grid}; valid: {', '.join(_GRIDS)}. Regrid it "
                "first, with cdo or earthkit for example, or choose others with filters"
            )
    _check_shared(messages, where)
    _check_dates(messages, where)
    _check_single(messages, where, tell)
    places = prod(len(messages.values(key)) for key in _PLACE)
    if holes := places - len({_place(header) for header, _ in messages.rows}):
        tell(
            f"{variable} has no GRIB message for {holes} of its {places} places (dates, steps, "
            "members and levels): they are missing values"
        )


def _check_dates(messages: Messages, where: str) -> None:
    """Check that cfgrib can hold the dates and steps: whole minutes, and steps of a certain
    length."""
    if set(messages.values("second")) - {0, "undef"}:
        raise ValueError(f"{where} has dates with seconds; valid: whole minutes")
    calendar_steps = messages.where(
        lambda header: (
            header["step"] == "undef" or (header["step"] and header[_STEP_UNIT] in _CALENDAR)
        )
    )
    if calendar_steps.rows:
        steps = _listed(calendar_steps.values("stepRange"))
        raise ValueError(
            f"{where} has steps in months or years, which have no certain length (stepRange "
            f"{steps}); valid: seconds to days"
        )


def _check_shared(messages: Messages, where: str) -> None:
    """Check that all messages agree in the headers that a variable has only once."""
    several = [key for key in _SHARED if len(messages.values(key)) > 1]
    mixed = [key for key in _PLACE if "undef" in messages.values(key)]
    several += [key for key in mixed if len(messages.values(key)) > 1]
    if not several and any(len(messages.values(key)) > 1 for key in _SHARED_GRID):
        grids = messages.values("md5GridSection")
        first, other = (
            messages.where(lambda header, g=grid: header["md5GridSection"] == g).first()
            for grid in grids[:2]
        )
        differing = _differing(first, other, _GRID_KEYS)
        key = next(iter(differing), "md5GridSection")
        shown = differing or {key: tuple(grids[:2])}
        raise ValueError(
            f"{where} lies on {len(grids)} grids, which differ in {_pairs(shown)}; choose one "
            f"with filters.{key}={shown[key][0]}"
        )
    if several:
        key, have = several[0], messages.values(several[0])
        most = max(have, key=lambda v: len(messages.where(lambda header: header[key] == v)))
        shown = "; ".join(f"{key}: {_listed(messages.values(key))}" for key in several[:4])
        raise ValueError(
            f"{where} from {_date(messages.rows[0][0])} on has messages that differ in {shown}; "
            f"choose with filters, such as filters.{key.partition(':')[0]}={most}"
        )


def _place(header: Header) -> tuple[Any, ...]:
    return tuple(header[key] for key in _PLACE)


def _check_single(messages: Messages, where: str, tell: Tell) -> None:
    """Check that every place has one message, apart from equal copies."""
    by_place: dict[tuple[Any, ...], list[Any]] = {}
    headers: dict[tuple[Any, ...], Header] = {}
    for header, ids in messages.rows:
        by_place.setdefault(_place(header), []).extend(ids)
        headers.setdefault(_place(header), header)
    copies = 0
    for place, ids in by_place.items():
        if len(ids) == 1:
            continue
        first, *repeats = (messages.index.get_field(number) for number in ids)
        for other in repeats:
            if _bytes_of(first) != _bytes_of(other):
                raise ValueError(_clash(first, other, f"{where} of {_date(headers[place])}"))
        copies += len(repeats)
    if copies:
        tell(f"{copies} GRIB messages are copies of others, byte for byte, and are not read")


def _bytes_of(field: Any) -> bytes:
    import eccodes

    return eccodes.codes_get_message(field.context.codes_id)


def _clash(first: Any, other: Any, where: str) -> str:
    """The error for two messages that claim one place."""
    differing = _differing(first, other, _TELLING)
    if not differing:
        keys = [key for key in first.context.message_grib_keys() if key not in _OF_VALUES]
        plain = [key for key in keys if not key.startswith(("section", "md5", "reserved"))]
        differing = _differing(first, other, plain)
    if not differing:
        return (
            f"{where} is there more than once, with other values under the same keys, so that no "
            "filter chooses; remove one of the messages from the file"
        )
    key, values = next(iter(differing.items()))
    return (
        f"{where} is there more than once; the messages differ in {_pairs(differing)}. Choose "
        f"one with filters.{key}={values[1]}, or name the variables that you want under variables"
    )


def _differing(first: Any, other: Any, keys: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ between two messages, with both values."""
    pairs = {key: (first.get(key), other.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if str(pair[0]) != str(pair[1])}


def _pairs(differing: Mapping[str, tuple[Any, Any]]) -> str:
    shown = [f"{key} ({first} and {second})" for key, (first, second) in differing.items()]
    return ", ".join(shown[:4])


def _date(header: Header) -> str:
    """The date and place of a message, in words."""
    date = np.datetime_as_string(np.datetime64(int(header["time"]), "s"), "m")
    step, level, number = (header[key] for key in ("step", "level:float", "number"))
    more = [f"step {step:g} h"] if step not in (0, *_ABSENT) else []
    more += [f"level {level:g}"] if level not in (0, *_ABSENT) else []
    more += [f"number {number}"] if number not in _ABSENT else []
    return ", ".join([date, *more])


def _dataset(messages: Messages) -> xr.Dataset:
    """The lazy dataset of one variable, with every value in its own cell."""
    from cfgrib import dataset, xarray_plugin

    whole = messages.index
    rows = [(tuple(header[key] for key in whole.index_keys), ids) for header, ids in messages.rows]
    index = type(whole)(
        fieldset=whole.fieldset,
        index_keys=whole.index_keys,
        field_ids_index=rows,
        computed_keys=whole.computed_keys,
    )

    class Store(xarray_plugin.CfGribDataStore):
        def __init__(self) -> None:
            self.lock = xarray_plugin.ECCODES_LOCK
            self.ds = dataset.open_from_index(index, errors="raise")

    opened = xr.open_dataset(Store())  # pyright: ignore[reportArgumentType]
    if "step" in opened.coords:  # cfgrib counts it in hours: 20 minutes are no exact number
        opened = opened.assign_coords(step=opened["step"].dt.round("s"))
    return _in_cells(opened, messages)


def _in_cells(opened: xr.Dataset, messages: Messages) -> xr.Dataset:
    """The dataset with the axes of the grid, and the values in rows of latitude.

    ecCodes lists the points in the order in which they are stored, except that it does not turn
    every other row (or column) of mode 16; cfgrib turns every other row of the shape (latitude,
    longitude) for mode 16, and takes all points to run along rows.
    """
    first = messages.first()
    mode, edition = int(first["scanningMode"]), int(first["edition"])
    if mode & _RESERVED.get(edition, 255):
        raise ValueError(
            f"input {messages.file}: scanningMode={mode} has bits that no regular grid of edition "
            f"{edition} has; valid: sums of 128, 64, 32{', 16' if edition == 2 else ''}"
        )
    shape, by_columns = (int(first["Ny"]), int(first["Nx"])), bool(mode & _BY_COLUMNS)
    latitude, longitude = (
        _by_rows(np.array(first[key]), shape, by_columns) for key in ("latitudes", "longitudes")
    )
    if not (np.allclose(latitude, latitude[:, :1]) and np.allclose(longitude, longitude[:1])):
        raise ValueError(
            f"input {messages.file}: ecCodes lists the points of scanningMode={mode} on no axes of "
            "latitude and longitude; write the file anew in another order, with cdo for example"
        )
    opened = opened.assign_coords(
        latitude=opened["latitude"].copy(data=latitude[:, 0]),
        longitude=opened["longitude"].copy(data=longitude[0]),
    )
    if not by_columns:
        return opened.chunk({})
    single = {dim: 1 for dim in opened.dims if dim not in ("latitude", "longitude")}
    alternating = bool(mode & _ALTERNATING)
    return opened.chunk(single).map(
        lambda array: array.copy(
            data=array.data.map_blocks(_from_columns, alternating, dtype=array.dtype)
        )
    )


def _by_rows(points: np.ndarray, shape: tuple[int, int], by_columns: bool) -> np.ndarray:
    """Points [... cell] in their stored order as a grid [... row column]."""
    if by_columns:
        return points.reshape(*points.shape[:-1], *shape[::-1]).swapaxes(-1, -2)
    return points.reshape(*points.shape[:-1], *shape)


def _from_columns(values: np.ndarray, alternating: bool) -> np.ndarray:
    """Values [... row column] that were filled row by row, though they are stored column by
    column: undo that, and turn every other column where they alternate."""
    rows, columns = values.shape[-2:]
    stored = values.copy()
    if alternating:
        stored[..., 1::2, :] = stored[..., 1::2, ::-1]  # back to the stored order
    stored = stored.reshape(*values.shape[:-2], columns, rows)
    if alternating:
        stored[..., 1::2, :] = stored[..., 1::2, ::-1]
    return stored.swapaxes(-1, -2)
