"""What reads a run takes memory by its rows, and little for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import readers

FEW, MANY = 200, 1200
BOUND_KB = 40
"""For each row. At full size, of 241,109 rows, a report takes 9 and a table 4."""


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["reduce", "report"])
def test_a_row_takes_no_more_memory_than_is_said(reader: str, tmp_path: Path) -> None:
    peaks = []
    for records in (FEW, MANY):
        readers.make(tmp_path / str(records), records, editors=2)
        peaks.append(readers.read(reader, tmp_path / str(records))["peak_GB"])
    assert (peaks[1] - peaks[0]) * 2**20 / (2 * (MANY - FEW)) <= BOUND_KB
