"""The model card beside an exported draft: what it is, how to use it, what it reaches, what it was trained on.

Decides that a card claims nothing that the run did not measure: sections without figures say so or are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdraft.config import format_count
from fastdraft.reporting.record import RunRecord
from fastdraft.reporting.report import shape_of, target_name
from fastdraft.reporting.results import Results, interval, number, stage_label, temperature_name

_TAGS = "tags: [speculative-decoding, draft-model, fastdraft]"


def render_model_card(record: RunRecord, num_speculative_tokens: int, checks: Mapping[str, Any]) -> str:
    """The card as Markdown with the front matter that the Hugging Face hub reads.

    Args:
        record: Manifests and results of the run.
        num_speculative_tokens: K pinned in the export.
        checks: What the export stage found in the exported files.
    """
    target = target_name(record.manifests, record.results)
    parts = [_front_matter(target), _introduction(record, target), _usage(target, num_speculative_tokens), _figures(record, num_speculative_tokens)]
    parts += [_training(record), _checks(checks), _limits()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(target: str) -> str:
    base = [f"base_model: {target}"] if target.count("/") == 1 and not target.startswith((".", "/", "~")) and ":" not in target else []
    return "\n".join(["---", "library_name: transformers", "pipeline_tag: text-generation", _TAGS, *base, "---"])


def _introduction(record: RunRecord, target: str) -> str:
    design = record.manifests.get("design", {})
    parameters = number(design, "parameters")
    size = f"{format_count(parameters)} parameters, " if parameters else ""
    return (
        f"# A draft model for {target}\n\nA small language model ({size}{shape_of(design)}) with exactly the vocabulary of `{target}`. It proposes "
        "tokens that the target checks (speculative decoding), so the target answers faster and its output does not change. It is of no use alone. "
        "Made with FastDraft, after the method of [arXiv 2411.11055](https://arxiv.org/abs/2411.11055)."
    )


def _usage(target: str, k: int) -> str:
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{target}")
target = AutoModelForCausalLM.from_pretrained("{target}")
draft = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(target.generate(**inputs, assistant_model=draft, max_new_tokens=64)[0]))
```

`generation_config.json` pins {k} proposed tokens per round. With vLLM:
`vllm serve {target} --speculative-config '{{"method": "draft_model", "model": "path/to/this/folder", "num_speculative_tokens": {k}}}'`."""


def _figures(record: RunRecord, k: int) -> str:
    results = Results(record.results or {})
    rows = []
    for task, temperature in results.settings():
        row = results.row(results.final, task, temperature, k)
        if row is None:
            continue
        bounds = interval(row, "block_efficiency")
        spread = f" ({bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else ""
        cells = [_figure(row, "acceptance_rate"), _figure(row, "block_efficiency") + spread, _figure(row, "mbsu_parameters"), _figure(row, "mbsu_bytes")]
        rows.append(f"| {task} | {temperature_name(temperature)} | {' | '.join(cells)} |")
    if not rows:
        return "## Figures\n\nThis draft was not evaluated at this number of tokens."
    head = f"| task | target | acceptance rate, K = {k} | tokens per target pass | MBSU, parameters | MBSU, bytes |\n|---|---|---|---|---|---|"
    ratios = [f"{ratio:.4f} by {basis}" for basis in ("parameters", "bytes") if (ratio := results.cost_ratio(basis)) is not None]
    note = (
        "Acceptance rate: accepted / proposed tokens. Tokens per target pass: block efficiency, 95 % intervals in brackets. MBSU: memory-bound speed-up, block "
        f"efficiency / (K c + 1), c being the draft's cost over the target's ({', '.join(ratios)}). Wall-clock speed-up depends on machine and runtime: measure it."
    )
    return "\n".join(["## Figures", "", head, *rows, "", note])


def _figure(row: Mapping[str, Any], key: str) -> str:
    value = number(row, key)
    return "-" if value is None else f"{value:.3f}" if key == "acceptance_rate" else f"{value:.2f}"


def _training(record: RunRecord) -> str:
    lines = []
    for stage in ("pretrain", "continue_pretrain", "align"):
        tokens = number(record.manifests.get(stage), "tokens")
        if tokens is not None:
            lines.append(f"- {stage} ({stage_label(stage)}): {format_count(tokens)} tokens")
    corpora = record.manifests.get("prepare", {}).get("corpora") or {}
    for name, corpus in corpora.items():
        for source in corpus.get("sources") or []:
            licence = source.get("license") or "licence not stated in the recipe"
            count = number(source, "tokens")
            lines.append(f"- corpus {name}: {source.get('from') or source.get('kind')} ({licence}{f', {format_count(count)} tokens' if count else ''})")
    written = number(record.manifests.get("synthesize"), "tokens")
    if written is not None:
        lines.append(f"- written by the target for alignment: {format_count(written)} tokens")
    return "\n".join(["## Training", "", *lines]) if lines else ""


def _checks(checks: Mapping[str, Any]) -> str:
    if not checks:
        return ""
    same = "was equal" if checks.get("assistant_same_greedy_text") else "was NOT equal"
    compared, dtype = checks.get("assistant_tokens_compared"), checks.get("assistant_dtype")
    mass, verdict = number(checks, "padding_mass_mean") or 0.0, "under" if checks.get("padding_mass_ok") else "NOT under"
    return (
        f"## Tests of these files\n\n- Greedy text of the target with this draft as `assistant_model` {same} to the target's alone ({compared} tokens, {dtype}).\n"
        f"- Mean probability on padding ids, which no tokenizer can decode: {mass:.1e}, {verdict} {checks.get('padding_mass_limit', 1e-4):.0e}."
    )


def _limits() -> str:
    return (
        "## Limits\n\nFew proposals are accepted on text unlike the training corpora, other languages included; the output stays the target's. "
        "The licences of the target and of the corpora decide how this draft may be used."
    )
