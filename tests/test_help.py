"""What `--help`, `--version`, `--cfg`, `--info` and shell completion print."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import atmossl
import atmossl.help as help_page
from atmossl import composition
from atmossl.cli import _COMMANDS, _OF_ADD, main
from atmossl.composition import compose_config
from atmossl.data.variables import VARIABLES
from atmossl.help import COMMANDS, help_of
from atmossl.hydra_options import explained

WITH_KEYS = [name for name, told in COMMANDS.items() if told.conf]
APART = [name for name in WITH_KEYS if name != "config"]  # keys of their own


def printed(capsys: pytest.CaptureFixture, *words: str) -> str:
    capsys.readouterr()
    assert main(words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_of_that_command_alone_in_80_columns(name: str, capsys: Any) -> None:
    told = printed(capsys, *name.split(), "--help")
    assert told.startswith(f"atmossl {name}: {COMMANDS[name].does[:20]}")
    assert max(map(len, told.splitlines())) <= 80
    examples = told.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(examples) == 3
    assert all(example.startswith(f"  atmossl {name} ") for example in examples)


def test_every_command_is_in_the_overview(capsys: Any) -> None:
    told = printed(capsys, "--help")
    assert max(map(len, told.splitlines())) <= 80
    assert all(f"  {name} " in told for name in _COMMANDS)
    assert set(_COMMANDS) == {name for name in COMMANDS if " " not in name}
    assert printed(capsys, "help") == told
    assert printed(capsys, "predict", "help").startswith("atmossl predict: ")
    assert printed(capsys, "--version") == f"{atmossl.__version__}\n"


@pytest.mark.parametrize("name", ["evaluate", "train"])
def test_help_names_the_tasks_that_can_be_listed(name: str) -> None:
    told = " ".join(help_of(name).split())
    tasks = sorted(f.stem for f in (Path(__file__).parents[1] / "conf" / "task").glob("*.yaml"))
    assert f"or one or a list, such as [forecast], of {', '.join(tasks)}" in told


def test_help_of_add_has_its_keys(capsys: Any) -> None:
    told = printed(capsys, "data", "add", "--help")
    assert all(f"\n  {key} " in told for key in _OF_ADD)
    assert "atmossl data add --help" in printed(capsys, "data", "--help")


def leaves(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value and "_target_" not in value:
            yield from leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


@pytest.mark.parametrize("name", APART)
def test_help_has_every_key_with_its_default(name: str) -> None:
    conf = str(COMMANDS[name].conf)
    file = yaml.safe_load((Path(__file__).parents[1] / "conf" / f"{conf}.yaml").read_text())
    given = [f"{key}=_" for key, value in file.items() if value == "???"]
    values = compose_config(conf, given)
    text = help_of(*name.split(" ", 1)).replace("\n      ", " ")
    told = dict(part.split("=", 1) for part in text.split("\n  ") if "=" in part)
    shown = {key.strip(): value.split("  ")[0].strip() for key, value in told.items()}
    groups = {"hydra", "masking", "tasks", "task", "stream", "callbacks", "objective", "paths"}
    inherited = set(compose_config("train", [])) if conf == "stats" else set()
    for key, value in leaves(values):
        holder = key.partition(".")[0]
        if holder in groups | inherited or f"{key}=_" in given:
            continue
        while key not in shown and "." in key:  # it stands in the mapping that holds it
            key = key.rpartition(".")[0]
        assert key in shown, key
        if not isinstance(value, dict | list) and yaml.safe_load(shown[key]) != value:
            assert str(value) in shown[key], (key, value, shown[key])


@pytest.mark.parametrize("name", APART)
def test_every_key_has_a_meaning_beside_what_is_valid(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In words: a list of choices or bounds does not say what a key is for."""
    monkeypatch.setattr(help_page, "_valid", lambda _: "")
    lines = help_of(*name.split(" ", 1)).partition("Keys and their defaults")[2].splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"  [\w.]+=", line)]
    for number, following in zip(keys, [*keys[1:], len(lines)], strict=True):
        entry = [lines[number], *(x for x in lines[number + 1 : following] if x.startswith("    "))]
        column = [line[33:] for line in entry if line[31:33] == "  "]
        assert any(re.search(r"[a-z]", text) for text in column), lines[number]


