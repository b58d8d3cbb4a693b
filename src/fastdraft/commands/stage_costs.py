"""What each stage of a recipe is expected to take: tokens, seconds, disk, memory, by order of magnitude."""

from __future__ import annotations

from typing import Any

import torch

from fastdraft import forecast
from fastdraft.evaluation.tasks import load_task
from fastdraft.modeling.architecture import Architecture
from fastdraft.recipe.evaluation import BenchmarkConfig, EvaluateConfig
from fastdraft.recipe.recipe import Recipe
from fastdraft.recipe.synthesize import SynthesizeConfig
from fastdraft.stages import align, design, evaluate
from fastdraft.stages.trained_start import MEASURED_TOKENS, bytes_of_weights
from fastdraft.target import Target
from fastdraft.training.step import default_micro_batch_tokens

# Passes over a task's text: written by the target, replayed by each checkpoint, part of it decoded exactly.
_WRITES = 3
# Of a benchmark, roughly: one export; weights read a second by one text; what a token costs besides.
_CONVERTING_SECONDS, _BYTES_PER_SECOND, _TOKEN_SECONDS = 15.0, 1e10, 5e-4
Cost = tuple[int, float, float, float]  # tokens, seconds, bytes on disk, bytes in memory


class StageCosts:
    """The costs of a recipe's stages, for one draft on one device: `costs.of("align")`."""

    def __init__(
        self, recipe: Recipe, plan: design.DraftDesign, device: str, has_weights: bool, *, gguf: bool = False
    ) -> None:
        self.recipe, self.draft, self.target, self.device = recipe, plan.draft, plan.target, device
        self.checkpoint, self.threads = forecast.checkpoint_bytes(plan.draft.parameters), recipe.run.threads
        wide = recipe.target.dtype == "fp32" or (recipe.target.dtype == "auto" and device == "cpu")
        self.target_bytes = (4.0 if wide else 2.0) * plan.target.parameters
        self.has_weights, self.gguf = has_weights, gguf
        self.trained = plan.trained.architecture if plan.trained else None

    def of(self, stage: str) -> Cost:
        """Tokens, seconds, bytes on disk and in memory."""
        config: Any = getattr(self.recipe, stage)
        if stage == "prepare":
            tokens = sum(corpus.tokens or 0 for corpus in config.corpora)
            disk = forecast.shard_bytes(tokens, self.draft.vocab_size)
            return tokens, forecast.tokenize_seconds(tokens, self.threads), disk, 0.0
        if stage in ("pretrain", "continue_pretrain", "align"):
            return self._training(stage, config)
        if stage == "synthesize":
            return self._synthesis(config)
        if stage == "evaluate":
            return self._evaluation(config)
        if stage == "benchmark":
            return self._benchmark(config)
        if stage == "design" and self.trained:
            scored = (MEASURED_TOKENS, self.trained.read_parameters, self.device, self.threads)
            memory = bytes_of_weights(self.trained) + self.checkpoint
            return MEASURED_TOKENS, forecast.scoring_seconds(*scored), self.checkpoint, memory
        converted = self.target_bytes if stage == "export" and self.has_weights else 0.0
        return (
            (0, 0.0, 0.0, 0.0)
            if stage == "report"
            else (0, 0.0, self.checkpoint, self.checkpoint + converted)
        )

    def _training(self, stage: str, config: Any) -> Cost:
        draft, prepare, written = self.draft, self.recipe.prepare, self.recipe.synthesize
        tokens = config.tokens or (round(written.tokens * align.DEFAULT_EPOCHS) if written else 0)
        seconds = forecast.training_seconds(tokens, draft.read_parameters, self.device, self.threads)
        disk = 2 * self.checkpoint + 2 * forecast.checkpoint_bytes(draft.parameters, resumable=True)
        usual = default_micro_batch_tokens(torch.device(self.device))
        micro_batch = max(prepare.row_length if prepare else 0, config.micro_batch_tokens or usual)
        shape = (
            draft.head_size or draft.vocab_size,
            draft.hidden_size,
            draft.intermediate_size,
            draft.num_layers,
        )
        memory = forecast.training_memory_bytes(draft.parameters, *shape, micro_batch)
        if stage == "align" and config.objective.kind == "token_kd" and config.objective.source == "target":
            seconds += self._scoring(tokens)
            memory += self.target_bytes
        return tokens, seconds, disk, memory

    def _scoring(self, tokens: int, shape: Architecture | None = None) -> float:
        read = (shape or self.target).read_parameters
        return forecast.scoring_seconds(tokens, read, self.device, self.threads)

    def _writing(self, tokens: int, shape: Architecture | None = None) -> float:
        written, read = self.recipe.synthesize, (shape or self.target).read_parameters
        fast = written is not None and written.engine.kind == "openvino"
        share = forecast.OPENVINO_SHARE if fast else forecast.WRITING_SHARE
        return forecast.writing_seconds(tokens, read, self.device, self.threads, share)

    def _synthesis(self, config: SynthesizeConfig) -> Cost:
        tokens, disk = config.tokens, forecast.synthetic_bytes(config.tokens)
        writer = Target.at(config.writer).architecture if config.writer else None
        # How fast a server is cannot be told.
        seconds = self._writing(tokens, writer) if config.asks and config.engine.kind != "openai" else 0.0
        if config.logits.kind == "top_k":
            seconds += self._scoring(tokens, writer)
            disk += tokens * (2 + 4 * config.logits.k)
        return tokens, seconds, disk, self.target_bytes if config.needs_weights else 0.0

    def _evaluation(self, config: EvaluateConfig) -> Cost:
        tokens = 0
        if config.texts.kind in (
            "auto",
            "target",
            "engine",
        ):  # how long other texts are shows when they are read
            for task in config.tasks:
                prompts = load_task(task).prompts
                turns = sum(len(p.conversation.users) if p.conversation else 1 for p in prompts)
                # The turns before are answered greedily once, for the prompts of the turns behind them.
                tokens += (turns * len(config.temperatures) + turns - len(prompts)) * task.max_new_tokens
        runs_target = evaluate.needs_weights(config, self.recipe.sections())
        seconds = _WRITES * self._writing(tokens) if runs_target else 0.0
        memory = self.checkpoint + (self.target_bytes if runs_target else 0)
        return tokens, seconds, forecast.synthetic_bytes(tokens), memory

    def _benchmark(self, config: BenchmarkConfig) -> Cost:
        """Every setting in turn, and once untimed."""
        tasks, sweep = config.tasks_of(self.recipe.sections()), config.sweep
        runtimes = config.runtimes_of(
            self.recipe.export.formats if self.recipe.export else (), gguf=self.gguf
        )
        pairs = len(config.weights) * (("openvino" in runtimes) + ("fastdraft" in runtimes))
        # Of llama.cpp one pair; lookup on the first pair alone, there also with the draft behind it; with our
        # own decoder that once, in turn with the target.
        each, looked_up = 1 + len(config.num_speculative_tokens), len(config.lookup)
        ways = ("openvino" in runtimes) + ("fastdraft" in runtimes) + 2 * ("llamacpp" in runtimes)
        settings = (pairs + ("llamacpp" in runtimes)) * each + ways * looked_up
        settings += 2 * ("fastdraft" in runtimes and looked_up > 0)
        written = settings * len(config.temperatures) * config.prompts * sum(t.max_new_tokens for t in tasks)
        usual, at_once = min(task.max_new_tokens for task in tasks), max([0, *sweep.concurrency])
        swept = config.prompts * (len(sweep.prompt_tokens) * usual + sum(sweep.max_new_tokens))
        swept += max(config.prompts, at_once) * len(sweep.concurrency) * usual
        tokens = (1 + config.repeats) * (written + 2 * swept * len(runtimes))
        seconds = tokens * (self.target.bytes_per_token(8) / _BYTES_PER_SECOND + _TOKEN_SECONDS)
        target, draft = self.target.parameters, self.draft.parameters
        disk, memory = 1.0 * pairs * (target + draft), max(2.0 * target + draft, 4.0 * target)
        return tokens, 2 * pairs * _CONVERTING_SECONDS + seconds, disk, memory
