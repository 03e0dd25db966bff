"""Shared by tests and programs: tiny models, oracles, made-up runs, servers."""
