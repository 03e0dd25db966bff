"""Metrics that rows bring with them: of their probe sets, and of judges that were asked.

`probe_SET` is the share of right tokens under teacher forcing, of the answer that has most;
`probe_SET_strict` and `probe_SET_wild` as `ES_strict` and `ES_wild`. An item of a set counts as
`rome.data.probes` says. A judge's are `ES_JUDGE`, ..., `probe_SET_JUDGE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

import polars as pl

from rome.analysis.metrics import METRICS, Metric
from rome.data import answers

PROBE = "probe_"
JUDGED = re.compile(r"(rewrite|paraphrase|neighborhood|probes)_judge_(.+)")
"""Columns of verdicts: a list of 1, 0 or null (not clear), one per text."""

_SHORT = {"rewrite": "ES", "paraphrase": "PS", "neighborhood": "NS"}
_CAPTION = f"{PROBE}...: right answers to the record's own probe sets, of the target or an alias"

Probes = Sequence[Mapping[str, Any]]


def metrics_in(rows: pl.LazyFrame) -> dict[str, Metric]:
    """METRICS, and those that the rows bring with them, by name."""
    columns = rows.collect_schema().names()
    judges = [found for name in columns if (found := JUDGED.fullmatch(name))]
    own = {
        f"{_SHORT[kind]}_{judge}": Metric(value=pl.col(f"{kind}_judge_{judge}").list.mean())
        for kind, judge in (found.groups() for found in judges)
        if kind in _SHORT
    }
    names = list(dict.fromkeys(found[2] for found in judges if found[1] == "probes"))
    for name in _sets(rows) if "probes" in columns else []:
        for ending, score in (("", _tokens), ("_strict", _strict), ("_wild", _wild)):
            own[f"{PROBE}{name}{ending}"] = _of_set(name, score)
        for judge in names:
            own[f"{PROBE}{name}_{judge}"] = _of_set(name, _judged, f"probes_judge_{judge}")
    return METRICS | own


def named_in(columns: Collection[str]) -> list[str]:
    """The metrics of a summary's columns that METRICS has not, in their order."""
    ending = "_half_width"
    found = [name.removesuffix(ending) for name in columns if name.endswith(ending)]
    return [name for name in found if name not in METRICS and name != "S"]


def caption_of(name: str) -> str:
    """What a table's caption says of a metric, of METRICS or not."""
    if name in METRICS:
        return METRICS[name].caption
    if name.startswith(PROBE):
        return _CAPTION
    return f"_{name.partition('_')[2]}: what this judge takes for right"


def _sets(rows: pl.LazyFrame) -> list[str]:
    names = pl.col("probes").explode().struct.field("set")
    found = rows.select(names).drop_nulls().unique().collect()["set"]
    return sorted(found)


def _of_set(
    name: str, score: Callable[[Mapping[str, Any]], float | None], verdicts: str | None = None
) -> Metric:
    def value(row: Mapping[str, Any] | None) -> float | None:
        if not row or not row["probes"]:
            return None
        probes: list[dict[str, Any]] = row["probes"]
        judged = row.get("verdicts") or [None] * len(probes)
        own = [
            one | {"verdict": verdict}
            for one, verdict in zip(probes, judged, strict=True)
            if one["set"] == name
        ]
        return _mean(own, score)

    columns = [pl.col("probes"), *([pl.col(verdicts).alias("verdicts")] if verdicts else [])]
    expression = pl.struct(columns).map_elements(value, pl.Float64, skip_nulls=False)
    return Metric(value=expression)


def _mean(probes: Probes, score: Callable[[Mapping[str, Any]], float | None]) -> float | None:
    """The mean over the items that count and are scored."""
    items: dict[int, dict[str, list[float | None]]] = {}
    for one in probes:
        roles = items.setdefault(one["item"], {"any": [], "all": [], "condition": []})
        roles[one["role"]].append(score(one))
    found = [value for roles in items.values() if (value := _item(roles)) is not None]
    return fmean(found) if found else None


def _item(roles: Mapping[str, list[float | None]]) -> float | None:
    known = {role: [s for s in scores if s is not None] for role, scores in roles.items()}
    if any(len(known[role]) < len(scores) for role, scores in roles.items()):
        return None
    if any(score < 1 for score in known["condition"]):
        return None
    wanted = [max(known["any"])] if known["any"] else []
    wanted += known["all"]
    return min(wanted) if wanted else None


def _tokens(probe: Mapping[str, Any]) -> float | None:
    # NaN is no success.
    return max(
        (0.0 if share != share else share for share in probe["accuracy"] or []), default=None
    )


def _strict(probe: Mapping[str, Any]) -> float | None:
    said = probe["greedy"]
    return None if said is None else float(answers.strict(said, probe["answers"]))


def _wild(probe: Mapping[str, Any]) -> float | None:
    said = probe["wild"]
    return None if said is None else float(answers.wild(said, probe["answers"]))


def _judged(probe: Mapping[str, Any]) -> float | None:
    verdict: float | None = probe["verdict"]
    return verdict
