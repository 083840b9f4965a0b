"""A run of a published pipeline: what is received, and what is refused before anything is sent. The server is a double."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from core.errors import UserError
from core.paths import project_root
from gcp import client as api
from gcp import pipeline_run, pipeline_template
from gcp.environment import resolve_environment
from gcp.storage import write
from level_1_pipeline import compile as pipeline_compiler
from level_1_pipeline import parameters
from level_1_pipeline.vertex import gpu_jobs
from level_2_cicd.kfp_run_container import main as kfp_run
from level_2_cicd.rehearsal.kfp_templates import FakeTemplateRegistry
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex
from project.settings import load_settings

IMAGES = {name: f"example.com/{name}@sha256:{'a' * 64}" for name in parameters.STEP_IMAGES}
VALUES = {
    "csv": "gs://rows/rows.csv",
    "label": "digit",
    "ignore": [],
    "categorical": ["post code"],
    "test_fraction": 0.2,
    "split_seed": 0,
    "hyperparameters": {"epochs": 3, "learning_rate": 0.01},
    "jobs": [{"workerPoolSpecs": []}],
    "metric": "accuracy",
    "threshold": 0.9,
    "max_regression": 0,
    "registry": "gs://storage/registry",
    "serving": {"machine": "n2-standard-2"},
}
TARGET = [
    "--project",
    "my-project",
    "--region",
    "europe-west4",
    "--pipeline-root",
    "gs://root/runs",
]
EVENT = "rows/new.csv#17 finalized by Ünal"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The pipeline, compiled for the cloud."""
    path = tmp_path_factory.mktemp("template") / "pipeline.yaml"
    pipeline_compiler.compile_for_cloud(IMAGES, path)
    return path


@pytest.fixture
def vertex(monkeypatch):
    """A double of Vertex AI."""
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    with FakeVertex() as vertex:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", vertex.address)
        yield vertex


@pytest.fixture
def submit(template, monkeypatch):
    """The command; options that are not given have values that fit."""

    def submit(
        *options: str, template: object = template, event: str = EVENT, values: dict | None = None
    ) -> None:
        given = ["--parameters", json.dumps(VALUES if values is None else values), "--event", event]
        monkeypatch.setattr(
            sys, "argv", ["kfp_submit", "--template", str(template), *given, *TARGET, *options]
        )
        kfp_run.main()

    return submit


def test_what_is_received_is_what_was_asked_for(vertex, submit, template, capsys):
    account, key = (
        "r@my-project.iam.gserviceaccount.com",
        "projects/p/locations/l/keyRings/r/cryptoKeys/k",
    )
    options = [
        "--service-account",
        account,
        "--key",
        key,
        "--labels",
        "commit=1A2b",
        "--labels",
        "Actor=me@example.com",
    ]
    submit(*options, "--name", "digit-reader")
    (job,) = vertex.calls("pipelineJobs.create")
    identity = job.name.split("/")[-1]
    assert identity.startswith("train-and-register-")
    assert job.display_name == "digit-reader"
    assert job.service_account == account
    assert job.encryption_spec.kms_key_name == key
    assert job.runtime_config.gcs_output_directory == "gs://root/runs"
    assert {
        "commit": "1a2b",
        "actor": "me-example-com",
        "event": "rows-new-csv-17-finalized-by-nal",
    }.items() <= dict(job.labels).items()
    received = json.loads(type(job).to_json(job))
    assert received["runtimeConfig"]["parameterValues"] == {**VALUES, "run": identity}
    tasks = pipeline_template.tasks(received["pipelineSpec"])
    assert {task["cachingOptions"]["enableCache"] for task in tasks} == {False}
    sent = received["pipelineSpec"]["deploymentSpec"]["executors"]
    compiled = yaml.safe_load(template.read_text())["deploymentSpec"]["executors"]
    assert {name: it["container"] for name, it in sent.items()} == {
        name: it["container"] for name, it in compiled.items()
    }
    assert {it["container"]["image"] for it in sent.values()} == set(IMAGES.values())
    assert capsys.readouterr().out == (
        f"started {identity}: https://console.cloud.google.com/vertex-ai/locations/europe-west4/pipelines/runs/{identity}"
        "?project=my-project\n"
    )


def test_caching_is_switched_on_by_asking_for_it(vertex, submit):
    submit("--cache")
    (job,) = vertex.calls("pipelineJobs.create")
    tasks = pipeline_template.tasks(json.loads(type(job).to_json(job))["pipelineSpec"])
    assert {task["cachingOptions"]["enableCache"] for task in tasks} == {True}


