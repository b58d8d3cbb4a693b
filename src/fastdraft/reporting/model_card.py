"""The model card beside an exported draft: what it is, how to use it, what it reaches, what it was trained on.

Decides that a card claims nothing that the run did not measure: sections without figures say so or are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastdraft.recipe.base import format_count
from fastdraft.reporting.benchmark_results import Benchmark
from fastdraft.reporting.benchmark_sections import launch_hint, setting
from fastdraft.reporting.benchmark_tables import compact_table
from fastdraft.reporting.benchmark_verdict import headline
from fastdraft.reporting.definitions import DEFINITIONS
from fastdraft.reporting.document import Table, row
from fastdraft.reporting.page import escape_markdown, markdown_table
from fastdraft.reporting.record import RunRecord
from fastdraft.reporting.report import shape_of, target_name
from fastdraft.reporting.results import Results, interval, k_name, number, stage_label, temperature_name
from fastdraft.reporting.summary import show

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHOWN_DEFINITIONS = ("K", "Acceptance rate (AR)", "Block efficiency", "Memory-bound speed-up (MBSU)")


def model_card(
    manifests: Mapping[str, dict[str, Any]],
    results: dict[str, Any] | None,
    benchmark: dict[str, Any] | None = None,
) -> str:
    """The card from manifests by stage and the contents of `results.json` and `benchmark.json`."""
    exported = manifests.get("export", {})
    checks = exported.get("checks")
    k = int(number(exported, "num_speculative_tokens") or 3)
    return render_model_card(
        RunRecord("", manifests, results, benchmark), k, checks if isinstance(checks, Mapping) else {}
    )


def render_model_card(record: RunRecord, num_speculative_tokens: int, checks: Mapping[str, Any]) -> str:
    """The card as Markdown with the front matter that the Hugging Face hub reads.

    Args:
        record: Manifests and results of the run.
        num_speculative_tokens: K pinned in the export.
        checks: What the export stage found in the exported files.
    """
    target = target_name(record.manifests, record.results)
    parts = [
        _front_matter(target),
        _introduction(record, target),
        _usage(target, num_speculative_tokens, checks),
        _wall_clock(record),
        _figures(record, num_speculative_tokens),
    ]
    parts += [_training(record), _checks(checks), _limits(), _provenance(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(target: str) -> str:
    base = [f"base_model: {target}"] if _is_hub_id(target) else []
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            *base,
            "tags:",
            "- speculative-decoding",
            "- draft-model",
            "- fastdraft",
            "---",
        ]
    )


def _introduction(record: RunRecord, target: str) -> str:
    design = record.manifests.get("design", {})
    parameters = number(design, "parameters")
    size = ", ".join(
        part
        for part in (f"{format_count(parameters)} parameters" if parameters else "", shape_of(design))
        if part
    )
    name = escape_markdown(target)
    lines = [
        f"# A draft model for {name}",
        f"A small language model{f' ({size})' if size else ''} with exactly the vocabulary of {name}.",
    ]
    lines[1] += (
        " It proposes tokens that the target checks (speculative decoding), so the target answers faster and its output "
        "does not change. It is of no use alone."
    )
    lines[1] += (
        " Made with FastDraft, after the method of [arXiv 2411.11055](https://arxiv.org/abs/2411.11055)."
    )
    verdict = headline(record)
    return "\n\n".join(
        [
            *lines,
            *(
                [f"**{escape_markdown(verdict.sentence)}** {escape_markdown(verdict.detail)}"]
                if verdict.tone != "none"
                else []
            ),
        ]
    )


def _usage(target: str, k: int, checks: Mapping[str, Any]) -> str:
    target = target if _is_hub_id(target) else "path/to/the/target"
    loads = str(checks.get("assistant_target_class", "AutoModelForCausalLM"))
    names = ", ".join(sorted({"AutoModelForCausalLM", loads, "AutoTokenizer"}))
    # Such a target makes positions on several axes, for pictures, and no text model reads those.
    told = '\ninputs["position_ids"] = inputs["attention_mask"].cumsum(-1) - 1  # one for each token, as the draft reads them'
    positions = told if checks.get("assistant_needs_position_ids") else ""
    return f"""## Use

