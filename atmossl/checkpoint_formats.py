"""Versions of a checkpoint's record, and how an older one becomes the present one.

A record says what a checkpoint is: streams, statistics, window, the network and the objective it
was trained by. Its `format` is a whole number. Whoever changes what a record means adds one to
`FORMAT`, a function to `_MIGRATIONS`, and a tiny file of the old format to `tests/checkpoints/`.
"""

from collections.abc import Callable
from typing import Any

from atmossl.batch import PRIMARY
from atmossl.renamed_keys import renamed

FORMAT = 4


def _with_kinds(record: dict[str, Any]) -> dict[str, Any]:
    """Format 1 knew one network and one objective, which it did not name."""
    objective = {
        "kind": "atmossl.objectives.masked.MaskedModelling",
        "provides": ["embed", "reconstruct"],
    }
    return {**record, "network": "multiformer", "objective": objective}


def _with_present_names(record: dict[str, Any]) -> dict[str, Any]:
    """Format 2 had other names for some keys of the configuration."""
    config, _ = renamed(record.get("config", {}))
    model, _ = renamed({key: record[key] for key in ("model",) if key in record})
    return {**record, **model, "config": config}


def _with_named_sources(record: dict[str, Any]) -> dict[str, Any]:
    """Format 3 named no primary source: its streams had no `data`, or '', and its statistics held
    those of the other sources."""
    named = dict(record)  # a record may lack keys, which whoever needs them says
    if "streams" in record:
        streams = record["streams"]
        named["streams"] = [{**spec, "data": spec.get("data") or PRIMARY} for spec in streams]
    if "seen" in record:
        named["seen"] = {data or PRIMARY: values for data, values in record["seen"].items()}
    if "statistics" in record:
        primary = {key: value for key, value in record["statistics"].items() if key != "others"}
        named["statistics"] = {PRIMARY: primary, **record["statistics"].get("others", {})}
    return named


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _with_kinds,
    2: _with_present_names,
    3: _with_named_sources,
}


def migrated(record: dict[str, Any]) -> dict[str, Any]:
    """The record in the present format.

    Raises:
        ValueError: a format of a later version than this.
    """
    version = record.get("format", 1)  # the first format did not say so
    if version not in (*_MIGRATIONS, FORMAT):
        raise ValueError(
            f"its format {version} is newer than this atmossl reads (up to {FORMAT}), or none; it "
            f"was written by atmossl {record.get('atmossl', 'of an unknown version')}"
        )
    for number in range(version, FORMAT):
        record = _MIGRATIONS[number](record)
    return {**record, "format": FORMAT}
