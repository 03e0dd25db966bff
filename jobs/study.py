"""python -m jobs.study make RUN_DIR... --out DIR [--records 50]; tally DIR ANSWERS...

Two editors' texts before human raters (Meng et al. 2022, Section 3.6 and Appendix J): which one is
more consistent with the edited fact, which one is more fluent. DIR/pages is what raters get; they
send back the file that the page saves. DIR/key.json says whose texts they were.
"""

from __future__ import annotations

from jobs.commands.study import app as app

if __name__ == "__main__":
    app()  # It comes back for what follows as a module.

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from rich.box import SIMPLE_HEAD
from rich.table import Table

from jobs import cli
from jobs.cli import say
from jobs.compare import read
from jobs.output.pages import packed, render
from jobs.runs.labels import UNEDITED
from rome import options
from rome.analysis.raters import verdict
from rome.data.results import OK
from rome.json_text import JsonError, parsed
from rome.options import ConfigError

QUESTIONS = {
    "consistent": "Which text is more consistent with the fact?",
    "fluent": "Which text is more fluent: natural, grammatical, not repeating itself?",
}
SAME = "same"
KEY = "key.json"
_SIDES = ("1", "2")
_CHECK_WORDS = 40
_PAIR_SECONDS = 45  # To read two texts and answer.
# ChatML's and Llama 3's, Mistral's, Gemma's.
_CHAT_TOKENS = re.compile(
    r"<\|[^|<>]*\|>|</?s>|\[/?INST\]|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>"
)


def make(
    run_dirs: Sequence[str], a: str | None, b: str | None, records: int, checks: int, seed: int
) -> tuple[str, dict[str, Any]]:
    """The rating page and its key, the same for the same arguments.

    `a`, `b`: labels as of `jobs.compare.read`; None where the runs have two edited editors. Each
    item shows a record's fact and one text of either, of the same generation prompt; which record,
    prompt, side and place is drawn by `seed`. `checks` items test attention: one text states the
    fact, the other is the shuffled words of a text about something else.

    Raises ValueError where the editors are not clear, or have fewer records with texts in common.
    """
    rows = read(run_dirs).filter(pl.col("status") == OK, pl.col("texts").list.len() > 0)
    a, b = _editors(rows, a, b)
    both = rows.filter(label=a).join(
        rows.filter(label=b).select("case_id", other="texts"), on="case_id"
    )
    found = both.sort("case_id").to_dicts()
    if not max(records, checks, 2) <= len(found):
        raise ValueError(
            f"{a} and {b} have texts of {len(found)} records in common, fewer than the "
            f"{max(records, checks, 2)} that the study needs; ask for fewer --records"
        )
    draw = random.Random(seed)
    chosen = draw.sample(found, records)
    items = [_item(row, draw) for row in chosen]
    items += [_check(row, other, draw) for row, other in _two(found, checks, draw)]
    draw.shuffle(items)
    for place, (shown, _) in enumerate(items):
        shown["item"] = place
    study = f"{draw.getrandbits(64):016x}"
    page = {"study": study, "items": [shown for shown, _ in items]}
    key = {"study": study, "a": a, "b": b, "seed": seed, "items": [key for _, key in items]}
    data = json.dumps(page, ensure_ascii=False).encode()
    count = len(page["items"])
    minutes = max(1, round(count * _PAIR_SECONDS / 60))
    html = render("study", questions=QUESTIONS, count=count, minutes=minutes, items=packed(data))
    return html, key


def _editors(rows: pl.DataFrame, a: str | None, b: str | None) -> tuple[str, str]:
    labels = rows["label"].unique(maintain_order=True).to_list()
    a, b = (UNEDITED if name == "none" else name for name in (a, b))
    edited = rows.filter(pl.col("editor") != "none")["label"].unique(maintain_order=True).to_list()
    if a is None and b is None and len(edited) in (1, 2):
        a, b = edited if len(edited) == 2 else (edited[0], UNEDITED)
    elif a is not None and b is None:
        b = UNEDITED
    if a is None or b is None or a == b or not {a, b} <= set(labels):
        raise ValueError(
            f"a study compares two editors that have texts; choose --a and --b among "
            f"{', '.join(labels) or 'none'}, got {a} and {b}"
        )
    return a, b


Item = tuple[dict[str, Any], dict[str, Any]]


def _item(row: dict[str, Any], draw: random.Random) -> Item:
    place = draw.randrange(min(len(row["texts"]), len(row["other"])))
    texts = {"a": _plain(row["texts"][place]), "b": _plain(row["other"][place])}
    sides = draw.sample(["a", "b"], 2)
    key = {"case_id": row["case_id"], "sides": sides}
    return {"fact": _fact(row), "texts": [texts[side] for side in sides]}, key


def _two(
    found: Sequence[dict[str, Any]], count: int, draw: random.Random
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(pair[0], pair[1]) for pair in (draw.sample(found, 2) for _ in range(count))]


def _check(row: dict[str, Any], other: dict[str, Any], draw: random.Random) -> Item:
    words = _plain(other["texts"][0]).split()[:_CHECK_WORDS]
    draw.shuffle(words)
    fact = _fact(row)
    right = draw.choice(_SIDES)
    texts = [fact + ".", " ".join(words)] if right == "1" else [" ".join(words), fact + "."]
    return {"fact": fact, "texts": texts}, {"case_id": row["case_id"], "check": right}


def _plain(text: str) -> str:
    """A text without the tokens of a chat, which would tell models apart."""
    return _CHAT_TOKENS.sub("", text).strip()


