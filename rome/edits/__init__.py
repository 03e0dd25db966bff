"""Edits as changes of weights, many edits of one model, and edits as files."""
