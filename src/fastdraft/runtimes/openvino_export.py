"""A Hugging Face directory as OpenVINO runs it: model, tokenizer and detokenizer, compressed, and tried.

optimum-intel converts, nncf compresses; the tokenizer files are copied byte for byte. An export is a
directory only after it has been loaded and has written the same greedy text with a draft.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fastdraft.errors import FastDraftError, MissingExtra, TargetError
from fastdraft.functional.generation import Sampling
from fastdraft.functional.same_text import compare_texts
from fastdraft.modeling.drafts import STD
from fastdraft.modeling.model_files import quiet
from fastdraft.modeling.text_part import as_text_model, text_family
from fastdraft.modeling.tokenizer import plain_prompt_ids
from fastdraft.modeling.trimmed_head import read_head_ids
from fastdraft.run_folder import CONVERTED, atomic_folder, digest
from fastdraft.runtimes.openvino import (
    INSTALL_CONVERTER,
    MODEL_FILE,
    core,
    output_matrix,
    require_openvino,
    short,
)
from fastdraft.runtimes.openvino_speculative import OpenVINOPair, OpenVINOSettings
from fastdraft.runtimes.runtime import Proposer
from fastdraft.target import Target

Weights = Literal["fp32", "fp16", "int8", "int4"]
# Text families that are not converted, and why: transformers writes for these.
NOT_CONVERTED = {
    "gemma2": "OpenVINO's attention leaves out the cap on its scores: it would write another text"
}
_FILES = (MODEL_FILE, "openvino_tokenizer.xml", "openvino_detokenizer.xml", "config.json")
_LACKING = -6e4  # logit of an id that a trimmed head lacks: infinity is not the same in every plugin
_INT4_GROUP = 128  # weights that share a scale; rows that it does not divide keep int8
_TRIED_TOKENS = 32
_PAIR_SENTENCE = "Could you please tell me something about OpenVINO.GenAI?"
_PROMPT = "Once upon a time there was a small town by the sea, and in that town"


@dataclass(frozen=True)
class ExportCheck:
    """What the exported files did when they were tried."""

    num_tokens: int  # written greedily without a draft
    same_text: bool  # whether they were equal with a draft; if not, the first difference was a near-tie
    near_tie_gap: float | None  # in log-prob, between the two tokens there
    tokens_per_pass: float  # with the draft, or the model as its own draft


def unconverted_family(target: Target) -> str:
    """The text family of a target that is not converted; empty for one that is."""
    family = text_family(target)
    return family if family in NOT_CONVERTED else ""


def require_convertible(target: Target) -> None:
    """Refuses a target whose family is not converted, before anything is trained for it."""
    if family := unconverted_family(target):
        fix = "leave out `benchmark`, and write export.openvino.target=none"
        raise TargetError(f"{target.location}: family {family}: {NOT_CONVERTED[family]}", fix)


def check_pair(target: Target, draft: Target) -> None:
    """Refuses a draft that OpenVINO GenAI could not run for this target, before either is loaded."""

    # GenAI compares this sentence and the three ids after loading; another vocabulary or a shorter context
    # crashes or clips later.
    def facts(model: Target) -> dict[str, Any]:
        ids = {
            f"{name}_token_id": getattr(model.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
        }
        size = {"vocab_size, padding included,": model.vocabulary.size}
        return size | ids | {f"'{_PAIR_SENTENCE}' in ids": model.tokenizer(_PAIR_SENTENCE).input_ids}

    for (name, of_target), of_draft in zip(facts(target).items(), facts(draft).values(), strict=True):
        if of_target != of_draft:
            found = f"{draft.location}: draft {of_draft}, target {of_target}: {name} must be equal"
            raise TargetError(found, "use a draft that was made for this target's tokenizer")
    check_contexts(target.context_length, draft.context_length, draft.location)


def check_contexts(target: int, draft: int, where: str) -> None:
    """Refuses a draft whose context is shorter: longer texts would end in an error."""
    if draft < target:
        rule = "the draft's context must not be shorter than the target's"
        raise TargetError(
            f"{where}: draft {draft}, target {target}: {rule}", "make it with the target's context length"
        )


def conversion(run: Path, target: Target, weights: Weights) -> Path:
    """Where the stages of a run share the target's conversion until the last of them is complete."""
    return run / CONVERTED / f"{weights}-{digest(target.identity())[:8]}"


