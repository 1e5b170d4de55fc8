"""The benchmark of inference runs, and what it calls the network's part is one."""

from benchmarks.inference import one_run


def test_a_run_counts_its_fields_and_the_time_of_the_network() -> None:
    found = one_run("default", "temporal_interpolation", 1, 2)
    assert found["fields"] == 15  # five variables on three levels at one time
    assert 0.0 < found["model_seconds"] < found["seconds"]
