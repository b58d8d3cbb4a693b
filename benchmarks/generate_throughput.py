"""How fast the target writes: FastDraft's batched engine beside transformers' generate, same model, prompts and batches.

    python benchmarks/generate_throughput.py --target shipped:targets/starter --threads 2

Decides that the two take turns, so that a busy machine slows both alike; that tokens behind an answer's end do not count;
and that greedy texts are compared as well as timed. Prints one line for each temperature.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from fastdraft.console import format_table
from fastdraft.data.chat import prompt_ids
from fastdraft.data.prompts import JsonlPrompts, select_texts
from fastdraft.decoding.autoregressive import pad_left
from fastdraft.interfaces import Sampling, TargetConfig
from fastdraft.modeling.loading import load_target, load_tokenizer, load_vocabulary
from fastdraft.runtimes.huggingface import HuggingFaceEngine

Texts = list[list[int]]


def plain_generate(model: PreTrainedModel, batch: Texts, sampling: Sampling, tokens: int, eos_ids: tuple[int, ...]) -> Texts:
    """Answers of transformers' own generate, cut behind their EOS."""
    ids, mask = pad_left(batch)
    options = (
        {"do_sample": True, "temperature": sampling.temperature, "top_k": None, "top_p": 1.0}
        if sampling.temperature
        else {"do_sample": False}
    )
    torch.manual_seed(0)
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, eos_token_id=list(eos_ids), pad_token_id=0, **options
    )
    return [until_eos(row, eos_ids) for row in output[:, ids.shape[1] :].tolist()]


def until_eos(row: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    return row[: next((i + 1 for i, token in enumerate(row) if token in eos_ids), len(row))]


def timed(write: Callable[[], Texts]) -> tuple[Texts, float]:
    start = time.perf_counter()
    texts = write()
    return texts, sum(map(len, texts)) / (time.perf_counter() - start)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="shipped:targets/starter")
    parser.add_argument("--file", default="shipped:data/prompts.jsonl.xz", help="JSONL with a `prompt` in each line")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--batch-rows", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own choice")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    target = TargetConfig(model=arguments.target)
    tokenizer, vocabulary, model = load_tokenizer(target.location), load_vocabulary(target), load_target(target, "cpu")
    engine = HuggingFaceEngine(model, vocabulary, arguments.batch_rows)
    room = engine.context_length - arguments.max_new_tokens
    texts = select_texts(JsonlPrompts(name="prompts", path=arguments.file), set(), 0).texts
    encoded = (prompt_ids(tokenizer, text, chat=True) for text in texts)
    prompts = sorted([ids for ids, _ in zip((ids for ids in encoded if len(ids) <= room), range(arguments.prompts), strict=False)], key=len)
    batches = [prompts[i : i + arguments.batch_rows] for i in range(0, len(prompts), arguments.batch_rows)]
    tokens, eos_ids = arguments.max_new_tokens, vocabulary.eos_token_ids
    rows = []
    for temperature in arguments.temperatures:
        sampling = Sampling(temperature)

        def ours(sampling: Sampling = sampling) -> Texts:
            return [answer.response_ids for answer in engine.generate(prompts, sampling, tokens, seed=0)]

        def theirs(sampling: Sampling = sampling) -> Texts:
            return [text for batch in batches for text in plain_generate(model, batch, sampling, tokens, eos_ids)]

        pairs = [(timed(ours), timed(theirs)) for _ in range(arguments.repeats)]
        own, other = (statistics.median(pair[side][1] for pair in pairs) for side in (0, 1))
        ratio = statistics.median(pair[0][1] / pair[1][1] for pair in pairs)
        equal = sum(a == b for a, b in zip(pairs[0][0][0], pairs[0][1][0], strict=True)) if temperature == 0 else "-"
        rows.append([temperature, sum(map(len, pairs[0][0][0])), f"{own:.0f}", f"{other:.0f}", f"{ratio:.2f}", equal, len(prompts)])
    title = (
        f"{arguments.target}, {torch.get_num_threads()} threads, batches of {arguments.batch_rows}, {arguments.repeats} repeats, medians"
    )
    print(format_table(title, ["temperature", "tokens", "FastDraft tokens/s", "transformers tokens/s", "ratio", "equal texts", "of"], rows))


if __name__ == "__main__":
    main()
