"""A head over some ids: what it gives, how it is kept, and that training with it is training with -inf outside."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import TEXT
from fastdraft import pipeline
from fastdraft.console import Console
from fastdraft.data.rows import SyntheticRow, unit_name, write_rows
from fastdraft.data.token_counts import count_tokens, covered, most_written
from fastdraft.decoding.replay import accept_probabilities
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.errors import RecipeError, TargetError
from fastdraft.functional.distillation import DenseTarget, SparseTarget, token_loss, top_k_buckets
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.modeling.drafts import load_draft, save_draft
from fastdraft.modeling.heads import output_head
from fastdraft.modeling.trimmed_head import HEAD_IDS, TrimmedHead, trim
from fastdraft.recipe.evaluation import ExportConfig
from fastdraft.recipe.recipe import load_recipe
from fastdraft.run_folder import RunFolder
from fastdraft.runtimes.gguf_export import as_stored
from fastdraft.runtimes.huggingface_export import load_assistant, outside_head
from fastdraft.runtimes.openvino import MODEL_FILE, core, output_matrix
from fastdraft.runtimes.openvino_export import export_openvino
from fastdraft.runtimes.openvino_reader import OpenVINOModel
from fastdraft.stages.export import _check_head
from fastdraft.target import Target
from fastdraft.training.batches import Batch, Sample, packed_batch, padded_batch
from fastdraft.training.defaults import TrainingSettings, build_step
from fastdraft.training.objective import CrossEntropy, Objective, TokenDistillation
from fastdraft.training.step import TrainStep

IDS = torch.tensor([0, 3, 5, 8, 40, 41, 42, 100, 250])
VOCAB = 320
SETTINGS = TrainingSettings("adamw", 1e-2, 1e-2, 0.0, 0.95, 64, 64, "fp32")
LOSSES = ("forward_kl", "reverse_kl", "jsd", "tvd", "ce_kl", "ce_tvd", "lk_hybrid", "lk_log")


def trimmed(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = load_draft(folder, dtype=dtype)
    trim(model, IDS)
    return model


def outside() -> torch.Tensor:
    return torch.ones(VOCAB, dtype=torch.bool).index_fill(0, IDS, False)


def masked_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Those of a whole head with -inf at the ids that a trimmed one lacks."""
    return model(input_ids=ids).logits.masked_fill(outside(), -torch.inf)


def test_kept_ids_have_the_logits_of_the_whole_head_and_all_others_minus_infinity(tiny_draft: Path) -> None:
    ids = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = (
            trimmed(tiny_draft)(input_ids=ids).logits,
            masked_logits(load_draft(tiny_draft), ids),
        )
        decoder, head = output_head(trimmed(tiny_draft))
        by_head = head.logits(decoder(input_ids=ids).last_hidden_state.flatten(0, 1))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(by_head, wanted.flatten(0, 1))
    assert head.vocab_size == VOCAB


def test_a_saved_trimmed_draft_is_a_plain_directory_whose_other_rows_are_a_mean_of_kept_ones(
    tiny_draft: Path, tmp_path: Path
) -> None:
    model = trimmed(tiny_draft)
    save_draft(model, tmp_path / "draft", Target.at(tiny_draft))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    rows, kept = plain.lm_head.weight, model.lm_head.weight
    assert rows.shape == (VOCAB, 16)
    assert torch.equal(rows[IDS], kept)
    rarest = kept[(kept @ kept.mean(0)).topk(2).indices].mean(0)
    assert torch.equal(rows[outside()], rarest.expand(VOCAB - len(IDS), -1))
    again = load_draft(tmp_path / "draft")
    assert torch.equal(again.lm_head.weight, kept)
    assert torch.equal(again.lm_head.ids, IDS)
    shape = Target.at(tmp_path / "draft").architecture
    assert (shape.head_size, shape.tied) == (len(IDS), False)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.read_parameters == shape.parameters - VOCAB * 16


