"""Publish, test and release a pipeline after its images are built; all steps are idempotent.

python -m level_2_cicd.release publish   make publish: the pipeline with image digests; not active
python -m level_2_cicd.release test      make functional-test: a short run that registers no model
python -m level_2_cicd.release release   make release: activate the pipeline, start a run if needed
"""

import argparse
import hashlib
import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from core import manifest
from core.errors import UserError, run_command
from core.paths import PROJECT_FILE, project_root
from core.registry import MANUAL
from gcp import client as api
from gcp import (
    deployment,
    pipeline_run,
    pipeline_template,
    pipeline_version,
    storage,
)
from gcp.environment import Environment, resolve_environment
from gcp.model_registry import open_registry
from gcp.pipeline_run import RunRequest
from gcp.pipeline_version import PipelineVersion
from level_1_pipeline.vertex import gpu_jobs, machines
from level_1_pipeline.vertex import train as vertex_train
from level_2_cicd import builds, submit_build
from level_2_cicd import request as run_request
from level_2_cicd.kfp_compile_container import main as kfp_compile
from project.settings import Settings, load_settings

PUBLICATION = Path("build/publication.json")
BEGAN = Path("build/began")  # start of the build, written by its first step (toolbox.sh)
TEST_EPOCHS = 2
TEST_JOB = "cpu"  # if all jobs of project.yaml may wait long for a machine
MAX_ATTEMPTS = 100  # of one functional test or one push, over all builds
RETRIED = {"FAILED", "CANCELLED"}  # states of a run that allow another attempt
POLL = 10.0  # seconds


# ── identity of a push ────────────────────────────────────────────────────────────────────────
# Inputs, not git commits, identify a push: the compiled pipeline with its images' digests, the
# parameters and the data. Unchanged inputs give the same event, and one event starts one run.
def hash_inputs(inputs: PipelineVersion) -> str:
    """Return a hash of the pipeline and its parameters, without the data."""
    # Exclude the server image: a new one serves the champion without another training.
    serving = {key: value for key, value in inputs.values["serving"].items() if key != "image"}
    document = [inputs.spec, {**inputs.values, "serving": serving}]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def data_version(csv: str) -> str:
    """Return the data's URI with its generation: gs://…#GENERATION."""
    # The generation changes with every upload, so new data at the same URI is a new event.
    generation = storage.generation(csv)
    if generation is None:
        raise UserError(f"no data at {csv}. Upload it, or set data.source in {PROJECT_FILE}.")
    return f"{csv}#{generation}"


def push_event_id(inputs: PipelineVersion) -> str:
    """Return the deduplication key of a push."""
    return f"push {hash_inputs(inputs)} {data_version(inputs.values['csv'])}"


# ── publish ───────────────────────────────────────────────────────────────────────────────────
def publish(settings: Settings, environment: Environment) -> dict[str, Any]:
    """Publish the pipeline unless only the commit changed; return version, commit and start."""
    csv = settings.data.source
    if not csv.startswith("gs://"):
        csv = vertex_train.upload_data(environment, vertex_train.source_csv(settings))
    commit = kfp_compile.version_of_code(submit_build.commit(), needed=True)
    compiled = kfp_compile.make(settings, environment, builds.read_digests(), csv, commit)
    # The start of the build orders the releases of parallel builds; see is_later.
    if BEGAN.is_file():
        began = BEGAN.read_text(encoding="utf-8").strip()
    else:
        began = datetime.now(UTC).isoformat(timespec="seconds")
    current = pipeline_version.read_current(environment)
    if current:
        inputs = read_version(environment, current["version"])
        values, _ = pipeline_template.read_parameters(compiled.values.decode())
        if yaml.safe_load(compiled.pipeline) == inputs.spec and values == inputs.values:
            return {**current, "began": began}
    # A rehearsal uses its own registry.
    templates = os.environ.get("TEMPLATE_REGISTRY") or environment.templates
    result = kfp_compile.publish(compiled, environment, templates, commit)
    return {**result, "commit": commit, "began": began}


def read_version(environment: Environment, version: str) -> PipelineVersion:
    """Read a published version."""
    return pipeline_version.read(pipeline_version.templates_folder(environment), version)


def read_publication(environment: Environment) -> tuple[dict[str, Any], PipelineVersion]:
    """Return the content of build/publication.json and the version that it names."""
    if not PUBLICATION.is_file():
        raise UserError(f"{PUBLICATION} not found. Run first: make images publish")
    publication = pipeline_template.read_json(str(PUBLICATION), str(PUBLICATION))
    return publication, read_version(environment, publication["version"])


