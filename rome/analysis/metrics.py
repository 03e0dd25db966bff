"""The metrics of a record, each defined in one place: tables, comparisons, reports follow.

Three protocols stand side by side:
- paper: what the released code of the ROME paper computes (`experiments/summarize.py`) from
  probabilities under teacher forcing. It has all metrics but those of
- strict: names end in `_strict`. The model speaks greedily until a natural stop (see
  `rome.data.answers`) and must say the target and nothing else. Case counts; white space at
  either end and in runs, and a full stop at the end, do not.
- wild: names end in `_wild`. The model is asked in one of WILD's forms (arXiv 2502.11177) and
  speaks up to 50 tokens; what comes before a sentence's end or a line break must be the target
  after SQuAD's normalisation.

docs/new-metric.md adds one.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import polars as pl

from rome.data import answers
from rome.data.results import NUMBERS, RESULT_SCHEMA

PROTOCOL = "paper, strict, wild"

Benchmark = Literal["counterfact", "zsre"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number of a record, from the columns of RESULT_SCHEMA; a summary has its mean x 100."""

    value: pl.Expr | None
    """Null where the record has no such number. None: a result row has it as a column."""
    benchmark: Benchmark | None = None
    """The benchmark in whose table of the paper it stands; None has a table of its own."""
    unit: Literal["%", "points", "bits"] = "%"
    """Of what screens show: of bits they show the mean, of the others the mean x 100."""
    meaning: str = ""
    """What it says, in a few words, for the heading of a column and the glossary."""
    caption: str = ""
    """A table's caption says this of it."""


def finite(number: pl.Expr) -> pl.Expr:
    """Null in the place of NaN and infinities: no mean and no test can hold them."""
    return pl.when(number.is_finite()).then(number)


def scored(kind: str, value: pl.Expr) -> pl.Expr:
    """A value that is made of a kind's prompts; null where a likelihood of theirs is not finite.

    A model that has no likelihoods has neither failed nor succeeded, whatever it says.
    """
    names = (f"{kind}_nll_{target}" for target in ("new", "true"))
    return pl.when(pl.sum_horizontal(map(_count_not_finite, names)) == 0).then(value)


def _count_not_finite(name: str) -> pl.Expr:
    column = pl.col(name)
    if name in _LISTS:
        count = column.list.eval((~pl.element().is_finite()).cast(pl.UInt32)).list.sum()
    else:
        count = (~column.is_finite()).cast(pl.UInt32)
    return count.cast(pl.UInt32).fill_null(0)


_LISTS = {field.name for field in RESULT_SCHEMA if str(field.type).startswith("list")}


def not_finite() -> list[pl.Expr]:
    """How many numbers of a row are NaN or infinite, `not_finite`, and what they are of,
    `not_finite_in`: edit, score, text; null where all are finite."""
    counts = {
        what: pl.sum_horizontal(map(_count_not_finite, names)) for what, names in NUMBERS.items()
    }
    total = pl.sum_horizontal(counts.values()).cast(pl.UInt32)
    named = [pl.when(count > 0).then(pl.lit(what)) for what, count in counts.items()]
    words = pl.concat_str(named, separator=", ", ignore_nulls=True)
    return [total.alias("not_finite"), pl.when(total > 0).then(words).alias("not_finite_in")]


def success(kind: str, better: str, worse: str) -> pl.Expr:
    """The share of a kind's prompts after which one target is strictly likelier than the other.

    A tie is a failure on either side.
    """
    difference = pl.col(f"{kind}_nll_{better}") - pl.col(f"{kind}_nll_{worse}")
    return scored(kind, difference.list.eval(pl.element() < 0).list.mean())


def magnitude(kind: str, better: str, worse: str) -> pl.Expr:
    """The mean difference of the targets' probabilities exp(-nll)."""
    one, other = (_probabilities(pl.col(f"{kind}_nll_{target}")) for target in (better, worse))
    return scored(kind, (one - other).list.mean())


def _probabilities(nll: pl.Expr) -> pl.Expr:
    return nll.list.eval((-pl.element()).exp())


def likeliest_share(kind: str, of: str = "accuracy") -> pl.Expr:
    """Of the target's tokens, the share that is the likeliest (`eval_utils_zsre.py`)."""
    return scored(kind, pl.col(f"{kind}_{of}").list.mean())


def said(kind: str) -> pl.Expr:
    """The share of prompts after which the model says the target, in NS the true one."""
    texts = pl.col(f"{kind}_greedy")
    # Inside a list no other column can be seen, but lists of numbers can be subtracted.
    difference = _hashed(texts) - _hashed(_right(kind, texts))
    equal = difference.list.eval((pl.element() == 0).cast(pl.Float64))
    return scored(kind, equal.list.mean())


def said_wild(kind: str) -> pl.Expr:
    """The share of prompts after which WILD's text is the target, in NS the true one."""
    texts = pl.col(f"{kind}_wild")

    def share(row: dict[str, list[str] | None] | None) -> float | None:
        if not row or not row["texts"] or row["right"] is None:
            return None
        pairs = zip(row["texts"], row["right"], strict=True)
        return fmean(answers.wild(text, [target]) for text, target in pairs)

    pairs = pl.struct(texts.alias("texts"), _right(kind, texts).alias("right"))
    return scored(kind, pairs.map_elements(share, pl.Float64, skip_nulls=False))


