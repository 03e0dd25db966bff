"""Which records share an edited model; without torch, so that a config is looked at before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Grouping:
    """The records that share an edited model: a group, in the order of their shard.

    They are edited in `sequence` batches of `edits_per_model`. Each batch is computed on the model
    that has those before it. The last group of a shard may be smaller. A record that cannot be
    edited takes its group along, because the model with the edits of all of them cannot be had:
    each of them becomes a dead letter with that record's error.

    With `checkpoints` a group is a chain: its weights are kept after each batch, workers go on with
    them, and the facts edited so far are scored at each checkpoint.
    """

    edits_per_model: int = 1
    """Requests of a batch, made by one edit; above 1 for editors that can, such as MEMIT."""
    sequence: int = 1
    """Batches that follow each other."""
    scored: Literal["after", "end"] = "end"
    """Records are scored right after their own batch, or at the end under all."""
    checkpoints: tuple[int, ...] = ()
    """Edits after which all facts edited so far are scored; the last is the end."""
    orders: int = 1
    """Chains of the same records, each in an order of its own: the first as the records lie, the
    others shuffled with the seeds 1, 2, ..."""
    prune: bool = False
    """Scored is the model with the change of all edits damped, see `regularised.pruned`; the edits
    go on from what they were."""

    def __post_init__(self) -> None:
        sizes = (self.edits_per_model, self.sequence, self.orders)
        if min(sizes) < 1:
            raise ValueError(
                "edits_per_model, sequence and orders must be at least 1, got "
                f"{', '.join(map(str, sizes))}"
            )
        marks = self.checkpoints
        wrong = [
            edits for edits in marks if not 0 < edits <= self.size or edits % self.edits_per_model
        ]
        if wrong or sorted({*marks}) != [*marks] or (marks and marks[-1] != self.size):
            raise ValueError(
                f"checkpoints must be rising multiples of edits_per_model ({sizes[0]}), the last "
                f"of them edits_per_model x sequence ({self.size}), got {[*marks]}"
            )
        if marks and self.scored == "after":
            raise ValueError(
                "scored must be 'end' with checkpoints, which say when to score, got 'after'"
            )
        if not marks and self.orders > 1:
            raise ValueError(f"orders must be 1 without checkpoints, got {self.orders}")

    @property
    def size(self) -> int:
        """Records of a group; 1 where each has a model of its own."""
        return self.edits_per_model * self.sequence
