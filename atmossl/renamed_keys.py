"""Keys of the configuration that had another name in an earlier version: configurations that runs
and checkpoints of that version have stored are read by their present names."""

from collections.abc import Mapping
from typing import Any

from atmossl.settings import target_name

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
_TASKS = ("task", "tasks", "parts")  # the keys that hold tasks


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration by its present names."""
    values = dict(values)
    if "catalog" in values:  # it is a key of `data`, which was the name of a catalog entry
        data, catalog = values.get("data", {}), values.pop("catalog")
        keys = data if isinstance(data, Mapping) else {"name": data}
        values["data"] = {**keys, "catalog": catalog}
    return _with_present_keys(values, ())


def _with_present_keys(node: Any, path: tuple[str, ...]) -> Any:
    """A copy of all mappings and lists with present names. path: the keys that lead to it."""
    if isinstance(node, list | tuple):
        return [_with_present_keys(part, (*path, str(n))) for n, part in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    target = str(node.get("_target_", ""))
    keeps_keys = "." in target and not target.startswith("atmossl.")  # they are a plugin's own
    parts = {}
    for key, value in node.items():
        name, value = (key, value) if keeps_keys else _present(path, str(key), value)
        parts[name if isinstance(key, str) else key] = _with_present_keys(value, (*path, str(name)))
    return parts


def _present(path: tuple[str, ...], key: str, value: Any) -> tuple[str, Any]:
    """The present name and value of one key."""
    dotted = ".".join((*path, key))
    if key == "_target_":
        return key, target_name(value) if isinstance(value, str) else value
    if key in _UNITS:
        name, unit = _UNITS[key]
        return name, _with_unit(value, unit)
    holder = next((part for part in reversed(path) if not part.isdigit()), "")
    if key == "name" and holder in _TASKS:
        return "_target_", value
    if isinstance(value, str):
        value = _VALUES.get((dotted, value), value)
    return _KEYS.get(dotted, key), value


def present_name(key: str) -> str:
    """The present name of a whole key such as `model.stencil`; the key itself if it was never
    renamed."""
    *path, last = key.split(".")
    if key == "catalog":
        return "data.catalog"
    return ".".join((*path, _present(tuple(path), last, None)[0]))


def line_of_old_name(key: str) -> str:
    """What to say of a key that was renamed."""
    return f"unknown key {key}: it is {present_name(key)} now"


def _with_unit(value: Any, unit: str) -> Any:
    """A number or a list of them as durations."""
    if isinstance(value, list | tuple):
        return [_with_unit(item, unit) for item in value]
    return value if value is None else f"{value}{unit}"
