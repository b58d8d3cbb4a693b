"""A model that is only read: config, tokenizer, vocabulary, architecture, weights, identity.

`Target(recipe.target)` for the target of a recipe, made once per run; `Target.at(folder)` for any other
model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoHfQuantizer

from fastdraft.errors import TargetError
from fastdraft.modeling.architecture import Architecture, auto_class, read_architecture
from fastdraft.modeling.checkpoint import check_header, refuse_misfits, refuse_second_head
from fastdraft.modeling.families import check_config, plain_values, special_id, text_config
from fastdraft.modeling.gguf_target import GGUFModelFiles, as_directory, open_gguf
from fastdraft.modeling.model_files import ModelFiles, one_line, quiet
from fastdraft.modeling.tokenizer import load_tokenizer
from fastdraft.modeling.trimmed_head import read_head_ids
from fastdraft.modeling.vocabulary import Vocabulary, describe
from fastdraft.recipe.run import TargetConfig
from fastdraft.run_folder import file_sha256

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_IDENTITY_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
]
_HASHED_BYTES = 1 << 20


class Target:
    """The one door to a model's facts, each read once, when asked for; do not change what it gives."""

    def __init__(self, settings: TargetConfig) -> None:
        self._settings = settings
        self.name, self.location, self.revision = settings.model, settings.location, settings.revision
        self.dtype, self.chat_template_kwargs = settings.dtype, settings.chat_template_kwargs
        self.gguf = open_gguf(settings.location, settings.revision)
        if self.gguf:
            self.location = str(as_directory(self.gguf))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads it anew."""
        return Target, (self._settings,)

    @classmethod
    def at(cls, folder: Path | str, revision: str | None = None) -> Target:
        """A draft's or any other model's directory, or a hub id."""
        return cls(TargetConfig(model=str(folder), revision=revision))

    @cached_property
    def files(self) -> ModelFiles:
        if self.gguf:
            return GGUFModelFiles(self.gguf, self.location)
        return ModelFiles(self.location, self.revision)

    @property
    def gguf_file(self) -> Path | None:
        """The GGUF file that this model is (of several parts the first); None for other models."""
        return self.gguf.path if self.gguf else None

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config of a supported family. A model's own code is never run."""
        values = plain_values(self.files.config)  # refuses other families in words of our own
        with one_line(self.files.where):
            config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
            check_config(config, self.files.where)
        return config

    @cached_property
    def generation_config(self) -> GenerationConfig | None:
        """None when there is none; of one that transformers refuses, the ids that end a text."""
        path = self.files.find("generation_config.json")
        if path is None:
            return None
        try:
            value = plain_values(json.loads(path.read_text(encoding="utf-8")))
            try:
                return GenerationConfig.from_dict(value)
            except Exception:  # it looks into sampling settings too, which nobody uses here
                return GenerationConfig(eos_token_id=value.get("eos_token_id"))
        except (ValueError, AttributeError, TypeError) as error:
            fix = "fetch the model again, or delete this file"
            raise TargetError(f"{path}: {error}; must be a JSON object", fix) from error

    @cached_property
    def _tokenizer(self) -> tuple[PreTrainedTokenizerBase, list[str]]:
        return load_tokenizer(self.files, int(text_config(self.config).vocab_size))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A fast tokenizer, because only these can be compared and copied; its rules are tokenizer.json's."""
        return self._tokenizer[0]

    @property
    def tokenizer_notes(self) -> list[str]:
        """What was changed or chosen in reading the tokenizer, each a sentence."""
        return self._tokenizer[1]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What a draft must share. Any EOS of tokenizer and generation config (else config) ends a text."""
        config, tokenizer = self.config, self.tokenizer
        listed = getattr(self.generation_config, "eos_token_id", None)
        listed = special_id(config, "eos_token_id") if listed is None else listed
        size = int(text_config(config).vocab_size)
        ids, ordinary, special = describe(tokenizer.backend_tokenizer.to_str())
        largest = max(ids - set(tokenizer.added_tokens_decoder), default=-1)
        if largest >= size:  # of the ordinary tokens; added ones without a row are a trap
            found = f"the tokenizer has id {largest}, the config's vocab_size is {size}"
            raise self.files.wrong(found, "take config and tokenizer from the same model")
        ends = self._ids("eos_token_id", listed)
        if wrong := [token_id for token_id in ends if token_id >= size]:
            found = f"eos_token_id {wrong[0]}; must be below the vocab_size of {size}"
            raise self.files.wrong(found, "correct config.json and generation_config.json")
        eos = self._ids("eos_token_id", tokenizer.eos_token_id) + ends
        pads = self._ids("pad_token_id", tokenizer.pad_token_id)
        pads += self._ids("pad_token_id", special_id(config, "pad_token_id"))
        bos, known = tokenizer.bos_token_id, range(size)
        return Vocabulary(
            size=size,
            num_tokens=len(ids & set(known)),
            missing_ids=tuple(sorted(set(known) - ids)),
            bos_token_id=bos if bos in known else None,
            eos_token_ids=tuple(dict.fromkeys(token_id for token_id in eos if token_id in known)),
            pad_token_id=next((token_id for token_id in pads if token_id in known), None),
            digest=ordinary,
            special_digest=special,
        )

    def _ids(self, name: str, value: Any) -> list[int]:
        ids = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
        if any(type(item) is not int for item in ids):
            raise self.files.wrong(f"{name} {value!r:.40}; must be a token id, or a list of them")
        return ids

    @cached_property
    def architecture(self) -> Architecture:
        with one_line(self.files.where):  # an activation, say, that transformers does not know
            shape = read_architecture(self.config)
        ids = read_head_ids(Path(self.location), shape.vocab_size)
        return shape if ids is None else replace(shape, tied=False, head_size=len(ids))

    @property
    def context_length(self) -> int:
        """Positions that the text part was made for."""
        return int(text_config(self.config).max_position_embeddings)

    @property
    def license(self) -> str:
        """As a GGUF file or the head of a local model card names it; else `unknown`."""
        if self.gguf:
            return str(self.gguf.value("general.license", "unknown"))
        card = Path(self.location) / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        found = re.match(r"---\n(?:.*\n)*?license: *[\"']?([\w.-]+)", text)
        return found[1] if found else "unknown"

    @property
    def has_weights(self) -> bool:
        """Whether the weights can be had; a hub's always."""
        try:
            self.files.check_weights()
        except TargetError:
            return False
        return True

    def check_tensors(self) -> list[str]:
        """Refuses weights that do not fit config.json; names of tensors that are passed over.

        Only the heads of files are read. Nothing is compared where there are no weights, where the hub cannot
        be asked, and where a quantiser has names of its own.
        """
        if self.has_weights and self.files.is_local and self.files.find("adapter_config.json"):
            # transformers adds it where peft is installed, and leaves it out elsewhere
            found, fix = "adapter_config.json beside the weights", "merge the adapter, or take it out"
            raise self.files.wrong(found, fix)
        if self._quantised or not self.has_weights or (header := self.files.header()) is None:
            return []
        with one_line(self.files.where):
            passed, tied = check_header(self.files.where, self.config, header)
            return passed + (refuse_second_head(self.files.where, self.files.weights_here()) if tied else [])

    def check_quantiser(self) -> None:
        """Refuses quantised weights whose library is not here or does not run on this machine."""
        if not self._quantised:
            return
        try:
            with quiet():
                if not AutoHfQuantizer.supports_quant_method(self._quantised):
                    raise ValueError("unknown to transformers")
                quantiser = AutoHfQuantizer.from_config(self._quantised, pre_quantized=True)
                quantiser.validate_environment(device_map=None)
                with torch.device("meta"):
                    model = auto_class(self.config).from_config(self.config)
                # Some ask for their library only here; other errors are for the loading to tell.
                with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError, RuntimeError):
                    quantiser.preprocess_model(model, device_map=None, checkpoint_files=[], use_kernels=False)
        except Exception as error:  # each has errors of its own
            raise self._not_loadable(error) from error

    @property
    def _quantised(self) -> Any:
        """The quantiser's settings in config.json; none for plain weights."""
        return getattr(self.config, "quantization_config", None)

    def _not_loadable(self, error: Exception) -> TargetError:
        method = self._quantised if isinstance(self._quantised, dict) else vars(self._quantised)
        found = f"weights quantised by {method.get('quant_method')}; transformers must be able to load them"
        why = " ".join(str(error).split())[:100]
        return self.files.wrong(f"{found} ({why})", "install the library of that method")

    def model(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Ready to read and write: eval mode, on `device`, by default in the recipe's precision."""
        device = torch.device(device)
        # On a CPU half precision is slow on most machines, and makes greedy text inexact.
        auto: torch.dtype | str = torch.float32 if device.type == "cpu" else "auto"
        self.files.make_weights()
        self.check_quantiser()
        self.check_tensors()
        with one_line(self.files.where):
            return self._load(dtype or _DTYPES.get(self.dtype) or auto).to(device).eval()

    def _load(self, dtype: torch.dtype | str) -> PreTrainedModel:
        options: dict[str, Any] = {"dtype": dtype, "revision": self.revision, "trust_remote_code": False}
        if getattr(text_config(self.config), "attn_logit_softcapping", None):
            options["attn_implementation"] = "eager"  # torch's fused attention leaves the cap out
        try:
            options |= {"use_safetensors": True, "output_loading_info": True, "config": self.config}
            model, report = auto_class(self.config).from_pretrained(self.location, **options)
        except Exception as error:  # each quantiser has errors of its own, where its library is missing
            if not self._quantised:
                raise
            raise self._not_loadable(error) from error
        # A weight missing from the files is an error, never a random matrix; so is one that nobody uses.
        unused = () if self._quantised else report["unexpected_keys"]
        refuse_misfits(self.files.where, report["missing_keys"], unused, report["mismatched_keys"])
        if not self.files.is_local:
            self.check_tensors()  # by now all of its files are here
        return model

    def identity(self, *, weights: bool = True) -> dict[str, Any]:
        """Stands for what the model writes, in fingerprints: name, revision, precision; of a directory also
        its files.

        Weights count by their size and both ends: a fine-tune saved over another is noticed without reading
        gigabytes.
        """
        identity: dict[str, Any] = {"model": self.name, "revision": self.revision}
        identity["dtype"] = self.dtype if weights else None
        if self.gguf:
            return identity | {"files": {self.gguf.path.name: self.gguf.digest}}
        folder = Path(self.location)
        if not folder.is_dir():
            return identity
        found = [folder / name for name in _IDENTITY_FILES if (folder / name).is_file()]
        identity["files"] = {path.name: file_sha256(path)[:20] for path in found}
        for path in sorted(folder.glob("*.safetensors")) if weights else ():
            size, state = path.stat().st_size, hashlib.sha256()
            with open(path, "rb") as file:
                state.update(file.read(_HASHED_BYTES))
                file.seek(max(0, size - _HASHED_BYTES))
                state.update(file.read(_HASHED_BYTES))
            identity["files"][path.name] = f"{size} bytes, {state.hexdigest()[:20]}"
        return identity

    def copy_tokenizer(self, folder: Path) -> None:
        """Copies the tokenizer files byte for byte: not every runtime recognises one that was saved again."""
        for path in self.files.tokenizer_files():
            inside = "additional_chat_templates" if path.parent.name == "additional_chat_templates" else ""
            (folder / inside).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / inside / path.name)

    def tokenizer_digest(self) -> str:
        """One digest of the bytes of all tokenizer files."""
        lines = [f"{path.name} {file_sha256(path)}" for path in self.files.tokenizer_files()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:20]
