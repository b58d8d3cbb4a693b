"""Jobs by workers: in this process, and by Ray where it is installed."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from conftest import write_recipe
from fastdraft import cli, ray_workers
from fastdraft.errors import DataError, FastDraftError, Interrupted, MissingExtra
from fastdraft.ray_workers import BEGUN_EACH, LOST, WAITING_EACH, RayWorkers
from fastdraft.recipe.recipe import load_recipe
from fastdraft.workers import Job, LocalWorkers, Workers


def test_without_the_extra_a_cluster_is_refused_in_one_line_before_anything_runs(
    tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_workers, "find_spec", lambda name: None)
    recipe = write_recipe(tmp_path, tiny_target)
    assert cli.main(["run", str(recipe), "--ray", "auto", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "fastdraft: ray is not installed; this needs the extra 'ray'; pip install 'fastdraft[ray]'"
    )
    assert not (tmp_path / "runs").exists()


def test_a_missing_extra_is_the_same_error_on_another_machine() -> None:
    found = MissingExtra("ray", "ray")
    assert str(type(found)(*found.args)) == str(found)


@pytest.mark.parametrize(
    ("arguments", "cluster"),
    [([], None), (["run.cluster.kind=ray", "run.cluster.address='10.0.0.1:6379'"], "10.0.0.1:6379")],
)
def test_a_cluster_is_no_part_of_a_recipe_that_names_none(arguments: list[str], cluster: str | None) -> None:
    found = load_recipe("starter", arguments)
    assert (found.run.cluster and found.run.cluster.address) == cluster
    assert ("cluster" in found.dump()) == bool(cluster)


@pytest.mark.parametrize("answers", [False, True])
def test_a_cluster_that_does_not_answer_is_told_in_one_line(
    tmp_path: Path,
    tiny_target: Path,
    answers: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_workers, "REACHED_SECONDS", 3.0)
    recipe, begun = write_recipe(tmp_path, tiny_target), time.monotonic()
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if answers:  # something, but no cluster
            port.listen()
        address = f"127.0.0.1:{port.getsockname()[1]}"
        assert cli.main(["run", str(recipe), "--ray", address, "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastdraft: run.cluster.address: {address}: no answer within 3 s; a Ray cluster")
    assert time.monotonic() - begun < 30
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Ref:
    """What an actor gives, or will give."""

    found: Any = None
    there = False


class Items:
    """What a job yields, and that it has ended."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments, self.refs, self.end = arguments, list[Ref](), Ref()

    there = property(lambda self: bool(self.refs) or self.end.there)

    def completed(self) -> Ref:
        return self.end

    def __next__(self) -> Ref:
        assert self.there, "Ray would wait here, and nobody would obey a stop"
        if not self.refs:
            if isinstance(self.end.found, RayError) and not isinstance(self.end.found, RayTaskError):
                raise self.end.found
            raise StopIteration
        return self.refs.pop(0)


