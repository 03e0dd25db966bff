"""The wheel, installed where there is no checkout, and `rome-bench` in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from jobs.__main__ import COMMANDS, app
from rome.__main__ import app as rome_app
from tests.support import tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ("rome", "cluster", "jobs", "configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, which has no leftovers of other builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "--wheel-dir", out, source)
    (built,) = out.iterdir()
    return built


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index"]
    # On a path to the checkout, pip finds the project and takes it for installed.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


class Installed:
    """An environment with the wheel, and this one's dependencies but not its checkout."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.venv, self.workspace = folder / "venv", folder / "workspace"
        self.workspace.mkdir()
        python = [sys.executable, "-m", "venv", "--without-pip", str(self.venv)]
        subprocess.run(python, check=True)
        pip("--python", self.venv / "bin" / "python", "install", wheel)
        (packages,) = self.venv.glob("lib/python*/site-packages")
        # Of a folder named in a .pth file no other .pth file is read, such as that of a checkout.
        shared = [path for path in sys.path if path.endswith("-packages")]
        (packages / "dependencies.pth").write_text("\n".join(shared))

    def run(self, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A program of the environment, from a folder in which nothing is."""
        environment = {
            key: value
            for key, value in os.environ.items()
            if key != "PYTHONPATH" and not key.startswith("RAY_")
        }
        return subprocess.run(
            [self.venv / "bin" / name, *map(str, arguments)],
            cwd=self.workspace,
            env=environment | {"ROME_WORKSPACE": str(self.workspace)},
            check=False,
            capture_output=True,
            text=True,
        )

    def says(self, name: str, *arguments: object) -> str:
        """What it prints. It must end with 0."""
        done = self.run(name, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def without(self, extras: list[str], code: str) -> str:
        """What `code` prints where the packages of these extras are not installed."""
        lacking = [module for extra in extras for module in modules_of(extra)]
        blocked = f"import sys; sys.modules |= dict.fromkeys({lacking})\n"
        return self.says("python", "-c", blocked + code)


def modules_of(extra: str) -> list[str]:
    names = [re.split(r"[\[<>=]", requirement)[0] for requirement in EXTRAS[extra]]
    return [
        {"scikit-learn": "sklearn", "vl-convert-python": "vl_convert"}.get(name, name)
        for name in names
        if name != "urllib3"  # Here boto3 is installed, which transformers finds, and needs it.
    ]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a tiny GPT-2, which is beside it."""
    folder = tmp_path_factory.mktemp("model")
    small = tiny.model("gpt2", "float32")
    tiny.save(small, folder)
    config = {
        "name": "tiny",
        "source": str(folder),
        "dtype": "float32",
        "second_moment": {"corpus": "self", "tokens": 2000},
        "editors": {"rome": {"layer": 1, "value": {"steps": 2}}},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder / "tiny.yaml"


def test_the_wheel_holds_every_module_config_and_template_and_no_more(wheel: Path) -> None:
    expected = {f"{package}/py.typed" for package in ("rome", "cluster", "jobs")}
    for folder in ("rome", "cluster", "jobs"):
        expected |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
    templates = (ROOT / "jobs" / "output" / "templates").iterdir()
    expected |= {str(path.relative_to(ROOT)) for path in templates}
    configs = (ROOT / "configs").rglob("*.yaml")
    expected |= {f"rome/{path.relative_to(ROOT)}" for path in configs}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_version_is_the_same_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (cited["title"], cited["version"]) == (PROJECT["name"], PROJECT["version"])
    assert f"## {PROJECT['version']} " in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_installed_packages_are_the_wheels(installed: Installed) -> None:
    code = "import rome.paths, cluster.store, jobs.cli as c\n"
    code += "print(rome.paths.CONFIGS, cluster.store.__file__, c.__file__)"
    for place in installed.says("python", "-c", code).split():
        assert Path(place).is_relative_to(installed.venv)


def test_help_lists_every_command_and_imports_none(installed: Installed) -> None:
    assert " ".join(installed.says("rome-bench", "--help").split()).endswith(
        " ".join(f"{name} {text}" for name, (_, text) in COMMANDS.items())
    )
    slow = ["torch", "transformers", "pydantic", "numpy"]
    code = f"sys.modules |= dict.fromkeys({slow})\nfrom jobs.__main__ import app; app(['--help'])"
    assert "sweep" in installed.without(["cluster", "report"], code)


def test_the_bundled_facts_become_a_store(installed: Installed) -> None:
    installed.says("rome-bench", "prepare", "everyday", "--out", "store", "--limit", 20)
    shards = (installed.workspace / "store").glob("shard-*.parquet")
    assert sum(pl.read_parquet(shard).height for shard in shards) == 20


def test_the_run_of_make_bench_and_its_report(installed: Installed, model: Path) -> None:
    run = installed.workspace / "run"
    settings = [f"model={model}", "records.limit=2", "scoring.generation.max_tokens=60"]
    settings += ["workers.workers=0"]  # test_job_submit.py has Ray.
    given = [argument for setting in settings for argument in ("--set", setting)]
    config = "configs/runs/everyday-rome.yaml"
    assert "unedited" in installed.says("rome-bench", "evaluate", config, "--out", run, *given)
    installed.says("rome-bench", "report", run, "--out", "report.html")
    assert "<html" in (installed.workspace / "report.html").read_text()


def test_one_fact_is_edited_and_shown(installed: Installed, model: Path) -> None:
    fact = ["--prompt", "{} is in", "--subject", "The Eiffel Tower", "--target", "Rome"]
    out = ["--model", model, "--out", "edit.safetensors"]
    assert "P(Rome)" in installed.says("rome-bench", "edit", *fact, *out)
    shown = installed.says("rome-bench", "show", "edit.safetensors", "--model", model)
    assert shown.startswith("The Eiffel Tower is in Rome (rome, ")


def test_an_extra_holds_what_its_commands_need(installed: Installed) -> None:
    imports = "import rome.one_fact; [getattr(rome, name) for name in rome.__all__]"
    installed.without(["cluster", "report"], imports)
    commands = ["prepare", "second_moment", "evaluate", "reduce", "status"]
    installed.without(["report"], "import " + ", ".join(f"jobs.{name}" for name in commands))


def test_a_command_that_lacks_a_package_names_the_way_out(installed: Installed) -> None:
    run = installed.workspace / "begun"
    run.mkdir()
    (run / "manifest.json").write_text("{}")
    code = "from jobs.__main__ import app; sys.stderr = sys.stdout\n"
    code += f"try: app(['compare', {str(run)!r}])\nexcept SystemExit as end: assert end.code == 1"
    said = installed.without(["report"], code)
    assert "error: compare needs 'scipy'; pip install 'rome-bench[all]' brings it" in said


@pytest.mark.parametrize("name", [*COMMANDS])
def test_a_command_is_that_of_its_module(name: str) -> None:
    """Its help, and its error and exit status where it is called wrongly, but for its name."""
    module, _ = COMMANDS[name]
    own = import_module(module).app
    first = [name] if own is rome_app else []
    for arguments in (["--help"], ["--nonsense"]):
        one = CliRunner().invoke(app, [name, *arguments], prog_name="rome-bench")
        other = CliRunner().invoke(own, [*first, *arguments], prog_name="other")
        assert one.exit_code == other.exit_code
        called = " ".join(["other", *first])
        assert one.output.replace(f"rome-bench {name}", called) == other.output


def test_a_name_that_is_none_is_corrected() -> None:
    wrong = CliRunner().invoke(app, ["evaluat"])
    assert (wrong.exit_code, "Did you mean 'evaluate'?" in wrong.output) == (2, True)
