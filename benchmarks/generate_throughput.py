"""How fast a target writes synthetic data: our engines beside transformers' generate and bare OpenVINO.

    python benchmarks/generate_throughput.py --target shipped:targets/starter --threads 2
    python benchmarks/generate_throughput.py --shape 512,6,1408,8,8192 --threads 2 --json throughput.json

Five contenders write the same prompts with the same sampling, in turns: transformers' generate in float32 and
in bfloat16, the `huggingface` engine (float32), the `openvino` engine, and the same loaded OpenVINO model
through ContinuousBatchingPipeline.generate without the engine around it. Tokens behind an answer's end do not
count; greedy texts are compared as well as timed. --shape HIDDEN,LAYERS,FFN,HEADS,VOCAB takes a Llama of
random weights with an untied output head instead of a target: all answers then go to the limit.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

import torch
from machine import Report, options, ratio, spread, table, take_turns, tell
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fastdraft.data.chat import ChatTemplate
from fastdraft.data.prompts import select_prompts
from fastdraft.decoding.autoregressive import pad_left
from fastdraft.functional.generation import Sampling
from fastdraft.modeling.drafts import set_threads
from fastdraft.recipe.synthesize import JsonlPrompts
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.runtimes.openvino import OpenVINOEngine, answer_seed, as_tensor, generation_config
from fastdraft.runtimes.openvino_export import convert
from fastdraft.target import Target

Texts = list[list[int]]
STARTER = "shipped:targets/starter"
PLAIN32, PLAIN16 = "transformers generate, fp32", "transformers generate, bf16"
RAW = "bare continuous batching"


def random_target(shape: str, folder: Path) -> Path:
    """A Llama directory of the asked shape with random weights and the starter's tokenizer."""
    starter = Target.at(STARTER)
    hidden, layers, ffn, heads, vocabulary = (int(part) for part in shape.split(","))
    if vocabulary < starter.vocabulary.size:
        raise SystemExit(
            f"--shape: the vocabulary must be at least {starter.vocabulary.size}, the tokenizer's"
        )
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=starter.vocabulary.eos_token_ids[0],
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    starter.copy_tokenizer(folder)
    return folder


class Contenders:
    """Everything loaded once: the five writers by name, and the prompts."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        target = Target.at(random_target(given.shape, folder / "random") if given.shape else given.target)
        known = target.vocabulary if not given.shape else replace(target.vocabulary, eos_token_ids=())
        self.given, self.eos_ids = given, known.eos_token_ids
        self.model = target.model("cpu", torch.float32)
        ours, rows = HuggingFaceEngine(self.model, known, given.batch_rows), given.batch_rows
        (folder / "openvino").mkdir()
        convert(target, folder / "openvino", given.weights)
        how: dict[str, Any] = {"precision": given.precision, "threads": given.threads}
        self.openvino = OpenVINOEngine(folder / "openvino", known, ours.context_length, rows, **how)
        self.prompts = read_prompts(target, given, ours.context_length - given.max_new_tokens)
        self.writers: dict[str, Callable[[Sampling], Texts]] = {
            PLAIN32: partial(self.plain, self.model),
            PLAIN16: partial(self.plain, target.model("cpu", torch.bfloat16)),
            "huggingface engine, fp32": partial(self.engine, ours),
            "openvino engine": partial(self.engine, self.openvino),
            RAW: self.raw,
        }

    def plain(self, model: PreTrainedModel, sampling: Sampling) -> Texts:
        """Answers of transformers' own generate, cut behind their EOS."""
        how: dict[str, Any] = {"do_sample": bool(sampling.temperature), "pad_token_id": 0}
        if sampling.temperature:
            how |= {"temperature": sampling.temperature, "top_k": None, "top_p": 1.0}
        how |= {"max_new_tokens": self.given.max_new_tokens, "eos_token_id": list(self.eos_ids) or None}
        model.generation_config.eos_token_id = None  # else it would stand in for an empty list
        torch.manual_seed(0)
        texts = []
        for start in range(0, len(self.prompts), self.given.batch_rows):
            ids, mask = pad_left(self.prompts[start : start + self.given.batch_rows])
            output = model.generate(input_ids=ids, attention_mask=mask, **how)[:, ids.shape[1] :].tolist()
            for row in output:
                ends = (i + 1 for i, token in enumerate(row) if token in self.eos_ids)
                texts.append(row[: next(ends, len(row))])
        return texts

    def engine(self, engine: HuggingFaceEngine | OpenVINOEngine, sampling: Sampling) -> Texts:
        answers = engine.generate(self.prompts, sampling, self.given.max_new_tokens, seed=0)
        return [answer.response_ids for answer in answers]

    def raw(self, sampling: Sampling) -> Texts:
        seeds = [answer_seed(0, index) for index in range(len(self.prompts))]
        asked = partial(generation_config, sampling, self.given.max_new_tokens, self.eos_ids)
        prompts = [as_tensor(prompt) for prompt in self.prompts]
        results = self.openvino.pipeline.generate(prompts, [asked(seed) for seed in seeds])
        return [[int(token) for token in result.m_generation_ids[0]] for result in results]


