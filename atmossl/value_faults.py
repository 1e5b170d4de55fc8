"""What is wrong with a value of a configuration, in plain words: what would be valid instead of
pydantic's text for programmers, and values as people write them.

All that is read from users and checked by pydantic is told by these words: configurations
(`atmossl.schema.config_errors`), catalogs and the records of checkpoints.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

_MAPPING = "keys and values, such as {{KEY: VALUE}}"
_LIST = "a list, such as [a,b]"
_PATH = "a path"
_NUMBER = "a number"
_WHOLE = "a whole number"
_DATE = "a date, such as 2001-01-31"
_DATETIME = "a date and time, such as 2001-01-31T06:00"
_TIME = "a time of day, such as 06:00"
_DURATION = "a duration, such as PT6H"
_URL = "a URL, such as https://host/path"
# What is valid, by pydantic's kind of error, with the limits that the error knows. Kinds that no
# value has, such as `frozen_instance`, are not here.
_VALID = {
    "none_required": "null",
    "invalid_key": "keys that are texts",
    **dict.fromkeys(
        ("model_type", "model_attributes_type", "dataclass_type", "dict_type", "mapping_type",
         "frozen_dict_type", "ordered_dict_type", "counter_type", "arguments_type"), _MAPPING
    ),
    **dict.fromkeys(
        ("list_type", "tuple_type", "named_tuple_type", "set_type", "frozen_set_type", "deque_type",
         "iterable_type", "iteration_error", "sequence_str"), _LIST
    ),
    "set_item_not_hashable": "texts and numbers in the list",
    "too_short": "at least {min_length} values",
    "too_long": "at most {max_length} values",
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or above",
    "less_than": "below {lt}",
    "less_than_equal": "{le} or below",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), _WHOLE),
    **dict.fromkeys(
        ("float_type", "float_parsing", "decimal_type", "decimal_parsing", "fraction_type",
         "fraction_parsing", "complex_type", "complex_str_parsing"), _NUMBER
    ),
    "decimal_max_digits": "a number of at most {max_digits} digits",
    "decimal_max_places": "a number of at most {decimal_places} digits after the point",
    "decimal_whole_digits": "a number of at most {whole_digits} digits before the point",
    **dict.fromkeys(("string_type", "string_unicode", "bytes_type"), "a text"),
    **dict.fromkeys(
        ("string_too_short", "bytes_too_short"), "a text of {min_length} letters or more"
    ),
    **dict.fromkeys(
        ("string_too_long", "bytes_too_long"), "a text of at most {max_length} letters"
    ),
    "string_pattern_mismatch": "a text that matches {pattern}",
    "string_not_ascii": "a text of ASCII letters",
    "bytes_invalid_encoding": "a text in {encoding}",
    **dict.fromkeys(("literal_error", "enum"), "{expected}"),
    **dict.fromkeys(
        ("is_instance_of", "dataclass_exact_type"), "an object of the class {class_name}"
    ),
    "is_subclass_of": "a subclass of {class_name}",
    "callable_type": "a function",
    "path_type": _PATH,
    "path_not_file": "the path of a file that is there",
    "path_not_directory": "the path of a folder that is there",
    "path_exists": "a path where nothing is yet",
    "parent_does_not_exist": "a path in a folder that is there",
    **dict.fromkeys(("date_type", "date_parsing", "date_from_datetime_parsing",
                     "date_from_datetime_inexact"), _DATE),
    **dict.fromkeys(("date_past", "datetime_past"), "a date in the past"),
    **dict.fromkeys(("date_future", "datetime_future"), "a date in the future"),
    **dict.fromkeys(("time_type", "time_parsing"), _TIME),
    **dict.fromkeys(("datetime_type", "datetime_parsing", "datetime_object_invalid",
                     "datetime_from_date_parsing"), _DATETIME),
    "timezone_naive": "a time without time zone",
    "timezone_aware": "a time with time zone, such as 2001-01-31T06:00Z",
    "timezone_offset": "a time {tz_expected} s ahead of UTC",
    **dict.fromkeys(("time_delta_type", "time_delta_parsing"), _DURATION),
    **dict.fromkeys(("url_type", "url_parsing", "url_syntax_violation"), _URL),
    "url_too_long": "a URL of at most {max_length} letters",
    "url_scheme": "a URL that begins with {expected_schemes}",
    **dict.fromkeys(("uuid_type", "uuid_parsing"), "a UUID"),
    "uuid_version": "a UUID of version {expected_version}",
    "union_tag_not_found": "keys and values with the key {discriminator}",
    "union_tag_invalid": "{discriminator} one of {expected_tags}",
}  # fmt: skip
_OF_CLASS = {"Sequence": _LIST, "Mapping": _MAPPING}  # what stands for an object of a class
_ONE = {"too_short": "at least one value", "string_too_short": "a text that is not empty"}
_QUOTED = re.compile(r"'([^']*)'")
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_CHOICE = re.compile(r"\b(True|False|None)\b")
# How messages name the keys of a task, and the task itself.
_OF_TASK = re.compile(r"(?<![\w.])task(?:=\w+|(?=\.\w)|(?= hides ))")
# A text that YAML or a shell would take for something else, or for several words.
_NEEDS_QUOTES = re.compile(
    r"""|.*[\s,\[\]{}'"].*|null|true|false|~|[-+]?[\d.]+(e[-+]?\d+)?""", re.DOTALL | re.IGNORECASE
)


