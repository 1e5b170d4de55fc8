"""`atmossl info` says what a run needs, and refuses with advice that helps."""

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from atmossl.cli import compose_config, main
from atmossl.commands import cost
from atmossl.commands.cost import Estimate, estimate, resident_bytes
from atmossl.schema import TrainConfig, parse

RUN = (
    "experiment=quickstart", "model=tiny", "model.num_layers=1", "model.num_decoder_layers=1",
    "data.window={time: 5, lat: 8, lon: 16}", "trainer.precision=bf16-mixed", "optimizer=adamw",
    "stream.atmosphere.variables=[temperature]",
)  # fmt: skip


def found(*more: str) -> Estimate:
    values = compose_config("train", [*RUN, *more])
    values.pop("hydra", None)
    config: TrainConfig = parse(TrainConfig, values)
    return estimate(config)


def test_a_run_that_does_not_fit_is_refused_with_advice_that_makes_it_fit(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU with two thirds of the memory that a batch of 16 needs."""
    whole = found("data.batch_size=16")
    monkeypatch.setattr(cost, "estimate", lambda *_, **__: whole)
    monkeypatch.setattr(cost, "matmul_rate", lambda *_: 1e12)  # old processors are slow in half
    enough, lacking = ((share * whole.process_bytes) / 2**30 for share in (1.01, 0.67))
    arguments = ["info", *RUN, "data.batch_size=16", "trainer.accelerator=gpu", "--check"]
    assert main([*arguments, f"memory={enough}"]) == 0
    table = capsys.readouterr().out
    # the rate of this device says nothing about the one that is asked about
    assert re.search(r"^fits: needs .* of .* GiB per device$", table, re.MULTILINE)
    assert "MiB" not in table and "samples/s" not in table
    assert main([*arguments, f"memory={lacking}"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "try trainer.recompute=full; or" in told
    assert told.startswith("atmossl info: does not fit: needs ")
    advised = re.findall(r"data\.batch_size=\d+|trainer\.accumulate=\d+", told)
    assert len(advised) == 2
    assert found(*advised).fits(lacking)


def test_a_process_on_the_host_needs_more_than_its_tensors() -> None:
    plain = Estimate(None, {}, 0.5, 0, 1, 2**30, 1, on_host=True)  # pyright: ignore
    libraries = resident_bytes()
    assert plain.process_bytes >= libraries + 1.5 * 2**30
    assert plain.fits(1.001 * plain.process_bytes / 2**30)
    assert not plain.fits(0.99 * plain.process_bytes / 2**30)
    on_gpu = replace(plain, on_host=False)
    assert on_gpu.fits(1.001 * on_gpu.process_bytes / 2**30) and not on_gpu.fits(1.0)


@pytest.mark.parametrize("objective", ["contrastive", "atmodist"])
def test_a_pair_of_windows_is_read_where_one_is_otherwise(objective: str) -> None:
    plain, pairs = (
        found(f"objective={name}", "data.batch_size=2") for name in ("masked", objective)
    )
    assert pairs.bytes_per_sample == 2 * plain.bytes_per_sample


def test_memory_held_is_of_this_process_and_not_of_its_parent() -> None:
    block = np.ones(400 * 2**20, np.uint8)  # more than a child needs for its libraries
    words = "from atmossl.commands.cost import resident_bytes; print(resident_bytes())"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert 50 * 2**20 < int(done.stdout) < resident_bytes() - len(block) // 4
