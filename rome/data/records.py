"""The records of the benchmarks: typed, validated, to and from Arrow."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pyarrow as pa

from rome.data.probes import PROBE_FIELDS, Probe
from rome.data.texts import check_bare, check_text, check_whole, one_form

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
    """One record of COUNTERFACT (Meng et al. 2022, Section 3.3 and Appendix D), zsRE, or of a
    benchmark in their kind, flattened.

    A record of questions, as zsRE's, has no true target: its neighborhood prompts are questions
    about something else, each with its own answer in `neighborhood_targets`.
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
    neighborhood_targets: tuple[str, ...] = ()
    """The answer to each neighborhood prompt; none where `target_true` is that of all."""
    separator: str = " "
    """Stands between each prompt and its target: a space, as in the reference code, or nothing."""
    original_id: str | None = None
    """What the published file calls it, where that is not `case_id`."""
    further: tuple[Request, ...] = ()
    """Requests that are edited together with the first one, as MQuAKE has them."""
    probes: tuple[Probe, ...] = ()

    @property
    def request(self) -> Request:
        """The first request, in most benchmarks the only one."""
        return Request(self.prompt, self.subject, self.target_new, self.target_true, self.separator)

    @property
    def requests(self) -> tuple[Request, ...]:
        """All requests, which edit one model."""
        return (self.request, *self.further)

    @property
    def neighbors(self) -> tuple[tuple[str, str], ...]:
        """Each neighborhood prompt and what is true of it."""
        true = self.neighborhood_targets or (self.target_true,) * len(self.neighborhood_prompts)
        pairs = zip(self.neighborhood_prompts, true, strict=True)
        return tuple((prompt, answer) for prompt, answer in pairs if answer is not None)

    def check(self) -> None:
        """Raises ValueError with the first rule of a record that this one breaks."""
        if type(self.case_id) is not int or not 0 <= self.case_id < 1 << 63:
            raise ValueError(
                f"case_id must be a whole number from 0 and below 2^63, got {self.case_id!r}"
            )
        for name in ("relation_id", "target_new_id", "target_true_id", "original_id"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be text or null, got {value!r}")
            check_whole(name, value or "")
        answered = len(self.neighborhood_targets)
        if answered not in (0, len(self.neighborhood_prompts)):
            raise ValueError(
                "neighborhood_targets must be as many as neighborhood_prompts, got "
                f"{answered} and {len(self.neighborhood_prompts)}"
            )
        for i, answer in enumerate(self.neighborhood_targets):
            check_bare(f"neighborhood_targets[{i}]", answer)
        true = ["target_true"] if self.neighborhood_prompts and not answered else []
        for name in ("prompt", "subject", "target_new", *true):
            check_text(name, getattr(self, name))
        _check_fact(self, ("subject", "target_new", "target_true"))
        for i, request in enumerate(self.further, 1):
            try:
                request.check()
            except ValueError as error:
                raise ValueError(f"request {i + 1}: {error}") from error
            if (request.target_true is None) != (self.target_true is None):
                raise ValueError("target_true must be there in all requests of a record, or none")
            if request.separator != self.separator:
                raise ValueError("the requests of a record must have one separator")
        for probe in self.probes:
            probe.check()
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


def told(record: Record) -> dict[str, list[tuple[str, str]]]:
    """Of each kind of `rome.data.results.TOLD_KINDS` the prompts, and what is right after each."""
    return {
        "rewrite": [(one.text, one.target) for one in record.requests],
        "paraphrase": [(prompt, record.target_new) for prompt in record.paraphrase_prompts],
        "neighborhood": list(record.neighbors),
    }


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
        pa.field("neighborhood_targets", pa.list_(pa.string())),
        pa.field("separator", pa.string(), nullable=False),
        pa.field("original_id", pa.string()),
        pa.field(
            "further",
            pa.list_(pa.struct([pa.field(field.name, pa.string()) for field in fields(Request)])),
        ),
        pa.field("probes", pa.list_(pa.struct(PROBE_FIELDS))),
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
    rows = table.to_pylist()
    for row in rows:
        if answer := row.pop("neighborhood_target", None):  # Once all prompts had one.
            row["neighborhood_targets"] = [answer] * len(row["neighborhood_prompts"])
    return [_from_row({n: v for n, v in row.items() if n in _NAMES}) for row in rows]


_NAMES = {field.name for field in fields(Record)}


def _from_row(row: dict[str, Any]) -> Record:
    values: dict[str, Any] = {n: tuple(v) if n in LIST_SIZES else v for n, v in row.items()}
    made = {
        "neighborhood_targets": tuple(values.get("neighborhood_targets") or ()),
        "further": tuple(Request(**one) for one in values.get("further") or ()),
        "probes": tuple(
            Probe(**{**one, "answers": tuple(one["answers"])}) for one in values.get("probes") or ()
        ),
    }
    return Record(**values | made)
