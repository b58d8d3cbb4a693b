"""OpenVINO: exports, the engine that writes as the target, and its silence. Skipped without OpenVINO."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("openvino_genai")
pytest.importorskip("nncf")
pytest.importorskip("optimum.exporters.openvino", exc_type=ImportError)

import numpy as np
import torch
from transformers import PreTrainedModel

from conftest import write_recipe
from family_fixture import write_family
from fastdraft import cli, pipeline
from fastdraft.data.rows import read_all
from fastdraft.data.sparse_logits import read_with_logits
from fastdraft.decoding.autoregressive import generate_batch
from fastdraft.decoding.scoring import score
from fastdraft.errors import DataError, FastDraftError, MissingExtra, RecipeError, TargetError
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.recipe.recipe import load_recipe
from fastdraft.runtimes import openvino, openvino_export
from fastdraft.runtimes.openvino import (
    OpenVINOEngine,
    answer_seed,
    device_properties,
    load_pipeline,
    require_openvino,
    silence_telemetry,
)
from fastdraft.runtimes.openvino_export import check_pair, export_openvino
from fastdraft.runtimes.openvino_speculative import OpenVINOPair, OpenVINOSettings
from fastdraft.runtimes.runtime import Proposer, TimedText
from fastdraft.runtimes.synthesis import sparse_logits
from fastdraft.target import Target

PROMPTS = [list(range(5, 5 + n)) for n in (3, 9, 17, 30)]


@pytest.fixture(scope="module")
def vocabulary(tiny_target: Path) -> Vocabulary:
    return Target.at(tiny_target).vocabulary


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> PreTrainedModel:
    return Target.at(tiny_target).model("cpu")


@pytest.fixture(scope="module")
def engine(exported_target: Path, vocabulary: Vocabulary) -> OpenVINOEngine:
    return OpenVINOEngine(exported_target, vocabulary, 256, precision="exact", threads=1)


def greedy(
    target: PreTrainedModel, prompts: list[list[int]], tokens: int, ends: set[int]
) -> list[Generation]:
    return generate_batch(target, prompts, Sampling(0.0), tokens, ends, torch.Generator())


NETWORK = """
import multiprocessing, socket, sys
from pathlib import Path

calls = []
socket.socket.connect = lambda *arguments: calls.append(arguments)
socket.getaddrinfo = lambda *arguments, **_: calls.append(arguments) or []
multiprocessing.Process.start = lambda process: calls.append(process)  # in which openvino_telemetry sends
from fastdraft.runtimes import openvino_export
from fastdraft.target import Target

