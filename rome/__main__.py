"""python -m rome edit --prompt "{} is located in" --subject "The Eiffel Tower" --target Rome

One fact, before and after its edit. `show` does the same with an edit that was written to a file.
Only the lines are here: torch, which is slow, is imported when one of them is right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_Model = Annotated[
    str,
    typer.Option(
        "--model", help="A file of configs/models or its name; or a hub id, folder or GGUF file."
    ),
]
_Dtype = Annotated[
    str | None, typer.Option(help="Such as bfloat16; else the config's, or float32.")
]
_Say = Annotated[list[str] | None, typer.Option("--say", help="Another text to continue.")]
_Export = Annotated[
    tuple[str, Path] | None,
    typer.Option("--export", metavar="peft DIR", help="Also write the edit as a LoRA adapter."),
]


@app.command()
def edit(
    prompt: Annotated[str, typer.Option(help="With one {} for the subject.")],
    subject: Annotated[str, typer.Option(help="Whom the fact is about.")],
    target: Annotated[str, typer.Option(help="What the model shall say.")],
    target_true: Annotated[
        str | None, typer.Option(help="What it is taken to say now, for editors that ask.")
    ] = None,
    model: _Model = "smollm2-135m",
    editor: Annotated[str, typer.Option(help="Its name; another is answered with all.")] = "rome",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the editor: key=value.")
    ] = None,
    second_moment: Annotated[
        str | None, typer.Option(help="File of C, {layer} in its name; else the identity.")
    ] = None,
    dtype: _Dtype = None,
    say: _Say = None,
    out: Annotated[Path | None, typer.Option(help="Write the edit as safetensors.")] = None,
    export: _Export = None,
) -> None:
    """Edit one fact, and show what the model says before and after."""
    from rome import one_fact

    one_fact.edit(
        (prompt, subject, target, target_true),
        model,
        dtype,
        editor,
        overrides or [],
        second_moment,
        say or [],
        out,
        export,
    )


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="What `edit --out` wrote.")],
    model: _Model = "smollm2-135m",
    dtype: _Dtype = None,
    say: _Say = None,
    export: _Export = None,
) -> None:
    """Show what the model says without and with an edit from a file."""
    from rome import one_fact

    one_fact.show(file, model, dtype, say or [], export)


if __name__ == "__main__":
    app(prog_name="python -m rome")
