"""Our decoder over OpenVINO's passes writes what it writes over transformers. Skipped without OpenVINO."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openvino_genai")
pytest.importorskip("nncf")
pytest.importorskip("optimum.exporters.openvino", exc_type=ImportError)

import torch

from fastdraft.commands import generate
from fastdraft.console import Console
from fastdraft.decoding.cache import ReadableModel
from fastdraft.decoding.proposers import ProposerKind
from fastdraft.decoding.reader import Readable
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.errors import DataError, RecipeError
from fastdraft.functional.generation import Sampling
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.recipe.synthesize import OpenVINOEngineConfig
from fastdraft.run_folder import StageFolder
from fastdraft.runtimes import engines
from fastdraft.runtimes.openvino_decoder import DecoderPair, OpenVINODecoderRuntime
from fastdraft.runtimes.openvino_export import convert
from fastdraft.runtimes.openvino_reader import OpenVINOModel
from fastdraft.runtimes.openvino_speculative import OpenVINOPair, OpenVINOSettings
from fastdraft.runtimes.runtime import Proposer
from fastdraft.target import Target
from lossless import TOY_PROMPT, TOY_SIZE, write_toy, written

GREEDY = Sampling(0.0)
KINDS: tuple[ProposerKind, ...] = ("draft", "lookup", "lookup_draft")
Pair = tuple[Readable, Readable]


@pytest.fixture(scope="module")
def ours(exported_target: Path, exported_draft: Path) -> Pair:
    return OpenVINOModel(exported_target, "exact", 1), OpenVINOModel(exported_draft, "exact", 1)


@pytest.fixture(scope="module")
def theirs(tiny_target: Path, near_draft: Path) -> Pair:
    target, draft = (ReadableModel(Target.at(folder).model("cpu")) for folder in (tiny_target, near_draft))
    return target, draft


@pytest.fixture(scope="module")
def vocabulary(tiny_target: Path) -> Vocabulary:
    return Target.at(tiny_target).vocabulary


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(4, 300, (size,), generator=generator).tolist() for size in (1, 9, 30)]
    return [*found, [7, 8, 9, 10, 7, 8, 9, 10, 7, 8]]


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_greedy_text_and_counts_are_those_over_transformers(
    ours: Pair, theirs: Pair, vocabulary: Vocabulary, kind: ProposerKind | None
) -> None:
    # Ends at a token in the middle of some texts, of others at the limit.
    [end] = (
        SpeculativeDecoder(*theirs, vocabulary, 3, proposer=None)
        .generate(prompts()[1], GREEDY, 12, 0)
        .generation.response_ids[11:]
    )
    vocabulary = replace(vocabulary, eos_token_ids=(end,))
    decoders = [SpeculativeDecoder(*pair, vocabulary, 3, proposer=kind) for pair in (ours, theirs)]
    for prompt in prompts():
        found, expected = (each.generate(prompt, GREEDY, 40, 0) for each in decoders)
        assert found.generation == expected.generation
        assert found.rounds == expected.rounds
    assert decoders[0].generate(prompts()[1], GREEDY, 40, 0).generation.finish_reason == "stop"


def test_a_text_may_fill_the_context_and_no_more(ours: Pair, theirs: Pair, vocabulary: Vocabulary) -> None:
    vocabulary, prompt = replace(vocabulary, eos_token_ids=()), list(range(4, 254))
    for kind in KINDS:
        found, expected = (
            SpeculativeDecoder(*pair, vocabulary, 5, proposer=kind).generate(prompt, GREEDY, 6, 0)
            for pair in (ours, theirs)
        )
        assert found == expected
        assert len(found.generation.response_ids) == 6
        with pytest.raises(DataError, match="the context holds 256"):
            SpeculativeDecoder(*ours, vocabulary, 5, proposer=kind).generate(prompt, GREEDY, 7, 0)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_prompts_without_tokens_or_longer_than_the_context_are_refused_before_anything_is_read(
    ours: Pair, theirs: Pair, vocabulary: Vocabulary, kind: ProposerKind | None
) -> None:
    for pair in (ours, theirs):
        decoder = SpeculativeDecoder(*pair, vocabulary, 3, proposer=kind)
        for prompt, rule in (
            ([], "no tokens"),
            ([5] * 256, "the context holds 256"),
            ([5] * 9000, "holds 256"),
        ):
            with pytest.raises(DataError, match=rule):
                decoder.generate(prompt, GREEDY, 1, 0)


def test_a_stop_in_the_middle_leaves_nothing_behind(ours: Pair, vocabulary: Vocabulary) -> None:
    decoder = SpeculativeDecoder(*ours, replace(vocabulary, eos_token_ids=()), 3, proposer="lookup_draft")
    whole = decoder.generate(prompts()[2], GREEDY, 30, 0)
    stopped = decoder.rounds(prompts()[3], GREEDY, 30, 0)
    next(stopped)
    next(stopped)
    assert decoder.generate(prompts()[2], GREEDY, 30, 0) == whole  # while the other still stands
    stopped.close()
    assert decoder.generate(prompts()[2], GREEDY, 30, 0) == whole


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder, found = tmp_path_factory.mktemp("toys"), []
    for seed in (0, 1):
        write_toy(folder / f"source-{seed}", seed)
        (folder / f"exported-{seed}").mkdir()
        convert(Target.at(folder / f"source-{seed}"), folder / f"exported-{seed}", "fp32")
        found.append(OpenVINOModel(folder / f"exported-{seed}", "exact", 1))
    return found[0], found[1]


@pytest.mark.parametrize(
    ("kind", "sampling"), [("draft", Sampling(0.7, 4)), ("lookup_draft", Sampling(1.0, 0, 0.9))]
)
def test_sampled_text_is_distributed_as_the_targets(
    toys: Pair, kind: ProposerKind, sampling: Sampling
) -> None:
    # benchmarks/losslessness.py takes 20,000 samples.
    found = written(toys, sampling, kind, 300, 1, prompt=TOY_PROMPT, size=TOY_SIZE)
    assert found.p_value > 0.01 / 2
    assert found.accepted_share > 0.3


def test_the_runtime_writes_and_counts_as_genai_does(exported_target: Path, exported_draft: Path) -> None:
    folders = exported_target, exported_draft
    how: Any = {"precision": "exact", "threads": 1}
    genai, own = OpenVINOPair(*folders, OpenVINOSettings(**how)), OpenVINODecoderRuntime(**how).open(*folders)
    own.vocabulary = replace(own.vocabulary, missing_ids=())  # GenAI masks none
    for proposer in (None, Proposer("draft", 3)):
        asked = (prompts(), GREEDY, 24, 0, proposer)
        expected = genai.write(*asked, exact_counts=proposer is not None)
        for texts in (own.write(*asked), own.write(*asked, exact_counts=True)):
            assert [text.response_ids for text in texts] == [text.response_ids for text in expected]
        assert [text.counts for text in texts] == [text.counts for text in expected]
    first, *_, last = own.write(*asked)
    assert 0 < first.first_token_seconds <= first.seconds < last.first_token_seconds
    spent = own.time_spent(prompts()[2], 12, 3)
    assert 0 < spent.target_seconds + spent.draft_seconds < spent.total_seconds


def test_exact_runs_of_evaluate_are_of_the_weights_that_wrote(
    exported_target: Path, exported_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def copy(source: Target, folder: Path, weights: str) -> None:
        made.append(weights)
        shutil.copytree(exported_target if weights == "int8" else exported_draft, folder, dirs_exist_ok=True)

    monkeypatch.setattr(engines, "export_openvino", copy)
    monkeypatch.setattr(engines, "convert", copy)
    asked = (OpenVINOEngineConfig(kind="openvino", weights="int8"), Target.at(exported_target))
    for _ in range(2):  # the second finds them
        models = engines.exact_pair(
            *asked, Target.at(exported_draft), StageFolder(tmp_path / "evaluate"), Console(), 1
        )
    assert made == ["int8", "fp32"]
    target, draft = (model.folder.relative_to(tmp_path).as_posix() for model in models)
    assert target.startswith("converted/int8-")
    assert draft == "evaluate/converted/draft"


def test_a_text_of_one_token_has_no_round_to_count(exported_target: Path, exported_draft: Path) -> None:
    pair = DecoderPair((exported_target, exported_draft), OpenVINODecoderRuntime("CPU", "", "exact", 1))
    [text] = pair.write(prompts()[:1], GREEDY, 1, 0, Proposer("lookup_draft", 3), exact_counts=True)
    assert (len(text.response_ids), text.rounds) == (1, [])


def test_only_a_cpu_runs_it() -> None:
    with pytest.raises(RecipeError, match="benchmark.device: GPU; the runtime fastdraft runs on CPU alone"):
        OpenVINODecoderRuntime(device="GPU").describe()


def test_generate_in_openvino_writes_the_same_text_to_stdout(
    tiny_target: Path,
    near_draft: Path,
    exported_target: Path,
    exported_draft: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generate, "OpenVINOModel", partial(OpenVINOModel, precision="exact", threads=1))
    how: Any = {
        "prompt": "Once upon a time",
        "chat": False,
        "proposer": "both",
        "num_speculative_tokens": 3,
        "temperature": 0.0,
    }
    how |= {"top_k": 0, "top_p": 1.0, "max_new_tokens": 20, "seed": 0, "device": "cpu", "color": None}
    for exports in (None, (exported_target, exported_draft)):
        generate.run(
            target=str(tiny_target),
            draft=str(near_draft),
            exports=exports,
            compare=True,
            console=Console(),
            **how,
        )
    told = capsys.readouterr()
    first, second = told.out[: len(told.out) // 2], told.out[len(told.out) // 2 :]
    assert first == second
    assert told.err.count("same text as the target alone") == 2
