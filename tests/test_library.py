"""`from rome import ...` and `python -m rome`, as a reader of the first lines would use them."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import rome
from rome import Request, applied, edit, generate, second_moment, written
from rome.__main__ import app
from rome.editors.values import ValueSettings
from rome.edits.deltas import dense
from rome.models import EditableModel
from rome.second_moment import MomentOrigin, SecondMoment
from tests.support import commands, tiny

FACT = Request("{} was born in", "Žižek", "Paris")


def test_importing_costs_nothing_and_needs_little() -> None:
    """A machine with torch and transformers can edit, whatever else it lacks."""
    code = """
        import sys
        for name in ("polars", "ray", "pydantic", "typer", "sklearn", "nltk", "peft"):
            sys.modules[name] = None
        import rome
        assert "torch" not in sys.modules
        for name in rome.__all__:
            getattr(rome, name)
        from rome.edits import files, peft_export
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    with pytest.raises(AttributeError, match="no attribute 'edited'"):
        rome.edited  # noqa: B018


@pytest.mark.model
def test_the_five_lines_of_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    assert rome.__doc__
    lines = re.findall(r"^    (.+)$", rome.__doc__, re.MULTILINE)
    assert len(lines) == 5
    names: dict[str, Any] = {"few": ValueSettings(steps=8)}
    lines[2] = lines[2].replace("layer=6", "layer=6, value=few")  # A third of the time.
    with pytest.warns(UserWarning, match="takes the identity"):
        exec("\n".join(lines), names)
    assert "Rome" in capsys.readouterr().out
    # Reverted, and its effect was the edit's.
    model, change = names["model"], names["change"]
    assert model.fingerprint() == tiny.smollm2().fingerprint()
    text = "The Eiffel Tower is in the city of"
    (before,), (after,) = generate(model, [text]), generate(model, [text], change)
    assert before.startswith(text)
    assert before != after
    assert "Rome" not in before


