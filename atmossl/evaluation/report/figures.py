"""What maps and curves share: pictures of Figure objects, without pyplot's global state."""

import io
import re
from typing import Literal

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

_TITLES = {
    "rmse": "RMSE",
    "mae": "mean absolute error",
    "bias": "bias",
    "crps": "CRPS",
    "acc": "anomaly correlation",
    "spread_skill": "spread-skill ratio",
    "outlier_ratio": "outliers over expected",
    "seeps": "SEEPS",
}
_QUALITY = 80  # of WebP
_SVG_DPI = 72  # matplotlib writes SVG in points
_WITHOUT_UNITS = ("acc", "spread_skill", "outlier_ratio", "seeps")


def svg_bytes(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes for the same figure."""
    picture = io.BytesIO()
    layout = figure.get_layout_engine()
    if layout is not None:  # writing would lay it out twice, and draw it once more for that
        figure.set_dpi(_SVG_DPI)
        FigureCanvasAgg(figure)
        layout.execute(figure)
        figure.set_layout_engine(None)
    FigureCanvasSVG(figure)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "atmossl"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def pixels_of(figure: Figure, dpi: int) -> UInt8[np.ndarray, "row column colour"]:
    """The figure as red, green and blue, drawn once."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def encoded(pixels: UInt8[np.ndarray, "row column colour"], kind: Literal["png", "webp"]) -> bytes:
    """Pixels as a PNG file, or as a WebP file, which has a fifth of the size for fields of many
    colours."""
    picture = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(picture, kind, quality=_QUALITY)
    return picture.getvalue()


def png_bytes(figure: Figure, dpi: int) -> bytes:
    """A figure as a PNG file in memory."""
    picture = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()


def readable(name: str) -> str:
    """A variable's name for people."""
    return name.replace("_", " ")


def plain(text: str) -> str:
    """Text in which matplotlib takes nothing for a formula."""
    return text.replace("$", r"\$")


def units_text(units: str) -> str:
    """ERA5's `m s**-1` or CF's `m s-1` set as a formula; units without powers stay as they are."""
    powers = [re.fullmatch(r"([A-Za-z]+)(?:\*\*)?(-?\d+)?", part) for part in units.split()]
    if not any(power and power[2] for power in powers) or not all(powers):
        return units
    factors = [f"{p[1]}^{{{p[2]}}}" if p[2] else p[1] for p in powers if p]
    joined = r"\,".join(factors)
    return rf"$\mathrm{{{joined}}}$"


def score_label(score: str, units: str) -> str:
    """Axis label of a score, with units where it has any."""
    title = _TITLES.get(score, readable(score))
    unitless = score in _WITHOUT_UNITS or "ratio" in score or "brier" in score or not units
    return title if unitless else f"{title} ({units_text(units)})"
