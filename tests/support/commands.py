"""Command lines in this process, on the Ray that it has joined, if any, and programs in their own.

A process of its own takes seconds to start; tests start one if they kill it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module

from typer import Typer
from typer.testing import CliRunner, Result


def invoke(app: Typer, *arguments: object, **environment: object) -> Result:
    """The outcome of a command line."""
    return CliRunner().invoke(
        app,
        [str(argument) for argument in arguments],
        env={name: str(value) for name, value in environment.items()},
    )


def command(job: str, *arguments: object, **environment: object) -> tuple[int, str]:
    """The exit status of `python -m jobs.JOB` and all that it says; an error that it does not say
    is raised."""
    result = invoke(import_module(f"jobs.{job}").app, *arguments, **environment)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@contextmanager
def program(
    module: str, argument: str, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """A module in a process of its own, killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, argument],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
