"""docs/ray-data.md does what it says, on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl

from tests.support import tiny
from tests.support.commands import command

DOC = (Path(__file__).parents[1] / "docs" / "ray-data.md").read_text("utf-8")


def test_records_are_edited_in_a_pipeline_and_results_read(
    tmp_path: Path, ray_address: str
) -> None:
    model = tiny.model("gpt2", "float32")
    tiny.save(model, tmp_path / "model")
    assert command("prepare", "everyday", "--limit", 6, "--out", tmp_path / "records")[0] == 0
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", DOC, re.DOTALL))
    for name, value in (("MODEL", "model"), ("RECORDS", "records")):
        blocks = re.sub(rf'^{name} = ".*?"', f'{name} = "{tmp_path / value}"', blocks, flags=re.M)
    blocks = blocks.replace('"mine")\n', f'"{tmp_path / "mine"}")\n')
    blocks += f'print(ray.data.read_parquet("{tmp_path}/records/shard-00000.parquet").count())'
    (tmp_path / "pipeline.py").write_text(blocks, "utf-8")
    # A process of its own, as a user's: Ray Data ends a process whose Ray it takes for lost.
    done = subprocess.run(
        [sys.executable, tmp_path / "pipeline.py"],
        env={**os.environ, "RAY_ADDRESS": ray_address},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    rows = pl.read_parquet(tmp_path / "mine/*.parquet")
    assert rows["case_id"].sort().to_list() == [0, 1, 2, 3]
    assert (rows["edit_norm"] > 0).all()
    assert rows["neighborhood_nll_true"].list.len().to_list() == [10] * 4
    seconds, count = done.stdout.splitlines()[-2:]
    assert float(seconds) > 0
    assert count == "6"
