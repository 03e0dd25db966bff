"""What tests and programs share: tiny models, oracles, made-up runs, servers."""
