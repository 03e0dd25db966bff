"""The metrics of a run for Prometheus, sent by the driver through ray.util.metrics.

Ray exports every name below with the prefix `ray_`, and counters with the suffix `_total`, on the
metrics port of the driver's node. Every series has the tag `run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from ray.util.metrics import Counter, Gauge, Histogram

PREFIX = "rome_"
_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]


class Metrics:
    """The numbers of one run.

    `stage` is one of boot, run, verify, commit (of a lease), or what the rows' columns
    `seconds_STAGE` say (of a lease, summed over its records): edit, probabilities, generation.
    """

    def __init__(self, run: str) -> None:
        self._run = {"run": _tag(run)}
        self._done = _counter("records_done", "Records with a row, dead letters among them.")
        self._failed = _counter("records_failed", "Dead letters.")
        self._retried = _counter("records_retried", "Records handed out again after a failure.")
        self._lost = _counter("workers_lost", "Workers that died or had to be ended.")
        self._copies = _counter("leases_copied", "Second copies of the run's last leases.")
        self._bytes = _counter("bytes_written", "Bytes of committed parts.")
        self._stage = Histogram(
            f"{PREFIX}stage_seconds",
            "Seconds of a stage of a lease.",
            boundaries=_SECONDS,
            tag_keys=("run", "stage"),
        )
        self._left = _gauge("records_left", "Records without a row.")
        self._in_flight = _gauge("leases_in_flight", "Leases that workers have.")
        self._pending = _gauge("leases_pending", "Leases that no worker has.")
        self._ready = _gauge("workers_ready", "Workers that can take leases.")
        self._wanted = _gauge("workers_wanted", "Workers that the run asks for.")

    def finished(self, records: int, failed: int, written: int) -> None:
        """A lease got its rows."""
        for counter, amount in ((self._done, records), (self._failed, failed)):
            if amount:
                counter.inc(amount, self._run)
        if written:
            self._bytes.inc(written, self._run)

    def stages(self, seconds: Mapping[str, float]) -> None:
        for stage, value in seconds.items():
            self._stage.observe(value, {**self._run, "stage": stage})

    def retried(self, records: int) -> None:
        self._retried.inc(records, self._run)

    def lost(self) -> None:
        self._lost.inc(1, self._run)

    def copied(self) -> None:
        self._copies.inc(1, self._run)

    def now(self, *, left: int, in_flight: int, pending: int, ready: int, wanted: int) -> None:
        """Report the current state."""
        for gauge, value in (
            (self._left, left),
            (self._in_flight, in_flight),
            (self._pending, pending),
            (self._ready, ready),
            (self._wanted, wanted),
        ):
            gauge.set(value, self._run)


def _tag(value: str) -> str:
    """Tags are ASCII of 255 characters at most: others are percent-encoded."""
    return "".join(c if " " <= c <= "~" else quote(c) for c in value)[-255:]


def _counter(name: str, text: str) -> Counter:
    return Counter(PREFIX + name, text, ("run",))


def _gauge(name: str, text: str) -> Gauge:
    return Gauge(PREFIX + name, text, ("run",))
