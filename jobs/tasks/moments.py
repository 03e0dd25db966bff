"""The second moments of layers, summed chunk by chunk of a corpus."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cluster.queue import Grid, Lease
from cluster.run import RunError
from cluster.store import Store
from jobs.inputs.corpus import Corpus
from jobs.runs.config import ModelConfig
from jobs.tasks.loading import load_model
from rome.second_moment import SecondMoment, accumulate, merge

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
        (chunk,) = self.moments.grid.ids(lease)
        texts = self.moments.corpus.texts(self.model, chunk)
        moments = accumulate(self.model, self.moments.layers, texts)
        columns = {
            "case_id": pa.array([chunk]),
            "count": pa.array([next(iter(moments.values())).count]),
            "model_fingerprint": pa.array([self.fingerprint]),
        }
        for layer, moment in moments.items():
            columns[_column(layer)] = pa.array([_packed(moment.sum_KK)], pa.large_binary())
        return pa.table(columns)


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


def merged(parts: Store, grid: Grid, layer: int) -> tuple[SecondMoment, str]:
    """The sum over all chunks in their order, and the fingerprint of the model that made them."""
    fingerprints: set[str] = set()

    def moments() -> Iterator[SecondMoment]:
        for lease in grid.leases(GROUP):
            row = parts.read_table(lease.part, ["model_fingerprint", "count", _column(layer)])
            fingerprints.update(row["model_fingerprint"].to_pylist())
            (count,) = row["count"].to_pylist()
            yield SecondMoment(_unpacked(row[_column(layer)][0].as_buffer()), count)

    moment = merge(moments())
    if len(fingerprints) > 1:
        raise RunError(
            f"the chunks must all be of one model, but were computed with {len(fingerprints)} "
            f"different weights; delete {parts.uri} and run the same command again"
        )
    return moment, fingerprints.pop()
