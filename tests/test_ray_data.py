"""docs/ray-data.md does what it says, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest
import ray.data

from tests.support import tiny
from tests.support.commands import command

DOC = (Path(__file__).parents[1] / "docs" / "ray-data.md").read_text("utf-8")


@pytest.mark.usefixtures("ray_address")
def test_records_are_edited_in_a_pipeline_and_results_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.model("gpt2", "float32")
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    assert command("prepare", "everyday", "--limit", 6, "--out", tmp_path / "records")[0] == 0
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", DOC, re.DOTALL))
    for name, value in (("MODEL", "model"), ("RECORDS", "records")):
        blocks = re.sub(rf'^{name} = ".*?"', f'{name} = "{tmp_path / value}"', blocks, flags=re.M)
    blocks = blocks.replace('"mine")\n', f'"{tmp_path / "mine"}")\n')
    exec(compile(blocks, "docs/ray-data.md", "exec"), {})
    rows = pl.read_parquet(tmp_path / "mine/*.parquet")
    assert rows["case_id"].sort().to_list() == [0, 1, 2, 3]
    assert (rows["edit_norm"] > 0).all()
    assert rows["neighborhood_nll_true"].list.len().to_list() == [10] * 4
    assert float(capsys.readouterr().out.splitlines()[-1]) > 0
    assert ray.data.read_parquet(str(tmp_path / "records/shard-00000.parquet")).count() == 6
