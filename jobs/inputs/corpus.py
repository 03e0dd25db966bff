"""The corpus of a second moment: token ids of texts, cut into chunks which no worker count moves.

A corpus is `self` (text sampled from the model), a .txt file with a passage a line, a Parquet file
with a column `text`, or a `datasets` id `NAME:CONFIG:SPLIT:COLUMN`.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import NonNegativeInt

from cluster.store import Store
from jobs.runs.config import CorpusConfig
from rome import options
from rome.json_text import JsonError, parsed
from rome.models import EditableModel, prompts
from rome.options import ConfigError
from rome.scoring import generation
from rome.scoring.generation import UNEDITED, Start
from rome.scoring.settings import GenerationSettings

SELF = "self"
# So many that the workers of a cluster have some each, and a lease can be of any share.
_MOST_CHUNKS = 256
_CHUNK_TOKENS = 4096
# Top-k 5, as context templates have it, repeats itself: the wider the choice, the better the keys
# span their space (condition numbers of SmolLM2's layer 6 over 15,000 tokens: 1220 at 5, 470 at
# 50, 340 at 1000).
_SAMPLING = GenerationSettings(top_k=250, max_tokens=101)
_SAMPLING_BUDGET = 16_384
# Neighbours in a file are alike, and its first so many tokens no sample of it.
_SHUFFLED_TOGETHER = 20_000
_TOKENISED_TOGETHER = 256
_HELD_OUT = 32
_HELD_OUT_TOKENS = 256
# The number of a text beyond all that a second moment samples.
_FAR_TEXT = _HELD_OUT << 25
# Tokens for each dimension of a key, with `tokens: auto` (Gupta et al. 2025, arXiv 2506.04226).
_TOKENS_A_KEY = 20


@dataclass(frozen=True)
class Sampled:
    """Texts that the model writes itself, each seeded by its index."""

    count: int
    in_chunk: int

    @property
    def chunks(self) -> int:
        return -(-self.count // self.in_chunk)

    @property
    def fingerprint(self) -> str:
        return _digest({"sampling": asdict(_SAMPLING), **asdict(self)})

    def texts(self, model: EditableModel, chunk: int) -> list[list[int]]:
        """The token ids of each text of a chunk."""
        start = chunk * self.in_chunk
        stop = min(start + self.in_chunk, self.count)
        rows = [Start(model.start_ids, 0, (index,)) for index in range(start, stop)]
        sampled = generation.generate(model, rows, [UNEDITED], _SAMPLING, _SAMPLING_BUDGET)
        # Keys are wanted as they are in a prompt, which starts as the tokenizer has it.
        before = prompts.encode(model.tokenizer, [""])[0].ids
        return [before + ids[len(model.start_ids) :] for ids in sampled]


@dataclass(frozen=True)
class Passages:
    """Passages of a file or data set, in a store as a Parquet file of token ids per chunk."""

    store: Store
    chunks: int
    tokens: int
    fingerprint: str

    def texts(self, model: EditableModel, chunk: int) -> list[list[int]]:
        """The token ids of each text of a chunk."""
        texts: list[list[int]] = self.store.read_table(_chunk_name(chunk))["ids"].to_pylist()
        return texts


@dataclass(frozen=True)
class _Written:
    """What a store says of its passages, last of all."""

    chunks: NonNegativeInt
    tokens: NonNegativeInt
    fingerprint: str


Corpus = Sampled | Passages
"""Picklable: workers read or make the texts, which are the same in every process."""


def identity(config: CorpusConfig) -> dict[str, Any]:
    """The settings that decide the texts of a corpus: equal if and only if the texts are.

    A file counts by its content, a data set by its id. Raises ValueError where there is no file.
    """
    if config.corpus == SELF:
        return {"corpus": SELF, "tokens": config.tokens, "sampling": asdict(_SAMPLING)}
    data: dict[str, Any] = {"tokens": config.tokens, "passage_tokens": config.passage_tokens}
    if not _is_file(config.corpus):
        return {"corpus": config.corpus, **data}
    try:
        with open(config.corpus, "rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), **data}
    except OSError as error:
        raise ValueError(f"the corpus {config.corpus} cannot be read: {error.strerror}") from error


def sized(config: CorpusConfig, model: EditableModel, layer: int = 0) -> CorpusConfig:
    """With a number of tokens in the place of `auto`."""
    if config.tokens != "auto":
        return config
    return replace(config, tokens=_TOKENS_A_KEY * model.sizes(model.weight_name(layer))[1])


def prepare(config: CorpusConfig, model: EditableModel, store: Store) -> Corpus:
    """The corpus of a config, tokenised into `store` where it has passages; the second call reads.

    `model` may be an outline. Raises ValueError where the corpus cannot be read or has no text.
    """
    assert config.tokens != "auto"
    in_chunk = max(_CHUNK_TOKENS, -(-config.tokens // _MOST_CHUNKS))
    if config.corpus == SELF:
        length = _SAMPLING.max_tokens - 1
        return Sampled(-(-config.tokens // length), -(-in_chunk // length))
    # Written last: what an interrupted preparation left has none.
    manifest = "corpus.json"
    if not store.exists(manifest):
        texts = _token_ids(config, model)
        data = json.dumps(_write(store, texts, config.tokens, in_chunk))
        store.write_bytes(manifest, data.encode())
    try:
        said = options.validate(_Written, parsed(store.read_bytes(manifest)), "")
    except (JsonError, ConfigError) as error:
        raise ValueError(
            f"{store.uri}/{manifest} is damaged ({error}); remove it: the corpus is read again"
        ) from None
    passages = Passages(store, said.chunks, said.tokens, said.fingerprint)
    if not passages.tokens:
        raise ValueError(f"the corpus {config.corpus} has no text")
    return passages


def held_out(config: CorpusConfig, model: EditableModel) -> list[list[int]]:
    """Texts of a corpus that no second moment of this config is made of, as token ids.

    The passages after its tokens; for `self`, texts that the model samples with other seeds.
    Raises ValueError where the corpus has no passage more.
    """
    if config.corpus == SELF or config.file is not None:
        chunk = _FAR_TEXT // _HELD_OUT
        return Sampled(_FAR_TEXT + _HELD_OUT, _HELD_OUT).texts(model, chunk)
    limit = sized(config, model).tokens
    assert limit != "auto"
    passages, total = _token_ids(config, model), 0
    while total < limit and (ids := next(passages, None)):
        total += len(ids)
    found = list(islice((ids[:_HELD_OUT_TOKENS] for ids in passages if len(ids) > 1), _HELD_OUT))
    if not found:
        raise ValueError(
            f"the corpus {config.corpus} ends before its second moment does, so that no text is "
            "left on which a chain's drift could be measured: set "
            f"model.second_moment.tokens below {total:,}"
        )
    return found


def _write(
    store: Store, texts: Iterator[list[int]], tokens: int, in_chunk: int
) -> dict[str, int | str]:
    """Write chunks until there are `tokens`; returns the fields of Passages."""
    digest = hashlib.sha256()
    total, chunks = 0, 0
    while total < tokens:
        rows, size = [], 0
        for ids in texts:
            rows.append(ids)
            size += len(ids)
            digest.update(array("q", [len(ids), *ids]).tobytes())
            if size >= min(in_chunk, tokens - total):
                break
        if not rows:
            break
        column = pa.array(rows, pa.list_(pa.int32()))
        store.write_table(_chunk_name(chunks), pa.table({"ids": column}))
        total, chunks = total + size, chunks + 1
    return {"chunks": chunks, "tokens": total, "fingerprint": digest.hexdigest()}


def _chunk_name(chunk: int) -> str:
    return f"corpus/chunk-{chunk:05d}.parquet"


def _token_ids(config: CorpusConfig, model: EditableModel) -> Iterator[list[int]]:
    longest = getattr(model.hf.config, "max_position_embeddings", config.passage_tokens)
    if config.passage_tokens > longest:
        raise ValueError(
            f"passage_tokens must be at most the {longest} positions of {model.name}, "
            f"got {config.passage_tokens}; set model.second_moment.passage_tokens"
        )
    texts = _shuffled(filter(str.strip, _texts(config.corpus)))
    while some := list(islice(texts, _TOKENISED_TOGETHER)):
        rows = (row.ids[: config.passage_tokens] for row in prompts.encode(model.tokenizer, some))
        yield from filter(None, rows)


def _shuffled(texts: Iterable[str]) -> Iterator[str]:
    texts = iter(texts)
    rng = random.Random(0)
    while some := list(islice(texts, _SHUFFLED_TOGETHER)):
        rng.shuffle(some)
        yield from some


def _is_file(corpus: str) -> bool:
    return corpus.endswith((".txt", ".parquet"))


def _texts(corpus: str) -> Iterator[str]:
    if not _is_file(corpus):
        return _from_datasets(corpus)
    if corpus.endswith(".txt"):
        return _lines(Path(corpus))
    file = pq.ParquetFile(corpus)
    if "text" not in file.schema_arrow.names:
        raise ValueError(
            f"{corpus} must have a column 'text', got {', '.join(file.schema_arrow.names)}"
        )
    kind = file.schema_arrow.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{corpus}: the column 'text' must hold texts, but holds {kind}")
    batches = file.iter_batches(_TOKENISED_TOGETHER, columns=["text"])
    return chain.from_iterable(_present(batch["text"].to_pylist()) for batch in batches)


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: a corpus must be UTF-8, got the byte "
                    f"0x{line[error.start]:02x}; convert it: iconv -f WINDOWS-1252 -t UTF-8"
                ) from None


def _present(texts: Iterable[str | None]) -> Iterator[str]:
    return (text for text in texts if text)


def _from_datasets(corpus: str) -> Iterator[str]:
    """Streamed, since a data set may be far larger than what is needed of it."""
    import datasets  # Slow, and needed here alone.

    name, config, split, column = [*corpus.split(":"), "", "", "", ""][:4]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        rows = rows.shuffle(seed=0, buffer_size=1000)  # The order of its files above all.
        if (column := column or "text") not in rows.column_names:
            raise ValueError(f"its columns are {rows.column_names}, '{column}' is not among them")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"the corpus '{corpus}' is not '{SELF}', no .txt or .parquet file, and `datasets` "
            f"cannot load it as NAME:CONFIG:SPLIT:COLUMN: {error}"
        ) from error
    return _present(row[column] for row in rows)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
