"""Composes the configuration of a command from files of conf/ and words of the command line.

A word may hold what Hydra's grammar does not: the name of a catalog entry, a file with a task, a
list of tasks, a path of any characters. The configuration of a run that goes on is that of its
folder, changed by the command line.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from atmossl.data.catalog import catalog_entry, find_file, is_location, yaml_fault
from atmossl.extras import missing_plugin
from atmossl.overrides import (
    PATHS,
    SEARCH_WORDS,
    Word,
    as_searchpath,
    fitting_store,
    for_hydra,
    is_readable,
    key_and_value,
    sets,
    split,
    unquoted,
    value_of,
)
from atmossl.process_lifetime import run_name
from atmossl.refused_words import compose_all, of_unknown
from atmossl.renamed_keys import renamed
from atmossl.value_faults import as_written

_OF_TRAIN = (
    "trainer.extra", "callbacks", "logger.others", "data.transforms", "model.dims",
    "optimizer.factors", "warm_start.rename",
)  # fmt: skip

_DURATIONS = {  # where the default masks and tasks have them
    "masking.samplers.2.hidden_time": "hidden_time",
    "tasks.0.lead_time": "lead_time",
    "tasks.1.hidden_time": "hidden_time",
}
MAPPINGS = {  # keys under which any key goes, by configuration
    "train": _OF_TRAIN,
    "stats": _OF_TRAIN,
    "predict": ("task.levels",),
    "calibrate": ("task.levels",),
    "evaluate": ("boxes",),
    "ingest": ("variables", "select", "filters", "coordinates", "workers.slurm"),
}


def compose_config(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The composed configuration `conf/NAME.yaml` as plain values, interpolations resolved.
    `data=NAME` may name any catalog entry; the files of a `--config-dir=FOLDER` can be chosen
    beside those of conf/.

    Raises:
        ValueError: one line for each override that does not fit, and for all else that is wrong.
    """
    with _hydra_takes(name, overrides) as words:
        config, faults, fitting = compose_all(name, words, find_file("conf"))
        values = to_plain(config)
    faults += _unknown_entry(values)
    if faults:
        # the schema imports torch: not for a typo beside which nothing else can be wrong
        other_faults = _other_faults(name, values, faults) if any(map(_sets_value, fitting)) else []
        raise ValueError("\n".join([*faults, *other_faults]))
    return values


def _unknown_entry(values: dict[str, Any]) -> list[str]:
    """The fault of a name that is no catalog entry; paths of stores are checked later."""
    data = values.get("data") or {}
    name, catalog = data.get("name"), data.get("catalog")
    if not isinstance(name, str) or is_location(name):
        return []
    try:
        catalog_entry(name, Path(catalog) if catalog else None)
    except ValueError as error:
        return [str(error)]
    return []


def _sets_value(text: str) -> bool:
    """Whether a word sets a value that may be wrong: neither a path nor a choice of a file."""
    key = Word.of(text).key
    return (
        key not in (*PATHS, "data.name")
        and not key.startswith("hydra.")
        and not (find_file("conf") / key).is_dir()
    )


def hydra_config(name: str, overrides: Sequence[str]) -> Any:
    """Like `compose_config`, with Hydra's own settings and nothing resolved."""
    with _hydra_takes(name, overrides) as words:
        return compose(name, words, return_hydra_config=True)


@contextmanager
def _hydra_takes(name: str, overrides: Sequence[str]) -> Iterator[list[str]]:
    """A context in which Hydra can compose conf/NAME.yaml, with the words in the form that it
    takes."""
    GlobalHydra.instance().clear()
    mappings = MAPPINGS.get(name, ())
    overrides = [open_ended(as_entry(item, name), mappings) for item in overrides]
    overrides = with_fitting_store(overrides, name)
    overrides = as_searchpath(overrides, find_file("conf"))
    register_run_name()
    with in_one_line(overrides), initialize_config_dir(str(find_file("conf")), version_base="1.3"):
        yield [for_hydra(item) for item in overrides]


def _other_faults(name: str, values: dict[str, Any], faults: Sequence[str]) -> list[str]:
    """Faults of the words that Hydra took, beside those that it refused."""
    kind = {"ingest": "IngestConfig", "inspect": "InspectConfig"}.get(name)
    try:
        valid(kind or f"{name.capitalize()}Config", values)
    except ValueError as error:
        refused_keys = {fault.partition(":")[0] for fault in faults}
        lines = str(error).splitlines()
        lines = [line for line in lines if line not in faults]
        return [line for line in lines if re.split("[=:]", line)[0] not in refused_keys]
    return []


