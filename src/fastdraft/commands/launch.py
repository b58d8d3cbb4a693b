"""`--nproc-per-node` and `--nnodes`: the training stages in many processes, on one machine or several.

Decides that the command itself goes through the recipe as ever, holds the run's lock and does every stage that has no use for many
processes; for a training stage it starts one worker for each device by torch's elastic launcher (the machinery of torchrun) and waits.
On several machines the first one does this, and tells the others by a TCP store when a stage begins; these only start their workers.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastdraft import pipeline
from fastdraft.commands.worker import JOB, OUTCOMES, STOP
from fastdraft.console import Console
from fastdraft.errors import FastDraftError, Interrupted, RecipeError
from fastdraft.recipe.recipe import Recipe
from fastdraft.run_folder import FINGERPRINT, read_json, write_json
from fastdraft.stages.context import StageContext

POLL_SECONDS = 0.2
PATIENCE = timedelta(minutes=15)
"""As long does a machine wait for the others at the beginning of a run."""
SHARED_DISK_SECONDS = 60.0
"""After so long what one machine wrote is seen by all, or never."""


@dataclass(frozen=True)
class Machines:
    """Who works on a run."""

    nproc_per_node: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = ""
    master_port: int = 29500
    max_restarts: int = 3

    @property
    def processes(self) -> int:
        return self.nproc_per_node * self.nnodes

    @property
    def leader(self) -> str:
        """Where the first machine is found; left out, it is this one."""
        return self.master_addr or "127.0.0.1"

    def check(self) -> None:
        """Raises:
        FastDraftError: when the arguments contradict each other.
        """
        if not 0 <= self.node_rank < self.nnodes:
            rule = f"must be 0 to {self.nnodes - 1} with --nnodes {self.nnodes}"
            raise FastDraftError(
                "--node-rank", self.node_rank, rule, "give each machine its own number, the first one 0"
            )
        if self.node_rank and not self.master_addr:
            raise FastDraftError(
                "--master-addr",
                "missing",
                "every machine must know the first one",
                "give its name or address",
            )

    def check_devices(self, device: str) -> None:
        """Raises:
        RecipeError: when this machine has fewer devices than it is to have processes.
        """
        import torch

        from fastdraft.modeling.drafts import pick_device

        picked = pick_device(device)
        if picked.type == "cpu":
            return
        count = torch.accelerator.device_count()
        if picked.index is not None:
            raise RecipeError(
                "run.device",
                device,
                "each process takes a device of its own",
                f"set run.device={picked.type}",
            )
        if count < self.nproc_per_node:
            rule = f"--nproc-per-node {self.nproc_per_node} needs as many"
            raise RecipeError(
                "run.device",
                f"{count} {picked.type} device(s)",
                rule,
                f"use --nproc-per-node {count}, or run.device=cpu",
            )


def run(
    recipe: Recipe, console: Console, machines: Machines, *, only: Iterable[str] | None, redo: Iterable[str]
) -> None:
    """`pipeline.run` with the training stages on all machines; on all but the first machine, their share of it.

    Raises:
        FastDraftError: as `pipeline.run`; FastDraftError also when processes or machines are lost.
    """
    machines.check()
    if machines.processes == 1:
        pipeline.run(recipe, console, only=only, redo=redo)
        return
    machines.check_devices(recipe.run.device)
    if machines.nnodes == 1:
        pipeline.run(
            recipe,
            console,
            only=only,
            redo=redo,
            launch=lambda name, whole, context: _launch(name, whole, context, machines),
        )
    elif machines.node_rank == 0:
        _lead(recipe, console, machines, only, redo)
    else:
        _follow(recipe, console, machines)


def _lead(
    recipe: Recipe, console: Console, machines: Machines, only: Iterable[str] | None, redo: Iterable[str]
) -> None:
    """Goes through the recipe, and calls the other machines for every training stage."""
    board = _Board(machines)

    def launch(stage: str, recipe: Recipe, context: StageContext) -> None:
        call = {"stage": stage, "port": _free_port(), "id": uuid.uuid4().hex}
        board.post(call)
        _launch(stage, recipe, context, machines, call)

    error = "an error that is told there"
    try:
        pipeline.run(recipe, console, only=only, redo=redo, launch=launch)
        error = ""
    except FastDraftError as found:
        error = str(found)
        raise
    finally:
        board.end(error)


def _follow(recipe: Recipe, console: Console, machines: Machines) -> None:
    """Starts this machine's workers whenever the first machine calls."""
    context = pipeline.make_context(recipe, console)
    with console.stop.listen():
        board = _Board(machines)
        console.say(f"machine {machines.node_rank} of {machines.nnodes}: waiting for training stages")
        while "stage" in (call := board.next(console)):
            _await_stage(context, call["stage"])
            console.say(f"{call['stage']}: {machines.nproc_per_node} processes on this machine")
            _launch(call["stage"], recipe, context, machines, call)
        board.acknowledge()
        if call["error"]:
            rule, remedy = "all machines end with the first", "mend it there and give the same commands again"
            raise FastDraftError("machine 0", call["error"], rule, remedy)


def _await_stage(context: StageContext, stage: str) -> None:
    """What the first machine wrote must come into sight.

    Raises:
        FastDraftError: when it does not.
    """
    path, begin = context.folder(stage).path / FINGERPRINT, time.monotonic()
    while not path.exists():
        if time.monotonic() - begin > SHARED_DISK_SECONDS:
            rule = "all machines must see one run folder"
            raise FastDraftError(
                path, "not seen from this machine", rule, "set run.folder to a disk that they share"
            )
        time.sleep(POLL_SECONDS)


