"""Which families of targets the converter to OpenVINO takes.

Decides that of a multimodal target the text part is converted, as the language model that it is by itself (modeling/text_part.py); that
Gemma 1 and 3 are converted beside newer releases of transformers than optimum-intel 2.2 allows by number, because what they write there
is right (a test holds it to transformers' own greedy text), and Gemma 2 is not, because it is wrong; and that a target which is not
taken is refused before anything is trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fastdraft.errors import TargetError
from fastdraft.modeling.text_part import text_family
from fastdraft.target import Target

NOT_CONVERTED = {
    "gemma2": "its attention scores are capped, which OpenVINO's attention leaves out: it would write another text"
}
"""Text families that are not converted, and why: transformers writes for these."""
_BOUND, _CLASS, _TRIED = "MAX_TRANSFORMERS_VERSION", "GemmaOpenVINOConfig", "5.99"


@contextlib.contextmanager
def newer_transformers() -> Iterator[None]:
    """Inside the block optimum-intel converts Gemma beside transformers 5.1 and later too, which it refuses by a version number alone."""
    from optimum.exporters.openvino import model_configs

    owner = getattr(model_configs, _CLASS, None)
    bound = getattr(owner, _BOUND, None)
    if owner is None or bound is None:
        yield
        return
    setattr(owner, _BOUND, _TRIED)
    try:
        yield
    finally:
        setattr(owner, _BOUND, bound)


def require_convertible(location: str, revision: str | None = None) -> None:
    """Looks whether OpenVINO's converter takes a target's family, before anything is trained for it.

    Raises:
        TargetError: when it does not.
    """
    family = unconverted_family(location, revision)
    if family:
        raise TargetError(
            location,
            f"family {family}",
            NOT_CONVERTED[family],
            "leave out `benchmark`, and write export.openvino.target=none",
        )


def unconverted_family(location: str, revision: str | None) -> str:
    """The text family of a target that is not converted; empty for one that is.

    Raises:
        TargetError: when its config cannot be read.
    """
    family = text_family(Target.at(location, revision))
    return family if family in NOT_CONVERTED else ""
