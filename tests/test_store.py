"""The store: whole files or none, on a local folder and on a URI."""

import pickle
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import polars as pl
import pyarrow as pa
import pytest

from cluster.store import Store
from cluster.words import deliberate

TABLE = pa.table({"case_id": [1, 2, 3], "text": ["a", None, "é"]})


@pytest.fixture(params=["path", "uri"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    folder = tmp_path / "a folder" if request.param == "path" else tmp_path / "folder"
    return Store(folder if request.param == "path" else folder.as_uri())


def test_what_is_written_is_read_by_a_pickled_copy(store: Store) -> None:
    store.write_table("benchmark=x/part-0.parquet", TABLE)
    store.sub("benchmark=x").write_bytes("note.txt", b"hello")
    copy: Store = pickle.loads(pickle.dumps(store))
    # The hive folder must not come back as a column.
    assert copy.read_table("benchmark=x/part-0.parquet").equals(TABLE)
    assert copy.read_bytes("benchmark=x/note.txt") == b"hello"
    assert copy.read_table("benchmark=x/part-0.parquet", ["case_id", "error"]).column_names == [
        "case_id"
    ]


def test_list_is_recursive_and_ignores_hidden_names(store: Store) -> None:
    assert store.list() == []
    for name in (
        "b/part-1.parquet",
        "a/part-0.parquet",
        "a/.tmp-1",
        "_lock.json",
        "a/_x/y.parquet",
    ):
        store.write_bytes(name, b"")
    assert store.list() == ["a/part-0.parquet", "b/part-1.parquet"]
    assert store.list("a/", ".parquet") == ["a/part-0.parquet"]
    assert store.list("b/part-0") == []
    assert store.list("nowhere/") == []


def test_exists_replace_and_delete(store: Store) -> None:
    assert not store.exists("x/y.json")
    store.write_bytes("x/y.json", b"1")
    store.write_bytes("x/y.json", b"2")
    assert store.exists("x/y.json")
    assert not store.exists("x")
    assert store.read_bytes("x/y.json") == b"2"
    store.delete("x/y.json")
    assert not store.exists("x/y.json")
    with pytest.raises(FileNotFoundError):
        store.read_bytes("x/y.json")


def test_only_the_first_creates(store: Store) -> None:
    assert store.create("x/manifest.json", b"1")
    assert not store.create("x/manifest.json", b"2")
    assert store.read_bytes("x/manifest.json") == b"1"
    assert store.list() == ["x/manifest.json"]


@pytest.mark.parametrize("content", [b"not parquet at all", b"", None])
def test_a_broken_part_is_named(store: Store, content: bytes | None) -> None:
    if content is None:
        store.write_table("whole.parquet", TABLE)
        content = store.read_bytes("whole.parquet")[:-20]
    store.write_bytes("group/part-7.parquet", content)
    with pytest.raises(ValueError, match=r"group/part-7\.parquet is not a whole Parquet file"):
        store.read_table("group/part-7.parquet")


def test_a_writer_killed_in_the_middle_leaves_nothing_to_read(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from cluster.store import Store\n"
        "os.fsync = lambda fd: os.kill(os.getpid(), 9)\n"
        "Store(sys.argv[1]).write_bytes('part-0.parquet', b'half')\n"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root)
    assert result.returncode == -9
    assert Store(tmp_path).list() == []
    Store(tmp_path).write_bytes("part-1.parquet", b"whole")
    assert len(list(tmp_path.iterdir())) == 2
    Store(tmp_path).sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["part-1.parquet"]


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        Store(tmp_path).write_bytes("taken", b"a folder has this name")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_write_that_the_disk_refuses_is_the_stores_fault(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys\n"
        "from cluster.store import Store, StoreError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try:\n"
        "    Store(sys.argv[1]).write_bytes('part-0.parquet', bytes(100))\n"
        "except StoreError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert f"{tmp_path}: [Errno 27] File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a b", "50%", "a#b", "what?", "ünï", "a%20b", "[x]"])
def test_odd_names_are_the_same_folder_as_path_and_as_uri(tmp_path: Path, name: str) -> None:
    table = pa.table({"case_id": [1]})
    Store(tmp_path / name).write_table(f"{name}/part.parquet", table)
    uri = Store(f"file://{tmp_path}/{quote(name)}")
    assert uri.list() == [f"{name}/part.parquet"]
    assert uri.sub(name).read_table("part.parquet").equals(table)
    assert pl.read_parquet(uri.sub(name).address("part.parquet"), glob=False).height == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("file:///tmp/a#b", "as %23 and %3F"),
        ("file:///tmp/a?b", "as %23 and %3F"),
        ("file:///tmp/a?", "as %23 and %3F"),
        ("gs://bucket/a?", "as %23 and %3F"),
        ("file:/tmp/a", "two slashes, such as file://"),
        ("s3:/bucket/a", "two slashes, such as s3://"),
        ("s3://bucket/a#b", "as %23 and %3F"),
        ("s3://bucket/50%", "'%' of a name as %25"),
        ("s3://key:hush@bucket/a", "no password or key in it"),
        (
            "s3://bucket/a?endpoint_override=http%3A%2F%2Fu%3Ahush%40host",
            "no password or key in it",
        ),
        ("s3://bucket/a?access_key=k&secret_key=hush", "no password or key in it"),
    ],
)
def test_a_uri_loses_nothing_and_tells_no_secret(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Store(uri)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("uri", ["gs://bucket/run?1", "file://tmp/a", "nowhere://bucket/a"])
def test_a_uri_that_cannot_be_opened_is_the_users_error(uri: str) -> None:
    with pytest.raises(ValueError, match="one that pyarrow can open") as caught:
        Store(uri).list()
    assert uri in str(caught.value)
    assert deliberate(caught.value)
