"""What the package knows of variables: ERA5 names, CF standard names and units."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    units: str
    standard_name: str
    long_name: str
    unit_aliases: tuple[str, ...] = ()
    physical_range: tuple[float, float] = (float("-inf"), float("inf"))


VARIABLES: dict[str, Variable] = {
    "temperature": Variable(
        "K", "air_temperature", "Temperature", ("kelvin", "Kelvin"), (130.0, 350.0)
    ),
    "u_component_of_wind": Variable(
        "m s-1", "eastward_wind", "U component of wind", ("m s**-1", "m/s"), (-200.0, 200.0)
    ),
    "v_component_of_wind": Variable(
        "m s-1", "northward_wind", "V component of wind", ("m s**-1", "m/s"), (-200.0, 200.0)
    ),
    "geopotential": Variable(
        "m2 s-2", "geopotential", "Geopotential", ("m**2 s**-2", "m2/s2"), (-1e4, 6e5)
    ),
    "specific_humidity": Variable(
        "kg kg-1",
        "specific_humidity",
        "Specific humidity",
        ("kg kg**-1", "kg/kg", "1"),
        (-1e-2, 0.1),
    ),
    "vertical_velocity": Variable(
        "Pa s-1", "lagrangian_tendency_of_air_pressure", "Vertical velocity", ("Pa s**-1", "Pa/s")
    ),
    "vorticity": Variable(
        "s-1", "atmosphere_relative_vorticity", "Relative vorticity", ("s**-1", "1/s")
    ),
    "divergence": Variable("s-1", "divergence_of_wind", "Divergence", ("s**-1", "1/s")),
    "2m_temperature": Variable("K", "air_temperature", "2 metre temperature", ("kelvin",)),
    "mean_sea_level_pressure": Variable(
        "Pa", "air_pressure_at_mean_sea_level", "Mean sea level pressure", ("pascal",)
    ),
    "10m_u_component_of_wind": Variable(
        "m s-1", "eastward_wind", "10 metre U wind component", ("m s**-1", "m/s")
    ),
    "10m_v_component_of_wind": Variable(
        "m s-1", "northward_wind", "10 metre V wind component", ("m s**-1", "m/s")
    ),
}


def check_units(variable: str, units: str | None, location: str) -> None:
    """Raise ValueError if a store states units other than those of the variable.

    A store that states none is taken at its word: the name says what it holds.
    """
    known = VARIABLES.get(variable)
    if known is None or units is None:
        return
    if units != known.units and units not in known.unit_aliases:
        raise ValueError(
            f"{location}: variable {variable} has units {units!r}; valid: "
            f"{[known.units, *known.unit_aliases]}. Convert the store first"
        )
