"""What lies in a model's directory, or on the hub: config.json, tokenizer files, safetensors."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import (
    get_safetensors_metadata,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers.utils import logging as notices

from fastdraft.errors import FastDraftError, TargetError, is_out_of_memory
from fastdraft.modeling.families import TARGET_FAMILIES

TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "additional_chat_templates/*",
]
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = "only pickled weights; must be safetensors, because pickles can run code"
# What lies in a directory without safetensors, by the end of a file's name.
_OTHER_KINDS = {
    "openvino_model.xml": "an OpenVINO model; the weights are read from safetensors",
    "adapter_model.safetensors": "a LoRA adapter; must be merged into its model",
    ".gguf": "GGUF weights; must be safetensors",
    ".onnx": "an ONNX model; the weights are read from safetensors",
    ".bin": _PICKLED,
    ".pt": _PICKLED,
    ".pth": _PICKLED,
}
Header = dict[str, tuple[str, tuple[int, ...]]]  # tensor name -> type, as safetensors calls it, and shape
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|[A-Za-z0-9][\w.-]*")
_AGAIN = "fetch the model again"


class ModelFiles:
    """The files of one model, a directory or a hub id; the hub's are fetched one by one, when asked for."""

    def __init__(self, location: str, revision: str | None = None) -> None:
        self.location, self.revision = location, revision
        self.where = location  # what errors call it
        self.is_local = Path(location).is_dir()
        if not self.is_local and (Path(location).exists() or not _HUB_ID.fullmatch(location)):
            raise self.wrong("no such directory; a model is a directory or a hub id", "correct the path")

    def wrong(self, found: str, fix: str = _AGAIN) -> TargetError:
        """What is the matter with this model, to be raised."""
        return TargetError(f"{self.where}: {found}", fix)

    def find(self, name: str) -> Path | None:
        """One file on this machine; None when the model has no such file."""
        if self.is_local:
            path = Path(self.location) / name
            return path if path.is_file() else None
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not news
        with one_line(self.where):
            try:
                return Path(hf_hub_download(self.location, name, revision=self.revision))
            except EntryNotFoundError as error:
                # Offline a file that is not there is absent where the model's config is there.
                asked = not isinstance(error, LocalEntryNotFoundError)
                if asked or (name != "config.json" and self._here("config.json")):
                    return None
                raise

    def _here(self, name: str) -> Path | None:
        """The same, and of the hub's files only one that was fetched before."""
        if self.is_local:
            return self.find(name)
        found = try_to_load_from_cache(self.location, name, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it is, of a supported family."""
        path = self.find("config.json")
        if path is None:
            raise self.wrong("no config.json", "name the directory that the model was saved to")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise TargetError(f"{path}: not JSON ({error})", _AGAIN) from None
        if not isinstance(config, dict):
            raise TargetError(f"{path}: a JSON {type(config).__name__}; must be an object", _AGAIN)
        family = config.get("model_type")
        if not isinstance(family, str) or family not in TARGET_FAMILIES:
            own_code = " needs Python code of its own" if "auto_map" in config else ""
            rule = f"must be one of {', '.join(TARGET_FAMILIES)}"
            raise self.wrong(f"model family '{family}'{own_code}; {rule}", "choose another model")
        # transformers would take its own default
        if "vocab_size" not in config and "text_config" not in config:
            raise TargetError(f"{path}: no vocab_size", _AGAIN)
        return config

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer, chat template and special-token files, in a fixed order."""
        root = Path(self.location)
        if not self.is_local:
            with one_line(self.where):
                options: dict[str, Any] = {"revision": self.revision, "allow_patterns": TOKENIZER_FILES}
                try:
                    root = Path(snapshot_download(self.location, **options))
                except Exception:  # of a commit that is here the list of files is asked for all the same
                    root = Path(snapshot_download(self.location, **options, local_files_only=True))
        files = [path for name in TOKENIZER_FILES for path in sorted(root.glob(name)) if path.is_file()]
        if not files:
            raise self.wrong("no tokenizer files", "copy the model's tokenizer files there")
        return files

    def weights(self, names: Sequence[str] = ()) -> dict[str, Path]:
        """Tensor name -> safetensors file that holds it, for all tensors or the asked ones."""
        whole = self.find(_WHOLE)  # where both are there transformers takes this one
        if whole is not None:
            return dict.fromkeys(names, whole) if names else {"": whole}
        index = self.find(_INDEX)
        if index is None:
            here = [path.name for path in Path(self.location).iterdir()] if self.is_local else []
            for end, found in _OTHER_KINDS.items():
                if any(name.endswith(end) for name in here):
                    raise self.wrong(found, "save the model as safetensors, or choose another copy")
            raise self.wrong("no model.safetensors; the weights are needed here", "name their directory")
        places = _weight_map(index)
        found_at: dict[str, Path] = {}
        for name in names or places:
            if name in places:
                path = self.find(places[name])
                if path is None:
                    raise self.wrong(f"no {places[name]}; every file of {index.name} must be there")
                found_at[name] = path
        return found_at

    def header(self) -> Header | None:
        """Type and shape of every tensor, no weights being read; None where the hub cannot be asked."""
        if paths := self.weights_here():
            with one_line(self.where):
                return {name: kind for path in paths for name, kind in _header(path).items()}
        if self.is_local:
            self.check_weights()
        try:
            files = get_safetensors_metadata(self.location, revision=self.revision).files_metadata.values()
        except Exception:  # offline, or closed, or no safetensors: whoever loads it tells
            return None
        return {name: (t.dtype, tuple(t.shape)) for file in files for name, t in file.tensors.items()}

    def weights_here(self) -> list[Path]:
        """All of the safetensors files; none if one of them is not on this machine. Nothing is fetched."""
        index = None if self._here(_WHOLE) else self._here(_INDEX)
        names = set(_weight_map(index).values()) if index else {_WHOLE}
        paths = [path for name in sorted(names) if (path := self._here(name))]
        return paths if len(paths) == len(names) else []

    def check_weights(self) -> None:
        """Refuses a directory whose weights are not all there; the hub is asked when loading."""
        if self.is_local:
            self.weights()

    def make_weights(self) -> None:
        """Whatever must be there before transformers loads the directory."""
        self.check_weights()


def _header(path: Path) -> Header:
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name; a name that would leave the model's directory is refused."""
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        inside = (Path(name).name == name and "\\" not in name for name in places.values())
        if not places or not all(inside):
            raise ValueError("names no files beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        found = f"{index}: damaged ({type(error).__name__}: {str(error)[:80]})"
        raise TargetError(f"{found}; must hold a `weight_map` of tensor names and files", _AGAIN) from None
    return places


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back the libraries' notices and bars while loading; what matters is checked and raised."""
    level, bars = notices.get_verbosity(), notices.is_progress_bar_enabled()
    notices.set_verbosity(logging.ERROR)
    notices.disable_progress_bar()
    try:
        yield
    finally:
        notices.set_verbosity(level)
        if bars:
            notices.enable_progress_bar()


# A pattern in a library's message, what it means for the user, the remedy.
_UNREACHABLE = (
    "connect|offline|resolve|timed out|Max retries|cannot find the requested files|LocalEntryNotFound"
)
_DAMAGED = "safetensors|HeaderTooLarge|InvalidHeader|MetadataIncomplete|deserializ"
_EXPLANATIONS = (
    (
        "trust_remote_code|custom code",
        "needs Python code of its own, which is never run",
        "choose another model",
    ),
    ("GatedRepo|403", "closed to you", "accept its licence on the hub and log in with `hf auth login`"),
    ("RepositoryNotFound|404|401", "neither a directory here nor a model on the hub", "correct the name"),
    (_UNREACHABLE, "no such directory, and the hub cannot be reached", "go online or name a directory"),
    (_DAMAGED, "damaged or missing weights", _AGAIN),
    ("mismatched_sizes|size mismatch", "weights of other shapes than config.json says", _AGAIN),
)


@contextlib.contextmanager
def one_line(location: str) -> Iterator[None]:
    """Turns whatever a library raises while it loads a model into one TargetError."""
    try:
        with quiet():
            yield
    except FastDraftError:
        raise
    except Exception as error:  # transformers, the hub and safetensors raise dozens of kinds
        if is_out_of_memory(error) or getattr(error, "errno", None) == errno.ENOSPC:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        for pattern, found, fix in _EXPLANATIONS:
            if re.search(pattern, text, re.IGNORECASE):
                raise TargetError(f"{location}: {found}", fix) from error
        if field := re.search(r"(?i)validation error for .*?Error: (.+)", text):
            raise TargetError(f"{location}: config.json: {field[1][:160]}", _AGAIN) from error
        found = f"{location}: does not load in transformers ({text[:160]})"
        raise TargetError(found, "check its files") from error
