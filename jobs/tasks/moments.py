"""The second moments of layers, summed chunk by chunk of a corpus."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cluster.grid import Grid, Lease
from cluster.store import Store
from cluster.told import tell
from jobs.inputs.corpus import Corpus
from jobs.runs.config import ModelConfig
from jobs.runs.manifests import at_hand, file_sha256
from jobs.tasks.loading import load_model, one_device
from rome.second_moment import (
    MomentOrigin,
    SecondMoment,
    accumulate,
    import_npz,
    load,
    load_factor,
    save,
)
from rome.solver import Solver

GROUP = "parts"
_NOT_RECORDED = "not recorded"


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
        for number, chunk in enumerate(chunks):
            tell(number)
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


def _add_packed(lower_KK: Tensor, data: pa.Buffer) -> None:
    """Add what `_packed` made to the lower triangle of a matrix, in place."""
    flat = torch.from_numpy(np.frombuffer(data, dtype=np.float64).copy()).to(lower_KK.device)
    for i, row in enumerate(lower_KK):
        row[: i + 1] += flat[i * (i + 1) // 2 :][: i + 1]


def write(
    parts: Store, grid: Grid, layer: int, origin: MomentOrigin, file: Store, device: str
) -> dict[str, float]:
    """Merge the sums of a layer and write its file: a worker's work, which holds the matrices.

    Returns its `tokens`, `condition_number`, and where it has several parts, `half`: the relative
    distance of the C of half the tokens or more. Raises UnsolvableError, and ValueError where the
    sums are not of the origin's weights.
    """
    chosen = _covering(parts, len(grid))
    counts = [parts.read_table(part, ["count"])["count"][0].as_py() for part in chosen]
    total: SecondMoment | None = None
    half_KK: Tensor | None = None
    for part, count in zip(chosen, counts, strict=True):
        row = parts.read_table(part, ["model_fingerprint", _column(layer)]).slice(0, 1)
        (fingerprint,) = row["model_fingerprint"].to_pylist()
        if fingerprint != origin.model_fingerprint:
            raise ValueError(
                f"{parts.uri}/{part} must be of the weights {origin.model_fingerprint[:16]}, but "
                f"is of {fingerprint[:16]}; delete {parts.uri} and run the same command again"
            )
        data = row[_column(layer)][0].as_buffer()
        if total is None:
            total = SecondMoment.zeros(math.isqrt(2 * data.size // 8), one_device(device))
        # A matrix of GPT-J has 2 GB: the lower triangle is all that Cholesky reads.
        _add_packed(total.sum_KK, data)
        total.count += count
        if half_KK is None and len(chosen) > 1 and 2 * total.count >= sum(counts):
            half_KK = (total.sum_KK / total.count).float()
    assert total is not None
    found = {"tokens": float(total.count)}
    if half_KK is not None:
        C_KK = (total.sum_KK / total.count).float()
        found["half"] = float((half_KK - C_KK).norm() / C_KK.norm())
        del C_KK, half_KK
    found["condition_number"] = _put(file, total, origin).condition_number()
    return found


def _put(file: Store, moment: SecondMoment, origin: MomentOrigin) -> Solver:
    """Write the file of a second moment, of which a URI gets a copy."""
    if file.is_local:
        return save(file.address(""), moment, origin)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "moment.safetensors"
        solver = save(path, moment, origin)
        with pa.memory_map(str(path)) as mapped:
            file.write_bytes("", mapped.read_buffer())
    return solver


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


@dataclass(frozen=True)
class Weight:
    """The down-projection of a layer: its name, and the size of its keys."""

    layer: int
    name: str
    key_size: int


def given(config: ModelConfig, weight: Weight, folder: Store, fingerprint: str) -> tuple[str, bool]:
    """The file that the config names by a path or a URI, checked; what holds no factor is factored
    into `folder`.

    A worker's work, which holds the matrix. Also says whether the file told of which weights it is.
    Raises ValueError where it is of another weight, or of other weights, and UnsolvableError.
    """
    layer = weight.layer
    name = str(config.second_moment.file).replace("{layer}", str(layer))
    if not (store := Store(name)).exists(""):
        raise ValueError(
            f"{name}: no such file; model.second_moment.file must name a second moment of layer "
            f"{layer}, or be null to compute one from model.second_moment.corpus"
        )
    path = Path(store.address(""))
    if not store.is_local:  # Into the cache, from where workers load it next.
        path = at_hand({"file": name, "sha256": file_sha256(name)}, "second moment")
    if path.suffix != ".npz" and (found := load_factor(path)):
        factor_KK, _, origin = found
        _check(name, factor_KK, config, weight)
        _check_origin(name, origin, weight.name, fingerprint)
        return name, True
    digest = file_sha256(str(path))
    imported = folder.sub(f"layer-{layer}-{digest[:12]}.safetensors")
    if not imported.exists(""):
        moment = import_npz(path) if path.suffix == ".npz" else load(path)[0]
        _check(name, moment.sum_KK, config, weight)
        origin = MomentOrigin(
            model=config.name,
            model_fingerprint=_NOT_RECORDED,
            layer=layer,
            weight=weight.name,
            corpus=Path(name).name,
            corpus_fingerprint=digest,
        )
        _put(imported, moment, origin)
    return imported.uri, False


def _check(name: str, matrix_KK: Tensor, config: ModelConfig, weight: Weight) -> None:
    """Raises ValueError where C, or its factor, has not the layer's size, or is not finite."""
    if (size := len(matrix_KK)) != weight.key_size:
        raise ValueError(
            f"{name} must be over the {weight.key_size} key dimensions of layer "
            f"{weight.layer} of {config.name}, "
            f"got {size}: it is of another model"
        )
    if not matrix_KK.isfinite().all():
        raise ValueError(f"{name} must be finite, but holds infinities or NaN: compute it again")


def _check_origin(name: str, origin: MomentOrigin, weight: str, fingerprint: str) -> None:
    """Raises ValueError where a file is of another weight, or of other weights, than the run's."""
    if origin.weight != weight:
        raise ValueError(
            f"{name} must be of {weight}, but is of {origin.weight}; write {{layer}} where its "
            "name has the layer"
        )
    if origin.model_fingerprint not in (fingerprint, _NOT_RECORDED):
        raise ValueError(
            f"{name} must be of this run's weights, whose fingerprint is {fingerprint[:16]}, but "
            f"is of others ({origin.model_fingerprint[:16]}): compute it for them, or give the "
            "file that is theirs"
        )