def export_openvino(
    source: Target, folder: Path, weights: Weights, *, pair: Path | None = None, made: Path | None = None
) -> ExportCheck:
    """Exports a model and tries it; `folder` is replaced, and stands whole and tried or not at all.

    `made`: an export of the same weights; where it is there, its files are taken instead of converting.

    int8 and int4 are compressed without data: asymmetric; int4 in groups of 128, with embeddings and head in
    int8. `pair` is an exported target that this one must serve as a draft; None tries the model as its own
    draft.
    """
    require_openvino()
    source.files.make_weights()
    if pair is not None:
        check_pair(Target.at(pair), source)
    with atomic_folder(folder) as temporary:
        if made and made.is_dir():
            shutil.copytree(made, temporary, dirs_exist_ok=True)
        else:
            convert(source, temporary, weights)
        return check_export(pair or temporary, temporary)


def convert(source: Target, folder: Path, weights: Weights) -> None:
    """Writes the IR of model, tokenizer and detokenizer, and the tokenizer files, into an existing folder."""
    convert_model, ov_config = _converter()
    try:
        with _silence(), as_text_model(source, folder) as text:
            convert_model(
                text.location,
                str(folder),
                task="text-generation-with-past",
                library_name="transformers",
                stateful=True,
                convert_tokenizer=True,
                revision=text.revision or "main",
                ov_config=ov_config(dtype="fp16" if weights == "fp16" else "fp32"),
            )
            if (ids_K := read_head_ids(Path(source.location), source.architecture.vocab_size)) is not None:
                trim_output(folder / MODEL_FILE, ids_K.numpy())
            if weights in ("int8", "int4"):
                compress(folder / MODEL_FILE, weights)
    except (RuntimeError, ValueError, OSError, KeyError, AttributeError, NotImplementedError) as error:
        found = f"{source.location}: cannot be converted to OpenVINO: {type(error).__name__}: {short(error)}"
        raise TargetError(found, "try another model") from error
    source.copy_tokenizer(folder)
    if missing := [name for name in _FILES if not (folder / name).is_file()]:  # a tokenizer of another kind
        found = f"{source.location}: the conversion left out {', '.join(missing)}"
        raise TargetError(found, "try a model with a fast tokenizer")


def compress(model_file: Path, weights: Literal["int8", "int4"]) -> None:
    """Compresses the weights of an IR in place, without data."""
    import nncf

    model = core().read_model(model_file)
    how: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    if weights == "int4":
        adjust = nncf.GroupSizeFallbackMode.ADJUST
        more = nncf.AdvancedCompressionParameters(group_size_fallback_mode=adjust)
        how = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": _INT4_GROUP, "ratio": 1.0}
        how["advanced_parameters"] = more
    _save_over(model_file, nncf.compress_weights(model, **how))


def trim_output(model_file: Path, ids_K: NDArray[np.int64]) -> None:
    """Cuts the output matrix of an IR in place to the rows of these ids; the logits of all others are -6e4.

    GenAI finds no matrix right before `logits` then, and does not choose tokens in front of it: a prompt that
    the draft reads has the logits of all its tokens in memory for a moment, T x V floats.
    """
    from openvino import opset13 as ops

    model = core().read_model(model_file)
    matrix, result = output_matrix(model), model.output("logits").get_node()
    place = matrix.input(1)
    while (weight := place.get_source_output().get_node()).get_type_name() != "Constant":
        place = weight.input(0)
    rows_V = np.full(weight.shape[0], len(ids_K), np.int32)
    rows_V[ids_K] = np.arange(len(ids_K))
    place.replace_source_output(ops.constant(weight.data[ids_K]).output(0))
    place, no_pads = result.input(0), np.zeros(3, np.int64)
    lacking = ops.constant(np.array(_LACKING, np.float32))  # a column behind those of the rows
    last_pads = no_pads + np.array([0, 0, 1])
    padded = ops.pad(place.get_source_output(), no_pads, last_pads, "constant", lacking)
    wide = ops.gather(padded, ops.constant(rows_V), ops.constant(-1))
    place.replace_source_output(wide.output(0))
    result.output(0).get_tensor().set_names({"logits"})
    model.validate_nodes_and_infer_types()
    _save_over(model_file, model)


