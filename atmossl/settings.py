"""What a setting may be: a number with bounds, a duration as people write it, or a class that a
configuration names by `_target_`.

The types annotate the classes that a configuration is validated against (`atmossl.schema`),
wherever those classes are. Nothing is checked when such a class is made in code, without a
configuration.

A `_target_` names a class of the package by its name in small letters with underscores, such as
`temporal_interpolation`, or with its module in front. A plugin is a user's own package. Its classes
are named as `package.module.Class`, or by a short name that the package registers in the entry
point group `atmossl.plugins`. Two rules hold for every kind of class (masking sampler, task,
objective, network, callback, logger):

- What the user's own configuration names is imported, must be a subclass of what is needed, and has
  its keywords checked against the types of its constructor.
- What the record of a checkpoint names is imported only if it belongs to the package itself or to
  a package that the user lists in `plugins=[...]`. The name alone is compared, so nothing of
  another package runs.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, reduce
from importlib.metadata import entry_points
from importlib.util import find_spec
from operator import or_
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
)
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError, to_jsonable_python

from atmossl.plugin_code import remember
from atmossl.value_faults import as_written, listed

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
NUM_SEEDS = 2**63  # numbers that a signed integer of 64 bits can hold
Seed = Annotated[int, Field(ge=0, lt=NUM_SEEDS)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NonZeroShare = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NotNegativeFloat = Annotated[float, Field(ge=0.0)]
_HOURS = {"s": 1 / 3600, "min": 1 / 60, "h": 1.0, "d": 24.0}


class Strict(BaseModel):
    """Settings that refuse unknown keys and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


def signed_hours(text: str | np.timedelta64 | timedelta) -> float:
    """Hours of a duration such as `12h`, `90min`, `2d` or `-30d`, or one of numpy, pandas or the
    standard library; ValueError if it is none."""
    if isinstance(text, np.timedelta64 | timedelta):
        duration = np.timedelta64(text)
        if not np.isnat(duration) and np.datetime_data(duration)[0] not in ("Y", "M", "generic"):
            return float(duration / np.timedelta64(1, "h"))
    match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*(s|min|h|d)\s*", str(text))
    if match is None:
        raise ValueError(
            f"{as_written(text)} is no duration; valid: a number and s, min, h or d, such as 12h"
        )
    return float(match[1]) * _HOURS[match[2]]


def hours(text: str | np.timedelta64 | timedelta) -> float:
    """Hours of a duration that is not negative; ValueError if it is none."""
    value = signed_hours(text)
    if value < 0:
        raise ValueError(f"{as_written(text)} is negative; valid: a duration such as 12h")
    return value


def seconds(text: str | np.timedelta64 | timedelta) -> float:
    """Seconds of a duration that is not negative; ValueError if it is none."""
    return round(3600 * hours(text), 9)


# Hours or seconds in code, a number and its unit in a configuration: `12h`
Hours = Annotated[float, BeforeValidator(hours)]
Seconds = Annotated[float, BeforeValidator(seconds)]
SignedHours = Annotated[float, BeforeValidator(signed_hours)]


