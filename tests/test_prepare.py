"""Preparation as its user sees it: a source in, a store or a message out."""

import gzip
import http.server
import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from cluster.lock import LockedError
from cluster.store import Store
from jobs.inputs.record_stores import check, describe, prepare
from rome.data import fact_tables
from rome.data.facts import Relation
from rome.data.records import Record, from_table
from rome.paths import CONFIGS
from tests.support.commands import command

SHARED = Path(__file__).parents[2] / "shared" / "data"

CSV = """relation,templates,subject,object
pets,{} is a pet of the kind|We call {} a,Rex,dog
pets,,Fido,dog
pets,,Lassie,dog
pets,,Tom,cat
pets,,Garfield,cat
pets,,Felix,cat
"""


LONELY = """relation,templates,subject,object
capital,The capital of {} is|The government of {} sits in,France,Paris
capital,,Italy,Rome
"""


def test_facts_whose_objects_have_one_subject_each_are_told_what_they_lose(tmp_path: Path) -> None:
    (tmp_path / "lonely.csv").write_text(LONELY)
    status, text = command("prepare", tmp_path / "lonely.csv", "--out", tmp_path / "store")
    assert status == 0
    said = " ".join(text.split())
    assert "note: 2 of 2 records have no neighborhood prompts: they have no NS" in said
    assert "other subjects with the same object" in said
    assert "paraphrase prompts" not in said
    (tmp_path / "pets.csv").write_text(CSV)
    status, text = command("prepare", tmp_path / "pets.csv", "--out", tmp_path / "pets")
    assert (status, "note:" in text) == (0, False)


def row(case_id: int, **rewrite: Any) -> dict[str, Any]:
    return {
        "case_id": case_id,
        "requested_rewrite": {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "target_new": {"str": "Rome", "id": "Q220"},
            "target_true": {"str": "Paris", "id": "Q90"},
            "subject": f"Land {case_id}",
        }
        | rewrite,
        "paraphrase_prompts": ["It rained. The capital city is"],
        "neighborhood_prompts": ["The capital of France is"],
        "attribute_prompts": ["The capital of Italy is"],
        "generation_prompts": ["In the capital"],
    }


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(rows), "utf-8")
    return str(path)


def read(out: Path) -> list[Record]:
    store = Store(out)
    names = store.list("shard-", ".parquet")
    return [record for name in names for record in from_table(store.read_table(name))]


def run(*args: object) -> tuple[int, str]:
    """Exit status, and what was printed, in one line."""
    status, output = command("prepare", *args)
    return status, " ".join(output.split())


@pytest.mark.parametrize(("rows", "sizes"), [(9, [4, 4, 1]), (8, [4, 4]), (3, [3])])
def test_shards_have_their_borders(tmp_path: Path, rows: int, sizes: list[int]) -> None:
    source = write(tmp_path / "mine.json", [row(i) for i in range(rows)])
    status, _ = run(source, "--out", tmp_path / "out", "--shard-rows", 4)
    assert status == 0
    store = Store(tmp_path / "out")
    names = [f"shard-{i:05d}.parquet" for i in range(len(sizes))]
    assert store.list("shard-") == names
    assert [store.read_table(name).num_rows for name in names] == sizes
    assert [record.case_id for record in read(tmp_path / "out")] == list(range(rows))
    manifest = json.loads(store.read_bytes("manifest.json"))
    assert (manifest["name"], manifest["rows"], manifest["rows_per_shard"]) == ("mine", rows, 4)


def test_bad_rows_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    rows = [row(0), row(1, subject=""), row(2), row(2), row(4, prompt="No place")]
    source = write(tmp_path / "bad.json", rows)
    status, output = run(source, "--out", tmp_path / "out")
    assert status == 1
    assert f"{source}, row 2 (case_id 1): subject must be text and not empty" in output
    assert f"{source}, row 4 (case_id 2): case_id must be unique, also in {source}, row 3" in output
    assert f"{source}, row 5 (case_id 4): prompt must contain exactly one '{{}}'" in output
    assert not (tmp_path / "out").exists()


def test_skip_invalid_leaves_bad_rows_out_and_lists_them(tmp_path: Path) -> None:
    source = write(tmp_path / "bad.json", [row(0), row(1, subject=""), row(2)])
    status, output = run(source, "--out", tmp_path / "out", "--skip-invalid")
    assert status == 0
    assert "1 bad rows were left out" in output
    assert "row 2 (case_id 1)" in output
    assert [record.case_id for record in read(tmp_path / "out")] == [0, 2]
    [skipped] = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["skipped"]
    assert "row 2 (case_id 1): subject" in skipped


def test_limit_takes_the_first_rows_and_checks_only_them(tmp_path: Path) -> None:
    source = write(tmp_path / "mine.json", [row(0), row(1), row(2, subject="")])
    assert prepare(source, str(tmp_path / "out"), limit=2)["rows"] == 2
    assert [record.case_id for record in read(tmp_path / "out")] == [0, 1]


