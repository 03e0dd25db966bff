"""Statistics of human raters: preference ratios with intervals, and agreement."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from statsmodels.stats.inter_rater import fleiss_kappa

_RESAMPLES = 2000


def verdict(votes_RI: Any) -> dict[str, Any]:
    """Of votes [raters, items], 0 for editor a, 1 for b and 2 for the same.

    The counts `a`, `b`, `same`; `ratio`, a / b (infinite if none chose b, None without any choice),
    with its 95 % percentile bootstrap `low`, `high` over raters and items, both drawn with
    replacement; `kappa`, Fleiss' of the three answers, None for fewer than two raters.
    """
    counts = Counter(votes_RI.ravel().tolist())
    raters, items = votes_RI.shape
    draw = np.random.default_rng(0)
    ratios = []
    for _ in range(_RESAMPLES):
        rows, columns = draw.integers(raters, size=raters), draw.integers(items, size=items)
        sample = votes_RI[np.ix_(rows, columns)]
        ratios.append(_ratio((sample == 0).sum(), (sample == 1).sum()))
    known = [ratio for ratio in ratios if ratio is not None]
    # Without interpolation, which infinity does not have.
    low, high = (
        np.percentile(known, [2.5, 97.5], method="inverted_cdf").tolist() if known else (None, None)
    )
    table_IK = np.stack([(votes_RI == kind).sum(axis=0) for kind in range(3)], axis=1)
    with np.errstate(invalid="ignore"):
        kappa = float(fleiss_kappa(table_IK)) if raters > 1 else None
    return {
        "a": counts[0],
        "b": counts[1],
        "same": counts[2],
        "ratio": _ratio(counts[0], counts[1]),
        "low": low,
        "high": high,
        "kappa": kappa,
    }


def _ratio(a: int, b: int) -> float | None:
    if b:
        return float(a / b)
    return float("inf") if a else None