def snake_case(name: str) -> str:
    """The name of a class in small letters with underscores."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def target_name(target: str) -> str:
    """The short name of a class of this package, as a `_target_` of the configuration may name it
    with its module in front; any other name stays as it is."""
    return snake_case(target.rpartition(".")[2]) if target.startswith("atmossl.") else target


GROUP = "atmossl.plugins"
Kinds = Mapping[str, Callable[..., Any]]
_REST = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


class UntrustedError(ValueError):
    """A checkpoint names code of a package that the user has not listed in `plugins`."""


@dataclass(frozen=True)
class Part:
    """A class and its checked keywords: one part of a run, not built yet."""

    kind: type
    arguments: Mapping[str, Any]

    @property
    def target(self) -> str:
        """The name `package.module.Class` of the class."""
        return f"{self.kind.__module__}.{self.kind.__name__}"

    @property
    def plain_arguments(self) -> dict[str, Any]:
        """The keywords as numbers, texts, lists and mappings, for the record of a checkpoint."""
        return to_jsonable_python(dict(self.arguments))

    def build(self, **of_the_run: Any) -> Any:
        """Build the object. of_the_run: keywords that the run provides for constructors that
        have them."""
        parameters = inspect.signature(self.kind).parameters
        keywords = {name: value for name, value in of_the_run.items() if name in parameters}
        return self.kind(**self.arguments, **keywords)


def choose_part(node: Any, base: type, of_the_run: Collection[str] = ()) -> Part:
    """The class that a node of the user's own configuration names by `_target_`, with the node's
    other keys as its keywords.

    base: what it must be a subclass of. of_the_run: keywords of the constructor that are no part of
    the configuration.

    Raises:
        ValueError: no such class, one of another kind, an unknown or missing key, a value that does
            not fit its type.
    """
    if isinstance(node, Part):
        return node
    kind, values = named_class(node, base)
    return Part(kind, checked_keywords(kind, values, of_the_run))


def named_class(
    node: Any, base: type, builtin: Mapping[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """The class that a node of a configuration names by `_target_`, see `find_class`, and the
    node's other keys.

    Raises:
        ValueError: no `_target_`, or no such class.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        valid = listed(sorted(builtin)) if builtin else "package.module.Class and its keywords"
        raise ValueError(f"needs the key _target_; valid: {valid}")
    values = dict(node)
    return find_class(values.pop("_target_"), base, builtin), values


def choose(
    node: Any, kinds: Kinds, base: type, as_written: Callable[[Any], Any] = lambda hint: hint
) -> Any:
    """Build the object that a mapping with `_target_` describes; any other object stays as it is.

    kinds: the package's own classes by name; others are subclasses of `base` that plugins have.
    as_written: as of `checked_keywords`.

    Raises:
        ValueError: an unknown class or key, or a value that does not fit.
    """
    if type(node).__module__ != "builtins":
        return node
    kind, values = named_class(node, base, kinds)
    return kind(**checked_keywords(kind, values, as_written=as_written))


def with_parts(hint: Any, parts: Mapping[Any, Any]) -> Any:
    """An annotation that accepts a mapping wherever the original takes a part that is described by
    one. parts: type of the part -> annotation that accepts the mapping."""
    if not isinstance(hint, Hashable):  # arguments of a Callable
        return hint
    if hint in parts:
        return parts[hint]
    origin: Any = get_origin(hint)
    arguments = get_args(hint)
    changed = tuple(with_parts(argument, parts) for argument in arguments)
    if changed == arguments:
        return hint
    if origin is Annotated:
        return Annotated[changed]
    return reduce(or_, changed) if origin in (Union, UnionType) else origin[changed]


def find_class(
    target: Any,
    base: type,
    builtin: Mapping[str, Any] | None = None,
    only_from: Sequence[str] | None = None,
) -> Any:
    """The class of this name: one of the package (`builtin`, by name), or a subclass of `base`.

    only_from: the packages whose code may be imported; None, for the user's own configuration: all.

    Raises:
        UntrustedError: of a package that is not in `only_from`; nothing was imported.
        ValidationError: no such class, or one of another kind; an error of the key `_target_`.
    """
    builtin, text = builtin or {}, str(target)
    if target_name(text) in builtin:
        return builtin[target_name(text)]
    try:
        name = full_name(text)
        if only_from is not None:
            _check_trust(name, only_from)
        kind = _imported(name)
        if misfit := _misfit(kind, base):
            raise LookupError(misfit)
    except LookupError as error:
        words = f"{base.__module__}.{base.__name__}"
        example = f"an {words} of your own as package.module.Class"
        valid = f"{listed(sorted(builtin))}, or {example}" if builtin else example
        raise as_error("_target_", [fault("unknown_target", f"{error.args[0]}; valid: {valid}",
                                          ("_target_",), target)]) from error  # fmt: skip
    return kind


