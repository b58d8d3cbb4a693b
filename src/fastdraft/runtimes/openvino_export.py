"""A Hugging Face directory as OpenVINO runs it: model, tokenizer and detokenizer as IR, weights compressed, and tried.

Decides how each weight format is made (optimum-intel converts, in the model's own precision or float32; nncf compresses;
the tokenizer files of the source are copied byte for byte beside the converted ones), and that an export is a directory
only after it has been loaded and has written the same greedy text with and without a draft.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastdraft.errors import FastDraftError, MissingExtra, TargetError
from fastdraft.functional.generation import Sampling
from fastdraft.modeling.model_files import quiet
from fastdraft.modeling.text_part import as_text_model
from fastdraft.run_folder import atomic_folder
from fastdraft.runtimes.engines import INSTALL_CONVERTER
from fastdraft.runtimes.openvino import MODEL_FILE, core, import_genai, short
from fastdraft.runtimes.openvino_families import newer_transformers
from fastdraft.runtimes.openvino_pair import check_pair
from fastdraft.runtimes.openvino_ties import TieJudge, explain_differences
from fastdraft.runtimes.openvino_wall_clock import OpenVINOPair, OpenVINOTarget
from fastdraft.target import Target

Weights = Literal["fp32", "fp16", "int8", "int4"]
FILES = (MODEL_FILE, "openvino_tokenizer.xml", "openvino_detokenizer.xml", "config.json")
TOKENS = 32
"""Compared with and without a draft."""
GROUP = 128
"""Weights that share a scale in int4; rows that it does not divide keep int8."""
NEAR_TIE = 1e-3
"""Difference of log-probs below which either token counts as the greedy one: float32 differs by about 1e-5."""
_PROMPT = "Once upon a time there was a small town by the sea, and in that town"


@dataclass(frozen=True)
class ExportCheck:
    """What the exported files did when they were tried."""

    num_tokens: int
    """Greedy tokens written without a draft."""
    same_text: bool
    """Whether they were equal with a draft; if not, the first difference was a near-tie."""
    near_tie_gap: float | None
    """Log-prob between the two tokens at the first difference."""
    tokens_per_pass: float
    """Block efficiency of the few tokens: of the draft, or of the model as its own draft."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_openvino(
    source: str | Path,
    folder: Path,
    weights: Weights,
    *,
    pair: Path | None = None,
    role: Literal["draft", "target"] = "draft",
    revision: str | None = None,
) -> ExportCheck:
    """Exports a model and tries it; the directory stands whole and tried, or not at all.

    Args:
        source: Hugging Face directory or hub id.
        folder: Replaced when it exists.
        weights: fp32 and fp16 store floats; int8 and int4 are compressed without data (asymmetric; int4 in groups of 128
            with embeddings and head in int8).
        pair: An export that this one must run together with; None tries the model as its own draft.
        role: What `source` is beside `pair`: draft or target.
        revision: Branch, tag or commit on the hub.

    Raises:
        TargetError: when the two do not fit, before anything is converted.
        MissingExtra: without openvino, nncf or optimum-intel. TargetError: when the source cannot be converted.
        FastDraftError: when the exported files do not load or write other text with a draft. FastDraftError: disk full.
    """
    import_genai()
    model = Target.at(source, revision)
    model.config  # noqa: B018 (refuses other families)
    model.files.check_weights()
    if pair is not None:
        check_pair(*((pair, source) if role == "draft" else (source, pair)))
    with atomic_folder(folder) as temporary:
        convert(source, temporary, weights, revision)
        target, draft = (
            (temporary, temporary)
            if pair is None
            else (pair, temporary)
            if role == "draft"
            else (temporary, pair)
        )
        return check_export(target, draft)