def test_same_source_is_a_no_op_and_another_is_refused(tmp_path: Path) -> None:
    source, out = write(tmp_path / "mine.json", [row(i) for i in range(5)]), tmp_path / "out"
    assert run(source, "--out", out)[0] == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    status, output = run(source, "--out", out)
    assert (status, "nothing to do" in output) == (0, True)
    status, output = run(source, "--out", out, "--limit", 3)
    assert status == 1
    assert "limit: None there, 3 asked for" in output
    write(tmp_path / "mine.json", [row(i) for i in range(6)])
    status, output = run(source, "--out", out)
    assert status == 1
    assert "rows: 5 there, 6 asked for" in output
    assert "sha256:" in output
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}


def test_a_failed_preparation_leaves_no_store_and_is_done_again(tmp_path: Path) -> None:
    source, out = write(tmp_path / "mine.json", [row(i) for i in range(9)]), tmp_path / "out"
    obstacle = out / "shard-00003.parquet"
    obstacle.mkdir(parents=True)
    assert run(source, "--out", out, "--shard-rows", 2)[0] == 1
    status, output = run("describe", out)
    # Words between colons, as in the ids of data sets, are no emoji.
    assert "'a:train:b' is no file" in run("a:train:b", "--out", out)[1]
    assert (status, "is no store: it has no manifest.json" in output) == (1, True)
    obstacle.rmdir()
    prepare(source, str(out), shard_rows=5)
    assert [record.case_id for record in read(out)] == list(range(9))


def test_gzip_and_plain_file_are_the_same_source(tmp_path: Path) -> None:
    source = Path(write(tmp_path / "mine.json", [row(i) for i in range(3)]))
    (tmp_path / "mine.json.gz").write_bytes(gzip.compress(source.read_bytes()))
    plain = prepare(str(source), str(tmp_path / "plain"))
    assert prepare(f"{source}.gz", str(tmp_path / "zipped")) == plain
    assert read(tmp_path / "plain") == read(tmp_path / "zipped")