def test_a_tied_draft_is_untied_by_trimming_and_greedy_text_of_the_whole_head_stays_inside(
    tiny_draft: Path, tmp_path: Path
) -> None:
    model = load_draft(tiny_draft)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    embedding = model.get_input_embeddings().weight
    trim(model, IDS)
    assert torch.equal(model.lm_head.weight, embedding[IDS])
    save_draft(model, tmp_path / "draft", Target.at(tiny_draft))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    assert torch.equal(plain.get_input_embeddings().weight, embedding)
    with torch.no_grad():
        ids = torch.randint(0, VOCAB, (8, 32), generator=torch.Generator().manual_seed(1))
        assert not outside()[plain(input_ids=ids).logits.argmax(-1)].any()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "JSONDecodeError"),
        ('{"ids": []}', "must rise"),
        ('{"ids": [3, 2]}', "must rise"),
        (json.dumps({"ids": [VOCAB]}), f"below {VOCAB}"),
        ("[1]", "TypeError"),
    ],
)
def test_ids_that_cannot_be_a_heads_are_refused_in_one_line(
    tiny_draft: Path, tmp_path: Path, text: str, told: str
) -> None:
    folder = tmp_path / "draft"
    save_draft(trimmed(tiny_draft), folder, Target.at(tiny_draft))
    (folder / HEAD_IDS).write_text(text, encoding="utf-8")
    with pytest.raises(TargetError, match=told) as found:
        load_draft(folder)
    assert str(found.value).startswith(f"{folder / HEAD_IDS}: ")
    assert "\n" not in str(found.value)


def test_a_token_outside_of_the_head_is_never_accepted(tiny_draft: Path) -> None:
    ids = [3, 7, 41, 250, 11, 3]
    sure = Generation([1, 2], ids, [-30.0] * len(ids), "length")  # whatever has a probability is accepted
    row = SyntheticRow.of(sure, "own", Sampling(1.0))
    [found] = accept_probabilities(trimmed(tiny_draft), [row], Target.at(tiny_draft).vocabulary)
    assert found.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]


def batch_of(kind: str) -> Batch:
    """Packed rows or padded samples, some labels of which the head lacks."""
    generator, some = np.random.default_rng(0), [*IDS.tolist(), 7, 9]
    if kind == "packed":
        return packed_batch(generator.choice(some, (3, 9)))
    return padded_batch([Sample(*np.split(generator.choice(some, n).astype(np.int32), [3])) for n in (9, 6)])


class Example:
    """Random hidden states of a batch, a whole head and a step with its trimmed one, in float64."""

    def __init__(self, batch: Batch, objective: Objective) -> None:
        generator, shape = torch.Generator().manual_seed(0), (*batch.input_ids.shape, 6)
        self.hidden = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        self.head = torch.randn(VOCAB, 6, generator=generator, dtype=torch.float64).requires_grad_()
        states, rows = (
            SimpleNamespace(last_hidden_state=self.hidden),
            TrimmedHead(self.head[IDS], IDS, VOCAB).rows,
        )
        device = torch.device("cpu")
        self.step = TrainStep(lambda **_: states, self.head[IDS], [], [], objective, device, rows=rows)
        self.fitted = self.step.on_head(batch)
        logits = (self.hidden @ self.head.T).flatten(0, 1).masked_fill(outside(), -torch.inf)
        self.logits = logits if batch.index is None else logits[batch.index]

    def check(self, wanted: torch.Tensor) -> None:
        """The step's loss and its gradients are those of a formula."""
        loss, parts = self.step.loss_sum(self.fitted), (self.hidden, self.head)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(torch.autograd.grad(loss, parts), torch.autograd.grad(wanted, parts))


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_cross_entropy_is_that_of_a_whole_head_with_minus_infinity_over_the_labels_it_has(kind: str) -> None:
    batch = batch_of(kind)
    example, inside = Example(batch, CrossEntropy(1e-3)), ~outside()[batch.labels]
    logits = example.logits[inside]
    wanted = functional.cross_entropy(logits, batch.labels[inside], reduction="sum")
    example.check(wanted + 1e-3 * logits.logsumexp(-1).square().sum())
    assert example.fitted.num_trained == int(inside.sum()) < batch.num_trained