openvino_export.convert(Target.at(sys.argv[1]), Path(sys.argv[2]), "int8")
assert {"nncf", "optimum.exporters.openvino", "openvino.tools.ovc"} <= set(sys.modules)
print("calls", calls)
"""


def test_a_conversion_sends_nothing_and_leaves_the_users_consent_alone(
    tiny_target: Path, tmp_path: Path
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    for folder in (home, out):
        folder.mkdir()
    away = [
        "HF_HUB_OFFLINE",
        "CI",
        "TF_BUILD",
        "JENKINS_URL",
        "NNCF_CI",
        "NNCF_DEV",
    ]  # as on a user's machine
    environment = {name: value for name, value in os.environ.items() if name not in away}
    environment |= {"HOME": str(home), "LOCALAPPDATA": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", NETWORK, str(tiny_target), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "calls []"
    assert not list(home.glob("[iI]ntel*")), "the identifier and the statistics of openvino_telemetry"


def test_telemetry_that_was_imported_before_sends_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    class TelemetrySender:
        def send(self, backend: object, message: object) -> None:
            pytest.fail("sent")

    module = SimpleNamespace(TelemetrySender=TelemetrySender)
    monkeypatch.setitem(sys.modules, "openvino_telemetry.utils.sender", module)
    silence_telemetry()
    TelemetrySender().send("backend", "message")


def test_an_export_holds_the_source_tokenizer_byte_for_byte(exported_target: Path, tiny_target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (exported_target / name).read_bytes() == (tiny_target / name).read_bytes()
    for name in openvino_export._FILES:
        assert (exported_target / name).is_file()


def test_compressed_weights_are_smaller_and_still_write(exported_target: Path, tmp_path: Path) -> None:
    size = {"fp32": (exported_target / "openvino_model.bin").stat().st_size}
    for weights in ("int8", "int4"):
        folder = shutil.copytree(exported_target, tmp_path / weights)
        openvino_export.compress(folder / "openvino_model.xml", weights)
        assert openvino_export.check_export(folder, folder).same_text
        size[weights] = (folder / "openvino_model.bin").stat().st_size
    assert size["int4"] <= size["int8"] < 0.4 * size["fp32"]


def test_an_export_that_fails_its_check_leaves_no_folder(
    tiny_target: Path, exported_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(source: object, folder: Path, *_: object) -> None:
        shutil.copytree(exported_target, folder, dirs_exist_ok=True)

    monkeypatch.setattr(openvino_export, "convert", copy)
    write = openvino_export.OpenVINOPair.write

    def other_alone(pair: OpenVINOPair, *asked: Any) -> list[TimedText]:
        return write(pair, *asked) if isinstance(asked[-1], Proposer) else [TimedText([7] * 32, 1.0, 1.0)]

    monkeypatch.setattr(openvino_export.OpenVINOPair, "write", other_alone)
    with pytest.raises(FastDraftError, match="differs with the draft, by a log-prob of"):
        export_openvino(Target.at(tiny_target), tmp_path / "out", "fp32")
    assert list(tmp_path.iterdir()) == []


def test_the_command_exports_a_directory_and_says_what_was_found(
    near_draft: Path, exported_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--format openvino --output {tmp_path / 'out'} --target {exported_target}"
    assert cli.main(["export", str(near_draft), *options.split()]) == 0
    assert "greedy tokens with and without it equal" in "".join(capsys.readouterr())
    assert (tmp_path / "out" / "openvino_detokenizer.xml").is_file()


def test_greedy_text_is_that_of_transformers(
    engine: OpenVINOEngine, target: PreTrainedModel, vocabulary: Vocabulary
) -> None:
    expected = greedy(target, PROMPTS, 20, set(vocabulary.eos_token_ids))
    assert engine.generate(PROMPTS, Sampling(0.0), 20, seed=0) == expected


@pytest.mark.parametrize("name", ["gemma3-pictures", "qwen2-vl"])
def test_the_text_part_of_a_multimodal_target_is_converted_and_writes_the_targets_own_text(
    name: str, tmp_path: Path
) -> None:
    source = write_family(tmp_path / "target", name)
    (tmp_path / "out").mkdir()
    openvino_export.convert(Target.at(source), tmp_path / "out", "fp32")
    [expected] = greedy(Target.at(source).model("cpu"), [PROMPTS[3]], 32, set())
    pair = OpenVINOPair(tmp_path / "out", tmp_path / "out", OpenVINOSettings(precision="exact"))
    [text] = pair.write([PROMPTS[3]], Sampling(0.0), 32, 0)
    assert text.response_ids == expected.response_ids
    assert len(set(expected.response_ids)) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "target"]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.6), Sampling(0.8, top_k=7), Sampling(0.9, top_p=0.7), Sampling(0.7, 20, 0.9)],
)
def test_log_probs_are_of_the_distribution_drawn_from(
    engine: OpenVINOEngine, target: PreTrainedModel, sampling: Sampling
) -> None:
    written = engine.generate(PROMPTS, sampling, 16, seed=3)
    for found, exact in zip(written, score(target, written, sampling), strict=True):
        assert found.logprobs == pytest.approx(exact.logprobs, abs=2e-3)


def test_answers_depend_on_seed_and_place_only(engine: OpenVINOEngine) -> None:
    same = [PROMPTS[0]] * 6
    first = engine.generate(same, Sampling(1.0), 16, seed=5)
    assert engine.generate(same, Sampling(1.0), 16, seed=5) == first
    assert engine.generate(same[:2], Sampling(1.0), 16, seed=5) == first[:2]
    assert engine.generate(same, Sampling(1.0), 16, seed=6) != first
    assert len({tuple(g.response_ids) for g in first}) > 1
    assert answer_seed(5, 0) != answer_seed(5, 1)


def test_an_answer_ends_with_the_end_of_sequence_id(engine: OpenVINOEngine, vocabulary: Vocabulary) -> None:
    written = engine.generate(PROMPTS * 8, Sampling(1.0), 60, seed=0)
    assert {"stop", "length"} == {g.finish_reason for g in written}
    for answer in written:
        ends = [token in vocabulary.eos_token_ids for token in answer.response_ids]
        assert ends[-1] == (answer.finish_reason == "stop")
        assert not any(ends[:-1])
        assert len(answer.logprobs) == len(answer.response_ids)


def test_a_loop_is_ended_where_it_shows(
    engine: OpenVINOEngine, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdraft.runtimes.openvino.is_looping", lambda ids: len(ids) >= 32)
    impatient = engine.with_ends(vocabulary.eos_token_ids)
    whole = engine.generate(PROMPTS, Sampling(1.0), 80, seed=2)
    for cut, full in zip(impatient.generate(PROMPTS, Sampling(1.0), 80, seed=2), whole, strict=True):
        assert cut.response_ids == full.response_ids[:32]
        assert cut.logprobs == full.logprobs[:32]


def test_what_does_not_fit_is_refused(engine: OpenVINOEngine, tiny_target: Path) -> None:
    with pytest.raises(DataError, match="the context holds 256"):
        engine.generate([[5] * 250], Sampling(0.0), 20, seed=0)
    with pytest.raises(RecipeError, match="OpenVINO sees"):
        device_properties("TPU", "fast")
    with pytest.raises(FastDraftError, match=r"no openvino_model\.xml"):
        load_pipeline(tiny_target, "CPU", {}, 1)


def test_synthesize_writes_accounted_rows(tiny_target: Path, tmp_path: Path) -> None:
    engine = "synthesize.engine={kind: openvino, weights: fp16}"
    recipe = load_recipe(str(write_recipe(tmp_path, tiny_target)), [engine, "synthesize.tokens=1500"])
    run = pipeline.run(recipe, only=("design", "prepare", "synthesize"))
    artifact = run.folder("synthesize")
    manifest, rows = artifact.manifest(), list(read_all(artifact))
    assert manifest["engine"] == "openvino"
    assert manifest["asked"] == manifest["written"] + sum(manifest["filtered"].values()) + manifest["failed"]
    assert len(rows) == len({row.row_id for row in rows}) == manifest["written"]
    assert all(value == 0 if row.temperature == 0 else value <= 0 for row in rows for value in row.logprobs)


def test_logits_are_kept_of_the_export_that_writes_also_where_a_sibling_does(
    tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    engine = "synthesize.engine={kind: openvino, weights: fp32, precision: exact}"
    changes = [engine, "synthesize.tokens=400", f"synthesize.writer={tiny_draft}"]
    recipe = load_recipe(
        str(write_recipe(tmp_path, tiny_target)), [*changes, "synthesize.logits={kind: top_k, k: 16}"]
    )
    folder = pipeline.run(recipe, only=("design", "prepare", "synthesize")).folder("synthesize")
    placed = list(read_with_logits(folder))
    expected = sparse_logits(Target.at(tiny_draft).model("cpu"), [row for row, _ in placed], 16)
    for (row, logits), whole in zip(placed, expected, strict=True):
        found = logits.read(0, len(row.response_ids))
        np.testing.assert_allclose(found.logprobs, whole.logprobs, atol=2e-2)
        assert (found.ids[:, 0] == whole.ids[:, 0]).all()


@pytest.fixture
def draft(tiny_draft: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil; without weights, for the rules of a pair need none."""
    folder = tmp_path / "draft"
    shutil.copytree(tiny_draft, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"vocab_size": 384}, r"draft 384, target 320.*vocab_size"),
        ("config.json", {"max_position_embeddings": 128}, r"draft 128, target 256.*context"),
        ("tokenizer_config.json", {"bos_token": "<|user|>"}, "draft 1, target 0.*bos_token_id"),
        ("tokenizer_config.json", {"eos_token": "<|user|>"}, "draft 1, target 3.*eos_token_id"),
        ("tokenizer_config.json", {"pad_token": "<|user|>"}, "draft 1, target 0.*pad_token_id"),
    ],
)
def test_a_draft_that_openvino_would_not_take_is_refused(
    tiny_target: Path, draft: Path, file: str, changes: dict[str, object], message: str
) -> None:
    change(draft / file, **changes)
    with pytest.raises(TargetError, match=message):
        check_pair(Target.at(tiny_target), Target.at(draft))


def test_a_tokenizer_that_splits_otherwise_is_refused_and_a_longer_context_taken(
    tiny_target: Path, draft: Path
) -> None:
    change(draft / "config.json", max_position_embeddings=512)
    check_pair(Target.at(tiny_target), Target.at(draft))
    state = json.loads((draft / "tokenizer.json").read_text(encoding="utf-8"))
    state["model"]["merges"] = []
    (draft / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(TargetError, match="'Could you.*must be equal"):
        check_pair(Target.at(tiny_target), Target.at(draft))


def test_a_missing_library_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "find_spec", lambda name: None if name == "nncf" else True)
    with pytest.raises(MissingExtra, match=r"nncf is not installed.*fastdraft\[openvino\]"):
        require_openvino()
    monkeypatch.setattr(openvino, "find_spec", lambda name: None if name == "optimum.intel" else True)
    with pytest.raises(MissingExtra, match="--no-deps optimum-intel"):
        require_openvino()
