"""OpenVINO: loading exported models, and the target writing text through its continuous batching.

Decides how OpenVINO is asked for: on which device, with how many threads, and in which of two precisions (the device's
own fast one, or `exact`: everything in float32, for comparisons token by token); that token ids go in and come out, no
tokenizer of the runtime between; that every answer draws from a random number generator of its own, so that it does
not depend on which other prompts were in the batch; and that none of these libraries reports usage from this process.

This file and the others named openvino_* are the only ones that import openvino, openvino_genai, nncf or optimum.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastdraft.data.filters import is_looping
from fastdraft.errors import FastDraftError, MissingExtra, RecipeError
from fastdraft.functional.generation import Generation, Sampling, check_prompts
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.runtimes.openvino_signals import keeping_signal_stack

Precision = Literal["fast", "exact"]
"""fast: the device's own choice, on a CPU with an 8-bit KV cache; exact: float32 throughout."""
MODEL_FILE = "openvino_model.xml"
GIVE_UP_EVERY = 16
"""Tokens between two looks at whether an answer is worth going on with."""
WHOLE_PROMPTS = 2**31 - 1
"""Tokens of one pass where no prompt may be cut into pieces."""
_EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


def silence_telemetry() -> None:
    """Keeps OpenVINO, its converter and nncf from sending usage data from this process.

    `openvino_telemetry` comes with them and, unless the user's file ~/intel/openvino_telemetry says no (or CI=true), sends
    events to Google Analytics when openvino is imported, a model converted or weights compressed: 59 for one export. All of them
    do without the package where it cannot be imported, so it is made unimportable here; the user's consent is neither read nor
    written. Where it was imported before, its sender is replaced. Environment variables are no way: openvino's part knows
    only CI, nncf's its own NNCF_CI. optimum-intel and transformers send nothing of their own while converting a directory.
    """
    name = "openvino_telemetry"
    sender = sys.modules.get(f"{name}.utils.sender")
    if sender is not None:
        sender.TelemetrySender.send = lambda *_: None
    else:
        sys.modules[name] = None  # type: ignore[assignment]


silence_telemetry()  # before anything of OpenVINO can be imported: every importer in this package imports this file first


def import_genai() -> Any:
    """The module openvino_genai.

    Raises:
        MissingExtra: when it is not installed.
    """
    try:
        import openvino_genai
    except ImportError:
        raise MissingExtra("openvino-genai", "openvino") from None
    return openvino_genai


@functools.cache
def core() -> Any:
    """The one `openvino.Core` of this process, which lives as long as it.

    Each Core loads a CPU plugin of its own; see openvino_signals.py for what that does to signals.

    Raises:
        MissingExtra: when OpenVINO is not installed.
    """
    import_genai()
    import openvino

    return openvino.Core()


def device_properties(device: str, precision: Precision, threads: int = 0) -> dict[str, Any]:
    """What OpenVINO is told about a device.

    Args:
        device: OpenVINO's name: CPU, GPU, GPU.1, NPU.
        precision: See `Precision`; `exact` exists on CPUs, where every part can run in float32.
        threads: CPU threads; 0 leaves OpenVINO's own choice.

    Raises:
        RecipeError: when OpenVINO does not see the device, or it cannot be exact.
    """
    import_genai()
    with keeping_signal_stack():
        seen = core().available_devices
    if device.partition(".")[0] not in {name.partition(".")[0] for name in seen}:
        raise RecipeError("device", device, f"OpenVINO sees {', '.join(seen)} here", "name one of them")
    if not device.startswith("CPU"):
        if precision == "exact":
            raise RecipeError(
                "device", device, "exact (float32) runs need the CPU", "use CPU, or the precision fast"
            )
        return {}
    return {
        **(_EXACT if precision == "exact" else {}),
        **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
    }


def load_pipeline(
    folder: Path, device: str, properties: Mapping[str, Any], rows: int = 256, tokens_per_pass: int = 0
) -> Any:
    """A ContinuousBatchingPipeline over an exported model.

    Args:
        folder: An export; see `openvino_export`.
        device: OpenVINO's name.
        properties: From `device_properties`, and `draft_model` where there is one.
        rows: Most answers written at a time.
        tokens_per_pass: Most tokens that one pass reads; longer prompts are cut. 0: OpenVINO's own choice, 256.

    Raises:
        FastDraftError: when OpenVINO cannot load the files.
    """
    genai = import_genai()
    check_exported(folder)
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = rows
    if tokens_per_pass:
        scheduler.max_num_batched_tokens = tokens_per_pass
    try:
        with keeping_signal_stack():
            return genai.ContinuousBatchingPipeline(str(folder), scheduler, device, dict(properties))
    except RuntimeError as error:
        raise FastDraftError(
            folder, short(error), f"OpenVINO must load it on {device}", "export the model again"
        ) from error


def check_exported(folder: Path) -> None:
    """Raises:
    FastDraftError: when a folder holds no exported model.
    """
    if not (folder / MODEL_FILE).is_file():
        remedy = "run fastdraft export with --format openvino"
        raise FastDraftError(folder, f"no {MODEL_FILE}", "must be a model exported for OpenVINO", remedy)


def short(error: Exception) -> str:
    """The message of an OpenVINO error without its source positions, in one line."""
    lines = [
        line.strip()
        for line in str(error).splitlines()
        if line.strip() and not line.lstrip().startswith(("Exception from", "Check '"))
    ]
    return (lines[-1] if lines else str(error))[:200]


def as_tensor(ids: Sequence[int]) -> Any:
    """One prompt as OpenVINO takes it: int64 [1, T]."""
    import openvino

    return openvino.Tensor(np.asarray([ids], dtype=np.int64))