def formula(name: str, target: torch.Tensor, draft: torch.Tensor, ce: torch.Tensor) -> torch.Tensor:
    """Losses of rows: `target` over buckets (not all of its mass, where the head lacks some), `draft` over
    the same.
    """

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.where(a > 0, a * (a / b).log(), 0.0).sum(-1)

    mass = target.sum(-1)
    given = target / mass[:, None]
    overlap = torch.minimum(target, draft).sum(-1)
    middle, share = (given + draft) / 2, torch.exp(-3 * overlap).detach()
    return {
        "forward_kl": lambda: mass * kl(given, draft),
        "reverse_kl": lambda: mass * kl(draft, given),
        "jsd": lambda: mass * (kl(given, middle) + kl(draft, middle)) / 2,
        "tvd": lambda: 1 - overlap,
        "ce_kl": lambda: ce / 2 + mass * kl(given, draft) / 2,
        "ce_tvd": lambda: ce / 2 + (1 - overlap) / 2,
        "lk_hybrid": lambda: share * mass * kl(given, draft) + (1 - share) * (1 - overlap),
        "lk_log": lambda: -overlap.log(),
    }[name]()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", LOSSES)
def test_distillation_is_its_formula_over_the_heads_ids(name: str, sparse: bool) -> None:
    batch, kept = batch_of("padded"), ~outside()
    shape, generator = (batch.num_trained, VOCAB), torch.Generator().manual_seed(0)
    target_logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target_logits[:, IDS[2:6]] += 6  # of the stored ids some are in the head and some are not
    stored = top_k_buckets(target_logits, 12)
    teacher: Any = SimpleNamespace(distribution=lambda _: DenseTarget(target_logits.__getitem__, IDS, VOCAB))
    objective = TokenDistillation(token_loss(name), None if sparse else teacher)
    example = Example(replace(batch, target=stored if sparse else None), objective)
    target, draft, inside = target_logits.softmax(-1), example.logits.softmax(-1), kept[batch.labels]
    labels = batch.labels.where(inside, IDS[0])
    ce = functional.cross_entropy(example.logits, labels, reduction="none").where(inside, 0.0)
    if sparse:  # the ids of each row that are stored and in the head, in IDS' order, and the tail
        own = torch.zeros(shape, dtype=torch.bool).scatter(1, stored.ids, True)
        assert (own & kept).any()
        assert (own & ~kept).any()
        tails = [x.where(~own, 0.0).sum(1, keepdim=True) for x in (target, draft)]
        target, draft = (
            torch.cat([x.where(own & kept, 1e-300)[:, IDS], t], 1)
            for x, t in zip((target, draft), tails, strict=False)
        )
    else:
        target, draft = target[:, IDS], draft[:, IDS]
    example.check(formula(name, target, draft, ce).sum())
    assert example.fitted.num_trained == batch.num_trained


def test_rows_without_a_stored_distribution_lose_the_labels_that_the_head_lacks(tiny_draft: Path) -> None:
    batch, model = batch_of("padded"), trimmed(tiny_draft)
    step = build_step(model, SETTINGS, TokenDistillation(token_loss("jsd")))
    assert step.on_head(batch).num_trained < batch.num_trained
    ids = torch.tensor([[0, 7, 250]], dtype=torch.int32).expand(batch.num_trained, -1)
    stored = SparseTarget(ids, torch.full((batch.num_trained, 4), 0.25).log())
    fitted = step.on_head(replace(batch, target=stored))
    assert fitted.target is not None
    assert fitted.target.ids[0].tolist() == [0, len(IDS), 8]
    step.gradients([fitted])
    assert model.lm_head.weight.grad.shape == (len(IDS), 16)


COUNTS = {"answers": np.array([0, 0, 60, 30, 10, 0, 0]), "corpora": np.array([0, 0, 0, 0, 0, 90, 10])}


