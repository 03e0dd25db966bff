"""What a part says of itself in its Parquet metadata, so that it is taken for no other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

_KEY = b"part"
_FOLDER, _FACTS, _CODE = "folder", "of", "code"


@dataclass(frozen=True)
class Origin:
    """What all parts of a run have in common."""

    facts: Mapping[str, str] = field(default_factory=dict)
    """What makes the run, such as a hash of its settings, by name. Parts of others are refused."""
    code: str = ""
    """Which code makes parts now. Those of other code belong to the run as well."""
    said: bool = False
    """True if each part must say what it is of; those of earlier versions do not."""

    def on(self, table: pa.Table, folder: str) -> pa.Table:
        """The table as it is to be written as a part in a folder of the run's store."""
        text = json.dumps({_FOLDER: folder, _FACTS: dict(self.facts), _CODE: self.code})
        return table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: text.encode()})

    def check(self, part: str, folder: str, schema: pa.Schema) -> None:
        """Raises ValueError, naming the part and what differs, where it is not of this run and
        folder."""
        said = (schema.metadata or {}).get(_KEY)
        if said is None and not self.said:
            return
        found = _read(part, said)
        wanted = {_FOLDER: folder, **self.facts}
        there = {_FOLDER: found[_FOLDER], **found[_FACTS]}
        differs = [
            f"its {name} is {there.get(name)!r}, and {wanted.get(name)!r} here"
            for name in sorted(wanted.keys() | there.keys() if self.facts else [_FOLDER])
            if there.get(name) != wanted.get(name)
        ]
        if differs:
            raise ValueError(
                f"{part} is of something else: {'; '.join(differs)}. "
                "Move it away and run the same command again."
            )


def _read(part: str, said: bytes | None) -> dict[str, dict[str, str]]:
    try:
        found: dict[str, dict[str, str]] = json.loads(said or b"")
        if isinstance(found[_FOLDER], str) and isinstance(found[_FACTS], dict):
            return found
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(
        f"{part} does not say of which run it is, in the key {_KEY.decode()!r} of its metadata. "
        "Move it away and run the same command again."
    )
