"""What would be valid is told in plain words: for every kind of pydantic's errors, and for every
key of every command with values of the wrong kind."""

import ast
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError
from pydantic_core._pydantic_core import list_all_errors

import atmossl.schema
from atmossl.composition import compose_with_tasks
from atmossl.data.catalog import CatalogEntry, load_catalog
from atmossl.overrides import key_and_value
from atmossl.schema import ConfigError, checked
from atmossl.schema.config_errors import lines_of
from atmossl.value_faults import as_written, in_plain_words, listed, of_unquoted

# Words of programmers, with which pydantic says what it expects.
FOREIGN = re.compile(
    r"\b(Input|should|instance|dictionary|[Tt]uple|iterable|Field required|None|True|False"
    r"|permitted|parse|integer|string|boolean|valid list|mapping)\b"
)
# Kinds that say how classes of Python are used, of which no value is to blame.
OF_PROGRAMS = {
    "no_such_attribute", "json_invalid", "json_type", "needs_python_object", "recursion_loop",
    "recursion_depth_exceeded", "frozen_field", "frozen_instance", "get_attribute_error",
    "default_factory_not_called", "missing_sentinel_error", "ellipsis_error",
    "unexpected_positional_argument", "missing_positional_only_argument",
    "multiple_argument_values",
}  # fmt: skip
TELLING = {  # what a kind of error knows, where pydantic's own example says little
    "expected": "'a', True or None", "error": "why", "class": "Fraction",
    "class_name": "Fraction",
}  # fmt: skip
KINDS = {
    entry["type"]: entry.get("example_context") or {}
    for entry in list_all_errors()
    if entry["type"] not in OF_PROGRAMS
}


def fault_of(kind: Any, context: dict[str, Any], *loc: str) -> dict[str, Any]:
    details: Any = {"type": kind, "loc": loc, "input": 5, "ctx": context}
    (fault,) = ValidationError.from_exception_data("Settings", [details]).errors()
    return {**fault}


def example_of(kind: str) -> dict[str, Any]:
    """What an error of this kind knows: pydantic's example, in which some values say little."""
    if kind in ("value_error", "assertion_error"):
        return {"error": ValueError("it says itself why")}
    return {
        name: TELLING.get(name, 3 if value is None else value)
        for name, value in KINDS[kind].items()
    }


KEY = ("trainer", "max_steps")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_error_has_plain_words(kind: str) -> None:
    (line,) = lines_of(
        [fault_of(kind, example_of(kind), *KEY)], values={"trainer": {"max_steps": 5}}
    )
    assert not FOREIGN.search(line), line
    assert re.match(r"trainer.max_steps(=5)?: |unknown key trainer.max_steps", line), line


@pytest.mark.parametrize(
    ("kind", "context", "words"),
    [
        ("is_instance_of", {"class": "Sequence"}, "valid: a list, such as [a,b]"),
        ("is_instance_of", {"class": "Mapping"}, "valid: keys and values, such as {KEY: VALUE}"),
        ("too_long", {"field_type": "Tuple", "max_length": 2, "actual_length": 3},
         "valid: at most 2 values"),
        ("too_short", {"field_type": "Tuple", "min_length": 1, "actual_length": 0},
         "valid: at least one value"),
        ("literal_error", {"expected": "'ddp', True or None"}, "valid: ddp, true or null"),
        ("string_too_short", {"min_length": 1}, "valid: a text that is not empty"),
        ("greater_than", {"gt": 0.5}, "valid: above 0.5"),
        ("less_than_equal", {"le": 1.0}, "valid: 1 or below"),
        ("value_error", {"error": ValueError("3 is odd")}, "3 is odd"),
    ],
)  # fmt: skip
def test_limits_are_in_the_words(kind: str, context: dict[str, Any], words: str) -> None:
    fault = fault_of(kind, context, "key")
    assert in_plain_words(fault) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"), (True, "true"), (5, "5"), (1e-05, "1e-05"), ("sample", "sample"),
        ("", "''"), ("null", "'null'"), ("3.5", "'3.5'"), ("a b", "'a b'"), ("[1", "'[1'"),
        ([99], "[99]"), ((1, "b", None), "[1,b,null]"), ({"a": [1, 2]}, "{a: [1,2]}"),
        ("encoder.*", "encoder.*"), ("s3://bucket/x.zarr", "s3://bucket/x.zarr"),
    ],
)  # fmt: skip
def test_values_are_shown_as_they_are_written(value: Any, text: str) -> None:
    assert as_written(value) == text


def test_a_value_of_several_lines_is_shown_in_one() -> None:
    assert as_written(np.zeros((2, 2))) == "[[0. 0.] [0. 0.]]"


