"""Coastlines of the maps, from Natural Earth's land at 1:110 million (public domain).

python scripts/make_coastlines.py land-110m.json    # npm's package world-atlas has this file
"""

import argparse
import json
from pathlib import Path

import numpy as np

_OUTPUT = Path(__file__).resolve().parents[1] / "atmossl" / "assets" / "coastlines.npz"


def arcs(topology: dict) -> list[np.ndarray]:
    """Every arc as [point, (longitude, latitude)] in degrees; TopoJSON 1.0, section 2.1.3."""
    scale, shift = (np.array(topology["transform"][key]) for key in ("scale", "translate"))
    return [np.cumsum(arc, axis=0) * scale + shift for arc in topology["arcs"]]


def without_frame(line: np.ndarray) -> list[np.ndarray]:
    """The parts of a line that are coast, not the cut at the date line or the south pole."""
    on_frame = (np.abs(line[:, 0]) > 179.9) | (line[:, 1] < -89.5)
    artificial = on_frame[:-1] & on_frame[1:] | (np.abs(np.diff(line[:, 0])) > 180.0)
    parts = np.split(line, np.flatnonzero(artificial) + 1)
    return [part for part in parts if len(part) > 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topojson", type=Path)
    lines = arcs(json.loads(parser.parse_args().topojson.read_text()))
    coast = [part for line in lines for part in without_frame(line)]
    degrees = np.round(np.concatenate(coast) * 100).astype(np.int16)
    np.savez_compressed(_OUTPUT, centidegrees=degrees, lengths=[len(part) for part in coast])
    print(f"{_OUTPUT}: {len(coast)} lines, {len(degrees)} points")


if __name__ == "__main__":
    main()
