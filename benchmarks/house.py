"""How far a reader has to go through the package, counted on real runs and on its text.

python -m benchmarks.house

`files_*` are the package's files that are entered, `depth_*` the deepest stack of its own functions
(comprehensions, which have frames of their own before Python 3.12, are not counted), once from the
reading of one training sample to its loss, and once from the settings of `atmossl predict` to the
written file of one date. `files_plan_to_file` leaves out what opens the checkpoint and the store,
as the training sample does. The other keys count lines and public names without a docstring.
"""

import ast
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import atmossl
from benchmarks.report import finish, take_no_options

PACKAGE = Path(atmossl.__file__).parent


@dataclass
class Trace:
    """Files of the package that were entered, and the deepest stack of its functions."""

    files: set[str] = field(default_factory=set)
    deepest: tuple[str, ...] = ()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        del argument
        if event != "call" or not _is_own(frame):
            return
        self.files.add(str(Path(frame.f_code.co_filename).relative_to(PACKAGE)))
        stack = tuple(_own_stack(frame))
        if len(stack) > len(self.deepest):
            self.deepest = stack


def _is_own(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_filename.startswith(f"{PACKAGE}/") and not code.co_name.startswith("<")


def _own_stack(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        if _is_own(frame):
            yield f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}"
        frame = frame.f_back


@contextmanager
def traced() -> Iterator[Trace]:
    trace = Trace()
    sys.setprofile(trace)
    try:
        yield trace
    finally:
        sys.setprofile(None)


def one_training_sample() -> Trace:
    """From `__getitems__` of the training set to the loss of the quickstart's experiment."""
    from atmossl.build import build_data, build_module
    from atmossl.cli import compose_config
    from atmossl.data.loader import Collate, SampleKey
    from atmossl.schema import TrainConfig, parse

    values = compose_config("train", ["experiment=quickstart"])
    config: TrainConfig = parse(TrainConfig, values)
    datamodule, statistics = build_data(config)
    module = build_module(config, statistics, values)
    with traced() as trace:
        samples = datamodule.train_set.__getitems__([SampleKey(0, 0)])
        batch = Collate(batch_size=1)(samples)
        module.objective(module.model, batch)
    return trace


def one_written_date() -> Trace:
    """`atmossl predict` of one date with the shipped checkpoint, from its composed settings on."""
    from atmossl.cli import compose_config
    from atmossl.commands.predict import predict

    with tempfile.TemporaryDirectory() as folder:
        settings = ["task=forecast", "init_time=1959-02-12T00", f"output={folder}/one.zarr"]
        values = compose_config("predict", settings)
        with traced() as trace:
            predict(values)
    return trace


def one_written_plan() -> Trace:
    """The same date from a plan on: checkpoint and store are open, and their settings checked."""
    from atmossl.api import find_task, load, open_data
    from atmossl.data.store import StoreRequest, open_segment
    from atmossl.inference.plan import Options, plan_prediction
    from atmossl.inference.writer import write

    trained = load("default", device="cpu").trained
    needs = StoreRequest.of(trained.specs)
    segment = open_segment(
        "sample", open_data("sample"), "sample", variables=needs.variables, levels=needs.levels
    )
    options = Options(overlap=0.5, batch_size=16, device="cpu")
    plan = plan_prediction(trained, find_task("forecast", {}), [segment], options)
    times = np.array(["1959-02-12T00"], segment.times.dtype)
    with tempfile.TemporaryDirectory() as folder, traced() as trace:
        write(plan, times, Path(folder) / "one.zarr")
    return trace


def modules() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def function_lengths(trees: dict[Path, ast.Module]) -> list[int]:
    """Lines of every function and method, signature and docstring included."""
    return [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def undocumented(trees: dict[Path, ast.Module]) -> list[str]:
    """Modules, and public classes and functions at their top, that have no docstring."""
    names = []
    for path, tree in trees.items():
        where = str(path.relative_to(PACKAGE))
        if ast.get_docstring(tree) is None:
            names.append(where)
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            if node.name[0] != "_" and ast.get_docstring(node) is None:
                names.append(f"{where}: {node.name}")
    return names


def main() -> None:
    take_no_options(__doc__)
    sample, written, trees = one_training_sample(), one_written_date(), modules()
    from_plan = one_written_plan()
    lengths, bare = function_lengths(trees), undocumented(trees)
    traces = {"store to loss": sample, "predict to file": written, "plan to file": from_plan}
    for name, trace in traces.items():
        sys.stderr.write(f"{name}: {sorted(trace.files)}\n  {' < '.join(trace.deepest)}\n")
    sys.stderr.write(f"without docstring: {bare}\n")
    lines = {path: len(path.read_text().splitlines()) for path in trees}
    finish(
        "house",
        {
            "files_store_to_loss": len(sample.files),
            "depth_store_to_loss": len(sample.deepest),
            "files_predict_to_file": len(written.files),
            "depth_predict_to_file": len(written.deepest),
            "files_plan_to_file": len(from_plan.files),
            "function_p90": float(np.percentile(lengths, 90)),
            "function_longest": max(lengths),
            "module_longest": max(lines.values()),
            "package_lines": sum(lines.values()),
            "undocumented_public": len(bare),
        },
    )


if __name__ == "__main__":
    main()
