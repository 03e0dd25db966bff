"""From the command to the first row, by stage: `make scale ARGS="boot"`.

A random model of GPT-J's width with as many layers as fit into 3.2 GB of bfloat16, on Ray with one
worker, whose record is scored unedited; then each stage by itself, once for a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from jobs.inputs.record_stores import prepare
from rome import models
from rome.models import files
from tests.support import tiny

LAYERS = 6
_STAGE = (
    "import sys; from tests.programs import boots; boots.stage(sys.argv[1], sys.argv[2], began={})"
)


def make(folder: Path) -> None:
    config = transformers.GPTJConfig(n_layer=LAYERS)
    with torch.device("meta"):
        hf: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    hf = hf.to_empty(device="cpu")
    for parameter in hf.parameters():
        parameter.data.normal_(std=0.02)
    hf.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def stage(name: str, folder: str, began: float) -> None:
    """One of the stages of a worker, in a process that has done those before it."""
    found = {"interpreter and imports": time.time() - began}

    def timed(what: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        answer = call()
        found[what] = time.perf_counter() - start
        return answer

    if name == "local copy":
        timed(name, lambda: files.local_copy(folder))
    else:
        model = timed("load", lambda: models.load(folder, "bfloat16"))
        timed("hash of the weights", model.fingerprint)
        timed("hash for trained editors", lambda: model.origin)
    print(json.dumps(found))


def measure() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        environment = os.environ | {"ROME_CACHE": f"{root}/cache", "ROME_WORKSPACE": folder}
        make(root / "model")
        size = sum(file.stat().st_size for file in (root / "model").glob("*.safetensors"))
        print("boot", json.dumps({"checkpoint_GB": round(size / 1e9, 2)}), flush=True)
        for name in ("local copy", "load"):
            line = [sys.executable, "-c", _STAGE.format(time.time()), name, f"{root}/model"]
            done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
            _show(json.loads(done.stdout.splitlines()[-1]))
        prepare("everyday", f"{root}/records", limit=1)
        run = {
            "name": "boot",
            "model": {"name": "wide", "source": f"{root}/model", "dtype": "bfloat16"},
            "benchmark": f"{root}/records",
            "editors": {"none": {}},
            "templates": {"texts": ["{}"]},
            "scoring": {"generation": None, "strict": False, "reversed": False},
            "workers": {"workers": 1},
        }
        (root / "run.yaml").write_text(yaml.safe_dump(run))
        line = [sys.executable, "-m", "jobs.evaluate", f"{root}/run.yaml", "--out", f"{root}/run"]
        began = time.time()
        subprocess.run(line, env=environment, capture_output=True, check=True)
        (part,) = (root / "run").rglob("part-*.parquet")
        manifest = (root / "run" / "manifest.json").stat().st_mtime
        _show(
            {
                "to the manifest: Ray, one load and hash": manifest - began,
                "to the first row: a worker, its load and hash": part.stat().st_mtime - manifest,
            }
        )


def _show(found: dict[str, float]) -> None:
    print("boot", json.dumps({key: round(value, 1) for key, value in found.items()}), flush=True)


if __name__ == "__main__":
    measure()
