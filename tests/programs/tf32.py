"""The columns of a run in float32 and in tf32, which this machine emulates.

python -m tests.programs.tf32 STORE --records 40 --out FOLDER

Everything is computed in this process, twice, one record after another in leases; both runs go on
where they were. C is float32's in both.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import polars as pl

from jobs.evaluate import evaluate
from jobs.runs import config as configs
from rome.paths import CONFIGS
from tests.support.tf32 import Tf32

COLUMNS = ["ES", "EM", "PS", "PM", "NS", "NM", "GE", "RS", "NS_plus", "ES_strict"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", help="records, as jobs.prepare makes them")
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    args = parser.parse_args()
    rows = {}
    for name, mode in (("float32", nullcontext()), ("tf32", Tf32())):
        overrides = [
            f"name={name}",
            f"benchmark={args.store}",
            f"records.limit={args.records}",
            "workers.workers=0",
            *args.overrides,
        ]
        out = str(args.out / name)
        with mode:
            evaluate(configs.load(CONFIGS / "runs" / "everyday-rome.yaml", overrides), out)
        rows[name] = pl.read_parquet(f"{out}/results/**/*.parquet", hive_partitioning=True)
    pair = rows["float32"].join(rows["tf32"], on=["editor", "case_id"], suffix="_tf32")
    differences = [
        (pl.col(f"{column}_tf32") - pl.col(column)).abs() for column in COLUMNS if column in pair
    ]
    with pl.Config(tbl_cols=-1, fmt_float="full"):
        for what in ("mean", "max"):
            print(what, "of the difference of a record")
            print(pair.group_by("editor").agg(pl.len(), *(getattr(d, what)() for d in differences)))


if __name__ == "__main__":
    main()
