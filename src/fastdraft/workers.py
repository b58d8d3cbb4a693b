"""What does the jobs of a stage: an object in this process, or copies of it on many machines.

A stage asks for one job after the other with `take` or `stream`, in its own order, and names those that will
be asked for next. What a job gives depends on nothing but its arguments, so it does not matter who did it,
when, or how often: `LocalWorkers` and ray_workers.py give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol


@dataclass(frozen=True)
class Job:
    """A call of one method of a worker."""

    key: Hashable
    method: str
    arguments: Callable[[], tuple[Any, ...]]  # made when the job is begun


class Workers(Protocol):
    """Those who do the jobs of one stage; `close` lets go of them and of what they hold."""

    count: int
    """How many jobs are done at a time; 0 where each is done when it is asked for."""
    last: str
    """Who did what was taken last; empty in this process."""

    def open(self) -> None:
        """Waits until one of them can work: it may have to load a model."""
        ...

    def take(self, job: Job, ahead: Iterable[Job] = ()) -> Any:
        """What the job's method returns; free workers begin those that are likely to be asked for next."""
        ...

    def stream(self, job: Job, ahead: Iterable[Job] = ()) -> Iterator[Any]:
        """What the job's method, a generator, yields."""
        ...

    def drop(self) -> None:
        """What was begun ahead and not taken is of no use any more."""
        ...

    def close(self) -> None: ...


class LocalWorkers:
    """One worker, in this process; nothing is done ahead."""

    count, last = 0, ""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    @cached_property
    def worker(self) -> Any:
        """Made when it is first asked for."""
        return self._make()

    def open(self) -> None:
        _ = self.worker

    def take(self, job: Job, ahead: Iterable[Job] = ()) -> Any:
        return getattr(self.worker, job.method)(*job.arguments())

    def stream(self, job: Job, ahead: Iterable[Job] = ()) -> Iterator[Any]:
        yield from self.take(job)

    def drop(self) -> None:
        pass

    def close(self) -> None:
        self.__dict__.pop("worker", None)
