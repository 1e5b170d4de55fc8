"""Names of variables, segments and streams as names of files, and names that several rooms share.

A catalog may call a variable anything. Whatever becomes a part of a path goes through `file_name`,
so that no name leaves its folder, hides a file or overwrites that of another name.
"""

import hashlib
import re

# An attribute of the coordinate `member` of a prediction: tail, whose members are fixed values of a
# distribution, or noise, whose members are draws. Forecasts of others are taken as draws.
ENSEMBLE = "ensemble"
_UNSAFE = re.compile(r"[^\w .()+,=@-]|^[. ]|[. ]$")
# The variable of every field of AtmoRep's stores and published models.
VARIABLE_OF_FIELD = {
    "temperature": "temperature",
    "velocity_u": "u_component_of_wind",
    "velocity_v": "v_component_of_wind",
    "velocity_z": "vertical_velocity",
    "specific_humidity": "specific_humidity",
    "vorticity": "vorticity",
    "divergence": "divergence",
    "geopotential": "geopotential",
    "t2m": "2m_temperature",
    "u10m": "10m_u_component_of_wind",
    "v10m": "10m_v_component_of_wind",
    "msl": "mean_sea_level_pressure",
    "total_precip": "total_precipitation",
}
_MAX_BYTES = 150  # of 255 that file systems take, for what callers add


def file_name(name: str) -> str:
    """A name in a form that is safe as a part of a path. Unsafe characters become %XX of their
    bytes, as in URLs, so that two names never become one. Long names end in their hash."""
    safe = _UNSAFE.sub(_quoted, name) or "%"
    if len(safe.encode()) <= _MAX_BYTES:
        return safe
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{safe.encode()[: _MAX_BYTES - 17].decode(errors='ignore')}-{digest}"


def _quoted(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match.group().encode(errors="surrogatepass"))
