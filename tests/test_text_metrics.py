"""GE and RS against the reference's own numbers and against plain definitions."""

import json
import math
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pyarrow as pa
import pytest

from rome.scoring import text_metrics
from rome.scoring.text_metrics import ReferenceTexts, clean, fit_tfidf, ngram_entropy, words

DATA = Path(__file__).parents[2] / "shared" / "data"
TEN_RECORDS = DATA / "reference" / "ten_records.json"


def plain_entropy(text: str) -> float:
    """The reference's n-gram entropy, spelt out."""
    tokens = words(text)
    entropies = []
    for n in (2, 3):
        counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        shares = [count / sum(counts.values()) for count in counts.values()]
        entropies.append(-sum(share * math.log(share) / math.log(2) for share in shares))
    return (2 / 3 * entropies[0] + 4 / 3 * entropies[1]) / 2


@pytest.mark.skipif(not TEN_RECORDS.exists(), reason="the reference's results are not here")
@pytest.mark.parametrize("when", ["pre", "post"])
def test_entropy_is_the_references(when: str) -> None:
    for row in json.loads(TEN_RECORDS.read_text())["rows"]:
        assert ngram_entropy(row[when]["texts"]) == pytest.approx(
            row[when]["ngram_entropy"], abs=1e-9
        )


def test_entropy_is_its_definition() -> None:
    texts = ["The cat sat. The cat didn't sit; the cat sat.", "one two one two one two three", "no"]
    expected = sum(plain_entropy(text) for text in texts) / 3
    assert ngram_entropy(texts) == pytest.approx(expected, abs=1e-12)
    assert ngram_entropy(["a b a b a b"]) == pytest.approx(
        (2 / 3 * -(3 / 5 * math.log2(3 / 5) + 2 / 5 * math.log2(2 / 5)) + 4 / 3 * 1.0) / 2
    )


def test_a_text_that_repeats_itself_scores_lower() -> None:
    assert ngram_entropy(["the cat the cat the cat the cat"]) < ngram_entropy(
        ["a quick brown fox jumps over the lazy dog"]
    )
    assert ngram_entropy(["", "word"]) == 0.0
    with pytest.raises(ValueError, match="at least one"):
        ngram_entropy([])


def test_words_are_those_of_punkt_and_treebank() -> None:
    assert words('Dr. Who didn\'t go. "Why?"') == [
        *("Dr.", "Who", "did", "n't", "go", "."),
        *("``", "Why", "?", "''"),
    ]


def test_absent_tokenizer_data_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(text_metrics, "distribution", absent)
    monkeypatch.setattr(nltk.data, "path", [])
    text_metrics._find_punkt.cache_clear()
    try:
        with pytest.raises(LookupError, match="pip install --no-deps llama-index-core=="):
            ngram_entropy(["some words"])
    finally:
        text_metrics._find_punkt.cache_clear()


def test_the_data_is_found_without_importing_its_package() -> None:
    words("Some text.")
    assert "llama_index" not in sys.modules


def test_clean() -> None:
    assert clean("A<|endoftext|>\n\nB\nC\u00a0caf\u00e9") == "A B\nC cafe\u0301"


REFERENCES = pa.table(
    {
        "relation_id": ["P1", "P1", "P1", "P2"],
        "target_id": ["Q1", "Q1", "Q2", "Q1"],
        "name": ["a", "b", "c", "d"],
        "text": [
            "The Louvre is in Paris.",
            "Paris lies on the Seine, in France.",
            "Berlin lies on the Spree, in Germany.",
            "A violin has four strings.",
        ],
    }
)


def test_reference_score_is_the_cosine_of_a_fitted_vectorizer() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    corpus = REFERENCES["text"].to_pylist()
    texts = ["She saw Paris and the Louvre.", "Then she went to Berlin."]
    fitted = TfidfVectorizer().fit(corpus)
    a, b = fitted.transform([" ".join(texts), " ".join(corpus[:2])]).toarray()
    expected = a @ b / (a @ a) ** 0.5 / (b @ b) ** 0.5

    references = ReferenceTexts(REFERENCES, fit_tfidf(corpus))
    assert references.score(texts, "P1", "Q1") == pytest.approx(expected, abs=1e-12)
    assert references.score(texts, "P1", "Q1") == references.score(texts, "P1", "Q1")


def test_reference_score_prefers_texts_about_the_target() -> None:
    references = ReferenceTexts(REFERENCES, fit_tfidf(REFERENCES["text"].to_pylist()))
    paris, berlin = (references.score(["Paris, on the Seine"], "P1", t) for t in ("Q1", "Q2"))
    assert paris is not None
    assert berlin is not None
    assert paris > berlin
    assert references.score(["Paris"], "P9", "Q1") is None
    assert references.score(["Paris"], None, "Q1") is None
    assert references.score(["zzz"], "P1", "Q1") == 0.0