def _launch(
    stage: str, recipe: Recipe, context: StageContext, machines: Machines, call: dict[str, Any] | None = None
) -> None:
    """Does this machine's part of one stage; returns when all processes of all machines are done.

    Raises:
        FastDraftError: what a worker met. Interrupted: stopped by a signal, after a checkpoint.
        FastDraftError: when processes were lost more than `max_restarts` times.
    """
    with tempfile.TemporaryDirectory(prefix="fastdraft-") as temporary:
        folder = Path(temporary)
        failures: list[str] = []
        prints = machines.node_rank == 0
        job = {
            "stage": stage,
            "quiet": context.console.quiet,
            "prints": prints,
            "restarts": machines.max_restarts,
        }
        write_json(
            folder / JOB, {**job, "recipe": recipe.model_dump(mode="json", by_alias=True, exclude_none=True)}
        )
        agent = threading.Thread(target=_run_agent, args=(folder, machines, call, failures), daemon=True)
        agent.start()
        while agent.is_alive():
            agent.join(POLL_SECONDS)
            if context.console.stop.requested:
                (folder / STOP).touch()
        records = [read_json(path) for path in sorted(folder.glob(OUTCOMES))]
    if records:
        from fastdraft.training.distributed import error_from

        raise error_from(records[0])
    if context.console.stop.requested and failures:
        raise Interrupted(context.folder(stage).path)
    if failures:
        rule = f"all processes must live; {machines.max_restarts} restarts are used up"
        raise FastDraftError(
            stage,
            failures[0],
            rule,
            "progress is saved: find out what ended it, then run the same command again",
        )


def _run_agent(folder: Path, machines: Machines, call: dict[str, Any] | None, failures: list[str]) -> None:
    """The launcher of torchrun, in a thread of its own so that it leaves signals alone; says in `failures` why it gave up."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence("torch.distributed")
    # The launcher's own store would be used again after a restart, with the addresses of lost processes still in it.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    alone = call is None
    config = LaunchConfig(
        min_nodes=machines.nnodes,
        max_nodes=machines.nnodes,
        nproc_per_node=machines.nproc_per_node,
        run_id=uuid.uuid4().hex if call is None else call["id"],
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0" if call is None else f"{machines.leader}:{call['port']}",
        rdzv_configs={"timeout": PATIENCE.total_seconds(), "is_host": machines.node_rank == 0},
        max_restarts=machines.max_restarts,
        monitor_interval=POLL_SECONDS,
        local_addr="127.0.0.1" if alone else _own_address(machines),
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "fastdraft.commands.worker", str(folder))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        ended = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        failures.append(f"process {rank} ended with {ended}")
    except Exception as error:  # the launcher's own: rendezvous, network
        failures.append(" ".join(str(error).split())[:200] or type(error).__name__)


def _silence(name: str) -> None:
    """What the launcher logs about lost processes is told here in one line."""
    for logger in [
        name,
        *(known for known in logging.root.manager.loggerDict if known.startswith(f"{name}.")),
    ]:
        logging.getLogger(logger).setLevel(logging.CRITICAL)


class _Board:
    """Where the first machine tells the others what comes next."""

    def __init__(self, machines: Machines) -> None:
        self._machines, self._number = machines, 0
        self._store = _open_store(machines)

    def post(self, call: dict[str, Any]) -> None:
        self._store.set(f"call-{self._number}", json.dumps(call))
        self._number += 1

    def next(self, console: Console) -> dict[str, Any]:
        """Waits for the first machine's next word.

        Raises:
            FastDraftError: when it is gone. Interrupted: when this machine was asked to stop.
        """
        while True:
            console.stop.check("this machine")
            try:
                if self._store.check([f"call-{self._number}"]):
                    call: dict[str, Any] = json.loads(self._store.get(f"call-{self._number}"))
                    self._number += 1
                    return call
            except RuntimeError as error:
                rule, remedy = (
                    "it leads the run",
                    "see its error, then give the same commands again on all machines",
                )
                raise FastDraftError("machine 0", "gone", rule, remedy) from error
            time.sleep(POLL_SECONDS)

    def acknowledge(self) -> None:
        self._store.add("ended", 1)

    def end(self, error: str) -> None:
        """Lets the others go, and gives them a moment to read it."""
        self.post({"error": error})
        begin = time.monotonic()
        while self._store.add("ended", 0) < self._machines.nnodes - 1 and time.monotonic() - begin < 10:
            time.sleep(POLL_SECONDS)


def _open_store(machines: Machines) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    main, place = machines.node_rank == 0, f"{machines.leader}:{machines.master_port}"
    try:
        return TCPStore(machines.leader, machines.master_port, None, main, PATIENCE, wait_for_workers=False)
    except RuntimeError as error:
        found = "in use" if main else f"no answer in {PATIENCE}"
        remedy = (
            "give another --master-port"
            if main
            else "start the first machine, and check --master-addr and --master-port"
        )
        raise FastDraftError(
            "--master-addr", f"{place}: {found}", "all machines meet there", remedy
        ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _own_address(machines: Machines) -> str:
    """The address by which this machine is seen from the first one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((machines.leader, machines.master_port))
        return str(probe.getsockname()[0])