def _save_over(model_file: Path, model: Any) -> None:
    import openvino

    changed = model_file.with_name("changed.xml")
    openvino.save_model(model, changed, compress_to_fp16=False)
    del model  # lets go of the file it was read from: on Windows an open file cannot be replaced
    for suffix in (".xml", ".bin"):
        changed.with_suffix(suffix).replace(model_file.with_suffix(suffix))


def check_export(target: Path, draft: Path) -> ExportCheck:
    """Writes 32 greedy tokens without and with the draft, in float32; refuses more than a near-tie."""
    models = [Target.at(folder) for folder in (target, draft)]
    prompt = plain_prompt_ids(models[0].tokenizer, _PROMPT)
    room = min(model.context_length for model in models) - len(prompt) - 8
    tokens = max(1, min(_TRIED_TOKENS, room))
    pair = OpenVINOPair(target, draft, OpenVINOSettings(precision="exact"))
    [alone] = pair.write([prompt], Sampling(0.0), tokens, 0)
    [drafted] = pair.write([prompt], Sampling(0.0), tokens, 0, Proposer("draft", 3))
    difference = compare_texts(prompt, alone.response_ids, drafted.response_ids, pair.gap)
    if difference is not None and not difference.is_near_tie("exact"):
        where = f"token {difference.place + 1} of {tokens}"
        rule = f"differs with the draft, by a log-prob of {difference.gap}: more than a near-tie"
        raise FastDraftError(f"{draft}: {where} {rule}", "export it again")
    gap = difference.gap if difference else None
    return ExportCheck(len(alone.response_ids), difference is None, gap, drafted.counts.block_efficiency)


def export_random(config: PreTrainedConfig, tokenizer: Target, folder: Path, weights: Weights) -> None:
    """An export of a shape with random weights into an existing folder; `tokenizer` gives its files."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in model.named_parameters():  # a tied head is not named twice
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0.0, STD, generator=generator)
        # Norms around 1, but not at it: a conversion drops a multiplication by exactly 1.
        tensors[name] = tensor + 1 if "norm" in name and parameter.ndim == 1 else tensor
    config.architectures = [type(model).__name__]
    with TemporaryDirectory(dir=folder.parent, prefix=".random-") as made:
        save_file(tensors, Path(made) / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(made)
        tokenizer.copy_tokenizer(Path(made))
        convert(Target.at(made), folder, weights)


def _converter() -> tuple[Any, Any]:
    """optimum-intel's exporter and its settings."""
    require_openvino()
    try:
        with _silence():
            from optimum.exporters.openvino import main_export, model_configs
            from optimum.intel import OVConfig
    except (ImportError, RuntimeError) as error:
        raise MissingExtra(f"optimum-intel ({short(error)[:80]})", "openvino", INSTALL_CONVERTER) from error
    # Release 2.2 refuses Gemma 1 and 3 beside transformers 5.1 by a version number alone; what it writes is
    # right, as a test shows.
    if gemma := getattr(model_configs, "GemmaOpenVINOConfig", None):
        gemma.MAX_TRANSFORMERS_VERSION = "5.99"
    return main_export, OVConfig


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Holds back tracer warnings and progress bars: what matters is checked on the files."""
    disabled, log = logging.root.manager.disable, io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), quiet():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)
