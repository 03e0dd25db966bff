"""Ray: who does the work, where, and what survives. Knows leases, parts and results only."""
