"""Behind `from rome import ...`: edit one fact, and continue texts, by one call each.

A run over many records goes through the editors and `rome.evaluation` instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rome import second_moment
from rome.data.records import Request
from rome.editors import EDITORS, Resources
from rome.edits.deltas import Edit
from rome.models import EditableModel, memory, prompts
from rome.scoring import generation
from rome.scoring.settings import GenerationSettings
from rome.solver import Solver

# How many context templates of which length in tokens, as published.
_TEMPLATE_LENGTHS = ((5, 10), (10, 10))


def edit(
    model: EditableModel,
    request: Request,
    editor: str = "rome",
    second_moment_file: str | None = None,
    **settings: Any,
) -> Edit:
    """The edit that an editor of `rome.editors.EDITORS` makes for a request; the model stays as is.

    `settings`: fields of the editor's settings, such as `layer`; the defaults are those published
    for GPT-2 XL. `second_moment_file`: C = E[k k^T] as safetensors or .npz, `{layer}` in its name
    standing for the layer. Without it ROME takes the identity and warns, since edits then change
    more of what they should not. Trained editors take the file of their network as `weights`.

    Raises ValueError for an unknown editor, for one that cannot do without a second moment, and
    where the request does not suit the model; TypeError for a setting that the editor has not.
    """
    if editor not in EDITORS:
        raise ValueError(f"editor must be one of {', '.join(EDITORS)}, got '{editor}'")
    request.check()
    kind = EDITORS[editor]
    chosen = kind.settings(**settings)
    if (layers := kind.second_moments(chosen)) and second_moment_file is None:
        if editor != "rome":
            raise ValueError(
                f"{editor} needs the second moments of layers {layers}: give their files, with "
                "{layer} in the name"
            )
        chosen = replace(chosen, second_moment=False)
        warnings.warn(
            f"ROME takes the identity for C of layer {layers[0]}, so the edit may change more than "
            "it should; give the file of a second moment",
            stacklevel=2,
        )

    def solver(layer: int) -> Solver:
        path = str(second_moment_file).replace("{layer}", str(layer))
        if path.endswith(".npz"):
            return second_moment.import_npz(path).solver()
        if found := second_moment.load_factor(path):
            return Solver.of_factor(found[0])
        return second_moment.load(path)[0].solver()

    texts = generation.sample_context_texts(model, _TEMPLATE_LENGTHS, seed=0)
    templates = prompts.context_templates(texts)
    resources = Resources(model, templates, solver, memory.token_budget(model))
    (made,) = kind.build(resources, chosen).edit([request])
    return made


def generate(
    model: EditableModel,
    texts: Sequence[str],
    edit: Edit = generation.UNEDITED,
    settings: GenerationSettings = GenerationSettings(max_tokens=40),  # noqa: B008  # It is frozen.
) -> list[str]:
    """Each text with a sampled continuation, under an edit without writing it.

    What is drawn depends on the text, its place among the texts, the edit and the seed alone.
    """
    rows = generation.starts(model, texts, 0, case_id=0)
    ids = generation.generate(model, rows, [edit], settings, memory.token_budget(model))
    return generation.decode(model, ids)
