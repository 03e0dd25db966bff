"""Configs: those that ship, and what a user reads who mistypes one."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.lock import LockedError, RunLock
from cluster.store import Store
from jobs.inputs.sources import benchmarks
from jobs.runs import config as configs
from jobs.runs import differences, manifests
from jobs.runs.config import ModelConfig, RunConfig
from jobs.runs.fits import refuse_what_does_not_fit
from rome import options
from rome.editors import EDITORS
from rome.editors.rome import RomeSettings
from rome.options import ConfigError
from tests.support import tiny

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = sorted(path.stem for path in (CONFIGS / "models").glob("*.yaml"))
RUNS = sorted((CONFIGS / "runs").glob("*.yaml"))


def names(path: Path) -> str:
    return path.stem


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    run = {
        "name": "test",
        "model": "gpt2-xl",
        "benchmark": "everyday",
        "editors": {"none": {}, "rome": {}, "far": {"editor": "rome", "layer": 20}},
    }
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a run's file with some keys changed."""

    def write(**keys: Any) -> Path:
        run: dict[str, Any] = {
            "name": "test",
            "model": "gpt2-xl",
            "benchmark": "everyday",
            "editors": {"none": {}, "rome": {}},
        }
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump(run | keys))
        return path

    return write


def rome(config: RunConfig, name: str = "rome") -> RomeSettings:
    kind, settings = config.editor(name)
    assert kind == "rome"
    assert isinstance(settings, RomeSettings)
    return settings


@pytest.mark.parametrize("path", RUNS, ids=names)
def test_every_run_loads(path: Path) -> None:
    for config in configs.load_each(path):
        assert config.name == path.stem
        assert config.benchmark in benchmarks()


@pytest.mark.parametrize("model", MODELS)
def test_every_model_loads(model: str, run_file: Path) -> None:
    config = configs.load(run_file, [f"model={model}"])
    assert config.model.name == model
    # Nothing of an editor is left to the defaults of another model.
    for kind, settings in config.model.editors.items():
        if "value" in {f.name for f in fields(EDITORS[kind].settings)}:
            assert {"layer", "layers"} & settings.keys(), kind
            assert len(settings["value"]) == 5, kind


@pytest.mark.parametrize(
    ("model", "layer", "clamp"),
    [
        ("gpt2-medium", 8, 3),
        ("gpt2-large", 12, 4),
        ("gpt2-xl", 17, 4),
        ("gpt-j-6b", 5, 4),
        ("smollm2-135m", 6, 4),
    ],
)
def test_the_released_settings(model: str, layer: int, clamp: int, run_file: Path) -> None:
    settings = rome(configs.load(run_file, [f"model={model}"]))
    value = settings.value
    assert (settings.layer, value.clamp) == (layer, clamp)
    assert (value.steps, value.learning_rate) == (20, 0.5)
    assert (value.weight_decay, value.kl_factor) == (0.5, 0.0625)
    assert settings.second_moment


def test_a_row_of_its_own_overrides_the_model(run_file: Path) -> None:
    config = configs.load(run_file)
    assert (rome(config).layer, rome(config, "far").layer) == (17, 20)
    assert rome(config, "far").value == rome(config).value


PUBLISHED = yaml.safe_load((CONFIGS / "published.yaml").read_text("utf-8"))


@pytest.mark.parametrize(
    ("run", "model", "benchmark", "below"),
    [
        ("table1", "gpt2-xl", "zsre", 10000),
        ("table4-gpt2-xl", "gpt2-xl", "counterfact", 7500),
        ("table4-gpt-j", "gpt-j-6b", "counterfact", 2000),
        *(("table5", model, "counterfact", 7500) for model in ("gpt2-medium", "gpt2-large")),
        *(("table6", model, "zsre", 10000) for model in ("gpt2-medium", "gpt2-large")),
    ],
)
def test_a_table_has_the_papers_rows_and_slice(
    run: str, model: str, benchmark: str, below: int
) -> None:
    config = configs.load(CONFIGS / "runs" / f"{run}.yaml", [f"model={model}"])
    assert (config.model.name, config.benchmark) == (model, benchmark)
    assert config.records.case_id_below == below
    rows = {name for name in PUBLISHED[benchmark][model] if "@" not in name}
    assert rows <= config.editors.keys()