# ── functional test ───────────────────────────────────────────────────────────────────────────
def resolve_test_jobs(
    settings: Settings, environment: Environment, image: str
) -> dict[str, dict[str, Any]]:
    """Return the jobs of the functional test by name, without jobs of strategy FLEX_START.

    JOB_SPEC names one or several jobs; the default is the jobs of project.yaml.
    """
    request = os.environ.get("JOB_SPEC", "").split()
    root = project_root()
    jobs = {
        name: gpu_jobs.resolve(name, root, environment, image)
        for name in request or settings.cloud.train.jobs
    }
    # FLEX_START may wait a day for a machine, longer than a build can run.
    waiting = [
        name
        for name, job in jobs.items()
        if job.get("scheduling", {}).get("strategy") == machines.FLEX_START
    ]
    if request and waiting:
        raise UserError(
            f"JOB_SPEC: {', '.join(waiting)} may wait a day for a machine, which a build cannot. "
            "Name another job."
        )
    return {name: job for name, job in jobs.items() if name not in waiting} or {
        TEST_JOB: gpu_jobs.resolve(TEST_JOB, root, environment, image)
    }


def test(settings: Settings, environment: Environment) -> str:
    """Run the published pipeline up to the gate with few epochs; return a summary.

    A run of the same inputs that is running or has succeeded is resumed, not repeated.
    """
    _, inputs = read_publication(environment)
    image = inputs.values["jobs"][0]["workerPoolSpecs"][0]["containerSpec"]["imageUri"]
    jobs = resolve_test_jobs(settings, environment, image)
    hyperparameters = dict(inputs.values["hyperparameters"])
    hyperparameters["epochs"] = min(TEST_EPOCHS, int(hyperparameters["epochs"]))
    # `register: False` closes the gate: the test must not register a model.
    changes = {"hyperparameters": hyperparameters, "jobs": list(jobs.values()), "register": False}
    version = data_version(inputs.values["csv"])
    event = f"functional test {hash_inputs(inputs)} {version} {' '.join(jobs)}"
    run = start_test(inputs, {**inputs.values, **changes}, event, environment)
    print(f"functional test: {'started' if run.new else 'resumed'} {run.link}", flush=True)
    status = pipeline_run.follow(run.name, float(os.environ.get("POLL") or POLL))
    pipeline_run.require_success(status)
    require_tested(inputs.spec, status)
    reason = status.facts.get(("gate", "decision"), {}).get("reason", "no reason given")
    return f"the functional test succeeded. Gate: {reason}"


def start_test(
    inputs: PipelineVersion, values: Mapping[str, Any], event: str, environment: Environment
) -> pipeline_run.SubmittedRun:
    """Start the functional test, or return an earlier build's run that has not failed."""
    name = f"{environment.name} functional test"
    labels = {**inputs.labels, "purpose": "functional-test"}
    # The run's ID follows from event and attempt, so a repeated submission finds the same run.
    for attempt in range(1, MAX_ATTEMPTS + 1):
        submission = RunRequest(inputs.spec, values, event, inputs.address, attempt, name, labels)
        run = pipeline_run.submit(
            pipeline_run.request(submission, pipeline_run.target_of(environment))
        )
        if run.new or pipeline_run.look(run.name).state not in RETRIED:
            return run
    raise UserError(f"{MAX_ATTEMPTS} attempts of this functional test failed: fix and push again.")


def require_tested(spec: Mapping[str, Any], status: pipeline_run.RunStatus) -> None:
    """Fail unless exactly the steps before the gate ran."""
    tasks = spec["root"]["dag"]["tasks"]
    before = [name for name in pipeline_template.steps(spec) if name in tasks]
    states = {step.name: step.state for step in status.steps}
    missing = [name for name in before if states.get(name) != "succeeded"]
    if missing:
        raise UserError(f"the functional test ended without running {', '.join(missing)}.")
    # A step behind the gate registers or deploys a model, which a test must not do.
    behind = [name for name in states if name not in before]
    if behind or status.facts.get(("gate", "decision"), {}).get("passed") is True:
        reason = f"{', '.join(behind)} ran" if behind else "its gate was open"
        raise UserError(
            f"the functional test must register nothing, but {reason}: see gate in "
            "level_1_pipeline/pipeline.py."
        )