def test_the_same_event_starts_one_run_another_attempt_or_event_another(vertex, submit, capsys):
    submit()
    submit()
    told = capsys.readouterr().out.splitlines()
    assert told[1] == told[0].replace("started", "already started")
    submit("--attempt", "2")
    submit(event="something else")
    identities = [job.name.split("/")[-1] for job in vertex.calls("pipelineJobs.create")]
    assert len(set(identities)) == len(identities) == 3
    assert identities[1] == f"{identities[0]}-a2"


def test_an_event_that_comes_late_with_other_parameters_is_a_success_with_a_note(
    vertex, submit, capsys
):
    """The pipeline may have been published anew since its event was first told."""
    submit()
    first = capsys.readouterr()
    submit("--set", "threshold=0.5", "--name", "anything")
    told = capsys.readouterr()
    assert len(vertex.calls("pipelineJobs.create")) == 1
    assert told.out == first.out.replace("started", "already started")
    assert re.fullmatch(
        r"note: it was started with another template or other parameters.*--attempt 2\.\n", told.err
    )
    assert first.err == ""


def test_what_was_published_beside_the_parameters_labels_the_run(vertex, submit, tmp_path):
    path = tmp_path / "parameters.json"
    path.write_text(
        json.dumps({"labels": {"commit": "1A2b", "source": "main"}, "parameters": VALUES})
    )
    submit("--parameters", str(path), "--labels", "source=mine")
    (job,) = vertex.calls("pipelineJobs.create")
    assert (job.labels["commit"], job.labels["source"]) == ("1a2b", "mine")
    assert (
        json.loads(type(job).to_json(job))["runtimeConfig"]["parameterValues"]["csv"]
        == VALUES["csv"]
    )


def test_many_at_once_start_one_run(vertex, template):
    asked = pipeline_run.RunRequest(pipeline_template.read(str(template)), VALUES, EVENT)
    sent = pipeline_run.request(
        asked, pipeline_run.Target("my-project", "europe-west4", "gs://root")
    )
    with ThreadPoolExecutor(25) as pool:
        started = list(pool.map(lambda _: pipeline_run.submit(sent), range(100)))
    assert len(vertex.calls("pipelineJobs.create")) == 1
    assert [it.new for it in started].count(True) == 1
    assert len({it.name for it in started}) == 1


WRONG = [
    ({"treshold": 0.9}, ["treshold: unknown parameter; did you mean 'threshold'?"]),
    ({"colour": 1}, ["colour: unknown parameter; known: categorical, csv, "]),
    ({"csv": None}, ["csv: expected text; got null."]),
    ({"split_seed": 3.5}, ["split_seed: expected an integer; got 3.5."]),
    ({"split_seed": True}, ["split_seed: expected an integer; got true."]),
    ({"threshold": "0.9"}, ['threshold: expected a number; got "0.9".']),
    ({"ignore": "id"}, ['ignore: expected a list, such as [1, 2]; got "id".']),
    (
        {"hyperparameters": [], "jobs": {}},
        ["hyperparameters: expected a mapping", "jobs: expected a list"],
    ),
]


@pytest.mark.parametrize(
    ("change", "told"), WRONG, ids=[", ".join(map(str, change.items())) for change, _ in WRONG]
)
def test_a_parameter_that_does_not_fit_is_told_before_anything_is_sent(
    vertex, submit, change, told
):
    with pytest.raises(UserError) as caught:
        submit(values={**VALUES, **change})
    assert all(text in str(caught.value) for text in told)
    assert "nothing was sent" in str(caught.value)
    assert vertex.received == []


def test_all_that_is_missing_is_told_at_once(vertex, submit):
    with pytest.raises(UserError) as caught:
        submit(
            values={name: value for name, value in VALUES.items() if name not in ("csv", "jobs")}
        )
    assert "csv: missing; expected text." in str(caught.value)
    assert "jobs: missing; expected a list" in str(caught.value)
    assert vertex.received == []


