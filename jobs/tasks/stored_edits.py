"""The edits of a run, kept beside its parts, and edits that come from there instead of an editor.

`RUN_DIR/edits/<hive path>/part-....safetensors` holds the edits of the rows of the part of that
name, in their order. It is committed before the part, so what has a part has its edits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cluster.grid import Lease
from cluster.store import DamagedError, Store
from jobs.runs import differences, manifests
from jobs.runs.config import RunConfig
from rome.data.records import Record, RecordError, Request
from rome.edits import files as edit_files
from rome.edits.deltas import Edit
from rome.edits.files import EditOrigin
from rome.models import EditableModel
from rome.options import ConfigError

_EDITS, _RESULTS = "edits", "results"


def keep(run: Store, lease: Lease, edits: Sequence[Edit | None], origin: EditOrigin) -> None:
    """Commit the edits of a lease's rows; where one has none, each alone, as their parts are."""
    whole = [edit for edit in edits if edit is not None]
    if len(whole) == len(edits):
        run.write_bytes(_file_of(lease.part), edit_files.dumps(whole, origin))
        return
    for single, edit in zip(lease.singles(), edits, strict=True):
        if edit is not None:
            run.write_bytes(_file_of(single.part), edit_files.dumps([edit], origin))


def _file_of(part: str) -> str:
    return f"{_EDITS}/{part.removesuffix('.parquet')}.safetensors"


class StoredEdits:
    """The edits of one editor of a run that kept them.

    Raises DamagedError where it kept none, or they are out of sight.
    """

    def __init__(self, run: Store, group: str, model: EditableModel, fingerprint: str) -> None:
        self._run, self._model, self._fingerprint = run, model, fingerprint
        kept = set(run.list(f"{_EDITS}/{group}/", ".safetensors"))
        self._places: dict[int, tuple[str, int]] = {}
        self._without: dict[int, str | None] = {}
        """Records whose row has no edit, and its error."""
        for name in run.list(f"{_RESULTS}/{group}/", ".parquet"):
            file = _file_of(name.removeprefix(f"{_RESULTS}/"))
            table = run.read_table(name, ["case_id", "error"])
            ids = table["case_id"].to_pylist()
            if file in kept:
                self._places |= {case_id: (file, row) for row, case_id in enumerate(ids)}
            else:
                self._without |= zip(ids, table["error"].to_pylist(), strict=True)
        if not self._places:
            raise DamagedError(
                f"{run.uri} keeps no edits of {group}: make that run with keep_edits: true, in the "
                "same benchmark"
            )
        self._records = manifests.read(run)["records"]
        # Leases follow each other in the parts.
        self._read = lru_cache(maxsize=1)(self._load)

    def edit_records(self, records: Sequence[Record]) -> list[Edit]:
        """The edits of records, which must be the ones that were edited."""
        return [self.find(record.case_id, record.requests[-1]) for record in records]

    def find(self, case_id: int, request: Request) -> Edit:
        """Raises RecordError where the record has no edit, or one of another request, and
        DamagedError where its edit is out of sight."""
        if case_id not in self._places:
            rows = len(self._places.keys() | self._without)
            if self._without.get(case_id, "") is None or rows < self._records:
                raise DamagedError(
                    f"{self._run.uri} shows no edit of case {case_id}, and {rows} of its "
                    f"{self._records} rows: it must be finished, and have all its files"
                )
            raise RecordError(f"{self._run.uri} keeps no edit of case {case_id}")
        file, row = self._places[case_id]
        edit = self._read(file)[row]
        if edit.request != request:
            raise RecordError(
                f"{self._run.uri} keeps for case {case_id} the edit of {edit.request}, but the "
                f"record asks for {request}; use the records of that run"
            )
        return edit

    def _load(self, file: str) -> list[Edit]:
        data, where = self._run.read_bytes(file), f"{self._run.uri}/{file}"
        try:
            return edit_files.loads(data, self._model, self._fingerprint, where)[0]
        except ValueError as error:  # That they are of this model was checked before the run.
            raise DamagedError(str(error)) from error


@dataclass(frozen=True)
class _Model:
    editors: dict[str, Any]


@dataclass(frozen=True)
class _Config:
    """What is read of the config in a run's manifest."""

    model: _Model
    editors: dict[str, Any]


def check(config: RunConfig, manifest: Mapping[str, Any]) -> None:
    """Raises ConfigError where the edits that a run is to score are not of its model or editors."""
    kinds = {"config": _Config, "model_fingerprint": str}
    source = manifests.read(Store(str(config.edits)), kinds, kinds=kinds)
    before, now = source["model_fingerprint"], manifest["model_fingerprint"]
    if before != now:
        raise ConfigError(
            f"{config.edits} has edits of a model with the fingerprint {before[:16]}, but this "
            f"run's is {now[:16]}: they fit only the weights that they were computed on"
        )
    there, here = source["config"], manifest["config"]
    changed = []
    for name in config.editors:
        kind = config.kind(name)
        changed += differences.difference(
            there["model"]["editors"].get(kind),
            here["model"]["editors"].get(kind),
            f"model.editors.{kind}",
        )
        changed += differences.difference(
            there["editors"].get(name), here["editors"][name], f"editors.{name}"
        )
    if changed:
        raise ConfigError(
            f"{config.edits} has edits of other editors or settings; take its config, or leave "
            "--edits out:\n" + "\n".join(changed)
        )
