"""Sources of records and texts."""
