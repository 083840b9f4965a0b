"""GPU jobs, whatever is written into them: valid, or refused with the field's name; and what the real gcloud makes of them.

The same mutations are drawn each time. To look at others:

    .venv/bin/python -m pytest tests/test_gpu_jobs_any.py --hypothesis-profile=explore
"""

import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from core.errors import UserError
from gcp.environment import resolve_environment
from gcp.training_job import Request
from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from level_1_pipeline.vertex import gpu_jobs
from level_1_pipeline.vertex.job_checks import check
from level_1_pipeline.vertex.machines import GPUS, MACHINES
from level_2_cicd.rehearsal.vertex import FakeVertex
from project.settings import load_settings

PROJECT = Path(__file__).resolve().parents[1] / "{{cookiecutter.project_slug}}"
NAMES = gpu_jobs.names(PROJECT)
IMAGE = "registry/train@sha256:" + "0" * 64
JOBS = {name: gpu_jobs.resolve(name, PROJECT, None, IMAGE) for name in NAMES}
ACCELERATORS = [kind.name for kind in types.AcceleratorType]
STRATEGIES = [strategy.name for strategy in types.Scheduling.Strategy]


def test_each_gpu_answer_names_jobs_that_are_there(questions: dict[str, Any]) -> None:
    assert set(questions["_train_jobs"]) == set(questions["gpu"])
    for jobs in questions["_train_jobs"].values():
        assert set(jobs) <= set(NAMES)


def test_the_jobs_are_those_that_the_documentation_lists(root: Path) -> None:
    text = (root / "docs" / "gpu-jobs.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.MULTILINE)) == set(NAMES)


def test_the_documented_message_is_the_real_one(root: Path) -> None:
    job = copy.deepcopy(JOBS["l4"])
    job["workerPoolSpecs"][0]["machineSpec"]["acceleratorCount"] = 2
    with pytest.raises(UserError) as refused:
        check(job, "", "level_1_pipeline/gpu_jobs/l4x2.yaml")
    assert f"error: {refused.value}\n" in (root / "docs" / "gpu-jobs.md").read_text(
        encoding="utf-8"
    )


# ── any field ───────────────────────────────────────────────────────────────────────────────────────────────


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a job: of fields, of lists' elements, of what they hold."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [
        environment
        for key, content in inner
        for environment in ((*path, key), *paths(content, (*path, key)))
    ]


# What a person could write there, and what nobody would.
PLAUSIBLE = st.sampled_from(
    [
        *MACHINES,
        *ACCELERATORS,
        *STRATEGIES,
        *(
            -1,
            0,
            1,
            2,
            3,
            4,
            8,
            16,
            99,
            100,
            64_000,
            64_001,
            2**31,
            2**63,
            10**30,
            1.0,
            1.5,
            float("inf"),
            float("nan"),
        ),
        *(
            "0s",
            "1s",
            "1.5s",
            "3600s",
            "604800s",
            "604801s",
            "99999999999s",
            "-1s",
            "1e3s",
            "6h",
            "s",
            "",
        ),
        *("pd-ssd", "pd-standard", "hyperdisk-balanced", "pd-balanced", "SSD"),
        *(None, True, False, [], {}, [{}], [None], "1", "true", "\x00", "\ud800", "ü"),
    ]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=9) | st.integers(), inner, max_size=3)
    ),
    max_leaves=5,
)
TYPOS = ("drop", "double", "swap", "case", "snake")


def misspelt(word: str, typo: str, number: int) -> str:
    """The word with a slip of the finger."""
    at = number % max(len(word) - 1, 1)
    return {
        "drop": word[:at] + word[at + 1 :],
        "double": word[:at] + word[at : at + 1] + word[at:],
        "swap": word[:at] + word[at + 1 : at + 2] + word[at : at + 1] + word[at + 2 :],
        "case": word.swapcase(),
        "snake": re.sub("([A-Z])", r"_\1", word).lower(),
    }[typo]


