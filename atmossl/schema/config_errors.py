"""Turns pydantic's errors of a configuration into one line for each fault, in the words of the
user."""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from typing import Any

from atmossl.overrides import value_at
from atmossl.renamed_keys import line_of_old_name, present_name
from atmossl.value_faults import as_written, in_plain_words, of_unquoted

# What pydantic calls the types among which a value may choose; it adds them to the key.
_KIND = re.compile(
    r"(constrained-|literal\[|function-|nullable|is-instance|tuple\[|list\[|dict\[|lax-or-strict)"
    r"|^(str|int|float|bool|none|path|\[key\])$"
)
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")
_NO_LIST = {"tuple_type", "list_type", "sequence_str"}  # kinds of error of what is no list


class ConfigError(ValueError):
    """A configuration has faults; the message has one line for each."""


def lines_of(
    faults: Sequence[Any], within: tuple[str, ...] = (), values: Mapping[str, Any] | None = None
) -> list[str]:
    """A line for each of pydantic's errors. Lists that are too short because one of their items
    has an error of its own get no line. values: what was validated; its keys are suggested for
    misspelt ones."""
    places = [fault["loc"] for fault in faults]

    def follows(fault: Any) -> bool:
        loc = fault["loc"]
        inside = any(other[: len(loc)] == loc and len(other) > len(loc) for other in places)
        return fault["type"] == "too_short" and inside

    lengths: dict[tuple, int] = {}  # of the lists that lack items
    for loc in (fault["loc"] for fault in faults if _lacks_item(fault)):
        lengths[loc[:-1]] = max(lengths.get(loc[:-1], 0), loc[-1] + 1)
    messages: dict[str, list[str]] = {}  # a value of several types has an error for each of them
    hints: dict[str, str] = {}
    for fault in faults:
        if _lacks_item(fault):
            loc = fault["loc"][:-1]
            msg = f"valid: {lengths[loc]} values"
            fault = {**fault, "type": "too_few", "loc": loc, "msg": msg}
        if not follows(fault):
            start, message = _parts_of_line(fault, within, values)
            messages.setdefault(start, []).append(message)
            hints[start] = hints.get(start) or of_unquoted(fault, start.partition("=")[0])
    return [start + _alternatives(texts) + hints[start] for start, texts in messages.items()]


def with_single_items_listed(faults: Sequence[Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values that were validated, with a list of one in place of each single word or number
    whose only fault is that it is no list."""
    places: dict[tuple[str, ...], set[str]] = {}
    for fault in faults:
        single = isinstance(fault["input"], str | int | float) and fault["input"] != ""
        kind = fault["type"] if single and fault["input"] is not True else "other"
        places.setdefault(tuple(_keys_of(fault, ())), set()).add(kind)
    listed = deepcopy(values)
    for keys in (keys for keys, kinds in places.items() if kinds <= _NO_LIST):
        inner = value_at(listed, keys[:-1])
        if isinstance(inner, dict) and keys[-1] in inner:
            inner[keys[-1]] = [inner[keys[-1]]]
    return listed


def _alternatives(messages: Sequence[str]) -> str:
    """The valid values, joined over the types that a value may have: `valid: above 0, or
    'auto'`."""
    first, *rest = dict.fromkeys(messages)
    if all(message.startswith("valid: ") for message in (first, *rest)):
        return ", or ".join([first, *(message.removeprefix("valid: ") for message in rest)])
    return "; or: ".join((first, *rest))


def _lacks_item(fault: Any) -> bool:
    """Whether a list of fixed length lacks an item."""
    return fault["type"] == "missing" and isinstance(fault["loc"][-1], int)


def _keys_of(fault: Any, within: tuple[str, ...]) -> list[str]:
    return [str(part) for part in (*within, *fault["loc"]) if not _KIND.search(str(part))]


def _parts_of_line(
    fault: Any, within: tuple[str, ...], values: Mapping[str, Any] | None
) -> tuple[str, str]:
    """The line for one of pydantic's errors, in two parts: key and value, and what would be valid.

    within: the keys that lead to what was validated.
    """
    key = ".".join(_keys_of(fault, within))
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in ("unknown_key", "extra_forbidden", "unexpected_keyword_argument"):
        valid = fault.get("ctx", {}).get("valid")
        return unknown_key(key, _beside(fault, values) if valid is None else valid), ""
    if not key:
        return message.replace(" | ", "\n"), ""
    if message.startswith((f"{key}.", f"{key}=", f"{key}:")):  # it says itself where it is
        start, colon, message = message.partition(": ")
        return start + colon, message
    value = "" if isinstance(fault["input"], Mapping) else f"={as_written(fault['input'])}"
    if fault["type"] in _MISSING:
        return f"{key}: ", "is missing; give it a value"
    return f"{key}{value}: ", in_plain_words(fault)


def _beside(fault: Any, values: Any) -> list[str]:
    """The keys that stand beside an unknown one."""
    *path, unknown = _keys_of(fault, ())
    beside = value_at(values, path)
    names = beside if isinstance(beside, Mapping) else ()
    return [str(name) for name in names if str(name) != unknown]


def unknown_key(key: str, valid: Iterable[str]) -> str:
    """A sentence on a key that is unknown at its place, with the valid ones."""
    place, dot, name = key.rpartition(".")
    if present_name(key) != key:
        return line_of_old_name(key)
    close = get_close_matches(name, list(valid), n=2)
    if close:
        meant = " or ".join(f"{place}{dot}{similar}" for similar in close)
        return f"unknown key {key}; did you mean {meant}?"
    names = ", ".join(sorted(valid))
    return f"unknown key {key}" + (f"; valid: {names}" if names else "")
