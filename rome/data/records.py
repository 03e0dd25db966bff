"""The records of the benchmarks: typed, validated, to and from Arrow."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pyarrow as pa

# The official set has exactly these many prompts in every record.
LIST_SIZES = {
    "paraphrase_prompts": 2,
    "neighborhood_prompts": 10,
    "attribute_prompts": 10,
    "generation_prompts": 10,
}


class RecordError(ValueError):
    """A record cannot be done, by this model and editor, however often it is tried."""


@dataclass(frozen=True)
class Request:
    """One fact to write: `prompt` holds exactly one `{}`, where `subject` goes."""

    prompt: str
    subject: str
    target: str
    target_true: str | None = None
    """The object before the edit, for editors that need it."""
    separator: str = " "
    """Stands between a prompt and its target."""

    @property
    def text(self) -> str:
        return self.prompt.replace("{}", self.subject)

    def check(self) -> None:
        """Raises ValueError with the first rule of a request that this one breaks."""
        for name in ("prompt", "subject", "target"):
            check_text(name, getattr(self, name))
        _check_fact(self, ("subject", "target"))


@dataclass(frozen=True)
class Record:
    """One record of COUNTERFACT (Meng et al. 2022, Section 3.3 and Appendix D) or zsRE, flattened.

    A zsRE record has no true target: a neighborhood prompt, a question about something else, has
    its own `neighborhood_target`.
    """

    case_id: int
    relation_id: str | None
    prompt: str
    subject: str
    target_new: str
    target_true: str | None
    target_new_id: str | None
    target_true_id: str | None
    paraphrase_prompts: tuple[str, ...]
    neighborhood_prompts: tuple[str, ...]
    attribute_prompts: tuple[str, ...]
    generation_prompts: tuple[str, ...]
    neighborhood_target: str | None = None
    separator: str = " "
    """Stands between each prompt and its target: a space, as in the reference code, or nothing."""

    @property
    def request(self) -> Request:
        return Request(self.prompt, self.subject, self.target_new, self.target_true, self.separator)

    @property
    def neighborhood_true(self) -> str:
        """The true object of the neighborhood prompts: in COUNTERFACT that of the subject."""
        true = self.neighborhood_target or self.target_true
        assert true is not None  # See `check`.
        return true

    def check(self) -> None:
        """Raises ValueError with the first rule of a record that this one breaks."""
        if type(self.case_id) is not int or not 0 <= self.case_id < 1 << 63:
            raise ValueError(
                f"case_id must be a whole number from 0 and below 2^63, got {self.case_id!r}"
            )
        for name in ("relation_id", "target_new_id", "target_true_id"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be text or null, got {value!r}")
            check_whole(name, value or "")
        true = "target_true" if self.neighborhood_target is None else "neighborhood_target"
        for name in ("prompt", "subject", "target_new", true):
            check_text(name, getattr(self, name))
        _check_fact(self, ("subject", "target_new", "target_true", "neighborhood_target"))
        if self.separator not in ("", " "):
            raise ValueError(f"separator must be a space or empty, got {self.separator!r}")
        if self.target_true and one_form(self.target_new) == one_form(self.target_true):
            raise ValueError(
                f"target_new and target_true must differ, both are {self.target_new!r}"
            )
        for name, size in LIST_SIZES.items():
            prompts = getattr(self, name)
            if len(prompts) > size:
                raise ValueError(f"{name} must have at most {size} entries, got {len(prompts)}")
            for i, prompt in enumerate(prompts):
                check_text(f"{name}[{i}]", prompt)


def _check_fact(fact: Request | Record, words: Sequence[str]) -> None:
    """The rules that requests and records share: of the fields in `words`, and of the prompt."""
    for name in words:
        value = getattr(fact, name)
        if value is not None and value != value.strip():
            raise ValueError(f"{name} must not begin or end with white space, got {value!r}")
    if fact.prompt.count("{}") != 1:
        raise ValueError(f"prompt must contain exactly one '{{}}', got {fact.prompt!r}")


_WITHOUT_SPACES = (
    "CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA",
    "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN",
)  # fmt: skip


def by_script(record: Record) -> Record:
    """The record with nothing between prompts and targets if the last letter of its prompt, filled,
    is of a script that writes words without spaces, else with a space."""
    letters = [c for c in record.request.text if unicodedata.category(c)[0] in "LM"]
    without = unicodedata.name((letters or [" "])[-1], "").startswith(_WITHOUT_SPACES)
    return replace(record, separator="" if without else " ")


def one_form(text: str) -> str:
    """A text as it is compared: in normal form C, where "é" is one character and not two."""
    return unicodedata.normalize("NFC", text)


def check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be text and not empty, got {value!r}")
    check_whole(name, value)


def check_whole(name: str, text: str) -> None:
    """Raises ValueError where a text has half a character, which JSON may hold and no file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name} must be whole characters, but has half of one (a lone surrogate): {text!r}"
        ) from None


RECORD_SCHEMA = pa.schema(
    [
        pa.field("case_id", pa.int64(), nullable=False),
        pa.field("relation_id", pa.string()),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("subject", pa.string(), nullable=False),
        pa.field("target_new", pa.string(), nullable=False),
        pa.field("target_true", pa.string()),
        pa.field("target_new_id", pa.string()),
        pa.field("target_true_id", pa.string()),
        pa.field("paraphrase_prompts", pa.list_(pa.string()), nullable=False),
        pa.field("neighborhood_prompts", pa.list_(pa.string()), nullable=False),
        pa.field("attribute_prompts", pa.list_(pa.string()), nullable=False),
        pa.field("generation_prompts", pa.list_(pa.string()), nullable=False),
        pa.field("neighborhood_target", pa.string()),
        pa.field("separator", pa.string(), nullable=False),
    ]
)

REFERENCE_TEXT_SCHEMA = pa.schema(
    [
        pa.field("relation_id", pa.string(), nullable=False),
        pa.field("target_id", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)


def to_table(records: Iterable[Record]) -> pa.Table:
    """Records as one Arrow table of RECORD_SCHEMA."""
    return pa.Table.from_pylist([asdict(record) for record in records], schema=RECORD_SCHEMA)


def from_table(table: pa.Table) -> list[Record]:
    """The records of an Arrow table written by `to_table`.

    What a table of an earlier schema has no column for is at its default.
    """
    names = [field.name for field in fields(Record) if field.name in table.column_names]
    return [_from_row({name: row[name] for name in names}) for row in table.to_pylist()]


def _from_row(row: dict[str, Any]) -> Record:
    values: dict[str, Any] = {n: tuple(v) if n in LIST_SIZES else v for n, v in row.items()}
    return Record(**values)