def mutate(job: dict[str, Any], data: st.DataObject) -> str:
    """Change one place; returns the name of the field that it belongs to."""
    path = data.draw(st.sampled_from(paths(job)))
    *parents, last = path
    block: Any = job
    for part in parents:
        block = block[part]
    name = next(part for part in reversed(path) if isinstance(part, str))
    how = data.draw(
        st.sampled_from(("remove", "misspell", "replace", "replace", "anything", "add"))
    )
    if how == "remove":
        del block[last]
    elif how == "misspell" and isinstance(last, str):
        name = misspelt(last, data.draw(st.sampled_from(TYPOS)), data.draw(st.integers(0, 99)))
        block[name] = block.pop(last)
        name = "" if name == last else name
    elif how == "add" and isinstance(block, dict):
        name = data.draw(
            st.sampled_from(
                [
                    "acceleratorType",
                    "timeout",
                    "bootDiskType",
                    "tpuTopology",
                    "network",
                    "labels",
                    "machine",
                ]
            )
        )
        block[name] = data.draw(PLAUSIBLE)
    else:
        block[last] = data.draw(ANYTHING if how == "anything" else PLAUSIBLE)
    return name


def assert_valid(job: dict[str, Any]) -> None:
    """By the API's message, and by what the machines of the table take; written apart from the checks."""
    spec = types.CustomJobSpec(
        json_format.ParseDict(job, types.CustomJobSpec.pb(types.CustomJobSpec()))
    )
    pools, scheduling = spec.worker_pool_specs, spec.scheduling
    strategy = scheduling.strategy.name if scheduling.strategy else "STANDARD"
    assert strategy in {"STANDARD", "SPOT", "FLEX_START"}
    assert [pool.replica_count for pool in pools[:1]] == [1]
    assert len(pools) == 1 or (
        len(pools) == 2
        and pools[1].replica_count > 0
        and pools[0].machine_spec == pools[1].machine_spec
    )
    for pool in pools:
        machine = MACHINES[pool.machine_spec.machine_type]
        gpu = pool.machine_spec.accelerator_type
        if gpu:
            assert pool.machine_spec.accelerator_count in machine.gpus[gpu.name]
        else:
            assert not machine.built_in
            assert pool.machine_spec.accelerator_count == 0
        assert strategy in machine.strategies
        assert strategy != "FLEX_START" or GPUS[gpu.name].flex_start
        assert (pool.disk_spec.boot_disk_type or "pd-ssd") in machine.disks
        assert (
            pool.disk_spec.boot_disk_size_gb == 0
            or 100 <= pool.disk_spec.boot_disk_size_gb <= 64_000
        )
    seconds = scheduling.timeout.total_seconds() if "timeout" in scheduling else 1
    assert seconds > 0
    assert strategy != "FLEX_START" or seconds <= 7 * 24 * 3600
    assert strategy == "FLEX_START" or "max_wait_duration" not in scheduling


@settings(max_examples=3000, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(NAMES), data=st.data())
def test_any_mutation_is_valid_or_refused_with_the_fields_name(
    name: str, data: st.DataObject
) -> None:
    job = copy.deepcopy(JOBS[name])
    field = mutate(job, data)
    try:
        check(job, "", "mine")
    except UserError as error:
        event("refused")
        assert str(error).startswith("mine: ")
        assert field in str(error)
    else:
        event("valid")
        assert_valid(job)


@settings(max_examples=500)
@given(
    machine=st.sampled_from(list(MACHINES)),
    accelerator=st.sampled_from(ACCELERATORS[1:]),
    count=st.integers(0, 17),
)
def test_machine_gpu_and_count_are_refused_just_when_they_do_not_belong_together(
    machine: str, accelerator: str, count: int
) -> None:
    spec = {"machineType": machine, "acceleratorType": accelerator, "acceleratorCount": count}
    disk, strategy = MACHINES[machine].disks[0], MACHINES[machine].strategies[-1]
    strategy = strategy if accelerator in GPUS and GPUS[accelerator].flex_start else "SPOT"
    job = {
        "workerPoolSpecs": [
            {"machineSpec": spec, "replicaCount": 1, "diskSpec": {"bootDiskType": disk}}
        ],
        "scheduling": {"strategy": strategy},
    }
    if count in MACHINES[machine].gpus.get(accelerator, ()):
        check(job, "", "mine")
    else:
        with pytest.raises(UserError, match=f"machineType {machine} takes "):
            check(job, "", "mine")


