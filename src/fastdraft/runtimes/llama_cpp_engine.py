"""The target as a GGUF file: `LlamaCppEngine` writes text with llama.cpp's server, many answers at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from fastdraft.errors import RecipeError, TargetError
from fastdraft.functional.generation import Generation, Sampling, check_prompts
from fastdraft.modeling.gguf_files import GGUFFile, read_gguf
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.recipe.run import resolve_path
from fastdraft.recipe.synthesize import LlamaCppEngineConfig
from fastdraft.runtimes.llama_cpp_process import ServerSettings, room_for
from fastdraft.runtimes.llama_cpp_server import LlamaServer
from fastdraft.runtimes.openvino import answer_seed
from fastdraft.target import Target


def gguf_of(settings: LlamaCppEngineConfig) -> GGUFFile:
    """The head of the file that the recipe names."""
    path = resolve_path(settings.model, "synthesize.engine.model")
    if not path.is_file():
        rule = "must be the target's GGUF file"
        raise RecipeError(f"synthesize.engine.model: {settings.model}: {rule}", "correct the path")
    return read_gguf(path)


def check_vocabulary(file: GGUFFile, target: Target) -> None:
    """Refuses the file of another model: its ids would be read as other tokens."""
    tokens, tokenizer = file.value("tokenizer.ggml.tokens", []), target.tokenizer
    added, size = set(tokenizer.get_added_vocab().values()), target.vocabulary.size
    fix = "name the GGUF file of target.model"
    if abs(len(tokens) - size) > len(target.vocabulary.missing_ids):
        raise TargetError(f"{file.path}: {len(tokens)} tokens, target.model has {size}; must be equal", fix)
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(range(min(len(tokens), size)))):
        if token is not None and index not in added and token != tokens[index]:
            found = f"token {index} is {tokens[index]!r:.40}, of target.model {token!r:.40}"
            raise TargetError(f"{file.path}: {found}; must be equal", fix)


class LlamaCppEngine:
    """The `Engine` over llama.cpp's continuous batching.

    The server starts with the first prompts and again where longer ones come, so that the cache takes no more
    memory than the texts need. Texts are as reproducible as its batches: which answers share a pass depends
    on their times, and rounds differently.
    """

    name = "llamacpp"

    def __init__(
        self,
        model: Path,
        vocabulary: Vocabulary,
        context_length: int,
        settings: LlamaCppEngineConfig,
        *,
        threads: int = 0,
        on_answer: Callable[[int], None] = lambda answers: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.model_path, self.vocabulary, self.context_length = model, vocabulary, context_length
        self.settings, self.threads = settings, threads
        self.on_answer, self.check = on_answer, check
        self._running: list[LlamaServer] = []  # one at most, shared with twins

    def with_ends(self, eos_ids: Sequence[int]) -> LlamaCppEngine:
        """The same server, whose answers are cut at these ids."""
        twin = copy.copy(self)
        twin.vocabulary = replace(self.vocabulary, eos_token_ids=tuple(eos_ids))
        twin.on_answer = lambda answers: None
        return twin

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        """One answer for each prompt, in order; each with a seed of its own."""
        check_prompts(prompts, max_new_tokens, self.context_length)
        if not prompts:
            return []
        server = self._server(max(map(len, prompts)) + max_new_tokens + 1)
        with ThreadPoolExecutor(self.settings.slots) as pool:
            asked = [
                pool.submit(self._answer, server, prompt, sampling, max_new_tokens, answer_seed(seed, index))
                for index, prompt in enumerate(prompts)
            ]
            left = set(asked)
            try:
                while left:
                    done, left = wait(left, 0.2, FIRST_COMPLETED)
                    self.check()
                    for each in done:
                        each.result()
                        self.on_answer(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._running.remove(server)
                server.close()  # what is under way ends at once
                raise
        return [each.result() for each in asked]

    def _answer(
        self, server: LlamaServer, prompt: Sequence[int], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> Generation:
        warm, eos_ids = sampling.temperature > 0, self.vocabulary.eos_token_ids
        told = self.settings.logprobs == "engine" and warm
        answer = server.complete(prompt, sampling, max_new_tokens, seed, logprobs=told)
        ids = answer.ids
        # The file ends a text at its own ids; at others of ours it goes on.
        ids = ids[: next((place + 1 for place, token in enumerate(ids) if token in eos_ids), len(ids))]
        if ids[-1] not in eos_ids and len(ids) < max_new_tokens:
            return Generation.failed(list(prompt), "ended_by_other_id")
        logprobs = answer.logprobs[: len(ids)] if warm else [0.0] * len(ids)
        return Generation(list(prompt), ids, logprobs, "stop" if ids[-1] in eos_ids else "length")

    def _server(self, room: int) -> LlamaServer:
        """The running server, or another one where texts are longer than it has room for."""
        if self._running and self._running[0].settings.room >= room:
            return self._running[0]
        while self._running:
            self._running.pop().close()
        slots, program = self.settings.slots, self.settings.server
        settings = ServerSettings(
            str(self.model_path), room=room_for(room), slots=slots, threads=self.threads, program=program
        )
        self._running.append(LlamaServer(settings))
        return self._running[0]
