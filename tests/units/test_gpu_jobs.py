"""GPU jobs: every file is what the API takes, each rule is told with what to write instead, and the list is true."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from core.errors import UserError
from gcp.environment import Environment, resolve_environment
from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format
from level_1_pipeline.vertex import gpu_jobs, machines
from level_1_pipeline.vertex.job_checks import check
from level_1_pipeline.vertex.machines import GPUS, MACHINES
from project.settings import load_settings

from tests.units.project import ROOT

JOBS = gpu_jobs.names(ROOT)
IMAGE = "europe-west4-docker.pkg.dev/lab-12345/digit-reader/train@sha256:" + "0" * 64
MACHINE, DISK, SCHEDULING = (
    "workerPoolSpecs[0].machineSpec",
    "workerPoolSpecs[0].diskSpec",
    "scheduling",
)


def environment(region: str, bucket: str = "") -> Environment:
    """Project lab-12345, whatever this project's own environments are."""
    environment = f"\"cloud.environments={{dev: {{project: lab-12345, bucket: '{bucket}'}}}}\""
    return resolve_environment(
        load_settings(
            f"""cloud.region={region} {environment} cloud.encryption=google-managed "containers.registry=''" """
        ),
        "dev",
    )


def region_of(job: str) -> str:
    """One that offers the job's GPU."""
    gpu = GPUS.get(
        gpu_jobs.load(job, ROOT)["workerPoolSpecs"][0]["machineSpec"].get("acceleratorType", "")
    )
    return min(gpu.regions) if gpu and gpu.regions else "europe-west4"


def parsed(job: dict) -> types.CustomJobSpec:
    """The job as the API's own message."""
    return types.CustomJobSpec(
        json_format.ParseDict(job, types.CustomJobSpec.pb(types.CustomJobSpec()))
    )


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_resolved_to_what_the_api_takes(name):
    where = environment(region_of(name))
    job = gpu_jobs.resolve(name, ROOT, where, IMAGE)
    spec = parsed(job)
    assert spec.service_account == where.account("trainer") != ""
    for pool in spec.worker_pool_specs:
        assert pool.container_spec.image_uri == IMAGE
        assert list(pool.container_spec.command) == ["python", "-m", "trainer.train"]
        assert pool.machine_spec.machine_type in MACHINES
        assert pool.replica_count >= 1
        assert pool.disk_spec.boot_disk_size_gb >= 100
    assert spec.scheduling.timeout.total_seconds() > 0  # a forgotten job must not bill for a week
    for pool in job["workerPoolSpecs"]:
        pool["replicaCount"] = str(pool["replicaCount"])  # JSON's form of a 64-bit number
    assert json_format.MessageToDict(types.CustomJobSpec.pb(spec)) == json.loads(json.dumps(job))


def test_the_file_stays_as_it_is():
    name = JOBS[0]
    before = gpu_jobs.load(name, ROOT)
    gpu_jobs.resolve(name, ROOT, environment(region_of(name)), IMAGE)
    assert gpu_jobs.load(name, ROOT) == before
    assert "containerSpec" not in before["workerPoolSpecs"][0]


def test_what_is_not_known_yet_is_left_out():
    by_hand = gpu_jobs.resolve("cpu", ROOT, environment("europe-west4", bucket="lab-1-mine"), "")
    nowhere = gpu_jobs.resolve("cpu", ROOT, None, "")
    assert by_hand == nowhere
    assert "serviceAccount" not in nowhere
    assert nowhere["workerPoolSpecs"][0]["containerSpec"] == {
        "command": ["python", "-m", "trainer.train"]
    }


