"""Finds values that a checkpoint cannot hold, before they are written.

A checkpoint is read as tensors and plain values alone (`torch.load(weights_only=True)`), so that a
file of someone else runs no code. torch writes any object, however, and refuses the file only when
it is read.
"""

import io
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from atmossl.value_faults import as_written

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype,
    torch.device,
)  # fmt: skip
_SHOWN_LETTERS = 60


def check_plain(contents: Any, holder: str) -> None:
    """Raise ValueError if the contents could not be read from a checkpoint. holder: what they
    belong to, as the message begins."""
    for way, value in _others(contents, ()):
        kind, text = type(value), as_written(value)
        short = text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."
        raise ValueError(
            f"{holder} holds {'.'.join(way) or 'itself'}={short}, a "
            f"{kind.__module__}.{kind.__qualname__}, which cannot be read from a checkpoint; "
            "valid: tensors, numbers, texts, null, and lists and mappings of these"
        )


def check_checkpoint(contents: Any) -> None:
    """Raise ValueError if a whole checkpoint could not be read again; names the callback or the
    part that holds what is wrong."""
    if not isinstance(contents, dict):
        return
    for part, values in contents.items():
        if part == "callbacks" and isinstance(values, dict):
            for name, state in values.items():
                check_plain(state, f"the state_dict of callback {name}")
        else:
            check_plain(values, f"{part} of the checkpoint")


def _others(value: Any, way: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is not plain, and the keys that lead to it."""
    if type(value) in _PLAIN or isinstance(value, Tensor):
        return
    if type(value) in (dict, OrderedDict):
        for key, inner in value.items():
            yield from _others(key, (*way, "a key"))
            yield from _others(inner, (*way, str(key)))
    elif type(value) in (list, tuple, set):
        for number, inner in enumerate(value):
            yield from _others(inner, (*way, str(number)))
    elif not _is_read_again(value):
        yield way, value


def _is_read_again(value: Any) -> bool:
    """Whether torch reads a value that it has written, such as a Counter."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # of many kinds, and all mean the same here
        return False
    return True
