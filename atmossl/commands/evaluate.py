"""`atmossl evaluate`: scores tasks or forecast stores, and writes a report."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from atmossl.at_work import check_is_free, keeping, owned
from atmossl.atomic_files import write_atomically
from atmossl.batch import PRIMARY
from atmossl.commands.predict import note_out_of_training
from atmossl.data.catalog import check_split
from atmossl.evaluation.report.content import TaskReport
from atmossl.evaluation.report.tables import mean_over_levels, print_summary, summarise
from atmossl.evaluation.report.verdicts import verdicts
from atmossl.evaluation.report.write import write_report
from atmossl.inference.checkpoint import TrainedModel, entries_for, load_checkpoint, open_for
from atmossl.progress import console_of_output, note
from atmossl.schema import EvaluateConfig, device_for, parse
from atmossl.scorecard import check_tasks, compare_forecasts, provenance_of, score_tasks
from atmossl.value_faults import as_written, listed


def evaluate(values: Mapping[str, Any], command: str = "atmossl evaluate") -> Path:
    """Score tasks or forecast stores on held-out dates; returns the report's folder.

    command: the command line that the report shows, with which it can be repeated.
    """
    config: EvaluateConfig = parse(EvaluateConfig, values)
    with owned(config.output, "output"), keeping("nothing is kept of the scores"):
        check_is_free(config.output)
        if not config.forecasts:
            check_tasks(config.tasks)
        check_split(config.data, config.split)
        reports = _write_reports(config, command)
    console = Console(width=max(120, Console().width), markup=False)
    for report in reports:
        summary = mean_over_levels(summarise(report.table, model_name=report.model_name))
        print_summary(summary, console, title="RMSE ratios and scores, mean over levels")
    print_summary(verdicts(reports), console, title="against the best baseline")
    console.print(f"report: {config.output / 'index.html'}", highlight=False)
    return config.output


def _write_reports(config: EvaluateConfig, command: str) -> list[TaskReport]:
    trained = load_checkpoint(config.checkpoint, config.plugins)
    if config.forecasts:
        reports = [compare_forecasts(config, entries_for(trained, config.data)[PRIMARY])]
    else:
        reports = _score_tasks(config, trained)
    console_of_output().print("scores are done; drawing the report")
    provenance = provenance_of(config, trained, command, reports)
    write_atomically(config.output, lambda folder: write_report(reports, provenance, folder))
    return reports


def _score_tasks(config: EvaluateConfig, trained: TrainedModel) -> list[TaskReport]:
    test, training = (
        open_for(trained, config.data, split, input_limits=config.input_limits)
        for split in (config.split, "train")
    )
    gappy = sorted({name for segment in test for name in segment.may_miss})
    if config.ridge and gappy:
        note(f"no ridge regression of {listed(gappy)}, which may have missing values")
    not_primary = sorted({s.data for s in trained.specs if s.role == "predict"} - {PRIMARY})
    if not_primary:
        note(
            f"streams with data={as_written(not_primary)} are not scored here; predict writes them "
            "into groups, which evaluate forecasts=[OUTPUT.zarr/GROUP] data=GROUP scores"
        )
    device, tell = device_for(config.accelerator), partial(note_out_of_training, printed=set())
    return score_tasks(config, trained, test, training, device, tell)
