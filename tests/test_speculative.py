"""The exact decoder: its text is the target's own, greedy and sampled, whatever the draft, the caches and the
end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from fastdraft.decoding.cache import ModelReader, ReadableModel
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.errors import DataError, RecipeError, TargetError
from fastdraft.functional.generation import Sampling
from fastdraft.functional.sampling import probabilities
from fastdraft.functional.verification import recovery, verify, verify_certain
from fastdraft.modeling.vocabulary import Vocabulary

GREEDY = Sampling(0.0)
TINY = Vocabulary(320, 300, tuple(range(300, 320)), 0, (3,), 0, "")


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> PreTrainedModel:
    return load(tiny_target)


@pytest.fixture(scope="module")
def draft(tiny_draft: Path) -> PreTrainedModel:
    return load(tiny_draft)


def llama(vocab: int, seed: int, scale: float = 60.0) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = LlamaConfig(vocab_size=vocab, **sizes, **heads, **none)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale / 4)
        model.model.embed_tokens.weight.mul_(20)
    return model


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(4, 300, (int(n),), generator=generator).tolist()
        for n in torch.randint(1, 30, (count,), generator=generator)
    ]


def own_text(target: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    output = target.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


# --- one verification step
# -------------------------------------------------------------------------------------------


def test_one_step_emits_the_targets_distribution() -> None:
    target_probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    draft_probs = torch.tensor([[0.1, 0.6, 0.3]])
    generator, seen = torch.Generator().manual_seed(0), torch.zeros(3)
    for _ in range(6000):
        proposed = torch.multinomial(draft_probs[0], 1, generator=generator)
        _, written = verify(target_probs, draft_probs, proposed, generator)
        seen[written[0]] += 1
    assert torch.allclose(seen / 6000, target_probs[0], atol=0.025)


def test_recovery_draws_only_where_the_target_has_more() -> None:
    assert torch.allclose(
        recovery(torch.tensor([0.5, 0.2, 0.3]), torch.tensor([0.1, 0.7, 0.2])), torch.tensor([0.8, 0.0, 0.2])
    )
    same = torch.tensor([0.5, 0.5])
    assert torch.equal(recovery(same, same), same)


def test_greedy_verification_stops_at_the_first_difference() -> None:
    own = torch.tensor([4, 5, 6, 7])
    for proposed, right in (([4, 9, 6], 1), ([4, 5, 6], 3), ([9, 5, 6], 0)):
        accepted, written = verify_certain(own, torch.tensor(proposed))
        assert (accepted, written[: right + 1].tolist()) == (right, own[: right + 1].tolist())


# --- whole texts
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 8])
def test_greedy_text_is_the_targets_own(target: PreTrainedModel, draft: PreTrainedModel, k: int) -> None:
    decoder = SpeculativeDecoder(ReadableModel(target), ReadableModel(draft), TINY, k)
    for prompt in prompts(6, seed=k):
        result = decoder.generate(prompt, GREEDY, 24, seed=0)
        assert result.generation.response_ids == own_text(target, prompt, 24)
        assert result.generation.logprobs == [0.0] * len(result.generation.response_ids)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_draft_equal_to_the_target_is_always_accepted(target: PreTrainedModel, k: int) -> None:
    """Holds only if the draft reads its own last proposal after K acceptances and both caches are cropped
    rightly.
    """
    vocabulary = Vocabulary(320, 320, (), 0, (), 0, "")
    result = SpeculativeDecoder(ReadableModel(target), ReadableModel(target), vocabulary, k).generate(
        [5, 6, 7], GREEDY, 4 * (k + 1), seed=0
    )
    assert result.counts.num_drafts == 4
    assert result.counts.acceptance_rate == 1
    assert [r.num_accepted for r in result.rounds] == [k] * 4
    sampled = SpeculativeDecoder(ReadableModel(target), ReadableModel(target), vocabulary, k).generate(
        [5, 6, 7], Sampling(1.0), 4 * (k + 1), seed=0
    )
    assert sampled.counts.overlap == pytest.approx(1, abs=1e-4)
    assert sampled.counts.acceptance_rate > 0.95


def joint(model: PreTrainedModel, prompt: list[int], length: int, sampling: Sampling) -> Tensor:
    """The probability of every continuation of that length, by one teacher-forced pass each."""
    size = model.config.vocab_size
    endings = torch.tensor(list(itertools.product(range(size), repeat=length)))
    ids = torch.cat([torch.tensor([prompt]).expand(len(endings), -1), endings], dim=1)
    with torch.inference_mode():
        logits = model(ids).logits[:, len(prompt) - 1 : -1]
    probs = probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    return probs.gather(-1, endings[..., None]).squeeze(-1).double().prod(-1)


def chi_squared_z(counts: Tensor, expected_probs: Tensor) -> float:
    """Standard normal score of the chi-squared statistic (Wilson and Hilferty, 1931); cells with few expected
    are joined.
    """
    expected = expected_probs * counts.sum()
    rare = expected < 5
    seen = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = wanted > 1e-9
    assert seen[~keep].sum() == 0
    statistic, freedom = float(((seen - wanted) ** 2 / wanted)[keep].sum()), int(keep.sum()) - 1
    return float(((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5)


@pytest.mark.parametrize(
    ("sampling", "k", "draft_temperature", "missing"),
    [
        (Sampling(1.0), 2, None, ()),
        (Sampling(0.8, top_k=2), 3, 1.5, ()),
        (Sampling(1.2, top_p=0.85), 1, 0.0, (2,)),
    ],
)
def test_joint_sequences_through_decoder_and_caches_follow_the_target(
    sampling: Sampling, k: int, draft_temperature: float | None, missing: tuple[int, ...]
) -> None:
    target, draft = llama(3, seed=1), llama(3, seed=2)
    vocabulary = Vocabulary(3, 3 - len(missing), missing, None, (), None, "")
    decoder = SpeculativeDecoder(
        ReadableModel(target), ReadableModel(draft), vocabulary, k, draft_temperature
    )
    counts = torch.zeros(3**4)
    for seed in range(1500):
        a, b, c, d = decoder.generate([0, 1], sampling, 4, seed).generation.response_ids
        counts[27 * a + 9 * b + 3 * c + d] += 1
    assert abs(chi_squared_z(counts, joint(target, [0, 1], 4, sampling))) < 3.5
    # The test would notice: the same counts do not fit another distribution.
    assert not torch.allclose(
        joint(target, [0, 1], 4, Sampling(1.0)), joint(draft, [0, 1], 4, Sampling(1.0)), atol=0.05
    )
    if sampling == Sampling(1.0):
        assert chi_squared_z(counts, joint(draft, [0, 1], 4, sampling)) > 10


def test_recorded_log_probs_are_those_of_the_targets_sampling_distribution(
    target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    sampling = Sampling(0.7, top_k=20, top_p=0.9)
    found = (
        SpeculativeDecoder(ReadableModel(target), ReadableModel(draft), TINY, 3)
        .generate([9, 8, 7], sampling, 20, seed=5)
        .generation
    )
    with torch.inference_mode():
        logits = target(torch.tensor([found.prompt_ids + found.response_ids])).logits[0, 2:-1]
    probs = (
        probabilities(logits, 0.7, 20, 0.9).gather(-1, torch.tensor(found.response_ids)[:, None]).squeeze(-1)
    )
    assert torch.allclose(probs.log(), torch.tensor(found.logprobs), atol=1e-4)


def test_text_ends_with_the_first_end_token_and_nothing_beyond_is_counted(
    target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    text = own_text(target, [5, 6, 7], 12)
    end = text[4]
    vocabulary = Vocabulary(320, 300, TINY.missing_ids, 0, (end,), 0, "")
    # The target drafts for itself, so the end token arrives as an accepted proposal in the middle of a round.
    result = SpeculativeDecoder(ReadableModel(target), ReadableModel(target), vocabulary, 8).generate(
        [5, 6, 7], GREEDY, 12, seed=0
    )
    stop = text.index(end) + 1
    assert result.generation.response_ids == text[:stop]
    assert result.generation.finish_reason == "stop"
    counts = result.counts
    assert (counts.num_drafts, counts.num_draft_tokens) == (1, 8)
    assert (counts.num_accepted_tokens, counts.num_examined_tokens) == (stop, stop)
    assert result.accepted == ["draft"] * stop


def test_text_ends_at_the_limit(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    for limit in (1, 2, 5):
        result = SpeculativeDecoder(ReadableModel(target), ReadableModel(target), TINY, 4).generate(
            [5, 6], GREEDY, limit, seed=0
        )
        assert len(result.generation.response_ids) == limit
        assert result.generation.finish_reason == "length"
        assert sum(map(len, (r.tokens for r in result.rounds))) == len(result.accepted) == limit


def test_ids_without_a_token_are_never_proposed_but_the_target_may_write_them() -> None:
    target = llama(8, seed=3)
    with torch.no_grad():
        target.lm_head.weight[5:] *= 3
    vocabulary = Vocabulary(8, 5, (5, 6, 7), None, (), None, "")
    written, proposed = set[int](), set[int]()
    for seed in range(40):
        result = SpeculativeDecoder(ReadableModel(target), ReadableModel(target), vocabulary, 3).generate(
            [1, 2], Sampling(1.0), 12, seed
        )
        written |= set(result.generation.response_ids)
        proposed |= {
            token
            for token, accepted in zip(result.generation.response_ids, result.accepted, strict=True)
            if accepted
        }
    assert written & {5, 6, 7}
    assert not proposed & {5, 6, 7}


def test_a_sliding_window_target_is_decoded_rightly_past_its_window() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 128}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(**sizes, **layers, sliding_window=6, eos_token_id=None)
    target = MistralForCausalLM(config).eval()
    with torch.no_grad():
        target.lm_head.weight.mul_(30)
    vocabulary = Vocabulary(60, 60, (), None, (), None, "")
    for k in (1, 4):
        decoder = SpeculativeDecoder(ReadableModel(target), ReadableModel(llama(60, seed=4)), vocabulary, k)
        text = decoder.generate(list(range(10)), GREEDY, 20, 0).generation.response_ids
        assert text == own_text(target, list(range(10)), 20)
        with torch.inference_mode():
            logits = target(torch.tensor([[*range(10), *text]]), use_cache=False).logits[0, 9:-1]
        assert text == logits.argmax(-1).tolist()


def test_a_reader_that_takes_back_tokens_reads_on_as_if_they_had_not_been(target: PreTrainedModel) -> None:
    with torch.inference_mode():
        reader, other = ModelReader(target, 9), ModelReader(target, 64)
        reader.read(torch.tensor([5, 6, 7]))
        reader.read(torch.tensor([8, 9, 10, 11]))
        reader.take_back(4)
        found = reader.read(torch.tensor([12, 13]), keep=2)
        assert torch.allclose(found, other.read(torch.tensor([5, 6, 7, 8, 12, 13]), keep=2), atol=1e-4)
        assert (reader.length, reader.cache.get_seq_length()) == (6, 6)


def refuse(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_impossible_settings_are_refused_in_one_line(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    refuse(
        lambda: SpeculativeDecoder(ReadableModel(target), ReadableModel(draft), TINY, 0),
        RecipeError,
        "at least 1",
    )
    refuse(
        lambda: SpeculativeDecoder(ReadableModel(target), ReadableModel(draft), TINY, 3, -1.0),
        RecipeError,
        "negative",
    )
    decoder = SpeculativeDecoder(ReadableModel(target), ReadableModel(draft), TINY, 3)
    refuse(lambda: decoder.generate([], GREEDY, 8, 0), DataError, "at least one token")
    refuse(lambda: decoder.generate([5] * 250, GREEDY, 8, 0), DataError, "context holds 256")


def test_a_model_whose_state_cannot_be_taken_back_is_refused(draft: PreTrainedModel) -> None:
    other = llama(8, seed=0)
    other.config.layer_types = ["linear_attention"]
    refuse(lambda: ModelReader(other, 8), TargetError, "linear_attention")


class Waits(TorchFunctionMode):
    """Counts the calls that make the CPU wait for an accelerator."""

    # Not "numpy": an accelerator's tensor has it only behind "cpu", and the CPU's own makes nobody wait.
    NAMES: ClassVar = {"item", "tolist", "cpu", "nonzero", "masked_select"}
    NAMES |= {"__int__", "__float__", "__bool__", "__index__"}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.NAMES:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(0.8, top_k=20, top_p=0.9)])
def test_a_round_waits_for_the_device_once(
    target: PreTrainedModel, draft: PreTrainedModel, sampling: Sampling
) -> None:
    with Waits() as waits:
        result = SpeculativeDecoder(ReadableModel(target), ReadableModel(draft), TINY, 3).generate(
            [5, 6, 7], sampling, 24, seed=0
        )
    assert waits.seen == ["tolist"] * len(result.rounds)


def test_what_stands_in_a_cache_is_never_copied_again(target: PreTrainedModel) -> None:
    reader = ModelReader(target, 40)
    with torch.inference_mode():
        reader.read(torch.arange(4, 24))
        places = [layer.keys.data_ptr() for layer in reader.cache.layers]
        for length in (20, 12, 30):
            reader.take_back(min(length, reader.length))
            reader.read(torch.arange(4, 9))
            assert [layer.keys.data_ptr() for layer in reader.cache.layers] == places
