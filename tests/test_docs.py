"""The documentation: its commands are valid, its links lead somewhere, its code can be imported.

Commands run up to the work itself: the configuration is composed and validated, and what would
train, predict or fetch is replaced by a check of what it is given.
"""

import ast
import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import atmossl
from atmossl import cli
from atmossl.objectives.masked import hidden_values, predicted_streams
from atmossl.schema import IngestConfig, InspectConfig, StatsConfig, parse
from tests.model.test_compiled import batch, network

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md")), *sorted(ROOT.glob("docs/**/*.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# commands of others, which are not run here
OTHERS = (
    "apptainer", "cd", "docker", "git", "hf", "jupyter", "lint-imports", "mkdocs", "pyright",
    "ruff", "source", "tar", "wget",
)  # fmt: skip
# files of the reader's own, and what stands for them here; a network is not read from a checkpoint
STAND_INS = {
    "data=NAME": "data=sample",
    "data.catalog=my.yaml": "data.catalog=my_catalog.yaml",
    "data.name=era5_model_levels": "data.name=my_store",
    "warm_start.network=true": "warm_start.network=false",
}
Check = Callable[..., None]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text()
    return re.findall(rf"^```{language}\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.sub(r"\$\([^)]*\)", "_", line).split(" && "):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # of the environment
                    words = words[1:]
                if words:
                    yield words


ALL = [
    pytest.param(words, id=f"{name(page)}: {shlex.join(words)[:60]}")
    for page in PAGES
    for words in commands(page)
]


def module(path: str, **functions: Callable) -> ModuleType:
    made = ModuleType(path)
    made.__dict__.update(functions)
    return made


def nothing(*values: Any, **more: Any) -> None:
    del values, more  # the command line has validated them


def as_config(kind: Any) -> Callable[..., None]:
    return lambda *given: parse(kind, {k: v for k, v in given[-1].items() if k != "hydra"})


def install_example(folder: Path) -> None:
    """The example of a plugin as pip would install it into that folder."""
    (folder / "examples").symlink_to(ROOT / "examples")
    example = ROOT / "examples" / "atmossl_example_plugin"
    (folder / example.name).symlink_to(example / example.name)
    project = tomllib.loads((example / "pyproject.toml").read_text())["project"]
    about = folder / f"{example.name}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    points = [f"{n} = {v}" for n, v in project["entry-points"]["atmossl.plugins"].items()]
    (about / "entry_points.txt").write_text("\n".join(["[atmossl.plugins]", *points, ""]))


