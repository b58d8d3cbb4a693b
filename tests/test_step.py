"""The training step's own layers, its masks and its choices: same numbers as the modules, by another way."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from fastdraft.training import cpu_attention as attention
from fastdraft.training import defaults
from fastdraft.training.batches import packed_batch, read_ahead, text_separator
from fastdraft.training.fast_decoder import CpuDecoder, cpu_decoder, kept_memory
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.optimizer import build_optimizers
from fastdraft.training.step import TrainStep

CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "phi3": transformers.Phi3Config,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
BIASED = {"attention_bias": True, "mlp_bias": True}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
CASES = [(family, {}) for family in CONFIGS] + [("llama", BIASED), ("qwen3", BIASED), ("phi3", PARTIAL)]


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def build(family: str = "llama", **settings: Any) -> Any:
    values = {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "sliding_window": None,
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[family](**{**values, **settings}), attn_implementation="sdpa"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # gains and biases off their first values
    return model


def ids(rows: int = 2, length: int = 150) -> Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def outcome(
    decoder: Any, parameters: list[nn.Parameter], tokens: Tensor, low: bool = False, **places: Tensor
) -> list[Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        hidden = decoder(input_ids=tokens, use_cache=False, **places).last_hidden_state
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    return [hidden.detach(), *torch.autograd.grad(hidden, parameters, weight)]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_layers_written_out_give_the_modules_hidden_states_and_gradients(
    family: str, settings: dict[str, Any]
) -> None:
    decoder = build(family, **settings).get_decoder()
    written = cpu_decoder(decoder)
    assert written is not None
    parameters = list(decoder.parameters())
    assert distance(outcome(written, parameters, ids()), outcome(decoder, parameters, ids())) < 3e-6


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_under_autocast_layers_written_out_are_as_near_to_fp32_as_the_modules(family: str) -> None:
    decoder = build(family).get_decoder()
    parameters = list(decoder.parameters())
    exact = outcome(decoder, parameters, ids())
    found, modules = (outcome(runs, parameters, ids(), low=True) for runs in (cpu_decoder(decoder), decoder))
    assert distance(found, exact) < 1.5 * distance(modules, exact)


@pytest.mark.parametrize(
    "settings",
    [{"attention_dropout": 0.1}, {"hidden_act": "gelu"}, {"sliding_window": 16}],
    ids=["dropout", "activation", "window"],
)
def test_a_decoder_that_asks_for_more_keeps_its_modules(settings: dict[str, Any]) -> None:
    assert cpu_decoder(build("mistral", **settings).get_decoder()) is None


def make_step(model: Any, decoder: Any, autocast: torch.dtype | None = None) -> TrainStep:
    optimizers, parameters = (
        build_optimizers(model, kind="adamw", learning_rate=1e-2),
        list(model.parameters()),
    )
    return TrainStep(decoder, model.lm_head.weight, parameters, optimizers, CrossEntropy(1e-5), CPU, autocast)


def test_after_an_update_the_next_step_reads_the_new_weights() -> None:
    model, batch = build(), packed_batch(ids(2, 33).numpy())
    step, fresh = (make_step(model, cpu_decoder(model.get_decoder()), torch.bfloat16) for _ in range(2))
    step.gradients([batch])
    step.update(1.0)
    with torch.no_grad():
        assert torch.equal(step.loss_sum(batch), fresh.loss_sum(batch))


def test_weights_loaded_into_the_model_are_read_by_the_next_step() -> None:
    model, other = build(), build(rms_norm_eps=1e-5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    written = cpu_decoder(model.get_decoder())
    assert written is not None
    low = torch.autocast("cpu", dtype=torch.bfloat16)
    with torch.no_grad(), low:
        before = written(ids()).last_hidden_state
        model.load_state_dict(other.state_dict())
        after = written(ids()).last_hidden_state
        fresh = CpuDecoder(model.get_decoder())(ids()).last_hidden_state
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh)


@pytest.mark.parametrize(("length", "heads", "groups"), [(1, 2, 2), (128, 4, 4), (300, 6, 2)])
def test_attention_in_blocks_is_causal_attention(
    length: int, heads: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(2, groups, length, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    grad = torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64)
    expected = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=1.0, enable_gqa=True
    )
    expected_grads = torch.autograd.grad(expected, (query, key, value), grad)
    found = []
    for limit in (1 << 25, 0):  # probabilities kept, and made again
        monkeypatch.setattr(attention, "KEEP_ELEMENTS", limit)
        out, kept = attention.causal_attention(query.detach(), key.detach(), value.detach(), None, keep=True)
        assert kept is not None
        assert (kept.probs is None) == (limit == 0)
        found.append((out, *attention.causal_attention_backward(grad, kept)))
    torch.testing.assert_close(found[0], (expected, *expected_grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("by_hand", [True, False])
def test_texts_of_a_masked_row_are_trained_as_if_each_stood_alone(by_hand: bool) -> None:
    separator, model = 63, build("llama")
    texts = [torch.randint(1, 60, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 7, 150)]
    texts = [torch.cat([torch.tensor([separator]), text]) for text in texts]
    row = torch.cat(texts)[None]
    decoder = cpu_decoder(model.get_decoder()) if by_hand else model.get_decoder()
    batch = packed_batch(torch.cat([row, torch.tensor([[1]])], dim=1).numpy(), separator)
    with torch.no_grad():
        together = decoder(**batch.inputs, use_cache=False).last_hidden_state[0]
        alone = torch.cat(
            [decoder(input_ids=text[None], use_cache=False).last_hidden_state[0] for text in texts]
        )
        unmasked = decoder(input_ids=row, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (unmasked - alone).abs().max() > 0.1


def test_places_are_counted_anew_after_every_separator() -> None:
    rows = np.array([[5, 6, 9, 7, 9, 9, 1], [9, 1, 2, 3, 4, 5, 6]])
    places = packed_batch(rows, 9).position_ids
    assert places is not None
    assert places.tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]]
    assert packed_batch(rows).position_ids is None
    assert text_separator({"separator_id": 9, "document_masking": True}) == 9
    assert text_separator({"separator_id": 9}) is None


def test_auto_compiles_long_runs_on_cuda_and_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(defaults.shutil, "which", lambda name: "/bin/c++")
    assert not defaults.compiles("auto", CPU, 10**12)
    assert defaults.compiles("auto", CUDA, 10**9)
    assert not defaults.compiles("auto", CUDA, 10**6)
    assert not defaults.compiles(False, CUDA, 10**12)
    assert defaults.compiles(True, CPU, 1)
    monkeypatch.setattr(defaults.shutil, "which", lambda name: None)
    assert not defaults.compiles(True, CPU, 1)


def test_memory_that_is_kept_while_training_changes_no_number(tmp_path: Path) -> None:
    model = build()
    batch = packed_batch(ids(2, 33).numpy())
    plain = make_step(model, model.get_decoder()).gradients([batch])
    twin = copy.deepcopy(model)
    with kept_memory(CPU):
        assert make_step(twin, twin.get_decoder()).gradients([batch]) == plain
    with kept_memory(CUDA):
        pass


def test_while_a_step_is_worked_on_the_next_one_is_read() -> None:
    class Source:
        steps, asked = 4, list[int]()

        def batches(self, step: int, micro_batch_tokens: int) -> Any:
            self.asked.append(step)
            return [(step, micro_batch_tokens)]

    source: Any = Source()
    ahead = read_ahead(source, CPU, 1, 8)
    assert next(ahead) == [(1, 8)]
    ahead.close()
    assert source.asked == [1, 2]
    assert list(read_ahead(source, CPU, 1, 8)) == [[(1, 8)], [(2, 8)], [(3, 8)]]
    assert source.asked[2:] == [1, 2, 3]
