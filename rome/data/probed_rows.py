"""Rows of files that ask more than whether a fact is edited: EasyEdit's and KnowEdit's with their
portability, RippleEdits with its six criteria, MQuAKE with several requests a record."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import yaml

from rome.data.probes import Probe, Role
from rome.data.records import Record, Request
from rome.data.row_parts import given, prompts, refuse_unread, without
from rome.data.texts import check_text
from rome.paths import CONFIGS

_EASYEDIT = {
    "subject", "prompt", "target_new", "ground_truth", "rephrase_prompt", "rephrase", "case_id",
    "locality_prompt", "locality_ground_truth", "locality", "portability", "probes", "separator",
}  # fmt: skip


def from_easyedit(row: Mapping[str, Any], place: int) -> Record:
    """A record of EasyEdit's `*-edit.json` files and of KnowEdit's, checked: flat, and with the
    subject in prompts.

    `case_id` is the row's place in the file, unless it has one. What is edited is a question
    without a true target if `ground_truth` is null or not there, or is the very target. Each set
    under `portability` and `locality` is a probe set of its name.

    Raises:
        ValueError: the first rule that the row breaks, with the key and value.
    """
    refuse_unread(row, _EASYEDIT)
    for name in ("subject", "prompt", "target_new"):
        check_text(name, _first(row, name))
    subject, target = row["subject"], _first(row, "target_new")
    true = _first(row, "ground_truth") if row.get("ground_truth") else None
    rephrased = given(row, "rephrase_prompt", row.get("rephrase"))
    local = given(row, "locality_prompt", None)
    if local is not None:
        check_text("locality_ground_truth", _first(row, "locality_ground_truth"))
    record = Record(
        case_id=given(row, "case_id", place),
        relation_id=None,
        prompt=without(subject, "prompt", row["prompt"]),
        subject=subject,
        target_new=target,
        target_true=None if true == target else true,
        target_new_id=None,
        target_true_id=None,
        paraphrase_prompts=() if rephrased is None else (rephrased,),
        neighborhood_prompts=() if local is None else (local,),
        attribute_prompts=(),
        generation_prompts=(),
        neighborhood_targets=() if local is None else (_first(row, "locality_ground_truth"),),
        separator=given(row, "separator", " "),
        probes=tuple(
            probe for name in ("portability", "locality") for probe in _sets(name, row.get(name))
        ),
    )
    record.check()
    return record


def _first(row: Mapping[str, Any], name: str) -> Any:
    """A text, or the first of a list of texts."""
    value = row.get(name)
    return value[0] if isinstance(value, list) and value else value


def _sets(kind: str, sets: Any) -> Iterator[Probe]:
    if sets is None:
        return
    if not isinstance(sets, Mapping):
        raise ValueError(f"{kind} must map names of sets to lists of questions, got {sets!r}")
    for name, items in sets.items():
        if not isinstance(items or [], list):
            raise ValueError(f"{kind}.{name} must be a list of questions, got {items!r}")
        for i, one in enumerate(items or []):
            where = f"{kind}.{name}[{i}]"
            if not isinstance(one, Mapping) or one.keys() != {"prompt", "ground_truth"}:
                raise ValueError(f"{where} must be {{prompt, ground_truth}}, got {one!r}")
            answers = tuple(dict.fromkeys(_answers(f"{where}.ground_truth", one["ground_truth"])))
            # In KnowEdit an answer may be empty, and then there is nothing to ask.
            if answers:
                prompt = one["prompt"]
                wordings = prompt if isinstance(prompt, list) else [prompt]
                yield from (Probe(name, i, wording, answers) for wording in wordings)


def _answers(where: str, value: Any) -> Iterator[str]:
    """The texts in lists, which may lie in lists: KnowEdit has an answer and its aliases so."""
    if isinstance(value, list):
        for one in value:
            yield from _answers(where, one)
    elif not isinstance(value, str):
        raise ValueError(f"{where} must be a text or a list of texts, got {value!r}")
    elif value.strip():
        yield value.strip()


# The published files spell the first one both ways.
_CRITERIA = {
    "Relation_Specificity": "Relation_Specificity",
    "Relation_Specifity": "Relation_Specificity",
    **{
        name: name
        for name in (
            "Logical_Generalization",
            "Subject_Aliasing",
            "Compositionality_I",
            "Compositionality_II",
            "Forgetfulness",
        )
    },
}


def from_ripple_edits(row: Mapping[str, Any], place: int) -> Record:
    """A record of RippleEdits (Cohen et al. 2023), checked.

    `case_id` is the row's place in the file. The sentence of the edit ends with its target, and the
    relation says where its subject is (`configs/facts/ripple-edits.yaml`). Each criterion is a
    probe set; condition queries must hold on the unedited model.

    Raises:
        ValueError: the first rule that the row breaks, with the key and value.
    """
    refuse_unread(row, {"edit", *_CRITERIA})
    edit = row["edit"]
    if not isinstance(edit, Mapping):
        raise ValueError(f"edit must be a mapping, got {edit!r}")
    refuse_unread(edit, {"previous_fact", "original_fact"})
    prompt, subject, target = _sentence("edit", edit)
    before = given(edit, "previous_fact", edit.get("original_fact"))
    true = None if before is None else _sentence("edit.previous_fact", before)
    if true and true[:2] != (prompt, subject):
        raise ValueError(f"edit and its previous fact must be of one subject, got {edit!r}")
    record = Record(
        case_id=place,
        relation_id=edit["relation"],
        prompt=prompt,
        subject=subject,
        target_new=target,
        target_true=true[2] if true else None,
        target_new_id=edit.get("target_id"),
        target_true_id=before.get("target_id") if before else None,
        paraphrase_prompts=(),
        neighborhood_prompts=(),
        attribute_prompts=(),
        generation_prompts=(),
        probes=tuple(probe for key in _CRITERIA if key in row for probe in _tests(key, row[key])),
    )
    record.check()
    return record


@cache
def _ripple_relations() -> dict[str, str]:
    """Relation -> its phrase, with `{}` for the subject; the target follows."""
    path = CONFIGS / "facts" / "ripple-edits.yaml"
    phrases: dict[str, str] = yaml.safe_load(path.read_text("utf-8"))
    return phrases


def _sentence(where: str, fact: Any) -> tuple[str, str, str]:
    """The phrase, subject and target of `{prompt, relation}`, whose prompt is a sentence."""
    if not isinstance(fact, Mapping):
        raise ValueError(f"{where} must be a mapping, got {fact!r}")
    check_text(f"{where}.prompt", fact.get("prompt"))
    phrase = _ripple_relations().get(str(fact.get("relation")))
    if phrase is None:
        raise ValueError(
            f"{where}.relation must be one of configs/facts/ripple-edits.yaml, "
            f"got {fact.get('relation')!r}"
        )
    begin, end = map(re.escape, phrase.split("{}"))
    found = re.fullmatch(rf"{begin}(.+?){end} (.+)\.", fact["prompt"], re.DOTALL)
    if found is None:
        raise ValueError(f"{where}.prompt must read '{phrase} TARGET.', got {fact['prompt']!r}")
    return phrase, found[1], found[2]


def _tests(key: str, tests: Any) -> Iterator[Probe]:
    if not isinstance(tests, list):
        raise ValueError(f"{key} must be a list of tests, got {tests!r}")
    for i, test in enumerate(tests):
        where = f"{key}[{i}]"
        if not isinstance(test, Mapping):
            raise ValueError(f"{where} must be a mapping, got {test!r}")
        refuse_unread(test, {"test_queries", "condition_queries"})
        roles: dict[Any, Role] = {"OR": "any", "AND": "all"}
        if test.get("test_condition") not in roles:
            raise ValueError(
                f"{where}.test_condition must be OR or AND, got {test.get('test_condition')!r}"
            )
        asked = [(query, roles[test["test_condition"]]) for query in prompts(test, "test_queries")]
        asked += [(query, "condition") for query in given(test, "condition_queries", [])]
        for query, role in asked:
            yield _query(where, key, i, query, role)


def _query(where: str, key: str, item: int, query: Any, role: Role) -> Probe:
    if not isinstance(query, Mapping) or not isinstance(query.get("answers"), list):
        raise ValueError(f"{where}: a query must be {{prompt, answers, ...}}, got {query!r}")
    answers: list[str] = []
    for one in query["answers"]:
        if not isinstance(one, Mapping) or not isinstance(one.get("aliases", []), list):
            raise ValueError(f"{where}: an answer must be {{value, aliases}}, got {one!r}")
        answers += _answers(f"{where}: an answer", [one.get("value"), *one.get("aliases", [])])
    return Probe(_CRITERIA[key], item, query.get("prompt", ""), tuple(dict.fromkeys(answers)), role)


_MQUAKE = {
    "requested_rewrite", "questions", "answer", "answer_alias", "new_answer", "new_answer_alias",
    "single_hops", "new_single_hops", "orig", "probes",
}  # fmt: skip


def from_mquake(row: Mapping[str, Any], place: int) -> Record:
    """A record of MQuAKE (Zhong et al. 2023, Section 3), checked: its requests edit one model.

    Probe sets, whose accuracies are the paper's (Section 4.1): `edit_wise`, each request's cloze;
    `instance_wise`, one item that wants all single-hop questions right; `multi_hop`, one item that
    wants any of the questions right.

    Raises:
        ValueError: the first rule that the row breaks, with the key and value.
    """
    refuse_unread(row, _MQUAKE)
    requests = [
        _request(f"requested_rewrite[{i}]", one)
        for i, one in enumerate(prompts(row, "requested_rewrite"))
    ]
    if not requests:
        raise ValueError("requested_rewrite must hold at least one request, got none")
    first = requests[0]
    record = Record(
        case_id=given(row, "case_id", place),
        relation_id=row["requested_rewrite"][0].get("relation_id"),
        prompt=first.prompt,
        subject=first.subject,
        target_new=first.target,
        target_true=first.target_true,
        target_new_id=row["requested_rewrite"][0]["target_new"].get("id"),
        target_true_id=row["requested_rewrite"][0]["target_true"].get("id"),
        paraphrase_prompts=(),
        neighborhood_prompts=(),
        attribute_prompts=(),
        generation_prompts=(),
        further=tuple(requests[1:]),
        probes=(
            *(Probe("edit_wise", i, one.text, (one.target,)) for i, one in enumerate(requests)),
            *_hops(row),
            *_questions(row),
        ),
    )
    record.check()
    return record


def _request(where: str, one: Any) -> Request:
    if not isinstance(one, Mapping):
        raise ValueError(f"{where} must be a mapping, got {one!r}")
    for name in ("target_new", "target_true"):
        if not isinstance(one.get(name), Mapping):
            raise ValueError(f"{where}.{name} must be a mapping with 'str', got {one.get(name)!r}")
        check_text(f"{where}.{name}.str", one[name].get("str"))
    for name in ("prompt", "subject"):
        check_text(f"{where}.{name}", one.get(name))
    return Request(
        one["prompt"], one["subject"], one["target_new"]["str"], one["target_true"]["str"]
    )


def _hops(row: Mapping[str, Any]) -> Iterator[Probe]:
    for i, hop in enumerate(prompts(row, "new_single_hops")):
        where = f"new_single_hops[{i}]"
        if not isinstance(hop, Mapping):
            raise ValueError(f"{where} must be a mapping, got {hop!r}")
        check_text(f"{where}.question", hop.get("question"))
        named = [hop.get("answer"), *given(hop, "answer_alias", [])]
        yield Probe("instance_wise", 0, hop["question"], _distinct(where, named), "all")


def _questions(row: Mapping[str, Any]) -> Iterator[Probe]:
    named = [row.get("new_answer"), *given(row, "new_answer_alias", [])]
    answers = _distinct("new_answer", named)
    yield from (Probe("multi_hop", 0, text, answers) for text in prompts(row, "questions"))


def _distinct(where: str, answers: list[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_answers(where, answers)))
