"""The charts of a report, as Vega-Lite: each with a name, and its numbers as a table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import polars as pl
import vl_convert

from jobs.output.tables import is_in_bits
from rome.analysis.metrics import METRICS
from rome.data.results import OK

_RELATIONS = 40
_GROUPS = 10
_QUANTILES = {"lowest": 0.05, "low": 0.25, "middle": 0.5, "high": 0.75, "highest": 0.95}
_HEALTH = {
    "edit_norm": "norm of the update",
    "edit_divisor": "divisor",
    "edit_loss": "loss of the last step",
}
# Numbers are drawn logarithmically from this ratio of their 95th percentile to their fifth.
_WIDE = 100

Spec = dict[str, Any]


class Chart(NamedTuple):
    name: str
    title: str
    caption: str
    spec: Spec
    numbers: list[dict[str, Any]]


@cache
def library() -> str:
    """Vega-Lite's JavaScript with all that it needs, as one script that sets `vegaEmbed`."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # Its names are its own; and no text in it may end the page's script.
    return f"(() => {{{bundle}}})();".replace("</script", "<\\/script")


def relations(
    rows: pl.DataFrame, metrics: Sequence[str], names: dict[str, str], order: Sequence[str]
) -> Chart | None:
    """Means of rates by editor and relation. None where there are no relations."""
    scored = rows.filter(pl.col("status") == OK, pl.col("relation_id").is_not_null())
    known = (
        scored.group_by("relation_id")
        .agg(pl.col("case_id").n_unique().alias("records"))
        .sort("records", "relation_id", descending=[True, False])
        .head(_RELATIONS)
    )
    if known.is_empty():
        return None
    means = (
        scored.join(known, on="relation_id")
        .group_by("relation_id", "records", "label")
        .agg(pl.col(list(metrics)).mean() * 100)
        .unpivot(list(metrics), index=["relation_id", "records", "label"], variable_name="metric")
        .drop_nulls("value")
        .sort("records", "relation_id", "label", descending=[True, False, False])
    )
    numbers = [
        {
            "relation": _named(row["relation_id"], names, row["records"]),
            "editor": row["label"],
            "metric": row["metric"],
            "mean": round(row["value"], 1),
            "href": f"#records?relation={row['relation_id']}",
        }
        for row in means.to_dicts()
    ]
    spec: Spec = {
        "mark": {"type": "rect", "cursor": "pointer"},
        "width": {"step": 26},
        "height": {"step": 17},
        "encoding": {
            "x": {"field": "editor", "type": "nominal", "sort": list(order), "title": None},
            "y": {"field": "relation", "type": "nominal", "sort": None, "title": None},
            "color": {
                "field": "mean",
                "type": "quantitative",
                "scale": {"domain": [0, 100], "scheme": "viridis"},
                "title": "mean, %",
            },
            "column": {"field": "metric", "type": "nominal", "sort": list(metrics), "title": None},
            "tooltip": _tooltip(numbers),
        },
    }
    return _chart(
        "relations",
        "By relation",
        "Means in % by editor and relation, the relations with most records first; their number in "
        "brackets. Click a cell to read its records.",
        spec,
        numbers,
    )


def _named(relation: str, names: dict[str, str], records: int) -> str:
    return (
        f"{relation} {names[relation]} ({records})"
        if relation in names
        else f"{relation} ({records})"
    )


def differences(pairs: pl.DataFrame, metrics: Sequence[str], best: str) -> Chart | None:
    """Paired differences of rates: edited minus unedited, and the best minus the others."""
    unedited = set(pairs["b"]) - set(pairs["a"]) if len(pairs) else set()
    chosen = [
        row
        for row in (pairs.to_dicts() if len(pairs) else [])
        if row["metric"] in metrics and (row["b"] in unedited or row["a"] == best)
    ]
    if not chosen:
        return None
    numbers = [
        {
            "pair": f"{row['a']} − {row['b']}",
            "metric": row["metric"],
            "difference": round(row["difference"], 1),
            "low": None if row["low"] is None else round(row["low"], 1),
            "high": None if row["high"] is None else round(row["high"], 1),
            "p (Holm)": "< 0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.2g}",
        }
        for row in chosen
    ]
    y = {"field": "pair", "type": "nominal", "sort": None, "title": None}
    spec: Spec = {
        "facet": {"column": {"field": "metric", "sort": list(metrics), "title": None}},
        "spec": {
            "width": 220,
            "height": {"step": 18},
            "layer": [
                {"mark": {"type": "rule", "strokeDash": [3, 3]}, "encoding": {"x": {"datum": 0}}},
                {
                    "mark": {"type": "rule", "strokeWidth": 3},
                    "encoding": {
                        "y": y,
                        "x": {
                            "field": "low",
                            "type": "quantitative",
                            "title": "difference, points",
                        },
                        "x2": {"field": "high"},
                        "tooltip": _tooltip(numbers),
                    },
                },
                {
                    "mark": {"type": "point", "filled": True, "size": 60},
                    "encoding": {
                        "y": y,
                        "x": {"field": "difference", "type": "quantitative"},
                        "tooltip": _tooltip(numbers),
                    },
                },
            ],
        },
    }
    return _chart(
        "differences",
        "Where editors differ",
        "Paired differences in points over the records that both have, with 95 % bootstrap "
        "intervals clustered by relation: edited minus unedited, then the best minus the others.",
        spec,
        numbers,
    )


