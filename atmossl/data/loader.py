"""Batches through worker processes. Workers import this module, so Lightning stays out of it."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

from torch.utils.data import DataLoader, get_worker_info

from atmossl.batch import Batch, collate_views
from atmossl.data.limits import show_in_one_line
from atmossl.data.transfer import Arena, Packed
from atmossl.process_lifetime import end_with_creator
from atmossl.stops import leave_to_creator, start_worker_server


@dataclass(frozen=True)
class Collate:
    """Samples to a batch, which knows how many of `batch_size` were skipped; packed in a worker.

    Raises ValueError if none is left.
    """

    batch_size: int

    def __call__(self, samples: list) -> Batch | Packed[Batch]:
        if not samples:
            raise ValueError(
                f"none of {self.batch_size} samples of a batch could be read; the warnings before "
                "name the chunks. data.unreadable=raise stops at the first"
            )
        views, ids = zip(*samples, strict=True)
        skipped = self.batch_size - len(samples)
        if get_worker_info() is None:
            return replace(collate_views(list(views), list(ids)), num_skipped=skipped)
        arena = Arena.of_samples([view for own in views for view in own])
        batch = collate_views(list(views), list(ids), arena.empty)
        return Packed.of(replace(batch, num_skipped=skipped), arena)


class WorkerDied(ChildProcessError):
    """A worker process ended, by lack of memory for example."""


def worker_context() -> Any:
    """Workers are forked from a server that has imported what they need and holds no threads:
    they start fast, share its memory, and inherit nothing of the training process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["atmossl.data.loader", "atmossl.data.windows"])
    start_worker_server()
    return context


def _start_worker(number: int) -> None:
    """Torch's own watch looks at the server that forked the worker, every 5 seconds."""
    del number
    end_with_creator()
    show_in_one_line()
    leave_to_creator()


LookAhead = Callable[[Sequence[Batch]], object]


class WindowLoader(DataLoader):
    """A loader that says which samples were being read when a worker died, and passes on what a
    worker refuses in its own words.

    describe: names of the samples of the n-th batch that is delivered.
    look_ahead: is shown every `accumulate` batches, before the first of them is delivered.
    """

    def __init__(
        self,
        *args: Any,
        describe: Callable[[int], str],
        accumulate: int = 1,
        look_ahead: LookAhead | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, worker_init_fn=_start_worker, **kwargs)
        self._describe = describe
        self._accumulate = accumulate
        self._look_ahead = look_ahead

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        batches = self._read()
        while group := list(islice(batches, self._accumulate)):
            if self._look_ahead is not None:
                self._look_ahead(group)
            yield from group

    def _read(self) -> Iterator[Batch]:
        batches = super().__iter__()
        mapped = deque(maxlen=self.num_workers * ((self.prefetch_factor or 0) + 2))
        for number in count():
            try:
                batch = next(batches)
            except StopIteration:
                return
            except ValueError as error:
                if not str(error).startswith("Caught "):
                    raise
                raise _in_own_words(error) from error
            except RuntimeError as error:
                if "exited unexpectedly" not in str(error):
                    raise
                raise WorkerDied(
                    f"{error}; the batch awaited was {self._describe(number)}. Workers need "
                    "memory: lower data.num_workers, data.batch_size or data.prefetch"
                ) from error
            if isinstance(batch, Packed):
                mapped.append(batch.segment)
                batch = batch.unpack()
            yield batch


def _in_own_words(error: ValueError) -> ValueError:
    """Without the worker's traceback, which torch puts before the message."""
    return type(error)(str(error).strip().splitlines()[-1].partition(": ")[2])
