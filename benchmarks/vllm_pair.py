"""The paper's pairs in vLLM at 1, 4, 16 and 64 texts at a time, before anything is trained.

    python benchmarks/vllm_pair.py                                       # in an environment that has vLLM
    python benchmarks/vllm_pair.py --server ENV/bin/python --shape phi-3-mini-50m --texts 1 4

Weights are random, and proposals are accepted by chance at the mean acceptance rate that the paper prints for the pair
(arXiv 2411.11055, temperature 0.6, K = 3): what is measured is what verifying costs, not what a draft learns. Beside it
stands what the costs of passes of both models predict. Without vLLM one line is printed and nothing is done.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from machine import Report, options, table

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
# Targets of the paper, its drafts' presets, and how its tables call the pairs.
PAIRS: dict[str, tuple[tuple[int, ...], str]] = {
    "llama-3.1-8b-150m": ((4096, 32, 32, 8, 14336, 128256), "Llama-3.1-8B 150M"),
    "phi-3-mini-50m": ((3072, 32, 32, 32, 8192, 32064), "Phi-3-mini 50M"),
}
TINY = (256, 2, 4, 2, 512, 1024)
PREFIX, K = 128, 3


def measure(name: str, given: Any, folder: Path, report: Report) -> None:
    """One pair: a server of the target alone, one of the draft alone, one of both."""
    from transformers import LlamaConfig

    from fastdraft.forecast import block_efficiency, conditional_acceptance_rate, predicted_speedup
    from fastdraft.modeling import shapes
    from fastdraft.modeling.architecture import draft_hf_config, read_architecture
    from fastdraft.reporting.definitions import PAPER_RATES
    from fastdraft.runtimes.vllm import seconds_by_chance, timed_passes
    from fastdraft.runtimes.vllm_runtime import VLLMRuntime

    sizes, paper = PAIRS[name]
    config = LlamaConfig(
        **dict(zip(SIZES, TINY if given.dry_run else sizes, strict=True)), max_position_embeddings=4096
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    shape = read_architecture(config)
    draft = shapes.natural(shape, 64) if given.dry_run else shapes.preset(name, shape)
    for role, one in (("target", config), ("draft", draft_hf_config(config, draft))):
        one.architectures = ["LlamaForCausalLM"]
        one.save_pretrained(folder / role)
    # No tokenizer: token ids go in and out.
    runtime = VLLMRuntime(
        given.server, f"--load-format dummy --skip-tokenizer-init {given.arguments}", threads=given.threads
    )
    rate = statistics.fmean(rates[-1] for rates in PAPER_RATES[paper].values())
    chance = conditional_acceptance_rate(rate, K)
    by_tokens = timed_passes(
        folder / "target", runtime, sorted({n * w for n in given.texts for w in (1, K + 1)}), PREFIX
    )
    by_texts = timed_passes(folder / "draft", runtime, given.texts, PREFIX)
    pair = folder / "target", folder / "draft", runtime
    for n, served in seconds_by_chance(*pair, K, chance, given.texts, PREFIX).items():
        costs = by_texts[n], by_tokens[n], by_tokens[n * (K + 1)]
        predicted = predicted_speedup(block_efficiency(chance, K), K, *costs)
        figures = {"seconds_per_token_alone": by_tokens[n], "seconds_per_token_with_draft": served}
        gains = {"speedup": by_tokens[n] / served, "predicted": predicted}
        report.add({"shape": name, "texts": n, **figures, **gains})


def main() -> None:
    parser = options(__doc__, "vllm_pair")
    add = parser.add_argument
    add("--shape", nargs="+", choices=PAIRS, default=list(PAIRS))
    add("--texts", type=int, nargs="+", default=[1, 4, 16, 64], help="at a time")
    add("--server", default="", help="Python of an environment that has vLLM; default: this one")
    add("--arguments", default="", help="further ones of every server")
    given = parser.parse_args()
    if not (find_spec("vllm") or shutil.which(given.server)):
        print(
            "skipped: no vLLM in this environment (pip install vllm, or name another's Python with --server)"
        )
        return
    if given.dry_run:
        given.shape, given.texts = given.shape[:1], [1, 2]
    report = Report(given.output, "vllm_pair", given.device, given)
    for name in given.shape:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, given, Path(folder), report)
    report.finish()
    rows = [
        [one["shape"], one["texts"], f"{one['speedup']:.2f}", f"{one['predicted']:.2f}"]
        for one in report.results
    ]
    print(table(("shape", "texts", "speed-up", "predicted"), rows))


if __name__ == "__main__":
    main()
