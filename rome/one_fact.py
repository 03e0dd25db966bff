"""What `python -m rome` does: edit one fact, and show what the model says before and after."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import exp
from pathlib import Path
from typing import Any
from unicodedata import bidirectional, category

import torch
import typer
from rich.console import Console
from rich.table import Table

from rome import library, models, options
from rome import second_moment as second_moments
from rome.data.records import Request
from rome.editors import EDITORS
from rome.edits import files as edit_files
from rome.edits import peft_export
from rome.edits.deltas import Edit
from rome.models import EditableModel, memory
from rome.paths import CONFIGS, local, workspace
from rome.scoring import greedy, probabilities
from rome.scoring.generation import UNEDITED

_CONFIGS = CONFIGS / "models"

_TURNS = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}

Export = tuple[str, Path] | None
"""`peft` and a folder."""


def edit(
    fact: tuple[str, str, str, str | None],
    model: str,
    dtype: str | None,
    editor: str,
    overrides: Sequence[str],
    second_moment: str | None,
    say: Sequence[str],
    out: Path | None,
    export: Export,
) -> None:
    """See `rome.__main__`. `fact`: prompt, subject, target, and what is said now, or None."""
    with _errors():
        # All that can be wrong without the model is, before its weights are loaded.
        request = Request(*fact)
        request.check()
        _check_export(export)
        if out:
            local(out)
        config = _config(model, dtype)
        settings = _settings(editor, config["editors"].get(editor, {}), overrides)
        loaded = _load(config)
        second_moment = second_moment or _held(loaded, editor, settings)
        with warnings.catch_warnings(record=True) as caught:
            made = library.edit(loaded, request, editor, second_moment, **settings)
        for warning in caught:
            _note(f"note: {warning.message}")
        _show(loaded, made, say)
        if out:
            edit_files.save(out, made, loaded, editor)
        _export(loaded, made, export)


def show(file: Path, model: str, dtype: str | None, say: Sequence[str], export: Export) -> None:
    """See `rome.__main__`."""
    with _errors():
        _check_export(export)
        if not file.is_file():
            raise ValueError(f"{file}: no such file; give one that `edit --out` wrote")
        loaded = _load(_config(model, dtype))
        made, origin = edit_files.load(file, loaded)
        fact = f"{made.request.text} {made.request.target}"
        typer.echo(_seen(f"{fact} ({origin.editor}, {origin.model})"))
        _show(loaded, made, say)
        _export(loaded, made, export)


@contextmanager
def _errors() -> Iterator[None]:
    """Print an error of the user without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        _note(f"error: {error}")
        raise typer.Exit(1) from None


def _note(text: str) -> None:
    typer.echo(_seen(text), err=True)


def _seen(text: str) -> str:
    """Spell out what a terminal obeys, such as escape sequences that a model says: control
    characters except tabs and line ends, and what sets the direction of writing."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if (category(letter) == "Cc" and letter not in "\n\t") or bidirectional(letter) in _TURNS
        else letter
        for letter in text
    )


def _config(source: str, dtype: str | None) -> dict[str, Any]:
    """Of a model: `source`, `dtype`, and the settings of `editors`."""
    config: dict[str, Any] = {"source": source, "dtype": "float32", "editors": {}}
    path = Path(source) if source.endswith(".yaml") else _CONFIGS / f"{source}.yaml"
    if path.exists():
        config |= options.read(path)
    config["dtype"] = dtype or config["dtype"]
    if config["dtype"] not in models.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(models.DTYPES)}, got '{dtype}'")
    return config


def _load(config: dict[str, Any]) -> EditableModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models.use_precision(config["dtype"])
    return models.load(config["source"], config["dtype"], device, config.get("name"))


def _held(model: EditableModel, editor: str, settings: dict[str, Any]) -> str | None:
    """The files of C that the workspace holds for these weights, `{layer}` in their name."""
    layers = EDITORS[editor].second_moments(EDITORS[editor].settings(**settings))
    files = second_moments.held(workspace() / "second_moments", model, layers) if layers else None
    if files:
        _note(f"note: C is that of {files}")
    return files


def _settings(editor: str, configured: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Fields of an editor's settings. Raises ValueError, naming a key that it has not."""
    if editor not in EDITORS:
        raise ValueError(f"editor must be one of {', '.join(EDITORS)}, got '{editor}'")
    given = options.overridden(configured, overrides)
    return {**vars(options.validate(EDITORS[editor].settings, given, f"{editor}: "))}


def _show(model: EditableModel, edit: Edit, texts: Sequence[str]) -> None:
    """The target's probability, and what the model says, without and with the edit."""
    request, both = edit.request, [UNEDITED, edit]
    budget = memory.token_budget(model)
    fact = request.text, request.target, request.separator
    asked = [probabilities.Query(e, *fact) for e in range(2)]
    scores = probabilities.score(model, asked, both, budget)
    text, target, separator = fact
    questions = [greedy.Question(e, text, (target,), separator) for e in range(2)]
    rows = [[f"P({request.target})", *(f"{exp(-score.nll):.4f}" for score in scores)]]
    rows.append([f"{request.text} ...", *greedy.say(model, questions, both, budget)])
    prompts = [request.text, *texts]
    said = zip(prompts, *(library.generate(model, prompts, one) for one in both), strict=True)
    for prompt, *continued in said:
        ends = (" ".join(text.removeprefix(prompt).split()) for text in continued)
        rows.append([f"{prompt} ... (sampled)", *ends])
    table = Table("", "before", "after")
    for row in rows:
        table.add_row(*map(_seen, row))
    Console(markup=False, emoji=False).print(table)


def _check_export(target: Export) -> None:
    if target and target[0] != "peft":
        raise ValueError(f"--export takes `peft DIR`, got '{target[0]}'")
    if target:
        local(target[1])


def _export(model: EditableModel, edit: Edit, target: Export) -> None:
    if target:
        peft_export.export(target[1], edit, model)
