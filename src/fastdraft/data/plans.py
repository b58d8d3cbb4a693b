"""From the sources of a recipe to units of work, one plan for each, and what a fingerprint says of a source.

Decides that a prompt of an evaluation task is refused wherever it comes from, that sources begin at different temperatures so
that few units hold all of them, and that a log's answers are planned as they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastdraft.data import prompts, transcript_lines
from fastdraft.data.prompts import normalised, refused_transcripts, select_texts
from fastdraft.data.transcripts import read_transcripts
from fastdraft.data.units import CorpusPrefixes, Plan, StandingPlan, UnitPlan
from fastdraft.recipe.data import CorpusPrompts, MagpiePrompts, PromptConfig, TextPrompts, TranscriptPrompts
from fastdraft.run_folder import StageFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdraft.modeling.vocabulary import Vocabulary

INSTRUCTION_TOKENS = 256
"""Longer instructions, of those that the target writes itself, are left out."""


def describe_sources(sources: Iterable[PromptConfig], held_out: set[str], seed: int) -> dict[str, Any]:
    """Each source by name for a fingerprint: its settings, the files that they point at, the evaluation prompts refused in it.

    Raises:
        DataError: when a file is missing or damaged.
    """
    found: dict[str, Any] = {}
    for source in sources:
        if isinstance(source, TextPrompts):
            found[source.name] = {
                **prompts.describe(source),
                "refused_for_evaluation": select_texts(source, held_out, seed).digest,
            }
        elif isinstance(source, TranscriptPrompts):
            found[source.name] = {
                **transcript_lines.describe(source),
                "refused_for_evaluation": refused_transcripts(source, held_out),
            }
        else:
            found[source.name] = source.model_dump(mode="json")
    return found


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Everything that turns sources into plans."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    """The target's."""
    held_out: set[str]
    """Normalised texts of every evaluation prompt."""
    temperatures: Sequence[float]
    samples: int
    """Answers for each prompt at each temperature above 0."""
    unit_rows: int
    seed: int
    prepared: Callable[[], StageFolder]
    """Gives the finished prepare stage; called for prefixes of a corpus only."""
    refused: dict[str, dict[str, int]] = field(default_factory=dict)
    """Filled while planning: prompts that are not asked, by source and reason."""
    notes: dict[str, str] = field(default_factory=dict)
    """Filled while planning: a word for the user about a source."""

    def plan(self, sources: Sequence[PromptConfig]) -> list[Plan]:
        """Each source's units, in the order of the recipe.

        Raises:
            DataError: when a source is missing, damaged, or nothing of it is left. FastDraftError: when a corpus is not prepared.
        """
        return [self._plan(source, place) for place, source in enumerate(sources)]

    def _plan(self, source: PromptConfig, place: int) -> Plan:
        if isinstance(source, TranscriptPrompts):
            return self._standing(source)
        if isinstance(source, TextPrompts):
            own = self._texts(source)
        else:
            own = self._corpus(source) if isinstance(source, CorpusPrompts) else self._magpie(source)
        start = place % len(self.temperatures)
        temperatures = [*self.temperatures[start:], *self.temperatures[:start]]
        common: dict[str, Any] = {"samples": self.samples, "unit_rows": self.unit_rows, "seed": self.seed}
        return UnitPlan(name=source.name, share=source.share, temperatures=temperatures, **common, **own)

    def _texts(self, source: TextPrompts) -> dict[str, Any]:
        from fastdraft.data.chat import Conversation, dialogue_format, has_chat_template, prompt_ids

        chosen = select_texts(source, self.held_out, self.seed)
        self.refused[source.name] = chosen.refused
        if any(isinstance(prompt, Conversation) for prompt in chosen.texts):
            talks = [p if isinstance(p, Conversation) else Conversation((p,)) for p in chosen.texts]
            form = dialogue_format(self.tokenizer, talks)
            if form.note:
                self.notes[source.name] = form.note
            encode = lambda index: form.prompt_ids(talks[index], ())  # noqa: E731
            return {
                "size": len(talks),
                "chat": form.template,
                "conversation": talks.__getitem__,
                "encode": encode,
            }
        texts, chat = [str(text) for text in chosen.texts], source.chat and has_chat_template(self.tokenizer)
        return {
            "size": len(texts),
            "chat": chat,
            "encode": lambda index: prompt_ids(self.tokenizer, texts[index], chat),
        }

    def _standing(self, source: TranscriptPrompts) -> StandingPlan:
        log = read_transcripts(
            source, self.tokenizer, self.vocabulary, self.seed, lambda text: normalised(text) in self.held_out
        )
        self.refused[source.name] = log.refused
        return StandingPlan(
            source.name, log.rows, share=source.share, unit_rows=self.unit_rows, seed=self.seed
        )

    def _corpus(self, source: CorpusPrompts) -> dict[str, Any]:
        from fastdraft.data.chat import plain_prefix_ids
        from fastdraft.data.shards import open_corpus

        prepare = self.prepared()
        rows, separator = open_corpus(prepare, source.corpus, "train"), prepare.manifest()["separator_id"]
        prefixes = CorpusPrefixes(
            rows, separator, source.prompt_tokens, before=plain_prefix_ids(self.tokenizer), seed=self.seed
        )
        return {"size": min(len(prefixes), source.count or len(prefixes)), "chat": False, "encode": prefixes}

    def _magpie(self, source: MagpiePrompts) -> dict[str, Any]:
        from fastdraft.data.chat import user_prefix_ids

        prefix = user_prefix_ids(self.tokenizer)
        return {
            "size": source.count,
            "encode": lambda index: list(prefix),
            "instruction_tokens": INSTRUCTION_TOKENS,
        }