WRONG: tuple[Any, ...] = ({"a": 1}, [[1], {"b": 2}, "x", None, *range(9)], "zz", None, [])
COMMANDS = {
    "TrainConfig": ("train", ["experiment=quickstart", "paths.output=o"]),
    "PredictConfig": ("predict", ["task=inpainting", "init_time=2001-01-01", "output=o.zarr"]),
    "EvaluateConfig": ("evaluate", ["output=o"]),
    "EmbedConfig": ("embed", ["init_time=2001-01-01", "output=o.zarr"]),
    "ProbeConfig": ("probe", ["checkpoint=default", "output=o"]),
    "FeaturesConfig": ("features", ["checkpoint=default", "output=o"]),
}


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key, and of the first item of every list."""
    if path:
        yield path
    if isinstance(node, dict):
        for key, value in node.items():
            yield from places(value, (*path, key))
    elif isinstance(node, list) and node:
        yield from places(node[0], (*path, 0))


def with_value(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    values = copy.deepcopy(values)
    node = values
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return values


@pytest.mark.parametrize("kind", COMMANDS)
def test_no_value_of_any_key_is_answered_in_foreign_words(kind: str) -> None:
    values = {key: v for key, v in compose_with_tasks(*COMMANDS[kind]).items() if key != "hydra"}
    refused = 0
    for path in places(values):
        for wrong in WRONG:
            try:
                checked(getattr(atmossl.schema, kind), with_value(values, path, wrong))
            except ConfigError as error:
                refused += 1
                assert not FOREIGN.search(str(error)), (path, wrong, str(error))
    assert refused > 30


@pytest.mark.parametrize("kind", COMMANDS)
def test_who_writes_a_text_that_yaml_takes_for_something_else_is_told_to_quote_it(
    kind: str,
) -> None:
    values = {key: v for key, v in compose_with_tasks(*COMMANDS[kind]).items() if key != "hydra"}
    told = 0
    for path in places(values):
        for wrong in (1000.0, 7, True, None):
            try:
                checked(getattr(atmossl.schema, kind), with_value(values, path, wrong))
            except ConfigError as error:
                for line in str(error).splitlines():
                    needs_text = re.search("valid:.* a (text|path)\\b", line) is not None
                    told += needs_text
                    assert needs_text == ("without quotes" in line), line
    assert told > 5


def test_a_quoted_text_is_what_the_hint_says() -> None:
    fault = fault_of("string_type", {}, "key")  # of the value 5
    assert of_unquoted(fault, "data.name").endswith("""write 'data.name="5"' if it is a name""")
    assert of_unquoted(fault, "plugins.0").endswith("""write 'plugins=["5"]' if it is a name""")
    assert of_unquoted(fault).endswith("""write "5" if it is a name""")
    assert key_and_value('data.name="5"')[1] == "5"
    assert of_unquoted(fault_of("int_type", {}, "key"), "key") == ""


def test_a_catalog_is_told_in_the_same_words(tmp_path: Path) -> None:
    good = load_catalog()["sample"].model_dump(mode="json", exclude_defaults=True)
    file, refused = tmp_path / "catalog.yaml", 0
    for path in places(good):
        for wrong in WRONG:
            file.write_text(yaml.safe_dump({"mine": with_value(good, path, wrong)}))
            try:
                load_catalog(file)
            except ValueError as error:
                refused += 1
                assert not FOREIGN.search(str(error)), (path, wrong, str(error))
    assert refused > 30 and isinstance(CatalogEntry(**good), CatalogEntry)


def test_valid_values_are_listed_as_a_user_writes_them() -> None:
    assert listed(["air", 500, 0.25, None, True]) == "air, 500, 0.25, null, true"
    assert listed({"b": 1, "a": 2}) == "b, a"


OF_PYTHON = {"list", "tuple", "sorted", "set", "dict", "get_args"}


def is_of_python(node: ast.AST | None, names: set[str]) -> bool:
    """Whether an expression is a list, tuple, set or dict, by its form. names: of such values."""
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.BinOp):
        return is_of_python(node.left, names) or is_of_python(node.right, names)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in OF_PYTHON
    forms = (ast.List, ast.ListComp, ast.Tuple, ast.Set, ast.SetComp, ast.Dict, ast.DictComp)
    return isinstance(node, forms)


def shown_as_in_python(function: ast.AST) -> Iterator[str]:
    """Lists and mappings that a function puts into texts in Python's form: `['a', 'b']`."""
    names: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_of_python(node.value, names):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.NamedExpr) and is_of_python(node.value, names):
            names.add(node.target.id)
    for node in ast.walk(function):
        if isinstance(node, ast.FormattedValue) and is_of_python(node.value, names):
            text = ast.unparse(node.value)
            if "shape" not in text:  # of arrays, which stand in brackets
                yield text


def test_texts_that_show_lists_in_pythons_form_are_recognised() -> None:
    code = "def f(a, b):\n have = [b]\n x = f'{sorted(a)} {listed(have)} {have} {a} {[b, *a]}'"
    assert [*shown_as_in_python(ast.parse(code).body[0])] == ["sorted(a)", "have", "[b, *a]"]


def test_no_message_shows_a_list_in_pythons_form() -> None:
    for source in Path(atmossl.schema.__file__).parents[1].rglob("*.py"):
        for function in ast.walk(ast.parse(source.read_text())):
            if isinstance(function, ast.FunctionDef):
                shown = [*shown_as_in_python(function)]
                assert not shown, f"{source}, {function.name}: {shown}; listed() or as_written()"
