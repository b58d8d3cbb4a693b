"""Memory of a training step: what the chunked loss holds, tensor by tensor; the 128,256 entries of Llama 3.1; the benchmark."""

from __future__ import annotations

import importlib.util
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdraft.functional.distillation import DenseTarget, chunked_distillation, token_loss
from fastdraft.functional.losses import chunked_cross_entropy
from fastdraft.modeling.architecture import draft_hf_config, read_architecture
from fastdraft.modeling.initialize import build_draft
from fastdraft.modeling.shapes import explicit
from fastdraft.recipe.base import load_config as read_section
from fastdraft.recipe.training import OptimizerConfig
from fastdraft.stages import design
from fastdraft.target import Target
from fastdraft.training import assemble
from fastdraft.training.batches import Batch
from fastdraft.training.objective import CrossEntropy

VOCAB, WIDTH, CHUNK = 4096, 8, 16
LLAMA_VOCAB = 128_256
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Held(TorchDispatchMode):
    """Counts the bytes of every storage that operations made and that still lives; exact, and the same every time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now, self.largest = self.now + size, max(self.largest, size)
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _plain(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(hidden @ head.t(), labels, reduction="sum")


def _chunked(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return chunked_cross_entropy(hidden, head, labels, chunk=CHUNK)[0]


def _distilled(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    target = DenseTarget(lambda rows: hidden.detach()[rows] @ head.detach().t())
    return chunked_distillation(hidden, head, labels, target, token_loss("jsd"), chunk=CHUNK)[0]


def _held(loss: Loss, tokens: int) -> Held:
    torch.manual_seed(0)
    hidden, head = (
        torch.randn(tokens, WIDTH, requires_grad=True),
        torch.randn(VOCAB, WIDTH, requires_grad=True),
    )
    labels = torch.randint(0, VOCAB, (tokens,))
    with Held() as held:
        loss(hidden, head, labels).backward()
    return held


@pytest.mark.parametrize("loss", [_chunked, _distilled])
def test_no_tensor_of_a_chunked_loss_holds_more_than_a_chunk_of_logits_or_the_heads_gradient(
    loss: Loss,
) -> None:
    assert _held(loss, 256).largest == 4 * VOCAB * max(CHUNK, WIDTH)
    assert _held(_plain, 256).largest == 4 * VOCAB * 256


@pytest.mark.parametrize("loss", [_chunked, _distilled])
def test_the_peak_of_a_chunked_loss_does_not_grow_with_tokens_times_vocabulary(loss: Loss) -> None:
    few, many = _held(loss, 64).peak, _held(loss, 256).peak
    assert 0 <= many - few <= 192 * (4 * WIDTH * 4 + 64)  # a few numbers for each token and its hidden state
    assert _held(_plain, 256).peak - _held(_plain, 64).peak > 192 * VOCAB * 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and tokenizer of a Llama 3.1 of 8 B, its 128,256 entries made up; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama-vocabulary")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"Ġword{i}" for i in range(128_000 - len(alphabet)))]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([f"<|special_{i}|>" for i in range(256)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|special_0|>", eos_token="<|special_9|>"
    ).save_pretrained(folder)
    LlamaConfig(
        vocab_size=LLAMA_VOCAB,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        bos_token_id=128_000,
        eos_token_id=[128_001, 128_008, 128_009],
    ).save_pretrained(folder)
    return folder


def test_the_150_m_preset_is_designed_for_a_vocabulary_of_128256_entries(llama: Path) -> None:
    config = read_section(
        design.DesignConfig, {"draft": {"kind": "preset", "name": "llama-3.1-8b-150m"}}, "design"
    )
    planned = design.plan(config, Target.at(llama))
    assert (planned.vocabulary.size, planned.vocabulary.missing_ids) == (LLAMA_VOCAB, ())
    assert planned.draft.parameters == 154_147_328
    assert planned.vocabulary.eos_token_ids == Target.at(llama).vocabulary.eos_token_ids


def test_a_draft_of_that_vocabulary_trains_and_never_holds_the_logits_of_all_tokens(llama: Path) -> None:
    from transformers import AutoConfig

    target = AutoConfig.from_pretrained(llama)
    shape = explicit(
        read_architecture(target),
        hidden_size=16,
        num_layers=1,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=1,
    )
    draft, device = build_draft(draft_hf_config(target, shape), 0), torch.device("cpu")
    settings = assemble.resolve(
        OptimizerConfig(learning_rate=0.01),
        "pretrain",
        draft,
        device,
        batch_tokens=512,
        micro_batch_tokens=512,
        precision="fp32",
    )
    step = assemble.build_step(draft, settings, CrossEntropy(chunk=64), device)
    ids = torch.randint(0, LLAMA_VOCAB, (2, 257), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1), None, 512)
    with Held() as held:
        loss, _, trained = step.gradients([batch])
    assert (round(loss, 1), trained) == (11.8, 512)
    assert held.largest == 64 * LLAMA_VOCAB * 4
    assert all(parameter.grad is not None for parameter in draft.parameters())


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "step_memory", Path(__file__).parents[1] / "benchmarks" / "step_memory.py"
    )
    assert spec
    assert spec.loader
    module = sys.modules["step_memory"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmarks_paths_compute_one_loss_and_say_what_they_held(benchmark: ModuleType) -> None:
    setting = {
        "device": "cpu",
        "threads": 1,
        "tokens": 256,
        "length": 64,
        "micro_batch_tokens": 128,
        "precision": "fp32",
        "model": "",
    }
    rows = {
        path: benchmark.measure({**setting, "path": path, "dry_run": True}) for path in ("plain", "chunked")
    }
    assert rows["plain"]["loss"] == pytest.approx(rows["chunked"]["loss"], abs=1e-5)
    assert (
        rows["chunked"]["weights_gb"]
        == rows["chunked"]["gradients_gb"]
        == 4 * rows["chunked"]["parameters"] / 1e9
    )
    assert rows["chunked"]["optimizer_gb"] == pytest.approx(2 * rows["chunked"]["weights_gb"], rel=1e-2)
    assert "| plain | 128 |" in benchmark.table(
        [{"micro_batch_tokens": 128, "path": path, **row} for path, row in rows.items()]
    )
