"""What is timed in OpenVINO is what decoding runs; random models have the graph of real ones. No time is asserted anywhere."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino_genai")
pytest.importorskip("nncf")
pytest.importorskip("optimum.exporters.openvino", exc_type=ImportError)

from transformers import LlamaConfig, PreTrainedConfig

from conftest import write_tokenizer
from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.modeling.architecture import read_architecture
from fastdraft.runtimes import openvino_latency, openvino_random
from fastdraft.runtimes.openvino import MODEL_FILE, core
from fastdraft.runtimes.openvino_latency import LoadedModel, any_ids, measure_passes, time_passes
from fastdraft.runtimes.openvino_random import export_random, repeat_last_layer
from fastdraft.runtimes.openvino_ties import TieJudge

PREFIX = 40
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def config_of(layers: int, **changes: Any) -> PreTrainedConfig:
    return LlamaConfig(**{**SMALL, "num_hidden_layers": layers, **changes})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def grown(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, of which three were converted."""
    folder = tmp_path_factory.mktemp("grown")
    export_random(config_of(5), tokenizer, folder, "int8")
    return folder


@pytest.fixture(scope="module")
def small(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    export_random(config_of(1), tokenizer, folder, "fp16")
    return folder


@pytest.fixture(scope="module")
def loaded(grown: Path) -> LoadedModel:
    return LoadedModel(grown, PREFIX, 6, precision="exact", threads=1)


def test_the_timed_pass_computes_what_the_exported_model_computes(grown: Path, loaded: LoadedModel) -> None:
    loaded.read(4)
    logits = loaded.logits().astype(np.float64)
    assert logits.shape == (4, 320)
    whole = TieJudge(grown)
    for place in range(4):
        ids = any_ids(0, PREFIX + place + 1, 320).tolist()
        logprobs = logits[place] - logits[place].max()
        logprobs -= np.log(np.exp(logprobs).sum())
        np.testing.assert_allclose(logprobs, whole.logprobs(ids), atol=1e-4)


def test_every_pass_begins_behind_the_same_prefix(loaded: LoadedModel) -> None:
    loaded.read(3)
    first = loaded.logits()
    loaded.read(6)
    loaded.read(1)
    loaded.read(3)
    np.testing.assert_array_equal(loaded.logits(), first)


def test_a_prefix_read_in_pieces_is_the_same_prefix(
    grown: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_latency, "_PIECE", 16)
    pieces = LoadedModel(grown, PREFIX, 6, precision="exact", threads=1)
    for model in (pieces, loaded):
        model.read(2)
    np.testing.assert_allclose(pieces.logits(), loaded.logits(), atol=1e-4)


def test_a_latency_names_weights_widths_and_a_prefix_that_fits_the_context(grown: Path, small: Path) -> None:
    latency = measure_passes(grown, small, [4, 2], 1000, threads=1, repeats=1)
    assert list(latency.target_seconds) == [1, 2, 4]
    assert (latency.target_dtype, latency.draft_dtype, latency.device) == ("int8", "fp16", "CPU")
    assert latency.prefix_tokens == 64 - 4
    assert min(latency.draft_seconds, *latency.target_seconds.values()) > 0


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


def test_what_cannot_be_timed_is_refused_in_one_line(small: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="OpenVINO sees CPU"):
        measure_passes(small, small, [2], 8, device="NPU")
    with pytest.raises(FastDraftError, match="no openvino_model"):
        LoadedModel(tmp_path, 8, 2)
    with pytest.raises(RecipeError, match="at least 1"):
        measure_passes(small, small, [2], 8, repeats=0)


def test_a_signal_still_arrives_after_models_came_and_went(small: Path) -> None:
    first, second = LoadedModel(small, 8, 2, threads=1), LoadedModel(small, 8, 2, threads=1)
    del first
    del second
    arrived = []
    before = signal.signal(signal.SIGTERM, lambda *_: arrived.append(1))
    signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert arrived == [1]


def _operations(folder: Path) -> Counter[tuple[str, str]]:
    model = core().read_model(folder / MODEL_FILE)
    return Counter(
        (op.get_type_name(), str([(port.partial_shape, port.element_type) for port in op.outputs()]))
        for op in model.get_ops()
    )


def test_a_repeated_layer_gives_the_graph_of_a_whole_conversion(
    grown: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_random, "CONVERTED_LAYERS", 5)
    export_random(config_of(5), tokenizer, tmp_path, "int8")
    assert _operations(grown) == _operations(tmp_path)
    assert (grown / "openvino_model.bin").stat().st_size == pytest.approx(
        (tmp_path / "openvino_model.bin").stat().st_size, rel=0.05
    )


def test_repeating_a_layer_computes_what_the_repeated_model_computes(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    weights: dict[str, torch.Tensor] = {}
    convert = openvino_random.convert
    monkeypatch.setattr(
        openvino_random,
        "convert",
        lambda source, *rest: (
            weights.update(load_file(source / "model.safetensors")),
            convert(source, *rest),
        ),
    )
    monkeypatch.setattr(openvino_random, "_append_rotated", lambda _, offset, *rest: offset)
    export_random(config_of(6), tokenizer, tmp_path, "fp32")
    for name, value in list(weights.items()):
        for layer in (3, 4, 5):
            weights[name.replace("layers.2.", f"layers.{layer}.")] = value
    model = LlamaForCausalLM(config_of(6)).eval()
    model.load_state_dict(weights)
    ids = any_ids(0, 20, 320).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    np.testing.assert_allclose(TieJudge(tmp_path).logprobs(ids), expected.numpy(), atol=1e-3)


def test_no_two_layers_have_the_same_weights(grown: Path) -> None:
    model = core().read_model(grown / MODEL_FILE)
    matrices = [
        op.data.tobytes()
        for op in model.get_ops()
        if op.get_type_name() == "Constant"
        and "down_proj.weight" in op.get_friendly_name()
        and op.get_element_type().get_type_name() == "u8"
        and op.data.size > 1000
    ]
    assert len(matrices) == 5
    assert len(set(matrices)) == 5


def test_a_random_export_says_its_own_depth_and_leaves_nothing_else_behind(grown: Path) -> None:
    assert json.loads((grown / "config.json").read_text())["num_hidden_layers"] == 5
    assert not [path for path in grown.iterdir() if path.is_dir()]


def test_layers_that_are_not_alike_are_not_repeated(small: Path, tmp_path: Path) -> None:
    for name in (MODEL_FILE, "openvino_model.bin"):
        (tmp_path / name).write_bytes((small / name).read_bytes())
    with pytest.raises(FastDraftError, match="cannot be told apart"):
        repeat_last_layer(tmp_path / MODEL_FILE, 4)


def test_the_disk_is_looked_at_before_anything_is_built(tmp_path: Path) -> None:
    needed = openvino_random.needed_bytes(
        [(read_architecture(config_of(32, hidden_size=8192, intermediate_size=10**9)), "int4")]
    )
    with pytest.raises(FastDraftError, match="TMPDIR"):
        openvino_random.check_disk(tmp_path, needed)
