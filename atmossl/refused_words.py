"""Composes a configuration although some words of the command line do not fit, to report all faults
at once.

Hydra stops at the first word that it refuses, and advises on its own syntax. Here the refused words
are set aside, so that all other faults are found as well, and each is told in our words: which key
is unknown, which one may be meant, and what is valid.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.errors import HydraException
from omegaconf import OmegaConf

from atmossl.extras import missing_plugin
from atmossl.overrides import PATHS, Word, is_readable, key_and_value, value_at
from atmossl.renamed_keys import line_of_old_name, present_name

_REFUSED = (
    r"Could not override '(?P<key>[^']+)'",
    r"Could not append to config\. An item is already at '(?P<there>[^']+)'",
    r"Could not delete from config\. '(?P<absent>[^']+)' does not exist",
    r"Could not delete from config\. The value of '(?P<differs>[^']+)'",
    r"Could not (?:find|load) '(?P<choice>[^']+)'",
    r"Ambiguous value for argument '(?P<several>[^']+)'",
    r"Error merging override (?P<within>.+)",
)
_UNKNOWN = ("key", "absent")
_ELSEWHERE = {  # what other programs call a key
    "lr": "optimizer.learning_rate",
    "steps": "trainer.max_steps",
    "epochs": "trainer.max_steps",
    "max_epochs": "trainer.max_steps",
    "gpus": "trainer.devices",
    "device": "accelerator",
    "workers": "data.num_workers",
    "date": "init_time",
    "time": "init_time",
    "ckpt": "checkpoint",
    "model": "checkpoint",
    "out": "output",
    "checkpoint": "warm_start.checkpoints",
}
_LISTS = ("members", "init_time")  # which take a list though their default is none


def compose_all(name: str, words: Sequence[str], conf: Path) -> tuple[Any, list[str], list[str]]:
    """The configuration `conf/NAME.yaml` with all words that fit, a line for each that does not,
    and the words that do. A key without a value that it needs holds `_` then.

    Raises:
        HydraException: what no word is to blame for, such as a file of the user's own.
    """
    words = list(_whole(words))
    faults = [
        fault
        for word in words
        if (fault := _unreadable(word) or _empty(word) or _tasks(word) or _no_name(word, conf))
    ]
    words = [
        word
        for word in words
        if is_readable(word) and not _tasks(word) and not _no_name(word, conf)
    ]
    refused: list[tuple[str, str, str]] = []
    while True:
        try:
            config = compose(name, words)
            break
        except HydraException as error:
            blamed = _blamed(error, words)
            if blamed is None:
                raise
            words.remove(blamed[1])
            if blamed[0] == "several" and _takes_list(name, blamed[1], words):
                words.append(re.sub("=(.*)", r"=[\1]", blamed[1], count=1))
                continue
            refused.append((*blamed, str(error)))
    groups = [folder.name for folder in conf.iterdir() if folder.is_dir()]
    groups = groups if name in ("train", "stats") else []
    keys = {**dict.fromkeys(groups), **OmegaConf.to_container(config)}  # pyright: ignore
    inner = [word for kind, word, _ in refused if kind == "key" and _has_place(word, keys)]
    if inner:  # a mapping with further keys, which the schema looks at
        config = compose(name, [*words, *(f"++{word}" for word in inner)])
    faults += [
        _several(name, word, keys) if kind == "several" else _line(kind, word, text, keys, conf)
        for kind, word, text in refused
        if word not in inner
    ]
    for key in sorted(OmegaConf.missing_keys(config)):
        faults.append(f"{key}: is missing; give {key}=VALUE")
        OmegaConf.update(config, key, "_")
    return config, faults, [*words, *inner]


def _takes_list(name: str, word: str, words: Sequence[str]) -> bool:
    """Whether `KEY=a,b` can only mean a list."""
    key = Word.of(word).key
    if key in _LISTS:
        return True
    try:
        return OmegaConf.is_list(OmegaConf.select(compose(name, [*words]), key))
    except HydraException:  # another word that does not fit: this one is told beside it
        return False


def _whole(words: Sequence[str]) -> Iterator[str]:
    """The words, with those joined again that a shell has cut at spaces inside of brackets."""
    part = ""
    for word in words:
        part = f"{part} {word}".lstrip()
        is_open = any(part.count(a) > part.count(b) for a, b in ("{}", "[]"))
        if is_open and not is_readable(part):
            continue
        yield part
        part = ""
    if part:
        yield part


def _tasks(text: str) -> str | None:
    """What to say of a list where one task is meant."""
    word = Word.of(text)
    is_list = word.key == "task" and (word.value or "").startswith("[")
    return f"{text}: is a list; valid: one task, such as task=forecast" if is_list else None


def _no_name(text: str, conf: Path) -> str | None:
    """What to say of a number, true, false or null where a file of choices is meant."""
    word = Word.of(text)
    if word.value is None or word.sign or not (conf / word.key).is_dir() or not is_readable(text):
        return None
    is_no_name = isinstance(key_and_value(text)[1], bool | int | float | None)
    return _line("choice", text, "", {}, conf) if is_no_name else None


def _empty(text: str) -> str | None:
    """What to say of a path or store that is empty, as of a variable of the shell that is not
    set."""
    word = Word.of(text)
    kind = "NAME" if word.key == "data.name" else "PATH"
    if word.value is None or word.key not in (*PATHS, "data.name") or word.value.strip("'"):
        return None
    return f"{text}: is empty; valid: {word.key}={kind}"


def _unreadable(word: str) -> str | None:
    """What to say of a word that is no override."""
    if is_readable(word):
        return None
    parts, word = Word.of(word), word.lstrip("+")
    key, value = parts.key, parts.value
    if parts.is_option:
        name = key.strip("-")
        return (
            f"no option {key}; valid: --help, --config-dir FOLDER, --cfg job, --info; keys have no "
            f"dashes, as in {name}=VALUE"
        )
    if value is None and not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", word):
        return f"{word}: is no key; every word is KEY=VALUE"
    if value is None:
        return f"{word}: needs a value; valid: {key}=VALUE"
    return (
        f"{word}: cannot be read; put quotes inside of quotes around a value with special "
        f"characters, as in '{key}=\"{value}\"', and write mappings as '{key}={{name: value}}'"
    )


def _blamed(error: HydraException, words: Sequence[str]) -> tuple[str, str] | None:
    """How a word does not fit, and the word; None if the fault lies elsewhere."""
    for pattern in _REFUSED:
        match = re.search(pattern, str(error))
        if match is None:
            continue
        ((kind, text),) = match.groupdict().items()
        for word in reversed(words):
            parts = Word.of(word)
            key, value = parts.key, parts.value or ""
            is_choice = kind == "choice" and _chooses(key, value, text)
            if is_choice or (kind != "choice" and text.strip() in (key, word, f"{key}={value}")):
                return kind, word
    return None


def _chooses(group: str, value: str, choice: str) -> bool:
    names = value.strip("[]").replace("'", "").replace('"', "").split(",")
    return choice in {f"{group}/{name.strip()}" for name in names}


def _has_place(word: str, valid_keys: Mapping[str, Any]) -> bool:
    """Whether a key may get further keys: it is a mapping, or stands in one that is empty."""
    parts = Word.of(word)
    place, value = parts.key.rpartition(".")[0], parts.value or ""
    is_mapping = isinstance(_at(valid_keys, parts.key), Mapping) and value.lstrip().startswith("{")
    return is_mapping or any(_at(valid_keys, part) == {} for part in _prefixes(place))


def _prefixes(key: str) -> Iterator[str]:
    parts = key.split(".") if key else []
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


_ABSENT = object()  # not None, which is the value of many keys


def _at(values: Any, key: str) -> Any:
    """The value of a key, or `_ABSENT`."""
    return value_at(values, key.split("."), _ABSENT)


def _several(name: str, word: str, valid_keys: Mapping[str, Any]) -> str:
    """What to say of `KEY=A,B` to a command: only training runs over several values of a key."""
    key, values = Word.of(word).key, Word.of(word).value
    if _at(valid_keys, key) is _ABSENT and not _has_place(word, valid_keys):
        return of_unknown(key, valid_keys)
    if key == "task":
        return f"{word}: several values; valid: one task, such as task=forecast"
    a_run_of_each = ", or -m for a run of each" if name == "train" else ""
    return f"{word}: several values; write {key}=[{values}] for a list{a_run_of_each}"


def _line(kind: str, word: str, text: str, valid_keys: Mapping[str, Any], conf: Path) -> str:
    """What to say of a word that does not fit."""
    parts = Word.of(word)
    key, value = parts.key, parts.value or ""
    if kind in _UNKNOWN:
        if parts.sign == "~" and _at(valid_keys, key) is None:
            return f"{word}: {key} is null already; leave the word out"
        return of_unknown(key, valid_keys)
    if kind == "there":
        return f"{word}: {key} exists already; leave out the +"
    if kind == "choice":
        options = re.findall(r"^\t(\S+)$", text.partition("Config search path")[0], re.MULTILINE)
        options = options or sorted(file.stem for file in (conf / key).glob("*.yaml"))
        family = value.partition("_")[0]  # of a plugin of Hydra, such as submitit_slurm
        absent = missing_plugin(text)
        if absent is not None and not any(option.startswith(family) for option in options):
            return f"{word}: {absent}"
        (wrong,) = re.findall(r"Could not \w+ '(?:[^']*/)?([^']+)'", text)[:1] or [value]
        close = get_close_matches(wrong, options, n=2)
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        more = ", or a list of tasks, such as [forecast]" if key == "tasks" else ""
        return f"{word}: no such choice; {meant}valid: {', '.join(options)}{more}"
    if kind == "differs":
        return f"{word}: {key} has another value; leave out ={value}"
    inner = _at(valid_keys, key)
    if isinstance(inner, Mapping):
        return f"{word}: {key} has keys of its own; valid: {key}.KEY=VALUE with {', '.join(inner)}"
    return f"{word}: {key.rpartition('.')[0] or key} takes one value and has no further keys"


def of_unknown(key: str, valid_keys: Mapping[str, Any]) -> str:
    """The keys that may be meant: close ones at that place, then those of that name elsewhere."""
    name, now = key.rpartition(".")[2], present_name(key)
    if now != key and _at(valid_keys, now) is not _ABSENT:
        return line_of_old_name(key)
    if name in _ELSEWHERE and _at(valid_keys, _ELSEWHERE[name]) is not _ABSENT:
        return f"unknown key {key}; did you mean {_ELSEWHERE[name]}?"
    corrected, values = list[str](), valid_keys
    for part in key.split("."):
        if not isinstance(values, Mapping) or not values:
            break
        close = [part] if part in values else get_close_matches(part, [*map(str, values)], n=1)
        if not close:
            break
        corrected, values = [*corrected, *close], values[close[0]]
    else:
        return f"unknown key {key}; did you mean {'.'.join(corrected)}?"
    everywhere = list(_all_keys(valid_keys))
    same = [full for full in everywhere if full.rpartition(".")[2] == name]
    if same:
        return f"unknown key {key}; did you mean {' or '.join(same[:3])}?"
    place = ".".join(corrected)
    valid = _at(valid_keys, place) if place else valid_keys
    if not isinstance(valid, Mapping):
        return f"unknown key {key}: {place} takes a value and has no further keys"
    start = f"{place}." if place else ""
    return f"unknown key {key}; valid: {', '.join(f'{start}{name}' for name in sorted(valid))}"


def _all_keys(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{before}{name}"
        if isinstance(value, Mapping):
            yield from _all_keys(value, f"{before}{name}.")
