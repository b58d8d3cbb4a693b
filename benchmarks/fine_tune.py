"""Fine-tunes a small target on questions about Python's standard library, so that its draft must be re-aligned.

    python benchmarks/fine_tune.py SmolLM2-135M-Instruct.Q4_1.gguf fine-tune --minutes 20
    fastdraft recipes --for fine-tune --from DRAFT --minutes 15 --data fine-tune/prompts.jsonl --tasks fine-tune/held_out.jsonl,chat

An answer is the signature and the docstring of what was asked for: another style than a chat model's. Every
weight is trained, for so many minutes of the clock; the rate falls to 0 over them, so that a second run gives
a similar model, not the same. TARGET is a model directory or GGUF file of at most some 200 M parameters; OUT
becomes a Hugging Face directory, with the questions beside it: `prompts.jsonl`, and `held_out.jsonl`, of whose
functions the model has seen nothing. Of these it prints the loss before and after.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from function_prompts import SKIPPED

from fastdraft.console import format_seconds
from fastdraft.data.chat import ChatTemplate
from fastdraft.modeling.drafts import pick_device, save_draft, set_threads
from fastdraft.recipe.training import AlignConfig
from fastdraft.run_folder import atomic_path
from fastdraft.target import Target
from fastdraft.training.batches import Sample, micro_batches, padded_batch
from fastdraft.training.defaults import build_step, resolve
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.step import TrainStep

ASKED = (
    "What does `{}` do?",
    "How do I call `{}` in Python?",
    "Explain {} from the Python standard library.",
    "Give me the reference entry of `{}`.",
)
LONGEST, SHORTEST = 400, 40  # characters of a docstring; what is longer ends at a paragraph
HELD_OUT, SCORED = 96, 24  # questions, of which the loss is told
BATCH_TOKENS, RATE, WARMUP = 512, 2e-4, 0.05
TOLD_EVERY = 30.0  # seconds


def entries() -> Iterator[tuple[str, str]]:
    """Name and reference entry of every public function, class and method with a docstring."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if SKIPPED & set(parts) or any(part.startswith("_") or "-" in part for part in parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        yield from documented(tree, ".".join(parts))


def documented(parent: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        own, text = f"{name}.{node.name}", (ast.get_docstring(node) or "").strip()
        while len(text) > LONGEST and "\n\n" in text:
            text = text.rpartition("\n\n")[0].rstrip()
        if isinstance(node, ast.ClassDef):
            signature = f"class {own}({', '.join(map(ast.unparse, node.bases))})"
            yield from documented(node, own)
        else:
            signature = f"{own}({ast.unparse(node.args)})"
        if SHORTEST < len(text) <= LONGEST:
            yield own, f"{signature}\n\n{text}"


def questions() -> list[tuple[str, str]]:
    """Prompt and answer, in an order that the seed 0 gives; the first `HELD_OUT` are not trained on."""
    found, draw = dict(entries()), random.Random(0)
    asked = [(draw.choice(ASKED).format(name), entry) for name, entry in found.items()]
    draw.shuffle(asked)
    return asked


def held_out_loss(step: TrainStep, samples: list[Sample]) -> float:
    """Nats a token of the answers."""
    with torch.no_grad():
        batches = [padded_batch(group) for group in micro_batches(samples, BATCH_TOKENS)]
        return float(sum(map(step.loss_sum, batches))) / sum(batch.num_trained for batch in batches)


def train(step: TrainStep, samples: list[Sample], seconds: float) -> int:
    """For so long; returns the tokens that went through the model."""
    start, order, told, tokens = time.monotonic(), np.random.default_rng(0), 0.0, 0
    while (passed := time.monotonic() - start) < seconds:
        chosen, size = list[Sample](), 0
        while size < BATCH_TOKENS:
            chosen.append(samples[order.integers(len(samples))])
            size += chosen[-1].num_tokens
        loss = step.gradients([padded_batch(group) for group in micro_batches(chosen, BATCH_TOKENS)])[0]
        share = passed / seconds
        step.update(min(1.0, share / WARMUP + 0.02) * (1 - share))
        tokens += size
        if passed - told >= TOLD_EVERY:
            told = passed
            print(f"{format_seconds(passed)} of {format_seconds(seconds)}: {tokens} tokens, {loss:.3f} nats")
    return tokens


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("target", help="a model directory or a GGUF file")
    add("out", type=Path, help="the new model's directory")
    add("--minutes", type=float, default=20.0, help="of training (20)")
    add("--rate", type=float, default=RATE, help=f"AdamW's at its peak ({RATE:g})")
    add("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    given = parser.parse_args()
    if given.out.exists():
        raise SystemExit(f"{given.out}: is there already; move it, or name another")
    set_threads(given.threads)
    target = Target.at(given.target)
    chat, end = ChatTemplate(target.tokenizer), target.vocabulary.eos_token_ids[0]
    asked, samples = questions(), []
    for prompt, answer in asked:
        ids = [*target.tokenizer(answer, add_special_tokens=False).input_ids, end]
        samples.append(Sample(np.array(chat.prompt_ids(prompt), np.int32), np.array(ids, np.int32)))
    held_out, trained = samples[:SCORED], samples[HELD_OUT:]
    model = target.model(pick_device("auto"), torch.float32)
    rate = {"kind": "adamw", "learning_rate": given.rate}
    config = AlignConfig.model_validate({"batch_tokens": BATCH_TOKENS, "optimizer": rate})
    step = build_step(model.train(), resolve(config, "align", model, 1, "auto"), CrossEntropy())
    before = held_out_loss(step, held_out)
    print(f"{len(trained)} questions; of {len(held_out)} held out {before:.3f} nats a token of the answers")
    tokens = train(step, trained, given.minutes * 60)
    print(f"{tokens} tokens trained on; held out: {before:.3f} -> {held_out_loss(step, held_out):.3f} nats")
    save_draft(model.eval(), given.out, target)
    for name, part in (("held_out", asked[:HELD_OUT]), ("prompts", asked[HELD_OUT:])):
        with atomic_path(given.out / f"{name}.jsonl") as path:
            path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt, _ in part))


if __name__ == "__main__":
    main()