def test_datasets_folders(tmp_path: Path) -> None:
    rows = [row(i) for i in range(4)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    DatasetDict(
        {"train": Dataset.from_list(rows[:3]), "test": Dataset.from_list(rows[3:])}
    ).save_to_disk(tmp_path / "splits")
    source = write(tmp_path / "mine.json", rows)
    prepare(source, str(tmp_path / "expected"))
    for name in ("one", "splits"):
        prepare(str(tmp_path / name), str(tmp_path / "out" / name))
        assert read(tmp_path / "out" / name) == read(tmp_path / "expected")
    Dataset.from_list([*rows, row(4, subject="")]).save_to_disk(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"bad, split all, row 5 \(case_id 4\): subject"):
        prepare(str(tmp_path / "bad"), str(tmp_path / "never"))


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """The address under which the files of `tmp_path` are served."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_url_with_reference_texts(tmp_path: Path, url: str) -> None:
    source = write(tmp_path / "mine.json", [row(0), row(1)])
    samples = [{"name": "Italy", "text": "Rome is old."}, {"name": "Lazio", "text": "Rome is big."}]
    snippets = [{"relation_id": "P36", "target_id": "Q220", "samples": samples}]
    write(tmp_path / "texts.json", snippets)
    out = tmp_path / "out"
    texts = f"{url}/texts.json"
    manifest = prepare(f"{url}/mine.json", str(out), reference_texts=texts)
    assert manifest["sha256"] == prepare(source, str(tmp_path / "file"))["sha256"]
    assert read(out) == read(tmp_path / "file")
    table = Store(out).read_table("reference_texts.parquet")
    assert table["text"].to_pylist() == ["Rome is old.", "Rome is big."]
    idf = dict(zip(*Store(out).read_table("reference_tfidf.parquet").to_pydict().values(),
                   strict=True))  # fmt: skip
    # Smooth idf: ln((1 + n) / (1 + df)) + 1 with n = 2.
    assert idf == pytest.approx({"big": 1.4054651, "is": 1.0, "old": 1.4054651, "rome": 1.0})
    with pytest.raises(ValueError, match=r"missing\.json cannot be read: HTTP Error 404"):
        prepare(f"{url}/missing.json", str(tmp_path / "never"))


def test_reference_texts_of_another_form_are_refused(tmp_path: Path) -> None:
    source, out = write(tmp_path / "mine.json", [row(0)]), tmp_path / "out"
    bad = write(tmp_path / "texts.json", [{"relation_id": "P36", "samples": []}])
    with pytest.raises(ValueError, match=r"texts\.json, row 1: must be .*'target_id'"):
        prepare(source, str(out), reference_texts=bad)
    assert not out.exists()


def test_a_file_of_the_official_size_must_have_the_official_digest(tmp_path: Path) -> None:
    path = tmp_path / "counterfact.json"
    with path.open("wb") as file:
        file.truncate(45_108_470)
    status, output = run(path, "--out", tmp_path / "out")
    assert status == 1
    assert (
        "sha256 must be d017056125178a13728594e66a801357a8db9ed7973a7425554bb4271de9fc6f" in output
    )
    assert "Fetch it again from https://rome.baulab.info/data/dsets/counterfact.json" in output


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine.json", "{", "is not JSON"),
        ("mine.json", "{}", "must hold a list, got a dict"),
        ("mine.json", "[]", "holds no valid record"),
        ("mine.json.gz", "\x1f\x8b cut short", "cannot be read"),
        ("facts.csv", "relation,subject,object\n", "no ['templates']"),
        (
            "facts.csv",
            CSV.replace("{} is a", "It is a"),
            "line 2: relation 'pets': a template must",
        ),
        ("facts.csv", CSV + "pets,,Rex,cat\n", "line 8: subject 'Rex' must appear once"),
        ("facts.csv", CSV + "pets,,Flipper,\n", "line 8: object must be text"),
        ("facts.csv", CSV + "pets,{} is,Flipper,cat\n", "line 8: relation 'pets' already has the"),
        ("facts.csv", CSV.replace(",cat", ",dog"), "relation 'pets' has the one object 'dog'"),
        (
            "facts.yaml",
            "relations: [{id: a}]",
            "relation 'a': facts must map each object to a list",
        ),
        ("facts.yaml", "relations: [", "not YAML: "),
        ("facts.yaml", "relations: [{id: a, fact: {}}]", "relation 'a' has unknown keys ['fact']"),
        (
            "facts.yaml",
            "relations: [{id: a, templates: ['{} is'], facts: {b: [c, 1984], d: [e]}}]",
            "line 1: a value must be text, and 1984 is read as a number; quote it",
        ),
    ],
)
def test_sources_that_cannot_be_used(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*{re.escape(message)}"):
        prepare(str(tmp_path / name), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_mistyped_benchmark_is_told_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"none of the benchmarks \['counterfact', 'everyday', 'qaedit', 'zsre'\]"
    ):
        prepare("evryday", str(tmp_path / "out"))


def test_a_fact_table_in_csv(tmp_path: Path) -> None:
    (tmp_path / "pets.csv").write_text(CSV + "pets,,Nobody,\n", "utf-8")
    out = tmp_path / "out"
    manifest = prepare(str(tmp_path / "pets.csv"), str(out), skip_invalid=True)
    assert (manifest["rows"], len(manifest["skipped"])) == (6, 1)
    rex = next(record for record in read(out) if record.subject == "Rex")
    assert rex.prompt == "{} is a pet of the kind"
    assert (rex.target_true, rex.target_new) == ("dog", "cat")
    # Appendix D: a distracting sentence, then another wording.
    assert all(p.endswith(". We call Rex a") for p in rex.paraphrase_prompts)
    assert len(set(rex.paraphrase_prompts)) == 2
    # Two other dogs in two wordings are all the neighbours there are.
    assert sorted(rex.neighborhood_prompts) == [
        "Fido is a pet of the kind",
        "Lassie is a pet of the kind",
        "We call Fido a",
        "We call Lassie a",
    ]
    # Every neighbour comes once before one comes again.
    first, second = rex.neighborhood_prompts[:2]
    assert ("Fido" in first) != ("Fido" in second)
    assert len(set(rex.attribute_prompts)) == 6
    assert len(rex.generation_prompts) == 10
    texts = Store(out).read_table("reference_texts.parquet").to_pylist()
    assert {"relation_id": "pets", "target_id": "cat", "name": "Tom",
            "text": "We call Tom a cat."} in texts  # fmt: skip


def test_a_fact_keeps_its_draws_when_the_table_is_reordered(tmp_path: Path) -> None:
    head, *lines = CSV.replace("pets,,", "pets,{} is a pet of the kind|We call {} a,").splitlines()
    for name, order in (("a", lines), ("b", lines[::-1])):
        (tmp_path / f"{name}.csv").write_text("\n".join([head, *order]), "utf-8")
        prepare(str(tmp_path / f"{name}.csv"), str(tmp_path / name))
    assert read(tmp_path / "a") == read(tmp_path / "b")


def test_everyday_facts_are_complete(tmp_path: Path) -> None:
    manifest = prepare("everyday", str(tmp_path / "a"))
    records = read(tmp_path / "a")
    assert (manifest["name"], manifest["skipped"]) == ("everyday", [])
    assert len(records) >= 250
    assert len({record.relation_id for record in records}) >= 12
    table = fact_tables.read_yaml((CONFIGS / "facts" / "everyday.yaml").read_bytes())
    relations = {relation.id: relation for relation in table.relations}
    for record in records:
        record.check()
        relation = relations[record.relation_id or ""]

        def about(target: str, subject: str = record.subject, of: Relation = relation) -> set[str]:
            others = [f.subject for f in of.facts if f.object == target and f.subject != subject]
            return {template.replace("{}", other) for template in of.templates for other in others}

        neighbors, attributes = set(record.neighborhood_prompts), set(record.attribute_prompts)
        assert len(neighbors) == len(attributes) == len(record.generation_prompts) == 10
        assert neighbors <= about(str(record.target_true))
        assert attributes <= about(record.target_new)
        assert all(record.subject in prompt for prompt in record.generation_prompts)
        assert len(set(record.paraphrase_prompts)) == 2
        for prompt in record.paraphrase_prompts:
            assert prompt.startswith(tuple(table.distractors))
            assert record.subject in prompt
    # The first records are a sample of the relations, not the first relation.
    assert len({record.relation_id for record in records[:30]}) >= 8
    targets = {(r.relation_id, r.target_new_id) for r in records}
    texts = Store(tmp_path / "a").read_table("reference_texts.parquet").to_pylist()
    assert targets <= {(text["relation_id"], text["target_id"]) for text in texts}
    # The same bytes twice.
    prepare("everyday", str(tmp_path / "b"))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )


def test_describe_has_the_shape_of_table_2(tmp_path: Path) -> None:
    rows = [row(0), row(1), row(2, relation_id="P17", target_new={"str": "Oslo", "id": None})]
    prepare(write(tmp_path / "mine.json", rows), str(tmp_path / "out"))
    assert {item: rest for item, *rest in describe(Store(tmp_path / "out"))} == {
        "Relations": [2, None, None],
        "Records": [3, 1.5, 1.0],
        "Subjects": [3, 1.5, 1.0],
        "Objects": [2, 1.0, 1.0],
        "Counterfactual statements": [3, 1.5, 1.0],
        "Paraphrase prompts": [1, 1.0, 1.0],
        "Neighborhood prompts": [1, 1.0, 1.0],
        "Attribute prompts": [1, 1.0, 1.0],
        "Generation prompts": [1, 1.0, 1.0],
    }
    status, output = run("describe", tmp_path / "out")
    assert status == 0
    assert "Counterfactual statements" in output


def test_the_whole_benchmark_has_the_composition_of_the_paper(tmp_path: Path) -> None:
    """Subjects, objects and statements of Table 2; the prompts of this copy are partial."""
    path = SHARED / "counterfact_partial_21919.json.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the repository")
    assert prepare(str(path), str(tmp_path / "out"))["rows"] == 21_919
    totals = {item: total for item, total, _, _ in describe(Store(tmp_path / "out"))}
    assert totals["Relations"] == 34
    assert totals["Subjects"] == 20_391
    assert totals["Objects"] == 749
    assert totals["Counterfactual statements"] == 21_595


def test_a_store_whose_shards_are_not_those_of_its_manifest_is_refused(tmp_path: Path) -> None:
    """Lost, one too many, or changed: a run would be of other records than it says."""
    source = write(tmp_path / "mine.json", [row(i) for i in range(4)])
    out = tmp_path / "out"
    prepare(source, str(out), shard_rows=2)
    store = Store(out)
    check(store)
    second = (out / "shard-00001.parquet").read_bytes()
    (out / "shard-00002.parquet").write_bytes(second)
    with pytest.raises(ValueError, match=r"has beside them shard-00002\.parquet"):
        check(store)
    (out / "shard-00002.parquet").unlink()
    (out / "shard-00001.parquet").write_bytes((out / "shard-00000.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"other records .* in shard-00001\.parquet"):
        check(store)
    (out / "shard-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"lacks shard-00001\.parquet. Restore them"):
        check(store)
    old = json.loads((out / "manifest.json").read_text())
    del old["shards"]
    (out / "manifest.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"must have the 4 records .* has 2\. Restore them"):
        check(store)
    (out / "shard-00001.parquet").write_bytes(second)
    check(store)


def test_of_two_preparations_at_once_one_waits_or_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "mine.json", [row(i) for i in range(40)])
    out, outcomes = str(tmp_path / "out"), []

    def one(limit: int | None) -> None:
        try:
            outcomes.append(prepare(source, out, shard_rows=2, limit=limit)["rows"])
        except (ValueError, LockedError) as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=one, args=[limit]) for limit in (None, 30, None, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (rows,) = {outcome for outcome in outcomes if isinstance(outcome, int)}
    assert (
        sum(len(from_table(Store(out).read_table(name))) for name in Store(out).list("shard-"))
        == rows
    )
    check(Store(out))
