"""`prepare:` — the corpora of a recipe and their form on disk; data/corpora.py reads them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastdraft.recipe.base import Config, Count, FolderName

NOT_CODE = [
    *("test", "tests", "test_*.py", "*_test.py", "idle_test", "site-packages", "dist-packages"),
    *("node_modules", "__pycache__", ".*"),
]


class Source(Config):
    """What every kind of corpus has."""

    name: FolderName
    """The corpus; entries of one name make one corpus, each with its own budget."""
    tokens: Count | None = Field(default=None, ge=1)
    """Stop after this many tokens of this entry, validation included; unset takes all."""
    license: str = ""
    """Noted in the manifest and the model card; not read otherwise."""


class FilesSource(Source):
    """What corpora in files have."""

    path: str = Field(min_length=1)
    """A file, a folder (files of usual endings, links followed, none hidden) or a pattern `src/**/*.c`, from
    the working directory; `shipped:`, `python:` and addresses that fsspec opens (`s3://`, `gcs://`) too."""


class RowsSource(FilesSource):
    """JSON objects, one a line or in an array (plain, .gz, .xz, .bz2 or .zst), or Parquet files."""

    kind: Literal["jsonl", "parquet"]
    field: str = "text"
    """The key or column that holds the text."""


class TextFilesSource(FilesSource):
    """Text files in UTF-8, each one document."""

    kind: Literal["text"]


class SourceCodeSource(FilesSource):
    """Source code, each file one document; files that are not UTF-8 are passed over and counted."""

    kind: Literal["source_code"]
    exclude: list[str] = NOT_CODE
    """File or folder names to leave out, anywhere below `path`; tests and installed packages by default."""


class HubRows(Config):
    """Which rows of a data set of the Hugging Face hub."""

    dataset: str = Field(min_length=1)
    """Hub id, or a folder here that `datasets` reads; of a folder its files count in fingerprints."""
    subset: str | None = None
    """The data set's configuration."""
    split: str = "train"
    """The data set's split."""
    revision: str | None = None
    """Commit to pin, so that a resumed run reads the same rows."""


class HubSource(HubRows, Source):
    """A data set of the Hugging Face hub, streamed."""

    kind: Literal["hub"]
    field: str = "text"
    """The column that holds the text."""


FileSource = RowsSource | TextFilesSource | SourceCodeSource
SourceConfig = FileSource | HubSource


class PrepareConfig(Config):
    """`prepare:` — the corpora and their form on disk."""

    row_length: int = Field(default=2048, ge=8)
    """Tokens in a training row; the draft's training context."""
    validation: float = Field(default=0.005, ge=0, le=0.5)
    """Share of the documents kept for validation; small corpora keep a few rows anyway."""
    document_masking: bool = False
    """Texts that share a training row do not see each other, as if each stood alone from position 0."""
    store: str = Field(default="", pattern="^$|://")
    """Where the shards go, an address that fsspec opens (`s3://bucket/folder`); unset: the run's folder."""
    corpora: list[Annotated[SourceConfig, Field(discriminator="kind")]] = Field(min_length=1)
    """What to read; entries of one name make one corpus, in the shares of their `tokens`."""

    @model_validator(mode="after")
    def _names_are_folders(self) -> PrepareConfig:
        for name in self.sources:
            alike = [other for other in self.sources if other.casefold() == name.casefold()]
            if len(alike) > 1:
                raise ValueError(f"corpora {' and '.join(alike)} differ by capitals only; rename one")
            if name.casefold() in ("manifest.json", "fingerprint.json"):
                raise ValueError(f"a corpus '{name}' would lie where that file does; rename it")
        return self

    @property
    def sources(self) -> dict[str, list[SourceConfig]]:
        """The entries of each corpus, corpora in order of their first entry."""
        names = dict.fromkeys(entry.name for entry in self.corpora)
        return {name: [entry for entry in self.corpora if entry.name == name] for name in names}

    @property
    def budget(self) -> int | None:
        """Tokens of all entries; None when one is open."""
        budgets = [entry.tokens for entry in self.corpora]
        return sum(budget or 0 for budget in budgets) if all(budgets) else None
