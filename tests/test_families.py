"""Every family of targets through the whole chain, tiny: counted, designed for, trained for, written by,
replayed, exported.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig

from family_fixture import MIXED, SHAPE, TARGETS, designed, family_config, noisy, write_family
from fastdraft.console import Console
from fastdraft.decoding.cache import ReadableModel
from fastdraft.decoding.replay import replay
from fastdraft.decoding.scoring import score
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.errors import RecipeError, TargetError
from fastdraft.functional.acceptance import add_counts
from fastdraft.functional.generation import Sampling
from fastdraft.modeling import shapes
from fastdraft.modeling.architecture import count_model, draft_hf_config, read_architecture
from fastdraft.modeling.drafts import load_draft, read_matrices, save_draft
from fastdraft.modeling.families import TARGET_FAMILIES, draft_family, text_config, why_draft_family
from fastdraft.modeling.heads import output_head, split_head
from fastdraft.recipe.training import OptimizerConfig, PretrainConfig
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.runtimes.huggingface_export import check_assisted, load_assistant, write_huggingface
from fastdraft.target import Target
from fastdraft.training import defaults
from fastdraft.training.batches import Batch
from fastdraft.training.objective import CrossEntropy

K = 3
GREEDY, SAMPLED = Sampling(0.0), Sampling(1.0)
PROMPTS = [[7 + (i * 37 + j * 11) % 280 for i in range(length)] for j, length in enumerate((3, 12, 30))]
PAST_LONGROPE = [[7 + (i * 37 + j * 11) % 280 for i in range(n)] for j, n in enumerate((18, 24, 30))]


@pytest.fixture(scope="module", params=list(TARGETS))
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """Name, directory and loaded model of one family."""
    folder = write_family(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, folder, Target.at(folder).model("cpu")


def _prompts(name: str) -> list[list[int]]:
    return PAST_LONGROPE if "longrope" in name else PROMPTS


def test_the_counted_parameters_are_the_loaded_models_own(target: tuple[str, Path, Any]) -> None:
    _, folder, model = target
    shape = read_architecture(Target.at(folder).config)
    counted = count_model(model)
    assert (shape.parameters, shape.read_parameters) == (counted.stored, counted.read)
    assert shape.tied == counted.tied
    assert shape.bytes_per_token(8) == counted.read


def test_embedding_and_head_are_found_in_the_files(target: tuple[str, Path, Any]) -> None:
    _, folder, model = target
    matrices = read_matrices(Target.at(folder))
    assert torch.equal(matrices["model.embed_tokens.weight"], model.get_input_embeddings().weight)
    if not count_model(model).tied:
        assert torch.equal(matrices["lm_head.weight"], model.get_output_embeddings().weight)


def test_hidden_states_and_head_give_the_models_own_logits(target: tuple[str, Path, Any]) -> None:
    _, _, model = target
    decoder, head = output_head(model)
    ids = torch.tensor([PROMPTS[1]])
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[0]
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
        assert torch.allclose(head.logits(hidden), expected, atol=1e-4, rtol=1e-4)


def test_greedy_text_with_a_draft_is_the_targets_own_and_replay_counts_the_same(
    target: tuple[str, Path, Any],
) -> None:
    name, folder, model = target
    vocabulary = Target.at(folder).vocabulary
    assert vocabulary.eos_token_ids == (3, 5)
    draft, prompts = noisy(model), _prompts(name)
    written = HuggingFaceEngine(model, vocabulary, 8).generate(prompts, GREEDY, 24, 0)
    decoder = SpeculativeDecoder(ReadableModel(model), ReadableModel(draft), vocabulary, K)
    exact = [decoder.generate(prompt, GREEDY, 24, 0) for prompt in prompts]
    assert [result.generation.response_ids for result in exact] == [row.response_ids for row in written]
    assert len({token for row in written for token in row.response_ids}) > 8
    for prompt, row in zip(prompts, written, strict=True):
        assert _alone(model, prompt, vocabulary.eos_token_ids) == row.response_ids
    replayed = replay(draft, [_Row(row, 0.0) for row in written], [K], vocabulary)
    assert [counts[K].num_drafts for counts in replayed] == [result.counts.num_drafts for result in exact]
    total, counted = add_counts(counts[K] for counts in replayed), add_counts(r.counts for r in exact)
    assert 0 < total.num_accepted_tokens == counted.num_accepted_tokens < total.num_draft_tokens


def test_log_probs_of_written_text_are_found_again_by_scoring(target: tuple[str, Path, Any]) -> None:
    name, folder, model = target
    vocabulary = Target.at(folder).vocabulary
    written = HuggingFaceEngine(model, vocabulary, 8).generate(_prompts(name), SAMPLED, 16, 1)
    for row, scored in zip(written, score(model, written, SAMPLED), strict=True):
        assert scored.logprobs == pytest.approx(row.logprobs, abs=2e-3)


def test_a_designed_draft_trains_and_is_taken_by_assisted_generation(
    target: tuple[str, Path, Any], tmp_path: Path
) -> None:
    name, folder, model = target
    checkpoint, manifest = designed(tmp_path / "run", folder)
    draft = load_draft(checkpoint)
    assert manifest["parameters"] == sum(p.numel() for p in draft.parameters())
    assert manifest["target"]["parameters"] == count_model(model).stored
    assert manifest["family"]["draft"] == draft.config.model_type
    assert bool(manifest["family"]["reason"]) == (manifest["family"]["draft"] != manifest["family"]["target"])
    assert draft.config.vocab_size == 320
    assert draft.config.max_position_embeddings == 160
    assert _trained(draft)
    vocabulary = Target.at(folder).vocabulary
    save_draft(draft, tmp_path / "checkpoint", Target.at(checkpoint))
    write_huggingface(tmp_path / "checkpoint", tmp_path / "huggingface", K)
    assistant = load_assistant(tmp_path / "huggingface")
    assert check_assisted(model, assistant, _prompts(name)[1], vocabulary, 24)[0]


@pytest.mark.parametrize(("length", "tokens"), [(3, 13), (17, 20)])
def test_a_text_on_either_side_of_a_longropes_line_is_exact_and_design_warns_of_crossing_it(
    length: int, tokens: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_family(tmp_path / "target", "phi3-longrope")
    model, endless = (Target.at(folder).model("cpu"), replace(Target.at(folder).vocabulary, eos_token_ids=()))
    prompt, text = PROMPTS[2][:length], list(PROMPTS[2][:length])
    with torch.inference_mode():
        for _ in range(tokens):  # no cache: every token from the whole text
            text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    [written] = HuggingFaceEngine(model, endless, 8).generate([prompt], GREEDY, tokens, 0)
    assert written.response_ids == text[length:]
    # Two tokens: neither proposals nor the last one of a round may stand beyond the line.
    room = tokens - 2 if length < 16 else tokens
    found = SpeculativeDecoder(ReadableModel(model), ReadableModel(noisy(model)), endless, 1).generate(
        prompt, GREEDY, room, 0
    )
    assert found.generation.response_ids == text[length : length + room]
    designed(tmp_path / "run", folder, console=Console())
    assert "This rope changes at 16 tokens" in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize("name", ["gpt2", "llama-rope-dynamic", "mistral-window", "gemma2"])
def test_a_text_that_fills_the_context_to_its_last_place_is_the_targets_own(
    name: str, tmp_path: Path
) -> None:
    folder = write_family(tmp_path, name)
    model = Target.at(folder).model("cpu")
    endless = replace(Target.at(folder).vocabulary, eos_token_ids=())
    [written] = HuggingFaceEngine(model, endless, 8).generate(PROMPTS[2:], GREEDY, 130, 0)
    for k in (1, 4):
        found = SpeculativeDecoder(ReadableModel(model), ReadableModel(noisy(model)), endless, k).generate(
            PROMPTS[2], GREEDY, 130, 0
        )
        assert found.generation.response_ids == written.response_ids
        assert found.counts.num_draft_tokens == k * found.counts.num_drafts
        [replayed] = replay(noisy(model), [_Row(written, 0.0)], [k], endless)
        assert replayed[k].num_drafts == found.counts.num_drafts
        assert replayed[k].num_accepted_tokens == found.counts.num_accepted_tokens


OWN = {"llava-mistral": "mistral", "mistral3": "mistral", "mistral-window": "mistral", "qwen2-mixed": "qwen2"}
OWN |= {"llama": "llama", "qwen3": "qwen3", "phi3-longrope": "phi3"}


@pytest.mark.parametrize("name", [name for name in TARGETS if not name.startswith("llama-")])
def test_a_draft_has_the_targets_family_or_is_a_llama_and_says_why(name: str) -> None:
    family = read_architecture(family_config(name)).family
    assert draft_family(family) == OWN.get(name, "llama")
    assert bool(why_draft_family(family)) == (name not in OWN)


def test_every_family_that_may_be_a_target_is_tested() -> None:
    configs = [part for name in TARGETS for part in (family_config(name), text_config(family_config(name)))]
    assert {config.model_type for config in configs} == set(TARGET_FAMILIES)


def test_a_llama_draft_has_the_rope_of_the_layers_that_see_everything() -> None:
    whole = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    rope = {"full_attention": whole, "sliding_attention": {"rope_theta": 1e4}}
    target = Gemma3TextConfig(**{**SHAPE, **MIXED, "rope_parameters": rope})
    draft = draft_hf_config(target, shapes.natural(read_architecture(target), 64))
    assert draft.model_type == "llama"
    assert draft.rope_parameters == whole
    other = family_config("gpt-neox")
    neox = draft_hf_config(other, shapes.natural(read_architecture(other), 64))
    assert neox.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}


def test_of_a_mixture_of_experts_a_token_reads_two_of_four_experts() -> None:
    shape = read_architecture(family_config("mixtral"))
    attention, router, norms, expert = 2 * 32 * 32 + 2 * 32 * 16, 4 * 32, 2 * 32, 3 * 32 * 48
    layer = attention + router + norms
    assert shape.parameters == 2 * 320 * 32 + 2 * (layer + 4 * expert) + 32
    assert shape.read_parameters == 320 * 32 + 2 * (layer + 2 * expert) + 32


def test_attention_with_capped_scores_does_not_use_fused_kernels(tmp_path: Path) -> None:
    model = Target.at(write_family(tmp_path, "gemma2")).model("cpu")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(TargetError, match="its logits are more than one product"):
        split_head(model)


def test_a_draft_of_a_family_that_is_never_trained_is_refused(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "gpt2")
    with pytest.raises(RecipeError, match="family gpt2; a draft's family must be one of llama"):
        designed(tmp_path / "run", folder, draft={"kind": "from", "path": str(folder)})


def _trained(draft: Any) -> bool:
    """One step lowers the loss of its own batch."""
    config = PretrainConfig(tokens=64, batch_tokens=64, optimizer=OptimizerConfig(learning_rate=0.01))
    settings = defaults.resolve(config, "pretrain", draft, 64, "fp32")
    step = defaults.build_step(draft, settings, CrossEntropy())
    ids = torch.tensor(PROMPTS[2])[None]
    batch = Batch(ids[:, :-1], ids[0, 1:])
    before, _, _ = step.gradients([batch])
    step.update(1.0)
    after, _, _ = step.gradients([batch])
    return after < before


def _alone(model: Any, prompt: list[int], eos: tuple[int, ...]) -> list[int]:
    """What transformers itself writes, with its own caches."""
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": list(eos), "pad_token_id": 0}
    written = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return list(written[0, len(prompt) :].tolist())


class _Row:
    """A written text as replay reads it."""

    def __init__(self, written: Any, temperature: float) -> None:
        self.prompt_ids, self.response_ids = written.prompt_ids, written.response_ids
        self.logprobs = written.logprobs
        self.temperature, self.top_k, self.top_p = temperature, 0, 1.0
