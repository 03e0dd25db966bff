"""The editor of docs/new-editor.md, as its reader would add it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from jobs.runs import config as configs
from rome.data.records import Record, Request
from rome.editors import EDITORS, Kind, Resources
from rome.edits.deltas import applied, dense
from rome.evaluation import evaluate
from rome.models import EditableModel, prompts
from rome.scoring.settings import GenerationSettings, ScoringSettings
from tests.support import tiny
from tests.support.tiny import REQUESTS, TEMPLATES

DOC = (Path(__file__).parents[1] / "docs" / "new-editor.md").read_text("utf-8")
MODULE, REGISTRATION = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
SCORING = ScoringSettings(generation=GenerationSettings(max_tokens=20))
(ROWS,) = re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry with the document's editor in it, until the test ends."""
    monkeypatch.setitem(EDITORS, "steer", EDITORS["none"])
    names: dict[str, object] = {"__name__": "steer", "EDITORS": EDITORS, "Kind": Kind}
    exec(compile(MODULE + REGISTRATION, "docs/new-editor.md", "exec", dont_inherit=True), names)


def first_token(model: EditableModel, request: Request) -> float:
    """How likely the target begins after the prompt, as log p."""
    (encoded,) = model.encode([prompts.with_target(request.text, request.target)])
    start = prompts.target_start(encoded, request.text)
    logits_V = model.hf(torch.tensor([encoded.ids[:start]])).logits[0, -1]
    return float(logits_V.log_softmax(0)[encoded.ids[start]])


def record(case_id: int) -> Record:
    request = REQUESTS[case_id]
    return Record(
        case_id=case_id,
        relation_id="P1",
        prompt=request.prompt,
        subject=request.subject,
        target_new=request.target,
        target_true="Japan",
        target_new_id=None,
        target_true_id=None,
        paraphrase_prompts=(),
        neighborhood_prompts=("The Tokyo Tower is in",),
        attribute_prompts=(),
        generation_prompts=(),
    )


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_the_documented_editor_runs_as_any_other(family: str, tmp_path: Path) -> None:
    run = {
        "name": "documented",
        "model": {"name": "tiny", "source": "none", "dtype": "float64"},
        "benchmark": "everyday",
        "editors": yaml.safe_load(ROWS)["editors"],
        "lease_records": 10,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    config = configs.load(
        tmp_path / "run.yaml", ["editors.steer.layer=2", "editors.steer-hard.layer=2"]
    )
    kind, settings = config.editor("steer")
    assert (kind, settings.layer, config.grouping("steer-ten").size) == ("steer", 2, 10)

    model = tiny.model(family)
    before = model.fingerprint()
    resources = Resources(model, TEMPLATES, lambda layer: pytest.fail("needs no C"), 400)
    editor = EDITORS[kind].build(resources, settings)
    a, b, again = (editor.edit(REQUESTS[i : i + 1])[0] for i in (0, 1, 0))
    for name, delta in a.deltas.items():
        assert torch.equal(dense(delta), dense(again.deltas[name]))
        assert not torch.equal(dense(delta), dense(b.deltas[name]))

    (row, *others), _ = evaluate(model, editor, [record(i) for i in range(5)], SCORING, None, 400)
    assert row["edit_norm"] == a.health["norm"] > 0
    assert len(others) == 4
    hard = EDITORS[kind].build(resources, config.editor("steer-hard")[1])
    for request, edit in zip(REQUESTS, hard.edit(REQUESTS), strict=True):
        with applied(model, [edit]):
            after = first_token(model, request)
        assert after > first_token(model, request)
    assert model.fingerprint() == before


def test_the_example_is_as_small_as_it_says() -> None:
    lines = [line for line in MODULE.splitlines() if line.strip()]
    assert len([line for line in lines if not re.match("from |import ", line)]) <= 30
