"""The second moments of layers, summed chunk by chunk of a corpus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cluster.queue import Grid, Lease
from cluster.store import Store
from jobs.inputs.corpus import Corpus
from jobs.runs.config import ModelConfig
from jobs.tasks.loading import load_model, one_device
from rome.second_moment import MomentOrigin, SecondMoment, accumulate, merge, save

GROUP = "parts"


@dataclass(frozen=True)
class Moments:
    """Everything that a worker must know: the model, its layers, and the corpus by chunks."""

    model: ModelConfig
    layers: Sequence[int]
    corpus: Corpus
    grid: Grid

    def task(self) -> MomentTask:
        return MomentTask(self)

    def dead_row(self, lease: Lease, error: str) -> pa.Table:
        row = {"case_id": lease.start, "error": error, "attempts": lease.attempt}
        return pa.Table.from_pylist([row])


class MomentTask:
    """A pinned model that sums k k^T over chunks of a corpus."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self.model = load_model(moments.model)
        self.fingerprint = self.model.fingerprint()

    def describe(self) -> dict[str, Any]:
        return {"model_fingerprint": self.fingerprint}

    def verify(self) -> None:
        """Nothing here writes to a weight."""

    def run(self, lease: Lease) -> pa.Table:
        """A row for each chunk; the first has the sums over all of them."""
        moments, chunks = self.moments, self.moments.grid.ids(lease)
        sums: dict[int, SecondMoment] = {}
        for chunk in chunks:
            sums = accumulate(
                self.model, moments.layers, moments.corpus.texts(self.model, chunk), sums
            )
        count = next(iter(sums.values())).count
        columns = {
            "case_id": pa.array(chunks),
            "count": pa.array(_first(count, chunks)),
            "model_fingerprint": pa.array([self.fingerprint] * len(chunks)),
        }
        for layer, moment in sums.items():
            packed = _first(_packed(moment.sum_KK), chunks)
            columns[_column(layer)] = pa.array(packed, pa.large_binary())
        return pa.table(columns)


def _first(value: Any, chunks: Sequence[int]) -> list[Any]:
    return [value] + [None] * (len(chunks) - 1)


def _column(layer: int) -> str:
    return f"sum_{layer}"


def _packed(sum_KK: Tensor) -> bytes:
    """The lower triangle, row by row: the matrix is symmetric, and large."""
    rows = sum_KK.cpu().numpy()
    return np.concatenate([row[: i + 1] for i, row in enumerate(rows)]).tobytes()


def _unpacked(data: pa.Buffer) -> Tensor:
    flat = np.frombuffer(data, dtype=np.float64)
    size = math.isqrt(2 * len(flat))
    lower_KK = torch.zeros(size, size, dtype=torch.float64)
    for i, row in enumerate(lower_KK.numpy()):
        row[: i + 1] = flat[i * (i + 1) // 2 :][: i + 1]
    return lower_KK + lower_KK.tril(-1).T


def write(
    parts: Store, grid: Grid, layer: int, origin: MomentOrigin, file: Path, device: str
) -> dict[str, float]:
    """Merge the sums of a layer and write its file: a worker's work, which holds the matrices.

    Returns its `tokens`, `condition_number`, and where it has several parts, `half`: the relative
    distance of the C of half the tokens or more. Raises UnsolvableError, and ValueError where the
    sums are not of the origin's weights.
    """
    total, half, device = None, None, one_device(device)
    chosen = _covering(parts, len(grid))
    counts = [parts.read_table(part, ["count"])["count"][0].as_py() for part in chosen]
    for part in chosen:
        row = parts.read_table(part, ["model_fingerprint", "count", _column(layer)]).slice(0, 1)
        (fingerprint,) = row["model_fingerprint"].to_pylist()
        if fingerprint != origin.model_fingerprint:
            raise ValueError(
                f"{parts.uri}/{part} must be of the weights {origin.model_fingerprint[:16]}, but "
                f"is of {fingerprint[:16]}; delete {parts.uri} and run the same command again"
            )
        (count,) = row["count"].to_pylist()
        sum_KK = _unpacked(row[_column(layer)][0].as_buffer()).to(device)
        total = merge(filter(None, (total, SecondMoment(sum_KK, count))))
        if half is None and len(chosen) > 1 and 2 * total.count >= sum(counts):
            half = total.mean()
    assert total is not None
    solver, C_KK = save(file, total, origin), total.mean()
    found = {"tokens": total.count, "condition_number": solver.condition_number()}
    if half is not None and len(chosen) > 1:
        found["half"] = float((half - C_KK).norm() / C_KK.norm())
    return found


def _covering(parts: Store, chunks: int) -> list[str]:
    """Parts that have each chunk once: of a lease that was split after all, the whole one."""
    covered: set[int] = set()
    chosen = []
    found = {
        name: set(parts.read_table(name, ["case_id"])["case_id"].to_pylist())
        for name in parts.list(f"{GROUP}/part-", ".parquet")
    }
    for name in sorted(found, key=lambda name: (-len(found[name]), name)):
        if not covered & found[name]:
            covered |= found[name]
            chosen.append(name)
    if covered != set(range(chunks)):
        raise RuntimeError(f"{parts.uri} lacks chunks {sorted(set(range(chunks)) - covered)}")
    return chosen
