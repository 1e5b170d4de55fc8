"""Dates that files hold as integers, such as 20200101, as dates."""

import re

import numpy as np
import xarray as xr

_DIGITS = {6: "month", 8: "day", 10: "hour"}
_CDO = re.compile(r"day as %Y%m%d\.%f", re.I)


def with_dates(dataset: xr.Dataset, location: str) -> xr.Dataset:
    """A dataset whose `time` is in dates if it was in integers YYYYMM, YYYYMMDD or YYYYMMDDHH, or
    in days as %Y%m%d.%f, as cdo writes them; anything else is left as it is.

    Raises:
        ValueError: integers of that length that are no dates.
    """
    if "time" not in dataset.coords or dataset["time"].dtype.kind not in "iuf":
        return dataset
    time = dataset["time"]
    values = time.values
    fractions = np.zeros(len(values))
    if _CDO.fullmatch(str(time.attrs.get("units", "")).strip()):
        fractions, values = np.modf(np.asarray(values, np.float64))
    elif values.dtype.kind == "f" or "since" in str(time.attrs.get("units", "")):
        return dataset
    lengths = {len(str(int(value))) for value in values}
    if len(lengths) != 1 or not lengths <= _DIGITS.keys():
        return dataset
    try:
        dates = np.array([_date(str(int(value))) for value in values], "datetime64[us]")
    except ValueError as error:
        raise ValueError(f"{location}: time: {error}") from error
    seconds = np.round(fractions * 86_400).astype(np.int64)
    dates = dates + seconds * np.timedelta64(1_000_000, "us")
    attributes = {key: value for key, value in time.attrs.items() if key != "units"}
    return dataset.assign_coords(time=("time", dates, attributes))


def _date(digits: str) -> np.datetime64:
    """The date of YYYYMM, YYYYMMDD or YYYYMMDDHH."""
    year, month, day, hour = digits[:4], digits[4:6], digits[6:8] or "01", digits[8:] or "00"
    try:
        return np.datetime64(f"{year}-{month}-{day}T{hour}", "us")
    except ValueError as error:
        raise ValueError(f"{digits} is no date; valid: such as 20200131") from error
