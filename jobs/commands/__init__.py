"""The command lines: what each takes, said before what is slow is imported."""