def _right(kind: str, texts: pl.Expr) -> pl.Expr:
    """What is right after each of the prompts that `texts` answer."""
    number = texts.list.len()
    new = pl.col("target_new").repeat_by(number)
    if kind == "neighborhood":
        return pl.coalesce("neighborhood_targets", pl.col("target_true").repeat_by(number))
    if kind == "rewrite":
        more = pl.col("further").list.eval(pl.element().struct.field("target"))
        first = pl.col("target_new").repeat_by(pl.min_horizontal(number, pl.lit(1)))
        return pl.when(more.list.len() > 0).then(first.list.concat(more)).otherwise(new)
    return new


def _hashed(texts: pl.Expr) -> pl.Expr:
    """Each text as a number, the same for texts that strict takes for equal: in runs of white
    space, in Unicode form and in a full stop at the end they may differ."""
    words = pl.element().str.normalize("NFC").str.replace_all(r"\s+", " ").str.strip_chars()
    words = words.str.replace(r"[.。]$", "").str.strip_chars()
    return texts.list.eval(words.hash().reinterpret(signed=True))


_TOKENS = "accuracy_tokens"
_TRUE_TOKENS = "_tokens: of the target's own tokens, which the released code encodes once more"
_STRICT = "_strict: what is said greedily is the target"
_WILD = "_wild: what is said up to a sentence's end is the target after SQuAD's normalisation"

METRICS: dict[str, Metric] = {
    "ES": Metric(
        value=success("rewrite", "new", "true"),
        benchmark="counterfact",
        meaning="says the new fact",
    ),
    "EM": Metric(
        value=magnitude("rewrite", "new", "true"),
        benchmark="counterfact",
        unit="points",
        meaning="p(new) - p(true)",
    ),
    "PS": Metric(
        value=success("paraphrase", "new", "true"),
        benchmark="counterfact",
        meaning="... when paraphrased",
    ),
    "PM": Metric(
        value=magnitude("paraphrase", "new", "true"),
        benchmark="counterfact",
        unit="points",
        meaning="p(new) - p(true), paraphrased",
    ),
    "NS": Metric(
        value=success("neighborhood", "true", "new"),
        benchmark="counterfact",
        meaning="neighbours still true",
    ),
    "NM": Metric(
        value=magnitude("neighborhood", "true", "new"),
        benchmark="counterfact",
        unit="points",
        meaning="p(true) - p(new), neighbours",
    ),
    "GE": Metric(value=None, benchmark="counterfact", unit="bits", meaning="entropy of its texts"),
    "RS": Metric(value=None, benchmark="counterfact", meaning="texts like those of the object"),
    "efficacy": Metric(
        value=likeliest_share("rewrite"), benchmark="zsre", meaning="tokens of the answer right"
    ),
    "paraphrase": Metric(
        value=likeliest_share("paraphrase"), benchmark="zsre", meaning="... when paraphrased"
    ),
    "specificity": Metric(
        value=likeliest_share("neighborhood"), benchmark="zsre", meaning="unrelated answers right"
    ),
    "efficacy_tokens": Metric(
        value=likeliest_share("rewrite", _TOKENS),
        caption=_TRUE_TOKENS,
        meaning="the target's own tokens right",
    ),
    "paraphrase_tokens": Metric(
        value=likeliest_share("paraphrase", _TOKENS),
        caption=_TRUE_TOKENS,
        meaning="... when paraphrased",
    ),
    "specificity_tokens": Metric(
        value=likeliest_share("neighborhood", _TOKENS),
        caption=_TRUE_TOKENS,
        meaning="... of unrelated answers",
    ),
    "ES_strict": Metric(
        value=said("rewrite"), caption=_STRICT, meaning="what is said is the new object"
    ),
    "PS_strict": Metric(value=said("paraphrase"), caption=_STRICT, meaning="... when paraphrased"),
    "NS_strict": Metric(
        value=said("neighborhood"), caption=_STRICT, meaning="neighbours say the true object"
    ),
    "ES_wild": Metric(
        value=said_wild("rewrite"), caption=_WILD, meaning="what is said to WILD is the new object"
    ),
    "PS_wild": Metric(value=said_wild("paraphrase"), caption=_WILD, meaning="... when paraphrased"),
    "NS_wild": Metric(
        value=said_wild("neighborhood"), caption=_WILD, meaning="neighbours say the true object"
    ),
    "NS_plus": Metric(
        value=success("neighborhood_plus", "true", "new"),
        caption="NS_plus: NS after the edited sentence",
        meaning="neighbours after the edited sentence",
    ),
    "RVS": Metric(
        value=success("reversed", "new", "true"),
        caption="RVS: the reversed fact is likelier with the new object",
        meaning="the reversed fact is known",
    ),
}
"""By name, in the order of tables."""

# Their harmonic mean is S.
SUCCESSES = ("ES", "PS", "NS")


def table_of(benchmark: Benchmark | None) -> list[str]:
    """The columns of a benchmark's table, or of the table of all metrics that have none."""
    names = [name for name, metric in METRICS.items() if metric.benchmark == benchmark]
    return ["S", *names] if benchmark == "counterfact" else names


def harmonic_mean() -> pl.Expr:
    """S from the columns ES, PS and NS: null if one of them is null, 0 if one of them is 0."""
    inverses = [1 / pl.col(name) for name in SUCCESSES]
    return len(inverses) / pl.sum_horizontal(inverses, ignore_nulls=False)
