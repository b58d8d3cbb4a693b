"""The decoder as an accelerator runs it: its own hidden states, flash attention, texts apart where asked, no
graph break.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import transformers.integrations.flex_attention as flex
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fastdraft.functional.distillation import SparseTarget, token_loss
from fastdraft.modeling.heads import output_head
from fastdraft.training import gpu_attention as module
from fastdraft.training.batches import Batch
from fastdraft.training.fast_decoder import CpuDecoder, fast_decoder
from fastdraft.training.gpu_attention import FlashDecoder, flash_decoder, text_mask
from fastdraft.training.objective import CrossEntropy, LoadedTarget, TokenDistillation
from fastdraft.training.optimizer import build_optimizers
from fastdraft.training.step import TrainStep
from test_step import build, ids

FAMILIES = ["llama", "mistral", "phi3", "qwen2", "qwen3"]
PLACES = torch.cat([torch.arange(9), torch.arange(4), torch.arange(20)])


def decoder_of(family: str) -> Any:
    return build(family).get_decoder()


def gradients(runs: Any, decoder: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    hidden = runs(**inputs, use_cache=False).last_hidden_state
    weights = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    return hidden, list(torch.autograd.grad(hidden.square().sum(), weights))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_are_the_decoders_own(family: str, apart: bool) -> None:
    decoder, inputs = decoder_of(family), {"input_ids": ids(2, 33)}
    if apart:
        inputs["position_ids"] = PLACES.expand(2, -1)
    fast = flash_decoder(decoder)
    assert fast is not None
    torch.testing.assert_close(gradients(fast, decoder, inputs), gradients(decoder, decoder, inputs))
    assert decoder.config._attn_implementation == "sdpa"  # validation has caches and padding


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_in_blocks_each_text_of_a_row_is_as_if_it_stood_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not compiled: slow, and the same numbers.
    monkeypatch.setattr(flex, "WrappedFlexAttention", lambda training: lambda: flex_attention)
    monkeypatch.setattr(module, "_has_blocks", lambda decoder, device: True)
    decoder, row = decoder_of(family), ids(1, 33)
    fast, texts = FlashDecoder(decoder), row.split([9, 4, 20], dim=1)
    with torch.no_grad():
        together = fast(row, position_ids=PLACES[None]).last_hidden_state[0]
        parts = [decoder(input_ids=text, use_cache=False).last_hidden_state[0] for text in texts]
        unmasked = fast(row).last_hidden_state[0]
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-4, atol=1e-5)
    assert (unmasked - torch.cat(parts)).abs().max() > 0.1


def test_under_autocast_blocks_take_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    types: list[set[torch.dtype]] = []

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        types.append({query.dtype, key.dtype, value.dtype})
        return flex_attention(query, key, value, **options)  # type: ignore[return-value]

    monkeypatch.setattr(flex, "WrappedFlexAttention", lambda training: lambda: attention)
    monkeypatch.setattr(module, "_has_blocks", lambda decoder, device: True)
    decoder = decoder_of("llama")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = FlashDecoder(decoder)(ids(1, 33), position_ids=PLACES[None]).last_hidden_state
        expected = decoder(input_ids=ids(1, 33), position_ids=PLACES[None], use_cache=False).last_hidden_state
    assert types == [{torch.bfloat16}] * 2
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_both_masks_let_the_same_tokens_be_seen() -> None:
    blocks, dense = text_mask(PLACES[None], blocks=True), text_mask(PLACES[None], blocks=False)
    assert isinstance(blocks, BlockMask)
    places = torch.arange(33)
    seen = blocks.mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places[None, :])
    assert torch.equal(seen, dense[0, 0])
    assert dense.sum() == sum(n * (n + 1) // 2 for n in (9, 4, 20))


class Attentions:
    """A backend of torch.compile that writes down how attention is called, and how often it was asked."""

    def __init__(self) -> None:
        self.graphs, self.called = 0, []  # type: ignore[var-annotated]

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        for node in graph.graph.nodes:
            if "scaled_dot_product" in str(node.target):
                self.called.append(
                    "causal" if node.kwargs["is_causal"] and node.kwargs["attn_mask"] is None else "masked"
                )
            elif str(node.target) == "flex_attention":
                self.called.append("blocks")
        return graph.forward


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_compiled_it_has_no_graph_break_no_dense_mask_and_no_second_compilation(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_has_blocks", lambda decoder, device: True)
    decoder, attentions = decoder_of(family), Attentions()
    fast = FlashDecoder(decoder)
    fast._runs = torch.compile(decoder, backend=attentions, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            fast(ids(2, 33))
        assert (attentions.graphs, attentions.called) == (1, ["causal"] * 2)  # two layers
        for shift in (0, 5):  # other texts, the same shapes
            fast(ids(2, 33), position_ids=PLACES.roll(shift).expand(2, -1))
        assert (attentions.graphs, attentions.called[2:]) == (2, ["blocks"] * 2)
    torch._dynamo.reset()


def test_a_decoder_that_attends_otherwise_keeps_its_own_way() -> None:
    assert flash_decoder(build("mistral", sliding_window=8).get_decoder()) is None
    assert flash_decoder(torch.nn.Linear(1, 1)) is None
    eager = decoder_of("llama")
    eager.config._attn_implementation = "eager"
    assert flash_decoder(eager) is None


def test_a_cpu_has_layers_written_out_and_an_accelerator_flash_attention() -> None:
    decoder = decoder_of("llama")
    assert isinstance(fast_decoder(decoder, torch.device("cpu")), CpuDecoder)
    assert isinstance(fast_decoder(decoder, torch.device("cuda")), FlashDecoder)
    windows = build("mistral", sliding_window=8).get_decoder()
    assert fast_decoder(windows, torch.device("cuda")) is windows


META = torch.device("meta")
TAUGHT = {
    "cross_entropy": lambda: CrossEntropy(1e-5),
    "stored": lambda: TokenDistillation(token_loss("lk_hybrid")),
    "target": lambda: TokenDistillation(token_loss("jsd"), LoadedTarget(*output_head(build().to(META)))),
}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("taught", TAUGHT)
@pytest.mark.parametrize(("family", "kind"), [("llama", "adamw"), ("phi3", "muon"), ("qwen3", "adamw")])
def test_a_step_waits_for_no_value_of_the_device(
    family: str, kind: Any, taught: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of torch's `meta` have shapes and no values: whatever would wait for one is an error there."""
    monkeypatch.setattr(
        torch, "autocast", lambda *given, **options: contextlib.nullcontext()
    )  # `meta` has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *given: False)
    model, objective = build(family).to(META), TAUGHT[taught]()
    ids_BT, ids_N = (torch.zeros(*shape, dtype=torch.int64, device=META) for shape in ((2, 33), (20,)))
    stored = SparseTarget(torch.zeros(20, 5, dtype=torch.int64, device=META), torch.zeros(20, 6, device=META))
    batch = Batch(ids_BT, ids_N, ids_N, 66, stored, ids_BT if apart else None)
    optimizers = build_optimizers(model, kind=kind, learning_rate=1e-3)
    decoder = fast_decoder(model.get_decoder(), META)
    step = TrainStep(decoder, model.lm_head.weight, list(model.parameters()), optimizers, objective, META)
    torch.autograd.backward(step.loss_sum(batch) / 7)
    assert torch.nn.utils.clip_grad_norm_(step.parameters, step.clip).device == META
    step.update(1.0)
    with pytest.raises(RuntimeError, match="meta"):  # that this test can fail
        model.get_decoder()(input_ids=ids_BT, use_cache=False)
