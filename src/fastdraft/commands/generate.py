"""`fastdraft generate`: the pair at work, text streaming out with the draft's accepted tokens coloured.

Decides that stdout gets the text and nothing else (what was measured goes to stderr), that colours appear on a terminal
only unless asked for, that the speed-up is measured on the very prompt against the target alone, prompt reading included
in both, and that a conversation (`--chat` without a prompt, on a terminal) goes on until the input ends.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastdraft.console import Console
from fastdraft.errors import DataError, RecipeError
from fastdraft.functional.generation import Sampling
from fastdraft.recipe.run import TargetConfig
from fastdraft.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdraft.decoding.speculative import Round, SpeculativeDecoder

ACCEPTED, RESET = "\x1b[32m", "\x1b[0m"
"""Green: the draft's; the terminal's own colour: the target's."""


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
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    max_new_tokens: int
    seed: int
    color: bool
    console: Console

    def answer(self, prompt_ids: list[int]) -> _Answer:
        """Streams one answer to stdout."""
        from fastdraft.decoding.token_stream import TokenStream

        stream, rounds = TokenStream(self.tokenizer), []
        start = time.perf_counter()
        for found in self.decoder.rounds(prompt_ids, self.sampling, self.room(prompt_ids), self.seed):
            rounds.append(found)
            for place, token in enumerate(found.tokens):
                self._show(stream.feed(token), place < found.num_accepted)
            sys.stdout.flush()
        seconds = time.perf_counter() - start
        self._show(stream.finish(), False)
        sys.stdout.write("\n")
        sys.stdout.flush()
        return _Answer(prompt_ids, rounds, seconds)

    def room(self, prompt_ids: Sequence[int]) -> int:
        """New tokens that fit the context behind this prompt.

        Raises:
            DataError: when none fits.
        """
        room = self.decoder.context_length - len(prompt_ids)
        if room < 1:
            rule = f"the context holds {self.decoder.context_length}"
            raise DataError(
                "prompt", f"{len(prompt_ids)} tokens", rule, "shorten it, or begin a new conversation"
            )
        return min(room, self.max_new_tokens)

    def _show(self, text: str, accepted: bool) -> None:
        if text:
            sys.stdout.write(f"{ACCEPTED}{text}{RESET}" if accepted and self.color else text)

    def alone(self, prompt_ids: list[int]) -> tuple[list[int], float]:
        """What the target writes without the draft, and the seconds it takes."""
        import torch

        from fastdraft.decoding.autoregressive import generate_batch

        generator, eos = (
            torch.Generator().manual_seed(self.seed),
            frozenset(self.decoder.vocabulary.eos_token_ids),
        )
        start = time.perf_counter()
        found = generate_batch(
            self.decoder.target, [prompt_ids], self.sampling, self.room(prompt_ids), eos, generator
        )
        return found[0].response_ids, time.perf_counter() - start


def run(
    *,
    target: str | TargetConfig,
    draft: str,
    prompt: str | None,
    chat: bool,
    num_speculative_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    max_new_tokens: int,
    seed: int,
    device: str,
    color: bool | None,
    compare: bool,
    console: Console,
) -> None:
    """Writes one answer, or holds a conversation.

    Args:
        target: Directory, hub id, or a recipe's `target:` section.
        draft: Directory or hub id of a draft with the same vocabulary.
        prompt: Text to continue, or with `chat` the user's words; None reads stdin.
        chat: Puts the prompt into the target's chat template; without a prompt on a terminal, goes on turn by turn.
        num_speculative_tokens: K, proposals in each round.
        temperature: 0 is greedy.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        max_new_tokens: Length at which an answer is cut; less where the context ends.
        seed: Of sampling.
        device: auto, cpu, cuda, xpu or mps.
        color: None colours on a terminal only.
        compare: Also times the target alone, on the last prompt.
        console: Where figures go.

    Raises:
        RecipeError: for a setting out of range.
        DataError: when there is no prompt or it does not fit the context.
        TargetError: when the two do not share a vocabulary.
    """
    _check(temperature, top_k, top_p, max_new_tokens, seed)
    decoder, tokenizer = _open(target, draft, num_speculative_tokens, device)
    sampling = Sampling(temperature, top_k, top_p)
    writer = _Writer(decoder, tokenizer, sampling, max_new_tokens, seed, _colored(color), console)
    if chat and prompt is None and sys.stdin and sys.stdin.isatty():
        answers = _converse(writer)
    else:
        text = prompt if prompt is not None else _read_prompt(console)
        if not text.strip():
            raise DataError(
                "--prompt",
                "empty",
                "there must be a prompt",
                "give --prompt TEXT or pipe text into the command",
            )
        answers = [_first(writer, text, chat, compare)]
    _report(writer, answers, compare)


def _read_prompt(console: Console) -> str:
    """The whole of stdin without the line end that `echo` and the Enter key put behind it; nothing where it is closed.

    Raises:
        DataError: when it is not text.
    """
    if not sys.stdin:
        return ""
    if sys.stdin.isatty():
        console.say("write the prompt; end it with Ctrl-D on a line of its own (Windows: Ctrl-Z and Enter)")
    try:
        return sys.stdin.read().removesuffix("\n").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        found, rule = f"byte {error.start} is not {error.encoding}", "a piped prompt must be text"
        raise DataError("stdin", found, rule, "convert it to UTF-8, or give --prompt TEXT") from None


