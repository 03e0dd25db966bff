"""Programs that measure, and that break things on purpose: `make perf gpu chaos scale`."""