def in_plain_words(fault: Any) -> str:
    """What would be valid in place of a value with this error of pydantic; the message of the
    error, where it is a sentence of this package or of a plugin."""
    kind, limits = fault["type"], dict(fault.get("ctx", {}))
    limits["class_name"] = limits.get("class_name", limits.get("class"))
    words = _VALID.get(kind)
    if kind == "is_instance_of":
        words = _OF_CLASS.get(str(limits["class_name"]), words)
    if limits.get("min_length") == 1:
        words = _ONE.get(kind, words)
    if words is None:
        return fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    limits = {
        name: f"{limit:g}" if isinstance(limit, float) else _QUOTED.sub(r"\1", str(limit))
        for name, limit in limits.items()
    }
    if "expected" in limits:  # the choices, as Python writes them
        limits["expected"] = _CHOICE.sub(lambda found: _PYTHON[found[0]], limits["expected"])
    return f"valid: {words.format(**limits)}"


def of_unquoted(fault: Any, key: str = "") -> str:
    """What to add for a value that YAML reads as a number, true, false or null where a text or
    path is needed: how to write that text; empty for any other fault.

    key: with which the command line writes it; empty in a file, where one pair of quotes is enough.
    """
    value, is_text = fault["input"], fault["type"] in ("string_type", "path_type")
    if not is_text or not isinstance(value, bool | int | float | None):
        return ""
    shown = as_written(value)
    text, (place, _, last) = f'"{shown}"', key.rpartition(".")
    if key:  # whose last part may be the number of an item of a list
        text = f"'{place}=[{text}]'" if last.isdigit() else f"'{key}={text}'"
    kind = "a number" if value is not None and not isinstance(value, bool) else "no text"
    return f"; {shown} without quotes is {kind}: write {text} if it is a name"


@contextmanager
def told_as(key: str, advice: str = "") -> Iterator[None]:
    """What is wrong with a task, as its messages tell it of `task.KEY`, is told of `key.KEY`: the
    key that the user wrote, where the task is one of several. advice: the end of such a message."""
    try:
        yield
    except ValueError as error:
        message, count = _OF_TASK.subn(key, str(error))
        if not count or type(error) is not ValueError:
            raise
        raise ValueError(message + advice) from error


def told_in_list(name: str, names: Iterable[str]) -> AbstractContextManager[None]:
    """`told_as` for one of the tasks in `tasks=[...]`, with the list that leaves it out."""
    rest = [other for other in names if other != name]
    advice = f"; tasks={as_written(rest)} leaves {name} out" if rest else ""
    return told_as(f"tasks.{name}", advice)


def listed(values: Iterable[Any]) -> str:
    """Values side by side as a message names them, such as after `valid:`."""
    return ", ".join(map(as_written, values))


def as_written(value: Any) -> str:
    """A value as the command line and files of the configuration take it: `null`, `[a,b]`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        pairs = (f"{as_written(key)}: {as_written(inner)}" for key, inner in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_written, value))}]"
    if isinstance(value, str) and _NEEDS_QUOTES.fullmatch(value):
        return repr(value)
    return value if isinstance(value, str) else " ".join(str(value).split())
