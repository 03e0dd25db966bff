"""jobs.second_moment: a run's second moments, on real Ray with a small random model."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import Tensor

from cluster.calls import once
from cluster.grid import Lease
from cluster.store import Store
from jobs import second_moment
from jobs.inputs import corpus as corpora
from jobs.inputs.corpus import Passages
from jobs.runs import config as configs
from jobs.runs.config import CorpusConfig, RunConfig
from jobs.tasks import moments
from rome import models
from rome.models import EditableModel
from rome.models.families import FAMILIES
from rome.second_moment import accumulate, load
from rome.solver import UnsolvableError
from tests.support import tiny

K = 40
LAYERS = (1, 2)
LONGEST = 40
PASSAGES = [
    f"{sentence} {number} {other}"
    for number, sentence in enumerate(tiny.SENTENCES * 12)
    for other in (tiny.SENTENCES[number % 4][:number], "")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, the passages, and a cut into small chunks, so that there are several."""
    folder = tmp_path_factory.mktemp("job")
    model = tiny.model("gpt2", "float32")
    tiny.save(model, folder / "model")
    (folder / "passages.txt").write_text("\n\n".join(PASSAGES), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.inputs.corpus._CHUNK_TOKENS", 600)
        yield folder


def config_of(folder: Path, workers: int = 2, **settings: Any) -> RunConfig:
    """ROME at two layers, with the C of both; `settings` are those of the second moment."""
    corpus = {"corpus": str(folder / "passages.txt"), "tokens": 4000, "passage_tokens": LONGEST}
    run = {
        "name": "test",
        "model": {
            "name": "tiny",
            "source": str(folder / "model"),
            "dtype": "float32",
            "second_moment": corpus | settings,
            "editors": {"rome": {"layer": LAYERS[0]}},
        },
        "benchmark": "everyday",
        "editors": {
            "none": {},
            "rome": {},
            "later": {"editor": "rome", "layer": LAYERS[1]},
            "without": {"editor": "rome", "layer": 0, "second_moment": False},
        },
        "workers": {"workers": workers, "num_cpus": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return configs.load(path)


def ensure(config: RunConfig) -> dict[int, str]:
    model = tiny.model("gpt2", "float32")
    return second_moment.ensure(
        config, models.outline(config.model.source, config.model.name), model.fingerprint()
    )


@pytest.fixture(scope="module")
def computed(folder: Path, ray_address: str) -> dict[int, Path]:
    """Files that two workers computed over all passages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROME_WORKSPACE", str(folder / "workspace"))
        return {n: Path(file) for n, file in ensure(config_of(folder)).items()}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROME_WORKSPACE", str(tmp_path))
    return tmp_path


def plain_sum(model: EditableModel, layer: int, texts: list[str]) -> Tensor:
    """Sum of k k^T in float64, one whole text and one token at a time."""
    total_KK = torch.zeros(K, K, dtype=torch.float64)
    keys: list[Tensor] = []
    hook = model.down_projection(layer).register_forward_pre_hook(
        lambda _, args: keys.append(args[0][0])
    )
    with torch.no_grad():
        for text in texts:
            model.hf(torch.tensor([model.tokenizer(text)["input_ids"][:LONGEST]]))
            for key_K in keys.pop().double():
                total_KK += torch.outer(key_K, key_K)
    hook.remove()
    return total_KK


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_its_keys_in_batches(family: str) -> None:
    model = tiny.model(family, "float64", "bos")
    texts = PASSAGES[:8]
    moments = accumulate(model, [2, 0], model.tokenizer(texts)["input_ids"])
    assert list(moments) == [2, 0]
    for layer, moment in moments.items():
        # Norms and some attention are float32 inside, whatever the model is.
        expected_KK = plain_sum(model, layer, texts)
        torch.testing.assert_close(moment.sum_KK, expected_KK, rtol=1e-5, atol=1e-5)


def test_equals_a_plain_loop(folder: Path, computed: dict[int, Path]) -> None:
    model = tiny.model("gpt2", "float32")
    lengths = [len(ids) for ids in model.tokenizer(PASSAGES)["input_ids"]]
    assert min(lengths) < LONGEST < max(lengths)
    assert tuple(computed) == LAYERS
    for layer, file in computed.items():
        moment, origin = load(file)
        assert moment.count == sum(min(length, LONGEST) for length in lengths)
        # Keys are float32, and those of a batch are rounded otherwise than those of one text.
        expected_KK = plain_sum(model, layer, PASSAGES)
        torch.testing.assert_close(moment.sum_KK, expected_KK, rtol=1e-5, atol=1e-4)
        assert origin is not None
        assert origin.model_fingerprint == model.fingerprint()
        assert origin.weight == f"transformer.h.{layer}.mlp.c_proj.weight"
        assert origin.corpus == str(folder / "passages.txt")


def test_one_worker_that_was_interrupted_gives_the_same_sum(
    folder: Path, computed: dict[int, Path], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1e-12, and what it had written is not done again."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(second_moment, "_CHUNKS_A_LEASE", 1)
    with monkeypatch.context() as patch:
        patch.setattr(second_moment, "once", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ensure(config_of(folder, workers=0))
    first, *kept = sorted(workspace.rglob("part-*.parquet"))
    assert len(kept) > 2
    first.unlink()
    written = [part.stat().st_mtime_ns for part in kept]

    seen = []

    def look(*args: Any, **settings: Any) -> Any:
        seen.append([part.stat().st_mtime_ns for part in kept])
        return once(*args, **settings)

    monkeypatch.setattr(second_moment, "once", look)
    files = ensure(config_of(folder, workers=0))
    assert seen == [written] * len(LAYERS)
    for layer, file in files.items():
        (one, _), (other, _) = load(file), load(computed[layer])
        assert one.count == other.count
        assert torch.allclose(
            one.sum_KK, other.sum_KK, rtol=1e-12, atol=1e-12 * float(one.sum_KK.max())
        )


def test_bytes_follow_the_workers_and_not_the_tokens(
    folder: Path, computed: dict[int, Path], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = []
    for size in (600, 100):
        monkeypatch.setattr("jobs.inputs.corpus._CHUNK_TOKENS", size)
        monkeypatch.setattr(second_moment, "once", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ensure(config_of(folder, workers=0))
        parts = sorted(workspace.rglob("part-*.parquet"))
        assert len(parts) == 1
        rows = [pq.read_table(part, columns=["count", "sum_1"]) for part in parts]
        assert all(table["sum_1"].null_count == table.num_rows - 1 for table in rows)
        chunks.append(sum(table.num_rows for table in rows))
        shutil.rmtree(workspace / "second_moments")
    assert chunks[1] > 3 * chunks[0]


def test_a_pass_that_stopped_while_it_wrote_its_files_is_not_begun_anew(
    folder: Path, computed: dict[int, Path], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_one(*args: Any, **settings: Any) -> Any:
        if list(workspace.rglob("layer-*.safetensors")):
            raise KeyboardInterrupt
        return once(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(second_moment, "once", after_one)
        with pytest.raises(KeyboardInterrupt):
            ensure(config_of(folder, workers=0))
    written = {path: path.stat().st_mtime_ns for path in workspace.rglob("part-*.parquet")}
    assert written

    def look(*args: Any, **settings: Any) -> Any:
        assert written == {path: path.stat().st_mtime_ns for path in written}
        return once(*args, **settings)

    monkeypatch.setattr(second_moment, "once", look)
    files = ensure(config_of(folder, workers=0))
    assert {path.name for path in workspace.rglob("*") if path.is_file()} == {
        Path(file).name for file in files.values()
    }


def test_a_chunk_in_two_parts_counts_once(tmp_path: Path) -> None:
    """As after a worker that was taken for dead has written its lease at last."""
    parts = Store(tmp_path)
    for start, stop in ((0, 3), (1, 2), (3, 4), (4, 6), (5, 6)):
        table = pa.table({"case_id": list(range(start, stop))})
        parts.write_table(Lease(moments.GROUP, 0, start, stop).part, table)
    found = [Path(name).stem[-13:] for name in moments._covering(parts, 6)]
    assert sorted(found) == ["000000-000003", "000003-000004", "000004-000006"]
    with pytest.raises(RuntimeError, match=r"lacks chunks \[6\]"):
        moments._covering(parts, 7)


def test_the_second_call_does_nothing(
    folder: Path, computed: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = computed[1].parent
    assert sorted(there.iterdir()) == sorted(computed.values())
    written = {path: path.stat().st_mtime_ns for path in there.iterdir()}
    monkeypatch.setenv("ROME_WORKSPACE", str(folder / "workspace"))
    monkeypatch.setattr(second_moment, "run", None)  # Would raise if it were called.
    config = config_of(folder)
    assert ensure(config) == {n: str(file) for n, file in computed.items()}
    assert {path: path.stat().st_mtime_ns for path in there.iterdir()} == written
    only = {"rome": {"layer": 2}}
    assert ensure(replace(config, editors=only)) == {2: str(computed[2])}
    assert ensure(replace(config, editors={"none": {}})) == {}


def test_self_is_text_of_the_model(folder: Path, workspace: Path) -> None:
    config = replace(config_of(folder, workers=0, corpus="self", tokens=950), editors={"rome": {}})
    moment, origin = load(ensure(config)[1])
    assert moment.count == 1000
    assert origin is not None
    assert origin.corpus == "self"

    model = tiny.model("gpt2", "float32")
    corpus = corpora.prepare(config.model.second_moment, model, Store(workspace))
    texts = [ids for chunk in range(corpus.chunks) for ids in corpus.texts(model, chunk)]
    assert len({tuple(text) for text in texts}) == len(texts) == 10
    expected = accumulate(model, [1], texts)[1]
    torch.testing.assert_close(moment.sum_KK, expected.sum_KK, rtol=1e-5, atol=1e-4)


def test_too_few_tokens_say_how_many_more_and_leave_nothing(folder: Path, workspace: Path) -> None:
    config = config_of(folder, workers=0, tokens=20, passage_tokens=10)
    message = r"model\.second_moment\.tokens=20: .* of 40 .* at least \d+ more tokens"
    with pytest.raises(UnsolvableError, match=message):
        ensure(config)
    assert not [path for path in workspace.rglob("*") if path.is_file()]


def test_what_decides_the_result_decides_the_name(folder: Path) -> None:
    def key(weights: str = "f00", **settings: Any) -> str:
        return second_moment._key(config_of(folder, **settings).model.second_moment, weights)

    copy = folder / "copy.txt"
    copy.write_text((folder / "passages.txt").read_text("utf-8"), "utf-8")
    assert key() == key(corpus=str(copy))
    copy.write_text("another text", "utf-8")
    others = [
        key(corpus=str(copy)),
        key(tokens=20),
        key(passage_tokens=20),
        key(corpus="self"),
        key(corpus="self", tokens=20),
        key(corpus="name:config"),
        key(weights="others saved to the same folder"),
    ]
    assert len({key(), *others}) == 8


def prepared(store: Path, **settings: Any) -> Passages:
    corpus = corpora.prepare(
        CorpusConfig(**settings),
        tiny.model("gpt2"),
        Store(store),  # Its chunks are in the store.
    )
    assert isinstance(corpus, Passages)
    return corpus


def texts_of(corpus: Passages) -> list[list[int]]:
    model = tiny.model("gpt2")
    return [ids for chunk in range(corpus.chunks) for ids in corpus.texts(model, chunk)]


@pytest.mark.slow
def test_parquet_and_datasets_give_the_passages_of_the_text_file(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    table = pa.table({"text": [None, "", *PASSAGES], "title": "a" * (len(PASSAGES) + 2)})
    pq.write_table(table, tmp_path / "set" / "passages.parquet")
    expected = sorted(tiny.tokenizer()(PASSAGES)["input_ids"])
    for number, corpus in enumerate(
        [
            str(folder / "passages.txt"),
            str(tmp_path / "set" / "passages.parquet"),
            str(tmp_path / "set"),
            f"{tmp_path / 'set'}::train:text",
        ]
    ):
        found = prepared(tmp_path / str(number), corpus=corpus, passage_tokens=128)
        texts = texts_of(found)
        assert sorted(texts) == expected
        assert found.tokens == sum(map(len, expected))
        assert texts[: len(PASSAGES) // 2] != expected[: len(PASSAGES) // 2]


def test_chunks_are_cut_by_tokens_alone_and_end_with_the_tokens(
    folder: Path, tmp_path: Path
) -> None:
    corpus = str(folder / "passages.txt")
    found = prepared(tmp_path / "a", corpus=corpus, tokens=2000, passage_tokens=LONGEST)
    assert 2000 <= found.tokens < 2000 + LONGEST
    assert found.tokens == sum(map(len, texts_of(found)))
    sizes = [sum(map(len, found.texts(tiny.model("gpt2"), n))) for n in range(found.chunks)]
    assert all(600 <= size < 600 + LONGEST for size in sizes[:-1])
    again = prepared(tmp_path / "b", corpus=corpus, tokens=2000, passage_tokens=LONGEST)
    assert (again.fingerprint, texts_of(again)) == (found.fingerprint, texts_of(found))


def test_npz_of_the_authors(folder: Path, computed: dict[int, Path], workspace: Path) -> None:
    for layer, file in computed.items():
        moment, _ = load(file)
        entries = {"mom2.count": moment.count, "mom2.mom2": moment.sum_KK.float().numpy()}
        np.savez(workspace / f"h.{layer}.npz", **entries)  # type: ignore[arg-type]
    config = config_of(folder, file=str(workspace / "h.{layer}.npz"))
    files = ensure(config)
    for layer, name in files.items():
        imported, origin = load(name)
        moment, _ = load(computed[layer])
        assert imported.count == moment.count
        torch.testing.assert_close(imported.sum_KK, moment.sum_KK, rtol=1e-6, atol=1e-4)
        assert origin is not None
        assert (origin.corpus, origin.layer) == (f"h.{layer}.npz", layer)
    assert ensure(config) == files

    np.savez(workspace / "h.1.npz", **{"mom2.count": 9, "mom2.mom2": np.eye(7)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be over the 40 key dimensions .* got 7"):
        ensure(config)
    (workspace / "h.1.npz").unlink()
    with pytest.raises(ValueError, match=r"h\.1\.npz: no such file"):
        ensure(config)


def test_a_given_safetensors_file_is_used_as_it_is(folder: Path, computed: dict[int, Path]) -> None:
    one = replace(config_of(folder, file=str(computed[1])), editors={"rome": {}})
    assert ensure(one) == {1: str(computed[1])}
    with pytest.raises(ValueError, match=r"must be of transformer\.h\.2\..* is of .*h\.1\."):
        ensure(config_of(folder, file=str(computed[1])))


def test_a_layer_that_the_model_has_not(folder: Path, workspace: Path) -> None:
    config = replace(config_of(folder), editors={"rome": {"layer": 7}})
    with pytest.raises(ValueError, match="layer must be from 0 to 2, got 7"):
        ensure(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": "no/such.txt"}, r"no/such\.txt cannot be read: No such file"),
        ({"corpus": "no such set"}, r"is not 'self', no \.txt or \.parquet file"),
        ({"corpus": "empty.txt"}, r"empty\.txt has no text"),
        ({"corpus": "other.parquet"}, r"must have a column 'text', got body"),
        ({"passage_tokens": 129}, r"at most the 128 positions of tiny, got 129"),
    ],
)
def test_a_corpus_that_cannot_be_used(
    folder: Path,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(workspace)
    Path("empty.txt").write_text("\n \n", encoding="utf-8")
    pq.write_table(pa.table({"body": ["text"]}), "other.parquet")
    with pytest.raises(ValueError, match=message):
        ensure(config_of(folder, **settings))
