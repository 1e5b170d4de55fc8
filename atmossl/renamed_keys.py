"""Keys of the configuration that have another name by now, in one release beside the old one.

The old names are replaced before anything is validated: in what the command line sets, in the
user's own files, and in the configuration that a checkpoint records.
"""

import logging
from collections.abc import Mapping
from typing import Any

from atmossl.names import target_name

_LOGGER = logging.getLogger(__name__)
_KEYS = {  # whole key: its last part now
    "model.neighbourhood": "kernel_size",
    "model.stencil": "embedding_stencil",
    "model.details": "gradient_features",
    "logger.wandb_project": "project",
}
_VALUES = {("objective.weighting", "departure"): "residual"}
# durations were numbers inside masks, and texts with a unit in tasks
_HOURS = {f"{what}_hours": f"{what}_time" for what in ("lead", "rollout", "hidden", "shift")}
_NOTE = "{old} is now {new}; the next release has the new one alone"
_TASKS = ("task", "tasks", "parts")  # the keys that hold tasks


def renamed(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration by its present names, and a line for every old name that was in it."""
    notes: list[str] = []
    values = dict(values)
    if "catalog" in values:  # it is a key of `data`, which was the name of a catalog entry
        data, catalog = values.get("data", {}), values.pop("catalog")
        keys = data if isinstance(data, Mapping) else {"name": data}
        values["data"] = {**keys, "catalog": catalog}
        notes.append(_NOTE.format(old="catalog", new="data.catalog"))
    return _walk(values, (), notes), notes


def with_present_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Like `renamed`, but says the lines."""
    present, notes = renamed(values)
    for line in notes:
        _LOGGER.warning("note: %s", line)
    return present


def renamed_override(override: str) -> str:
    """One word of the command line, `KEY=VALUE`, by the key's present name; says what changed."""
    key, equals, value = override.partition("=")
    prefix = key[: len(key) - len(key.lstrip("+~"))]
    if not equals or key.startswith("-"):
        return override
    nested: Any = value
    for part in reversed(key[len(prefix) :].split(".")):
        nested = {part: nested}
    present, parts = with_present_names(nested), list[str]()
    while isinstance(present, Mapping):
        ((part, present),) = present.items()
        parts.append(part)
    return f"{prefix}{'.'.join(parts)}={present}"


def _walk(node: Any, path: tuple[str, ...], notes: list[str]) -> Any:
    if isinstance(node, list | tuple):
        return [_walk(item, (*path, str(number)), notes) for number, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    present = {}
    if _is_of_plugin(node):  # its keys are its own
        return {key: _walk(value, (*path, str(key)), notes) for key, value in node.items()}
    for key, value in node.items():
        new_key, new_value = _present(path, str(key), value)
        old, new = (".".join((*path, part)) for part in (str(key), new_key))
        if new_key != key or (new_value != value and key != "_target_"):
            shown = "" if new_value == value else f"={new_value}"
            was = "" if new_value == value else f"={value}"
            notes.append(_NOTE.format(old=old + was, new=new + shown))
        new_value = _walk(new_value, (*path, new_key), notes)
        present[new_key if isinstance(key, str) else key] = new_value
    return present


def _is_of_plugin(node: Mapping[str, Any]) -> bool:
    """Whether a part is an object of a class of another package, named with its module."""
    target = str(node.get("_target_", ""))
    return "." in target and not target.startswith("atmossl.")


def _present(path: tuple[str, ...], key: str, value: Any) -> tuple[str, Any]:
    """The present name and value of one key."""
    dotted = ".".join((*path, key))
    if key == "_target_":
        return key, target_name(value) if isinstance(value, str) else value
    if key in _HOURS:
        return _HOURS[key], value if value is None else f"{value}h"
    holder = next((part for part in reversed(path) if not part.isdigit()), "")
    if key == "name" and holder in _TASKS:
        return "_target_", value
    value = _VALUES.get((dotted, value), value) if isinstance(value, str) else value
    return _KEYS.get(dotted, key), value
