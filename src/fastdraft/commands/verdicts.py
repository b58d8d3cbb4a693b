"""What each runtime would make of a recipe's pair, before anything is spent: its rules, and what is here."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fastdraft.console import TABLE_WIDTH, format_table
from fastdraft.errors import FastDraftError, MissingExtra
from fastdraft.modeling.gguf_fields import tokenizer_fields
from fastdraft.modeling.gguf_files import require_gguf
from fastdraft.reporting.verdict import RUNTIMES
from fastdraft.runtimes.gguf_export import check_config
from fastdraft.runtimes.huggingface_export import needs_positions
from fastdraft.runtimes.llama_cpp_server import require_llama_cpp
from fastdraft.runtimes.openvino import require_openvino
from fastdraft.runtimes.openvino_export import check_contexts, require_convertible
from fastdraft.runtimes.vllm_runtime import check_shapes, check_target
from fastdraft.stages.design import DraftDesign
from fastdraft.target import Target


@dataclass(frozen=True)
class RuntimeVerdict:
    """Of one runtime: it works, something must be installed first, or it cannot run this pair."""

    runtime: str
    verdict: Literal["works", "install", "refused"]
    why: str


def runtime_verdicts(target: Target, plan: DraftDesign) -> list[RuntimeVerdict]:
    """One for each runtime."""
    found = []
    for name, attempt in _TRIED.items():
        try:
            # OpenVINO's export has the few rows alone.
            whole = (
                "; reads the whole head of the draft" if plan.draft.head_size and name != "openvino" else ""
            )
            verdict = RuntimeVerdict(name, "works", attempt(target, plan) + whole)
        except MissingExtra as error:
            verdict = RuntimeVerdict(name, "install", f"{error.fix} ({error.library} is not here)")
        except FastDraftError as error:
            verdict = RuntimeVerdict(name, "refused", str(error.message))
        found.append(verdict)
    return found


def verdict_table(verdicts: Sequence[RuntimeVerdict]) -> str:
    """In the terminal's width."""
    rows, names = list[tuple[str, str, str]](), RUNTIMES | {"transformers": "transformers"}
    for each in verdicts:
        lines = textwrap.wrap(each.why, TABLE_WIDTH - 23, break_on_hyphens=False) or [""]
        rows += [(names[each.runtime], each.verdict, lines[0]), *(("", "", line) for line in lines[1:])]
    return format_table("", ("runtime", "verdict", "why"), rows)


def _openvino(target: Target, plan: DraftDesign) -> str:
    require_convertible(target)
    check_contexts(target.context_length, plan.draft.context_length, "design.draft")
    target.files.check_weights()
    require_openvino()
    return "converts both"


def _llama_cpp(target: Target, plan: DraftDesign) -> str:
    check_config(plan.draft_config, "design.draft")
    tokenizer_fields(target)
    require_gguf()
    require_llama_cpp()
    return "runs the file itself" if target.gguf else "needs the target's GGUF file, or export.gguf.target"


def _vllm(target: Target, plan: DraftDesign) -> str:
    check_target(target)
    check_shapes(plan.target, plan.draft, "design.draft")
    return "in an environment of its own: `pip install vllm` there"


def _transformers(target: Target, plan: DraftDesign) -> str:
    target.files.check_weights()
    target.check_quantiser()
    positions = ", told position_ids" if needs_positions(target.config) else ""
    return f"`generate(assistant_model=draft{positions})`, one text at a time"


_TRIED: dict[str, Callable[[Target, DraftDesign], str]] = {
    "openvino": _openvino,
    "llamacpp": _llama_cpp,
    "vllm": _vllm,
    "transformers": _transformers,
}
