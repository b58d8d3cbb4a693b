"""`fastdraft generate`: the pair at work, text streaming out, with the speed-up measured on the very prompt.

Stdout gets the text alone, on a terminal coloured by what proposed each token; figures go to stderr.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from fastdraft.benchmark.rows import BenchmarkResults
from fastdraft.console import Console
from fastdraft.data.chat import ChatTemplate
from fastdraft.decoding.cache import ReadableModel
from fastdraft.decoding.proposers import ProposerKind
from fastdraft.decoding.reader import Readable
from fastdraft.decoding.speculative import Round, SpeculativeDecoder, proposers
from fastdraft.decoding.token_stream import TokenStream
from fastdraft.errors import DataError, FastDraftError, RecipeError
from fastdraft.evaluation.results import EvaluationResults
from fastdraft.functional.acceptance import add_counts
from fastdraft.functional.generation import Sampling
from fastdraft.modeling.drafts import load_draft, pick_device
from fastdraft.modeling.vocabulary import check_same
from fastdraft.recipe.base import load_config
from fastdraft.recipe.recipe import read_yaml
from fastdraft.recipe.run import TargetConfig
from fastdraft.run_folder import read_json
from fastdraft.runtimes.openvino import MODEL_FILE, import_genai
from fastdraft.runtimes.openvino_reader import OpenVINOModel
from fastdraft.stages.context import DRAFT_FOLDERS
from fastdraft.target import Target

# By what proposed a token its colour, and the colour's name; the target's own have the terminal's.
COLORS = {"draft": ("\x1b[32m", "green"), "lookup": ("\x1b[36m", "cyan")}
RESET = "\x1b[0m"
# What --proposer may be; both: lookup, and the draft in rounds for which it finds nothing.
PROPOSERS: dict[str, ProposerKind | None]
PROPOSERS = {"draft": "draft", "lookup": "lookup", "both": "lookup_draft", "nothing": None}
Exports = tuple[Path, Path | None]  # target and, where one is needed, draft as OpenVINO runs them
# A run's best draft is its export, else the checkpoint of its latest finished training stage.
_DRAFTS = ("export/huggingface", *(f"{stage}/{folder}" for stage, folder in reversed(DRAFT_FOLDERS.items())))


def find_pair(
    run: str | None, target: str | None, draft: str | None, proposer: str = "draft"
) -> tuple[TargetConfig, str | None]:
    """Target, with the run's revision and precision, and the draft's location; what is given by name wins.

    Without a proposer that drafts no draft is needed.
    """
    needed = proposer not in ("lookup", "nothing")
    if run is None:
        if not target or (needed and not draft):
            message = "RUN: missing; a run's folder, or both --target and --draft, must be given"
            raise RecipeError(message, "for example fastdraft generate runs/demo")
        return TargetConfig(model=target), draft
    folder = Path(run)
    try:
        written = {"model": target} if target else read_yaml(folder / "recipe.yaml")["target"]
        config = load_config(TargetConfig, written, "target")
    except (RecipeError, TypeError, KeyError):
        message = f"{run}: has no readable recipe.yaml; must be the folder of a run"
        raise FastDraftError(message, "give a folder such as runs/demo") from None
    found = (str(folder / name) for name in _DRAFTS if (folder / name / "config.json").is_file())
    draft = draft or next(found, None)
    if draft is None and needed:
        raise FastDraftError(f"{run}: holds no draft yet", "run `fastdraft run RECIPE` first")
    return config, draft


def find_exports(
    runtime: Literal["openvino", "transformers"] | None,
    run: str | None,
    target: str | None,
    draft: str | None,
    device: str,
    proposer: str = "draft",
) -> Exports | None:
    """The models for OpenVINO, of the run or given by name; None where transformers runs the pair.

    Without a choice: OpenVINO where they are exported, it is installed, and `device` leaves the CPU to it.
    """
    exports = Path(run or "") / "export" / "openvino"
    first, second = Path(target or exports / "target"), Path(draft or exports / "draft")
    found = first, None if proposer in ("lookup", "nothing") else second
    missing = next((path for path in found if path and not (path / MODEL_FILE).is_file()), None)
    if runtime is None:
        wanted = missing is None and pick_device(device).type == "cpu" and find_spec("openvino_genai")
        return found if wanted else None
    if runtime == "transformers":
        return None
    import_genai()
    if missing:
        fix = "add openvino to export.formats, or leave out --runtime openvino"
        raise FastDraftError(f"{missing}: no {MODEL_FILE}; --runtime openvino runs exported models", fix)
    if device not in ("auto", "cpu"):
        raise RecipeError(f"--device: {device}; with --runtime openvino it must be cpu", "leave out --device")
    return found


def choose_lengths(run: str | None, exports: Exports | None) -> dict[str, int]:
    """Most tokens of a round by proposer: the fastest in what the run measured, else 3 and 5.

    In OpenVINO that is its benchmark, in transformers evaluate's counts with the costs of passes.
    """
    lengths, told = {"draft": 3, "lookup": 5}, defaultdict[tuple[str, int], list[float]](list)
    path = Path(run or "") / ("benchmark/benchmark.json" if exports else "evaluate/results.json")
    if run is None or not path.is_file():
        return lengths
    rows: list[tuple[str, int | None, float | None]] = []
    if exports:
        timed = BenchmarkResults.from_json(read_json(path))
        # Our own decoder's rows where it was measured: its name comes first.
        pair = min((pair for pair in timed.deployed if pair[0] in ("fastdraft", "openvino")), default=None)
        judged = [row for kind in lengths for row in (timed.judged(pair, kind) if pair else [])]
        rows += [(row.proposer, row.num_speculative_tokens, row.speedup) for row in judged]
    else:
        counted = EvaluationResults.from_json(read_json(path))
        drafted = counted.select(checkpoint=counted.checkpoints[-1], method="replay")
        looked = [row for row in counted.lookup if (row.proposer, row.method) == ("lookup", "replay")]
        rows += [("draft", row.num_speculative_tokens, row.predicted_speedup) for row in drafted]
        rows += [("lookup", row.num_speculative_tokens, row.predicted_speedup) for row in looked]
    for kind, k, speedup in rows:
        if k and speedup:
            told[kind, k].append(speedup)
    means = {place: statistics.geometric_mean(each) for place, each in told.items()}
    for (kind, k), _ in sorted(means.items(), key=lambda each: (each[1], -each[0][1])):
        lengths[kind] = k  # the last is the fastest
    return lengths


@dataclass(frozen=True)
class _Answer:
    """One answer and how long it took."""

    prompt_ids: list[int]
    rounds: list[Round]
    seconds: float

    @property
    def token_ids(self) -> list[int]:
        return [token for r in self.rounds for token in r.tokens]


@dataclass(frozen=True)
class _Writer:
    """Everything that an answer needs but its prompt."""

    decoder: SpeculativeDecoder
    alone: SpeculativeDecoder  # the same target without a proposer
    chat: ChatTemplate
    sampling: Sampling
    max_new_tokens: int
    seed: int
    color: bool

    def answer(self, prompt_ids: list[int]) -> _Answer:
        """Streams one answer to stdout."""
        stream, rounds = TokenStream(self.chat.tokenizer), []
        start = time.perf_counter()
        for found in self.decoder.rounds(prompt_ids, self.sampling, self.room(prompt_ids), self.seed):
            rounds.append(found)
            for token, proposer in zip(found.tokens, proposers(found), strict=True):
                text, (color, _) = stream.feed(token), COLORS.get(proposer, ("", ""))
                sys.stdout.write(f"{color}{text}{RESET}" if text and self.color and color else text)
            sys.stdout.flush()
        seconds = time.perf_counter() - start
        print(stream.finish(), flush=True)
        return _Answer(prompt_ids, rounds, seconds)

    def room(self, prompt_ids: Sequence[int]) -> int:
        """New tokens that fit the context behind this prompt."""
        context = self.decoder.context_length
        if len(prompt_ids) >= context:
            message = f"prompt: {len(prompt_ids)} tokens; the context holds {context}"
            raise DataError(message, "shorten it, or begin a new conversation")
        return min(context - len(prompt_ids), self.max_new_tokens)

    def write_alone(self, ids: list[int]) -> tuple[list[int], float]:
        """What the target writes without a proposer, and its seconds, counted as in `answer`."""
        start = time.perf_counter()
        found = self.alone.generate(ids, self.sampling, self.room(ids), self.seed)
        return found.generation.response_ids, time.perf_counter() - start


def run(
    *,
    target: str | TargetConfig,
    draft: str | None,
    exports: Exports | None = None,
    prompt: str | None,
    chat: bool,
    proposer: str,
    num_speculative_tokens: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    max_new_tokens: int,
    seed: int,
    device: str,
    color: bool | None,
    compare: bool,
    console: Console,
    num_lookup_tokens: int | None = None,
    folder: str | None = None,
) -> None:
    """Writes one answer, to stdin without a `prompt`; or holds a conversation, on a terminal with `chat`.

    Lengths of proposals that are not given are chosen by what the run in `folder` measured.
    """
    opened = Target(target) if isinstance(target, TargetConfig) else Target.at(target)
    where, kind = pick_device(device, "--device"), PROPOSERS[proposer]
    vocabulary, draft = opened.vocabulary, draft if kind in ("draft", "lookup_draft") else None
    if draft:
        check_same(vocabulary, Target.at(draft).vocabulary, where=draft)
    model, drafting = _open_models(opened, draft, exports, where)
    lengths = choose_lengths(folder, exports)
    k = lengths["draft"] if num_speculative_tokens is None else num_speculative_tokens
    n = lengths["lookup"] if num_lookup_tokens is None else num_lookup_tokens
    decoder = SpeculativeDecoder(model, drafting, vocabulary, k, proposer=kind, num_lookup_tokens=n)
    alone = SpeculativeDecoder(model, None, vocabulary, k, proposer=None)
    template = ChatTemplate(opened.tokenizer, opened.chat_template_kwargs)
    sampling = Sampling(temperature, top_k, top_p)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal of another code page shows ? instead of failing
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    writer = _Writer(decoder, alone, template, sampling, max_new_tokens, seed, color)
    if chat and prompt is None and sys.stdin.isatty():
        answers = _converse(writer, console)
    else:
        text = prompt if prompt is not None else _read_prompt(console)
        if not text.strip():
            raise DataError("--prompt: empty; there must be a prompt", "give --prompt TEXT or pipe text in")
        message = [{"role": "user", "content": text}]
        ids = template.render(message) if chat else template.prompt_ids(text, chat=False)
        if compare:  # both models run once, or the first pass would be charged to one of them
            decoder.generate(ids[:8], sampling, 2, seed)
        answers = [writer.answer(ids)]
    if answers:
        _report(writer, answers, compare, console)


def _open_models(
    target: Target, draft: str | None, exports: Exports | None, device: torch.device
) -> tuple[Readable, Readable | None]:
    if exports:
        target_folder, draft_folder = exports
        drafting_model = OpenVINOModel(draft_folder, narrow=True) if draft_folder else None
        return OpenVINOModel(target_folder), drafting_model
    model = target.model(device)
    drafting = ReadableModel(load_draft(Path(draft), device, model.dtype)) if draft else None
    return ReadableModel(model), drafting


def _read_prompt(console: Console) -> str:
    """The whole of stdin without the line end that `echo` and the Enter key put behind it."""
    if sys.stdin.isatty():
        console.say("write the prompt; end it with Ctrl-D on a line of its own (Windows: Ctrl-Z and Enter)")
    try:
        return sys.stdin.read().removesuffix("\n").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        message = f"stdin: byte {error.start} is not {error.encoding}; a piped prompt must be text"
        raise DataError(message, "convert it to UTF-8, or give --prompt TEXT") from None


def _converse(writer: _Writer, console: Console) -> list[_Answer]:
    """Turn by turn until the input ends or Ctrl-C."""
    console.say("end the conversation with Ctrl-D (Windows: Ctrl-Z and Enter)")
    messages, answers = list[dict[str, str]](), list[_Answer]()
    while True:
        try:
            text = input("> ").strip()
            if not text:
                continue
            messages.append({"role": "user", "content": text})
            answers.append(writer.answer(writer.chat.render(messages)))
        except (EOFError, KeyboardInterrupt):
            print()
            return answers
        said = str(writer.chat.tokenizer.decode(answers[-1].token_ids, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": said})


def _report(writer: _Writer, answers: Sequence[_Answer], compare: bool, console: Console) -> None:
    """Tokens per target pass of all answers, and who gave them; the measured speed-up on the last."""
    rounds = [r for answer in answers for r in answer.rounds]
    counts, say, last = add_counts(r.counts for r in rounds), console.say, answers[-1]
    rate = counts.num_generated_tokens / max(sum(answer.seconds for answer in answers), 1e-9)
    passes = f"{counts.num_generated_tokens:.0f} tokens in {counts.num_drafts:.0f} target passes"
    say(f"{passes}: {counts.block_efficiency:.2f} tokens per pass, {rate:.0f} tokens/s")
    by = Counter(name for r in rounds for name in proposers(r))
    used = {"draft": writer.decoder.drafts, "lookup": writer.decoder.looks_up}
    kinds = [name for name in COLORS if used[name]]
    shown = [f"{by[name]} of {name}{f' ({COLORS[name][1]})' if writer.color else ''}" for name in kinds]
    say(f"tokens: {', '.join([*shown, f'{by[str()]} of the target itself'])}")
    if counts.num_draft_tokens:
        proposals = f"{counts.num_accepted_tokens:.0f} of {counts.num_draft_tokens:.0f} proposals"
        most = {"draft": writer.decoder.num_speculative_tokens, "lookup": writer.decoder.num_lookup_tokens}
        shown = [f"{most[name]} of {name}" for name in kinds]
        say(f"acceptance rate {counts.acceptance_rate:.3f} ({proposals}), a round at most {', '.join(shown)}")
    if not compare or not kinds:
        return
    alone_ids, alone_seconds = writer.write_alone(last.prompt_ids)
    with_draft, without = last.seconds / max(1, len(last.token_ids)), alone_seconds / max(1, len(alone_ids))
    verdict = "" if without > with_draft else "; proposing does not pay for this target on this device"
    change = f"{1000 * without:.1f} -> {1000 * with_draft:.1f} ms a token"
    say(f"speed-up against the target alone: {without / with_draft:.2f}x ({change}){verdict}")
    if writer.sampling.temperature == 0:
        same, near = (
            "same text as the target alone",
            "text differs from the target's alone: near-ties in this precision",
        )
        say(same if alone_ids == last.token_ids else near)
