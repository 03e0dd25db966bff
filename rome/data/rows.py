"""Rows of published files as records: COUNTERFACT, zsRE as MEND has it, COUNTERFACT as EasyEdit has
it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rome.data.records import LIST_SIZES, Record, check_text


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
        assumed, make = "COUNTERFACT's", lambda: from_counterfact(row)
    elif {"src", "answers"} & row.keys():
        assumed, make = "zsRE's", lambda: from_zsre(row, place)
    elif {"locality", "portability"} & row.keys():
        raise ValueError(
            "it is a row of KnowEdit, whose neighbours have an answer each, and these are not "
            "read; write it in COUNTERFACT's format (docs/inputs.md)"
        )
    elif {"prompt", "ground_truth"} <= row.keys():
        assumed, make = "EasyEdit's", lambda: from_easyedit(row, place)
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


def _given(row: Mapping[str, Any], name: str, default: Any) -> Any:
    """A column's value; null, which a row has if only others have the column, is the default."""
    return default if row.get(name) is None else row[name]


def _without(subject: str, name: str, text: str) -> str:
    """A text with `{}` in the place of its subject. Raises ValueError if that is not in it once."""
    if text.count(subject) != 1:
        raise ValueError(f"{name} must contain the subject {subject!r} exactly once, got {text!r}")
    return text.replace(subject, "{}")


def from_counterfact(row: Mapping[str, Any]) -> Record:
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
    record = Record(
        case_id=row.get("case_id"),  # type: ignore[arg-type]  # checked below
        relation_id=rewrite.get("relation_id"),
        prompt=rewrite.get("prompt"),  # type: ignore[arg-type]
        subject=rewrite.get("subject"),  # type: ignore[arg-type]
        target_new=new.get("str"),  # type: ignore[arg-type]
        target_true=true.get("str"),
        target_new_id=new.get("id"),
        target_true_id=true.get("id"),
        **lists,
        separator=_given(row, "separator", " "),
    )
    record.check()
    return record


def from_zsre(row: Mapping[str, Any], case_id: int) -> Record:
    """A record of the JSON schema of MEND's zsRE files, checked.

    Reference code: `dsets/zsre.py`, where `case_id` is the row's place in the file, from 0. The
    first answer is the target; the question about something else (`loc`, of Natural Questions,
    without its question mark) is the neighborhood prompt.

    Raises:
        ValueError: the first rule that the row breaks, with the value.
    """
    for name in ("subject", "src", "loc"):
        check_text(name, row.get(name))
    subject, src, answers = row["subject"], row["src"], row.get("answers")
    prompt = _without(subject, "src", src)
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"answers must be a list with at least one text, got {answers!r}")
    check_text("loc_ans", row.get("loc_ans"))
    record = Record(
        case_id=case_id,
        relation_id=None,
        prompt=prompt,
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


def from_easyedit(row: Mapping[str, Any], place: int) -> Record:
    """A record of EasyEdit's COUNTERFACT files, checked: flat, and with the subject in prompts.

    `case_id` is the row's place in the file, unless it has one.

    Raises:
        ValueError: the first rule that the row breaks, with the value.
    """
    for name in ("subject", "prompt", "ground_truth"):
        check_text(name, row.get(name))
    subject = row["subject"]
    prompt = _without(subject, "prompt", row["prompt"])
    asked = {name: row.get(name) for name in ("rephrase_prompt", "locality_prompt")}
    if asked["locality_prompt"] is not None:
        check_text("locality_ground_truth", row.get("locality_ground_truth"))
    record = Record(
        case_id=_given(row, "case_id", place),
        relation_id=None,
        prompt=prompt,
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
        separator=_given(row, "separator", " "),
    )
    record.check()
    return record