@pytest.fixture
def without_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder with the files that the pages speak of, and commands that end before their work."""
    monkeypatch.chdir(tmp_path)
    template = (ROOT / "data_catalog.yaml").read_text()
    entry = yaml.safe_load(template[template.index("\nlocal:") :])["local"]
    for file in ("my_catalog.yaml", "atmossl_catalog.yaml"):
        (tmp_path / file).write_text(yaml.safe_dump({"my_store": entry}))
    (task,) = (b for b in blocks(ROOT / "docs/tutorials/own_task.md", "yaml") if "combined" in b)
    (tmp_path / "gap.yaml").write_text(task)
    install_example(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    done = module(
        "", show_statistics=as_config(StatsConfig), run_ingest=as_config(IngestConfig),
        show_inspection=as_config(InspectConfig), add_store=nothing, check_new_entry=nothing,
    )  # fmt: skip
    replaced = {
        "data_commands": done,
        "commands.train": module("", train=nothing),
        "commands.predict": module("", predict=nothing),
        "commands.calibrate": module("", calibrate=nothing),
        "commands.embed": module("", embed=nothing),
        "commands.probe": module("", probe=nothing),
        "commands.features": module("", features=nothing),
        "commands.evaluate": module("", evaluate=nothing),
        "commands.cost": module("", show_estimate=nothing),
        "commands.info": module("", show_checkpoint=nothing),
        "commands.export": module("", export=nothing, export_folder=nothing),
        "commands.import_atmorep": module("", import_atmorep=nothing),
    }
    for path, made in replaced.items():
        monkeypatch.setitem(sys.modules, f"atmossl.{path}", made)


def check_atmossl(words: list[str]) -> None:
    if {"-m", "--multirun"} & set(words):  # a value of each key is enough, as one run has it
        words = [re.sub(r"^([\w.]+=[^\[,]*),.*", r"\1", word) for word in words if word != "-m"]
        # where and how runs are submitted belongs to Hydra's plugins
        words = [word for word in words if not word.startswith(("launcher=", "hparams_search="))]
    assert cli.main([STAND_INS.get(word, word) for word in words]) == 0


def check_python(words: list[str]) -> None:
    if words[0].startswith("scripts/"):
        check_script(words)
    else:
        assert words[0] == "-m", words
    if words[0] == "-m" and words[1] != "pytest":
        assert importlib.util.find_spec(words[1]), words[1]


def check_script(words: list[str]) -> None:
    assert (ROOT / words[0]).exists(), words[0]
    extras = words[1].split(",") if words[0] == "scripts/setup.sh" and len(words) > 1 else []
    assert set(extras) <= set(EXTRAS)


def check_sbatch(words: list[str]) -> None:
    script, *overrides = [word for word in words if not word.startswith("-")]
    check_script([script])
    if Path(script).name == "train.sbatch":
        check_atmossl(["train", *overrides])


def check_pip(words: list[str]) -> None:
    for extras in re.findall(r"atmossl\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(EXTRAS), extras


@pytest.mark.usefixtures("without_work")
@pytest.mark.parametrize("words", ALL)
def test_command_of_the_documentation_is_valid(
    words: list[str], capsys: pytest.CaptureFixture
) -> None:
    checks: dict[str, Check] = {
        "atmossl": check_atmossl, "python": check_python, "bash": check_script,
        "sbatch": check_sbatch, "pip": check_pip, **dict.fromkeys(OTHERS, nothing),
    }  # fmt: skip
    try:
        checks[words[0]](words[1:])
    except AssertionError as error:
        raise AssertionError(f"{shlex.join(words)}: {capsys.readouterr().err}") from error


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_and_yaml_of_the_documentation_can_be_read(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                imported = importlib.import_module(node.module)
                for alias in node.names:  # a name, or a module of a package
                    module = f"{node.module}.{alias.name}"
                    assert hasattr(imported, alias.name) or importlib.util.find_spec(module), module
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "atmossl":
                assert node.attr in atmossl.__all__, node.attr
    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


def test_objective_of_the_tutorial_is_the_huber_loss() -> None:
    (block,) = blocks(ROOT / "docs/tutorials/own_objective.md", "python")
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102
    samples, delta = batch(0.5), 0.3
    losses = names["HuberLoss"](delta=delta)(network("full"), samples)
    for (key, loss), stream, predicted in zip(
        losses.terms, predicted_streams(samples.views[0]), losses.prediction.streams, strict=True
    ):
        target, weight, _ = hidden_values(stream)
        error = (predicted.members.mean(dim=2) - target).abs()
        huber = torch.where(error < delta, error**2 / 2, delta * (error - delta / 2))
        weight = weight * predicted.queries.valid[..., None]
        torch.testing.assert_close(loss, (huber * weight).sum() / weight.sum(), msg=key)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [link.partition("#")[0] for link in links if "://" not in link]
    assert [link for link in local if link and not (page.parent / link).exists()] == []


def test_every_command_has_its_how_to() -> None:
    headings = re.findall(r"^## (.*)", (ROOT / "docs/commands.md").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(headings))) == set(cli._COMMANDS)


def test_addresses_of_the_project_are_those_of_its_package() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    for path in [*PAGES, ROOT / "mkdocs.yml"]:
        for url in re.findall(r"https://github\.com/\w+/atmossl", path.read_text()):
            assert url == urls["Homepage"], path