WORDS = st.sampled_from(
    [
        "workerPoolSpecs",
        "scheduling",
        ":",
        "- ",
        "\n",
        "\n  ",
        "{",
        "}",
        "[",
        "]",
        "&a ",
        "*a",
        "<<",
        "!!python/object:os.system ",
    ]
)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.lists(WORDS | st.text(max_size=5), max_size=12).map("".join) | st.binary(max_size=40)
)
def test_any_file_is_taken_or_refused_with_its_name(content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / gpu_jobs.FOLDER / "mine.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )
    with pytest.raises(
        UserError, match=r"level_1_pipeline/gpu_jobs/mine\.yaml"
    ):  # nothing so short is a job
        gpu_jobs.resolve("mine", tmp_path, None, "")


# ── what gcloud sends ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def gcloud_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of no content; gcloud keeps what it works out at its first start there."""
    if shutil.which("gcloud") is None:
        (pytest.fail if os.environ.get("REQUIRE_DOCKER") else pytest.skip)("this test needs gcloud")
    return tmp_path_factory.mktemp("gcloud")


@pytest.mark.heavy
@pytest.mark.parametrize("name", NAMES)
def test_gcloud_sends_what_is_resolved(
    name: str,
    default_project: Path,
    gcloud_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file is what `make gpu-job JOB=NAME` prints."""
    monkeypatch.chdir(default_project)
    monkeypatch.delenv("ENVIRONMENT", raising=False)
    settings = load_settings("cloud.region=europe-west4 cloud.environments.dev.project=lab-12345")
    printed = gpu_jobs.show(name, settings, default_project)
    received = send_with_gcloud(printed, gcloud_config, tmp_path)
    image = re.search(r"imageUri: (\S+)", printed)
    assert image
    resolved = gpu_jobs.resolve(name, default_project, resolve_environment(settings), image[1])
    sent = types.CustomJobSpec(
        json_format.ParseDict(
            json.loads(json.dumps(resolved)), types.CustomJobSpec.pb(types.CustomJobSpec())
        )
    )
    assert received.job_spec == sent
    assert sent.service_account == "digit-reader-trainer@lab-12345.iam.gserviceaccount.com"


def send_with_gcloud(printed: str, gcloud_config: Path, tmp_path: Path, *options: str) -> Any:
    """The custom job that a server receives from gcloud, which is given this file."""
    config = tmp_path / "job.yaml"
    config.write_text(printed, encoding="utf-8")
    with FakeVertex() as vertex:
        environment = {
            **os.environ,
            "CLOUDSDK_CONFIG": str(gcloud_config),
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_CORE_PROJECT": "lab-12345",
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": f"{vertex.address}/",
        }
        command = [
            "gcloud",
            "ai",
            "custom-jobs",
            "create",
            f"--config={config}",
            "--region=europe-west4",
            "--display-name=try",
        ]
        done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        [received] = vertex.calls("customJobs.create")
    return received


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["l4-spot", "l4-two-nodes"])
def test_gcloud_with_the_arguments_that_are_told_sends_what_the_train_step_sends(
    name: str,
    default_project: Path,
    gcloud_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(default_project)
    monkeypatch.delenv("ENVIRONMENT", raising=False)
    settings = load_settings("cloud.region=europe-west4 cloud.environments.dev.project=lab-12345")
    printed = gpu_jobs.show(name, settings, default_project)
    told = re.search(r"--args='(.*)'$", capsys.readouterr().err, re.MULTILINE)
    assert told
    arguments = f"--args={told[1]}"
    printed += "baseOutputDirectory:\n  outputUriPrefix: gs://bucket/run\n"
    received = send_with_gcloud(printed, gcloud_config, tmp_path, arguments)

    args = [
        "--train",
        "gs://BUCKET/train.parquet",
        "--hyperparameters",
        settings.hyperparameters.to_json(),
    ]
    request = Request(
        f"{resolve_environment(settings).parent}/runs/by-hand",
        [yaml.safe_load(printed)],
        args,
        "gs://bucket/run/model",
    )
    (sent,) = request.messages()
    assert received.job_spec == sent.job_spec
    assert (
        len({tuple(pool.container_spec.args) for pool in received.job_spec.worker_pool_specs}) == 1
    )