def register_run_name() -> None:
    """Register `${run_name:}` for conf/; it has the same value wherever it stands in one
    configuration."""

    def name() -> str:
        return run_name(os.environ, datetime.now())

    OmegaConf.register_new_resolver("run_name", name, use_cache=True, replace=True)


@contextmanager
def in_one_line(overrides: Sequence[str]) -> Iterator[None]:
    """A context that turns errors of Hydra and OmegaConf into ValueError in one line."""
    try:
        yield
    except TypeError as error:  # Hydra's, of a mapping where the name of a choice belongs
        mappings = [item for item in overrides if "{" in item]
        if not mappings:
            raise
        raise ValueError(
            f"{' '.join(mappings)}: needed: names of files in conf/, not mappings; set single keys "
            "(GROUP.KEY=VALUE) or write a file"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        file = "a file of choices" if mark is None else mark.name
        raise ValueError(f"{file} is no YAML: {yaml_fault(error)}") from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        text = " ".join(f"{error} {cause if cause is not error else ''}".split())
        raise ValueError(missing_plugin(text) or text) from error


def as_entry(override: str, name: str) -> str:
    """The override in which `data=NAME` names a catalog entry, as in every command. For a
    training run it also chooses the file conf/data/NAME.yaml, where there is one."""
    word = Word.of(override)
    if word.key != "data" or word.sign:
        return override
    names = split(word.value or "")
    files = [find_file("conf") / "data" / f"{unquoted(part)}.yaml" for part in names]
    chooses_file = name in ("train", "stats") and any(file.is_file() for file in files)
    return override if chooses_file else f"data.name={word.value or ''}"


def with_fitting_store(overrides: Sequence[str], name: str) -> list[str]:
    """The overrides of a training run, with the window and streams that its store's catalog
    entry proposes, if any."""
    data, catalog = (value_of(key, overrides) for key in ("data.name", "data.catalog"))
    if name not in ("train", "stats") or data is None:
        return list(overrides)
    try:
        entry = catalog_entry(data, Path(catalog) if catalog else None)
    except ValueError:
        return list(overrides)  # the validation says so, beside whatever else is wrong
    if entry.training is None:
        return list(overrides)
    fitting = entry.training
    durations = {key: getattr(fitting, kind) for key, kind in _DURATIONS.items()}
    return fitting_store(overrides, fitting.window, fitting.stream, durations)


def to_plain(config: Any) -> dict[str, Any]:
    """A composed configuration as plain dictionaries, lists and values; every key has a value."""
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def valid(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values, validated by a class of `atmossl.schema`. A command validates again; this is done
    first so that an error comes before the command's libraries are imported."""
    from atmossl import schema

    settings = {key: value for key, value in values.items() if key != "hydra"}
    _, listed = schema.checked(getattr(schema, kind), settings)
    return listed | {key: values[key] for key in values.keys() - settings.keys()}


def compose_with_task_file(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Like `compose_config`, but `task=FILE.yaml` reads a task of the user's own, and
    `task={_target_: KIND, KEY: VALUE}` is one that takes no key of the default task."""
    tasks = [unquoted(str(Word.of(text).value)) for text in arguments if sets(text, "task")]
    written_out = [
        task for task in tasks if task.endswith((".yaml", ".yml")) or task.startswith("{")
    ]
    if not written_out:
        return compose_config(name, arguments)
    task_words = [a for a in arguments if a.startswith("task.")]
    rest = [a for a in arguments if a not in task_words and not sets(a, "task")]
    task = _changed({"task": _own_task(written_out[-1])}, task_words)
    return compose_config(name, rest) | task


def _own_task(text: str) -> dict[str, Any]:
    """Keys and values of a task that is written as a mapping, or stands in a YAML file."""
    if text.startswith("{"):
        if not is_readable(f"task={text}"):
            raise ValueError(
                f"task={text}: cannot be read as a mapping; valid: such as "
                "task={_target_: downscaling, factor: 4}"
            )
        return to_plain(OmegaConf.create(key_and_value(f"task={text}")[1]))
    from atmossl.api import read_task

    content = read_task(text)
    if not isinstance(content, dict):
        raise ValueError(f"task={text} holds {content!r}; needed: keys and values of a task")
    return content


def _changed(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The values, changed by words of the command line."""
    config = OmegaConf.create(values)
    for word in words:
        OmegaConf.update(config, *key_and_value(word), force_add=True)
    return to_plain(config)


def compose_with_tasks(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Like `compose_config`, but `tasks` may be a task of conf/task, a YAML file, or a list of
    these; any other value is a file of conf/tasks."""
    folders = [word for word in arguments if word.startswith(SEARCH_WORDS)]
    listed = [word for word in arguments if sets(word, "tasks") and _lists(word, folders)]
    changes = [word for word in arguments if word.startswith("tasks.")]
    if not listed and not changes:
        return compose_config(name, arguments)
    values = compose_config(name, [word for word in arguments if word not in (*listed, *changes)])
    tasks = _listed_tasks(listed[-1], folders) if listed else values["tasks"]
    return values | _changed({"tasks": tasks}, [_by_number(word, tasks) for word in changes])


def tasks_apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a sweep that say which tasks validate, which Hydra does not take, and the other
    words.

    Raises:
        ValueError: such a word has several values, one for each run.
    """
    folders = [word for word in arguments if word.startswith(SEARCH_WORDS)]
    of_tasks = [
        word
        for word in arguments
        if word.startswith("tasks.") or (sets(word, "tasks") and _lists(word, folders))
    ]
    for word in of_tasks:
        if len(list(split(str(Word.of(word).value)))) > 1:
            key, _, names = word.partition("=")
            raise ValueError(
                f"{word}: the runs of a sweep have the same tasks; give one value"
                + (f", or a list: {key}=[{names}]" if key == "tasks" else "")
            )
    return of_tasks, [word for word in arguments if word not in of_tasks]


def _listed_tasks(word: str, folders: Sequence[str]) -> list[dict[str, Any]]:
    """The tasks that `tasks=[NAME,...]` lists by name or file."""
    text = str(Word.of(word).value)
    names = [unquoted(name) for name in split(text.removeprefix("[").removesuffix("]"))]
    if not all(names):
        raise ValueError(f"{word}: needed: names of tasks or files, such as [forecast]")
    return [_listed_task(name, ["output=_", *folders]) for name in names]


def _listed_task(name: str, words: Sequence[str]) -> dict[str, Any]:
    """One task of a list; what is wrong is told of the key `tasks`, which the user wrote."""
    try:
        return compose_with_task_file("predict", [f"task={name}", *words])["task"]
    except ValueError as error:
        raise type(error)(re.sub(r"^task\b", "tasks", str(error), flags=re.M)) from error


def _by_number(word: str, tasks: Sequence[Mapping[str, Any]]) -> str:
    """A word `tasks.NAME.KEY=VALUE`, or one with the task's number from 0 on, as a word with the
    number."""
    _, name, *rest = word.split(".", 2)
    names = [str(task.get("_target_", "")).rpartition(".")[2] for task in tasks]
    valid = [*dict.fromkeys(names), *map(str, range(len(names)))]
    if not rest or name not in valid:
        raise ValueError(f"{word}: valid: tasks.NAME.KEY=VALUE, NAME one of {', '.join(valid)}")
    if names.count(name) > 1:
        raise ValueError(f"{word}: {names.count(name)} tasks are called {name}; give one's number")
    return f"tasks.{names.index(name) if name in names else name}.{rest[0]}"


def compose_training(arguments: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The configuration of a training run, and a line if it is that of a run that continues."""
    words = [open_ended(as_entry(item, "train"), MAPPINGS["train"]) for item in arguments]
    stored = _stored_config(words)
    if stored is None:
        return compose_with_tasks("train", arguments), ""
    values, changed = stored
    more = f"; changed: {', '.join(changed)}" if changed else ""
    file = f"{value_of('paths.output', words)}/config.yaml"
    note = f"note: goes on with the configuration of {file}{more}"
    return values, note


# words that say what a whole configuration is composed of
_WHOLE = ("experiment=", "debug=", "hparams_search=", "hydra.searchpath=", "--", "~", "+")
# of `trainer`: where a run is computed. A choice such as `trainer=ddp` changes these of a run that
# goes on, and leaves its steps, intervals and precision.
_PLACEMENT = (
    "accelerator", "devices", "num_nodes", "strategy", "cpu_offload", "checkpoint_format",
)  # fmt: skip
_FREE = ("stream", "masking", "tasks", "objective", "model", "callbacks")  # have no fixed keys


def _stored_config(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]] | None:
    """Values of the run in `paths.output` that `resume` goes on with, and a text for each key that
    has changed; None where the command line says what the run is: a new folder, or
    `experiment=...`.

    Raises:
        ValueError: a key that the run does not have.
    """
    folder, resume = value_of("paths.output", overrides), value_of("resume", overrides)
    if folder is None or resume in (None, "null") or any(w.startswith(_WHOLE) for w in overrides):
        return None
    file = Path(folder) / "config.yaml"
    if not file.is_file():
        return None
    values = _with_new_keys(renamed(_plain(OmegaConf.load(file))), compose_with_tasks("train", []))
    before = _flat(values)
    words = [text for text in overrides if Word.of(text).value is not None]
    chosen = [text for text in words if (find_file("conf") / Word.of(text).key).is_dir()]
    for word in chosen:
        key = Word.of(word).key
        node = compose_with_tasks("train", [word]).get(key)
        if key == "trainer" and node is not None:
            node = {**values[key], **{name: node[name] for name in _PLACEMENT}}
        if key in values:
            values[key] = node
    for word in words:
        if word not in chosen:
            _set(values, word)
    return values, _changes(before, _flat(values))


def _with_new_keys(values: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run, and for keys that its version did not know those of now."""
    for key, default in defaults.items():
        if key not in values:
            values[key] = default
        elif isinstance(default, Mapping) and isinstance(values[key], dict) and key not in _FREE:
            values[key] = _with_new_keys(values[key], default)
    return values


def _set(values: dict[str, Any], word: str) -> None:
    """Set one key that a run has."""
    key, now = key_and_value(word)
    node, (*parents, last) = values, key.split(".")
    for part in parents:
        node = node.get(part) if isinstance(node, dict) else None
    is_open = key.startswith("trainer.extra.")
    if not isinstance(node, dict) or (last not in node and not is_open):
        raise ValueError(of_unknown(key, values))
    node[last] = _plain(now)


def _flat(values: Mapping[str, Any], parents: str = "") -> dict[str, Any]:
    """Values by their whole keys, such as `trainer.max_steps`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{parents}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, Mapping) and value else {key: value}
    return flat


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, a text for each key."""
    texts = []
    for key in dict.fromkeys([*before, *now]):
        if key in ("resume", "paths.output") or str(before.get(key)) == str(now.get(key)):
            continue
        was = f"was {as_written(before[key])}" if key in before else "was not there"
        texts.append(f"{key}={as_written(now[key])} ({was})" if key in now else f"no {key} ({was})")
    return texts


def _plain(value: Any) -> Any:
    """Lists and mappings of Hydra and OmegaConf as those of Python, with texts without quotes."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value)
    return OmegaConf.to_container(OmegaConf.create({"value": value}))["value"]  # pyright: ignore


def _lists(word: str, folders: Sequence[str]) -> bool:
    """Whether `tasks=...` lists tasks, of which there may be one."""
    text = str(Word.of(word).value)
    if text.startswith("[") or len(list(split(text))) > 1:
        return True
    places = [find_file("conf"), *(Path(str(Word.of(folder).value)) for folder in folders)]
    name = unquoted(text)
    return name.endswith((".yaml", ".yml")) or any(
        (place / "task" / f"{name}.yaml").is_file() for place in places
    )


def open_ended(override: str, mappings: tuple[str, ...]) -> str:
    """An override in the form that Hydra wants for mappings with free keys, which it calls
    appending. A key that begins with a digit, such as 2m_temperature, needs braces."""
    override = re.sub(r"^variables\.(\d\w*)=(.*)$", r"variables={\1: \2}", override)
    starts = tuple(f"{key}{end}" for key in mappings for end in (".", "="))
    key, _, value = override.partition("=")
    chooses_file = (find_file("conf") / key).is_dir() and not value.startswith("{")
    return f"++{override}" if override.startswith(starts) and not chooses_file else override
