"""Parity with the released code on one edit that is in the repository; `test_parity.py` has more.

C is too large to keep here (9 MB): the code's own u = C^-1 k* / |C^-1 k*| is given, k* compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rome.data.records import Request
from rome.editors import values
from rome.editors.rome import Rome, RomeSettings
from rome.editors.values import Value, ValueSettings
from rome.scoring import probabilities
from rome.scoring.generation import UNEDITED
from rome.scoring.probabilities import Query
from tests.support import oracle, tiny
from tests.support.tiny import relative

GOLDEN = Path(__file__).parent / "golden"
VALUE = ("steps", "learning_rate", "weight_decay", "kl_factor", "clamp")

pytestmark = pytest.mark.model


def test_an_edit_is_that_of_the_released_code(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = json.loads((GOLDEN / "rome_smollm2.json").read_text())
    expected = load_file(GOLDEN / "rome_smollm2.safetensors")
    asked: list[Tensor] = []
    found: list[Value] = []

    class Given:
        def solve(self, keys_EK: Tensor) -> Tensor:
            asked.append(keys_EK[0])
            return expected["u"][None]

    optimise = values.optimise

    def remembered(*args: Any) -> list[Value]:
        found.extend(optimise(*args))
        return found

    monkeypatch.setattr(values, "optimise", remembered)
    model, solver = tiny.smollm2(), Given()
    settings = RomeSettings(theirs["layer"], ValueSettings(**{k: theirs[k] for k in VALUE}))
    templates = theirs["context_templates"]
    editor = Rome(model, settings, templates, solver, 1000)  # type: ignore[arg-type]
    (edit,) = editor.edit([Request(**theirs["request"])])

    delta = oracle.rank_one(edit)
    update_DK = torch.outer(expected["right_vector"], expected["u"])
    pairs = {
        "k*": (asked[0], expected["k_star"]),
        "delta": (found[0].delta_D, expected["delta"]),
        "v*": (found[0].initial_D + found[0].delta_D, expected["target"]),
        "update": (delta.left_DR @ delta.right_KR.T, update_DK),
    }
    errors = {name: relative(mine, other) for name, (mine, other) in pairs.items()}
    assert max(errors.values()) < 1e-4, errors
    assert found[0].losses == pytest.approx(theirs["losses"], abs=1e-3)
    assert edit.health["divisor"] == pytest.approx(theirs["divisor"], rel=1e-4)

    targets = (theirs["request"]["target"], theirs["target_true"])
    queries = [Query(e, edit.request.text, target) for e in range(2) for target in targets]
    nlls = [score.nll for score in probabilities.score(model, queries, [UNEDITED, edit], 1000)]
    assert nlls == pytest.approx([*theirs["nll"]["pre"], *theirs["nll"]["post"]], abs=1e-3)
