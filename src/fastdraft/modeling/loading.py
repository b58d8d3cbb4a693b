"""Models, tokenizers and vocabularies from a directory or the hub, and drafts to a directory.

Decides what may be loaded: safetensors only, fast tokenizers only, the families of `families.TARGET_FAMILIES`, no code from
the hub unless asked for; and that a tokenizer whose files have not changed is
loaded and described once in a process, since a large vocabulary takes seconds. Tokenizer files travel byte for byte: a tokenizer saved
again is not recognised by every runtime.
"""

from __future__ import annotations

import contextlib
import copyreg
import re
import shutil
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastdraft.errors import FastDraftError, RecipeError, TargetError
from fastdraft.machine import no_collection
from fastdraft.modeling.architecture import read_architecture
from fastdraft.modeling.counting import auto_class
from fastdraft.modeling.families import special_id, text_config
from fastdraft.modeling.head import split_head
from fastdraft.modeling.load_failures import explain, one_line, quiet
from fastdraft.modeling.source import (
    TOKENIZER_FILES,
    check_weights,
    copy_tokenizer_files,
    is_hub_id,
    raw_config,
)
from fastdraft.modeling.vocabulary import Description, Vocabulary, build_vocabulary, describe
from fastdraft.recipe.run import TargetConfig
from fastdraft.run_folder import atomic_folder, read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "copy_tokenizer_files",
    "load_config",
    "load_draft",
    "load_generation_config",
    "load_target",
    "load_tokenizer",
    "load_vocabulary",
    "pick_device",
    "quiet",
    "save_draft",
    "set_threads",
    "split_head",
    "vocabulary_of",
]

_HUGE_ID = re.compile(rb'(?<![0-9.\w"+-])[0-9]{8,}(?=\s*[,}\]])')
_PROBE = "A fox, \U0001f98a\x00."
"""Of words, and of characters that a small vocabulary must spell or call unknown."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device that a recipe names; `auto` is the accelerator that torch finds, else the CPU.

    Raises:
        RecipeError: when the device is unknown or not there.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(
            "run.device",
            name,
            "must be auto, cpu, cuda, xpu or mps, or one with an index",
            "correct the name",
        ) from None
    count = torch.accelerator.device_count() if found and found.type == device.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        has = f"{count} {device.type} device(s)" if count else str(found or "no accelerator")
        raise RecipeError("run.device", name, f"this machine's torch sees {has}", "use run.device=auto")
    return device


def set_threads(count: int) -> None:
    """CPU threads for torch; 0 leaves torch's own choice."""
    if count:
        torch.set_num_threads(count)


def load_config(
    location: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of a model in a supported family; nothing else is read or downloaded.

    Args:
        location: A directory or a hub id.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Changes nothing: transformers implements every supported family itself, and a model's own copy
            of that code is never run, so that target and draft share one implementation.

    Raises:
        TargetError: missing, unreadable, unreachable, in need of remote code, or of another family.
    """
    from transformers import AutoConfig

    raw_config(location, revision)
    with one_line(location):
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=False)
    read_architecture(config, location)
    return config


def load_generation_config(location: str, revision: str | None = None) -> GenerationConfig | None:
    """The generation config beside a model, None when there is none; of one that transformers refuses the ids that end a text.

    Raises:
        TargetError: when it is no JSON object.
    """
    from transformers import GenerationConfig

    try:
        with quiet():
            return GenerationConfig.from_pretrained(location, revision=revision)
    except Exception as error:  # transformers looks into other keys too, and raises several kinds
        path = Path(location) / "generation_config.json"
        if not path.is_file():
            if isinstance(error, OSError | ValueError):
                return None
            raise explain(location, error) from error
    try:
        return GenerationConfig(eos_token_id=dict(read_json(path)).get("eos_token_id"))
    except (FastDraftError, TypeError, ValueError, AttributeError) as error:
        found = str(getattr(error, "found", "not an object"))
        raise TargetError(
            path, found, "must be a JSON object", "fetch the model again, or delete this file"
        ) from error


def load_tokenizer(
    location: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; a fast one, because only these can be compared and copied.

    Everyone who asks for the same files is given the same object: do not change it.

    Raises:
        TargetError: when it is missing, damaged or has no fast form.
    """
    return _loaded(location, revision, trust_remote_code).tokenizer


def load_encoding(target: TargetConfig) -> tuple[PreTrainedTokenizerBase, Vocabulary]:
    """A target's tokenizer and what the draft must share with the target, from config, generation config and tokenizer.

    Raises:
        TargetError: when one of them cannot be loaded.
        TargetError: when the tokenizer has ids that the model has no row for.
    """
    config = load_config(target.location, target.revision, target.trust_remote_code)
    loaded = _loaded(target.location, target.revision, target.trust_remote_code)
    generation_config = load_generation_config(target.location, target.revision)
    return loaded.tokenizer, _vocabulary(
        loaded.tokenizer, loaded.description, config, generation_config, target.location
    )


def load_vocabulary(target: TargetConfig) -> Vocabulary:
    """What the draft must share with this target; raises what `load_encoding` does."""
    return load_encoding(target)[1]


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None = None,
    where: str = "tokenizer",
) -> Vocabulary:
    """The vocabulary of loaded parts.

    A text ends at the tokenizer's EOS or at any EOS of the generation config (without one, of the config).
    """
    return _vocabulary(
        tokenizer, describe(tokenizer.backend_tokenizer.to_str()), config, generation_config, where
    )


