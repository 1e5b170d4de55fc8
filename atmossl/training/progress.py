"""Shows how far a run is: one bar on a terminal, one plain line for each log elsewhere."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from atmossl.progress import LINE_SECONDS, QUIET_SECONDS, Pace, console_of_output, duration_text


class RunProgress(L.Callback):
    """Shows step, loss, learning rate, samples per second and the time that is left.

    The first rank tells them at every log, and the result of every validation in a line of its own.
    Where logs are far apart, and while a validation goes on, a log file gets a line after some
    seconds and every half a minute that says how far the run is.
    The time that is left counts validations and checkpoints, but not the start of the run.

    every: batches from log to log.
    """

    def __init__(
        self,
        *,
        every: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.every = every
        self.console = console or console_of_output()
        self._pace = Pace(clock)
        self._clock = clock
        self._due = 0.0  # when a log file gets its next line
        self._first_step = 0
        self._bar: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._due = self._clock() + QUIET_SECONDS
        self._first_step = trainer.global_step
        if trainer.is_global_zero and self.console.is_terminal:
            self._bar = _new_bar(self.console)
            total, completed = trainer.max_steps, trainer.global_step
            self._bar.add_task("", total=total, completed=completed, told="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        step, batches = trainer.global_step, trainer.accumulate_grad_batches
        if (idx + 1) % batches:
            self._tell_between(
                trainer, f"batch {(idx + 1) % batches} of {batches} of the next step"
            )
            return
        if step == self._first_step + 1:
            self._pace.start(step)  # what a start costs does not come again
        if (idx + 1) % self.every == 0:
            self._tell_log(trainer, step)
        elif self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)
        else:
            seconds_left = self._pace.seconds_left(step, trainer.max_steps)
            left = "" if seconds_left is None else f"{duration_text(seconds_left)} left"
            self._tell_between(trainer, left)

    def _tell_between(self, trainer: L.Trainer, text: str) -> None:
        """Tell a log file how far the run is, if it has heard nothing for a while."""
        if self._bar is not None or self._clock() < self._due:
            return
        self._print(
            ", ".join(filter(None, [f"step {trainer.global_step}/{trainer.max_steps}", text]))
        )

    def _print(self, line: str) -> None:
        self._due = self._clock() + LINE_SECONDS
        self.console.print(line)

    def _tell_log(self, trainer: L.Trainer, step: int) -> None:
        parts = log_parts(trainer.callback_metrics)
        seconds_left = self._pace.seconds_left(step, trainer.max_steps)
        if seconds_left is not None and step < trainer.max_steps:
            parts["left"] = f"{duration_text(seconds_left)} left"
        if self._bar is None:
            self._print(", ".join([f"step {step}/{trainer.max_steps}", *parts.values()]))
            return
        parts.pop("learning rate", None)  # the line is short
        self._bar.update(self._bar.task_ids[0], completed=step, told="  ".join(parts.values()))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if not trainer.is_global_zero:
            return
        batches = trainer.num_val_batches  # of every loader
        done = sum(batches[:dataloader_idx]) + batch_idx + 1
        text = f"validation, batch {done:.0f} of {sum(batches):.0f}"
        self._tell_between(trainer, text)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], told=text)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        values = validation_text(trainer.progress_bar_metrics)
        if values:
            console = self.console if self._bar is None else self._bar.console
            console.print(f"step {trainer.global_step}/{trainer.max_steps}, validation: {values}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _new_bar(console: Console) -> Progress:
    """A progress bar of one line: the bar gets the width that the words leave."""
    columns = (
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[told]}", justify="right"),
    )
    return Progress(*columns, console=console, expand=True)


def log_parts(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The words of a training log, each by its subject."""
    kinds = {
        "loss": ("train/loss", "loss {:.4g}"),
        "learning rate": ("learning_rate", "learning rate {:.2e}"),
        "speed": ("samples_per_s", "{:.3g} samples/s"),
    }
    return {
        name: text.format(float(metrics[key]))
        for name, (key, text) in kinds.items()
        if key in metrics
    }


def validation_text(metrics: Mapping[str, Any]) -> str:
    """The results of a validation in words, from values `KIND/NAME` by kind: `rmse_ratio
    forecast 0.97, ...`."""
    kinds: dict[str, list[str]] = {}
    for key, value in metrics.items():
        kind, _, name = key.partition("/")
        if name and kind != "train":
            kinds.setdefault(kind, []).append(f"{name} {float(value):.4g}")
    return "; ".join(f"{kind} {', '.join(values)}" for kind, values in kinds.items())
