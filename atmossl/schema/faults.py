"""What is wrong with a configuration, one line for each fault."""

from collections.abc import Mapping
from typing import Any

from atmossl.schema.tasks import TASK_NAMES


def line_of(fault: Any, within: tuple[str, ...] = ()) -> str:
    """Key, value and what would be valid, of one of pydantic's errors.

    within: the keys that lead to what was validated. The names of tasks, which pydantic puts
    between keys, are left out.
    """
    key = ".".join(str(part) for part in (*within, *fault["loc"]) if part not in TASK_NAMES)
    message = fault["msg"].removeprefix("Value error, ")
    if not key:
        return message.replace(" | ", "\n")
    value = "" if isinstance(fault["input"], Mapping) else f"={fault['input']!r}"
    match fault["type"]:
        case "extra_forbidden":
            message = "unknown key"
        case "union_tag_not_found":
            message = f"needs a name; valid: {list(TASK_NAMES)}"
        case "union_tag_invalid":
            key, value = f"{key}.name", f"={fault['input']['name']!r}"
            message = f"valid: {list(TASK_NAMES)}"
        case "model_attributes_type":
            message = "valid: a mapping of keys and values"
    return f"{key}{value}: {message}"