def test_single_parameters_are_set_over_the_others(vertex, submit):
    submit(
        "--set",
        "csv=gs://a/b=c.csv",
        "--set",
        "hyperparameters.epochs=5",
        "--set",
        "ignore=[1]",
        "--set",
        "run=mine",
    )
    values = json.loads(type(job := vertex.calls("pipelineJobs.create")[0]).to_json(job))[
        "runtimeConfig"
    ]["parameterValues"]
    changed = {"csv": "gs://a/b=c.csv", "ignore": [1], "run": "mine"}
    assert values == {**VALUES, **changed, "hyperparameters": {"epochs": 5, "learning_rate": 0.01}}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", "threshold"], "expected KEY=VALUE"),
        (["--set", "threshold=high"], "the value is not valid JSON"),
        (["--set", "threshold=NaN"], "the value is not valid JSON"),
        (["--set", "csv.x=1"], "'csv' is not a mapping"),
        (["--labels", "commit"], "--labels commit: expected KEY=VALUE"),
        (["--region", "Europe"], "--region 'Europe': expected a region"),
        (
            ["--pipeline-root", "root/runs"],
            "--pipeline-root 'root/runs': expected a folder",
        ),
        (["--key", "mine"], "--key 'mine': expected projects/"),
        (
            ["--parameters", "nowhere.json"],
            "--parameters nowhere.json: cannot be read: No such file",
        ),
        (
            ["--parameters", "{"],
            "--parameters: expected JSON, or a file or gs:// address with JSON",
        ),
        (["--parameters", "[]"], "--parameters: expected a JSON object"),
        (["--template", "nowhere.json"], "--template nowhere.json: cannot be read: No such file"),
        (["--template", "project.yaml"], "project.yaml is not a compiled pipeline"),
        (["--event", " "], "--event ' ': expected text"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_sent(vertex, submit, options, told):
    with pytest.raises(UserError) as caught:
        submit(*options)
    assert told in str(caught.value)
    assert vertex.received == []


@pytest.mark.parametrize("attempt", ["0", "-1", "two"])
def test_an_attempt_that_is_none_is_told_in_words(vertex, submit, capsys, attempt):
    with pytest.raises(SystemExit) as ended:
        submit(f"--attempt={attempt}")
    assert ended.value.code == 2
    assert f"argument --attempt: expected 1, 2, 3 …; got '{attempt}'\n" in capsys.readouterr().err
    assert vertex.received == []


def test_a_dry_run_prints_what_a_run_sends_and_sends_nothing(vertex, submit, capsys):
    submit("--dry-run")
    shown = json.loads(capsys.readouterr().out)
    assert vertex.received == []
    submit()
    (job,) = vertex.calls("pipelineJobs.create")
    received = json.loads(type(job).to_json(job, always_print_fields_with_no_presence=False))
    assert shown["pipelineJobId"] == job.name.split("/")[-1]
    assert {key: received[key] for key in shown["pipelineJob"]} == shown["pipelineJob"]


@pytest.mark.parametrize(
    "fault",
    [{"status": 503}, {"status": 503, "done": True}, {"status": 0, "done": True}, {"status": 429}],
)
def test_a_lost_request_or_answer_neither_loses_nor_doubles_the_run(vertex, submit, capsys, fault):
    vertex.fail("pipelineJobs.create", **fault)
    submit()
    assert len(vertex.calls("pipelineJobs.create")) == 1
    assert "started" in capsys.readouterr().out


def test_a_refusal_says_what_to_do(vertex, submit):
    vertex.fail(
        "pipelineJobs.create", status=403, message="iam.serviceAccounts.actAs permission denied"
    )
    with pytest.raises(
        UserError, match=r"starting the run failed: .*actAs.* add-iam-policy-binding"
    ):
        submit()


def test_a_followed_run_tells_its_steps_and_ends_as_it_ends(vertex, submit, capsys):
    submit("--wait", "--poll", "0")
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in told[1:-1]] == [
        "preprocess",
        "vertex-train",
        "evaluate",
        "gate",
        "register",
    ]
    assert told[-1] == "succeeded"
    vertex.set_outcome(state="FAILED", message="row 3 is wrong")
    with pytest.raises(UserError, match=r"the run failed: step 'vertex-train': row 3 is wrong"):
        submit("--wait", "--poll", "0", event="another")
    assert "✗ vertex-train" in capsys.readouterr().out


def test_an_outage_while_a_run_is_followed_is_survived(vertex, submit, monkeypatch):
    submit()
    monkeypatch.setattr(api, "RETRY_TIMEOUT", 0.001)  # another call's patience would end at once
    vertex.fail("pipelineJobs.get", times=5)
    assert pipeline_run.follow(vertex.calls("pipelineJobs.create")[0].name, 0).state == "SUCCEEDED"