class FakeRay(ModuleType):
    """Ray as the code sees it, in one thread: at each `wait` every actor works off one of its jobs.

    The numbers of actors in `slow` do nothing; those in `dying` die at their next job, which has yielded once.
    """

    def __init__(self, gpus: int = 0) -> None:
        super().__init__("ray")
        names = {"RayError": RayError, "RayTaskError": RayTaskError}
        names |= {name: type(name, (RayError,), {}) for name in ("ActorDiedError", "WorkerCrashedError")}
        self.exceptions = SimpleNamespace(**names)
        self.actors, self.slow, self.dying, self.killed = list[Any](), set[int](), set[int](), list[Any]()
        self.nodes = lambda: [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": float(gpus)}}] * 3
        self.put = lambda value: value

    def remote(self, cls: Any) -> Any:
        return SimpleNamespace(options=lambda **how: SimpleNamespace(remote=partial(self._actor, cls)))

    def _actor(self, cls: Any, *arguments: Any) -> Any:
        actor = SimpleNamespace(queue=[], did=[], dead=False, number=len(self.actors), it=cls(*arguments))
        actor.open = SimpleNamespace(remote=lambda: self._ended(actor.it.open))
        how = SimpleNamespace(remote=lambda *what: actor.queue.append(Items(what)) or actor.queue[-1])
        actor.run = SimpleNamespace(options=lambda **_: how)
        self.actors.append(actor)
        return actor

    def _ended(self, work: Any) -> Ref:
        ref = Ref()
        ref.found, ref.there = work(), True
        return ref

    def kill(self, actor: Any) -> None:
        actor.dead = True
        self.killed.append(actor.number)

    def wait(self, refs: Any, num_returns: int = 1, timeout: float = 0, fetch_local: bool = True) -> Any:
        assert refs
        for actor in self.actors if timeout else ():
            if actor.queue and actor.number not in self.slow and not actor.dead:
                self._work(actor)
        return [ref for ref in refs if ref.there][:num_returns], []

    def _work(self, actor: Any) -> None:
        items, dies = actor.queue.pop(0), actor.number in self.dying
        actor.did.append(items.arguments)
        error: Exception | None = None
        try:
            for place, found in enumerate(actor.it.run(*items.arguments)):
                if not (dies and place):
                    items.refs.append(self._ended(lambda found=found: found))
        except Exception as raised:
            error = RayTaskError(raised)
            items.refs.append(self._ended(lambda: error))
        if dies:
            actor.dead, error = True, self.exceptions.ActorDiedError("killed")
            for other in actor.queue:
                other.end.found, other.end.there = error, True
        items.end.found, items.end.there = error, True

    def get(self, ref: Ref) -> Any:
        if isinstance(ref.found, RayError):
            raise ref.found
        return ref.found


class Squares:
    """A worker."""

    def square(self, number: int) -> int:
        if number < 0:
            raise DataError(f"{number}: negative", "take another")
        return number * number

    def up_to(self, number: int) -> Iterator[int]:
        yield from range(number)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    found = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", found)
    monkeypatch.setattr(ray_workers.time, "sleep", lambda seconds: None)
    return found


def job(number: int, method: str = "square") -> Job:
    return Job((method, number), method, lambda: (number,))


def squares(workers: Workers, count: int) -> list[int]:
    return [workers.take(job(n), (job(n + more) for more in range(1, count - n))) for n in range(count)]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_results_come_in_the_order_asked_whoever_did_the_jobs(fake: FakeRay, count: int) -> None:
    workers = RayWorkers(Squares, count, "cpu") if count else LocalWorkers(Squares)
    workers.open()
    assert squares(workers, 40) == [n * n for n in range(40)]
    assert list(workers.stream(job(7, "up_to"))) == list(range(7))
    assert len(fake.actors) == count
    assert sum(len(actor.did) for actor in fake.actors) == (41 if count else 0), "each job once"
    assert all(actor.did for actor in fake.actors), "everybody works"


def test_no_more_is_begun_than_workers_and_memory_can_take(fake: FakeRay) -> None:
    workers, begun = RayWorkers(Squares, 2, "cpu"), list[int]()
    fake.slow = {1}

    def ahead() -> Iterator[Job]:
        for number in range(1, 1000):
            begun.append(number)
            yield job(number)

    assert workers.take(job(0), ahead()) == 0
    assert len(begun) == WAITING_EACH * 2, "an endless plan is not read to its end"
    assert len(fake.actors[1].queue) <= BEGUN_EACH


@pytest.mark.parametrize("method", ["square", "up_to"])
def test_a_lost_worker_is_replaced_and_its_jobs_are_done_again(fake: FakeRay, method: str) -> None:
    workers = RayWorkers(Squares, 2, "cpu")
    fake.dying = {0, 1, 2}
    asked = [job(number, method) for number in range(6)]
    found = [list(workers.stream(each, asked)) for each in asked]
    assert found == [
        list(LocalWorkers(Squares).stream(each)) if method == "up_to" else [n * n]
        for n, each in enumerate(asked)
    ]
    assert len(fake.actors) == 5


def test_a_job_that_costs_every_worker_ends_the_run_in_one_line(fake: FakeRay) -> None:
    fake.dying = set(range(100))
    with pytest.raises(
        FastDraftError, match=rf"job \('square', 3\): its worker was lost {LOST + 1} times \(killed\)"
    ):
        RayWorkers(Squares, 1, "cpu").take(job(3))


def test_what_a_slow_worker_has_is_done_by_an_idle_one_too(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = RayWorkers(Squares, 2, "cpu")
    assert squares(workers, 4) == [0, 1, 4, 9]
    fake.slow = {0}
    assert squares(workers, 30) == [n * n for n in range(30)]
    assert list(workers.stream(job(5, "up_to"))) == list(range(5))


def test_an_error_of_the_work_is_raised_as_it_is_and_a_stop_is_obeyed(fake: FakeRay) -> None:
    with pytest.raises(DataError, match="-2: negative; take another"):
        RayWorkers(Squares, 2, "cpu").take(job(-2))

    def stop() -> None:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        RayWorkers(Squares, 1, "cpu", check=stop).take(job(2))


def test_what_is_not_wanted_any_more_is_ended_with_its_worker(fake: FakeRay) -> None:
    workers = RayWorkers(Squares, 2, "cpu")
    fake.slow = {1}
    workers.take(job(0), [job(1)])
    workers.drop()
    assert fake.killed == [1]
    assert workers.take(job(1)) == 1
    workers.close()
    assert fake.killed == [1, 0, 2]


@pytest.mark.parametrize(
    ("place", "cpus", "gpus", "count", "share"),
    [
        ("device", 0, 8, 24, "gpus 1, cpus 1"),
        ("device", 0, 0, 3, "cpus 4"),
        ("node", 2, 8, 6, "cpus 2"),
        ("cpu", 0, 0, 3, "cpus 4"),
        ("cpu", 64, 0, 3, "cpus 4"),
        ("none", 0, 0, 1, "cpus 0"),
    ],
)
def test_there_are_as_many_workers_as_the_cluster_has_room_for(
    monkeypatch: pytest.MonkeyPatch, place: Any, cpus: int, gpus: int, count: int, share: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay(gpus))
    workers = RayWorkers(Squares, 0, place, cpus)
    assert (workers.count, workers.share) == (count, share)
    assert RayWorkers(Squares, 7, place, cpus).count == 7
