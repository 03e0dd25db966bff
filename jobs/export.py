"""python -m jobs.export RUN_DIR ROW --out FOLDER [--order N] [--chain N]

The model at a checkpoint of a chain, as a folder that transformers loads.
"""

from __future__ import annotations

from jobs.commands.export import app as app

if __name__ == "__main__":
    app()  # It comes back for what follows as a module.

from pathlib import Path

from cluster.store import Store
from jobs import cli
from jobs.cli import say
from jobs.runs import manifests
from jobs.runs.config import RunConfig
from jobs.runs.parts import BATCHES, hive_path
from jobs.tasks import states
from jobs.tasks.evaluation import group_of
from jobs.tasks.loading import load_model
from rome import options
from rome.edits import files as edit_files
from rome.edits import sequences
from rome.edits.deltas import Edit, written


def export(run_dir: str, row: str, out: Path, order: int = 0, chain: int = 0) -> None:
    """Write the model of a row such as `memit@1000`: weights as safetensors, in the dtype of the
    run, config and tokenizer.

    Raises ValueError where the run has no such checkpoint yet, or its model is another now.
    """
    store = Store(run_dir)
    keys = ("editors", "config", "benchmark", "model_fingerprint")
    manifest = manifests.read(store, keys)
    config: RunConfig = options.validate(RunConfig, manifest["config"], f"{store.uri}: ")
    editor, _, edits = row.rpartition("@")
    if editor not in config.editors or row not in manifest["editors"]:
        chained = ", ".join(name for name in manifest["editors"] if "@" in name)
        raise ValueError(f"{store.uri} has no checkpoint '{row}', but {chained or 'no chains'}")
    group = group_of(config, manifest["benchmark"]["name"], editor)
    path = f"{group}/{hive_path(order=str(order), chain=str(chain))}"
    file, data = _state_of(store, path, int(edits))
    model = load_model(config.model)
    if (now := model.fingerprint()) != manifest["model_fingerprint"]:
        raise ValueError(
            f"{config.model.source} must have the weights of the run, whose fingerprint is "
            f"{manifest['model_fingerprint'][:16]}, and has {now[:16]}"
        )
    state, _ = edit_files.loads_chain(data, model, now, f"{store.uri}/{file}")
    total = sequences.scored(model, config.grouping(editor), state)
    with written(model, Edit(edit_files.OF_A_CHAIN, total)):
        model.hf.save_pretrained(out)
    model.tokenizer.save_pretrained(out)


def _state_of(store: Store, path: str, edits: int) -> tuple[str, bytes]:
    """The file of a chain's state after so many edits, and its content."""
    for part, batch in states.batches(store, f"{BATCHES}{path}"):
        if batch["edits"] == edits and batch["file"] is not None:
            if (data := states.content(store, batch)) is not None:
                return batch["file"], data
            raise ValueError(
                f"{store.uri}/{batch['file']} is gone or damaged. Move {part} there away: the line "
                "that began the run computes both again"
            )
    raise ValueError(
        f"{store.uri} has not made {edits} edits of {path} yet: run jobs.evaluate to its end, or "
        "give an --order and a --chain that it has"
    )


def main(run_dir: str, row: str, out: Path, order: int = 0, chain: int = 0) -> None:
    """See `jobs.commands.export`."""
    with cli.errors():
        export(run_dir, row, out, order, chain)
    say(f"{row}: {out}")