def _fact(row: dict[str, Any]) -> str:
    return f"{row['prompt'].replace('{}', row['subject'])} {row['target_new']}"


def tally(key: dict[str, Any], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tally the answers of raters, without those who fail an attention check.

    Per question of QUESTIONS: see `rome.analysis.raters.verdict`. And `raters` and `left_out`,
    their names.

    Raises ValueError where answers are of another study, not complete, or two are of one rater.
    """
    votes, left_out = {}, []
    for answer in answers:
        rater = _checked(key, answer)
        if rater in votes or rater in left_out:
            raise ValueError(f"there are two answers by {rater!r}; keep one of the files")
        given = answer["answers"]
        if all(
            given[i][question] == item["check"]
            for i, item in enumerate(key["items"])
            if "check" in item
            for question in QUESTIONS
        ):
            votes[rater] = given
        else:
            left_out.append(rater)
    if not votes:
        raise ValueError(f"no rater passed the attention checks; left out: {', '.join(left_out)}")
    rated = [(i, item) for i, item in enumerate(key["items"]) if "sides" in item]
    result: dict[str, Any] = {"raters": list(votes), "left_out": left_out, "records": len(rated)}
    for question in QUESTIONS:
        votes_RI = np.array(
            [
                [_choice(given[i][question], item["sides"]) for i, item in rated]
                for given in votes.values()
            ]
        )
        result[question] = verdict(votes_RI)
    return result


def _checked(key: dict[str, Any], answer: dict[str, Any]) -> str:
    """The rater of a whole answer to this study."""
    rater, where = str(answer.get("rater")), f"{answer['file']}: " if "file" in answer else ""
    if answer.get("study") != key["study"]:
        raise ValueError(
            f"{where}the answers of {rater!r} are of study {answer.get('study')}, not "
            f"{key['study']}; give the DIR that their page is from"
        )
    given, allowed = answer.get("answers"), [*_SIDES, SAME]
    if (
        not isinstance(given, list)
        or len(given) != len(key["items"])
        or not all(isinstance(one, dict) for one in given)
        or any(one.get(question) not in allowed for one in given for question in QUESTIONS)
    ):
        raise ValueError(
            f"{where}the answers of {rater!r} must be {len(key['items'])}, each with "
            f"{', '.join(QUESTIONS)} among {', '.join(sorted(allowed))}; ask for the file again"
        )
    return rater


def _choice(side: str, sides: Sequence[str]) -> int:
    """0 for editor a, 1 for b, 2 for the same."""
    return 2 if side == SAME else "ab".index(sides[int(side) - 1])


def make_command(
    run_dirs: list[str],
    out: Path,
    a: str | None = None,
    b: str | None = None,
    records: int = 50,
    checks: int = 4,
    seed: int = 0,
) -> None:
    """See `jobs.commands.study`."""
    with cli.errors():
        if (out / KEY).exists():
            raise ValueError(f"{out} holds a study, whose key answers may need; choose another")
        page, key = make(run_dirs, a, b, records, checks, seed)
        (out / "pages").mkdir(parents=True, exist_ok=True)
        (out / "pages" / "index.html").write_text(page, "utf-8")
        (out / KEY).write_text(json.dumps(key, indent=1), "utf-8")
    say(f"for raters: {out / 'pages' / 'index.html'}; not for raters: {out / KEY}")


def tally_command(study: Path, files: list[Path]) -> None:
    """See `jobs.commands.study`."""
    with cli.errors():
        key = _key(study / KEY)
        result = tally(key, [_read(file) for file in files])
    a, b = key["a"], key["b"]
    columns = ("Which is more", a, b, "Same", f"{a} / {b}", "95 %", "Fleiss' kappa")
    table = Table(*columns, box=SIMPLE_HEAD)
    for question in QUESTIONS:
        row = result[question]
        table.add_row(
            question,
            *(str(row[name]) for name in ("a", "b", SAME)),
            _number(row["ratio"]),
            f"{_number(row['low'])} to {_number(row['high'])}",
            _number(row["kappa"]),
        )
    cli.print_table(table)
    say(f"{len(result['raters'])} raters, {result['records']} records")
    if result["left_out"]:
        say(f"left out, for they failed an attention check: {', '.join(result['left_out'])}")


@dataclass(frozen=True)
class _KeyItem:
    case_id: int
    sides: list[Literal["a", "b"]] | None = None
    check: Literal["1", "2"] | None = None

    def __post_init__(self) -> None:
        if (self.check is None) == (sorted(self.sides or []) != ["a", "b"]):
            raise ValueError("it must have either both sides or a check")


@dataclass(frozen=True)
class _Key:
    study: str
    a: str
    b: str
    seed: int
    items: list[_KeyItem]


def _key(file: Path) -> dict[str, Any]:
    """The key that `make` wrote. Raises ValueError where it is not whole."""
    try:
        key: dict[str, Any] = parsed(file.read_bytes())
        options.validate(_Key, key, "")
    except (JsonError, ConfigError) as error:
        raise ValueError(
            f"{file} is damaged ({error}); restore it: without it the answers say nothing"
        ) from None
    return key


def _read(file: Path) -> dict[str, Any]:
    try:
        answer = parsed(file.read_bytes())
    except JsonError as error:
        raise ValueError(f"{file} is damaged ({error}); ask the rater for it again") from None
    if not isinstance(answer, dict):
        raise ValueError(f"{file} must hold a rater's answers, got a {type(answer).__name__}")
    return {**answer, "file": str(file)}


def _number(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.2f}"