# ── release ───────────────────────────────────────────────────────────────────────────────────
def release(environment: Environment) -> str:
    """Activate the published pipeline, request a missing run, redeploy on a new server image."""
    publication, inputs = read_publication(environment)
    current = pipeline_version.read_current(environment)
    # Record before the check for a later build: the images passed even if not activated here.
    builds.record_passed(builds.read_digests(), environment)
    if not pipeline_version.is_later(publication, current):
        return describe_later_build(current)
    actions = []
    event = push_event_id(inputs)
    is_current = current is not None and current["version"] == publication["version"]
    attempt = next_attempt(inputs, event, environment)
    # The request names its version and comes before the activation: a release interrupted in
    # between sends the same request again, which starts no second run.
    if attempt:
        message = run_request.compose(event, version=inputs.version, actor="build", attempt=attempt)
        run_request.publish(environment, message)
        retry = f", attempt {attempt}: the previous one failed" if attempt > 1 else ""
        actions.append(f"requested a run{retry}")
    else:
        if not is_current:
            link = run_of(inputs, event, environment).link
            actions.append(f"these inputs were trained before: {link}")
        # A champion made by this push's run still has the server image of that run's start.
        if has_new_server(inputs, current, environment) or made_champion(
            inputs, event, environment
        ):
            actions += redeploy_champion(inputs, environment)
    # Another build may have activated a later version since the check above.
    if not pipeline_version.write_current(environment, publication):
        actions.append(describe_later_build(pipeline_version.read_current(environment)))
    elif not is_current:
        actions.append(f"version {publication['version']} is current")
    return "; ".join(actions) or "nothing changed: nothing to start"


def describe_later_build(current: Mapping[str, Any] | None) -> str:
    """Return the message for a version that is not activated because a later build is current."""
    later = current or {}
    return (
        f"commit {later.get('commit')}, whose build began later ({later.get('began')}), is current "
        "and stays. To release this one anyway, push again or run: make images publish release"
    )


def redeploy_champion(inputs: PipelineVersion, environment: Environment) -> list[str]:
    """Serve the champion with the current server image; return what was done."""
    outcome = deployment.redeploy(environment.registry, inputs.values["serving"])
    if outcome is None:
        return []
    if outcome["problem"]:
        raise UserError(
            f"the champion keeps its server image: {outcome['problem']}. Run the same command "
            "again, or push again."
        )
    return [f"the champion is served by the new server image, as version {outcome['version']}"]


def run_of(
    inputs: PipelineVersion, event: str, environment: Environment, attempt: int = 1
) -> pipeline_run.SubmittedRun:
    """Return the run of an event without checking that it exists."""
    # The ID is derived from pipeline, event and attempt, so no lookup is needed.
    identity = RunRequest(inputs.spec, {}, event, attempt=attempt).identity
    return pipeline_run.SubmittedRun(f"{environment.parent}/pipelineJobs/{identity}", new=False)


def next_attempt(inputs: PipelineVersion, event: str, environment: Environment) -> int:
    """Return the number of the attempt to start; 0 if one is running or has succeeded."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            run = run_of(inputs, event, environment, attempt)
            state = pipeline_run.look(run.name).state
        except api.ApiError as error:
            if error.code == 404:
                return attempt
            raise
        if state not in RETRIED:
            return 0
    raise UserError(f"{MAX_ATTEMPTS} runs of this push failed: fix and push again.")


def made_champion(inputs: PipelineVersion, event: str, environment: Environment) -> bool:
    """Return whether a run of this event made the champion; False after a manual change."""
    registry = open_registry(environment.registry)
    change = registry.last_change()
    if change is None or change["reason"].startswith(MANUAL):
        return False
    origin = deployment.origin(registry.version(change["version"]).run)
    # Later attempts have the ID of the first with the suffix -aN.
    identity = run_of(inputs, event, environment).name.rpartition("/")[2]
    return re.fullmatch(rf"{re.escape(identity)}(-a\d+)?", origin) is not None


def has_new_server(
    inputs: PipelineVersion, current: Mapping[str, Any] | None, environment: Environment
) -> bool:
    """Return whether the server image differs from the current version's."""
    if current is None:
        return True
    serving = read_version(environment, current["version"]).values["serving"]
    return bool(serving["image"] != inputs.values["serving"]["image"])


# ── command line ──────────────────────────────────────────────────────────────────────────────
def main() -> None:
    """Run one release step."""
    parser = argparse.ArgumentParser(
        prog="python -m level_2_cicd.release", description="Release steps of a push."
    )
    parser.add_argument("step", choices=["publish", "test", "release"])
    step = parser.parse_args().step
    settings = load_settings()
    environment = resolve_environment(settings)
    submit_build.require_level_2(environment)
    if step == "publish":
        publication = publish(settings, environment)
        PUBLICATION.parent.mkdir(exist_ok=True)
        manifest.write_json(PUBLICATION, publication)
        print(json.dumps(publication))
    else:
        print(test(settings, environment) if step == "test" else release(environment))


if __name__ == "__main__":
    run_command(main)