def spreads(rows: pl.DataFrame, metrics: Sequence[str], order: Sequence[str]) -> Chart | None:
    """How far records spread: boxes of what is no rate."""
    scored = rows.filter(status=OK)
    numbers = []
    for metric in (m for m in metrics if METRICS[m].unit != "%" or m == "RS"):
        scale, unit = (1, "bits") if is_in_bits(metric) else (100, METRICS[metric].unit)
        for label in order:
            values = scored.filter(label=label)[metric].drop_nulls().drop_nans() * scale
            if len(values):
                box = {name: round(values.quantile(q) or 0.0, 2) for name, q in _QUANTILES.items()}
                numbers.append({"metric": f"{metric}, {unit}", "editor": label, **box})
    if not numbers:
        return None
    y = {"field": "editor", "type": "nominal", "sort": list(order), "title": None}

    def layer(mark: Spec, low: str, high: str | None = None) -> Spec:
        x = {"field": low, "type": "quantitative", "title": None, "scale": {"zero": False}}
        encoding: Spec = {"y": y, "x": x, "tooltip": _tooltip(numbers)}
        return {"mark": mark, "encoding": encoding | ({"x2": {"field": high}} if high else {})}

    spec: Spec = {
        "facet": {"field": "metric", "sort": None, "title": None},
        "columns": 3,
        "resolve": {"scale": {"x": "independent"}},
        "spec": {
            "width": 230,
            "height": {"step": 17},
            "layer": [
                layer({"type": "rule"}, "lowest", "highest"),
                layer({"type": "bar", "height": 9}, "low", "high"),
                layer({"type": "tick", "thickness": 3, "color": "#E69F00"}, "middle"),
            ],
        },
    }
    return _chart(
        "spreads",
        "Spread over records",
        "Box: half of an editor's records; line: nine tenths; mark: the median.",
        spec,
        numbers,
    )


def health(rows: pl.DataFrame, metrics: Sequence[str], order: Sequence[str]) -> Chart | None:
    """Means of rates over tenths of the edits by each number of their health."""
    scored = rows.filter(pl.col("status") == OK, pl.col("editor") != "none")
    numbers = []
    logarithmic = []
    for name, title in _HEALTH.items():
        finite = scored.filter(pl.col(name).is_finite())
        low, high = (finite[name].quantile(q) or 0 for q in (0.05, 0.95))
        if 0 < _WIDE * low < high:
            logarithmic.append(title)
        for label in order:
            tenth = (pl.col(name).rank("ordinal") - 1) * _GROUPS // pl.len()
            groups = (
                finite.filter(label=label)
                .group_by(tenth.alias("tenth"))
                .agg(pl.col(name).median(), pl.col(list(metrics)).mean() * 100)
                .sort("tenth")
            )
            numbers += [
                {
                    "health": title,
                    "editor": label,
                    "metric": metric,
                    "median": float(f"{row[name]:.4g}"),
                    "mean": round(row[metric], 1),
                }
                for row in groups.to_dicts()
                for metric in metrics
                if row[metric] is not None
            ]
    if not numbers:
        return None
    panels = [
        {
            "transform": [{"filter": {"field": "health", "equal": title}}],
            "facet": {"column": {"field": "metric", "sort": list(metrics), "title": None}},
            "spec": {
                "width": 200,
                "height": 140,
                "mark": {"type": "line", "point": True},
                "params": [
                    {
                        "name": f"chosen{place}",
                        "select": {"type": "point", "fields": ["editor"]},
                        "bind": "legend",
                    }
                ],
                "encoding": {
                    "x": {
                        "field": "median",
                        "type": "quantitative",
                        "title": title,
                        "scale": {
                            "type": "log" if title in logarithmic else "linear",
                            "zero": False,
                        },
                    },
                    "y": {"field": "mean", "type": "quantitative", "title": "mean, %"},
                    "color": {"field": "editor", "type": "nominal", "sort": list(order)},
                    "opacity": {
                        "condition": {"param": f"chosen{place}", "value": 1},
                        "value": 0.1,
                    },
                    "tooltip": _tooltip(numbers),
                },
            },
        }
        for place, title in enumerate(_HEALTH.values())
        if any(row["health"] == title for row in numbers)
    ]
    return _chart(
        "health",
        "Health against success",
        "Each point is a tenth of an editor's edits, from the smallest to the largest: their "
        "median against the mean of the metric. Click a name to see it alone.",
        {"vconcat": panels},
        numbers,
    )


def _tooltip(numbers: Sequence[dict[str, Any]]) -> list[Spec]:
    return [{"field": name} for name in numbers[0] if name != "href"]


def _chart(name: str, title: str, caption: str, spec: Spec, numbers: list[dict[str, Any]]) -> Chart:
    whole = {"$schema": _SCHEMA, "description": f"{title}. {caption}", "data": {"values": numbers}}
    shown = [{k: v for k, v in row.items() if k != "href"} for row in numbers]
    return Chart(name, title, caption, whole | spec, shown)


_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
