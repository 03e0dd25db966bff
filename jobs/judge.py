"""python -m jobs.judge RUN_DIR --endpoint URL --model NAME [--prompt FILE]

Ask a model behind an OpenAI-compatible server whether the texts that a run kept (`scoring.wild`)
are right. Its verdicts are columns with its name, which jobs.reduce and the others show.
"""

from __future__ import annotations

from jobs.commands.judge import app as app

if __name__ == "__main__":
    app()  # It comes back for what follows as a module.

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import typer
from rich.progress import Progress

from cluster.lock import LockedError, RunLock
from cluster.store import Store
from jobs import cli
from jobs.cli import CONSOLE, say
from jobs.inputs.chat_server import ChatServer, NoReplyError
from jobs.output.report_data import read_prompts
from jobs.reduce import reduce, show
from jobs.runs import differences, manifests
from jobs.runs.parts import JUDGES, KEYS, collect, write_table
from rome import options
from rome.data.answers import until_stop
from rome.data.probes import check_set
from rome.data.results import OK, TOLD_KINDS
from rome.paths import CONFIGS
from rome.settings import configurable

_TOGETHER = 256
"""Questions of a batch, whose replies are then in the store."""
_IN_A_ROW = 20
"""So many without a reply, and the server is taken for dead."""
_TAKEN = {"strict", "wild", "tokens", "plus"}
_FIELDS = ("question", "target", "text")


@configurable(kw_only=True, max_tokens=1)
class JudgePrompt:
    """A file of configs/judges."""

    prompt: str
    right: str
    wrong: str
    max_tokens: int = 16

    def __post_init__(self) -> None:
        if missing := [name for name in _FIELDS if f"{{{name}}}" not in self.prompt]:
            raise ValueError(f"prompt must hold {{{missing[0]}}}")

    def filled(self, asked: Asked) -> str:
        values = {"question": asked.question, "target": asked.target, "text": asked.text}
        return re.sub(r"\{(question|target|text)\}", lambda found: values[found[1]], self.prompt)

    def verdict(self, reply: str | None) -> float | None:
        """1 or 0 by the first word of a reply, None where it is neither."""
        word = re.search(r"\w+", reply or "")
        known = {self.right.lower(): 1.0, self.wrong.lower(): 0.0}
        return known.get(word[0].lower()) if word else None


@dataclass(frozen=True)
class Asked:
    """A text to judge."""

    question: str
    target: str
    text: str


def judge(run_dir: str, server: ChatServer, form: JudgePrompt, name: str) -> int:
    """Ask about all kept texts that were not asked about, and write the verdicts of all.

    `RUN_DIR/judges/NAME/` holds the replies by the content of their question: what is there is not
    asked again, and the same text is asked once. `RUN_DIR/judges/NAME.parquet` holds the verdicts.
    Returns how many texts got no reply. Raises ValueError where the run kept no texts, where
    another judge has this name, or where the server refuses or is dead.
    """
    check_set(name)
    if name in _TAKEN:
        raise ValueError(f"a judge must not be named {name}, which is a protocol; give --name")
    store = Store(run_dir)
    manifest = manifests.read(store)
    rows = collect(store, _told)
    if rows.is_empty():
        raise ValueError(
            f"{run_dir} kept no texts to judge: make the run with --set scoring.wild.form=plain"
        )
    prompts_of, _ = read_prompts({store.uri: manifest})
    rows = rows.join(prompts_of, on="case_id", how="left", maintain_order="left")
    home = store.sub(f"{JUDGES}{name}")
    with RunLock(home):
        _claim(home, {"model": server.model, **vars(form)})
        texts = [dict(_asked(row)) for row in rows.iter_rows(named=True)]
        prompts = dict.fromkeys(form.filled(one) for row in texts for one in row.values())
        replies, lost = _replies(home, server, list(prompts))
        verdicts = [
            {place: form.verdict(replies.get(form.filled(one))) for place, one in row.items()}
            for row in texts
        ]
        write_table(store, f"{JUDGES}{name}.parquet", _columns(rows, verdicts, name))
    unclear = sum(form.verdict(reply) is None for reply in replies.values())
    say(f"{name}: {len(prompts):,} questions, {lost:,} without a reply, {unclear:,} not clear")
    return lost


def _told(rows: pl.LazyFrame) -> pl.DataFrame:
    """The rows with kept texts."""
    columns = rows.collect_schema().names()
    kept = [f"{kind}_wild" for kind in TOLD_KINDS]
    if not set(kept) <= set(columns):
        return pl.DataFrame()
    wanted = [*KEYS, "prompt", "subject", "target_new", "target_true", "neighborhood_targets",
              "further", "probes", *kept]  # fmt: skip
    told = (pl.col("status") == OK) & pl.any_horizontal(pl.col(kept).is_not_null())
    return rows.filter(told).select(wanted).collect()


Place = tuple[str, int]


def _asked(row: Mapping[str, Any]) -> Iterator[tuple[Place, Asked]]:
    """The texts of a row: by kind, and the place in its list."""
    for kind, pairs in _pairs(row).items():
        for i, text in enumerate(row[f"{kind}_wild"] or []):
            question, target = pairs[i]
            yield (kind, i), Asked(question, target, until_stop(text, target))
    for i, probe in enumerate(row["probes"] or []):
        if probe["wild"] is not None:
            known = probe["answers"]
            text = until_stop(probe["wild"], *known)
            yield ("probes", i), Asked(probe["prompt"], " or ".join(known), text)