def read_prompts(target: Target, given: argparse.Namespace, room: int) -> Texts:
    """The first prompts that fit, as the target reads them, shortest first."""
    chosen = select_prompts(JsonlPrompts(kind="jsonl", name="p", path=given.file), set(), 0).prompts
    chat = ChatTemplate(target.tokenizer)
    encoded = (chat.prompt_ids(prompt) for prompt in chosen)
    fitting = (ids for ids in encoded if len(ids) <= room)
    return sorted(itertools.islice(fitting, given.prompts), key=len)


def measure(contenders: Contenders, temperature: float, turns: int) -> list[dict[str, Any]]:
    """One entry for each contender: tokens a second, and the ratios to the others within the turns."""
    sampling, writers = Sampling(temperature), contenders.writers
    texts = {name: write(sampling) for name, write in writers.items()}  # warms up
    seconds = take_turns({name: partial(write, sampling) for name, write in writers.items()}, turns)
    counts = {name: sum(map(len, written)) for name, written in texts.items()}
    per_token = {name: [taken / counts[name] for taken in seconds[name]] for name in writers}
    found = []
    for name, own in per_token.items():
        one = {
            "contender": name,
            "temperature": temperature,
            "tokens": counts[name],
            "prompts": len(texts[name]),
        }
        one["tokens_per_second"] = spread([1 / taken for taken in own])
        one["times_faster_than"] = {other: ratio(per_token[other], own) for other in writers}
        if temperature == 0:
            pairs = zip(texts[name], texts[PLAIN32], strict=True)
            one["texts_equal_to_fp32"] = sum(a == b for a, b in pairs)
        found.append(one)
    return found


def main() -> None:
    parser = options(__doc__, "generate_throughput", device=False)
    add = parser.add_argument
    add("--target", default=STARTER, help="directory or hub id")
    add("--shape", help="of a random Llama instead, e.g. 512,6,1408,8,8192 (27.6 M)")
    add("--file", default="shipped:data/prompts.jsonl.xz", help="JSONL with a `prompt` in each line")
    add("--prompts", type=int, default=64)
    add("--batch-rows", type=int, default=64, help="prompts written together")
    add("--max-new-tokens", type=int, default=64)
    add("--temperatures", type=float, nargs="+", default=[0.8])
    add("--weights", choices=["fp32", "fp16", "int8", "int4"], default="int8", help="of the OpenVINO model")
    add("--precision", choices=["fast", "exact"], default="fast", help="of OpenVINO's arithmetic")
    add("--repeats", type=int, default=5, help="turns")
    given = parser.parse_args()
    if given.dry_run:
        given.prompts, given.max_new_tokens, given.repeats, given.temperatures = 2, 4, 1, [0.0]
    set_threads(given.threads)
    report = Report(given.output, "generate_throughput", "cpu", given)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        contenders = Contenders(given, Path(folder))
        for temperature in given.temperatures:
            report.add(*measure(contenders, temperature, given.repeats))
        report.finish(parameters=sum(parameter.numel() for parameter in contenders.model.parameters()))
    rows = []
    for one in report.results:
        rows.append([f"{one['contender']}, T {one['temperature']:g}", tell(one["tokens_per_second"], ".0f")])
        rows[-1] += [tell(one["times_faster_than"][other]) for other in (PLAIN32, PLAIN16, RAW)]
        rows[-1].append(one.get("texts_equal_to_fp32", "-"))
    print(table(["", "tokens/s", "x generate fp32", "x bf16", "x bare batching", "equal texts"], rows))


if __name__ == "__main__":
    main()