def convert(source: str | Path, folder: Path, weights: Weights, revision: str | None = None) -> None:
    """Writes the IR of model, tokenizer and detokenizer, and the tokenizer files of the source, into an existing directory.

    Raises:
        MissingExtra, TargetError: as for `export_openvino`.
    """
    convert_model, ov_config = _optimum()
    log = io.StringIO()
    try:
        with _silence(log), as_text_model(Target.at(source, revision), folder) as text, newer_transformers():
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
            if weights in ("int8", "int4"):
                compress(folder / MODEL_FILE, weights)
    except (RuntimeError, ValueError, OSError, KeyError, AttributeError, NotImplementedError) as error:
        raise TargetError(
            source, f"{type(error).__name__}: {short(error)}", "must convert to OpenVINO", "try another model"
        ) from error
    Target.at(source, revision).copy_tokenizer(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        rule = "model, tokenizer and detokenizer must all be converted"
        raise TargetError(
            source,
            f"no {', '.join(missing)} after the conversion",
            rule,
            "see that openvino-tokenizers is installed",
        )


def compress(model_file: Path, weights: Literal["int8", "int4"]) -> None:
    """Compresses the weights of an IR in place, without data.

    Raises:
        MissingExtra: without nncf.
    """
    try:
        import nncf
    except ImportError:
        raise MissingExtra("nncf", "openvino") from None
    import openvino

    model = core().read_model(model_file)
    if weights == "int8":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    else:
        fallback = nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
        )
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            group_size=GROUP,
            ratio=1.0,
            advanced_parameters=fallback,
        )
    compressed = model_file.with_name("compressed.xml")
    openvino.save_model(model, compressed, compress_to_fp16=False)
    del model  # lets go of the file it was read from: on Windows an open file cannot be replaced
    for suffix in (".xml", ".bin"):
        compressed.with_suffix(suffix).replace(model_file.with_suffix(suffix))


def check_export(target: Path, draft: Path) -> ExportCheck:
    """Loads both, writes 32 greedy tokens without and with the draft, in float32, and compares.

    Raises:
        FastDraftError: when a file does not load, or the texts differ by more than a near-tie. RecipeError: when OpenVINO fails.
    """
    prompt = [int(token) for token in Target.at(target).tokenizer(_PROMPT).input_ids]
    room = min(Target.at(folder).context_length for folder in (target, draft)) - len(prompt) - 8
    tokens = max(1, min(TOKENS, room))
    alone = greedy(target, prompt, tokens)
    with_draft = (
        OpenVINOPair(target, draft, (), precision="exact")
        .at(3)
        .write([prompt], Sampling(0.0), tokens, 0)
        .texts[0]
    )
    text = with_draft.response_ids
    gap = None
    if text != alone:
        [(_, place, gap)] = explain_differences(TieJudge(target), [prompt], [alone], [text])
        if not gap < NEAR_TIE:
            found = f"token {place + 1} of {tokens} differs with the draft, by a log-prob of {gap:.2g}"
            raise FastDraftError(
                draft,
                found,
                f"greedy text must be the same (differences below {NEAR_TIE} pass)",
                "export it again",
            )
    return ExportCheck(len(alone), text == alone, gap, with_draft.counts.block_efficiency)


def greedy(folder: Path, prompt: list[int], tokens: int) -> list[int]:
    """What an exported model writes alone: float32, past any end-of-sequence token."""
    return (
        OpenVINOTarget(folder, (), precision="exact")
        .write([prompt], Sampling(0.0), tokens, 0)
        .texts[0]
        .response_ids
    )


def _optimum() -> tuple[Any, Any]:
    """optimum-intel's exporter and its settings."""
    try:
        with _silence(io.StringIO()):
            from optimum.exporters.openvino import main_export
            from optimum.intel import OVConfig
    except (ImportError, RuntimeError) as error:
        raise MissingExtra(f"optimum-intel ({short(error)[:80]})", "openvino", INSTALL_CONVERTER) from error
    return main_export, OVConfig


@contextlib.contextmanager
def _silence(log: io.StringIO) -> Iterator[None]:
    """Holds back tracer warnings and progress bars: what matters is checked on the files."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), quiet():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)
