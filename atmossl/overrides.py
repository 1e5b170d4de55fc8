"""The words of the command line as Hydra takes them: paths may hold any character.

Hydra gives `=`, commas, brackets, spaces and more a meaning of their own, so that a path such as
`runs/lr=0.1/last.ckpt` has to stand in quotes inside those of the shell. Here the quotes are added:
always around the value of a key that holds one path, and around any other value that Hydra could
not read. What Hydra can read keeps its meaning: lists, mappings, sweeps, quotes.
"""

from collections.abc import Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

# keys whose value is one path
PATHS = frozenset(
    {
        "checkpoint",
        "climatology",
        "data.catalog",
        "input",
        "output",
        "paths.output",
        "resume",
        "task.mask_file",
        "task.stations",
    }
)
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_NO_TEXT = ("", "null", "true", "false")


def for_hydra(override: str, *, sweep: bool = False) -> str:
    """One word of the command line, with quotes where Hydra needs them. sweep: of a multirun, where
    commas stand between values."""
    key, equals, value = override.partition("=")
    if not equals or key.startswith(("-", "~")):
        return override
    values = list(split(value)) if sweep else [value]
    is_path = key.lstrip("+") in PATHS
    if (sweep or not is_path) and _is_readable(override):
        return override
    quoted = f"{key}=" + ",".join(map(_quoted if is_path else _element, values))
    return quoted if _is_readable(quoted) else override


def split(text: str) -> Iterator[str]:
    """The parts of a text between its commas, but for those in quotes or brackets."""
    part, closing, quote = "", [], ""
    for character in text:
        if character == "," and not closing and not quote:
            yield part
            part = ""
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _CLOSING:
            closing.append(_CLOSING[character])
        elif closing and character == closing[-1]:
            closing.pop()
        part += character
    yield part


def unquoted(text: str) -> str:
    """A value without the quotes that Hydra takes off."""
    text = text.strip()
    return str(_PARSER.parse_override(f"key={text}").value()) if _is_quoted(text) else text


_PARSER = OverridesParser.create()


def _is_readable(override: str) -> bool:
    try:
        _PARSER.parse_override(override)
    except HydraException:
        return False
    return True


def _is_quoted(value: str) -> bool:
    return value[:1] in ("'", '"') and value[-1:] == value[:1] and _is_readable(f"key={value}")


def _quoted(value: str) -> str:
    if value in _NO_TEXT or _is_quoted(value):
        return value
    return QuotedString(value, Quote.single).with_quotes()


def _element(value: str) -> str:
    """A value, or a list, of which what cannot be read stands in quotes."""
    value = value.strip()
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(map(_element, split(value[1:-1])))}]"
    readable = value.startswith("{") or _is_readable(f"key={value}")
    return value if readable else _quoted(value)
