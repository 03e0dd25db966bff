"""COUNTERFACT-style records from a table of facts (Meng et al. 2022, Appendix D).

A table holds relations; a relation holds facts (subject -> object) and templates, each with one
`{}` for the subject and worded so that the object follows directly after a space. Every draw is
keyed by (seed, relation, subject), so that a fact keeps its draws wherever it stands in the table.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, cycle, islice
from typing import Any

from rome.data.probes import Probe
from rome.data.records import LIST_SIZES, Record
from rome.data.texts import check_whole, one_form

_SEED = "facts-1"


@dataclass(frozen=True)
class ReferenceText:
    """A text about `name`, whose `relation_id` has the object `target_id`; RS compares with it."""

    relation_id: str
    target_id: str
    name: str
    text: str


@dataclass(frozen=True)
class Fact:
    """One row of a table; `where` names it in messages."""

    where: str
    subject: Any
    object: Any

    def check(self, taken: Mapping[str, str]) -> None:
        """Raises ValueError where the fact is malformed or its subject was `taken` before, which
        maps subjects in one form to their objects."""
        for name, value in (("subject", self.subject), ("object", self.object)):
            if not isinstance(value, str) or not value or value != value.strip():
                raise ValueError(
                    f"{name} must be text without white space around it "
                    f"(quote numbers, yes and no in YAML), got {value!r}"
                )
            check_whole(name, value)
        if one_form(self.subject) in taken:
            raise ValueError(
                f"subject {self.subject!r} must appear once in its relation, but already has the "
                f"object {taken[one_form(self.subject)]!r}"
            )


@dataclass(frozen=True)
class ProbeTemplate:
    """A question about the edited facts of a relation, in texts with `{subject}` and `{object}`,
    the new one."""

    set: str
    prompt: str
    target: str
    aliases: Sequence[str] = ()
    subject: str | None = None
    """Only of this subject."""
    object: str | None = None
    """Only of facts whose new object this is."""

    def suits(self, subject: str, target: str) -> bool:
        return self.subject in (None, subject) and self.object in (None, target)

    def asked(self, item: int, subject: str, target: str) -> Probe:
        def filled(text: str) -> str:
            return text.replace("{subject}", subject).replace("{object}", target)

        answers = dict.fromkeys(map(filled, (self.target, *self.aliases)))
        probe = Probe(self.set, item, filled(self.prompt), tuple(answers))
        probe.check()
        return probe


@dataclass
class Relation:
    """The first template is the one that edits; the others word paraphrases and neighbours.

    `generation` are open prompts about the subject, `statements` sentences with `{subject}` and
    `{object}` that become reference texts. Both fall back to the templates.
    """

    id: str
    templates: Sequence[str]
    generation: Sequence[str] = ()
    statements: Sequence[str] = ()
    facts: list[Fact] = field(default_factory=list)
    probes: list[ProbeTemplate] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generation = self.generation or self.templates
        self.statements = self.statements or [
            template.replace("{}", "{subject}") + " {object}." for template in self.templates
        ]
        if not self.templates:
            raise ValueError(f"relation {self.id!r} needs at least one template")
        for template in chain(self.templates, self.generation):
            if template.count("{}") != 1 or template != template.rstrip():
                raise ValueError(
                    f"relation {self.id!r}: a template must contain exactly one '{{}}' and must "
                    f"not end with white space, got {template!r}"
                )


@dataclass(frozen=True)
class FactTable:
    """Relations with their facts, and the sentences that stand in front of paraphrases.

    bad: what is wrong with rows that could not be read.
    """

    relations: Sequence[Relation]
    distractors: Sequence[str]
    bad: Sequence[str] = ()


def build(
    table: FactTable, distractors: Sequence[str]
) -> tuple[list[Record], list[ReferenceText], list[str]]:
    """Records, reference texts, and what is wrong with the facts that could not be used.

    Records come in an order drawn from the facts themselves, so that the first n are a sample of
    all relations; `case_id` is the place in it. `distractors` serve a table that brings none.

    Raises:
        ValueError: a relation in which all facts have the same object has no counterfactuals.
    """
    invalid = list(table.bad)
    cases = []
    texts: list[ReferenceText] = []
    for relation in table.relations:
        objects = _usable(relation, invalid)
        if objects and len(set(objects.values())) < 2:
            raise ValueError(
                f"relation {relation.id!r} has the one object {next(iter(objects.values()))!r}: "
                "a counterfactual needs facts with at least two different objects"
            )
        cases += [_case(relation, objects, s, table.distractors or distractors) for s in objects]
        texts += _reference_texts(relation, objects)
    cases.sort(key=lambda case: _digest(str(case["relation_id"]), str(case["subject"])))
    return [Record(case_id=i, **case) for i, case in enumerate(cases)], texts, invalid


def _usable(relation: Relation, invalid: list[str]) -> dict[str, str]:
    """Subject -> object of the sound facts; messages about the others go to `invalid`.

    An object that is spelt in two Unicode forms is one, as it was spelt first.
    """
    objects: dict[str, str] = {}
    taken: dict[str, str] = {}
    spelt: dict[str, str] = {}
    for fact in relation.facts:
        try:
            fact.check(taken)
        except ValueError as error:
            invalid.append(f"{fact.where}: {error}")
        else:
            taken[one_form(fact.subject)] = fact.object
            objects[fact.subject] = spelt.setdefault(one_form(fact.object), fact.object)
    return objects


def _case(
    relation: Relation, objects: Mapping[str, str], subject: str, distractors: Sequence[str]
) -> dict[str, Any]:
    """The fields of a Record, less `case_id`."""
    true = objects[subject]
    draw = random.Random(_digest(relation.id, subject))
    new = draw.choice(sorted(set(objects.values()) - {true}))

    def about(target: str, kind: str) -> tuple[str, ...]:
        others = sorted(s for s, o in objects.items() if o == target and s != subject)
        return tuple(islice(_spread(others, relation.templates, draw), LIST_SIZES[kind]))

    wordings = _shuffled(relation.templates[1:] or relation.templates, draw)
    fronts = _shuffled(distractors, draw)
    prompts = _shuffled(relation.generation, draw)
    suited = [one for one in relation.probes if one.suits(subject, new)]
    places = {name: count() for name in {one.set for one in suited}}
    return {
        "relation_id": relation.id,
        "prompt": relation.templates[0],
        "subject": subject,
        "target_new": new,
        "target_true": true,
        "target_new_id": new,
        "target_true_id": true,
        "paraphrase_prompts": tuple(
            f"{front} {wording.replace('{}', subject)}"
            for front, wording in islice(
                zip(cycle(fronts), cycle(wordings), strict=False), LIST_SIZES["paraphrase_prompts"]
            )
        ),
        "neighborhood_prompts": about(true, "neighborhood_prompts"),
        "attribute_prompts": about(new, "attribute_prompts"),
        "probes": tuple(one.asked(next(places[one.set]), subject, new) for one in suited),
        "generation_prompts": tuple(
            prompt.replace("{}", subject)
            for prompt in islice(cycle(prompts), LIST_SIZES["generation_prompts"])
        ),
    }


def _spread(
    subjects: Iterable[str], templates: Sequence[str], draw: random.Random
) -> Iterator[str]:
    """Every subject in every template once: all subjects before one comes again."""
    turns = [(s, _shuffled(templates, draw)) for s in _shuffled(subjects, draw)]
    for i in range(len(templates)):
        yield from (wordings[i].replace("{}", subject) for subject, wordings in turns)


def _reference_texts(relation: Relation, objects: Mapping[str, str]) -> Iterator[ReferenceText]:
    for subject, target in objects.items():
        for statement in relation.statements:
            text = statement.replace("{subject}", subject).replace("{object}", target)
            yield ReferenceText(relation.id, target, subject, text)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join((_SEED, *parts)).encode()).hexdigest()


def _shuffled(items: Iterable[str], draw: random.Random) -> list[str]:
    shuffled = list(items)
    draw.shuffle(shuffled)
    return shuffled
