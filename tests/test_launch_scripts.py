"""The files in launch/, as linters and the APIs see them; tests/test_launch_ranks.py runs the scripts."""

from __future__ import annotations

import json
import os
import re
import subprocess

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.ranks import BIN, ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = ["mpirun.sh", "horovodrun.sh", "single-node.sh", "slurm.sbatch"]


def test_the_folder_holds_what_the_guide_names():
    assert sorted(file.name for file in LAUNCH.iterdir()) == sorted([*SCRIPTS, "mpijob.yaml"])
    guide = (ROOT / "docs" / "guides" / "launching.md").read_text()
    assert [file.name for file in LAUNCH.iterdir() if f"launch/{file.name}" not in guide] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name):
    done = subprocess.run(
        [str(BIN / "shellcheck"), str(LAUNCH / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_open_with_when_to_use_them_and_stop_at_the_first_error(name):
    lines = (LAUNCH / name).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    comment = [line for line in lines[1:] if line.startswith("#")]
    assert f"launch/{name}" in "\n".join(comment)
    assert "set -euo pipefail" in lines
    assert len(lines) <= 45
    variables = [line for line in lines if re.match(r"[A-Z_]+=\$\{", line)]
    assert variables
    assert lines.index(variables[-1]) < lines.index("[[ $# -gt 0 ]] || set -- distfit train configs/digits.yaml")
    assert os.access(LAUNCH / name, os.X_OK) is name.endswith(".sh")


@pytest.fixture(scope="module")
def job():
    return yaml.safe_load((LAUNCH / "mpijob.yaml").read_text())


@pytest.fixture(scope="module")
def schema():
    return json.loads((ROOT / "tests" / "mpijob_schema.json").read_text())


def test_the_mpijob_is_one(job, schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(job, schema)


def test_its_pods_are_pods(job):
    for replicas in job["spec"]["mpiReplicaSpecs"].values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, **replicas["template"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_its_ranks_start_as_many_threads_as_their_pod_has_cores(job):
    """TensorFlow does not see a pod's limit."""
    launcher, worker = (
        job["spec"]["mpiReplicaSpecs"][name]["template"]["spec"]["containers"][0] for name in ("Launcher", "Worker")
    )
    threads = int(worker["resources"]["limits"]["cpu"]) // job["spec"]["slotsPerWorker"]
    assert f"-x OMP_NUM_THREADS={threads} -x TF_NUM_INTRAOP_THREADS={threads} " in launcher["args"][0]


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (["apiVersion"], "kubeflow.org/v1"),
        (["spec", "slotsPerWorkers"], 2),
        (["spec", "runPolicy", "cleanPodPolicy"], "Never"),
        (["spec", "mpiReplicaSpecs", "Launcher", "replicas"], 2),
        (["spec", "mpiReplicaSpecs", "Workers"], {"template": {"spec": {"containers": [{}]}}}),
    ],
)
def test_the_schema_refuses_what_the_operator_refuses(job, schema, path, wrong):
    broken = json.loads(json.dumps(job))
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)
