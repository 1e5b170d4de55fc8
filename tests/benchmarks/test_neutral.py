"""Digests are kept for every processor by its name."""

import json
import sys
from typing import Any

import pytest

from benchmarks import neutral

HERE = {"processor": "New CPU, 1 threads", "vector_units": "AVX2", "torch": "3", "numpy": "3"}
FIGURES = {"digests": {"losses": "ab"}, "machine": HERE}


def check(monkeypatch: Any, tmp_path: Any, kept: dict[str, Any], *words: str) -> dict[str, Any]:
    """Run the benchmark as if its work were done; returns what it keeps then."""
    result = tmp_path / "neutral.json"
    result.write_text(json.dumps({"figures": kept}))
    monkeypatch.setattr(neutral, "_RESULT", result)
    monkeypatch.setattr(neutral, "machine", lambda: HERE)
    monkeypatch.setattr(neutral, "measure", lambda: FIGURES)
    after: dict[str, Any] = {}
    monkeypatch.setattr(neutral, "finish", lambda _, figures: after.update(figures))
    monkeypatch.setattr(sys, "argv", ["neutral", *words])
    neutral.main()
    return after


def test_a_new_processor_is_told_what_to_do_before_any_work(monkeypatch, tmp_path) -> None:
    other = {"Old CPU, AVX2": FIGURES}
    with pytest.raises(SystemExit, match="New CPU, AVX2 .kept: Old CPU, AVX2.*--against"):
        check(monkeypatch, tmp_path, other, "--check")
    changed = {"New CPU, AVX2": {**FIGURES, "machine": {**HERE, "torch": "2"}}}
    with pytest.raises(SystemExit, match="'torch': '2'.*'torch': '3'.*--against"):
        check(monkeypatch, tmp_path, changed, "--check")


def test_digests_of_other_processors_stay(monkeypatch, tmp_path) -> None:
    other = {"Old CPU, AVX2": {"digests": {"losses": "cd"}}}
    assert check(monkeypatch, tmp_path, other) == {**other, "New CPU, AVX2": FIGURES}


def test_the_digests_of_this_processor_are_compared(monkeypatch, tmp_path) -> None:
    same = {"New CPU, AVX2": FIGURES}
    with pytest.raises(SystemExit) as ended:
        check(monkeypatch, tmp_path, same, "--check")
    assert ended.value.code == 0
    differs = {"New CPU, AVX2": {"digests": {"losses": "cd"}, "machine": HERE}}
    with pytest.raises(SystemExit, match="changed: losses"):
        check(monkeypatch, tmp_path, differs, "--check")
