"""The files for several machines: their form, and slurm.sh with stand-ins for the commands of SLURM."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from clones import ran, run

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "flows/cluster"
STAND_INS = {
    "srun": 'echo "$@" > srun.txt; exit "${SRUN_CODE:-0}"',
    "scontrol": 'if [ "$1" = show ]; then echo node-1; echo node-2; else echo "$@" > scontrol.txt; fi',
    "prefect": 'echo "$@" > prefect.txt',
}


def test_compose_builds_a_stage_that_there_is_and_waits_for_what_it_needs():
    services = yaml.safe_load((ROOT / "flows/compose.yaml").read_text())["services"]
    for name, service in services.items():
        assert ("image" in service) == (name == "database")
        if "build" in service:
            assert f"AS {service['build']['target']}\n" in (ROOT / "Dockerfile").read_text()
            assert (ROOT / "flows" / service["build"]["context"] / "Dockerfile").exists()
        assert set(service.get("depends_on", {})) <= set(services)
    assert services["server"]["ports"] == ["127.0.0.1:4200:4200"]  # only to this machine, since the server has no login


def test_kubernetes_has_as_many_nodes_in_all_its_lines():
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    script = pod["containers"][0]["command"][-1]
    assert spec["completions"] == spec["parallelism"] == 4
    assert f"--nnodes {spec['completions']} " in script
    assert f"--nproc-per-node {pod['containers'][0]['resources']['limits']['nvidia.com/gpu']} " in script
    assert f"{job['metadata']['name']}-0.{service['metadata']['name']}:" in script
    assert pod["subdomain"] == service["metadata"]["name"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def slurm(project, stand_ins, **environment):
    """Run the script in a project, with stand-ins for commands; return its code."""
    (project / "bin").mkdir()
    for name, script in stand_ins.items():
        (project / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (project / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(project / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_GPUS_ON_NODE": "8"}
    environment = os.environ | job | {"PATH": path} | environment
    return subprocess.run(["bash", FOLDER / "slurm.sh"], cwd=project, env=environment).returncode


@pytest.mark.slow
def test_slurm_pretrains_on_all_nodes_and_hands_over(reproduced, tmp_path):
    project = shutil.copytree(reproduced, tmp_path / "barlow", symlinks=True)
    assert slurm(project, STAND_INS, PREFECT_API_URL="http://server/api") == 0
    assert (project / "srun.txt").read_text().split() == [
        *("torchrun", "--nnodes", "2", "--nproc-per-node", "8", "--max-restarts", "3", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "node-1:29400", "--rdzv-id", "7", "-m", "barlow.cli", "pretrain"),
    ]
    assert (project / "prefect.txt").read_text() == "deployment run retrain/retrain-nightly\n"
    assert not (project / "scontrol.txt").exists()
    assert ran(run(project, "dvc", "repro")) == []


@pytest.mark.parametrize(
    ("written", "restarts", "again"), [(True, "0", True), (False, "0", False), (True, "20", False)]
)
def test_slurm_queues_a_job_again_that_wrote_a_checkpoint(tmp_path, written, restarts, again):
    """A job that wrote no checkpoint is not run again, although an older run's checkpoint is there."""
    for folder in ("older", "this"):
        (tmp_path / f"models/resume/{folder}").mkdir(parents=True)
    (tmp_path / "models/resume/older/step-000000001.safetensors").touch()
    os.utime(tmp_path / "models/resume/older/step-000000001.safetensors", (1, 1))
    stand_ins = STAND_INS | dict.fromkeys(["barlow", "dvc"], "exit 0")
    if written:
        stand_ins["srun"] = f"touch models/resume/this/step-000000002.safetensors\n{STAND_INS['srun']}"
    assert slurm(tmp_path, stand_ins, SRUN_CODE="1", SLURM_RESTART_COUNT=restarts) == 1
    assert (tmp_path / "scontrol.txt").exists() is again
    assert not (tmp_path / "prefect.txt").exists()