def generation_config(sampling: Sampling, max_new_tokens: int, eos_ids: Sequence[int], seed: int) -> Any:
    """OpenVINO's settings for one answer, leaving nothing to what a model's own generation config says.

    `logprobs` stays 0: OpenVINO then records each token's log-prob under the distribution that it was drawn from (after
    temperature, top-k, top-p); with 1 it would record that of the raw logits.
    """
    config = import_genai().GenerationConfig()
    config.max_new_tokens = max_new_tokens
    config.stop_token_ids = set(eos_ids)
    if eos_ids:
        config.eos_token_id = eos_ids[0]
    config.do_sample = sampling.temperature > 0
    if config.do_sample:
        config.temperature, config.top_p = sampling.temperature, sampling.top_p
        config.top_k, config.rng_seed = sampling.top_k, seed
    return config


def answer_seed(seed: int, index: int) -> int:
    """The seed of one answer among those asked together: equal prompts get different answers."""
    return random.Random(f"{seed}/{index}").getrandbits(31)


class OpenVINOEngine:
    """The `Engine` protocol over OpenVINO GenAI's continuous batching, in this process.

    Log-probs are OpenVINO's own: of the distribution that each token was drawn from, at the weights and precision that
    run. Where the log-probs of another precision are wanted, `decoding.scoring` adds them.

    Args:
        folder: The exported target.
        vocabulary: Gives the ids that end an answer.
        context_length: Most positions that the target was made for.
        batch_rows: Prompts written together.
        on_batch: Called with the number of answers finished since the last call.
        device: OpenVINO's name.
        precision: fast or exact.
        threads: CPU threads; 0 leaves OpenVINO's own choice. Results are reproducible for equal threads.
        end_loops: Ends an answer that has run into a loop instead of writing it to its limit.

    Raises:
        MissingExtra: without openvino-genai. RecipeError: for a device that is not there.
        FastDraftError: when the files cannot be loaded.
    """

    name = "openvino"

    def __init__(
        self,
        folder: Path,
        vocabulary: Vocabulary,
        context_length: int,
        batch_rows: int = 64,
        on_batch: Callable[[int], None] | None = None,
        *,
        device: str = "CPU",
        precision: Precision = "fast",
        threads: int = 0,
        end_loops: bool = False,
    ) -> None:
        self.vocabulary, self.context_length, self.on_batch, self.end_loops = (
            vocabulary,
            context_length,
            on_batch,
            end_loops,
        )
        self.pipeline = load_pipeline(
            folder, device, device_properties(device, precision, threads), batch_rows
        )

    def with_ends(self, vocabulary: Vocabulary, *, end_loops: bool) -> OpenVINOEngine:
        """The same loaded model, whose answers end at other ids."""
        twin = object.__new__(OpenVINOEngine)
        twin.vocabulary, twin.context_length, twin.end_loops, twin.pipeline = (
            vocabulary,
            self.context_length,
            end_loops,
            self.pipeline,
        )
        twin.on_batch = None
        return twin

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        """One answer for each prompt, in order; reproducible for equal prompts, order, seed and threads.

        Raises:
            DataError: when a prompt is empty or leaves no room for `max_new_tokens` in the target's context.
        """
        check_prompts(prompts, max_new_tokens, self.context_length)
        eos_ids = self.vocabulary.eos_token_ids
        answers = []
        for index, prompt in enumerate(prompts):
            config = generation_config(sampling, max_new_tokens, eos_ids, answer_seed(seed, index))
            answers.append(
                _Answer(
                    self.pipeline.add_request(index, as_tensor(prompt), config), sampling.temperature == 0
                )
            )
        self._write(answers)
        if self.on_batch:
            self.on_batch(len(prompts))
        return [answer.generation(prompt, eos_ids) for answer, prompt in zip(answers, prompts, strict=True)]

    def _write(self, answers: list[_Answer]) -> None:
        give_up = is_looping if self.end_loops else None
        steps = 0
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            steps += 1
            if give_up and steps % GIVE_UP_EVERY == 0:
                for answer in answers:
                    answer.look(give_up)


class _Answer:
    """One request: what was read of it, and whether it was given up."""

    def __init__(self, handle: Any, greedy: bool) -> None:
        self.handle, self.greedy = handle, greedy
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.looked_at = 0
        self.given_up = False

    def read(self) -> None:
        """Takes over what OpenVINO wrote since the last time."""
        while self.handle.can_read():
            for output in self.handle.read().values():
                self.ids += output.generated_ids
                self.logprobs += output.generated_log_probs

    def look(self, give_up: Callable[[list[int]], bool]) -> None:
        """Ends the answer when it is not worth going on with; looked at after every 16 of its own tokens."""
        if self.given_up:
            return
        self.read()
        # Judged at the same lengths whichever step this is, so that the answer does not depend on the batch.
        for length in range(self.looked_at + GIVE_UP_EVERY, len(self.ids) + 1, GIVE_UP_EVERY):
            self.looked_at = length
            if give_up(self.ids[:length]):
                self.given_up = True
                self.ids, self.logprobs = self.ids[:length], self.logprobs[:length]
                self.handle.cancel()
                return

    def generation(self, prompt: Sequence[int], eos_ids: Sequence[int]) -> Generation:
        if not self.given_up:
            self.read()
        stopped = bool(self.ids) and self.ids[-1] in eos_ids
        logprobs = [0.0] * len(self.ids) if self.greedy else self.logprobs
        return Generation(
            list(prompt), self.ids, logprobs, "stop" if stopped and not self.given_up else "length"
        )
