"""Output heads that are more than one product (scale, bias, cap): the target's distributions are the model's
own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTJConfig, PhiConfig, PreTrainedModel

from family_fixture import family_config
from fastdraft.errors import TargetError
from fastdraft.functional.distillation import DenseTarget, chunked_distillation, token_loss, top_k_buckets
from fastdraft.functional.generation import Generation
from fastdraft.modeling.heads import output_head, split_head
from fastdraft.runtimes.synthesis import sparse_logits
from fastdraft.training.batches import Batch, Sample, padded_batch
from fastdraft.training.objective import LoadedTarget, TokenDistillation

BIASED: dict[str, Any] = {
    "gptj": GPTJConfig(vocab_size=320, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=160),
    "phi-1": PhiConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ),
}
HEADS = ["gemma2", "granite", "cohere", "cohere2", *BIASED, "llama"]
SAMPLES = [Sample([5, 6, 7], [8, 9]), Sample([10], [11, 12, 13, 14]), Sample([200, 3], [4])]


@pytest.fixture(scope="module", params=HEADS)
def target(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A random target in float64 whose logits are spread wide enough for its cap to bite, its bias to
    count.
    """
    torch.manual_seed(0)
    config = BIASED.get(request.param) or family_config(request.param)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(40)
        if head.bias is not None:
            head.bias.normal_(0.0, 3.0)
    return model  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def batch() -> Batch:
    return padded_batch(SAMPLES)


def _own(target: PreTrainedModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return target(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.index]  # type: ignore[no-any-return]


def test_a_loaded_target_gives_the_models_own_logits_chunk_by_chunk(
    target: PreTrainedModel, batch: Batch
) -> None:
    own = _own(target, batch)
    assert own.std() > 0.5
    logits = LoadedTarget(*output_head(target)).distribution(batch).logits
    torch.testing.assert_close(torch.cat([logits(slice(0, 3)), logits(slice(3, 7))]), own, rtol=0, atol=1e-6)


def test_stored_logits_are_the_models_own(target: PreTrainedModel, batch: Batch) -> None:
    expected = top_k_buckets(_own(target, batch), 8)
    rows = [
        Generation(list(sample.prompt_ids), list(sample.response_ids), [], "length") for sample in SAMPLES
    ]
    found = sparse_logits(target, rows, 8)
    assert torch.equal(torch.cat([torch.from_numpy(row.ids) for row in found]).long(), expected.ids)
    stored = torch.cat([torch.from_numpy(row.logprobs) for row in found]).double()
    torch.testing.assert_close(stored, expected.logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["forward_kl", "lk_hybrid"])
def test_a_draft_is_taught_the_models_own_distribution(
    target: PreTrainedModel, batch: Batch, name: str
) -> None:
    hidden = torch.randn(batch.num_trained, 16, dtype=torch.float64, requires_grad=True)
    head = torch.randn(320, 16, dtype=torch.float64, requires_grad=True)
    found = TokenDistillation(token_loss(name), LoadedTarget(*output_head(target))).loss(hidden, head, batch)
    own = DenseTarget(_own(target, batch).__getitem__)
    expected = chunked_distillation(hidden, head, batch.labels, own, token_loss(name))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for left, right in zip(
        torch.autograd.grad(found, (hidden, head)), torch.autograd.grad(expected, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_only_a_plain_head_is_trained(target: PreTrainedModel) -> None:
    if target.config.model_type == "llama":
        assert split_head(target)[1] is target.get_output_embeddings().weight
    else:
        with pytest.raises(TargetError, match="its logits are more than one product"):
            split_head(target)
