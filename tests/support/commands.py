"""The commands of `jobs` in this process, on the Ray that it has joined, if any.

A process of its own takes seconds to start; tests start one if they kill it.
"""

from __future__ import annotations

from importlib import import_module

from typer.testing import CliRunner


def command(job: str, *arguments: object, **environment: object) -> tuple[int, str]:
    """The exit status of `python -m jobs.JOB` and all that it says; an error that it does not say
    is raised."""
    result = CliRunner().invoke(
        import_module(f"jobs.{job}").app,
        [str(argument) for argument in arguments],
        env={name: str(value) for name, value in environment.items()},
    )
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output
