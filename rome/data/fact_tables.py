"""Tables of facts from YAML and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from rome import yaml_text
from rome.data.facts import Fact, FactTable, ProbeTemplate, Relation
from rome.data.probes import check_set
from rome.data.texts import check_text

_LIST_KEYS = ("templates", "generation", "statements")
_PROBE_KEYS = {"prompt", "target", "aliases", "subject", "object"}
_PROBES = "probes:"
_GIVES = " -> "
_COLUMNS = {"relation", "templates", "subject", "object"}


def read_yaml(data: bytes) -> FactTable:
    """A table of the form of `configs/facts/everyday.yaml`.

    Raises:
        ValueError: with the relation and the rule that it breaks.
    """
    table = yaml_text.load(data, only_text=True)
    if not isinstance(table, dict) or not isinstance(table.get("relations"), list):
        raise ValueError("a fact table must be a mapping with a list 'relations'")
    relations = [_relation(i, entry) for i, entry in enumerate(table["relations"], 1)]
    return FactTable(relations, _texts("the table", "distractors", table.get("distractors", [])))


def read_csv(data: bytes) -> FactTable:
    """A table with the columns relation, templates (separated by `|`), subject, object.

    A column `probes:SET` holds a question about its row's fact and what is right, as in
    `{subject} speaks -> {object}|alias`; `{object}` is the new one. An empty cell asks nothing.

    The templates of a relation stand in its first row; later rows repeat them or leave them empty.

    Raises:
        ValueError: with the line.
    """
    rows = _csv_rows(data)
    header = [name.strip() for name in next(rows, (1, []))[1]]
    if missing := _COLUMNS - set(header):
        raise ValueError(
            f"a fact table must have the columns {sorted(_COLUMNS)}, no {sorted(missing)}"
        )
    sets = [name for name in header if name.startswith(_PROBES)]
    for name in sets:
        check_set(name.removeprefix(_PROBES))
    if len(set(header)) < len(header):
        raise ValueError(f"line 1: a column must stand once, got {header}")
    relations: dict[str, Relation] = {}
    bad = []
    for line, cells in rows:
        try:
            row = _csv_row(header, cells)
        except ValueError as error:
            bad.append(f"line {line}: {error}")
            continue
        name = row["relation"]
        templates = [part.strip() for part in row["templates"].split("|") if part.strip()]
        try:
            relation = relations.get(name) or Relation(name, templates)
        except ValueError as error:
            bad.append(f"line {line}: {error}")
            continue
        if templates and templates != relation.templates:
            raise ValueError(
                f"line {line}: relation {name!r} already has the templates {relation.templates}, "
                f"got {templates}"
            )
        try:
            asked = [_csv_probe(column, row) for column in sets if row[column]]
        except ValueError as error:
            bad.append(f"line {line}: {error}")
            continue
        relation.probes += asked
        relations[name] = relation
        relation.facts.append(Fact(f"line {line}", row["subject"], row["object"]))
    return FactTable(list(relations.values()), (), bad)


def _csv_rows(data: bytes) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, with the line that each begins in.

    Every kind of line end is one, also within quotes. Raises ValueError with the line where quotes
    are not closed, or stand beside what they should enclose.
    """
    text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if any("\n" in cell for cell in cells):
                    raise ValueError(
                        f"line {line}: a cell must be of one line, but a quote here opens one that "
                        f'ends in line {reader.line_num}; write a quote as ""'
                    )
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"line {line}: {error}; put a cell with a comma or a quote in quotes, and write a "
            'quote in it as ""'
        ) from error


def _csv_row(header: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    """The cells by column. Raises ValueError where there are more or fewer than columns."""
    if len(cells) != len(header):
        raise ValueError(
            f"there must be {len(header)} cells, one for each of {list(header)}, got "
            f"{len(cells)}: {list(cells)}; put a cell with a comma in quotes"
        )
    row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    if not row["relation"]:
        raise ValueError("relation must not be empty")
    return row


def _csv_probe(column: str, row: dict[str, str]) -> ProbeTemplate:
    prompt, gives, right = row[column].partition(_GIVES)
    target, *aliases = [part.strip() for part in right.split("|")]
    if not gives or not prompt.strip() or not all([target, *aliases]):
        raise ValueError(f"{column} must read 'PROMPT{_GIVES}TARGET|ALIAS', got {row[column]!r}")
    name = column.removeprefix(_PROBES)
    return ProbeTemplate(name, prompt.strip(), target, aliases, subject=row["subject"])


def _relation(number: int, entry: Any) -> Relation:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        raise ValueError(f"relation {number} must be a mapping with an 'id'")
    where = f"relation {entry['id']!r}"
    if unknown := entry.keys() - {"id", "facts", "probes", *_LIST_KEYS}:
        raise ValueError(f"{where} has unknown keys {sorted(unknown)}")
    facts = entry.get("facts")
    if not isinstance(facts, dict) or not all(isinstance(v, list) for v in facts.values()):
        raise ValueError(
            f"{where}: facts must map each object to a list of subjects, got {facts!r}"
        )
    return Relation(
        entry["id"],
        **{key: _texts(where, key, entry.get(key, [])) for key in _LIST_KEYS},
        facts=[Fact(f"{where}, {s!r}", s, o) for o, subjects in facts.items() for s in subjects],
        probes=list(_probes(where, entry.get("probes", {}))),
    )


def _probes(where: str, sets: Any) -> Iterator[ProbeTemplate]:
    if not isinstance(sets, dict) or not all(isinstance(items, list) for items in sets.values()):
        raise ValueError(f"{where}: probes must map sets to lists of questions, got {sets!r}")
    for name, items in sets.items():
        check_set(name)
        for i, item in enumerate(items):
            at = f"{where}: probes.{name}[{i}]"
            if not isinstance(item, dict) or not {"prompt", "target"} <= item.keys() <= _PROBE_KEYS:
                raise ValueError(
                    f"{at} must have prompt and target, and may have aliases, subject and object; "
                    f"got {item!r}"
                )
            texts = {key: value for key, value in item.items() if key != "aliases"}
            for key, text in texts.items():
                check_text(f"{at}.{key}", text)
            aliases = _texts(at, "aliases", item.get("aliases", []))
            yield ProbeTemplate(set=name, aliases=aliases, **texts)


def _texts(where: str, key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"{where}: {key} must be a list of texts, got {value!r}")
    return value
