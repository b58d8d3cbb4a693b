"""Recipe values: counts, unknown keys, one-line errors."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from fastdraft.console import format_count
from fastdraft.errors import RecipeError
from fastdraft.recipe.base import Config, Count, load_config, parse_count


class Cosine(Config):
    kind: Literal["cosine"] = "cosine"
    final: float = Field(default=0.1, ge=0)


class Linear(Config):
    kind: Literal["linear"] = "linear"
    decay: float = 0.2


class Section(Config):
    tokens: Count = 1000
    schedule: Annotated[Cosine | Linear, Field(discriminator="kind")] = Cosine()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("10B", 10**10),
        ("2M", 2_000_000),
        ("250k", 250_000),
        ("1.5M", 1_500_000),
        (7, 7),
        ("1_000", 1000),
        (2e6, 2_000_000),
    ],
)
def test_counts_may_be_written_with_a_suffix(text: object, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "ten", "-5", -5, 1.5, True, "1.0001k", "5 G", None, []])
def test_what_is_not_a_whole_count_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="count such as"):
        parse_count(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999"), (1000, "1k"), (1_048_576, "1.05M"), (154_147_328, "154M"), (999_999, "1M"), (0, "0")],
)
def test_counts_print_with_three_digits(count: int, text: str) -> None:
    assert format_count(count) == text


def test_an_unknown_key_inside_a_tagged_alternative_names_the_keys_of_that_alternative() -> None:
    with pytest.raises(RecipeError, match=r"schedule.*did you mean 'final'"):
        load_config(Section, {"schedule": {"kind": "cosine", "finl": 0}})


def test_a_wrong_value_names_key_value_rule_and_remedy_in_one_line() -> None:
    with pytest.raises(RecipeError) as caught:
        load_config(Section, {"schedule": {"kind": "cosine", "final": -1}})
    assert "\n" not in str(caught.value)
    assert "schedule.final: -1: must be greater than or equal to 0; change it" in str(caught.value)
