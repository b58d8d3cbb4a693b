"""Where the target's texts come from, over which an evaluation replays drafts.

Decides the kinds: the target writes them here, the engine of synthesize writes them, held-out rows of synthesize, logs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastdraft.config import Config
from fastdraft.data.openai_format import LogprobKind
from fastdraft.data.transcript_lines import TranscriptLog


class TargetTexts(Config):
    """The target answers the tasks here, with its weights; only then are there exact runs and latencies."""

    kind: Literal["target"] = "target"
    """By transformers, in this process."""


class EngineTexts(Config):
    """`synthesize.engine` answers the tasks, so that a served target needs no weights here."""

    kind: Literal["engine"]
    """The engine that wrote the training rows."""


class HeldOutTexts(Config):
    """The held-out rows of synthesize; every source of prompts is a task, every temperature that it has counts."""

    kind: Literal["synthesize"]
    """Nothing is asked: the target's weights are not needed."""
    logprobs: Literal["own", "target"] = "own"
    """own: as they were written; target: those of target.model's weights, by a scoring pass."""


class LoggedTexts(TranscriptLog):
    """Logs of the target as a task; prompts that the draft was trained on are left out."""

    logprobs: LogprobKind | Literal["target"] = "none"  # type: ignore[assignment]
    """What the logged log-probs are of; target: take those of target.model's weights instead, by a scoring pass."""


TextsConfig = Annotated[TargetTexts | EngineTexts | HeldOutTexts | LoggedTexts, Field(discriminator="kind")]


def bare_kind(value: object) -> object:
    """`texts: synthesize` for `texts: {kind: synthesize}`."""
    return {"kind": value} if isinstance(value, str) else value
