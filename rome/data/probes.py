"""Probe sets: questions of one's own about a record, under any names.

A set holds items. An item is right if one of its `any` questions is answered right, if it has
some, and all of its `all` questions are. One with `condition` questions counts only where the
unedited model answers these right (RippleEdits: Cohen et al. 2023, Section 3).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa

from rome.data.texts import check_bare, check_text

Role = Literal["any", "all", "condition"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
# A set's metrics are columns, of which these are others.
_ENDINGS = ("_strict", "_wild", "_n", "_low", "_high", "_half_width")
_KEYS = {"prompt", "prompts", "target", "aliases"}

PROBE_FIELDS = [
    pa.field("set", pa.string()),
    pa.field("item", pa.int32()),
    pa.field("role", pa.string()),
    pa.field("prompt", pa.string()),
    pa.field("answers", pa.list_(pa.string())),
]


@dataclass(frozen=True)
class Probe:
    """One question of an item of a set."""

    set: str
    item: int
    """Within its set, from 0."""
    prompt: str
    answers: tuple[str, ...]
    """Any of them is right: the target, then its aliases."""
    role: Role = "any"

    def check(self) -> None:
        """Raises ValueError with the first rule of a probe that this one breaks."""
        check_set(self.set)
        where = f"probes.{self.set}[{self.item}]"
        check_text(f"{where}: prompt", self.prompt)
        if not self.answers:
            raise ValueError(f"{where}: a probe must have a target, got none")
        for answer in self.answers:
            check_bare(f"{where}: target and aliases", answer)
        if self.role not in ("any", "all", "condition"):
            raise ValueError(f"{where}: role must be any, all or condition, got {self.role!r}")


def check_set(name: object) -> None:
    """Raises ValueError where a set cannot have this name, which becomes one of columns."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith(_ENDINGS):
        raise ValueError(
            "the name of a probe set must be of letters, digits, _ and -, at most 60, and must not "
            f"end with {', '.join(_ENDINGS)}; got {name!r}"
        )


def worded(probe: Probe, templates: Mapping[str, str]) -> Probe:
    """The probe with the text of its set around its prompt, such as examples before a question."""
    template = templates.get(probe.set)
    return replace(probe, prompt=template.replace("{}", probe.prompt)) if template else probe


def check_templates(templates: Mapping[str, Any]) -> None:
    """Raises ValueError where a template has not exactly one `{}`, where the prompt goes."""
    for name, text in templates.items():
        check_set(name)
        check_text(f"the template of {name}", text)
        if text.count("{}") != 1:
            raise ValueError(
                f"the template of {name} must hold exactly one '{{}}', where the prompt goes, got "
                f"{text[-100:]!r}"
            )


def given(row: Mapping[str, Any]) -> tuple[Probe, ...]:
    """The probes of a row's key `probes`: set -> list of {prompt or prompts, target, aliases}.

    `prompts` are several wordings, of which any one suffices. A set that is null, as a table has
    it for rows without, is none. Raises ValueError with the set and key.
    """
    sets = row.get("probes")
    if sets is None:
        return ()
    if not isinstance(sets, Mapping):
        raise ValueError(f"probes must map names of sets to lists of questions, got {sets!r}")
    return tuple(probe for name, items in sets.items() for probe in _of_set(name, items))


def _of_set(name: Any, items: Any) -> Iterator[Probe]:
    check_set(name)
    if items is None:
        return
    if not isinstance(items, list):
        raise ValueError(f"probes.{name} must be a list of questions, got {items!r}")
    for i, item in enumerate(items):
        yield from _of_item(name, i, item)


def _of_item(name: str, i: int, item: Any) -> Iterator[Probe]:
    where = f"probes.{name}[{i}]"
    if not isinstance(item, Mapping) or (item.keys() - _KEYS):
        raise ValueError(f"{where} must be a mapping with the keys {sorted(_KEYS)}, got {item!r}")
    one, several = item.get("prompt"), item.get("prompts")
    if (one is None) == (several is None) or not isinstance(several or [], list):
        raise ValueError(f"{where} must have a prompt, or a list of prompts, got {item!r}")
    aliases = item.get("aliases") or []
    if not isinstance(aliases, list):
        raise ValueError(f"{where}: aliases must be a list, got {aliases!r}")
    answers = tuple(dict.fromkeys([item.get("target"), *aliases]))
    wordings: list[Any] = [one] if several is None else several
    for prompt in wordings:
        probe = Probe(name, i, prompt, answers)
        probe.check()
        yield probe
