"""Shared parts of the command lines: messages, errors, exit status."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import RenderableType

from cluster.words import PlainConsole, deliberate, shown
from rome.paths import local

if TYPE_CHECKING:  # Ray is slow, and `jobs.status` and others do without it.
    from cluster.run import Outcome

DEAD_LETTERS = 3
STOPPED = 130

CONSOLE = PlainConsole(stderr=True)

Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override one key: key=value.")]


def new_app(**options: Any) -> typer.Typer:
    """The Typer of a job. What its help has in brackets is shown, not taken for markup."""
    return typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **options
    )


def on_this_machine(path: Path | None) -> Path | None:
    """The callback of an option that takes a path and no URI."""
    try:
        return path and local(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def say(text: str) -> None:
    """Tell the user something beside a job's output."""
    CONSOLE.print(text, soft_wrap=True)


def tell(text: str) -> None:
    """Print a line or a page of a job's output to stdout."""
    typer.echo(shown(text))


def shell(command: str, *arguments: str) -> str:
    """A line that the user may type next."""
    return shlex.join(["python", "-m", f"jobs.{command}", *arguments])


def print_table(table: RenderableType) -> None:
    """To stdout; in a log or a pipe it is not cut to the width of a terminal."""
    console = PlainConsole()
    if not console.is_terminal:
        console.width = PlainConsole(width=1000).measure(table).maximum
    console.print(table)


def check_config(config: str, overrides: list[str] | None) -> None:
    """Raises ConfigError where a config's file cannot be read, or an override is none: at once,
    before its settings are looked at, which takes seconds of imports."""
    from jobs.runs.config_files import filled_each

    filled_each(config, overrides or [])


def check_run_config(config: str, overrides: list[str] | None) -> None:
    """The same of a run, whose keys are looked at as well, but for the settings of editors."""
    from jobs.runs.config import outlined
    from jobs.runs.config_files import filled_each

    for data in filled_each(config, overrides or []):
        outlined(config, data)


def check_runs(run_dirs: list[str]) -> None:
    """Raises ValueError where a path is no run directory: at once, before what is slow is there."""
    from cluster.store import Store
    from jobs.runs import manifests

    for run_dir in run_dirs:
        manifests.read(Store(run_dir), ())


def job(name: str) -> Any:
    """The module of a job, imported when its line is right; says what package it lacks."""
    try:
        return import_module(f"jobs.{name}")
    except ModuleNotFoundError as error:
        refuse_without(name.replace("_", "-"), error)


def refuse_without(command: str, error: ModuleNotFoundError) -> NoReturn:
    """Say what a command lacks, and exit with 1."""
    lacking = str(error.name).partition(".")[0]
    say(f"error: {command} needs '{lacking}'; pip install 'rome-bench[all]' brings it")
    raise typer.Exit(1) from None


@contextmanager
def errors(*others: type[Exception]) -> Iterator[None]:
    """Say a ValueError, an OSError or one of the others without a traceback, and exit with 1.

    Of a ValueError that is no message to the user, see `cluster.words.deliberate`, the traceback is
    shown as of any fault.
    """
    said: tuple[type[Exception], ...] = (ValueError, OSError, *others)
    try:
        yield
    except said as error:
        if isinstance(error, ValueError) and not deliberate(error):
            raise
        say(f"error: {error}")
        raise typer.Exit(1) from None


def ended(outcome: Outcome, rows: str, one: str) -> int:
    """Say what a run lacks, and give the job's exit status: 0, STOPPED or DEAD_LETTERS.

    `rows`, `one`: what its rows are, and what each of them is of.
    """
    if outcome.stopped or outcome.done < outcome.total:
        say(
            f"stopped: {outcome.done} of {outcome.total} {rows} are done; the same line resumes: "
            + shlex.join(sys.orig_argv)
        )
        return STOPPED
    for group, number, error in outcome.dead:
        say(f"dead letter: {group} {one} {number}: {error}")
    return DEAD_LETTERS if outcome.dead else 0
