"""What maps and curves share: PNG files from Figure objects, without pyplot's global state."""

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from atmossl.evaluation.report.files import write_atomically

_TITLES = {
    "rmse": "RMSE",
    "mae": "mean absolute error",
    "bias": "bias",
    "crps": "fair CRPS",
    "acc": "anomaly correlation",
    "spread_skill": "spread-skill ratio",
}
_WITHOUT_UNITS = ("acc", "spread_skill")


def save_figure(figure: Figure, path: Path, *, overwrite: bool = False, dpi: int = 120) -> Path:
    """Write the figure as PNG.

    Raises:
        FileExistsError: the path exists and `overwrite` is False.
        ValueError: the name does not end in .png.
    """
    if path.suffix != ".png":
        raise ValueError(f"path {path} must end in .png")
    picture = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(picture, format="png", dpi=dpi)
    return write_atomically(picture.getvalue(), path, overwrite=overwrite)


def readable(name: str) -> str:
    """A variable's name for people."""
    return name.replace("_", " ")


def units_text(units: str) -> str:
    """ERA5's `m s**-1` set as a formula; empty units stay empty."""
    if "**" not in units:
        return units
    powers = (factor.partition("**") for factor in units.split())
    factors = [f"{base}^{{{power}}}" if power else base for base, _, power in powers]
    joined = r"\,".join(factors)
    return rf"$\mathrm{{{joined}}}$"


def score_label(score: str, units: str) -> str:
    """Axis label of a score, with units where it has any."""
    title = _TITLES.get(score, readable(score))
    unitless = score in _WITHOUT_UNITS or "ratio" in score or not units
    return title if unitless else f"{title} ({units_text(units)})"
