"""The records of the benchmarks: typed, validated, to and from Arrow."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
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
            _check_text(name, getattr(self, name))
        for name in ("subject", "target"):
            if (value := getattr(self, name)) != value.strip():
                raise ValueError(f"{name} must not begin or end with white space, got {value!r}")
        if self.prompt.count("{}") != 1:
            raise ValueError(f"prompt must contain exactly one '{{}}', got {self.prompt!r}")


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

    @classmethod
    def from_counterfact(cls, row: Mapping[str, Any]) -> Record:
        """A record of the original JSON schema, checked.

        Every prompt list must be there; it may be shorter than LIST_SIZES, or empty, because
        partial copies of the benchmark and small fact tables have no more; never longer.

        Raises:
            ValueError: the first rule that the row breaks, with the value.
        """
        rewrite = row.get("requested_rewrite")
        if not isinstance(rewrite, Mapping):
            raise ValueError(f"requested_rewrite must be a mapping, got {rewrite!r}")
        lists: dict[str, Any] = {name: _prompts(row, name) for name in LIST_SIZES}
        new, true = (_target(rewrite, name) for name in ("target_new", "target_true"))
        record = cls(
            case_id=row.get("case_id"),  # type: ignore[arg-type]  # checked below
            relation_id=rewrite.get("relation_id"),
            prompt=rewrite.get("prompt"),  # type: ignore[arg-type]
            subject=rewrite.get("subject"),  # type: ignore[arg-type]
            target_new=new.get("str"),  # type: ignore[arg-type]
            target_true=true.get("str"),
            target_new_id=new.get("id"),
            target_true_id=true.get("id"),
            **lists,
            separator=" " if row.get("separator") is None else row["separator"],
        )
        record.check()
        return record

    @classmethod
    def from_zsre(cls, row: Mapping[str, Any], case_id: int) -> Record:
        """A record of the JSON schema of MEND's zsRE files, checked.

        Reference code: `dsets/zsre.py`, where `case_id` is the row's place in the file, from 0. The
        first answer is the target; the question about something else (`loc`, of Natural Questions,
        without its question mark) is the neighborhood prompt.

        Raises:
            ValueError: the first rule that the row breaks, with the value.
        """
        for name in ("subject", "src", "loc"):
            _check_text(name, row.get(name))
        subject, src, answers = row["subject"], row["src"], row.get("answers")
        if src.count(subject) != 1:
            raise ValueError(f"src must contain the subject {subject!r} exactly once, got {src!r}")
        if not isinstance(answers, list) or not answers:
            raise ValueError(f"answers must be a list with at least one text, got {answers!r}")
        _check_text("loc_ans", row.get("loc_ans"))
        record = cls(
            case_id=case_id,
            relation_id=None,
            prompt=src.replace(subject, "{}"),
            subject=subject,
            target_new=answers[0],
            target_true=None,
            target_new_id=None,
            target_true_id=None,
            paraphrase_prompts=(row.get("rephrase"),),  # type: ignore[arg-type]  # checked below
            neighborhood_prompts=(row["loc"] + "?",),
            attribute_prompts=(),
            generation_prompts=(),
            neighborhood_target=row["loc_ans"],
        )
        record.check()
        return record

    @classmethod
    def from_easyedit(cls, row: Mapping[str, Any], place: int) -> Record:
        """A record of EasyEdit's COUNTERFACT files, checked: flat, and with the subject in prompts.

        `case_id` is the row's place in the file, unless it has one.

        Raises:
            ValueError: the first rule that the row breaks, with the value.
        """
        for name in ("subject", "prompt", "ground_truth"):
            _check_text(name, row.get(name))
        subject, prompt = row["subject"], row["prompt"]
        if prompt.count(subject) != 1:
            raise ValueError(
                f"prompt must contain the subject {subject!r} exactly once, got {prompt!r}"
            )
        asked = {name: row.get(name) for name in ("rephrase_prompt", "locality_prompt")}
        if asked["locality_prompt"] is not None:
            _check_text("locality_ground_truth", row.get("locality_ground_truth"))
        record = cls(
            case_id=place if row.get("case_id") is None else row["case_id"],
            relation_id=None,
            prompt=prompt.replace(subject, "{}"),
            subject=subject,
            target_new=row.get("target_new"),  # type: ignore[arg-type]  # checked below
            target_true=row["ground_truth"],
            target_new_id=None,
            target_true_id=None,
            paraphrase_prompts=tuple(filter(None, [asked["rephrase_prompt"]])),
            neighborhood_prompts=tuple(filter(None, [asked["locality_prompt"]])),
            attribute_prompts=(),
            generation_prompts=(),
            neighborhood_target=asked["locality_prompt"] and row["locality_ground_truth"],
            separator=" " if row.get("separator") is None else row["separator"],
        )
        record.check()
        return record

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
            _check_text(name, getattr(self, name))
        for name in ("subject", "target_new", "target_true", "neighborhood_target"):
            value = getattr(self, name)
            if value is not None and value != value.strip():
                raise ValueError(f"{name} must not begin or end with white space, got {value!r}")
        if self.prompt.count("{}") != 1:
            raise ValueError(f"prompt must contain exactly one '{{}}', got {self.prompt!r}")
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
                _check_text(f"{name}[{i}]", prompt)


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


def _target(rewrite: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    target = rewrite.get(name)
    if not isinstance(target, Mapping):
        raise ValueError(f"{name} must be a mapping with 'str', got {target!r}")
    return target


def from_row(row: Any, place: int) -> Record:
    """A record of a row in the format that its keys are of, checked.

    COUNTERFACT has `requested_rewrite`, MEND's zsRE `src` and `answers`, EasyEdit's COUNTERFACT
    `ground_truth` beside `prompt`. `place`: of the row in its file, from 0.

    Raises:
        ValueError: the rule that it breaks, and the format that was assumed, or how it was none.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"a record must be a mapping, got {str(row)[:200]}")
    if "requested_rewrite" in row:
        assumed, make = "COUNTERFACT's", lambda: Record.from_counterfact(row)
    elif {"src", "answers"} & row.keys():
        assumed, make = "zsRE's", lambda: Record.from_zsre(row, place)
    elif {"locality", "portability"} & row.keys():
        raise ValueError(
            "it is a row of KnowEdit, whose neighbours have an answer each, and these are not "
            "read; write it in COUNTERFACT's format (docs/inputs.md)"
        )
    elif {"prompt", "ground_truth"} <= row.keys():
        assumed, make = "EasyEdit's", lambda: Record.from_easyedit(row, place)
    else:
        raise ValueError(
            "a record must have requested_rewrite (COUNTERFACT), src and answers (zsRE), or prompt "
            f"and ground_truth (EasyEdit), got the keys {sorted(map(str, row))}"
        )
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{error} (in {assumed} format)") from error


def _prompts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    prompts = row.get(name)
    if not isinstance(prompts, list):
        raise ValueError(f"{name} must be a list, got {prompts!r}")
    return tuple(prompts)


def _check_text(name: str, value: object) -> None:
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
