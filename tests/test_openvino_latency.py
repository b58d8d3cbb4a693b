"""What is timed in OpenVINO is what decoding runs. No time is asserted anywhere. Skipped without OpenVINO."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino_genai")
pytest.importorskip("nncf")
pytest.importorskip("optimum.exporters.openvino", exc_type=ImportError)

from transformers import LlamaConfig

from conftest import write_tokenizer
from fastdraft.errors import TargetError
from fastdraft.runtimes import openvino_latency, openvino_reader
from fastdraft.runtimes.openvino_export import export_random
from fastdraft.runtimes.openvino_latency import LoadedModel, any_ids, measure_passes, time_passes
from fastdraft.runtimes.openvino_runtime import OpenVINORuntime
from fastdraft.runtimes.openvino_speculative import TieJudge
from fastdraft.target import Target

PREFIX = 40


def random_export(folder: Path, layers: int, weights: str) -> Path:
    """A shape with random weights, and nothing else in the folder around it."""
    source = folder / "tokenizer"
    source.mkdir()
    write_tokenizer(source)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    ids = {"bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}
    config = LlamaConfig(**shape, **heads, **ids, max_position_embeddings=64)
    exported = folder / "exported"
    exported.mkdir()
    export_random(config, Target.at(source), exported, weights)  # type: ignore[arg-type]
    assert sorted(path.name for path in folder.iterdir()) == ["exported", "tokenizer"]
    return exported


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_export(tmp_path_factory.mktemp("deep"), 3, "int8")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_export(tmp_path_factory.mktemp("small"), 1, "fp16")


@pytest.fixture(scope="module")
def loaded(deep: Path) -> LoadedModel:
    return LoadedModel(deep, PREFIX, 6, precision="exact", threads=1)


def test_the_timed_pass_computes_what_the_exported_model_computes(deep: Path, loaded: LoadedModel) -> None:
    loaded.read(4)
    logits = loaded.logits(4).astype(np.float64)
    assert logits.shape == (4, 320)
    whole = TieJudge(deep)
    for place in range(4):
        ids = any_ids(0, PREFIX + place + 1, 320).tolist()
        logprobs = logits[place] - logits[place].max()
        logprobs -= np.log(np.exp(logprobs).sum())
        np.testing.assert_allclose(logprobs, whole.logprobs(ids), atol=1e-4)


def test_every_pass_begins_behind_the_same_prefix_read_in_pieces_or_not(
    deep: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded.read(3)
    first = loaded.logits(3)
    loaded.read(6)
    loaded.read(1)
    loaded.read(3)
    np.testing.assert_array_equal(loaded.logits(3), first)
    monkeypatch.setattr(openvino_reader, "_PIECE", 16)
    pieces = LoadedModel(deep, PREFIX, 6, precision="exact", threads=1)
    pieces.read(3)
    np.testing.assert_allclose(pieces.logits(3), first, atol=1e-4)


def test_a_latency_names_weights_widths_and_a_prefix_that_fits_the_context(deep: Path, small: Path) -> None:
    latency = measure_passes(deep, small, [4, 2], 1000, threads=1, repeats=1)
    assert list(latency.target_seconds) == [1, 2, 4]
    assert (latency.target_dtype, latency.draft_dtype, latency.device) == ("int8", "fp16", "CPU")
    assert latency.prefix_tokens == 64 - 4
    assert min(latency.draft_seconds, *latency.target_seconds.values()) > 0


def test_what_each_further_token_adds_to_a_pass_of_the_draft_is_told(
    deep: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: LoadedModel, width: int, keep: int | None = None) -> float:
        return 0.1 + 0.02 * width if self.weights == "fp16" else 1.0

    monkeypatch.setattr(LoadedModel, "read", read)
    found = measure_passes(deep, small, [2, 4], 20, threads=1, repeats=1)
    assert (found.draft_seconds, found.draft_seconds_more) == pytest.approx((0.12, 0.02))


class Scripted:
    """A model whose passes take 10, 20, ... times the width, and that remembers them."""

    def __init__(self, name: str, calls: list[tuple[str, int]]) -> None:
        self.name, self.calls = name, calls

    def read(self, width: int) -> float:
        self.calls.append((self.name, width))
        return float(width) if self.name == "target" else 0.1 * int(self.name)


def test_passes_come_in_the_order_of_decoding_and_figures_are_medians(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openvino_latency, "SPELL_SECONDS", 0.0)
    calls: list[tuple[str, int]] = []
    costs = time_passes(Scripted("target", calls), [Scripted("1", calls)], [1, 3], 3)  # type: ignore[arg-type, list-item]
    assert costs.target_seconds == {1: 1.0, 3: 3.0}
    assert costs.draft_seconds == pytest.approx([0.1])
    one_round = [("1", 1), ("1", 1), ("target", 3)]
    assert calls == [*2 * [("target", 1)], *2 * one_round] * (3 + openvino_latency.WARM_TURNS)
    assert costs.spread == 0.0


def test_every_draft_meets_every_width_over_the_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_latency, "SPELL_SECONDS", 0.0)
    calls: list[tuple[str, int]] = []
    drafts = [Scripted(str(number), calls) for number in (1, 2, 3)]
    turns: list[None] = []
    costs = time_passes(Scripted("target", calls), drafts, [1, 2, 3], 4, lambda: turns.append(None))  # type: ignore[arg-type]
    assert costs.draft_seconds == pytest.approx([0.1, 0.2, 0.3])
    assert len(turns) == 6
    met = {
        (calls[i - 1][0], width) for i, (name, width) in enumerate(calls) if name == "target" and width > 1
    }
    assert met == {(name, width) for name in ("1", "2", "3") for width in (2, 3)}


def test_only_exports_on_a_cpu_are_timed(small: Path, tmp_path: Path) -> None:
    assert OpenVINORuntime(draft_device="GPU").measure_passes(small, small, [2], 8) is None
    with pytest.raises(TargetError, match="no openvino_model"):
        LoadedModel(tmp_path, 8, 2)


def test_a_signal_still_arrives_after_models_came_and_went(small: Path) -> None:
    first, second = LoadedModel(small, 8, 2, threads=1), LoadedModel(small, 8, 2, threads=1)
    del first
    del second
    arrived = []
    before = signal.signal(signal.SIGTERM, lambda *_: arrived.append(1))
    signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert arrived == [1]
