"""The words of the command line: what each of them says (`Word`), and the form in which Hydra takes
them, in which paths may hold any character.

Hydra gives `=`, commas, brackets, spaces and more a meaning of their own, so that a path such as
`runs/lr=0.1/last.ckpt` has to stand in quotes inside those of the shell. Here the quotes are added:
always around the value of a key that holds one path, and around any other value that Hydra could
not read. What Hydra can read keeps its meaning: lists, mappings, sweeps, quotes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

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
_FOLDER, _SEARCHPATH, _FILE = "--config-dir=", "hydra.searchpath=", "file://"
SEARCH_WORDS = (_FOLDER, _SEARCHPATH)  # words that say where else files of choices lie
# choices of files of conf/ that say what streams there are
_CHOOSES_STREAMS = ("stream=", "experiment=")
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_NO_TEXT = ("", "null", "true", "false")


@dataclass(frozen=True)
class Word:
    """One word of the command line: `KEY=VALUE`, an option, or a name that stands alone.

    sign: `+`, `++` or `~` before the key, by which Hydra adds or removes it; else empty. key: what
    stands before the first `=`, without the sign. value: what stands after it, as it was written;
    None if there is no `=`.
    """

    sign: str
    key: str
    value: str | None

    @classmethod
    def of(cls, text: str) -> Self:
        """The parts of a word."""
        place, equals, value = text.partition("=")
        key = place.lstrip("+~")
        return cls(place[: len(place) - len(key)], key, value if equals else None)

    @property
    def is_option(self) -> bool:
        """Whether it begins with a dash, as `--config-dir=FOLDER` does."""
        return self.key.startswith("-")


def sets(text: str, *keys: str) -> bool:
    """Whether a word is `KEY=VALUE` with one of the keys."""
    word = Word.of(text)
    return not word.sign and word.value is not None and word.key in keys


def keywords(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """The values of a command that takes just these keys, each once, in the order of the names.

    Raises:
        ValueError: another key, none, or a word that is not KEY=VALUE.
    """
    values = {word.key: word.value for word in map(Word.of, words)}
    needed = f"needed: {' '.join(f'{name}=VALUE' for name in names)}"
    for text in (text for text in words if not sets(text, *names)):
        what = text if Word.of(text).value is None else f"unknown key {Word.of(text).key}"
        raise ValueError(f"{what}; {needed}")
    for name in (name for name in names if name not in values):
        raise ValueError(f"{name}: is missing; {needed}")
    if len(values) < len(words):
        raise ValueError(f"got {' '.join(words)}, a key twice; {needed}")
    return [unquoted(str(values[name])) for name in names]


def as_values_of(key: str, words: Sequence[str]) -> list[str]:
    """The words, with names that stand alone as values of a key."""
    return [text if Word.of(text).value is not None else f"{key}={text}" for text in words]


def for_hydra(override: str, *, sweep: bool = False) -> str:
    """One word of the command line, with quotes where Hydra needs them. sweep: of a multirun, where
    commas stand between values."""
    word = Word.of(override)
    if word.value is None or word.is_option or word.sign == "~":
        return override
    values = list(split(word.value)) if sweep else [word.value]
    is_path = word.key in PATHS
    if (sweep or not is_path) and is_readable(override):
        return override
    form = _quoted if is_path else _element
    quoted = f"{word.sign}{word.key}={','.join(map(form, values))}"
    return quoted if is_readable(quoted) else override


def joined(arguments: Sequence[str]) -> list[str]:
    """The words of the command line, with `--config-dir FOLDER` and `KEY = VALUE` as one word."""
    words: list[str] = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        if words and words[-1] in ("--config-dir", "-cd"):
            words[-1] = f"{_FOLDER}{word}"
        elif words and "=" in (before, word):
            words[-1] += word
        else:
            words.append(word)
    return words


def as_searchpath(overrides: Sequence[str], shipped: Path) -> list[str]:
    """The overrides with every `--config-dir=FOLDER` as a part of Hydra's `hydra.searchpath`.

    shipped: the folder of the package's own files, which Hydra looks in first.

    Raises:
        ValueError: no such folder, or a file in it that Hydra would not find, since the package has
            another one of that name.
    """
    rest = [word for word in overrides if not word.startswith(SEARCH_WORDS)]
    places: list[str] = []
    for word in overrides:
        if word.startswith(_SEARCHPATH):
            places += filter(None, map(unquoted, split(word.removeprefix(_SEARCHPATH).strip("[]"))))
        elif word.startswith(_FOLDER):
            folder = Path(word.removeprefix(_FOLDER)).absolute()
            places.append(f"{_FILE}{folder}")
    for place in places:
        if place.startswith(_FILE):
            _check_folder(Path(place.removeprefix(_FILE)), shipped)
    return [*rest, f"{_SEARCHPATH}[{','.join(map(_quoted, places))}]"] if places else rest


def _check_folder(folder: Path, shipped: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"--config-dir={folder} is no folder; valid: a folder like {shipped}")
    for file in sorted(folder.rglob("*.yaml")):
        name = file.relative_to(folder)
        shipped_file = shipped / name
        if shipped_file.exists() and shipped_file.read_bytes() != file.read_bytes():
            raise ValueError(
                f"--config-dir={folder}: {name} has the name of a file of the package, which would "
                "be taken instead; give it another name"
            )


def split(text: str) -> Iterator[str]:
    """The parts of a text between its commas; commas in quotes or brackets do not separate."""
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


def key_and_value(override: str) -> tuple[str, Any]:
    """Key and value of one word, as Hydra reads it."""
    parsed = _PARSER.parse_override(for_hydra(override))
    return parsed.key_or_group, parsed.value()


def first_of_sweep(override: str) -> str | None:
    """The word with the first of the values of a sweep; None where the values are neither a list
    nor a range."""
    parsed = _PARSER.parse_override(for_hydra(override, sweep=True))
    if not parsed.is_sweep_override():
        return override
    if not (parsed.is_choice_sweep() or parsed.is_range_sweep()):
        return None
    word = Word.of(override)
    return f"{word.sign}{word.key}={next(iter(parsed.sweep_string_iterator()))}"


def is_readable(override: str) -> bool:
    """Whether a word follows Hydra's grammar."""
    try:
        _PARSER.parse_override(override)
    except HydraException:
        return False
    return True


