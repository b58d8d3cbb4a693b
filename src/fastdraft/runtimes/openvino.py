"""OpenVINO: devices, loading, and the engine by which a target writes text.

Only the files named openvino* import openvino, openvino_genai, nncf or optimum; all import this one first, so
that none reports usage.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastdraft.data.filters import is_looping
from fastdraft.errors import FastDraftError, MissingExtra, RecipeError, TargetError
from fastdraft.functional.generation import Generation, Sampling, check_prompts
from fastdraft.modeling.vocabulary import Vocabulary

# fast: the device's own choice, on a CPU with an 8-bit KV cache; exact: float32 throughout, to compare token
# by token.
Precision = Literal["fast", "exact"]
MODEL_FILE = "openvino_model.xml"
# With its dependencies optimum-intel brings torchvision.
INSTALL_CONVERTER = "pip install --no-deps optimum-intel optimum; pip install requests"
_EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
_GIVE_UP_EVERY = 16


def silence_telemetry() -> None:
    """Keeps OpenVINO, its converter and nncf from sending usage data from this process.

    `openvino_telemetry` sends 59 events to Google Analytics for one export, and no environment variable stops
    all of them; but all three do without the package where it cannot be imported. The user's consent is
    neither read nor written.
    """
    name = "openvino_telemetry"
    sender = sys.modules.get(f"{name}.utils.sender")
    if sender is not None:  # imported before: only its sender can be replaced
        sender.TelemetrySender.send = lambda *_: None
    else:
        sys.modules[name] = None  # type: ignore[assignment]


silence_telemetry()


def output_matrix(model: Any) -> Any:
    """The product of an IR that gives its logits; RuntimeError where there is none."""
    place = (
        model.output("logits").get_node().input(0)
    )  # behind it there may be a scale, a cap, a choice of ids
    while (node := place.get_source_output().get_node()).get_type_name() != "MatMul":
        inputs = [each for each in node.inputs() if each.get_source_output().get_node().inputs()]
        if not inputs:
            raise RuntimeError("no output matrix")
        place = inputs[0]
    return node


def require_openvino() -> None:
    """Looks whether everything that converting and running needs is installed, without importing it."""
    for module in ("openvino_genai", "openvino_tokenizers", "nncf"):
        if find_spec(module) is None:
            raise MissingExtra(module.replace("_", "-"), "openvino")
    if find_spec("optimum") is None or find_spec("optimum.intel") is None:
        raise MissingExtra("optimum-intel", "openvino", INSTALL_CONVERTER)


def import_genai() -> Any:
    """openvino_genai; MissingExtra where it is not installed."""
    try:
        import openvino_genai
    except ImportError:
        raise MissingExtra("openvino-genai", "openvino") from None
    return openvino_genai


@functools.cache
def core() -> Any:
    """The one `openvino.Core` of this process: each loads a CPU plugin of its own."""
    import_genai()
    import openvino

    return openvino.Core()


class _SignalStack(ctypes.Structure):  # `stack_t` of sigaltstack(2)
    _fields_ = [("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t)]


@contextlib.contextmanager
def keeping_signal_stack() -> Iterator[None]:
    """Around whatever loads a plugin, so that Ctrl-C goes on working."""
    # OpenVINO's CPU plugin sets a signal stack and, when it goes, puts back the one that it had found. Two
    # that do not go in reverse order leave one that is gone: the next signal is a segmentation fault (release
    # 2026.4.1, Linux).
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


def device_properties(device: str, precision: Precision, threads: int = 0) -> dict[str, Any]:
    """What OpenVINO is told about a device (CPU, GPU, GPU.1) that is here; threads 0: its own choice."""
    import_genai()
    with keeping_signal_stack():
        seen = core().available_devices
    if device.partition(".")[0] not in {name.partition(".")[0] for name in seen}:
        raise RecipeError(f"device {device}: OpenVINO sees {', '.join(seen)} here", "name one of them")
    exact = precision == "exact"
    if device.startswith("CPU"):
        return (_EXACT if exact else {}) | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    if exact:
        raise RecipeError(f"device {device}: exact (float32) runs need the CPU", "use CPU, or precision fast")
    return {}


def describe_device(device: str, precision: Precision = "fast") -> dict[str, str]:
    """`version` of OpenVINO and `device_name`, as "AMD EPYC" or "Intel(R) Arc(TM) Graphics"."""
    device_properties(device, precision)
    with keeping_signal_stack():
        name = str(core().get_property(device, "FULL_DEVICE_NAME")).strip()
    return {"version": metadata.version("openvino"), "device_name": name}


@contextlib.contextmanager
def openvino_errors(where: object, rule: str, fix: str) -> Iterator[None]:
    """A failure inside OpenVINO as one line; the signal stack is kept too."""
    try:
        with keeping_signal_stack():
            yield
    except RuntimeError as error:
        raise FastDraftError(f"{where}: {rule}: {short(error)}", fix) from error


def short(error: Exception) -> str:
    """The message of an OpenVINO error without its source positions, in one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return (told[-1] if told else str(error))[:200]