def _vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    description: Description,
    config: PreTrainedConfig,
    generation: GenerationConfig | None,
    where: str,
) -> Vocabulary:
    listed = getattr(generation, "eos_token_id", None)
    eos = [
        tokenizer.eos_token_id,
        *_ids(listed if listed is not None else special_id(config, "eos_token_id"), where, "eos_token_id"),
    ]
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = next(iter(_ids(special_id(config, "pad_token_id"), where, "pad_token_id")), None)
    ends = [token_id for token_id in eos if token_id is not None]
    return build_vocabulary(
        int(text_config(config).vocab_size),
        description,
        bos=tokenizer.bos_token_id,
        eos=ends,
        pad=pad,
        where=where,
    )


class _Loaded:
    """A tokenizer, described when that is first asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def description(self) -> Description:
        return describe(self.tokenizer.backend_tokenizer.to_str())


def _loaded(location: str, revision: str | None, trust_remote_code: bool) -> _Loaded:
    is_hub_id(location)  # refuses what is neither a directory nor a model on the hub
    folder = Path(location)
    if (
        folder.is_dir()
        and not (folder / "tokenizer.json").is_file()
        and not (folder / "tokenizer.model").is_file()
    ):
        raise TargetError(
            location,
            "no tokenizer.json",
            "a fast tokenizer is required",
            "copy the model's tokenizer files here",
        )
    _refuse_huge_ids(folder / "tokenizer.json")
    return _load_once(location, revision, trust_remote_code, _file_states(folder))


def _refuse_huge_ids(path: Path) -> None:
    """One wrong digit in an id, and the library would list every id that is missing up to there: gigabytes."""
    found = _HUGE_ID.search(path.read_bytes()) if path.is_file() else None
    if found:
        rule = "ids must be those of a vocabulary"
        raise TargetError(path, f"the number {found[0].decode():.40}", rule, "fetch the model again")


def _file_states(folder: Path) -> tuple[tuple[object, ...], ...]:
    """What tells whether a tokenizer's files were changed or replaced; empty for a model on the hub."""
    found = [
        (path, path.stat())
        for name in (*TOKENIZER_FILES, "config.json")
        for path in sorted(folder.glob(name))
    ]
    return tuple((str(path), state.st_size, state.st_mtime_ns, state.st_ino) for path, state in found)


@lru_cache(maxsize=2)  # the target's and the draft's
def _load_once(
    location: str, revision: str | None, trust_remote_code: bool, files: tuple[tuple[object, ...], ...]
) -> _Loaded:
    """`files` is there to tell one state of a directory from the next."""
    from transformers import AutoTokenizer

    with one_line(location), quiet(), no_collection(), _no_copies():
        tokenizer = AutoTokenizer.from_pretrained(
            location, revision=revision, trust_remote_code=trust_remote_code
        )
    if not getattr(tokenizer, "is_fast", False):
        found = f"{type(tokenizer).__name__} is a slow tokenizer"
        raise TargetError(
            location, found, "a fast tokenizer is required", "convert it to tokenizer.json first"
        )
    longest = getattr(tokenizer, "model_max_length", None)
    if isinstance(longest, bool) or not isinstance(longest, int | float):  # compared with every text's length
        found = f"model_max_length {longest!r:.40}"
        raise TargetError(
            f"{location}/tokenizer_config.json", found, "must be a number", "fetch the model again"
        )
    with one_line(location):  # a damaged one may load and fail at a text
        tokenizer.decode(tokenizer(_PROBE, verbose=False).input_ids)
    return _Loaded(tokenizer)


@contextlib.contextmanager
def _no_copies() -> Iterator[None]:
    """Lets transformers keep the tokenizer that it has just read from a file, in place of a copy: a third of its time."""
    from tokenizers import Tokenizer

    before = copyreg.dispatch_table.get(Tokenizer)
    copyreg.pickle(
        Tokenizer, lambda tokenizer: "itself"
    )  # of a string, copy.deepcopy makes the object itself
    try:
        yield
    finally:
        if before is None:
            copyreg.dispatch_table.pop(Tokenizer, None)
        else:
            copyreg.dispatch_table[Tokenizer] = before