@pytest.mark.parametrize(
    "model", ["gpt2-xl", "gpt-j-6b", "llama-3-8b-instruct", "qwen2.5-7b-instruct"]
)
def test_a_lifelong_run_is_the_published_protocol(model: str) -> None:
    config = configs.load(CONFIGS / "runs" / f"lifelong-{model}.yaml")
    chains = {name: config.grouping(name) for name in config.editors if name != "none"}
    for name, grouping in chains.items():
        assert (grouping.size, grouping.checkpoints[-1], grouping.orders) == (2000, 2000, 3), name
    assert chains["alphaedit"].sequence == 20
    assert config.editor("memit-history")[1].history
    for benchmark in ("counterfact", "zsre"):
        published = {name for name in PUBLISHED[benchmark][model] if "@" in name}
        assert published == {"alphaedit@2000", "memit-history@2000"}


@pytest.mark.parametrize(
    ("run", "overrides", "models"),
    [
        ("table5", [], ["gpt2-medium", "gpt2-large"]),
        ("table6", [], ["gpt2-medium", "gpt2-large"]),
        ("table4-gpt-j", ["model=[gpt2-xl, gpt-j-6b]"], ["gpt2-xl", "gpt-j-6b"]),
    ],
)
def test_a_table_of_several_models_is_one_file(
    run: str, overrides: list[str], models: list[str]
) -> None:
    file = CONFIGS / "runs" / f"{run}.yaml"
    found = configs.load_each(file, [*overrides, "model.dtype=bfloat16"])
    assert [config.model.name for config in found] == models
    assert {config.model.dtype for config in found} == {"bfloat16"}
    one, other = (config.model.editors["rome"]["layer"] for config in found)
    assert one != other


def test_a_list_of_one_model_is_that_model(run_file: Path) -> None:
    assert configs.load_each(run_file, ["model=[gpt2-xl]"]) == [configs.load(run_file)]
    with pytest.raises(ConfigError, match=r"must be one here.*--set model=NAME"):
        configs.load(run_file, ["model=[gpt2-xl, gpt-j-6b]"])
    with pytest.raises(ConfigError, match="must name each model once"):
        configs.load_each(run_file, ["model=[gpt2-xl, gpt2-xl]"])
    with pytest.raises(ConfigError, match=r"or a list of some, got \[\]"):
        configs.load_each(run_file, ["model=[]"])


@pytest.mark.parametrize(("twin", "full"), [("table1", "table1"), ("table4", "table4-gpt2-xl")])
def test_a_twin_has_the_rows_of_its_table(twin: str, full: str) -> None:
    small, large = (configs.load(CONFIGS / "runs" / f"{n}.yaml") for n in (f"{twin}-smollm2", full))
    assert list(small.editors) == list(large.editors)
    assert [small.editor(name)[0] for name in small.editors] == [
        large.editor(name)[0] for name in large.editors
    ]
    assert (small.model.name, small.records.limit) == ("smollm2-135m", 200)


def test_published_values_agree_with_each_other() -> None:
    """S is the harmonic mean of ES, PS and NS, as far as rounded values can tell."""
    checked = 0
    for rows in PUBLISHED["counterfact"].values():
        for name, row in rows.items():
            if "S" in row and "ES" in row:
                mean = 3 / sum(1 / row[metric] for metric in ("ES", "PS", "NS"))
                assert row["S"] == pytest.approx(mean, abs=0.11), name
                checked += 1
    assert checked == 14


def test_variants_differ_in_what_they_are_named_after() -> None:
    config = configs.load(CONFIGS / "runs" / "variants-smollm2.yaml")
    settings = {name: rome(config, name) for name in config.editors if name != "none"}
    assert {name: (s.keys, s.second_moment) for name, s in settings.items()} == {
        "rome": ("mixed", True),
        "r-rome": ("mean", True),
        "rome-prompt": ("prompt", True),
        "rome-identity": ("mixed", False),
    }


def test_set_reaches_into_editors_and_model(run_file: Path) -> None:
    config = configs.load(
        run_file,
        [
            "editors.rome.value.steps=5",
            "editors.rome.keys=mean",
            "model.second_moment.tokens=1_000",
            "model.dtype=bfloat16",
            "records.limit=100",
            "workers.workers=3",
        ],
    )
    assert (rome(config).value.steps, rome(config).keys) == (5, "mean")
    assert rome(config).value.learning_rate == 0.5
    assert rome(config, "far").value.steps == 20
    assert (config.model.second_moment.tokens, config.model.dtype) == (1000, "bfloat16")
    assert (config.records.limit, config.workers.workers) == (100, 3)


