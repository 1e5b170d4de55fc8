"""Tells whether an error was raised in the code of a plugin.

A command answers a ValueError of the package with one line, since such an error is about what the
user wrote. A ValueError that comes from a plugin's own code may as well be a slip in that code, so
its author is told the file and the line.
"""

import traceback
from dataclasses import dataclass

_packages: set[str] = set()  # that this process has imported because a configuration names them
_OURS = "atmossl"
_CONSTRUCTORS = ("__init__", "__post_init__", "__new__")


def remember(name: str) -> None:
    """Note that `name`, a class `package.module.Class`, belongs to a plugin."""
    package = name.partition(".")[0]
    if package not in (_OURS, "lightning"):
        _packages.add(package)


@dataclass(frozen=True)
class Place:
    """A line in the code of a plugin."""

    file: str
    line: int | None
    function: str

    @property
    def is_constructor(self) -> bool:
        """Whether the error is likely to be about keywords that a configuration gives."""
        return self.function in _CONSTRUCTORS

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


def place_in_plugin(error: BaseException) -> Place | None:
    """Where a plugin raised the error, itself or by a call of a library; None if the package did
    or if no plugin took part."""
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package in _packages:
            place = Place(frame.f_code.co_filename, line, frame.f_code.co_name)
        elif package == _OURS:
            place = None
    return place
