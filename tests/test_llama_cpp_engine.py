"""llama.cpp as the engine that writes: texts, ends, log-probs, failures; what of it a fingerprint holds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

from fastdraft.console import Console
from fastdraft.errors import DataError, Interrupted, MissingExtra, RecipeError, TargetError
from fastdraft.functional.generation import Sampling
from fastdraft.functional.sampling import probabilities
from fastdraft.modeling.gguf_files import read_gguf
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.recipe.synthesize import AutoEngineConfig, LlamaCppEngineConfig
from fastdraft.run_folder import StageFolder
from fastdraft.runtimes.engines import (
    choose_engine,
    describe_engine,
    open_engine,
    require_installed,
    uses_weights,
)
from fastdraft.runtimes.llama_cpp_engine import LlamaCppEngine, check_vocabulary
from fastdraft.runtimes.llama_cpp_process import ServerSettings
from fastdraft.runtimes.llama_cpp_server import LlamaServer
from fastdraft.target import Target
from gguf_fixture import CONTEXT, EOS, SIZE, write_gguf

PROMPTS = [[place, 7, 9] for place in range(40, 60)]
VOCABULARY = Vocabulary(SIZE, SIZE, (), 256, (EOS,), None, "", "")
GREEDY = Sampling(0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("model") / "t.gguf")


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[LlamaCppEngine]:
    settings = LlamaCppEngineConfig(kind="llamacpp", model=str(model), slots=4)
    engine = LlamaCppEngine(model, VOCABULARY, CONTEXT, settings, threads=1)
    yield engine
    for server in engine._running:
        server.close()


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LlamaServer]:
    with LlamaServer(ServerSettings(str(model), room=256, threads=1)) as server:
        yield server


def test_answers_written_together_are_those_written_alone_and_end_at_the_end_token(
    engine: LlamaCppEngine, server: LlamaServer
) -> None:
    answers = engine.generate(PROMPTS, GREEDY, 60, 0)
    assert [each.prompt_ids for each in answers] == PROMPTS
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.response_ids == server.complete(prompt, GREEDY, 60, 0).ids
        assert (answer.finish_reason == "stop") == (answer.response_ids[-1] == EOS)
        assert answer.finish_reason == "stop" or len(answer.response_ids) == 60
        assert answer.logprobs == [0.0] * len(answer.response_ids)
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}


def test_seeds_are_kept_and_each_answer_has_its_own(engine: LlamaCppEngine) -> None:
    same, warm = [PROMPTS[0]] * 3, Sampling(1.0)
    first, again, other = (
        [answer.response_ids for answer in engine.generate(same, warm, 12, seed)] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first[0] != first[1] != first[2]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=40), Sampling(1.3, top_p=0.8)])
def test_log_probs_are_of_the_distribution_drawn_from_or_missing(
    engine: LlamaCppEngine, server: LlamaServer, sampling: Sampling
) -> None:
    answers = engine.generate(PROMPTS, sampling, 1, 3)
    told = [answer for answer in answers if answer.logprobs]
    assert len(told) > 4  # the others' tokens are no whole character
    for answer in told:
        found = server.next_logprobs(answer.prompt_ids, SIZE)
        logits_V = torch.tensor([found[token] for token in range(SIZE)])
        probs_V = probabilities(logits_V, sampling.temperature, sampling.top_k, sampling.top_p)
        wanted = probs_V.log()[answer.response_ids[0]].item()
        assert answer.logprobs == pytest.approx([wanted], abs=1e-4)


def test_a_twin_ends_at_other_ids_and_what_the_file_ends_by_itself_is_no_use_then(
    engine: LlamaCppEngine,
) -> None:
    answers = engine.generate(PROMPTS, GREEDY, 60, 0)
    ends = answers[0].response_ids[2]
    cut = engine.with_ends([ends]).generate(PROMPTS, GREEDY, 60, 0)
    assert cut[0].response_ids == answers[0].response_ids[: answers[0].response_ids.index(ends) + 1]
    assert cut[0].finish_reason == "stop"
    for own, other in zip(answers, cut, strict=True):
        lost = len(own.response_ids) < 60 and ends not in own.response_ids
        assert other.fault == ("ended_by_other_id" if lost else "")
    assert any(other.fault for other in cut)


def test_a_stop_ends_the_server_and_the_next_prompts_start_another(engine: LlamaCppEngine) -> None:
    def stop() -> None:
        raise Interrupted("stopped")

    engine.generate(PROMPTS, GREEDY, 4, 0)
    [running], engine.check = engine._running, stop
    with pytest.raises(Interrupted):
        engine.generate(PROMPTS, GREEDY, 60, 0)
    assert running._process.poll() is not None
    engine.check = lambda: None
    assert len(engine.generate(PROMPTS, GREEDY, 4, 0)) == len(PROMPTS)


def test_a_prompt_too_long_for_the_context_is_refused(engine: LlamaCppEngine) -> None:
    with pytest.raises(DataError, match=f"the context holds {CONTEXT}"):
        engine.generate([[5] * CONTEXT], GREEDY, 1, 0)
    assert engine.generate([], GREEDY, 1, 0) == []


def test_the_fingerprint_holds_the_files_content_not_its_place(model: Path, tmp_path: Path) -> None:
    def described(path: Path, **more: int | str) -> dict[str, object]:
        return describe_engine(LlamaCppEngineConfig(kind="llamacpp", model=str(path), **more))  # type: ignore[arg-type]

    moved, other = tmp_path / "moved.gguf", write_gguf(tmp_path / "other.gguf", seed=1)
    shutil.copyfile(model, moved)
    assert described(model) == described(moved, slots=2, server="/usr/bin/llama-server")
    assert described(model) != described(other)
    assert described(model) != described(model, logprobs="none")
    assert not uses_weights(LlamaCppEngineConfig(kind="llamacpp", model=str(model)))


def test_a_file_that_is_not_there_or_is_another_models_is_refused(
    model: Path, tmp_path: Path, tiny_target: Path
) -> None:
    missing = LlamaCppEngineConfig(kind="llamacpp", model=str(tmp_path / "none.gguf"))
    with pytest.raises(RecipeError, match=r"synthesize\.engine\.model: .*none\.gguf: must be the target's"):
        require_installed(missing)
    target = Target.at(tiny_target)
    with pytest.raises(TargetError, match=rf"t\.gguf: {SIZE} tokens, target\.model has"):
        check_vocabulary(read_gguf(model), target)
    named = LlamaCppEngineConfig(kind="llamacpp", model=str(model))
    with pytest.raises(TargetError, match="must be equal; name the GGUF file of target.model"):
        open_engine(named, target, StageFolder(tmp_path / "synthesize"), Console(quiet=True))


def test_log_probs_can_be_left_out(engine: LlamaCppEngine, model: Path) -> None:
    twin = engine.with_ends([EOS])
    twin.settings = replace_logprobs(engine.settings)
    assert not any(answer.logprobs for answer in twin.generate(PROMPTS, Sampling(1.0), 2, 0))


def replace_logprobs(settings: LlamaCppEngineConfig) -> LlamaCppEngineConfig:
    return settings.model_copy(update={"logprobs": "none"})


def test_a_gguf_target_is_written_by_llama_cpp_where_it_is_installed_and_goes_on_as_it_was_begun(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDRAFT_CACHE", str(tmp_path / "cache"))
    folder, target, auto = StageFolder(tmp_path / "synthesize"), Target.at(model), AutoEngineConfig()
    choice = choose_engine(auto, target, "cpu", folder)
    assert choice.settings == LlamaCppEngineConfig(kind="llamacpp", model=str(model))
    folder.begin({"settings": {"engine": describe_engine(choice.settings)}})
    assert choose_engine(auto, target, "cpu", folder).settings == choice.settings
    monkeypatch.setattr("fastdraft.runtimes.llama_cpp_server.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="xllamacpp"):
        choose_engine(auto, target, "cpu", folder)
    fresh = choose_engine(auto, target, "cpu", StageFolder(tmp_path / "other"))
    assert (fresh.settings.kind, "xllamacpp" in fresh.reason) == ("huggingface", True)