@pytest.mark.parametrize("name", WITH_KEYS)
def test_examples_of_the_help_can_be_composed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(composition, "_unknown_entry", lambda _: [])  # the user's own entries
    Path("my_task.yaml").write_text("{_target_: forecast, lead_time: 12h}")
    Path("my_conf/masking").mkdir(parents=True)
    Path("my_conf/masking/mine.yaml").write_text("{_target_: random_masking, rate: 0.5}")
    for example in COMMANDS[name].examples:
        named = re.findall(r"\bvariables\.(\w+)=", example)
        assert set(named) <= set(VARIABLES), "canonical name = name in the file"
        words = [word for word in shlex.split(example)[1:] if word not in ("--force", "-m")]
        if "--config-dir" in words:
            words.remove("--config-dir")
            words[words.index("my_conf")] = "--config-dir=my_conf"
        words = [word.partition(",")[0] if "=[" not in word else word for word in words]
        assert yaml.safe_load(explained(words[0], words[1:], "job"))


def test_cfg_and_info_are_those_of_hydra(capsys: Any) -> None:
    told = yaml.safe_load(printed(capsys, "predict", "--cfg", "job", "task.lead_time=6h"))
    expected = compose_config("predict", ["output=_", "task.lead_time=6h"])
    assert told == {**expected, "output": "???"}
    both = yaml.safe_load(printed(capsys, "train", "--cfg", "all", "model=tiny"))
    assert both["hydra"]["runtime"]["choices"]["model"] == "tiny" and both["model"]["dim"] == 32
    told = printed(capsys, "evaluate", "--info", "tasks=standard")
    assert "main: file://" in told and "  tasks=standard" in told
    for words, message in (
        (["predict", "--cfg", "jbo"], "--cfg jbo: valid: job, hydra, all"),
        (["predict", "--cfg", "job", "task.lead_tmie=6h"], "did you mean task.lead_time?"),
        (["export", "--info"], "export has no configuration; valid: train, "),
        (["-sc", "install=tcsh"], "valid: install=SHELL, with bash"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_bash_completes_commands_actions_choices_and_keys() -> None:
    lines = {
        "atmossl pre": "predict",
        "atmossl data in": "inspect ingest",
        "atmossl train experiment=quick": "experiment=quickstart",
        "atmossl predict task.lead": "task.lead_time=",
        "atmossl export hu": "hub=",
    }
    asked = "".join(
        f"COMP_LINE='{line}'; COMP_POINT={len(line)}; _atmossl; echo ${{COMPREPLY[@]}}\n"
        for line in lines
    )
    one_process = (  # answers what each call of the command would
        "import os, sys; from atmossl.cli import main\n"
        "for line in sys.stdin: os.environ['COMP_LINE'] = line[:-1]; main(['-sc', 'query=bash']); "
        "print(flush=True)"
    )
    script = (
        f'coproc P {{ {sys.executable} -c "$PYTHON_CODE"; }}\n'
        'atmossl() { echo "$COMP_LINE" >&"${P[1]}"; while read -r line <&"${P[0]}" && '
        '[ "$line" ]; do echo "$line"; done; }\n'
    )
    install = subprocess.run(
        [sys.executable, "-c", "from atmossl.cli import main; main(['-sc', 'install=bash'])"],
        capture_output=True,
        text=True,
    )
    done = subprocess.run(
        ["bash", "-c", script + install.stdout + asked],
        env={**os.environ, "PYTHON_CODE": one_process}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines() == list(lines.values()), done.stderr