def _misfit(kind: Any, base: type) -> str | None:
    """Why what a `_target_` names is not the kind of class that is needed; None if it is."""
    is_protocol = getattr(base, "_is_protocol", False)  # a class then needs a method `__call__`
    needed = "a class" if is_protocol else f"a subclass of {base.__module__}.{base.__name__}"
    if not isinstance(kind, type):
        what = (
            "a function" if inspect.isroutine(kind) else f"an object of {type(kind).__qualname__}"
        )
        return f"this is {what}, and {needed} is needed here"
    if not is_protocol:
        return None if issubclass(kind, base) else f"this class is not {needed}, as is needed here"
    if any(parent.__module__.startswith("torch.") for parent in kind.__mro__):
        return f"this class is a module of torch, and no {base.__name__} as is needed here"
    if not issubclass(kind, base):
        return "this class has no method __call__, which is needed here"
    return None


def full_name(target: str) -> str:
    """The name `package.module.Class`, for a name that is one already or that a package has
    registered.

    Raises:
        LookupError: a short name that no package has registered, or several.
    """
    if "." in target:
        return target
    points = entry_points(group=GROUP)
    names = sorted({point.value.replace(":", ".") for point in points if point.name == target})
    if len(names) == 1:
        return names[0]
    if names:
        raise LookupError(f"registered for {' and for '.join(names)}; name one of these")
    registered = sorted({point.name for point in points})
    raise LookupError(
        f"no name of this package, and entry points {GROUP} have {listed(registered)}"
    )


def _check_trust(name: str, packages: Iterable[str]) -> None:
    if not any(name.startswith(f"{package}.") for package in packages):
        package = package_of(name)
        raise UntrustedError(
            f"{name} is code of the package {package}, which runs only if you trust it and give "
            f"plugins=[{package}]"
        )


def _imported(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    remember(name)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, SyntaxError) as error:
        why = " ".join(str(error).split())
        raise LookupError(
            f"cannot be imported ({why}), install its package or add its folder to PYTHONPATH"
        ) from error
    except (AttributeError, ValueError) as error:
        raise LookupError(f"{module or 'this'} has no {attribute}") from error


def checked_keywords(
    kind: Callable[..., Any],
    values: Mapping[str, Any],
    of_the_run: Collection[str] = (),
    as_written: Callable[[Any], Any] = lambda hint: hint,
) -> dict[str, Any]:
    """The keywords of a constructor from the values of a configuration, converted to the types that
    the constructor declares.

    as_written: the type of what a configuration says for a keyword of a type.

    Raises:
        ValidationError: one error for every key that is unknown, missing or does not fit.
    """
    keywords, names = _keywords_of(kind, tuple(of_the_run), as_written)
    try:
        checked = keywords.model_validate(values)
    except ValidationError as error:
        raise as_error(kind.__name__, [_clear(e, names) for e in error.errors()]) from error
    arguments = {name: getattr(checked, field) for name, field in names.values()
             if field in checked.model_fields_set}  # fmt: skip
    return arguments | (checked.model_extra or {})


def with_defaults(
    kind: Callable[..., Any], keywords: Mapping[str, Any], of_the_run: Collection[str] = ()
) -> dict[str, Any]:
    """All keywords of a constructor, in its order: the given values, else the defaults."""
    return {
        parameter.name: keywords.get(parameter.name, parameter.default)
        for parameter in inspect.signature(kind).parameters.values()
        if parameter.name not in of_the_run
        and (parameter.name in keywords or parameter.default is not parameter.empty)
    }