def _check(temperature: float, top_k: int, top_p: float, max_new_tokens: int, seed: int) -> None:
    rules = [
        ("--temperature", temperature, 0 <= temperature < math.inf, "must be 0 (greedy) or more"),
        ("--top-k", top_k, top_k >= 0, "must be 0 (all) or more"),
        ("--top-p", top_p, 0 < top_p <= 1, "must be above 0 and at most 1"),
        ("--max-new-tokens", max_new_tokens, max_new_tokens >= 1, "must be at least 1"),
        ("--seed", seed, 0 <= seed < 2**63, "must be a whole number that is not negative"),
    ]
    for where, value, fine, rule in rules:
        if not fine:
            raise RecipeError(where, value, rule, "change it on the command line")


def _colored(color: bool | None) -> bool:
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="replace")  # a terminal of another code page shows ? instead of failing
    wanted = sys.stdout.isatty() and "NO_COLOR" not in os.environ if color is None else color
    if wanted and os.name == "nt":
        os.system("")  # makes older Windows consoles obey colour codes
    return wanted


def _open(
    target: str | TargetConfig, draft: str, num_speculative_tokens: int, device: str
) -> tuple[SpeculativeDecoder, PreTrainedTokenizerBase]:
    """Loads the pair."""
    from fastdraft.decoding.speculative import SpeculativeDecoder
    from fastdraft.modeling.drafts import load_draft, pick_device
    from fastdraft.modeling.vocabulary import check_same

    opened = Target(target) if isinstance(target, TargetConfig) else Target.at(target)
    where = pick_device(device, "--device")
    vocabulary = opened.vocabulary
    check_same(vocabulary, Target.at(draft).vocabulary, where=draft)
    model = opened.model(where)
    decoder = SpeculativeDecoder(
        model, load_draft(Path(draft), where, model.dtype), vocabulary, num_speculative_tokens
    )
    return decoder, opened.tokenizer


def _first(writer: _Writer, text: str, chat: bool, warm_up: bool) -> _Answer:
    """The answer to one prompt; before a measurement both models are run once, or the first pass would be charged to one of them."""
    from fastdraft.data.chat import prompt_ids, render_prompt

    ids = (
        render_prompt(writer.tokenizer, [{"role": "user", "content": text}])
        if chat
        else prompt_ids(writer.tokenizer, text, False)
    )
    if warm_up:
        writer.decoder.generate(ids[: min(len(ids), 8)], writer.sampling, 2, writer.seed)
    return writer.answer(ids)


def _converse(writer: _Writer) -> list[_Answer]:
    """Turn by turn until the input ends (Ctrl-D, on Windows Ctrl-Z) or Ctrl-C."""
    from fastdraft.data.chat import render_prompt

    writer.console.say("end the conversation with Ctrl-D (Windows: Ctrl-Z and Enter)")
    messages: list[dict[str, str]] = []
    answers: list[_Answer] = []
    while True:
        try:
            text = input("> ").strip()
            if not text:
                continue
            messages.append({"role": "user", "content": text})
            answers.append(writer.answer(render_prompt(writer.tokenizer, messages)))
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return answers
        messages.append(
            {
                "role": "assistant",
                "content": str(writer.tokenizer.decode(answers[-1].token_ids, skip_special_tokens=True)),
            }
        )


def _report(writer: _Writer, answers: Sequence[_Answer], compare: bool) -> None:
    """Tokens per target pass of all answers; the measured speed-up on the last."""
    from fastdraft.functional.acceptance import add_counts

    if not answers:
        return
    counts, seconds = (
        add_counts(r.counts for answer in answers for r in answer.rounds),
        sum(answer.seconds for answer in answers),
    )
    say, rate = writer.console.say, counts.num_generated_tokens / max(seconds, 1e-9)
    passes = f"{counts.num_generated_tokens:.0f} tokens in {counts.num_drafts:.0f} target passes"
    say(f"{passes}: {counts.block_efficiency:.2f} tokens per pass, {rate:.0f} tokens/s")
    proposals = f"{counts.num_accepted_tokens:.0f} of {counts.num_draft_tokens:.0f} proposals"
    say(
        f"acceptance rate {counts.acceptance_rate:.3f} at K = {writer.decoder.num_speculative_tokens} ({proposals})"
    )
    if not compare:
        return
    last = answers[-1]
    alone_ids, alone_seconds = writer.alone(last.prompt_ids)
    with_draft, without = last.seconds / max(1, len(last.token_ids)), alone_seconds / max(1, len(alone_ids))
    verdict = "" if without > with_draft else "; a draft does not pay for this pair on this device"
    change = f"{1000 * without:.1f} -> {1000 * with_draft:.1f} ms a token"
    say(f"speed-up against the target alone: {without / with_draft:.2f}x ({change}){verdict}")
    if writer.sampling.temperature == 0:
        same = alone_ids == last.token_ids
        say(
            "same text as the target alone"
            if same
            else "text differs from the target's alone: near-ties in this precision"
        )
