"""Keys of the configuration that have another name by now, in one release beside the old one.

The old names are replaced before anything is validated: in what the command line sets, in the
user's own files, and in the configuration that a checkpoint records.
"""

import logging
from collections.abc import Mapping
from typing import Any

from atmossl.overrides import Word
from atmossl.setting_types import target_name

_LOGGER = logging.getLogger(__name__)
_KEYS = {  # whole key: its last part now
    "model.neighbourhood": "kernel_size",
    "model.stencil": "embedding_stencil",
    "model.details": "gradient_features",
    "logger.wandb_project": "project",
}
_VALUES = {
    ("objective.weighting", "departure"): "residual",
    ("data.read.engine", "tensorstore"): "auto",
}
# durations that were numbers, in the unit of their name; now they have it with them
_UNITS = {
    **{f"{n}_hours": (f"{n}_time", "h") for n in ("lead", "rollout", "hidden", "shift", "lag")},
    "no_negatives_within_days": ("no_negatives_within", "d"),
    "retry_wait_s": ("retry_wait", "s"),
}
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
    return _with_present_keys(values, notes), notes


def with_present_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Like `renamed`, but says the lines."""
    present, notes = renamed(values)
    for line in notes:
        _LOGGER.warning("note: %s", line)
    return present


def renamed_override(override: str) -> str:
    """One word of the command line, `KEY=VALUE`, by the key's present name; says what changed."""
    word = Word.of(override)
    if word.value is None or word.is_option:
        return override
    nested: Any = word.value
    for part in reversed(word.key.split(".")):
        nested = {part: nested}
    present, parts = with_present_names(nested), list[str]()
    while isinstance(present, Mapping):
        ((part, present),) = present.items()
        parts.append(part)
    return f"{word.sign}{'.'.join(parts)}={present}"


def _with_present_keys(values: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """A copy of all mappings and lists with present names; a line in `notes` for every old one."""
    whole: dict[Any, Any] = {}
    pending: list[tuple[Any, Any, Any, tuple[str, ...]]] = [(whole, "", values, ())]
    for copy, place, node, path in pending:  # grows by the parts of every node
        if isinstance(node, list | tuple):
            copy[place] = parts = list(node)
            pending += [(parts, n, part, (*path, str(n))) for n, part in enumerate(node)]
            continue
        copy[place] = node
        if not isinstance(node, Mapping):
            continue
        copy[place] = parts = {}
        keeps_keys = _is_of_plugin(node)  # they are its own
        for key, value in node.items():
            name = str(key)
            if not keeps_keys:
                name, value = _present(path, name, value, notes)
            new_key = name if isinstance(key, str) else key
            parts[new_key] = value  # here for the order of the keys
            pending.append((parts, new_key, value, (*path, name)))
    return whole[""]


def _is_of_plugin(node: Mapping[str, Any]) -> bool:
    """Whether a part is an object of a class of another package, named with its module."""
    target = str(node.get("_target_", ""))
    return "." in target and not target.startswith("atmossl.")


def _present(path: tuple[str, ...], key: str, value: Any, notes: list[str]) -> tuple[str, Any]:
    """The present name and value of one key."""
    dotted = ".".join((*path, key))
    if key == "_target_":
        return key, target_name(value) if isinstance(value, str) else value
    holder = next((part for part in reversed(path) if not part.isdigit()), "")
    new_key, new_value = _KEYS.get(dotted, key), value
    if key in _UNITS:
        new_key, unit = _UNITS[key]
        new_value = _with_unit(value, unit)
    elif key == "name" and holder in _TASKS:
        new_key = "_target_"
    elif isinstance(value, str):
        new_value = _VALUES.get((dotted, value), value)
    if (new_key, new_value) != (key, value):
        was, now = ("", "") if new_value == value else (f"={value}", f"={new_value}")
        notes.append(_NOTE.format(old=dotted + was, new=".".join((*path, new_key)) + now))
    return new_key, new_value


def _with_unit(value: Any, unit: str) -> Any:
    """A number or a list of them as durations, also as the command line writes a list."""
    if isinstance(value, list | tuple):
        return [_with_unit(item, unit) for item in value]
    if isinstance(value, str) and value.startswith("["):
        items = (item.strip() for item in value[1:-1].split(",") if item.strip())
        return f"[{','.join(f'{item}{unit}' for item in items)}]"
    return value if value is None else f"{value}{unit}"