@cache
def _keywords_of(
    kind: Callable[..., Any], of_the_run: tuple[str, ...], as_written: Callable[[Any], Any]
) -> tuple[type[BaseModel], dict[str, tuple[str, str]]]:
    """The constructor's keywords as a schema, and by key the keyword and its field in the
    schema. Names of fields avoid pydantic's own."""
    parameters = _parameters(kind)
    extra = "allow" if any(p.kind is p.VAR_KEYWORD for p in parameters) else "forbid"
    fields: dict[str, Any] = {}
    names: dict[str, tuple[str, str]] = {}
    for parameter in parameters:
        if parameter.kind in _REST or parameter.name in of_the_run:
            continue
        hint: Any = (
            Any if parameter.annotation is parameter.empty else as_written(parameter.annotation)
        )
        field = f"keyword_{len(fields)}"
        declared: Any = FieldInfo.from_annotation(hint)  # pyright: ignore[reportArgumentType]
        key = declared.alias or parameter.name
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[field] = (Annotated[hint, Field(alias=key)], default)
        names[key] = parameter.name, field
    config = ConfigDict(arbitrary_types_allowed=True, extra=extra)
    try:
        return create_model(kind.__name__, __config__=config, **fields), names
    except PydanticUserError:  # types that pydantic cannot check: the constructor does
        loose: dict[str, Any] = {
            field: (Annotated[Any, Field(alias=key)], fields[field][1])
            for key, (_, field) in names.items()
        }
        return create_model(kind.__name__, __config__=config, **loose), names


def _parameters(kind: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    try:
        return tuple(inspect.signature(kind, eval_str=True).parameters.values())
    except NameError:  # of types that are imported for type checkers alone
        parameters = inspect.signature(kind).parameters.values()
        return tuple(parameter.replace(annotation=Any) for parameter in parameters)


def _clear(error: Any, valid_keys: Iterable[str]) -> InitErrorDetails:
    """One of pydantic's errors, with the valid keys where a key is unknown."""
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        return fault("unknown_key", "", error["loc"], error["input"], valid=sorted(valid_keys))
    limits = {key: value for key, value in error.get("ctx", {}).items() if key != "message"}
    return fault(error["type"], error["msg"], error["loc"], error["input"], **limits)


def fault(
    kind: Any, message: str, loc: tuple[int | str, ...], value: Any, **more: Any
) -> InitErrorDetails:
    """One error of a `ValidationError`. more: details for `atmossl.schema.config_errors`."""
    error = PydanticCustomError(kind, "{message}", {"message": message, **more})
    return InitErrorDetails(type=error, loc=loc, input=value)


def as_error(title: str, faults: list[InitErrorDetails]) -> ValidationError:
    """The faults as one of pydantic's errors, so that every fault keeps its key."""
    return ValidationError.from_exception_data(title, faults)


def classes_outside(values: Any, builtin: Collection[str], key: str = "") -> dict[str, str]:
    """The full names of all classes of plugins that a configuration names, by the keys that name
    them.

    builtin: names of the package's own classes. Nothing is imported.

    Raises:
        LookupError: a short name that no package has registered.
    """
    if isinstance(values, list | tuple):
        values = {str(number): item for number, item in enumerate(values)}
    if not isinstance(values, Mapping):
        return {}
    outside: dict[str, str] = {}
    if "_target_" in values and target_name(str(values["_target_"])) not in builtin:
        name = full_name(str(values["_target_"]))
        if not name.startswith("lightning."):  # which is installed with this package
            outside[key] = name
    for name, value in values.items():
        outside |= classes_outside(value, builtin, f"{key}.{name}".lstrip("."))
    return outside


def package_of(name: str) -> str:
    """The package of a class."""
    return name.partition(".")[0]


def check_listed(stored: Any, builtin: Collection[str], packages: Sequence[str]) -> None:
    """Raise UntrustedError if a stored configuration names a class that belongs neither to the
    package nor to the listed packages. Nothing is imported."""
    try:
        names = classes_outside(stored, builtin)
    except LookupError as error:
        raise UntrustedError(f"a class that is not known here: {error.args[0]}") from error
    for name in names.values():
        _check_trust(name, packages)


def check_plugins(packages: Sequence[str]) -> tuple[str, ...]:
    """The names of packages; ValueError for one that is not installed. Nothing is imported."""
    names = (packages,) if isinstance(packages, str) else tuple(packages)
    for name in names:
        if not name.isidentifier() or find_spec(name) is None:
            raise ValueError(
                f"plugins={as_written(names)}: no package {name!r} is installed or on PYTHONPATH; "
                "valid: names of packages, such as my_package"
            )
    return names


# Packages whose code a checkpoint may name.
Plugins = Annotated[tuple[str, ...], AfterValidator(check_plugins)]