def _ids(value: Any, where: str, name: str) -> list[int]:
    ids = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if any(type(item) is not int for item in ids):
        raise TargetError(
            where, f"{name} {value!r:.40}", "must be a token id, or a list of them", "fetch the model again"
        )
    return ids


def load_target(target: TargetConfig, device: torch.device | str) -> PreTrainedModel:
    """The target, ready to write: eval mode, on `device`, in the recipe's precision.

    `dtype: auto` is the model's own on an accelerator and fp32 on a CPU, where half precision is slow on most machines
    and makes greedy text inexact.

    Raises:
        TargetError: one line for a missing directory, config or weights, pickled weights, remote code, another family,
            damaged files, or a hub that cannot be reached.
    """
    device = torch.device(device)
    auto: torch.dtype | str = torch.float32 if device.type == "cpu" else "auto"
    dtype = _DTYPES.get(target.dtype, auto)
    check_weights(target.location)
    with one_line(target.location):
        model = _from_pretrained(target.location, dtype, revision=target.revision, trust_remote_code=False)
        return model.to(device).eval()


def load_draft(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A draft or checkpoint that FastDraft wrote: eval mode, on `device`.

    Raises:
        FastDraftError: when a file is missing or damaged, or a weight is not finite.
    """
    try:
        check_weights(str(folder))
        with one_line(str(folder)):
            _refuse_whole_numbers(folder)
            return _own_memory(_from_pretrained(str(folder), dtype)).to(device).eval()
    except TargetError as error:
        raise FastDraftError(
            error.where, error.found, error.rule, "delete its stage's folder and run the stage again"
        ) from error


def _refuse_whole_numbers(folder: Path) -> None:
    """Weights that a damaged header calls integers would be taken for numbers all the same, and quietly be others."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                kind = file.get_slice(name).get_dtype()
                if not kind.startswith(("F", "BF")):
                    raise TargetError(
                        path,
                        f"{name} of kind {kind}",
                        "weights must be floating-point numbers",
                        "fetch the model again",
                    )


def _own_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Copies weights that are still views into the file (unaligned for the processor, and Windows would not let the file be replaced),
    and looks at each while it is at hand.

    Raises:
        TargetError: when one is not finite.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    broken = next(
        (name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())),
        None,
    )
    if broken:
        raise TargetError(
            model.name_or_path,
            f"{broken} holds NaN or infinity",
            "every weight must be finite",
            "fetch the model again",
        )
    return model


def _from_pretrained(location: str, dtype: torch.dtype | str, **options: Any) -> PreTrainedModel:
    """Loads strictly: a weight missing from the files is an error, never a random matrix.

    A model that caps its attention scores computes them step by step, because torch's fused attention leaves the cap out.
    """
    config = load_config(location, options.get("revision"))
    if getattr(text_config(config), "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"
    strict = {"use_safetensors": True, "output_loading_info": True}
    quantised = getattr(config, "quantization_config", None)
    with quiet():
        try:
            model, report = auto_class(config).from_pretrained(location, dtype=dtype, **strict, **options)
        except Exception as error:  # each quantiser has errors of its own, where its library is not there or is another version
            if quantised is None:
                raise
            raise _cannot_quantise(location, quantised, error) from error
    problems = [*report.get("missing_keys", ()), *report.get("mismatched_keys", ())]
    if problems:
        others = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise TargetError(
            location,
            f"no weights for {problems[0]}{others}",
            "every weight must be there",
            "fetch the model again",
        )
    return model


def _cannot_quantise(location: str, quantised: Any, error: Exception) -> TargetError:
    method = (
        quantised.get("quant_method")
        if isinstance(quantised, dict)
        else getattr(quantised, "quant_method", None)
    )
    found = f"weights quantised by {method or 'an unknown method'} ({' '.join(str(error).split())[:100]})"
    rule = "transformers must be able to load them here"
    return TargetError(
        location, found, rule, "install the library of that method, or name the model that was quantised"
    )


def save_draft(model: PreTrainedModel, folder: Path, tokenizer_files_from: Path) -> None:
    """Writes a complete Hugging Face directory that stands whole or not at all.

    Args:
        model: Its weights are stored in the dtype they have.
        folder: Replaced when it exists.
        tokenizer_files_from: A directory whose tokenizer files are copied byte for byte.

    Raises:
        FastDraftError: when the disk is full or not writable.
    """
    with atomic_folder(folder) as temporary:
        with quiet():
            model.save_pretrained(temporary)
        for weights in temporary.glob(
            "*.safetensors"
        ):  # safetensors writes for the owner only; a server may be another user
            shutil.copymode(temporary / "config.json", weights)
        copy_tokenizer_files(tokenizer_files_from, temporary)
