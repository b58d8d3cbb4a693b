"""Faults 42 to 49, memory and threads: rows are halved where they do not fit, else one line names the key to lower."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdraft.data.shards import PackedCorpus
from fastdraft.data.tokenize import DocumentEncoder
from fastdraft.decoding import replay, scoring
from fastdraft.runtimes import synthesis
from fastdraft.evaluation.texts import as_row
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.errors import Halving, OutOfMemory, is_out_of_memory
from fastdraft.functional.generation import Sampling
from fastdraft.modeling.drafts import load_draft
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.target import Target
from faults_fixture import Run, failing, os_error

PROMPTS = [[1, 5, 9], [1, 7, 8, 9, 10, 11], [4, 20], [5, 6, 7, 8], [9] * 9, [30, 31, 32], [44, 45]]
CPU_FULL = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


def test_the_words_by_which_libraries_say_that_memory_ran_out() -> None:
    words = [
        CPU_FULL,
        CPU_FULL.replace("can't allocate memory", "not enough memory"),
        "std::bad_alloc",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
    ]
    assert all(
        map(is_out_of_memory, [MemoryError(), torch.OutOfMemoryError("CUDA"), *map(RuntimeError, words)])
    )
    assert not any(
        map(
            is_out_of_memory,
            [RuntimeError("shapes differ"), ValueError("out of memory of a name"), OSError(errno.EIO, "x")],
        )
    )


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


def few_rows(
    model: torch.nn.Module, most: int, error: Callable[[], BaseException]
) -> torch.utils.hooks.RemovableHandle:
    """The model runs out of memory above `most` rows."""

    def look(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        if len(named["input_ids"]) > most:
            raise error()

    return model.register_forward_pre_hook(look, with_kwargs=True)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_engine_that_runs_out_of_memory_writes_the_same_text_in_halves(
    tiny_target: Path, temperature: float
) -> None:
    config, sampling = Target.at(tiny_target), Sampling(temperature)
    model, vocabulary = config.model("cpu"), Target.at(tiny_target).vocabulary
    whole = HuggingFaceEngine(model, vocabulary, 4).generate(PROMPTS, sampling, 20, 7)
    engine = HuggingFaceEngine(model, vocabulary, 4)
    handle = few_rows(model, 1, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    halved = engine.generate(PROMPTS, sampling, 20, 7)
    handle.remove()
    assert engine.halving.most == 1
    assert [g.response_ids for g in halved] == [g.response_ids for g in whole]
    for one, other in zip(halved, whole, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("module", [replay, scoring, synthesis])
def test_a_pass_over_text_that_runs_out_of_memory_gives_the_same_in_halves(
    tiny_target: Path, tiny_draft: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    config = Target.at(tiny_target)
    model, vocabulary = config.model("cpu"), config.vocabulary
    written = HuggingFaceEngine(model, vocabulary).generate(PROMPTS, Sampling(1.0), 12, 3)
    rows, draft = [as_row(generation, Sampling(1.0), "own") for generation in written], load_draft(tiny_draft)
    work: dict[Any, Callable[[], list[Any]]] = {
        replay: lambda: list(replay.accept_probabilities(draft, rows, vocabulary)),
        scoring: lambda: [np.array(g.logprobs) for g in scoring.score(model, written, Sampling(1.0))],
        synthesis: lambda: [logits.logprobs for logits in synthesis.sparse_logits(model, rows, 4)],
    }
    whole, real = work[module](), replay.response_hidden

    def small(decoder: Any, rows: Sequence[Any], device: Any) -> Any:
        if len(rows) > 2:
            raise MemoryError
        return real(decoder, rows, device)

    monkeypatch.setattr(module, "response_hidden", small)
    for one, other in zip(work[module](), whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("stage", "owner", "name", "error", "remedy"),
    [
        ("prepare", DocumentEncoder, "encode", MemoryError, "lower prepare.workers"),
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
            lambda: torch.OutOfMemoryError("CUDA"),
            "evaluate.batch_rows",
        ),
    ],
)
def test_work_that_cannot_be_halved_is_one_line_with_the_key_to_lower(  # noqa: PLR0917
    short_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    owner: Any,
    name: str,
    error: Any,
    remedy: str,
) -> None:
    run = Run(short_run, f"memory-{stage}", stage)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), 1, error))
        line = run.fails(capsys)
    assert "out of memory" in line
    assert remedy in line
    run.ends_alike()


@pytest.mark.parametrize("error", [os_error(errno.EIO), os_error(errno.EMFILE), MemoryError])
def test_a_fault_in_the_thread_that_reads_ahead_is_one_line(
    short_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[], BaseException],
) -> None:
    run = Run(short_run, f"thread-{type(error()).__name__}-{getattr(error(), 'errno', 0)}", "pretrain")
    with monkeypatch.context() as patch:
        patch.setattr(PackedCorpus, "take", failing(PackedCorpus.take, 4, error))
        run.fails(capsys)
    run.ends_alike()
