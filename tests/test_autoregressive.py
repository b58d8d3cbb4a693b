"""Batched generation: the same text as one prompt alone, and log-probs of the very distribution drawn
from.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from fastdraft.decoding import autoregressive
from fastdraft.decoding import cache as cache_module
from fastdraft.decoding.autoregressive import draw_tokens, generate_batch, pad_left
from fastdraft.decoding.cache import grouped_attention
from fastdraft.errors import DataError
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.functional.sampling import probabilities
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.runtimes.huggingface import HuggingFaceEngine

PROMPTS = [
    [5, 6, 7, 8, 9, 10, 11],
    [40],
    [17, 30, 31, 99],
    [200, 201, 202, 203, 204, 205, 206, 207, 208, 209],
    [12, 13],
]
VOCABULARY = Vocabulary(320, 300, tuple(range(300, 320)), 0, (3,), 0, "digest")


@pytest.fixture(scope="module")
def model(tiny_target: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_target).eval()


@pytest.fixture(scope="module")
def ending_model(tiny_target: Path) -> PreTrainedModel:
    """The tiny target made to end its answers every now and then."""
    model = AutoModelForCausalLM.from_pretrained(tiny_target).eval()
    with torch.no_grad():
        model.lm_head.weight[3] *= 3
    return model


def generate(
    model: PreTrainedModel, prompts: list[list[int]], sampling: Sampling, tokens: int = 20, seed: int = 0
) -> list[Generation]:
    return generate_batch(model, prompts, sampling, tokens, {3}, torch.Generator().manual_seed(seed))


def test_greedy_text_of_a_padded_batch_is_that_of_each_prompt_alone_in_transformers(
    model: PreTrainedModel,
) -> None:
    for prompt, found in zip(PROMPTS, generate(model, PROMPTS, Sampling(0.0)), strict=True):
        alone = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=3, pad_token_id=0
        )
        assert found.response_ids == alone[0, len(prompt) :].tolist()
        assert found.prompt_ids == prompt
        assert found.logprobs == [0.0] * len(found.response_ids)


def test_a_sliding_window_is_kept_while_the_batch_writes() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=6)
    model = MistralForCausalLM(config).eval()
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16, 17]]
    for prompt, found in zip(prompts, generate(model, prompts, Sampling(0.0)), strict=True):
        ids = list(prompt)
        for token in found.response_ids:
            assert int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.6), Sampling(0.8, top_k=7), Sampling(1.3, top_k=50, top_p=0.7)]
)
def test_each_log_prob_is_that_of_the_warped_distribution_drawn_from(
    model: PreTrainedModel, sampling: Sampling
) -> None:
    for found in generate(model, PROMPTS, sampling):
        ids = torch.tensor([found.prompt_ids + found.response_ids])
        logits = model(ids).logits[0, len(found.prompt_ids) - 1 : -1]
        logprobs = probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p).log()
        expected = logprobs.gather(-1, torch.tensor(found.response_ids)[:, None]).squeeze(-1)
        assert torch.allclose(torch.tensor(found.logprobs), expected, atol=2e-4)
        assert expected.isfinite().all()


def test_equal_seeds_give_equal_text_and_other_seeds_other_text(model: PreTrainedModel) -> None:
    assert generate(model, PROMPTS, Sampling(1.0), seed=1) == generate(model, PROMPTS, Sampling(1.0), seed=1)
    assert generate(model, PROMPTS, Sampling(1.0), seed=1) != generate(model, PROMPTS, Sampling(1.0), seed=2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_dropping_finished_rows_changes_no_text(
    ending_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    prompts = [[token, token + 1] for token in range(10, 40)]
    monkeypatch.setattr(autoregressive, "DROP_SHARE", 0.0)
    dropped = generate(ending_model, prompts, Sampling(temperature))
    monkeypatch.setattr(autoregressive, "DROP_SHARE", 2.0)
    kept = generate(ending_model, prompts, Sampling(temperature))
    assert [g.response_ids for g in dropped] == [g.response_ids for g in kept]
    assert 0 < sum(g.finish_reason == "stop" for g in kept) < len(kept)


def test_an_answer_ends_with_its_first_eos_or_at_the_limit(ending_model: PreTrainedModel) -> None:
    for found in generate(ending_model, [[token] for token in range(10, 40)], Sampling(1.0), tokens=8):
        if found.finish_reason == "stop":
            assert found.response_ids.index(3) == len(found.response_ids) - 1
        else:
            assert len(found.response_ids) == 8
            assert 3 not in found.response_ids
        assert len(found.logprobs) == len(found.response_ids)


def test_drawn_tokens_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.125])
    count = 20_000
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw_tokens(probs.log().expand(count, -1), Sampling(1.0), uniform)
    seen = torch.bincount(tokens, minlength=5).float()
    assert seen[1] == 0
    kept = probs > 0
    chi_squared = ((seen[kept] - count * probs[kept]) ** 2 / (count * probs[kept])).sum()
    assert chi_squared < 16.3  # 3 degrees of freedom, 0.999
    assert torch.allclose(logprobs, probs.log()[tokens])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_the_answer_with_a_nan_log_prob(
    tiny_target: Path, temperature: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_target).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    for found in generate(model, PROMPTS, Sampling(temperature)):
        assert len(found.response_ids) == 1
        assert math.isnan(found.logprobs[0])


def test_an_answer_that_is_given_up_ends_there_and_changes_no_other(model: PreTrainedModel) -> None:
    whole = generate(model, PROMPTS, Sampling(1.0), tokens=40)
    chosen = whole[2].response_ids[:5]
    generator = torch.Generator().manual_seed(0)
    cut = generate_batch(model, PROMPTS, Sampling(1.0), 40, {3}, generator, lambda ids: ids[:5] == chosen)
    assert cut[2].response_ids == whole[2].response_ids[: autoregressive.GIVE_UP_EVERY]
    assert len(cut[2].logprobs) == len(cut[2].response_ids)
    assert cut[2].finish_reason == "length"
    assert [g.response_ids for i, g in enumerate(cut) if i != 2] == [
        g.response_ids for i, g in enumerate(whole) if i != 2
    ]


def test_an_empty_prompt_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[1], []], Sampling(0.0))


@pytest.mark.parametrize("count", [1, 4])
def test_grouped_attention_gives_the_logits_of_plain_attention_and_is_undone(
    model: PreTrainedModel, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = pad_left(PROMPTS)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    new = torch.arange(7, 7 + count).expand(len(PROMPTS), count)
    mask = torch.cat([mask, torch.ones(len(PROMPTS), count, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(-1) - 1)[:, -count:]
    plain = model(new, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    cache.crop(-count)
    monkeypatch.setattr(
        cache_module, "sdpa_attention_forward", None
    )  # keys must not go the way on which they are copied
    with grouped_attention(model):
        assert model.config._attn_implementation != "sdpa"
        grouped = model(new, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    assert torch.allclose(plain, grouped, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_the_engine_answers_in_the_order_asked(model: PreTrainedModel) -> None:
    engine = HuggingFaceEngine(model, VOCABULARY, batch_rows=2)
    found = engine.generate(PROMPTS, Sampling(0.0), 5, seed=0)
    assert [g.prompt_ids for g in found] == PROMPTS
    assert [g.response_ids for g in found] == [
        g.response_ids for g in generate(model, PROMPTS, Sampling(0.0), tokens=5)
    ]


def test_the_engine_refuses_a_prompt_that_leaves_no_room_in_the_context(model: PreTrainedModel) -> None:
    with pytest.raises(DataError, match="context holds 256"):
        HuggingFaceEngine(model, VOCABULARY).generate([[7] * 250], Sampling(0.0), 10, seed=0)
