"""Tests run side by side, so each process and those that it starts take one thread; more would wait
for each other."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch counts the cores

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Before any test."""
    if "tests.processes" in sys.modules:
        sys.modules["tests.processes"].start_server()
    if "lightning" in sys.modules:
        from tests.lean import lean_runs

        lean_runs()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate` writes all numbers of a report, but draws no maps and no page, which takes longer
    than to score a small store."""
    from atmossl.evaluation.report import write
    from atmossl.evaluation.report.maps import DrawnCase

    monkeypatch.setattr(write, "draw_case", lambda *_, **__: DrawnCase(b"", {}))
    monkeypatch.setattr(write, "html_page", lambda *_: "")