def logits(model: EditableModel) -> torch.Tensor:
    return model.hf(torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize(
    ("editor", "settings"),
    [("rome", {"layer": 1, "second_moment": False}), ("ft", {"layer": 1, "steps": 2})],
)
def test_an_edit_is_made_and_taken_back(editor: str, settings: dict[str, Any]) -> None:
    model = tiny.model("gpt2")
    before, fingerprint = logits(model), model.fingerprint()
    change = edit(model, FACT, editor, **settings)
    assert model.fingerprint() == fingerprint
    with written(model, change):
        inside = logits(model)
    with applied(model, [change]):
        assert torch.allclose(logits(model), inside, rtol=0, atol=1e-10)
    assert not torch.equal(inside, before)
    assert model.fingerprint() == fingerprint
    assert torch.equal(logits(model), before)


def test_a_second_moment_matters_and_may_be_one_file_a_layer(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    factor = torch.randn(40, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer in (0, 1):
        origin = MomentOrigin(
            model="m",
            model_fingerprint="",
            layer=layer,
            weight="w",
            corpus="c",
            corpus_fingerprint="",
        )
        moment = SecondMoment(factor @ factor.T, 60)
        second_moment.save(tmp_path / f"layer-{layer}.safetensors", moment, origin)
    files = str(tmp_path / "layer-{layer}.safetensors")
    one = edit(model, FACT, second_moment_file=files, layer=1)
    with pytest.warns(UserWarning, match="identity for C of layer 1"):
        other = edit(model, FACT, layer=1)
    (a,), (b,) = (made.deltas.values() for made in (one, other))
    assert not torch.allclose(dense(a), dense(b))
    assert len(edit(model, FACT, "memit", files, layers=(0, 1)).deltas) == 2
    with pytest.raises(ValueError, match=r"memit needs the second moments of layers \[0, 1\]"):
        edit(model, FACT, "memit", layers=(0, 1))
    with pytest.raises(ValueError, match="editor must be one of none, ft"):
        edit(model, FACT, "rom")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny.model("llama", "float32")
    tiny.save(model, tmp_path / "model")
    return tmp_path / "model"


invoke = partial(commands.invoke, app)


def test_the_command_shows_before_and_after_and_leaves_files(saved: Path) -> None:
    fact = ["--prompt", FACT.prompt, "--subject", FACT.subject, "--target", FACT.target]
    out, adapter = saved.parent / "edit.safetensors", saved.parent / "adapter"
    strong = ["value.stop_below=0", "value.kl_factor=0", "value.weight_decay=0", "layer=0"]
    given = ["--model", saved, *(part for one in strong for part in ("--set", one))]
    more = ["--say", "The capital of", "--out", out, "--export", "peft", adapter]
    result = invoke("edit", *given, *fact, *more)
    assert result.exit_code == 0, result.output
    assert "note: ROME takes the identity for C of layer 0" in result.stderr
    before, after = (float(p) for p in re.findall(r"0\.\d{4}", result.stdout)[:2])
    assert after > before
    assert re.search(r"P\(Paris\)", result.stdout)
    assert "The capital of" in result.stdout

    shown = invoke("show", out, "--model", saved, "--say", "\x1b[2JRome\xa0\u200c\u202e")
    assert shown.exit_code == 0, shown.output
    assert "\\x1b[2JRome\xa0\u200c\\u202e" in shown.stdout
    assert "\x1b" not in shown.output
    assert shown.stdout.startswith("Žižek was born in Paris (rome, ")
    assert [float(p) for p in re.findall(r"0\.\d{4}", shown.stdout)[:2]] == [before, after]
    model = rome.load(str(saved), "float32")
    adapted = PeftModel.from_pretrained(model.hf, adapter)
    adapters = [name for name, _ in adapted.named_modules() if name.endswith("lora_A.default")]
    assert adapters == ["base_model.model.model.layers.0.mlp.down_proj.lora_A.default"]

    wrong = invoke("show", out, "--model", saved, "--dtype", "bfloat16")
    assert wrong.exit_code == 1
    assert "load the model that was edited" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--editor", "rom"], "editor must be one of none, ft"),
        (["--set", "lair=1"], "rome: lair: "),
        (["--set", "layer"], "--set takes key=value, got 'layer'"),
        (["--set", "layer=99"], "layer must be from 0 to 2, got 99"),
        (["--set", "layer=1", "--set", "value.steps=1", "--export", "onnx", "x"], "got 'onnx'"),
    ],
)
def test_a_wrong_argument_is_named(saved: Path, arguments: list[str], message: str) -> None:
    fact = ["--prompt", FACT.prompt, "--subject", FACT.subject, "--target", FACT.target]
    result = invoke("edit", "--model", saved, *fact, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr


def test_what_is_wrong_without_the_model_is_said_before_it_is_loaded(tmp_path: Path) -> None:
    """There is no such model."""
    given = ["edit", "--model", tmp_path / "none", "--prompt", "{} is in", "--subject", "Rome"]
    for arguments, message in (
        (["--target", ""], "target must be text and not empty, got ''"),
        (["--target", " Paris"], "target must not begin or end with white space, got ' Paris'"),
        (["--target", "Paris", "--prompt", "It is in"], "exactly one '{}', got 'It is in'"),
        (["--target", "Paris", "--export", "onnx", "x"], "--export takes `peft DIR`, got 'onnx'"),
        (["--target", "Paris", "--dtype", "float8"], "dtype must be one of float64, float32"),
        (["--target", "Paris", "--editor", "roma"], "editor must be one of none, ft"),
        (["--target", "Paris", "--set", "layer=-1"], "layer must be at least 0, got -1"),
    ):
        result = invoke(*given, *arguments)
        assert (result.exit_code, message in result.stderr) == (1, True), result.output


def test_c_that_the_workspace_holds_for_these_weights_is_found(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROME_WORKSPACE", str(saved.parent))
    model = rome.load(str(saved), "float32")
    keys = torch.randn(60, 40, generator=torch.Generator().manual_seed(0)).double()
    for name, weights in (("others", "another model's"), ("mine", model.fingerprint())):
        origin = MomentOrigin(
            model="m", model_fingerprint=weights, layer=1, weight="w",
            corpus="c", corpus_fingerprint="",
        )  # fmt: skip
        file = saved.parent / "second_moments" / "m" / f"layer-1-{name}.safetensors"
        second_moment.save(file, SecondMoment(keys.T @ keys, 60), origin)
        fact = ["--prompt", FACT.prompt, "--subject", FACT.subject, "--target", FACT.target]
        more = ["--set", "layer=1", "--set", "value.steps=1"]
        result = invoke("edit", "--model", saved, *fact, *more)
        assert result.exit_code == 0, result.output
        assert ("takes the identity for C" in result.stderr) == (name == "others")
    assert "note: C is that of" in result.stderr
    assert "layer-{layer}-mine.safetensors" in result.stderr
