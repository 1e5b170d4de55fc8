"""Windows mirrored at the equator, as more weather to train on.

The equations of motion do not change if north and south are exchanged, the northward wind and
vorticity change sign, and the date moves by half a year. Static fields such as orography are
mirrored, too, so that a mirrored window shows the same air over another planet: what a network
learns of this Earth's mountains and coasts is blurred by it. Only the distance of the sun, which
changes the radiation by up to 7 %, is not that of the new date.
"""

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from atmossl.batch import StreamSpec, StreamWindow
from atmossl.data.windows import Normaliser

_ANTISYMMETRIC = ("v_component_of_", "vorticity")  # parts of names
_LAT = -2  # axis of fields [variable level time lat lon]
_DAY_HOURS = 24.0
# Computed fields: the sine of latitude changes sign, and half a year later so do those of the year.
_ANTISYMMETRIC_FORCINGS = ("sin_latitude", "sin_year", "cos_year")


def mirror_sign(variable: str) -> float:
    """-1 for a variable that changes its sign when north and south are exchanged, else 1."""
    antisymmetric = any(part in variable for part in _ANTISYMMETRIC)
    return -1.0 if antisymmetric or variable in _ANTISYMMETRIC_FORCINGS else 1.0


def check_mirror(specs: Sequence[StreamSpec], normaliser: Normaliser) -> None:
    """Check that the windows of a run can be mirrored.

    Raises:
        ValueError: a variable is normalised by its place and month.
    """
    for spec in specs:
        if normals := sorted(normaliser.statistics[spec.data].normals):
            raise ValueError(
                f"data.mirror: {normals[0]} is normalised by place and month, and a mirrored "
                "window shows it at another place and month; set data.mirror=0"
            )


def mirrored(windows: Sequence[StreamWindow], normaliser: Normaliser) -> tuple[StreamWindow, ...]:
    """Normalised windows of all streams with north and south exchanged, half a year later.

    Rows stay in the order of their latitudes, ascending or descending. The date moves by whole
    days, so that solar time stays.
    """
    return tuple(_mirrored(window, normaliser) for window in windows)


def _mirrored(window: StreamWindow, normaliser: Normaliser) -> StreamWindow:
    half_year = round(window.year_hours / 2 / _DAY_HOURS) * _DAY_HOURS
    valid = window.valid
    return replace(
        window,
        fields=_with_signs(window.fields.flip(_LAT), window.spec, normaliser),
        valid=None if valid is None else valid.flip(_LAT),
        lat=-window.lat.flip(-1),
        weight=window.weight.flip(-1),
        time_hours=window.time_hours + half_year,
    )


def _with_signs(
    fields: Float[Tensor, "variable level time lat lon"],
    spec: StreamSpec,
    normaliser: Normaliser,
) -> Float[Tensor, "variable level time lat lon"]:
    """The fields with the sign of some variables changed: -x is -(z std + mean), which is
    normalised as -z - 2 mean / std. All transforms are odd, so they do not matter here."""
    rows = [row for row, name in enumerate(spec.variables) if mirror_sign(name) < 0]
    if not rows:
        return fields
    mean, std = (normaliser.values(spec, field)[rows] for field in ("mean", "std"))
    fields[rows] = -fields[rows] - 2 * mean / std  # `flip` has copied them
    return fields