@pytest.mark.parametrize(
    ("always", "never", "how", "kept"),
    [
        ([], [], {"size": 2}, [2, 3]),
        ([0], [], {"size": 2}, [0, 2]),  # special ids before any that is written
        ([], [], {"size": 4}, [2, 3, 4, 5]),  # answers are nine tenths of the weight
        ([], [], {"size": 6}, [0, 2, 3, 4, 5, 6]),  # of equals the lower id
        ([], [0, 1], {"size": 7}, [2, 3, 4, 5, 6]),  # an id without a token never
        ([], [], {"coverage": 0.54}, [2]),
        ([], [], {"coverage": 0.541}, [2, 3]),
        ([0, 1], [], {"coverage": 1.0}, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_ids_of_a_head_are_those_written_most(
    always: list[int], never: list[int], how: dict[str, Any], kept: list[int]
) -> None:
    assert most_written(COUNTS, always, never, **how).tolist() == kept


def test_answers_are_counted_in_the_split_that_is_trained_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).folder("synthesize")
    written = [Generation([1, i], [5, 5, 6 + i], [0.0] * 3, "length") for i in range(40)]
    write_rows(folder.path / unit_name(0), [SyntheticRow.of(text, "own", Sampling(0.0)) for text in written])
    train, held = (count_tokens(None, folder, 50, split) for split in ("train", "validation"))
    assert list(train) == ["answers"]
    assert (train["answers"] + held["answers"])[5:9].tolist() == [80, 1, 1, 1]
    assert 0 < held["answers"][5] == 2 * held["answers"][6:].sum() < 40


def test_coverage_is_the_share_of_each_kind_of_text() -> None:
    assert covered(COUNTS, np.array([2, 5])) == {"answers": 0.6, "corpora": 0.9}


RUN = """
run: {name: own, folder: FOLDER/runs, threads: 1, device: cpu, precision: fp32}
target: {model: TARGET}
design: {draft: {kind: shape, hidden_size: 32, num_layers: 1, intermediate_size: 64, tied: true}, vocabulary: {size: 60}}
prepare: {row_length: 32, validation: 0.2, corpora: [{name: text, kind: jsonl, path: FOLDER/text.jsonl, tokens: 4k}]}
pretrain: {tokens: 512, batch_tokens: 256}
export: {}
"""


def test_a_run_counts_then_designs_then_trains_and_exports_the_small_head(
    tiny_target: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"{TEXT[i % 5]} Number {i}. " * 4} for i in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        RUN.replace("FOLDER", str(tmp_path)).replace("TARGET", str(tiny_target)), encoding="utf-8"
    )
    run = pipeline.run(load_recipe(str(path)))
    manifest = run.folder("design").manifest()
    assert manifest["head"]["size"] == manifest["architecture"]["head_size"] == 60
    assert 0.5 < manifest["head"]["coverage"]["corpora"] < 1
    exported = load_draft(run.folder("export").path / "huggingface")
    assert exported.lm_head.weight.shape == (60, 32)
    assert manifest["parameters"] == sum(p.numel() for p in exported.parameters())
    checks = run.folder("export").manifest()["checks"]
    assert checks["head_size"] == 60
    assert checks["outside_mass_ok"] is (checks["outside_mass"]["huggingface"] < 0.01)
    assert "over 60 ids" in (run.folder("export").path / "huggingface" / "README.md").read_text(
        encoding="utf-8"
    )
    assert {0, 3} <= set(exported.lm_head.ids.tolist())  # BOS and EOS
    trained, tokens = (run.folder("pretrain").manifest()[name] for name in ("trained_tokens", "tokens"))
    assert 0.5 * tokens < trained < tokens


@pytest.mark.parametrize(
    ("vocabulary", "told"),
    [
        ("{size: 320}", "design.vocabulary.size: 320: must be below the 320 ids"),
        (
            "{size: 2}",
            "design.vocabulary.size: 2: must be below the 320 ids of the target, and hold its 4 special ones",
        ),
        ("{size: 9, coverage: 0.5}", "either size or coverage"),
        ("{kind: frequent}", "either size or coverage"),
    ],
)
def test_a_head_that_cannot_be_is_refused_in_one_line(
    tiny_target: Path, tmp_path: Path, vocabulary: str, told: str
) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT[0] * 9}) + "\n", encoding="utf-8")
    text = RUN.replace("{size: 60}", vocabulary).replace("TARGET", str(tiny_target))
    (tmp_path / "recipe.yaml").write_text(text.replace("FOLDER", str(tmp_path)), encoding="utf-8")
    with pytest.raises((RecipeError, TargetError), match=told) as found:
        pipeline.run(load_recipe(str(tmp_path / "recipe.yaml")))
    assert "\n" not in str(found.value)


