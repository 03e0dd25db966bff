"""jobs.trace as a user runs it: a tiny model that knows two facts of three, on real Ray."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import polars as pl
import pytest
import yaml

from rome import tracing
from rome.analysis.effects import ROLES
from tests.support import tiny
from tests.support.commands import command
from tests.support.computations import FACTS, TRACING, taught


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its facts, of which it does not know one, and the config of a trace."""
    folder = tmp_path_factory.mktemp("trace")
    model = taught("gpt2")
    tiny.save(model, folder / "model")
    facts = [asdict(fact) for fact in (*FACTS[:2], replace(FACTS[2], attribute="Rome"))]
    (folder / "facts.json").write_text(json.dumps(facts))
    config = {
        "name": "tiny",
        "model": {
            "name": "tiny-gpt2",
            "source": str(folder / "model"),
            "dtype": "float64",
            "editors": {"rome": {"layer": 1}},
        },
        "facts": str(folder / "facts.json"),
        "trace": asdict(TRACING),
        "lease_facts": 2,
        "workers": {"num_cpus": 0.5, "workers": 2},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


def trace(folder: Path, out: Path, *options: str) -> tuple[int, str]:
    return command("trace", folder / "tiny.yaml", "--out", out, *options)


@pytest.fixture(scope="module")
def traced(folder: Path, ray_address: str) -> tuple[Path, str]:
    out = folder / "run"
    status, text = trace(folder, out, "--fact", "4")
    assert status == 0, text
    return out, text


def test_effects_are_those_of_the_traces(traced: tuple[Path, str]) -> None:
    """Every number of the table from traces that were made here, and none of the unknown fact."""
    out, _ = traced
    frame = pl.read_parquet(out / "effects.parquet")
    assert set(frame["known_id"]) == {4, 5}
    model = taught("gpt2")
    std = json.loads((out / "manifest.json").read_text())["embedding_std"]
    assert std == pytest.approx(tracing.embedding_std(model, [f.subject for f in FACTS]))
    for kind in tracing.KINDS:
        for fact in FACTS[:2]:
            found = tracing.trace(model, fact, kind, TRACING, std, 10_000)
            assert found.restored is not None
            assert found.corrupted is not None
            expected = [
                (t, n, found.clean - found.corrupted, p - found.corrupted)
                for t, by_layer in enumerate(found.restored)
                for n, p in enumerate(by_layer or [])
            ]
            rows = frame.filter(kind=kind, known_id=fact.known_id)
            got = rows.select("token", "layer", "total_effect", "indirect_effect").rows()
            assert got == [pytest.approx(row, rel=1e-6, abs=1e-12) for row in expected]


def test_averages_are_over_the_tokens_of_a_role(traced: tuple[Path, str]) -> None:
    out, text = traced
    frame = pl.read_parquet(out / "effects.parquet")
    average = pl.read_parquet(out / "averages.parquet")
    assert set(average["role"]) == set(ROLES)
    middle = frame.filter(pl.col("roles").list.contains("middle subject"), kind="mlp", layer=1)
    assert len(middle) > 2
    (row,) = average.filter(kind="mlp", role="middle subject", layer=1).to_dicts()
    effects = middle["indirect_effect"].to_numpy()
    assert row["indirect_effect"] == pytest.approx(effects.mean())
    assert row["half_width"] == pytest.approx(1.96 * effects.std() / row["facts"] ** 0.5)
    mlp = average.filter(kind="mlp", role="last subject").sort("layer")["indirect_effect"]
    assert f"the trace suggests layer {mlp.arg_max()}" in text
    assert "2 known facts" in text


def test_figures_are_there(traced: tuple[Path, str]) -> None:
    names = ["averages", "fact-4", "lines", "severed"]
    for name in names:
        png, svg = (traced[0] / "figures" / f"trace-{name}.{form}" for form in ("png", "svg"))
        assert png.read_bytes().startswith(b"\x89PNG")
        assert "average indirect effect" in svg.read_text() or name == "fact-4"
        assert ("ROME's layer, 1" in svg.read_text()) == (name != "fact-4")
    assert "late site" in (traced[0] / "figures/trace-averages.svg").read_text()


def test_a_run_resumes_and_refuses_another_config(
    traced: tuple[Path, str], folder: Path, ray_address: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(traced[0], out)
    parts = sorted(out.glob("results/**/*.parquet"))
    assert len(parts) == 2 * len(tracing.KINDS)
    before = {part: part.stat().st_mtime_ns for part in parts}
    parts[3].unlink()
    status, text = trace(folder, out)
    assert status == 0, text
    after = {part: part.stat().st_mtime_ns for part in parts}
    assert [part for part in parts if before[part] != after[part]] == [parts[3]]
    columns = ["known_id", "kind", "token", "layer", "indirect_effect"]
    frames = [pl.read_parquet(d / "effects.parquet", columns=columns) for d in (traced[0], out)]
    assert frames[0].equals(frames[1])
    status, text = trace(folder, out, "--set", "trace.window=4")
    assert status == 1
    assert "config.trace.window: 2 there, 4 now" in text


def test_facts_without_their_keys_are_refused(
    folder: Path, ray_address: str, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text('[{"known_id": 1, "subject": "Rome", "prompt": "Rome is"}]')
    status, text = trace(folder, tmp_path / "run", "--set", f"facts={wrong}")
    assert status == 1
    assert "must be a JSON list of facts" in text
    assert "attribute" in text