def _pairs(row: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    new, further = row["target_new"], row["further"] or []
    requests = [{"prompt": row["prompt"], "subject": row["subject"], "target": new}, *further]
    rephrased, local = row["paraphrase_prompts"], row["neighborhood_prompts"]
    if rephrased is None or local is None:
        raise ValueError(
            f"the prompts of case {row['case_id']} are in the record store of the run, which is "
            "not where the manifest says: restore it"
        )
    true = row["neighborhood_targets"] or [row["target_true"]] * len(local)
    return {
        "rewrite": [
            (one["prompt"].replace("{}", one["subject"]), one["target"]) for one in requests
        ],
        "paraphrase": [(prompt, new) for prompt in rephrased],
        "neighborhood": list(zip(local, true, strict=True)),
    }


def _claim(home: Store, who: dict[str, Any]) -> None:
    """Write who the judge is, or see that it is the one that is there."""
    if home.exists("judge.json"):
        there = json.loads(home.read_bytes("judge.json"))
        differences.refuse_another(
            home.uri, there, who, "judge; or give this one a --name of its own"
        )
    home.write_bytes("judge.json", json.dumps(who, indent=1, ensure_ascii=False).encode())


def _replies(home: Store, server: ChatServer, prompts: Sequence[str]) -> tuple[dict[str, str], int]:
    """The replies by prompt, those of earlier calls too, and how many have none."""
    keys = {prompt: _key(server, prompt) for prompt in prompts}
    parts = home.list("replies-", ".parquet")
    known: dict[str, str] = {}
    for part in parts:
        table = home.read_table(part)
        known |= zip(table["key"].to_pylist(), table["reply"].to_pylist(), strict=True)
    left = [prompt for prompt in prompts if keys[prompt] not in known]
    number = len(parts)
    in_a_row = 0
    with (
        Progress(console=CONSOLE) as progress,
        ThreadPoolExecutor(server.concurrency) as threads,
    ):
        bar = progress.add_task("judge", total=len(left))
        for start in range(0, len(left), _TOGETHER):
            batch = left[start : start + _TOGETHER]
            asked = {threads.submit(server.reply, prompt): prompt for prompt in batch}
            found: dict[str, str] = {}
            try:
                for one in as_completed(asked):
                    progress.advance(bar)
                    try:
                        found[keys[asked[one]]] = one.result()
                        in_a_row = 0
                    except NoReplyError as error:
                        in_a_row += 1
                        if in_a_row >= _IN_A_ROW:
                            raise ValueError(
                                f"the server gave no reply {in_a_row} times in a row, at last: "
                                f"{error}; what it replied is kept, and the same line goes on"
                            ) from None
            finally:
                for one in asked:
                    one.cancel()
                if found:
                    columns = {"key": list(found), "reply": list(found.values())}
                    home.write_table(f"replies-{number:05d}.parquet", pa.table(columns))
                    number += 1
            known |= found
    replies = {prompt: known[key] for prompt, key in keys.items() if key in known}
    return replies, len(prompts) - len(replies)


def _key(server: ChatServer, prompt: str) -> str:
    """The content of a question: model, prompt, and how it is sampled."""
    return hashlib.sha256(json.dumps(server.asked(prompt), sort_keys=True).encode()).hexdigest()


def _columns(
    rows: pl.DataFrame, verdicts: Sequence[Mapping[Place, float | None]], name: str
) -> pl.DataFrame:
    """The verdicts, a list per kind, beside the keys of their rows."""
    columns = {}
    for kind in (*TOLD_KINDS, "probes"):
        texts = rows["probes" if kind == "probes" else f"{kind}_wild"].to_list()
        lengths = [len(some or []) for some in texts]
        lists = [
            [row.get((kind, i)) for i in range(length)] or None
            for row, length in zip(verdicts, lengths, strict=True)
        ]
        columns[f"{kind}_judge_{name}"] = pl.Series(lists, dtype=pl.List(pl.Float64))
    return rows.select(KEYS).with_columns(**columns)


def _prompt(path: str | None) -> JudgePrompt:
    file = Path(path) if path else CONFIGS / "judges" / "correct.yaml"
    form: JudgePrompt = options.validate(JudgePrompt, options.read(file), f"{file}: ")
    return form


def main(
    run_dir: str,
    endpoint: str,
    model: str,
    name: str | None,
    prompt: str | None,
    key_env: str,
    concurrency: int,
    timeout: float,
    tries: int,
) -> None:
    """See `jobs.commands.judge`."""
    with cli.errors(LockedError):
        form = _prompt(prompt)
        key = os.environ.get(key_env)
        server = ChatServer(endpoint, model, form.max_tokens, concurrency, timeout, tries, key)
        own = name or re.sub(r"[^A-Za-z0-9_-]+", "-", model).strip("-_")
        lost = judge(run_dir, server, form, own)
        summary = reduce([run_dir])
    show(summary)
    if lost:
        say(f"{lost:,} texts got no reply; the same line asks again")
        raise typer.Exit(cli.DEAD_LETTERS)
