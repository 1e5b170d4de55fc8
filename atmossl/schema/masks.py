"""Masks that a `_target_` node of the configuration can name."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from atmossl.masking.combined import Combined
from atmossl.masking.places import AllButStations, CrossVariable, Inpainting, LatLonBox
from atmossl.masking.random import BlockMasking, Mixture, RandomMasking, TimeBlockMasking
from atmossl.masking.tasks import Downscaling, Forecast, Hindcast, TemporalInterpolation

MASKS = {
    f"{kind.__module__}.{kind.__name__}": kind
    for kind in (
        RandomMasking,
        BlockMasking,
        TimeBlockMasking,
        Mixture,
        Forecast,
        Hindcast,
        TemporalInterpolation,
        Downscaling,
        Inpainting,
        LatLonBox,
        AllButStations,
        CrossVariable,
        Combined,
    )
}


def instantiate(node: Any, kinds: Mapping[str, type] = MASKS) -> Any:
    """Build the mask that a `_target_` node describes; lists and mappings are walked."""
    if isinstance(node, list | tuple):
        return [instantiate(item, kinds) for item in node]
    if not isinstance(node, Mapping) or "_target_" not in node:
        return node
    kind = kinds.get(node["_target_"])
    if kind is None:
        raise ValueError(f"_target_={node['_target_']!r}; valid: {sorted(kinds)}")
    names = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(node) - names - {"_target_"})
    if unknown:
        raise ValueError(f"unknown keys {unknown} of {kind.__name__}; valid: {sorted(names)}")
    values = {key: instantiate(value, kinds) for key, value in node.items() if key != "_target_"}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}") from error


Mask = Annotated[Any, BeforeValidator(instantiate)]