def _is_quoted(value: str) -> bool:
    return value[:1] in ("'", '"') and value[-1:] == value[:1] and is_readable(f"key={value}")


def _quoted(value: str) -> str:
    if value in _NO_TEXT or _is_quoted(value):
        return value
    return QuotedString(value, Quote.single).with_quotes()


def _element(value: str) -> str:
    """A value, or a list in which unreadable values are quoted."""
    value = value.strip()
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(map(_element, split(value[1:-1])))}]"
    readable = value.startswith("{") or is_readable(f"key={value}")
    return value if readable else _quoted(value)


def fitting_store(
    overrides: Sequence[str],
    window: Mapping[Any, int],
    streams: Mapping[str, Mapping[str, Any]],
    durations: Mapping[str, str | None],
) -> list[str]:
    """The overrides of a training run, preceded by those that fit its store: the window, the
    streams, and the durations of masks and tasks. A choice of `stream` or of an experiment replaces
    all of them, a choice of `masking` or `tasks` its durations."""
    if any(word.startswith(_CHOOSES_STREAMS) for word in overrides):
        return list(overrides)
    words = [f"data.window.{axis}={points}" for axis, points in window.items()]
    words += ["~stream", *(f"++stream.{name}={_literal(keys)}" for name, keys in streams.items())]
    for key, duration in durations.items():
        is_chosen = any(word.startswith(f"{key.partition('.')[0]}=") for word in overrides)
        words += [f"{key}={duration}"] if duration and not is_chosen else []
    return [*words, *overrides]


def value_of(key: str, overrides: Sequence[str]) -> str | None:
    """The value that the last override of a key gives; None if there is none, or several values
    for a sweep."""
    values = [str(Word.of(text).value) for text in overrides if sets(text, key)]
    return unquoted(values[-1]) if values and len([*split(values[-1])]) == 1 else None


def _literal(value: Any) -> str:
    """A plain value in Hydra's grammar."""
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}: {_literal(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    return QuotedString(value, Quote.single).with_quotes() if isinstance(value, str) else f"{value}"


def value_at(values: Any, keys: Sequence[str], absent: Any = None) -> Any:
    """What stands under these keys, one inside the other, in mappings and lists; else `absent`."""
    for key in keys:
        if isinstance(values, list | tuple) and key.isdigit() and int(key) < len(values):
            values = values[int(key)]
        elif isinstance(values, Mapping) and key in values:
            values = values[key]
        else:
            return absent
    return values
