"""Does vLLM with a draft write what it writes without, and do its counts agree with a replay?

    benchmarks/vllm_environment.sh ENV
    python benchmarks/vllm_agreement.py TARGET DRAFT --server ENV/bin/python --arguments "--dtype float32 --enforce-eager"

In float32 greedy text must be equal. Counts are those of /metrics, checked against the stream's chunks, beside a replay
of the draft's greedy proposals over the text that the server wrote, from behind its first token. One server for the
target alone and one for each K; --base-url and --draft-base-url take two that run already.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from llamacpp_agreement import compare, tell
from machine import Report, options
from openvino_agreement import read_prompts

from fastdraft.modeling.drafts import set_threads
from fastdraft.runtimes.vllm_runtime import VLLMRuntime
from fastdraft.target import Target


def main() -> None:
    parser = options(__doc__, "vllm_agreement", device=False)
    add = parser.add_argument
    add("target", type=Path, help="Hugging Face directory")
    add("draft", type=Path, help="Hugging Face directory")
    add("--server", default="", help="Python of an environment that has vLLM")
    add("--arguments", default="--dtype float32 --enforce-eager", help="of every server")
    add("--base-url", default="", help="of a server of the target alone that runs already")
    add("--draft-base-url", default="", help="of one with the draft")
    add("--prompts", type=int, default=20, help="spread evenly over the four tasks that ship")
    add("--prompt-tokens", type=int, default=2000, help="longer prompts are passed over")
    add("--max-new-tokens", type=int, default=64)
    add("--num-speculative-tokens", dest="ks", type=int, nargs="+", default=[1, 3, 5])
    add("--temperatures", type=float, nargs="+", default=[0.0])
    given = parser.parse_args()
    if given.dry_run:
        given.prompts, given.max_new_tokens = 4, 6
    set_threads(given.threads)
    report = Report(given.output, "vllm_agreement", "cpu", given)
    target, draft = Target.at(given.target), Target.at(given.draft)
    room = min(target.context_length, draft.context_length) - given.max_new_tokens - 2 * max(given.ks) - 2
    prompts = read_prompts(target, given.prompts, min(room, given.prompt_tokens))
    arguments = "" if given.base_url else given.arguments
    places = (given.server, arguments, given.base_url, given.draft_base_url, given.threads)
    runtime = VLLMRuntime(*places, eos_ids=target.vocabulary.eos_token_ids)
    found = runtime.describe()
    pair, model = runtime.open(given.target, given.draft), draft.model("cpu")
    try:
        for k in given.ks:
            given.k = k
            for temperature in given.temperatures:
                compare(pair, model, target, prompts, temperature, given, report, "vllm")
    finally:
        pair.close()
    report.finish(vllm=found["version"])
    tell(report, "vllm")


if __name__ == "__main__":
    main()
