"""Options of Hydra that its users know: `--cfg`, `--info` and shell completion."""

import os
from collections.abc import Sequence

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.bash_completion import BashCompletion
from hydra._internal.utils import create_config_search_path
from omegaconf import OmegaConf

from atmossl.composition import (
    compose_config,
    compose_with_task_file,
    compose_with_tasks,
    hydra_config,
)
from atmossl.data.catalog import find_file
from atmossl.help import COMMANDS
from atmossl.overrides import Word, as_values_of, first_of_sweep, is_readable, split

_MISSING = "__missing__"
_SCRIPTS = {
    "bash": (
        "_atmossl() {\n"
        "  COMPREPLY=($(COMP_LINE=${COMP_LINE:0:$COMP_POINT} atmossl -sc query=bash))\n"
        "}\n"
        "COMP_WORDBREAKS=${COMP_WORDBREAKS//=}\n"
        "complete -o nospace -o default -F _atmossl atmossl"
    ),
    "fish": "complete -c atmossl -f -a '(COMP_LINE=(commandline -cp) atmossl -sc query=fish)'",
}
_SCRIPTS["zsh"] = "autoload -Uz compinit bashcompinit; compinit; bashcompinit\n" + _SCRIPTS["bash"]
_ACTIONS = {
    "data": ("add", "inspect", "ingest", "list", "stats"),
    "config": ("show", "validate"),
    "import": ("atmorep",),
}


def option(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The option among the words (`job`, `hydra` or `all` of `--cfg`, `info` of `--info`, else
    None), and the other words: of a sweep (`-m`) those of its first run.

    Raises:
        ValueError: another value of `--cfg`.
    """
    rest, chosen = list(words), None
    for name in ("--cfg", "-c"):
        if name in rest:
            at = rest.index(name)
            chosen = "".join(rest[at + 1 : at + 2])
            del rest[at : at + 2]
            if chosen not in ("job", "hydra", "all"):
                raise ValueError(f"{name} {chosen}: valid: job, hydra, all")
    if "--info" in rest:
        rest.remove("--info")
        chosen = "info"
    if {"-m", "--multirun"} & set(rest):
        rest = [word for word in rest if word not in ("-m", "--multirun")]
        firsts = [first_of_sweep(word) if is_readable(word) else word for word in rest]
        rest = [word for word in firsts if word is not None]
    return chosen, rest


def explained(command: str, words: Sequence[str], package_part: str) -> str:
    """The text that `--cfg` or `--info` prints: the configuration of a command, of Hydra, or its
    sources.

    Raises:
        ValueError: words that do not fit, or a command without a configuration.
    """
    if command in _ACTIONS:
        command, words = f"{command} {''.join(words[:1])}", words[1:]
    if command == "data inspect":
        words = as_values_of("data.name", words)
    name = _conf_of(command)
    if name is None:
        commands = [command for command, entry in COMMANDS.items() if entry.conf]
        raise ValueError(f"{command} has no configuration; valid: {', '.join(commands)}")
    values = yaml.safe_load((find_file("conf") / f"{name}.yaml").read_text())
    given_keys = {word.key for word in map(Word.of, words) if not word.sign}
    missing = [key for key, value in values.items() if value == "???" and key not in given_keys]
    words = [*words, *(f"{key}={_MISSING}" for key in missing)]
    if package_part == "info":
        return _sources(name, words)
    shown = {}
    if package_part in ("hydra", "all"):
        shown["hydra"] = OmegaConf.to_container(hydra_config(name, words).hydra)
    if package_part in ("job", "all"):
        if name in ("predict", "calibrate"):
            values = compose_with_task_file(name, words)
        else:
            with_tasks = name in ("train", "stats", "evaluate")
            values = (compose_with_tasks if with_tasks else compose_config)(name, words)
        shown |= {key: value for key, value in values.items() if key != "hydra"}
    return OmegaConf.to_yaml(OmegaConf.create(shown)).replace(_MISSING, "???").rstrip()


def _conf_of(command: str) -> str | None:
    """The file of conf/ that a command reads; info and config read that of a training run."""
    if command.startswith(("info", "config ")):
        return "train"
    return COMMANDS[command].conf if command in COMMANDS else None


def _sources(name: str, words: Sequence[str]) -> str:
    """Where files of choices are looked for, and which files were chosen."""
    runtime = hydra_config(name, words).hydra.runtime
    lines = [f"Hydra {hydra.__version__}", "", "Files of choices are looked for in:"]
    lines += [
        f"  {source.provider}: {source.schema}://{source.path}" for source in runtime.config_sources
    ]
    lines += ["", "Chosen:"]
    ours = {key: choice for key, choice in runtime.choices.items() if not key.startswith("hydra/")}
    return "\n".join([*lines, *(f"  {key}={choice}" for key, choice in sorted(ours.items()))])


def completion(words: Sequence[str]) -> str:
    """The text that `atmossl -sc install=SHELL` prints, or the completions for which a shell asks
    with `-sc query=SHELL`.

    Raises:
        ValueError: another shell or another word.
    """
    asked = Word.of("".join(words[:1]))
    if asked.key not in ("install", "query") or asked.value not in _SCRIPTS:
        raise ValueError(f"-sc {' '.join(words)}: valid: install=SHELL, with {', '.join(_SCRIPTS)}")
    if asked.key == "install":
        return _SCRIPTS[asked.value]
    return "\n".join(_candidates(os.environ.get("COMP_LINE", "")))


def _candidates(line: str) -> list[str]:
    """The possible completions of the last word of a line."""
    *before, last = line.split(" ")
    before = [word for word in before if word][1:]
    if not before:
        return [name for name in (*(n for n in COMMANDS if " " not in n), "--help", "--version")
                if name.startswith(last)]  # fmt: skip
    command = before[0]
    if command in _ACTIONS:
        if len(before) == 1:
            return [action for action in _ACTIONS[command] if action.startswith(last)]
        command = f"{command} {before[1]}"
    entry = COMMANDS.get(command)
    if entry is not None and entry.keys is not None:
        return [f"{key}=" for key in entry.keys if key.startswith(last)]
    name = _conf_of(command)
    if name is None:
        return []
    search = create_config_search_path(str(find_file("conf")))
    plugin = BashCompletion(ConfigLoaderImpl(search))
    *earlier, part = split(last)  # of a list, the last value
    proposals = plugin._query(config_name=name, line=part)
    start = "".join(f"{value}," for value in earlier)
    return [f"{start}{word}" for word in proposals]
