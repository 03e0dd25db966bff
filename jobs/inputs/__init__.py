"""Where records and texts come from."""
