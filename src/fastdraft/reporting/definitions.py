"""The metrics in words, once, for the report and the model card.

Decides the wording; the definitions follow Leviathan et al. (arXiv 2211.17192) and FastDraft (arXiv 2411.11055).
"""

from __future__ import annotations

DEFINITIONS: tuple[tuple[str, str], ...] = (
    (
        "K",
        "Number of tokens that the draft proposes per round (num_speculative_tokens). Papers write gamma; Hugging Face "
        "and OpenVINO say num_assistant_tokens.",
    ),
    (
        "Round",
        "One propose-and-verify step: K draft passes, then one target pass. It emits the accepted proposals and one token of the target.",
    ),
    (
        "Acceptance rate (AR)",
        "Accepted / proposed tokens, counts added over all prompts. It falls as K grows, so it is only comparable at equal K.",
    ),
    (
        "Conditional acceptance rate",
        "Accepted / examined tokens: proposals behind a rejected one are not examined. This is alpha of Leviathan et al.",
    ),
    (
        "Overlap",
        "The sum over the vocabulary of the smaller of the two probabilities: the chance that one proposal is accepted when sampling.",
    ),
    (
        "Block efficiency",
        "Generated tokens / rounds: tokens per target pass. The first round drafts straight from the prompt, and EOS "
        "counts as a generated token.",
    ),
    (
        "Memory-bound speed-up (MBSU)",
        "Block efficiency / (K·c + 1), where c is the cost of one draft pass over one target pass. By parameters it is "
        "the same on every machine; by bytes it counts the "
        "weights read per token (an untied input embedding is not read); by latency it uses times measured where the evaluation ran.",
    ),
    (
        "Predicted wall clock",
        "Block efficiency / (K·d + v), from times measured where the evaluation ran: d is one draft pass and v one target pass over "
        "K + 1 tokens, both divided by one target pass over a single token.",
    ),
    (
        "Exact and replay",
        "Exact runs the lossless decoder. Replay passes text that the target wrote once through the draft and gives the "
        "expected counts for every K.",
    ),
    ("95 % interval", "Bootstrap over prompts, turns of a conversation drawn together."),
    (
        "PT, CP, FT",
        "The checkpoints after pre-training on text, after continued pre-training on code and text, and after "
        "fine-tuning on text that the target wrote.",
    ),
)
"""Name and definition, in reading order."""

BENCHMARK_DEFINITIONS: tuple[tuple[str, str], ...] = (
    (
        "Measured speed-up",
        "Seconds per token without the draft / with it: the same prompts, settings and device, whole answers with the first token "
        "included, runs in turn. Median over repeats; the range is over repeats, each without against with.",
    ),
    (
        "Behind the first token",
        "Decode speed-up: the same behind the first token. Reading the prompt, which a draft cannot shorten, is left out.",
    ),
    (
        "Quotient",
        "Measured / predicted wall clock, or measured / memory-bound speed-up by bytes: how much of the promise the clock keeps.",
    ),
    (
        "Time to first token",
        "From handing over the prompt to the first token: both models read the prompt. Median over answers.",
    ),
    ("Time per output token", "Seconds per token behind the first one. Median over answers."),
)
"""The same for what a benchmark measures."""