def test_set_model_changes_the_model_before_its_keys(run_file: Path) -> None:
    config = configs.load(run_file, ["model.dtype=float64", "model=gpt2-large"])
    assert (config.model.name, config.model.dtype) == ("gpt2-large", "float64")
    assert rome(config).layer == 12


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "lease_record=4",
            "lease_record: unknown key 'lease_record'; did you mean 'lease_records'?",
        ),
        ("records.limits=4", "records.limits: unknown key 'limits'; did you mean 'limit'?"),
        ("model.dtpe=float32", "model.dtpe: unknown key 'dtpe'; did you mean 'dtype'?"),
        ("model.second_moment.token=4", "unknown key 'token'; did you mean 'tokens'?"),
        ("scoring.generation.topk=4", "generation.topk: unknown key 'topk'; did you mean 'top_k'?"),
        ("workers.num_gpu=1", "workers.num_gpu: unknown key 'num_gpu'; did you mean 'num_gpus'?"),
        (
            "editors.rome.layers=4",
            "editors.rome.layers: unknown key 'layers'; did you mean 'layer'?",
        ),
        ("editors.rome.value.step=4", "rome.value.step: unknown key 'step'; did you mean 'steps'?"),
        ("editors.none.layer=1", "editors.none.layer: unknown key 'layer'"),
        ("editors.rme={}", "editors.rme: unknown editor 'rme'; did you mean 'rome'?"),
        ("editors.x={editor: roma}", "editors.x: unknown editor 'roma'; did you mean 'rome'?"),
        ("model.editors.rme={}", "model.editors: unknown editor 'rme'; did you mean 'rome'?"),
        ("model.editors.rome.layr=1", "model.editors.rome.layr: unknown key 'layr'; did you mean"),
        ("model.name=..", "model: name must not be empty, '.' or '..', got '..'"),
        ("model=gpt2-xxl", "unknown model 'gpt2-xxl'; did you mean 'gpt2-xl'?"),
        ("records.limit=many", "records.limit: Input should be a valid integer"),
        ("records.limit.x=1", "records.limit: Input should be a valid integer, got {'x': 1}"),
        (
            "model.dtype=float16",
            "model.dtype: Input should be 'float64', 'float32', 'tf32' or 'bfloat16'",
        ),
        ("editors.rome.value.steps=soon", "editors.rome.value.steps: Input should be a valid int"),
        ("editors.rome.keys=some", "keys: Input should be 'mixed', 'mean' or 'prompt', got 'some'"),
        ("lease_records=0", "run.yaml: lease_records must be from 1 to 1e+06, got 0"),
        (
            "editors.rome={sequence: 2, checkpoints: [2], scored: after}",
            "editors.rome: scored must be 'end' with checkpoints, which say when to score",
        ),
        ("name.x=1", "--set name.x: 'name' is 'test' and has no keys"),
        ("lease_records", "--set takes key=value, got 'lease_records'"),
        ("editors={}", "editors must name at least one editor"),
    ],
)
def test_a_wrong_key_names_itself_and_the_right_one(
    run_file: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        configs.load(run_file, [override])


def test_a_key_that_lacks_is_named_without_all_the_others() -> None:
    with pytest.raises(ConfigError) as caught:
        options.validate(ModelConfig, {"name": "x", "source": "secret"}, "x.yaml: ")
    assert str(caught.value) == "x.yaml: dtype: it must be given"


def test_all_that_is_wrong_is_said_at_once(write: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load(write(lease_record=1, records={"limit": "x"}))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all("changed.yaml: " in line for line in lines)


def test_a_file_that_is_no_config(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "bad.yaml"
    with pytest.raises(ConfigError, match=r"bad\.yaml: cannot be read: No such file"):
        configs.load(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="must be a mapping, got list"):
        configs.load(path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        configs.load(path)
    path.write_text(yaml.safe_dump({"name": "x", "model": "gpt2-xl", "benchmark": "everyday"}))
    with pytest.raises(ConfigError, match=r"bad\.yaml: editors: "):
        configs.load(path)


def test_the_projects_own_files_are_found_from_anywhere(
    tmp_path: Path, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert configs.load("configs/runs/everyday-rome.yaml").name == "everyday-rome"
    with pytest.raises(ConfigError, match=r"configs/runs/none\.yaml: cannot be read"):
        configs.load("configs/runs/none.yaml")
    (tmp_path / "configs" / "runs").mkdir(parents=True)
    run_file.rename("configs/runs/everyday-rome.yaml")
    assert configs.load("configs/runs/everyday-rome.yaml").name == "test"


def test_a_model_may_be_a_file_or_stand_in_the_run(write: Any, tmp_path: Path) -> None:
    model = {"name": "mine", "source": "folder", "dtype": "float32", "editors": {"rome": {}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(model))
    for given in (model, str(tmp_path / "mine.yaml")):
        config = configs.load(write(model=given))
        assert (config.model.name, config.model.second_moment.corpus) == ("mine", "self")


def test_difference_names_each_key_that_differs(run_file: Path) -> None:
    old = configs.plain(configs.load(run_file))
    new = configs.plain(configs.load(run_file, ["editors.rome.layer=9", "workers.workers=7"]))
    assert differences.difference(old, old) == []
    assert differences.difference(old, new) == ["editors.rome.layer: None there, 9 now"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("editors.rome.value.steps=0", "steps must be from 1 to 10000, got 0"),
        ("editors.rome.value.clamp=-1", "clamp must be from 1e-12 to 1e+06, got -1"),
        ("editors.rome.value.steps=1000000", "steps must be from 1 to 10000, got 1000000"),
        (
            "editors.rome.value.learning_rate=.inf",
            "rate must be from 1e-12 to 100, got inf",
        ),
        ("editors.rome.value.steps=true", "steps: Input should be a valid integer, got True"),
        ("editors.rome.value.steps=1e30", "steps: Input should be a valid integer, got 1e+30"),
        ("editors.rome.value.steps='5'", "steps: Input should be a valid integer, got '5'"),
        ("model.second_moment.tokens=1e30", "tokens"),
        ("templates.texts=[]", "texts must begin with the bare '{}', got []"),
        (
            "templates.texts=['{}', no brace]",
            "must have '{}' exactly once, got 'no br",
        ),
        ("templates.lengths=[[1, 10]]", "tokens of lengths must be from 2 to 10000, got 1"),
        ("records.case_id_below=0", "case_id_below must be at least 1, got 0"),
        ("workers.workers=-1", "workers must be from 0 to 100000, got -1"),
        ("workers.in_flight=0", "in_flight must be from 1 to 1000, got 0"),
        ("workers.record_seconds=.nan", "record_seconds must be from 0.1 to 1e+07, got nan"),
        ("workers.max_attempts=0", "max_attempts must be from 1 to 1000, got 0"),
        ("workers.num_gpus=-1", "num_gpus must be from 0 to 1000, got -1"),
        ("editors.rome.layer=-1", "layer must be at least 0, got -1"),
        (
            "editors.rome.value.learning_rate=.nan",
            "rate must be from 1e-12 to 100, got nan",
        ),
        ("lease_records=0", "lease_records must be from 1 to 1e+06, got 0"),
        ("records.limit=0", "limit must be at least 1, got 0"),
        ("scoring.generation.top_k=0", "top_k must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_bounds_are_refused_with_their_key(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        configs.load(CONFIGS / "runs" / "everyday-rome.yaml", [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "scoring.generation.max_tokens=129",
            "must be at most the 128 positions of tiny",
        ),
        ("scoring.generation.top_k=100000", "top_k must be at most the 420 tokens of tiny"),
        ("templates.lengths=[[200, 1]]", "templates.lengths: 200 tokens must be at most the 128"),
        ("editors.rome.layer=3", "editors.rome: tiny: layer must be from 0 to 2, got 3"),
        ("editors.memit={layers: [0, 9]}", "editors.memit: tiny: layer must be from 0 to 2, got 9"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_a_worker_boots(
    write: Any, override: str, said: str
) -> None:
    small = {"name": "m", "source": "m", "dtype": "float32"}
    config = configs.load(write(model=small, editors={"rome": {"layer": 1}}), [override])
    model = tiny.model("gpt2")
    model.name = "tiny"
    with pytest.raises(ConfigError, match=re.escape(said)):
        refuse_what_does_not_fit(config, model)


def test_of_two_drivers_on_one_new_directory_the_second_is_told(tmp_path: Path) -> None:
    """Whoever comes second, with other settings, takes neither the manifest nor the rows."""
    store = Store(tmp_path)

    def of_another(there: dict[str, Any]) -> None:
        raise ConfigError(f"it is of {there['name']}")

    first = {"name": "first", "records": 1, "editors": []}
    written = manifests.claim(store, first, of_another)
    assert first.items() <= written.items()
    with pytest.raises(ConfigError, match="it is of first"):
        manifests.claim(store, first | {"name": "second"}, of_another)
    assert manifests.claim(store, first | {"records": 2}, lambda _: None) == written
    with RunLock(store.sub("results")), pytest.raises(LockedError):
        manifests.claim(Store(tmp_path), first, of_another)
