"""How fast a target writes synthetic data: FastDraft's two engines beside transformers' generate and bare OpenVINO, in one run.

    python benchmarks/generate_throughput.py --target shipped:targets/starter --threads 2
    python benchmarks/generate_throughput.py --shape 512,6,1408,8,8192 --threads 2 --json throughput.json

Five contenders write the same prompts with the same sampling: transformers' generate in float32 and in bfloat16, the
`huggingface` engine (float32, as a recipe runs it on a CPU), the `openvino` engine, and the same loaded OpenVINO model
through ContinuousBatchingPipeline.generate without the engine around it. Decides that they take turns, in another order each
time, so that a busy machine slows all alike; that ratios are formed within a turn and their median is given; that tokens for
each second of processor time are given beside those of the clock, for other processes take of the clock and not of them; that
tokens behind an answer's end do not count; and that greedy texts are compared as well as timed.

--shape HIDDEN,LAYERS,FFN,HEADS,VOCAB takes a Llama of random weights with an untied output head instead of a target: all
answers then go to the limit, since random weights end no text in a sensible place.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

import torch
from machine import Report
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fastdraft.console import format_table
from fastdraft.data.chat import first_prompt_ids
from fastdraft.data.prompts import select_prompts
from fastdraft.decoding.autoregressive import pad_left
from fastdraft.functional.generation import Sampling
from fastdraft.modeling.drafts import set_threads
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.recipe.run import TargetConfig
from fastdraft.recipe.synthesize import JsonlPrompts
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.runtimes.openvino import OpenVINOEngine, answer_seed, as_tensor, generation_config
from fastdraft.runtimes.openvino_export import convert
from fastdraft.target import Target

Texts = list[list[int]]
Writer = Callable[[Sampling], Texts]
PLAIN32, PLAIN16, OURS, OPENVINO, RAW = (
    "transformers generate, fp32",
    "transformers generate, bf16",
    "huggingface engine, fp32",
    "openvino engine",
    "bare continuous batching",
)
STARTER = "shipped:targets/starter"


def random_target(shape: str, folder: Path) -> Path:
    """A Llama directory of the asked shape with random weights and the starter's tokenizer."""
    starter = TargetConfig(model=STARTER)
    hidden, layers, ffn, heads, vocabulary = (int(part) for part in shape.split(","))
    known = starter.vocabulary
    if vocabulary < known.size:
        raise SystemExit(f"--shape: the vocabulary must be at least {known.size}, the tokenizer's")
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
        eos_token_id=known.eos_token_ids[0],
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    Target(starter).copy_tokenizer(folder)
    return folder


class Contenders:
    """Everything loaded once: the five writers by name, and the prompts."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        target = TargetConfig(
            model=str(random_target(arguments.shape, folder / "random"))
            if arguments.shape
            else arguments.target
        )
        self.vocabulary = Target(target).vocabulary
        if arguments.shape:
            self.vocabulary = replace(self.vocabulary, eos_token_ids=())
        self.model = Target(target).model("cpu", torch.float32)
        half = Target(target).model("cpu", torch.bfloat16)
        self.engine = HuggingFaceEngine(self.model, self.vocabulary, arguments.batch_rows)
        exported = folder / "openvino"
        exported.mkdir()
        convert(target, exported, arguments.weights)
        self.openvino = OpenVINOEngine(
            exported,
            self.vocabulary,
            self.engine.context_length,
            arguments.batch_rows,
            precision=arguments.precision,
            threads=arguments.threads,
        )
        self.prompts = read_prompts(target, arguments, self.engine.context_length - arguments.max_new_tokens)
        self.writers: dict[str, Writer] = {
            PLAIN32: lambda sampling: self._plain(self.model, sampling),
            PLAIN16: lambda sampling: self._plain(half, sampling),
            OURS: lambda sampling: self._engine(self.engine, sampling),
            OPENVINO: lambda sampling: self._engine(self.openvino, sampling),
            RAW: self._raw,
        }

    def _plain(self, model: PreTrainedModel, sampling: Sampling) -> Texts:
        rows = self.arguments.batch_rows
        batches = [self.prompts[i : i + rows] for i in range(0, len(self.prompts), rows)]
        return [
            text
            for batch in batches
            for text in plain_generate(model, batch, sampling, self.arguments.max_new_tokens, self.vocabulary)
        ]

    def _engine(self, engine: HuggingFaceEngine | OpenVINOEngine, sampling: Sampling) -> Texts:
        return [
            answer.response_ids
            for answer in engine.generate(self.prompts, sampling, self.arguments.max_new_tokens, seed=0)
        ]

    def _raw(self, sampling: Sampling) -> Texts:
        tokens, eos_ids = self.arguments.max_new_tokens, self.vocabulary.eos_token_ids
        configs = [
            generation_config(sampling, tokens, eos_ids, answer_seed(0, index))
            for index in range(len(self.prompts))
        ]
        results = self.openvino.pipeline.generate([as_tensor(prompt) for prompt in self.prompts], configs)
        return [[int(token) for token in result.m_generation_ids[0]] for result in results]


def read_prompts(target: TargetConfig, arguments: argparse.Namespace, room: int) -> Texts:
    """The first prompts that fit, as the target reads them, shortest first."""
    tokenizer = Target(target).tokenizer
    chosen = select_prompts(JsonlPrompts(kind="jsonl", name="p", path=arguments.file), set(), 0).prompts
    encoded = (first_prompt_ids(tokenizer, prompt, chat=True) for prompt in chosen)
    fitting = (ids for ids in encoded if len(ids) <= room)
    return sorted((ids for ids, _ in zip(fitting, range(arguments.prompts), strict=False)), key=len)


def plain_generate(
    model: PreTrainedModel, batch: Texts, sampling: Sampling, tokens: int, vocabulary: Vocabulary
) -> Texts:
    """Answers of transformers' own generate, cut behind their EOS."""
    ids, mask = pad_left(batch)
    sampled = {"do_sample": True, "temperature": sampling.temperature, "top_k": None, "top_p": 1.0}
    options = sampled if sampling.temperature else {"do_sample": False}
    eos_ids = vocabulary.eos_token_ids
    torch.manual_seed(0)
    model.generation_config.eos_token_id = None  # else it would stand in for an empty list
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=0,
        **options,
    )
    return [until_eos(row, eos_ids) for row in output[:, ids.shape[1] :].tolist()]


