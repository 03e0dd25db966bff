"""rome-bench COMMAND ...: every job, and `edit` and `show` of `python -m rome`.

A command's line is imported only if that command is asked for, and its job only when the line is
right: Ray and torch are slow.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from jobs import cli

_ROME = "rome.__main__"
# Name -> (module with its `app`, help)
COMMANDS = {
    "prepare": ("jobs.commands.prepare", "Turn a source into a store of records."),
    "second-moment": (
        "jobs.commands.second_moment",
        "Compute the second moments that a run needs.",
    ),
    "train": ("jobs.commands.train", "Train KE or MEND."),
    "evaluate": ("jobs.commands.evaluate", "Evaluate every editor of a run over its records."),
    "reduce": ("jobs.commands.reduce", "Print and write the table of one or more runs."),
    "compare": ("jobs.commands.compare", "Compare the editors of one or more runs in pairs."),
    "status": ("jobs.commands.status", "Say what is done and left of a run."),
    "report": ("jobs.commands.report", "Write a page about one or more runs."),
    "export": (
        "jobs.commands.export",
        "Write the model at a checkpoint of a chain as a folder.",
    ),
    "judge": ("jobs.commands.judge", "Have a model judge the texts of a run."),
    "study": ("jobs.commands.study", "Put two editors' texts before human raters."),
    "trace": ("jobs.commands.trace", "Trace known facts and draw where they are recalled."),
    "sweep": ("jobs.commands.sweep", "Edit at every layer and token, and draw the scores."),
    "edit": (_ROME, "Edit one fact, and show what the model says then."),
    "show": (_ROME, "Show what the model says with an edit from a file."),
}


class _Lazy(TyperGroup):
    """Lists commands that do nothing, and puts the real one in the place of the one asked for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None  # Else it was a usage error.
        return name, _load(name), rest


def _load(name: str) -> Any:
    module, _ = COMMANDS[name]
    try:
        command: Any = typer.main.get_command(import_module(module).app)
    except ModuleNotFoundError as error:
        cli.refuse_without(name, error)
    return command.commands[name] if module == _ROME else command


app = cli.new_app(cls=_Lazy, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Edit facts in language models, and measure the editors. COMMAND --help says more."""


for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)

if __name__ == "__main__":
    app(prog_name="python -m jobs")
