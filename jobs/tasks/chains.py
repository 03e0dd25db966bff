"""What a worker does with the leases of a chain: a batch of edits, and the weights at a checkpoint.

`RUN_DIR/chains/<hive path>/edits-....safetensors` holds the change of all edits so far and what the
editor carries on. It is committed before the part of its batch, which names it and its sha256, so
that a late writer changes nothing that others go on with. A state that is gone is computed again
from the last one before it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from cluster.grid import Lease
from cluster.store import Store, StoreError
from cluster.worker import describe_error
from jobs.runs.chains import Chain
from rome.data.records import Record, RecordError
from rome.data.results import ERROR, OK
from rome.edits import files as edit_files
from rome.edits import sequences
from rome.edits.deltas import Edit, dense, refuse_if_not_finite, total_norm, written
from rome.edits.files import EditOrigin
from rome.edits.sequences import ChainState
from rome.models import EditableModel
from rome.scoring import drift

HELD_OUT = "chains/held_out.parquet"
"""The texts, as token ids, on which drift is measured."""

BATCH_SCHEMA = pa.schema(
    [
        pa.field("run", pa.string(), nullable=False),
        # The number of the batch in its chain, from 0.
        pa.field("case_id", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("attempts", pa.int32(), nullable=False),
        # In the model after this batch.
        pa.field("edits", pa.int32()),
        pa.field("records", pa.list_(pa.int64())),
        # The state of the chain after this batch, and its sha256; None inside a lease.
        pa.field("file", pa.string()),
        pa.field("sha256", pa.string()),
        # Frobenius norms of the edited weights, and of what all edits so far changed.
        pa.field("weights", pa.list_(pa.string())),
        pa.field("weight_norms", pa.list_(pa.float64())),
        pa.field("change_norms", pa.list_(pa.float64())),
        # At a checkpoint, see rome.scoring.drift.
        pa.field("perplexity", pa.float64()),
        pa.field("perplexity_unedited", pa.float64()),
        pa.field("agreement", pa.float64()),
        pa.field("seconds_edit", pa.float64()),
        pa.field("worker", pa.string()),
    ]
)

log = logging.getLogger(__name__)


class Chains:
    """The chains of a run, in one worker."""

    def __init__(
        self,
        run: Store,
        model: EditableModel,
        fingerprint: str,
        editors: Mapping[str, sequences.Chain],
        records: Callable[[Sequence[int]], list[Record]],
        token_budget: int,
    ) -> None:
        """`records`: those of case ids, in their order. `fingerprint`: of the unedited model."""
        self._run, self._model, self._fingerprint = run, model, fingerprint
        self._editors, self._records, self._token_budget = editors, records, token_budget
        self._last: tuple[str, int, ChainState] | None = None
        self._unedited: drift.Reading | None = None

    def edit(self, lease: Lease, chain: Chain) -> list[dict[str, Any]]:
        """The rows of a lease of batches, each with the columns of BATCH_SCHEMA that are its own.

        A batch that cannot be edited ends its chain: it and those after it have its error.
        """
        state = self._state(chain, lease.start)
        rows: list[dict[str, Any]] = []
        for number in range(lease.start, lease.stop):
            began = time.perf_counter()
            try:
                state = self._edited(chain, state, number)
            except RecordError as error:
                log.warning("batch %d of %s cannot be done", number, chain.path, exc_info=error)
                text = f"its chain ended in batch {number}: {describe_error(error)}"
                left = range(number, lease.stop)
                ends = [{"case_id": i, "status": ERROR, "error": text} for i in left]
                return [*self._kept(chain, state, rows), *ends]
            rows.append(
                {
                    "case_id": number,
                    "status": OK,
                    "edits": state.edits,
                    "records": chain.batch(number),
                    **self._norms(state),
                    "seconds_edit": time.perf_counter() - began,
                }
            )
        if state.edits in chain.grouping.checkpoints:
            rows[-1] |= self._drift(chain, state)
        return self._kept(chain, state, rows)

    @contextmanager
    def at(self, chain: Chain, edits: int) -> Iterator[None]:
        """Run the block on the weights of a checkpoint.

        Raises RecordError with the error of its batch where the chain ended before.
        """
        state = self._state(chain, edits // chain.grouping.edits_per_model)
        with self._written(chain, state):
            yield

    def _written(self, chain: Chain, state: ChainState) -> Any:
        total = sequences.scored(self._model, chain.grouping, state)
        return written(self._model, Edit(edit_files.OF_A_CHAIN, total))

    def _edited(self, chain: Chain, state: ChainState, number: int) -> ChainState:
        batch = self._records(chain.batch(number))
        _refuse_what_chains_cannot(batch)
        requests = [record.request for record in batch]
        _, state = self._editors[chain.editor].go_on(state, requests)
        refuse_if_not_finite(total_norm(state.total))
        return state

    def _norms(self, state: ChainState) -> dict[str, Any]:
        names = sorted(state.total)
        edited = []
        for name in names:
            weight_DK = self._model.weight(name)
            edited.append(float((weight_DK + dense(state.total[name]).to(weight_DK.device)).norm()))
        return {
            "weights": names,
            "weight_norms": edited,
            "change_norms": [state.total[name].norm for name in names],
        }

    def _drift(self, chain: Chain, state: ChainState) -> dict[str, float]:
        texts = self._run.read_table(HELD_OUT)["ids"].to_pylist()
        if self._unedited is None:
            self._unedited = drift.read(self._model, texts, self._token_budget)
        with self._written(chain, state):
            edited = drift.read(self._model, texts, self._token_budget)
        return drift.drift(self._unedited, edited)

    def _kept(
        self, chain: Chain, state: ChainState, rows: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Commit the state after the last of some rows, which then says where it is; and remove
        those that nobody needs any more."""
        if not rows:
            return rows
        origin = EditOrigin(
            editor=chain.editor, model=self._model.name, model_fingerprint=self._fingerprint
        )
        data = edit_files.dumps_chain(state, origin)
        digest = hashlib.sha256(data).hexdigest()
        rows[-1] |= {"file": _name(chain, state.edits, digest), "sha256": digest}
        self._run.write_bytes(rows[-1]["file"], data)
        self._last = chain.path, rows[-1]["case_id"] + 1, state
        self._remove(chain, before=rows[0]["edits"] - len(rows[0]["records"]))
        return rows

    def _remove(self, chain: Chain, before: int) -> None:
        """Remove the states of less than `before` edits, but for those of checkpoints."""
        kept = {f"{edits:07d}" for edits in chain.grouping.checkpoints}
        for name in self._run.list(f"chains/{chain.path}/edits-", ".safetensors"):
            edits = name.rpartition("/")[2].split("-")[1]
            if int(edits) < before and edits not in kept:
                try:
                    self._run.delete(name)
                except FileNotFoundError:
                    continue  # Another worker did.

    def _state(self, chain: Chain, batches: int) -> ChainState:
        """The chain after so many batches."""
        first, state = self._last_state(chain, batches)
        for number in range(first, batches):
            state = self._edited(chain, state, number)
        self._last = chain.path, batches, state
        return state

    def _last_state(self, chain: Chain, batches: int) -> tuple[int, ChainState]:
        """The last state that is there, and after how many batches, these at most."""
        if self._last and self._last[:2] == (chain.path, batches):
            return batches, self._last[2]
        rows = self._batch_rows(chain, batches)
        for number in range(batches, 0, -1):
            row = rows.get(number - 1)
            if row is None or (row["status"] == OK and row["file"] is None):
                continue
            if row["status"] == ERROR:
                raise RecordError(row["error"])
            if (state := self._read(row)) is not None:
                return number, state
        return 0, self._editors[chain.editor].begin()

    def _batch_rows(self, chain: Chain, batches: int) -> dict[int, dict[str, Any]]:
        """The rows of the batches of a chain that are done, by number.

        Raises StoreError while the last of these cannot be seen, since it was committed.
        """
        results = self._run.sub("results")
        columns = ("case_id", "status", "error", "file", "sha256")
        tables = [
            results.read_table(name, columns)
            for name in results.list(f"{chain.batches}/part-", ".parquet")
        ]
        rows: dict[int, dict[str, Any]] = {}
        for row in (row for table in tables for row in table.to_pylist()):
            if row["status"] == OK or row["case_id"] not in rows:
                rows[row["case_id"]] = row
        if batches and batches - 1 not in rows:
            raise StoreError(
                f"{results.uri}/{chain.batches} must hold batch {batches - 1}, which is done, and "
                "does not show it"
            )
        return rows

    def _read(self, row: Mapping[str, Any]) -> ChainState | None:
        """The state that a row names; None where it is gone, or is not what it was."""
        try:
            data = self._run.read_bytes(row["file"])
        except FileNotFoundError:
            return None
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            log.warning("%s/%s is damaged: computed again", self._run.uri, row["file"])
            return None
        where = f"{self._run.uri}/{row['file']}"
        return edit_files.loads_chain(data, self._model, self._fingerprint, where)[0]


def _name(chain: Chain, edits: int, digest: str) -> str:
    return f"chains/{chain.path}/edits-{edits:07d}-{digest[:16]}.safetensors"


def _refuse_what_chains_cannot(batch: Sequence[Record]) -> None:
    """Raises RecordError for a record of several requests, which no count of edits has, or with a
    question to the unedited model, which is not there at a checkpoint."""
    for record in batch:
        asks_before = any(probe.role == "condition" for probe in record.probes)
        if record.further or asks_before:
            what = "condition questions" if asks_before else "several requests"
            raise RecordError(
                f"a chain with checkpoints takes no record with {what}, as case {record.case_id} "
                "is; leave checkpoints out"
            )
