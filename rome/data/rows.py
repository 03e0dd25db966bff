"""Rows of published files as records: COUNTERFACT, zsRE as MEND has it, QAEdit; and which format a
row is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rome.data import probed_rows, probes
from rome.data.probes import Probe
from rome.data.records import LIST_SIZES, Record
from rome.data.row_parts import given, prompts, refuse_unread, without, without_last
from rome.data.texts import check_text


def _target(rewrite: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    target = rewrite.get(name)
    if not isinstance(target, Mapping):
        raise ValueError(f"{name} must be a mapping with 'str', got {target!r}")
    return target


def from_row(row: Any, place: int) -> Record:
    """A record of a row in the format that its keys are of, checked.

    In any format a row may have `probes` of its own, see `rome.data.probes.given`. `place`: of the
    row in its file, from 0.

    Raises:
        ValueError: the rule that it breaks, and the format that was assumed, or how it was none.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"a record must be a mapping, got {str(row)[:200]}")
    name, make = _format_of(row)
    try:
        record = make(row, place)
        if own := probes.given(row):
            record = replace(record, probes=(*record.probes, *own))
            record.check()
    except ValueError as error:
        raise ValueError(f"{error} (in {name} format)") from error
    return record


_Make = Callable[[Mapping[str, Any], int], Record]


def _format_of(row: Mapping[str, Any]) -> tuple[str, _Make]:
    if isinstance(row.get("requested_rewrite"), list):
        return "MQuAKE's", probed_rows.from_mquake
    if "requested_rewrite" in row:
        return "COUNTERFACT's", lambda row, place: from_counterfact(row)
    if {"src", "answers"} & row.keys():
        return "zsRE's", from_zsre
    if {"prompt", "target", "rephrase", "locality"} <= row.keys():
        return "QAEdit's", from_qaedit
    if {"edit", "example_type"} <= row.keys():
        return "RippleEdits'", probed_rows.from_ripple_edits
    if {"prompt", "ground_truth"} <= row.keys() or {"locality", "portability"} & row.keys():
        return "EasyEdit's", probed_rows.from_easyedit
    raise ValueError(
        "a record must have requested_rewrite (COUNTERFACT; a list of them: MQuAKE), src and "
        "answers (zsRE), prompt, target, rephrase and locality (QAEdit), edit and example_type "
        "(RippleEdits), or prompt and ground_truth (EasyEdit, KnowEdit), got the keys "
        f"{sorted(map(str, row))}"
    )


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
    lists: dict[str, Any] = {name: prompts(row, name) for name in LIST_SIZES}
    new, true = (_target(rewrite, name) for name in ("target_new", "target_true"))
    check_text("target_true", true.get("str"))
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
        separator=given(row, "separator", " "),
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
    prompt = without(subject, "src", src)
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"answers must be a list with at least one text, got {answers!r}")
    check_text("loc_ans", row.get("loc_ans"))
    portable = given(row, "portability", {})
    if portable and not {"New Question", "New Answer"} <= portable.keys():
        raise ValueError(f"portability must have New Question and New Answer, got {portable!r}")
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
        neighborhood_targets=(row["loc_ans"],),
        # EasyEdit's copy has one more question.
        probes=(
            (Probe("portability", 0, portable["New Question"], (portable["New Answer"],)),)
            if portable
            else ()
        ),
    )
    record.check()
    return record


def from_qaedit(row: Mapping[str, Any], place: int) -> Record:
    """A record of QAEdit's JSON schema (arXiv 2502.11177), checked.

    `case_id` is the row's place in the file, since its `id` is not unique there; that is
    `original_id`. The subject's last place in the prompt is the one that is edited. The `locality`
    questions are neighborhood prompts with an answer each. White space around answers goes.

    Raises:
        ValueError: the first rule that the row breaks, with the value.
    """
    known = {"id", "source", "prompt", "target", "subject", "rephrase", "locality", "probes"}
    refuse_unread(row, known)
    for name in ("subject", "prompt", "target", "rephrase"):
        check_text(name, row.get(name))
    local = prompts(row, "locality")
    for i, one in enumerate(local):
        if not isinstance(one, Mapping) or one.keys() != {"loc", "loc_ans"}:
            raise ValueError(f"locality[{i}] must be {{loc, loc_ans}}, got {one!r}")
        for name in ("loc", "loc_ans"):
            check_text(f"locality[{i}].{name}", one[name])
    subject = row["subject"].strip()
    record = Record(
        case_id=place,
        relation_id=None,
        prompt=without_last(subject, "prompt", row["prompt"]),
        subject=subject,
        target_new=row["target"].strip(),
        target_true=None,
        target_new_id=None,
        target_true_id=None,
        paraphrase_prompts=(row["rephrase"],),
        neighborhood_prompts=tuple(one["loc"] for one in local),
        attribute_prompts=(),
        generation_prompts=(),
        neighborhood_targets=tuple(one["loc_ans"].strip() for one in local),
        original_id=str(row["id"]) if row.get("id") is not None else None,
    )
    record.check()
    return record
