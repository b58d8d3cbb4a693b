"""Workers on many machines: Ray places them, carries what they are asked and what they give, and tells which
were lost.

Here only an order is kept: which job is begun next, and which is begun once more because its worker was lost
or is much slower than the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from itertools import islice
from typing import Any, Literal

from fastdraft.errors import FastDraftError, MissingExtra
from fastdraft.workers import Job

Place = Literal["device", "node", "cpu", "none"]
"""What a worker has for itself: a GPU where the cluster has them, else a machine's CPUs; these in any case;
a few CPUs; or nothing (it asks a server)."""

REACHED_SECONDS = 18.0
FEW_CPUS = 4
BEGUN_EACH = 2  # jobs that a worker has at a time: while one is done, the next already lies there
WAITING_EACH = 4  # begun or done, and not taken yet
SLOW = 3.0  # times the middle job's seconds: then an idle worker does it too
LOST = 10  # workers that one job may cost
TOLD_SECONDS = 30.0


def require_ray() -> None:
    """Looks whether Ray is installed, without loading it."""
    if find_spec("ray") is None:
        raise MissingExtra("ray", "ray")


def connect(address: str) -> None:
    """Joins the cluster; `auto` is the one of this machine, else `local`: a new one of it alone."""
    require_ray()
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if named not in ("", "local"):
        _reach(named)
    before = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        ray.init(named or None, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise _unreachable(named or address, str(error)) from None
    finally:
        with contextlib.suppress(ValueError):  # not the main thread, which nobody stops by a signal
            signal.signal(signal.SIGTERM, before)  # Ray's own handler would end the run without a word


def _reach(address: str) -> None:
    """Tries the address in a process of its own: in this one Ray waits for minutes, then ends it."""
    program = "import logging, sys, ray; ray.init(sys.argv[1], logging_level=logging.FATAL)"
    try:
        found = subprocess.run(
            [sys.executable, "-c", program, address],
            capture_output=True,
            text=True,
            timeout=REACHED_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _unreachable(address, f"no answer within {REACHED_SECONDS:.0f} s") from None
    if found.returncode:
        raise _unreachable(address, (found.stderr.strip().splitlines() or ["no answer"])[-1])


def _unreachable(address: str, why: str) -> FastDraftError:
    rule = "a Ray cluster of the same releases of Ray and Python must answer there"
    return FastDraftError(f"run.cluster.address: {address}: {why[:160]}; {rule}", "look at `ray status`")


class RayWorker:
    """The actor: holds one worker, made behind its start, so that what is wrong is told as an error."""

    def __init__(self, make: Callable[[], Any], release: str, folder: str) -> None:
        self._make, self._release, self._worker = make, release, None
        self._where = f"{socket.gethostname()}:{os.getpid()}"
        with contextlib.suppress(OSError):  # paths of a recipe are relative to where it was started
            os.chdir(folder)

    def open(self) -> None:
        """Makes what works, if that was not done."""
        if self._release != (found := metadata.version("fastdraft")):
            rule = f"all machines must have the release that was started, {self._release}"
            raise FastDraftError(f"{self._where}: fastdraft {found}; {rule}", "install that one there")
        if self._worker is None:
            self._worker = self._make()

    def run(self, method: str, arguments: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
        """(who, each of what the method gives)."""
        self.open()
        found = getattr(self._worker, method)(*arguments)
        for each in found if isinstance(found, Iterator) else (found,):
            yield self._where, each


@dataclass
class _Attempt:
    """A job given to a worker."""

    worker: Any
    items: Any  # Ray's generator
    ended: Any  # a reference that is there once all of them are


@dataclass
class _Begun:
    job: Job
    since: float = field(default_factory=time.monotonic)
    attempts: list[_Attempt] = field(default_factory=list)
    done: _Attempt | None = None  # the first that ended
    lost: int = 0


class RayWorkers:
    """`count` actors, each with one worker; `check` is called while nothing is there yet."""

    def __init__(
        self,
        make: Callable[[], Any],
        count: int,
        place: Place,
        cpus: int = 0,
        check: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        import ray

        self._ray, self._check, self._say, self.last = ray, check, say, ""
        # The first once, however many workers.
        self._arguments = ray.put(make), metadata.version("fastdraft"), os.getcwd()
        own, self.count = _share(ray, place, cpus, count)
        self.share = ", ".join(f"{name.removeprefix('num_')} {each:g}" for name, each in own.items())
        self._actor = ray.remote(RayWorker).options(scheduling_strategy="SPREAD", **own)
        self._workers = [self._actor.remote(*self._arguments) for _ in range(self.count)]
        self._begun: dict[Hashable, _Begun] = {}
        self._seconds: deque[float] = deque(maxlen=64)

    def open(self) -> None:
        """Until one of them can work."""
        opening = {worker.open.remote(): worker for worker in self._workers}
        told, lost = time.monotonic(), 0
        while True:
            self._check()
            ready, _ = self._ray.wait(list(opening), timeout=0.5, fetch_local=False)
            try:
                if ready:
                    self._get(ready[0])
                    return
            except self._ray.exceptions.RayError as error:
                lost += 1
                if lost > LOST:
                    raise self._given_up("no worker could start", error) from None
                new = self._replace(opening.pop(ready[0]))
                opening[new.open.remote()] = new
            if time.monotonic() - told > TOLD_SECONDS:
                told = time.monotonic()
                self._say("waiting for the first worker: it loads a model, or the cluster has no room for it")

    def take(self, job: Job, ahead: Iterable[Job] = ()) -> Any:
        """The job's result; see `Workers`."""
        begun = self._until(job, ahead, lambda begun: begun.done is not None)
        assert begun.done
        try:
            self.last, found = self._get(next(begun.done.items))
        except self._ray.exceptions.RayError as error:  # the machine that held it is gone
            self._lose(begun, begun.done, error)
            return self.take(job, ahead)
        del self._begun[job.key]
        return found

    def stream(self, job: Job, ahead: Iterable[Job] = ()) -> Iterator[Any]:
        """What the job yields; see `Workers`."""
        given, wanted = 0, [job, *islice(ahead, WAITING_EACH * self.count)]
        while True:
            begun = self._until(job, wanted[1:], lambda begun: bool(begun.attempts))
            attempt, number = begun.done or begun.attempts[0], 0
            try:
                while True:
                    while not self._wait([attempt.items]):
                        self._begin(wanted)
                        self._help(begun)
                        if begun.done not in (None, attempt):  # another one was quicker
                            attempt, number = begun.done, 0
                    reference = next(attempt.items, None)
                    if reference is None:
                        del self._begun[job.key]
                        return
                    if number >= given:  # those before were given already, by a worker that was lost
                        self.last, found = self._get(reference)
                        given += 1
                        yield found
                    number += 1
            except self._ray.exceptions.RayError as error:
                self._lose(begun, attempt, error)

    def drop(self) -> None:
        """Forgets what was not taken; a worker that is still at it is replaced, for nothing else ends it."""
        self._settle()
        for attempt in self._running():
            if attempt.worker in self._workers:
                self._ray.kill(attempt.worker)
                self._replace(attempt.worker)
        self._begun = {}

    def close(self) -> None:
        """Ends the workers, whatever they do."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers, self._begun = [], {}

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def _until(self, job: Job, ahead: Iterable[Job], is_there: Callable[[_Begun], bool]) -> _Begun:
        """Begins jobs and waits until the first is there."""
        wanted = [job, *islice(ahead, WAITING_EACH * self.count)]
        while True:
            self._settle()
            self._begin(wanted)
            begun = self._begun[job.key]
            if is_there(begun):
                return begun
            self._help(begun)
            self._wait([attempt.ended for attempt in self._running()])

    def _wait(self, references: list[Any]) -> list[Any]:
        """Those that are there, for a moment's waiting; obeys a request to stop."""
        self._check()
        self._settle()
        ready: list[Any] = self._ray.wait(references, timeout=0.5, fetch_local=False)[0]
        return ready

    def _running(self) -> list[_Attempt]:
        return [attempt for begun in self._begun.values() if not begun.done for attempt in begun.attempts]

    def _loads(self) -> Counter[int]:
        """Jobs that lie with each worker, by its identity."""
        return Counter(id(attempt.worker) for attempt in self._running())

    def _begin(self, wanted: list[Job]) -> None:
        """Gives free workers what is wanted, the first job in any case."""
        loads = self._loads()
        for number, job in enumerate(wanted):
            begun = self._begun.get(job.key)
            if begun and begun.attempts:
                continue
            free = min(self._workers, key=lambda worker: loads[id(worker)])
            full = loads[id(free)] >= BEGUN_EACH or len(self._begun) >= WAITING_EACH * self.count
            if full and number:
                return
            self._attempt(self._begun.setdefault(job.key, _Begun(job)), free)
            loads[id(free)] += 1

    def _attempt(self, begun: _Begun, worker: Any) -> None:
        arguments = begun.job.method, begun.job.arguments()
        items = worker.run.options(num_returns="streaming").remote(*arguments)
        begun.attempts.append(_Attempt(worker, items, items.completed()))

    def _help(self, begun: _Begun) -> None:
        """An idle worker does too what all others wait for, if that takes much longer than usual."""
        usual = statistics.median(self._seconds) if self._seconds else float("inf")
        late = time.monotonic() - begun.since > SLOW * usual * len(begun.attempts)
        loads = self._loads()
        if late and (idle := [worker for worker in self._workers if not loads[id(worker)]]):
            self._attempt(begun, idle[0])

    def _settle(self) -> None:
        """Notes which attempts have ended; the jobs of lost workers are to be begun again."""
        running = self._running()
        if not running:
            return
        ended, _ = self._ray.wait(
            [a.ended for a in running], num_returns=len(running), timeout=0, fetch_local=False
        )
        found = set(ended)
        for begun in self._begun.values():
            for attempt in [a for a in begun.attempts if not begun.done and a.ended in found]:
                try:
                    self._ray.get(attempt.ended)
                except self._ray.exceptions.RayTaskError:
                    pass  # an error of the work: it is raised when the result is taken
                except self._ray.exceptions.RayError as error:
                    self._lose(begun, attempt, error)
                    continue
                begun.done = begun.done or attempt
                self._seconds.append(time.monotonic() - begun.since)

    def _lose(self, begun: _Begun, attempt: _Attempt, error: Exception) -> None:
        """The job is to be begun again, and its worker, if that is dead, is replaced by a new one."""
        if attempt not in begun.attempts:
            return  # it was noticed before
        begun.attempts.remove(attempt)
        begun.done, begun.lost = None, begun.lost + 1
        if begun.lost > LOST:
            raise self._given_up(f"job {begun.job.key}: its worker was lost {begun.lost} times", error)
        time.sleep(begun.lost - 1)  # whatever ends one after the other may need a while to pass
        gone = isinstance(
            error, self._ray.exceptions.ActorDiedError | self._ray.exceptions.WorkerCrashedError
        )
        if gone and attempt.worker in self._workers:
            self._replace(attempt.worker)

    def _replace(self, worker: Any) -> Any:
        new = self._workers[self._workers.index(worker)] = self._actor.remote(*self._arguments)
        return new

    def _given_up(self, found: str, error: Exception) -> FastDraftError:
        why = " ".join(str(error).split())[:200]
        return FastDraftError(f"run.cluster: {found} ({why})", "look into Ray's logs of that worker")


def _share(ray: Any, place: Place, cpus: int, count: int) -> tuple[dict[str, float], int]:
    """What each worker is given, and how many there are: `count`, or as many as the cluster has room for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    of_nodes = [int(node.get("CPU", 0)) for node in nodes]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if place == "device" and gpus:
        return {"num_gpus": 1, "num_cpus": 1}, count or gpus
    if place == "none":
        return {"num_cpus": 0}, count or 1
    least = min([each for each in of_nodes if each], default=1)
    own = cpus or (min(FEW_CPUS, least) if place == "cpu" else least)
    own = min(own, least)  # more threads than CPUs are the recipe's wish; more CPUs than there are never come
    return {"num_cpus": own}, count or max(1, sum(each // own for each in of_nodes))