```python
from transformers import {names}

tokenizer = AutoTokenizer.from_pretrained("{target}")
target = {loads}.from_pretrained("{target}")
draft = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
inputs = tokenizer("Once upon a time", return_tensors="pt"){positions}
output = target.generate(**inputs, assistant_model=draft, do_sample=False, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

`generation_config.json` pins {k} proposed tokens per round; transformers assists one sequence at a time. With vLLM:

```
vllm serve {target} --speculative-config '{{"method": "draft_model", "model": "path/to/this/folder", "num_speculative_tokens": {k}}}'
```"""


def _wall_clock(record: RunRecord) -> str:
    """The measured speed-up, how it was measured, and how to get it; empty without a benchmark."""
    benchmark = Benchmark(record.benchmark or {})
    if not benchmark.tasks:
        return ""
    hint = launch_hint(benchmark)
    parts = ["## Wall clock", escape_markdown(setting(benchmark)), markdown_table(compact_table(benchmark))]
    parts += [f"With OpenVINO GenAI, exported as measured:\n\n```python\n{hint}\n```"] if hint else []
    return "\n\n".join(parts)


def _figures(record: RunRecord, k: int) -> str:
    results = Results(record.results or {})
    rows = []
    for task, temperature in results.settings():
        at_k, best = (
            results.row(results.final, task, temperature, k),
            results.best(results.final, task, temperature),
        )
        if at_k is None:
            continue
        spread = [
            f" ({form.format(pair[0])} to {form.format(pair[1])})" if (pair := interval(at_k, key)) else ""
            for key, form in (("acceptance_rate", "{:.3f}"), ("block_efficiency", "{:.2f}"))
        ]
        cells = [
            show(number(at_k, "acceptance_rate")) + spread[0],
            show(number(at_k, "block_efficiency"), "{:.2f}") + spread[1],
        ]
        cells += [show(number(at_k, key), "{:.2f}") for key in ("mbsu_parameters", "mbsu_bytes")]
        at_best = (
            f"{number(best, 'mbsu_parameters') or 0:.2f} ({k_name(number(best, 'num_speculative_tokens'))})"
            if best is not None
            else "-"
        )
        rows.append(row(task, temperature_name(temperature), *cells, at_best))
    if not rows:
        return f"## Figures\n\nThis draft was not evaluated at {k_name(k)}."
    columns = (
        "Task",
        "Target",
        f"Acceptance rate, {k_name(k)}",
        "Tokens per target pass",
        "MBSU, parameters",
        "MBSU, bytes",
        "MBSU at best K",
    )
    ratios = [
        f"{ratio:.3g} by {name}"
        for name in ("parameters", "bytes")
        if (ratio := results.cost_ratio(f"mbsu_{name}")) is not None
    ]
    note = (
        "95 % intervals in brackets. "
        + (f"Cost ratio c: {', '.join(ratios)}. " if ratios else "")
        + "Wall-clock speed-up depends on machine and runtime: measure it."
    )
    definitions = "\n".join(
        f"- {escape_markdown(name)}: {escape_markdown(text)}"
        for name, text in DEFINITIONS
        if name in _SHOWN_DEFINITIONS
    )
    return f"## Figures\n\n{markdown_table(Table(columns, tuple(rows), note=note))}\n\n{definitions}"


def _training(record: RunRecord) -> str:
    lines = []
    for stage in ("pretrain", "continue_pretrain", "align"):
        tokens = number(record.manifests.get(stage), "tokens")
        if tokens is not None:
            lines.append(f"- {stage} ({stage_label(stage)}): {format_count(tokens)} tokens")
    corpora = record.manifests.get("prepare", {}).get("corpora") or {}
    for name, corpus in corpora.items():
        for source in corpus.get("sources") or []:
            licence, count = source.get("license") or "licence not recorded", number(source, "tokens")
            where = escape_markdown(str(source.get("from") or source.get("kind")))
            lines.append(
                f"- corpus {escape_markdown(str(name))}: {where} "
                f"({escape_markdown(str(licence))}{f', {format_count(count)} tokens' if count else ''})"
            )
    written = number(record.manifests.get("synthesize"), "tokens")
    if written is not None:
        lines.append(f"- written by the target for alignment: {format_count(written)} tokens")
    return "\n".join(["## Training", "", *lines]) if lines else ""


def _checks(checks: Mapping[str, Any]) -> str:
    if not checks:
        return ""
    same = "was equal" if checks.get("assistant_same_greedy_text") else "was NOT equal"
    compared, dtype = checks.get("assistant_tokens_compared"), checks.get("assistant_dtype")
    tried = f"Greedy text of the target with this draft as `assistant_model` {same} to the target's alone ({compared} tokens, {dtype})."
    if "assistant_same_greedy_text" not in checks:
        tried = "Loaded, but not tried with the target, whose weights were not on this machine."
    mass, verdict = (
        number(checks, "padding_mass_mean") or 0.0,
        "under" if checks.get("padding_mass_ok") else "NOT under",
    )
    return (
        f"## Tests of these files\n\n- {tried}\n"
        f"- Mean probability on padding ids, which no tokenizer can decode: {mass:.1e}, {verdict} "
        f"{checks.get('padding_mass_limit', 1e-4):.0e}."
    )


def _limits() -> str:
    return (
        "## Limits\n\nFew proposals are accepted on text unlike the training corpora, other languages included; the "
        "output stays the target's. "
        "The draft serves this target and fine-tunes with the same vocabulary; after a fine-tune acceptance falls until "
        "the draft is aligned anew. "
        "This card sets no licence: those of the target and of the corpora decide how this draft may be used."
    )


def _provenance(record: RunRecord) -> str:
    origins = [
        origin
        for manifest in record.manifests.values()
        if isinstance(origin := manifest.get("provenance"), Mapping) and origin.get("time")
    ]
    if not origins:
        return ""
    last = max(origins, key=lambda origin: str(origin["time"]))
    libraries = last.get("libraries")
    versions = (
        ", ".join(f"{name} {version}" for name, version in libraries.items())
        if isinstance(libraries, Mapping)
        else ""
    )
    facts = [
        ("finished", last.get("time")),
        ("command", last.get("command")),
        ("system", last.get("system")),
        ("python", last.get("python")),
        ("libraries", versions),
    ]
    return "\n".join(
        ["## Provenance", "", *(f"- {name}: {escape_markdown(str(value))}" for name, value in facts if value)]
    )


def _is_hub_id(target: str) -> bool:
    return bool(_HUB_ID.fullmatch(target))
