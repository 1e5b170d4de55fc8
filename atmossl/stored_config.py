"""The configuration of a run that goes on: that of its folder, changed by the command line."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from atmossl.overrides import Word, key_and_value, value_of
from atmossl.refused_words import of_unknown
from atmossl.renamed_keys import renamed

Compose = Callable[[Sequence[str]], dict[str, Any]]
# words that say what a whole configuration is composed of
_WHOLE = ("experiment=", "debug=", "hparams_search=", "hydra.searchpath=", "--", "~", "+")
_FREE = ("stream", "masking", "tasks", "objective", "model", "callbacks")  # have no fixed keys


def stored_config(
    overrides: Sequence[str], groups: Path, compose: Compose
) -> tuple[dict[str, Any], list[str]] | None:
    """Values of the run in `paths.output` that `resume` goes on with, and what has changed, a text
    each; None where the command line says what the run is: a new folder, or `experiment=...`.

    groups: the folder of conf/. compose: makes a training run's configuration of overrides.
    Raises:
        ValueError: a key that the run does not have.
    """
    folder, resume = value_of("paths.output", overrides), value_of("resume", overrides)
    if folder is None or resume in (None, "null") or any(w.startswith(_WHOLE) for w in overrides):
        return None
    file = Path(folder) / "config.yaml"
    if not file.is_file():
        return None
    values = _with_new_keys(renamed(_plain(OmegaConf.load(file))), compose([]))
    changes: list[str] = []
    words = [text for text in overrides if Word.of(text).value is not None]
    chosen = [text for text in words if (groups / Word.of(text).key).is_dir()]
    for word in chosen:
        key = Word.of(word).key
        node = compose([word]).get(key)
        if key in values and node != values[key]:
            changes.append(word)
            values[key] = node
    for word in words:
        if word not in chosen:
            changes += _set(values, word)
    return values, changes


def _with_new_keys(values: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run, and for keys that its version did not know those of now."""
    for key, default in defaults.items():
        if key not in values:
            values[key] = default
        elif isinstance(default, Mapping) and isinstance(values[key], dict) and key not in _FREE:
            values[key] = _with_new_keys(values[key], default)
    return values


def _set(values: dict[str, Any], word: str) -> list[str]:
    """Set one key; what it was and is, if that differs."""
    key, now = key_and_value(word)
    node, (*parents, last) = values, key.split(".")
    for part in parents:
        node = node.get(part) if isinstance(node, dict) else None
    is_open = key.startswith("trainer.extra.")
    if not isinstance(node, dict) or (last not in node and not is_open):
        raise ValueError(of_unknown(key, values))
    before, now = node.get(last), _plain(now)
    node[last] = now
    same = before == now or str(before) == str(now) or key in _OF_THE_START
    return [] if same else [f"{word} (was {before})"]


_OF_THE_START = ("resume", "paths.output")


def _plain(value: Any) -> Any:
    """Lists and mappings of Hydra and OmegaConf as those of Python, with texts without quotes."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value)
    return OmegaConf.to_container(OmegaConf.create({"value": value}))["value"]  # pyright: ignore
