"""The tasks of workers: the work on a lease."""
