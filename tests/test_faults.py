"""What goes wrong while a run works: a full disk, no memory, signals, a second run, NaN, a dead server. One
line, nothing lost, and the same command goes on to the undisturbed result."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import FORBIDDEN
from fastdraft import cli, pipeline
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.errors import FastDraftError, Halving, OutOfMemory, is_out_of_memory, machine_errors
from fastdraft.provenance import without_secrets
from fastdraft.run_folder import RunFolder
from fastdraft.training.metrics import Metrics

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]

MEASURED = ("seconds", "provenance", "tokens_per_second", "generated_tokens_per_second", "time")
CPU_FULL = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


class Run:
    """A copy of the finished short run as it was before one stage began."""

    def __init__(self, recipe: Path, name: str, stage: str) -> None:
        self.recipe, self.name, self.stage = recipe, name, stage
        self.finished, self.folder = recipe.parent / "runs" / "tiny", recipe.parent / "runs" / name
        later = pipeline.downstream([stage])

        def ignored(place: str, names: list[str]) -> list[str]:
            return [name for name in names if name in later] if Path(place) == self.finished else []

        shutil.copytree(self.finished, self.folder, ignore=ignored)

    def command(self, *more: str) -> int:
        return cli.main([self.stage, str(self.recipe), f"run.name={self.name}", "--quiet", *more])

    def fails(self, capsys: Capture, *more: str, exit_code: int = 2) -> str:
        """The one line with which the command ends; nothing half-written is left."""
        capsys.readouterr()
        assert self.command(*more) == exit_code
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("fastdraft: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        assert [str(path) for path in self.folder.rglob("*.tmp")] == []
        assert not (self.folder / self.stage / "manifest.json").exists()
        return lines[0]

    def ends_alike(self) -> None:
        """The same command once more gives the undisturbed result."""
        assert self.command() == 0
        assert contents(self.folder / self.stage) == contents(self.finished / self.stage)
        shutil.rmtree(self.folder)


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a stage without what tells of time."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name in ("latency.json", "README.md"):
            continue
        name = path.relative_to(folder).as_posix()
        if path.suffix in (".json", ".jsonl"):
            lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else None
            value = [json.loads(line) for line in lines] if lines else json.loads(path.read_text("utf-8"))
            found[name] = untimed(value)
        else:
            found[name] = path.read_bytes()
    return found


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        clocks = ("second", "latenc", "speedup")
        kept = {k: v for k, v in value.items() if k not in MEASURED and not any(part in k for part in clocks)}
        return {k: untimed(v) for k, v in kept.items()}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def failing(real: Callable[..., Any], number: int, error: Callable[[], BaseException]) -> Callable[..., Any]:
    """`real`, but call `number` (from 1) and all after it raise."""
    calls = 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= number:
            raise error()
        return real(*arguments, **named)

    return call


FULL = "design replace 3, prepare fsync 4, pretrain replace 6, synthesize fsync 3, align replace 5, evaluate fsync 4"


@pytest.mark.parametrize(
    ("stage", "name", "number"), [case.split() for case in f"{FULL}, export replace 3".split(", ")]
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    short_run: Path, capsys: Capture, monkeypatch: Patch, stage: str, name: str, number: str
) -> None:
    run = Run(short_run, f"full-{stage}", stage)
    with monkeypatch.context() as patch:
        full = failing(
            getattr(os, name), int(number), lambda: OSError(errno.ENOSPC, "No space left on device")
        )
        patch.setattr(os, name, full)
        assert "no space left on the disk" in run.fails(capsys)
    run.ends_alike()


def test_a_full_disk_is_known_where_a_library_hides_its_number() -> None:
    with pytest.raises(FastDraftError, match="no space left"), machine_errors("x", "less"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_one_process_at_a_time_works_at_a_run(short_run: Path, capsys: Capture) -> None:
    run = Run(short_run, "both", "export")
    with RunFolder(run.folder).lock():
        assert "in use" in run.fails(capsys)
        assert cli.main(["run", str(short_run), "run.name=both", "--redo", "design"]) == 2
    assert (run.folder / "evaluate" / "manifest.json").is_file()
    run.ends_alike()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("name", "times"), [("SIGTERM", 1), ("SIGINT", 1), ("SIGINT", 2)])
def test_a_signal_stops_at_the_next_safe_point_and_a_second_one_at_once(
    short_run: Path, capsys: Capture, monkeypatch: Patch, name: str, times: int
) -> None:
    run, number = Run(short_run, f"stopped-{name}-{times}", "pretrain"), getattr(signal, name)
    usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    signal.signal(number, usual)  # a shell may have had it ignored
    real, calls = Metrics.write, iter(range(10**9))

    def write(self: Metrics, *values: Any, **record: Any) -> None:
        real(self, *values, **record)
        if next(calls) == 1:
            for _ in range(times):
                os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", write)
        assert "run the same command again to go on" in run.fails(capsys, exit_code=130)
    assert signal.getsignal(number) == usual
    run.ends_alike()


def test_a_loss_that_is_not_a_number_stops_with_one_line(short_run: Path, capsys: Capture) -> None:
    run = Run(short_run, "nan", "align")
    path = run.folder / "pretrain" / "checkpoint" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    line = run.fails(capsys)
    assert "nan" in line.lower() or "finite" in line.lower()


def test_a_server_that_is_not_there_is_one_line(short_run: Path, capsys: Capture) -> None:
    pytest.importorskip("openai")
    run = Run(short_run, "dead-server", "synthesize")
    engine = "{kind: openai, servers: ['http://127.0.0.1:9/v1'], retries: 0, timeout: 2}"
    assert "127.0.0.1:9" in run.fails(capsys, f"synthesize.engine={engine}")


@pytest.mark.parametrize(
    ("stage", "owner", "name", "error", "key"),
    [
        (
            "synthesize",
            torch.nn.Embedding,
            "forward",
            lambda: RuntimeError(CPU_FULL),
            "synthesize.batch_rows",
        ),
        (
            "evaluate",
            SpeculativeDecoder,
            "generate",
            lambda: torch.OutOfMemoryError(""),
            "evaluate.batch_rows",
        ),
        ("pretrain", torch.nn.Embedding, "forward", MemoryError, "pretrain.micro_batch_tokens"),
    ],
)
def test_memory_that_does_not_suffice_is_one_line_with_the_key_to_lower(
    short_run: Path,
    capsys: Capture,
    monkeypatch: Patch,
    stage: str,
    owner: Any,
    name: str,
    error: Any,
    key: str,
) -> None:
    run = Run(short_run, f"memory-{stage}", stage)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), 1, error))
        line = run.fails(capsys)
    assert "out of memory" in line
    assert key in line
    run.ends_alike()


def test_the_words_by_which_libraries_say_that_memory_ran_out() -> None:
    words = [CPU_FULL, "std::bad_alloc", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"]
    assert all(
        map(is_out_of_memory, [MemoryError(), torch.OutOfMemoryError("CUDA"), *map(RuntimeError, words)])
    )
    others = [RuntimeError("shapes differ"), ValueError("out of memory of a name"), OSError(errno.EIO, "x")]
    assert not any(map(is_out_of_memory, others))


def test_rows_are_halved_until_they_fit_and_stay_so_in_order() -> None:
    seen: list[list[int]] = []
    warned: list[str] = []
    halving = Halving("synthesize.batch_rows", warned.append)

    def work(rows: Sequence[int]) -> None:
        if len(rows) > 3:
            raise MemoryError
        seen.append(list(rows))

    halving(list(range(10)), work)
    halving(list(range(10, 15)), work)
    assert [row for piece in seen for row in piece] == list(range(15))
    assert max(map(len, seen)) == halving.most == 2
    assert len(warned) == 1
    assert "synthesize.batch_rows" in warned[0]
    with pytest.raises(OutOfMemory, match=r"batch_rows: out of memory for a single row"):
        halving([0], failing(lambda rows: None, 1, MemoryError))


def test_a_whole_run_opens_no_connection_and_no_pickle(short_run: Path) -> None:
    assert FORBIDDEN == []
    assert (short_run.parent / "runs" / "tiny" / "export" / "manifest.json").is_file()


def test_keys_and_passwords_are_in_no_file(short_run: Path, monkeypatch: Patch) -> None:
    run, secret = Run(short_run, "secret", "design"), "s3cr3t-Value"
    for name in ("OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{secret}@127.0.0.1:9")
    address = f"https://user:{secret}@host/x?api_key={secret}&b=1"
    monkeypatch.setattr(sys, "argv", ["fastdraft", "design", address, f"synthesize.engine.api_key={secret}"])
    assert run.command() == 0
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_what_is_blotted_out_of_a_command_line() -> None:
    kept = ["pretrain.tokens=5", "https://host/v1", "a@b", "evaluate.num_speculative_tokens=[1,2]"]
    assert [without_secrets(text) for text in kept] == kept
    assert without_secrets("https://me:pw@host/v1?token=abc&x=1") == "https://***@host/v1?token=***&x=1"
    assert without_secrets("{api_key: abc, servers: [x]}") == "{api_key: ***, servers: [x]}"