def until_eos(row: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    return row[: next((i + 1 for i, token in enumerate(row) if token in eos_ids), len(row))]


def measure(contenders: Contenders, sampling: Sampling, repeats: int) -> list[dict[str, Any]]:
    """One entry for each contender: tokens a second in every turn, and the ratios to the others within the turns."""
    names = list(contenders.writers)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    of_processor: dict[str, list[float]] = {name: [] for name in names}
    texts = {name: contenders.writers[name](sampling) for name in names}  # warms up
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, busy = time.perf_counter(), time.process_time()
            tokens = sum(map(len, contenders.writers[name](sampling)))
            speeds[name].append(tokens / (time.perf_counter() - start))
            of_processor[name].append(tokens / (time.process_time() - busy))
    found = []
    for name in names:
        ratios = {
            other: statistics.median(a / b for a, b in zip(speeds[name], speeds[other], strict=True))
            for other in names
        }
        equal = (
            sum(a == b for a, b in zip(texts[name], texts[PLAIN32], strict=True))
            if sampling.temperature == 0
            else None
        )
        found.append(
            {
                "contender": name,
                "temperature": sampling.temperature,
                "tokens": sum(map(len, texts[name])),
                "tokens_per_second": speeds[name],
                "median": statistics.median(speeds[name]),
                "tokens_per_processor_second": statistics.median(of_processor[name]),
                "ratio_to": ratios,
                "texts_equal_to_fp32": equal,
            }
        )
    return found


def show(found: Sequence[dict[str, Any]], title: str, prompts: int) -> None:
    ratios = [f"x {name}" for name in ("generate fp32", "generate bf16", "bare batching")]
    columns = ["contender", "tokens", "tokens/s", "range", "per CPU s", *ratios, "equal texts"]
    rows = [
        [
            one["contender"],
            one["tokens"],
            f"{one['median']:.0f}",
            f"{min(one['tokens_per_second']):.0f} to {max(one['tokens_per_second']):.0f}",
            f"{one['tokens_per_processor_second']:.0f}",
            *(f"{one['ratio_to'][other]:.2f}" for other in (PLAIN32, PLAIN16, RAW)),
            "-" if one["texts_equal_to_fp32"] is None else f"{one['texts_equal_to_fp32']} of {prompts}",
        ]
        for one in found
    ]
    print(format_table(title, columns, rows, width=160))


def verdict(found: Sequence[dict[str, Any]]) -> str:
    """The two figures asked of the OpenVINO engine."""
    by_name = {one["contender"]: one for one in found}
    ours = by_name[OPENVINO]
    lean = ours["tokens_per_processor_second"] / by_name[RAW]["tokens_per_processor_second"]
    to32, to16, raw = (ours["ratio_to"][name] for name in (PLAIN32, PLAIN16, RAW))
    return (
        f"openvino engine: {to32:.2f} x generate in fp32, {to16:.2f} x in bf16 (goal 2.5); "
        f"{raw:.2f} x bare continuous batching, {lean:.2f} x for equal processor time (goal 0.9)"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=STARTER, help="directory or hub id")
    parser.add_argument(
        "--shape",
        help="HIDDEN,LAYERS,FFN,HEADS,VOCAB of a random Llama instead, e.g. 512,6,1408,8,8192 (27.6 M)",
    )
    parser.add_argument(
        "--file", default="shipped:data/prompts.jsonl.xz", help="JSONL with a `prompt` in each line"
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch-rows", type=int, default=64, help="prompts written together")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.8])
    parser.add_argument(
        "--weights", choices=["fp32", "fp16", "int8", "int4"], default="int8", help="of the OpenVINO model"
    )
    parser.add_argument(
        "--precision", choices=["fast", "exact"], default="fast", help="of OpenVINO's arithmetic"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    set_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        contenders = Contenders(arguments, Path(folder))
        size = sum(parameter.numel() for parameter in contenders.model.parameters())
        name = f"random {arguments.shape}" if arguments.shape else arguments.target
        results = []
        for temperature in arguments.temperatures:
            found = measure(contenders, Sampling(temperature), arguments.repeats)
            results += found
            title = (
                f"{name}, {size / 1e6:.1f} M parameters; {len(contenders.prompts)} prompts x {arguments.max_new_tokens} tokens, "
                f"temperature {temperature:g}; OpenVINO {arguments.weights}, {arguments.precision}; {torch.get_num_threads()} threads, "
                f"{arguments.repeats} turns, medians"
            )
            show(found, title, len(contenders.prompts))
            print(verdict(found))
        if arguments.json:
            report = Report(arguments.json, "generate_throughput", "cpu", arguments)
            report.add(*results)
            report.finish(parameters=size)
        del contenders  # lets go of the exported files: on Windows they could not be removed


if __name__ == "__main__":
    main()
