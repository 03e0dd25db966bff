"""What a worker does with the leases of a chain: a batch of edits, and the weights at a checkpoint.

A state (`jobs.tasks.states`) is committed before the part of its batch, which names it and its
sha256, so that a late writer changes nothing that others go on with. One that is gone is computed
again from the last before it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.grid import Lease
from cluster.store import Store, StoreError
from cluster.told import tell
from cluster.words import shown
from jobs.runs.chains import Chain
from jobs.tasks import states, values
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

_NAMED = 5
"""Records of a batch that an error names."""

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
        try:
            state = self._state(chain, lease.start)
        except RecordError as error:  # Of a batch before.
            return _ended(chain, range(lease.start, lease.stop), error)
        rows: list[dict[str, Any]] = []
        for number in range(lease.start, lease.stop):
            began = time.perf_counter()
            tell(number - lease.start)
            try:
                state = self._edited(chain, state, number)
            except RecordError as error:
                ends = _ended(chain, range(number, lease.stop), error)
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

    def values(self, lease: Lease, chain: Chain) -> list[dict[str, Any]]:
        """The rows of a lease of values, each with the columns of VALUE_SCHEMA that are its own."""
        batch = self._records(chain.batch(lease.shard)[lease.start : lease.stop])
        try:
            state = self._state(chain, lease.shard)
        except RecordError as error:  # Of a batch before.
            return values.failed(batch, error)
        return self._values(chain, state, batch)

    def _values(
        self, chain: Chain, state: ChainState, some: Sequence[Record]
    ) -> list[dict[str, Any]]:
        try:
            _refuse_what_chains_cannot(some)
            requests = [record.request for record in some]
            return values.found(some, self._editors[chain.editor].values(state, requests))
        except RecordError as error:
            if len(some) == 1:
                return values.failed(some, error)
        return [row for record in some for row in self._values(chain, state, [record])]

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
        try:
            _refuse_what_chains_cannot(batch)
            requests = [record.request for record in batch]
            known = values.known(self._run, chain, number) if chain.shares_values else None
            _, state = self._editors[chain.editor].go_on(state, requests, known)
            refuse_if_not_finite(total_norm(state.total))
        except RecordError as error:
            raise RecordError(
                f"the chain of {chain.editor} in order {chain.order} ended in batch {number}, "
                f"{_cases(batch)}: {error}. Leave the record out in another run, or try again with "
                "--retry-dead"
            ) from error
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
        data = self._dumped(chain, state)
        digest = hashlib.sha256(data).hexdigest()
        rows[-1] |= {"file": states.name_of(chain, state.edits, digest), "sha256": digest}
        self._run.write_bytes(rows[-1]["file"], data)
        self._last = chain.path, rows[-1]["case_id"] + 1, state
        states.remove_before(self._run, chain, rows[0]["edits"] - len(rows[0]["records"]))
        return rows

    def _state(self, chain: Chain, batches: int) -> ChainState:
        """The chain after so many batches."""
        first, state = self._last_state(chain, batches)
        for number in range(first, batches):
            state = self._edited(chain, state, number)
        if first < batches:
            self._put_back(chain, state, batches)
        self._last = chain.path, batches, state
        return state

    def _put_back(self, chain: Chain, state: ChainState, batches: int) -> None:
        """Commit a state that was lost, so that no other worker has to compute it, too."""
        row, data = self._batches_done(chain, batches)[batches - 1], self._dumped(chain, state)
        if row["file"] is not None and row["sha256"] == hashlib.sha256(data).hexdigest():
            self._run.write_bytes(row["file"], data)

    def _dumped(self, chain: Chain, state: ChainState) -> bytes:
        origin = EditOrigin(
            editor=chain.editor, model=self._model.name, model_fingerprint=self._fingerprint
        )
        return edit_files.dumps_chain(state, origin)

    def _last_state(self, chain: Chain, batches: int) -> tuple[int, ChainState]:
        """The last state that is there, and after how many batches, these at most."""
        if self._last and self._last[:2] == (chain.path, batches):
            return batches, self._last[2]
        rows = self._batches_done(chain, batches)
        for number in range(batches, 0, -1):
            row = rows.get(number - 1)
            if row is None or (row["status"] == OK and row["file"] is None):
                continue
            if row["status"] == ERROR:
                raise RecordError(row["error"])
            if (state := self._read(row)) is not None:
                return number, state
        return 0, self._editors[chain.editor].begin()

    def _batches_done(self, chain: Chain, batches: int) -> dict[int, dict[str, Any]]:
        """The rows of the batches of a chain that are done, by number.

        Raises StoreError while the last of these cannot be seen, since it was committed.
        """
        rows: dict[int, dict[str, Any]] = {}
        for _, row in states.batches(self._run, chain.batches):
            if row["status"] == OK or row["case_id"] not in rows:
                rows[row["case_id"]] = row
        if batches and batches - 1 not in rows:
            raise StoreError(
                f"{self._run.uri}/results/{chain.batches} must hold batch {batches - 1}, which is "
                "done, and does not show it"
            )
        return rows

    def _read(self, row: Mapping[str, Any]) -> ChainState | None:
        """The state that a row names; None where it is gone, or is not what it was."""
        if (data := states.content(self._run, row)) is None:
            log.warning("%s/%s is gone or damaged: computed again", self._run.uri, row["file"])
            return None
        where = f"{self._run.uri}/{row['file']}"
        return edit_files.loads_chain(data, self._model, self._fingerprint, where)[0]


def _cases(batch: Sequence[Record]) -> str:
    """The records of a batch in words."""
    first, more = [str(record.case_id) for record in batch[:_NAMED]], len(batch) - _NAMED
    which = ", ".join(first) + (f" and {more} more" if more > 0 else "")
    return f"case {which}" if len(batch) == 1 else f"one of the cases {which}"


def _ended(chain: Chain, left: range, error: RecordError) -> list[dict[str, Any]]:
    """The rows of the batches that cannot be made any more."""
    log.warning("batch %d of %s cannot be done", left.start, chain.path, exc_info=error)
    text = shown(str(error))
    return [{"case_id": i, "status": ERROR, "error": text, "records": chain.batch(i)} for i in left]


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