def test_every_file_says_when_to_choose_it_and_whether_it_was_tried():
    for name in JOBS:
        text = (ROOT / gpu_jobs.FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        assert text.startswith("# ")
        assert gpu_jobs.NOT_TRIED.search(text), (
            name
        )  # whoever runs it on such a machine removes the line, and this test's


def test_the_machine_that_leads_is_one_and_the_others_are_like_it():
    first, second = gpu_jobs.load("l4-two-nodes", ROOT)["workerPoolSpecs"]
    assert first["replicaCount"] == 1
    assert first["machineSpec"] == second["machineSpec"]


# ── the jobs of project.yaml ────────────────────────────────────────────────────────────────────────────────────────
def test_the_chosen_jobs_are_resolved_in_their_order():
    settings = load_settings('cloud.train.jobs="[l4,cpu,l4-spot]"')
    jobs = gpu_jobs.chosen_jobs(settings, ROOT, environment("europe-west4"), IMAGE)
    assert jobs == [
        gpu_jobs.resolve(name, ROOT, environment("europe-west4"), IMAGE)
        for name in ("l4", "cpu", "l4-spot")
    ]


def test_the_jobs_of_this_project_are_there():
    assert set(load_settings("").cloud.train.jobs) <= set(JOBS)


def test_a_name_that_is_none_is_told_with_the_nearest():
    with pytest.raises(
        UserError,
        match=r"cloud\.train\.jobs in project\.yaml: there is no GPU job 'l4-spott'; near it are l4-spot",
    ):
        gpu_jobs.chosen_jobs(load_settings("cloud.train.jobs=[l4-spott]"), ROOT, None, "")
    for name in ("l5", "../l4", "", "README"):
        with pytest.raises(UserError, match="there is no GPU job"):
            gpu_jobs.load(name, ROOT)


# ── rules ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# A job, where in it a value is put (None removes it), the value, and what the message says.
RULES = {
    "more GPUs than it takes": (
        *("l4", f"{MACHINE}.acceleratorCount", 2),
        f"{MACHINE}.acceleratorCount is 2: machineType g2-standard-8 takes 1 NVIDIA_L4; for 2 use g2-standard-24.",
    ),
    "no number of GPUs": (
        "l4",
        f"{MACHINE}.acceleratorCount",
        None,
        "acceleratorCount is missing: machineType g2-standard-8 takes 1 NVIDIA_L4.",
    ),
    "a GPU of another machine": (
        *("l4", f"{MACHINE}.acceleratorType", "NVIDIA_TESLA_T4"),
        "acceleratorType is NVIDIA_TESLA_T4: machineType g2-standard-8 takes 1 NVIDIA_L4; for NVIDIA_TESLA_T4 use n1-standard-4",
    ),
    "no GPU on a machine that has one": (
        "a100",
        f"{MACHINE}.acceleratorType",
        None,
        "acceleratorType is missing, beside acceleratorCount 1: machineType a2-highgpu-1g takes 1",
    ),
    "a GPU on a machine that takes none": (
        *("l4", f"{MACHINE}.machineType", "e2-standard-4"),
        "acceleratorType is NVIDIA_L4: machineType e2-standard-4 takes no GPU; for NVIDIA_L4 use g2-standard-4",
    ),
    "a number and no GPU": (
        "cpu",
        f"{MACHINE}.acceleratorCount",
        1,
        "acceleratorType is missing, beside acceleratorCount 1: machineType n1-standard-4 takes 1, 2 or 4 NVIDIA_TESLA_T4; or ",
    ),
    "too few GPUs for so many processors": (
        *("t4", f"{MACHINE}.machineType", "n1-standard-32"),
        "acceleratorCount is 1: machineType n1-standard-32 takes 2 or 4 NVIDIA_TESLA_T4; for 1 use n1-standard-4",
    ),
    "a machine that is none": (
        "l4",
        f"{MACHINE}.machineType",
        "g2-standard-9",
        "machineType is 'g2-standard-9'; near it are g2-standard-",
    ),
    "no machine": ("l4", MACHINE, None, "machineType is missing"),
    "a TPU": (
        "cpu",
        f"{MACHINE}.tpuTopology",
        "2x2",
        "tpuTopology is '2x2'; this project trains on GPUs",
    ),
    "a misspelt field": (
        *("l4", f"{MACHINE}.acceleratorTyp", "NVIDIA_L4"),
        "acceleratorTyp: there is no such field; near it are acceleratorType",
    ),
    "Python's spelling": (
        "l4",
        f"{MACHINE}.machine_type",
        "x",
        "machine_type: there is no such field; near it are machineType",
    ),
    "a field of the job around it": (
        "l4",
        "displayName",
        "x",
        "displayName: there is no such field",
    ),
    "a GPU that is none": (
        "l4",
        f"{MACHINE}.acceleratorType",
        "NVIDIA_L5",
        "acceleratorType is 'NVIDIA_L5'; near it are NVIDIA_L4",
    ),
    "a number as text": (
        "l4",
        "workerPoolSpecs[0].replicaCount",
        "1",
        "replicaCount is '1'; it takes a whole number.",
    ),
    "a number too large": ("l4", "workerPoolSpecs[0].replicaCount", 10**30, "replicaCount"),
    "a truth value as a number": (
        "l4",
        f"{DISK}.bootDiskSizeGb",
        True,
        "bootDiskSizeGb is True; it takes a whole number.",
    ),
    "text as a truth value": (
        "l4",
        f"{SCHEDULING}.disableRetries",
        "no",
        "disableRetries is 'no'; it takes true or false.",
    ),
    "a number as text's": ("l4", "serviceAccount", 7, "serviceAccount is 7; it takes text"),
    "no list": (
        "l4",
        "workerPoolSpecs",
        {"machineSpec": {}},
        "workerPoolSpecs is {'machineSpec': {}}; it takes a list.",
    ),
    "text for a machine": (
        "l4",
        MACHINE,
        "g2-standard-8",
        "machineSpec is 'g2-standard-8'; it takes machineType, acceleratorType",
    ),
    "a field without a value": (
        "l4",
        SCHEDULING,
        ...,
        "scheduling has no value; give it one, or remove it.",
    ),
    "no pool": ("l4", "workerPoolSpecs", [], "workerPoolSpecs has 0 entries; it takes 1, or 2"),
    "a Python package": (
        *("l4", "workerPoolSpecs[0].pythonPackageSpec", {"pythonModule": "x"}),
        "pythonPackageSpec: a job runs the training image",
    ),
    "no machine at all": (
        "l4",
        "workerPoolSpecs[0].replicaCount",
        0,
        "replicaCount is missing; it takes 1; for more machines",
    ),
    "two that lead": (
        "l4",
        "workerPoolSpecs[0].replicaCount",
        2,
        "replicaCount is 2; it takes 1; for more machines add a second pool",
    ),
    "machines that differ": (
        *("l4-two-nodes", "workerPoolSpecs[1].machineSpec", {"machineType": "n1-standard-4"}),
        "machineSpec.machineType differs from that of workerPoolSpecs[0]",
    ),
    "an old name": (
        "l4",
        f"{SCHEDULING}.strategy",
        "ON_DEMAND",
        "strategy is ON_DEMAND, which is an old name; the new one is STANDARD.",
    ),
    "a strategy that is none": (
        "l4",
        f"{SCHEDULING}.strategy",
        "FLEXSTART",
        "strategy is 'FLEXSTART'; near it are FLEX_START",
    ),
    "one H100 on demand": (
        "h100-spot",
        f"{SCHEDULING}.strategy",
        "STANDARD",
        "strategy is STANDARD: machineType a3-highgpu-1g takes SPOT or FLEX_START",
    ),
    "one H100 and no strategy": (
        "h100-spot",
        SCHEDULING,
        None,
        "strategy is STANDARD: machineType a3-highgpu-1g takes SPOT or FLEX_START",
    ),
    "waiting for a T4": (
        "t4",
        f"{SCHEDULING}.strategy",
        "FLEX_START",
        "strategy is FLEX_START, which is for acceleratorType NVIDIA_L4, NVIDIA_TESLA_A100",
    ),
    "waiting for processors": (
        "cpu",
        f"{SCHEDULING}.strategy",
        "FLEX_START",
        "for machineType n1-standard-4 use STANDARD or SPOT.",
    ),
    "waiting on demand": (
        "l4",
        f"{SCHEDULING}.maxWaitDuration",
        "60s",
        "maxWaitDuration counts only with strategy FLEX_START",
    ),
    "eight days": (
        "h100-flex",
        f"{SCHEDULING}.timeout",
        "691200s",
        "timeout is 691200s; with FLEX_START it takes 604800s (7 days) at most.",
    ),
    "no time": ("l4", f"{SCHEDULING}.timeout", "0s", "timeout is 0; it takes the seconds"),
    "hours": (
        "l4",
        f"{SCHEDULING}.timeout",
        "6h",
        "timeout is '6h'; it takes seconds with an s, such as \"3600s\".",
    ),
    "seconds without s": (
        "l4",
        f"{SCHEDULING}.timeout",
        3600,
        "timeout is 3600; it takes seconds with an s",
    ),
    "negative": (
        "l4",
        f"{SCHEDULING}.timeout",
        "-5s",
        "timeout is '-5s'; it takes seconds with an s",
    ),
    "two minds": (
        "l4-two-nodes",
        f"{SCHEDULING}.disableRetries",
        True,
        "disableRetries contradicts restartJobOnWorkerRestart",
    ),
    "a disk that it cannot boot from": (
        "h200x8",
        f"{DISK}.bootDiskType",
        "pd-ssd",
        "a3-ultragpu-8g takes hyperdisk-balanced.",
    ),
    "no disk where the usual one does not fit": (
        "b200x8",
        DISK,
        None,
        "diskSpec.bootDiskType is missing: machineType a4-highgpu-8g takes hyperdisk",
    ),
    "a disk that is none": (
        "cpu",
        f"{DISK}.bootDiskType",
        "ssd",
        "bootDiskType is 'ssd': machineType n1-standard-4 takes pd-ssd or pd-standard.",
    ),
    "a small disk": (
        "l4",
        f"{DISK}.bootDiskSizeGb",
        99,
        "bootDiskSizeGb is 99; it takes 100 to 64000.",
    ),
    "a disk of no size": (
        "l4",
        f"{DISK}.bootDiskSizeGb",
        -1,
        "bootDiskSizeGb is -1; it takes 100 to 64000.",
    ),
}


def put(job: dict, path: str, value: object) -> dict:
    """The job with one value changed; None removes it, ... makes it null."""
    *parents, last = [
        int(part) if part.isdigit() else part
        for part in path.replace("[", ".").replace("]", "").split(".")
    ]
    block = job
    for part in parents:
        block = block[part]
    if value is None:
        del block[last]
    else:
        block[last] = None if value is ... else value
    return job


@pytest.mark.parametrize("rule", RULES)
def test_a_mistake_is_told_with_what_to_write_instead(rule):
    name, path, value, told = RULES[rule]
    with pytest.raises(UserError) as refused:
        check(put(gpu_jobs.load(name, ROOT), path, value), "", "gpu_jobs/mine.yaml")
    message = str(refused.value)
    assert message.startswith("gpu_jobs/mine.yaml: ")
    assert told in message
    assert path.rpartition(".")[2].partition("[")[0] in message


FINE = [
    ("cpu", f"{MACHINE}.machineType", "c2-standard-60"),
    ("t4", f"{MACHINE}.acceleratorCount", 4),
    ("h100-flex", f"{SCHEDULING}.maxWaitDuration", "0s"),
    ("h100-flex", f"{SCHEDULING}.timeout", "604800s"),
    ("l4", SCHEDULING, None),
    ("l4", DISK, None),
    ("l4", f"{SCHEDULING}.strategy", "FLEX_START"),
    ("h100x8", f"{SCHEDULING}.strategy", "SPOT"),
    ("l4-two-nodes", "workerPoolSpecs[1].replicaCount", 7),
    ("l4", "baseOutputDirectory", {"outputUriPrefix": "gs://bucket/run"}),
    ("h200x8", f"{MACHINE}.reservationAffinity", {"reservationAffinityType": "ANY_RESERVATION"}),
]


@pytest.mark.parametrize(
    ("name", "path", "value"),
    FINE,
    ids=[f"{name} {path.rpartition('.')[2]}" for name, path, _ in FINE],
)
def test_what_is_allowed_is_not_refused(name, path, value):
    job = put(gpu_jobs.load(name, ROOT), path, value)
    check(job, "", "mine")
    assert parsed(job)


def test_all_mistakes_are_told_at_once():
    job = put(
        put(gpu_jobs.load("l4", ROOT), f"{MACHINE}.acceleratorCount", 2),
        f"{SCHEDULING}.maxWaitDuration",
        "60s",
    )
    with pytest.raises(UserError, match="acceleratorCount") as refused:
        check(job, "", "mine")
    assert "maxWaitDuration" in str(refused.value)


def test_a_region_without_the_gpu_is_told_with_regions_that_have_it():
    job = gpu_jobs.load("a100", ROOT)
    check(job, "europe-west4", "mine")
    with pytest.raises(UserError) as refused:
        check(job, "europe-west9", "mine")
    assert (
        "NVIDIA_TESLA_A100, which europe-west9 (cloud.region in project.yaml) does not offer; europe-west4, "
        in str(refused.value)
    )


BAD_FILES = {
    "empty": ("", "is empty"),
    "a list": ("- 1\n", "not a mapping"),
    "no YAML": ("a: [\n", "is not valid YAML"),
    "twice": ("scheduling: {}\nscheduling: {}\n", "stands twice"),
    "not UTF-8": (b"\xff\xfe", "is not valid YAML"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_read_is_told(case, tmp_path):
    content, told = BAD_FILES[case]
    path = tmp_path / gpu_jobs.FOLDER / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=told) as refused:
        gpu_jobs.resolve("mine", tmp_path, None, "")
    assert "level_1_pipeline/gpu_jobs/mine.yaml" in str(refused.value)


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_table_names_what_the_api_knows():
    known = {kind.name for kind in types.AcceleratorType}
    assert set(GPUS) <= known
    for machine in MACHINES.values():
        assert set(machine.gpus) <= set(GPUS)
        assert machine.gpus or not machine.built_in
        assert set(machine.strategies) <= {strategy.name for strategy in types.Scheduling.Strategy}


@pytest.mark.parametrize(
    ("machine", "gpu", "count", "strategy", "expected"),
    [
        ("n1-standard-4", "", 0, "STANDARD", (0.2185, "")),  # Google's price of training on it
        ("n1-standard-8", "NVIDIA_TESLA_T4", 1, "STANDARD", (0.84, "")),
        ("g2-standard-4", "NVIDIA_L4", 1, "STANDARD", (0.7068 * 1.15, "")),
        ("g2-standard-8", "NVIDIA_L4", 1, "SPOT", (0.8536 * 1.15, "<")),
        ("a3-highgpu-1g", "NVIDIA_H100_80GB", 1, "SPOT", (6.571 * 1.15, "≈")),
    ],
)
def test_prices(machine, gpu, count, strategy, expected):
    amount, sign = machines.price(MACHINES[machine], gpu, count, strategy)
    assert (pytest.approx(amount, abs=0.002), sign) == expected


# ── command line ────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def run(own_root, monkeypatch, tmp_path, capsys):
    """Runs the command in a project in europe-west4, as yet in no Google Cloud project; returns what it wrote."""
    document = yaml.safe_load((own_root / "project.yaml").read_text(encoding="utf-8"))
    document |= {"containers": {"registry": ""}}
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    for part in ("level_1_pipeline", "requirements", "src"):
        (tmp_path / part).symlink_to(ROOT / part)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **environment: str) -> tuple[str, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["gpu_jobs", *arguments])
        gpu_jobs.main()
        said = capsys.readouterr()
        return said.out, said.err

    return run


def rows(listed: str) -> dict[str, str]:
    """Job → its line."""
    return {line.split()[0]: line for line in listed.split("\n\n", maxsplit=1)[0].splitlines()}


def test_the_list_has_every_job_with_what_it_costs(run):
    listed, _ = run("--minutes", "30")
    found = rows(listed)
    assert set(found) == {"job", *JOBS}
    assert found["l4"].split() == [
        "l4",
        "g2-standard-8",
        "1",
        "×",
        "L4",
        "24",
        "GB",
        "STANDARD",
        "0.98",
        "0.49",
        "yes",
        "never",
    ]
    assert "2 × g2-standard-8  2 × L4" in found["l4-two-nodes"]
    assert "1.96" in found["l4-two-nodes"]
    assert "30 minutes" in found["job"]
    assert "in europe-west4" in found["job"]
    assert "they may have changed" in listed
    assert all(len(line) <= 130 for line in listed.splitlines())


def test_what_gcloud_wants_beside_the_file_is_told(run):
    """It stands on standard error: what is printed is the file."""
    printed, told = run(
        "l4", SET="cloud.environments.dev.project=lab-12345 hyperparameters.epochs=7"
    )
    words = re.search(r"--args='\^;\^(.*)'$", told, re.MULTILINE)
    train, rows, option, hyperparameters = words[1].split(";")
    assert (train, rows, option) == ("--train", "gs://BUCKET/train.parquet", "--hyperparameters")
    assert json.loads(hyperparameters)["epochs"] == 7
    assert "baseOutputDirectory: {outputUriPrefix: gs://BUCKET/FOLDER}" in told
    assert "args" not in printed


def test_the_list_says_what_the_region_does_not_offer(run):
    listed, _ = run(SET="cloud.region=europe-west9")
    offered = {name: line.split()[-2] for name, line in rows(listed).items()}
    assert offered["cpu"] == offered["h100-spot"] == "yes"
    assert offered["l4"] == offered["b200x8"] == "no"


def test_one_job_is_printed_as_gcloud_takes_it(run):
    printed, noted = run("h100-flex", SET="cloud.environments.dev.project=lab-12345")
    job, name = yaml.safe_load(printed), load_settings("").name
    assert "left out" not in noted
    assert job.pop("serviceAccount") == f"{name}-trainer@lab-12345.iam.gserviceaccount.com"
    image = job["workerPoolSpecs"][0]["containerSpec"].pop("imageUri")
    assert image.startswith(f"europe-west4-docker.pkg.dev/lab-12345/{name}/train:")
    assert job == gpu_jobs.resolve("h100-flex", ROOT, None, "")


def test_without_a_google_cloud_project_the_rest_is_printed(run):
    printed, noted = run("l4-two-nodes")
    assert yaml.safe_load(printed) == gpu_jobs.resolve("l4-two-nodes", ROOT, None, "")
    assert "&" not in printed  # no anchors
    assert noted.startswith("# ")
    assert "containerSpec.imageUri" in noted


def test_a_key_is_told_beside_the_job(run):
    printed, noted = run(
        "l4", SET="cloud.environments.dev.project=lab-12345 cloud.encryption=customer-managed"
    )
    assert "kms" not in printed
    assert "--kms-key=projects/lab-12345/locations/europe-west4/keyRings/" in noted


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["l5"], {}, "there is no GPU job 'l5'; near it are l4"),
        (
            ["l4"],
            {"ENVIRONMENT": "prod"},
            "cloud.environments.prod.project in project.yaml is empty",
        ),
        (["l4"], {"ENVIRONMENT": "test"}, "ENVIRONMENT=test"),
        (
            ["a100"],
            {"SET": "cloud.region=europe-west9 cloud.environments.dev.project=lab-12345"},
            "europe-west9",
        ),
        (["--minutes", "0"], {}, "MINUTES=0: how many?"),
        (["--minutes=-5"], {}, "MINUTES=-5: how many?"),
        (["--minutes", "nan"], {}, "MINUTES=nan: how many?"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_printed(run, capsys, arguments, environment, told):
    with pytest.raises(UserError) as refused:
        run(*arguments, **environment)
    assert told in str(refused.value)
    assert capsys.readouterr().out == ""


def test_a_mistake_ends_with_one_message_before_anything_of_googles_is_loaded():
    code = "import runpy, sys; sys.modules['google.cloud.aiplatform_v1'] = None; "
    code += "runpy.run_module('level_1_pipeline.vertex.gpu_jobs', run_name='__main__')"
    environment = {**os.environ, "SET": "cloud.train.jobs=[cpu]"}
    done = subprocess.run(
        [sys.executable, "-c", code, "l5"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no GPU job 'l5'")
    assert done.stdout == ""
