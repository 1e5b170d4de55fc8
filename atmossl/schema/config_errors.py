"""What is wrong with a configuration, one line for each fault."""

from collections.abc import Mapping, Sequence
from typing import Any


def lines_of(faults: Sequence[Any], within: tuple[str, ...] = ()) -> list[str]:
    """A line for each of pydantic's errors, but for lists that are too short since an item of
    theirs has an error of its own."""
    places = [fault["loc"] for fault in faults]

    def follows(fault: Any) -> bool:
        loc = fault["loc"]
        inside = any(other[: len(loc)] == loc and len(other) > len(loc) for other in places)
        return fault["type"] == "too_short" and inside

    lengths: dict[tuple, int] = {}  # of the lists that lack items
    for loc in (fault["loc"] for fault in faults if _lacks_item(fault)):
        lengths[loc[:-1]] = max(lengths.get(loc[:-1], 0), loc[-1] + 1)
    messages: dict[str, list[str]] = {}  # a value of several types has an error for each of them
    for fault in faults:
        if _lacks_item(fault):
            loc = fault["loc"][:-1]
            fault = {**fault, "loc": loc, "msg": f"valid: {lengths[loc]} values"}
        if not follows(fault):
            value, colon, message = line_of(fault, within).partition(": ")
            messages.setdefault(value + colon, []).append(message)
    return [value + "; or: ".join(dict.fromkeys(found)) for value, found in messages.items()]


def _lacks_item(fault: Any) -> bool:
    """Whether a list of fixed length lacks an item."""
    return fault["type"] == "missing" and isinstance(fault["loc"][-1], int)


def _is_kind(part: Any) -> bool:
    """Whether a part of a key is what pydantic calls one of the types that a value may have."""
    return isinstance(part, str) and part.startswith(("constrained-", "literal[", "function-"))


def line_of(fault: Any, within: tuple[str, ...] = ()) -> str:
    """Key, value and what would be valid, of one of pydantic's errors.

    within: the keys that lead to what was validated.
    """
    key = ".".join(str(part) for part in (*within, *fault["loc"]) if not _is_kind(part))
    message = fault["msg"].removeprefix("Value error, ")
    if not key:
        return message.replace(" | ", "\n")
    if message.startswith((f"{key}.", f"{key}=", f"{key}:")):  # it says itself where it is
        return message
    value = "" if isinstance(fault["input"], Mapping) else f"={fault['input']!r}"
    match fault["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            message = "unknown key"
        case "model_attributes_type" | "dataclass_type":
            message = "valid: a mapping of keys and values"
    return f"{key}{value}: {message}"