def test_a_head_needs_rows_to_count(tiny_target: Path, tmp_path: Path) -> None:
    text = "\n".join(line for line in RUN.splitlines() if not line.startswith(("prepare", "pretrain")))
    (tmp_path / "recipe.yaml").write_text(text.replace("TARGET", str(tiny_target)), encoding="utf-8")
    with pytest.raises(RecipeError, match="counts the rows of prepare or synthesize; there is neither"):
        load_recipe(str(tmp_path / "recipe.yaml"))


def test_a_whole_head_whose_other_ids_would_be_proposed_is_refused(tiny_draft: Path, tmp_path: Path) -> None:
    save_draft(trimmed(tiny_draft), tmp_path / "draft", Target.at(tiny_draft))
    plain = load_assistant(tmp_path / "draft")
    texts, head = [list(range(40)), list(range(9))], plain.lm_head.weight.detach()
    with torch.no_grad():
        probs = torch.cat([plain(input_ids=torch.tensor([ids])).logits[0].softmax(-1) for ids in texts])
    proposed, mass = outside_head(plain, IDS, texts, head)
    assert proposed == 0
    assert mass == pytest.approx(float(probs[:, outside()].sum(-1).mean()), rel=1e-5)
    pytest.importorskip("gguf")
    rounded = as_stored(torch.cat([head, head], 1), "q8_0")  # rows of 32: one block
    assert 0 < float((rounded[:, :16] - head).abs().max()) < float(head.abs().max()) / 100
    config, console = ExportConfig(formats=["huggingface"]), Console(quiet=True)
    assert _check_head(config, plain, IDS, texts, console)["outside_mass"] == {"huggingface": mass}
    head[7] = 9 * head[IDS].mean(0)
    with pytest.raises(TargetError, match=r"export.huggingface: \d+ times an id that the draft's head lacks"):
        _check_head(config, plain, IDS, texts, console)


@pytest.mark.skipif(not find_spec("openvino_genai") or not find_spec("nncf"), reason="needs OpenVINO")
def test_in_openvino_the_rows_are_cut_in_the_graph_and_a_pair_writes_the_targets_text(
    near_draft: Path, exported_target: Path, tmp_path: Path
) -> None:
    save_draft(trimmed(near_draft), tmp_path / "draft", Target.at(near_draft))
    folder = tmp_path / "openvino"
    check = export_openvino(Target.at(tmp_path / "draft"), folder, "int8", pair=exported_target)
    assert check.same_text
    graph = core().read_model(folder / MODEL_FILE)
    matrix = output_matrix(graph)
    assert matrix.output(0).partial_shape[-1].get_length() == len(IDS)
    ids = torch.randint(4, 300, (40,), generator=torch.Generator().manual_seed(0))
    reader = OpenVINOModel(folder, "exact", threads=1).reader(40)
    found = reader.read(ids, keep=3)
    with torch.no_grad():
        wanted = trimmed(near_draft)(input_ids=ids[None]).logits[0, -3:]
    assert torch.equal(found < -5e4, wanted == -torch.inf)
    narrow = OpenVINOModel(folder, "exact", threads=1, narrow=True)
    assert narrow.columns is not None
    assert narrow.columns.tolist() == IDS.tolist()
    assert narrow.vocab_size == 320
    assert torch.equal(narrow.reader(40).read(ids, keep=3), found[:, IDS])
    assert OpenVINOModel(exported_target, "exact", threads=1, narrow=True).columns is None
    wide, vocabulary = OpenVINOModel(folder, "exact", threads=1), Target.at(near_draft).vocabulary
    for sampling in (Sampling(0.0), Sampling(0.8)):
        decoders = [SpeculativeDecoder(wide, draft, vocabulary, 3) for draft in (wide, narrow)]
        runs = [each.generate([5, 6, 7], sampling, 24, 0) for each in decoders]
        assert runs[0].generation.response_ids == runs[1].generation.response_ids
        assert [r.num_accepted for r in runs[0].rounds] == [r.num_accepted for r in runs[1].rounds]
        assert sum(r.num_accepted for r in runs[0].rounds) > 0
    torch.testing.assert_close(found[:, IDS], wanted[:, IDS], atol=0.1, rtol=0.05)