def check_exported(folder: Path) -> None:
    """TargetError where the folder holds no exported model."""
    if not (folder / MODEL_FILE).is_file():
        fix = "run fastdraft export with --format openvino"
        raise TargetError(f"{folder}: no {MODEL_FILE}; must be a model exported for OpenVINO", fix)


def load_pipeline(
    folder: Path, device: str, properties: Mapping[str, Any], rows: int, whole_prompts: bool = False
) -> Any:
    """A ContinuousBatchingPipeline over an export that writes at most `rows` answers at a time.

    By OpenVINO's own choice one pass reads at most 256 tokens; with `whole_prompts` no prompt is cut into
    pieces.
    """
    check_exported(folder)
    genai = import_genai()
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = rows
    if whole_prompts:
        scheduler.max_num_batched_tokens = 2**31 - 1
    with openvino_errors(folder, f"OpenVINO could not load it on {device}", "export the model again"):
        return genai.ContinuousBatchingPipeline(str(folder), scheduler, device, dict(properties))


def as_tensor(ids: Sequence[int]) -> Any:
    """One prompt as OpenVINO takes it: int64 [1, T]."""
    import openvino

    return openvino.Tensor(np.asarray([ids], dtype=np.int64))


def generation_config(sampling: Sampling, max_new_tokens: int, eos_ids: Sequence[int], seed: int) -> Any:
    """OpenVINO's settings for one answer, leaving nothing to what a model's own generation config says."""
    config = import_genai().GenerationConfig()
    # `logprobs` stays 0: log-probs are then of the distribution that a token was drawn from; with 1, of the
    # raw logits.
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
    """The seed of one answer among those asked together, so that equal prompts get different answers."""
    return random.Random(f"{seed}/{index}").getrandbits(31)


class OpenVINOEngine:
    """The `Engine` over OpenVINO GenAI's continuous batching, in this process.

    Log-probs are OpenVINO's own: of the distribution that each token was drawn from, at the weights and
    precision that run.
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
        self.vocabulary, self.context_length = vocabulary, context_length
        self.on_batch, self.end_loops = on_batch, end_loops
        properties = device_properties(device, precision, threads)
        self.pipeline = load_pipeline(folder, device, properties, batch_rows)

    def with_ends(self, eos_ids: Sequence[int]) -> OpenVINOEngine:
        """The same loaded model, whose answers end at these ids or in a loop."""
        twin = copy.copy(self)
        twin.vocabulary = replace(self.vocabulary, eos_token_ids=tuple(eos_ids))
        twin.on_batch, twin.end_loops = None, True
        return twin

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        """One answer for each prompt, in order; reproducible for equal prompts, order, seed and threads."""
        check_prompts(prompts, max_new_tokens, self.context_length)
        eos_ids, pipeline = self.vocabulary.eos_token_ids, self.pipeline
        answers = []
        for index, prompt in enumerate(prompts):
            config = generation_config(sampling, max_new_tokens, eos_ids, answer_seed(seed, index))
            answers.append(_Answer(pipeline.add_request(index, as_tensor(prompt), config)))
        for step in itertools.count(1):
            if not pipeline.has_non_finished_requests():
                break
            pipeline.step()
            if self.end_loops and step % _GIVE_UP_EVERY == 0:
                for answer in answers:
                    answer.give_up_if_looping()
        if self.on_batch:
            self.on_batch(len(prompts))
        written = []
        for prompt, answer in zip(prompts, answers, strict=True):
            answer.read()
            ids = answer.ids
            logprobs = answer.logprobs if sampling.temperature else [0.0] * len(ids)
            stopped = bool(ids) and ids[-1] in eos_ids and not answer.given_up
            written.append(Generation(list(prompt), ids, logprobs, "stop" if stopped else "length"))
        return written


class _Answer:
    """One request: what was read of it, and whether it was given up."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.given_up, self.looked_at = handle, False, 0
        self.ids: list[int] = []
        self.logprobs: list[float] = []

    def read(self) -> None:
        while not self.given_up and self.handle.can_read():
            for output in self.handle.read().values():
                self.ids += output.generated_ids
                self.logprobs += output.generated_log_probs

    def give_up_if_looping(self) -> None:
        self.read()
        # Judged at the same lengths whichever step this is, so that the answer does not depend on the batch.
        for length in range(self.looked_at + _GIVE_UP_EVERY, len(self.ids) + 1, _GIVE_UP_EVERY):
            self.looked_at = length
            if is_looping(self.ids[:length]):
                self.given_up = True
                self.ids, self.logprobs = self.ids[:length], self.logprobs[:length]
                self.handle.cancel()
                return
