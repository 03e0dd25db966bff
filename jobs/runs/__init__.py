"""A run as it lies in its store: its config, its manifest, its parts."""