@pytest.mark.parametrize(
    ("options", "told"), [((), "the run goes on"), (("--cancel-on-exit",), "the run is cancelled")]
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_while_the_run_is_being_started(
    vertex, submit, monkeypatch, capsys, number, options, told
):
    """The double sends the signal while this process waits for its answer."""
    carry_out, before = vertex.handle, signal.getsignal(number)

    def handle(asked):
        if asked.method == "POST" and asked.path.endswith("/pipelineJobs"):
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        return carry_out(asked)

    monkeypatch.setattr(vertex, "handle", handle)
    with pytest.raises(SystemExit) as ended:
        submit("--wait", "--poll", "0", *options)
    assert ended.value.code == 128 + number
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("started train-and-register-")
    assert out[1] == f"stopped; {told}"
    assert len(vertex.calls("pipelineJobs.create")) == 1
    assert len(vertex.calls("pipelineJobs.cancel")) == len(options)
    assert signal.getsignal(number) is before


def test_stopped_where_no_run_could_be_started(vertex, submit, monkeypatch, capsys):
    carry_out = vertex.handle

    def handle(asked):
        vertex.fail("pipelineJobs.create", status=403)
        os.kill(os.getpid(), signal.SIGTERM)
        return carry_out(asked)

    monkeypatch.setattr(vertex, "handle", handle)
    with pytest.raises(SystemExit):
        submit("--wait", "--cancel-on-exit")
    assert capsys.readouterr().out == "stopped; no run is active\n"


@pytest.mark.parametrize("code", [400, 404, 409])
def test_what_has_ended_or_is_not_there_need_not_be_cancelled(vertex, code):
    vertex.fail("pipelineJobs.cancel", status=code)
    assert not pipeline_run.cancel_run("projects/my-project/locations/europe-west4/pipelineJobs/x")


def test_what_steps_wrote_about_their_outputs_is_seen(vertex, submit):
    decision = {"passed": True, "reason": "0.97 is enough"}
    vertex.task_outputs = {"gate": {"decision": decision}, "register": {"version": {"version": 4}}}
    submit("--wait", "--poll", "0")
    seen = pipeline_run.look(vertex.calls("pipelineJobs.create")[0].name)
    assert seen.facts == {
        ("gate", "decision"): decision,
        ("register", "version"): {"version": 4},
    }


def test_a_template_is_read_from_a_bucket_and_from_a_registry(
    vertex, submit, template, tmp_path, monkeypatch
):
    text = template.read_text()
    with FakeStorage(tmp_path) as storage, FakeTemplateRegistry() as templates:
        (tmp_path / "bucket").mkdir()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.address)
        write("gs://bucket/t/pipeline.json", json.dumps(yaml.safe_load(text)).encode())
        write("gs://bucket/t/parameters.json", json.dumps(VALUES).encode())
        submit(
            "--parameters",
            "gs://bucket/t/parameters.json",
            template="gs://bucket/t/pipeline.json",
            event="bucket",
        )
        at = f"{templates.address}/my-project/repository"
        pipeline_template.ask_registry(
            "POST", at, "uploading", data={"tags": "v1"}, files={"content": ("p.yaml", text)}
        )
        templates.fail("templates.download", status=503)
        submit(template=f"{at}/train-and-register/v1", event="registry")
    submit(event="file")
    jobs = [json.loads(type(job).to_json(job)) for job in vertex.calls("pipelineJobs.create")]
    assert len(jobs) == 3
    assert jobs[0]["pipelineSpec"] == jobs[1]["pipelineSpec"] == jobs[2]["pipelineSpec"]


def test_a_mistake_is_told_without_loading_googles_packages(template):
    heavy = (
        "google.api_core",
        "google.auth",
        "google.cloud.",
        "google.protobuf",
        "kfp",
        "pydantic",
    )
    code = (
        "import sys; from level_2_cicd.kfp_run_container import main; from core.errors import UserError\n"
        "try: main.main()\n"
        "except UserError as error: print(error)\n"
        f"print([name for name in sys.modules if name.startswith({heavy})])"
    )
    options = [
        "--template",
        str(template),
        "--parameters",
        '{"treshold": 1}',
        "--event",
        "e",
        *TARGET,
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ.copy(),
    )
    assert "did you mean 'threshold'" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_environments_runs_take_place_in_its_network_with_its_key(template):
    changes = "cloud.private=true cloud.encryption=customer-managed cloud.environments.dev.project=my-project"
    where = resolve_environment(load_settings(changes), "dev")
    target = pipeline_run.target_of(where)
    assert (target.network_attachment, target.key) == (where.network_attachment, where.key)
    assert (
        target.network_attachment
        == f"projects/my-project/regions/{where.region}/networkAttachments/{where.name}"
    )
    asked = pipeline_run.RunRequest(pipeline_template.read(str(template)), VALUES, EVENT)
    sent = pipeline_run.request(asked, target)["pipelineJob"]
    assert sent["pscInterfaceConfig"] == {"networkAttachment": target.network_attachment}
    assert sent["encryptionSpec"] == {"kmsKeyName": where.key}
    plain = pipeline_run.request(
        asked, pipeline_run.Target("my-project", "europe-west4", "gs://root")
    )["pipelineJob"]
    assert not {"pscInterfaceConfig", "encryptionSpec"} & plain.keys()


def test_jobs_reach_into_the_network_too():
    where = resolve_environment(
        load_settings(
            "cloud.private=true cloud.environments.dev.project=my-project cloud.region=europe-west4"
        ),
        "dev",
    )
    job = gpu_jobs.resolve("cpu", project_root(), where, "example.com/train")
    assert job["pscInterfaceConfig"] == {"networkAttachment": where.network_attachment}
    assert "pscInterfaceConfig" not in gpu_jobs.resolve(
        "cpu", project_root(), None, "example.com/train"
    )
