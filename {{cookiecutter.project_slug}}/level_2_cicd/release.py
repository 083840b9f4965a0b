"""What a push does once its images are there: publish, try, release. Each may be repeated after any failure.

python -m level_2_cicd.release publish      make publish: the pipeline and its parameters, with the images by digest; nothing uses it yet
python -m level_2_cicd.release test         make functional-test: a short run of what is published; the champion stays
python -m level_2_cicd.release release      make release: from now on events start it, and so does this push, if anything changed

Whether anything changed is not taken from git: what a run depends on is the compiled pipeline with its images' digests, its
parameters and its rows. Of these the push's event is made, and one event starts one run. The predictor's image is none of
them: where it alone is new, the champion gets it without a training.
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
    command_line,
    deployment,
    pipeline_follow,
    pipeline_run,
    pipeline_template,
    pipeline_version,
    storage,
)
from gcp.environment import Environment, resolve_environment
from gcp.model_registry import open_registry
from gcp.pipeline_run import Submission
from gcp.pipeline_version import Published
from level_1_pipeline.vertex import gpu_jobs, machines
from level_1_pipeline.vertex import train as vertex_train
from level_2_cicd import builds, submit_build
from level_2_cicd import request as request_run
from level_2_cicd.kfp_compile_container import main as kfp_compile
from project.settings import Settings, load_settings

PUBLICATION = Path("build/publication.json")
BEGAN = Path("build/began")  # in a build, the first step writes it
EPOCHS = 2  # of the functional test
ATTEMPTS = 100  # of the same functional test, or of the same push, over all builds
FAILED = {"FAILED", "CANCELLED"}  # states of a run that may be attempted again
POLL = 10.0  # seconds between two looks at its run
ENOUGH = (
    "cpu"  # the job of the functional test where all of project.yaml's would wait for a machine
)


# ── what a run depends on ───────────────────────────────────────────────────────────────────────────────────────────
def content(spec: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """A hash of all that a training depends on but its rows: the compiled pipeline, and its parameters without the predictor."""
    serving = {key: value for key, value in values["serving"].items() if key != "image"}
    document = [spec, {**values, "serving": serving}]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def data(csv: str) -> str:
    """The rows and which of their contents: gs://…#GENERATION.

    Raises:
        UserError: there are none.
    """
    generation = storage.generation(csv)
    if generation is None:
        raise UserError(
            f"there are no rows at {csv}. Put them there, or name others as data.source in {PROJECT_FILE}."
        )
    return f"{csv}#{generation}"


def event(found: Published) -> str:
    """What has happened when this is pushed: the same words where nothing changed that a training depends on."""
    return f"push {content(found.spec, found.values)} {data(found.values['csv'])}"


# ── publish ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def publish(settings: Settings, environment: Environment) -> dict[str, Any]:
    """Publish the pipeline; what is current already is not published again under another commit.

    Returns:
        What kfp_publish.publish does, the commit, and when the build began: a slower build of an older commit publishes later.

    Raises:
        UserError: an image, the rows or the pipeline are not right, or something was refused.
    """
    csv = settings.data.source
    if not csv.startswith("gs://"):
        csv = vertex_train.upload_data(environment, vertex_train.source_csv(settings))
    commit = kfp_compile.version_of_code(submit_build.commit(), needed=True)
    images = builds.read_digests()
    made = kfp_compile.make(settings, environment, images, csv, commit)
    current = pipeline_version.read_current(environment)
    began = (
        BEGAN.read_text(encoding="utf-8").strip()
        if BEGAN.is_file()
        else datetime.now(UTC).isoformat(timespec="seconds")
    )
    if current and is_same(
        made,
        pipeline_version.read(pipeline_version.templates_folder(environment), current["version"]),
    ):
        return {**current, "began": began}
    return {
        **kfp_compile.publish(made, environment, templates(environment), commit),
        "commit": commit,
        "began": began,
    }


def templates(environment: Environment) -> str:
    """The registry of templates; TEMPLATE_REGISTRY names another one, as in a rehearsal."""
    return os.environ.get("TEMPLATE_REGISTRY") or environment.templates


def is_same(made: kfp_compile.Publication, there: Published) -> bool:
    """Whether it differs from what is published in nothing but the commit."""
    values, _ = pipeline_template.read_parameters(made.values.decode())
    return bool(yaml.safe_load(made.pipeline) == there.spec and values == there.values)


def publication(environment: Environment) -> tuple[dict[str, Any], Published]:
    """What `publish` has published, as it told it and as it is.

    Raises:
        UserError: it has not.
    """
    if not PUBLICATION.is_file():
        raise UserError(f"there is no {PUBLICATION}. Type first: make images publish")
    told = command_line.read_json(str(PUBLICATION), str(PUBLICATION))
    return told, pipeline_version.read(
        pipeline_version.templates_folder(environment), told["version"]
    )


# ── functional test ─────────────────────────────────────────────────────────────────────────────────────────────────
def jobs_of_test(
    settings: Settings, environment: Environment, train_image: str
) -> tuple[list[str], list[dict[str, Any]]]:
    """The jobs that the functional test may rent, by name and as the pipeline takes them: a build waits for no machine.

    JOB_SPEC names one, or several with blanks between them; otherwise those of project.yaml that do not wait, or else processors.

    Raises:
        UserError: there is no such job, or it waits.
    """
    root = project_root()
    asked = os.environ.get("JOB_SPEC", "").split()
    names = asked or settings.cloud.train.jobs
    found = {name: gpu_jobs.resolve(name, root, environment, train_image) for name in names}
    quick = {
        name: job
        for name, job in found.items()
        if job.get("scheduling", {}).get("strategy") != machines.FLEX_START
    }
    if asked and quick != found:
        waiting = ", ".join(name for name in found if name not in quick)
        raise UserError(
            f"JOB_SPEC: {waiting} waits for a machine, perhaps for a day, and a build does not. Name another job."
        )
    quick = quick or {ENOUGH: gpu_jobs.resolve(ENOUGH, root, environment, train_image)}
    return list(quick), list(quick.values())


def test(settings: Settings, environment: Environment) -> str:
    """Run what is published, with few epochs, to the gate; a run of the same that has succeeded is not repeated.

    Returns:
        What was found, in words.

    Raises:
        UserError: it fails.
    """
    _, found = publication(environment)
    image = found.values["jobs"][0]["workerPoolSpecs"][0]["containerSpec"]["imageUri"]
    names, jobs = jobs_of_test(settings, environment, image)
    short = {
        **found.values["hyperparameters"],
        "epochs": min(EPOCHS, int(found.values["hyperparameters"]["epochs"])),
    }
    values = {**found.values, "hyperparameters": short, "jobs": jobs, "register": False}
    what = f"functional test {content(found.spec, found.values)} {data(found.values['csv'])} {' '.join(names)}"
    sent, started = start(found, values, what, environment)
    name = f"{sent['parent']}/pipelineJobs/{sent['pipelineJobId']}"
    print(
        f"functional test: {'started' if started.new else 'goes on with'} {started.link}",
        flush=True,
    )
    seen = pipeline_follow.follow(name, float(os.environ.get("POLL") or POLL))
    pipeline_follow.require_success(seen)
    require_tested(found.spec, seen)
    reason = seen.facts.get(("gate", "decision"), {}).get("reason", "no reason is told")
    return f"the functional test succeeded. The gate: {reason}"


def start(
    found: Published, values: Mapping[str, Any], what: str, environment: Environment
) -> tuple[dict[str, Any], pipeline_run.Started]:
    """Start the functional test, or find the run of an earlier build that still counts: it goes on, or has succeeded."""
    target = pipeline_run.target_of(environment)
    labels = {**found.labels, "purpose": "functional-test"}
    for attempt in range(1, ATTEMPTS + 1):
        asked = Submission(
            found.spec,
            values,
            what,
            found.address,
            attempt,
            f"{environment.name} functional test",
            labels,
        )
        sent = pipeline_run.request(asked, target)
        started = pipeline_run.submit(sent)
        if started.new or pipeline_follow.look(started.name).state not in FAILED:
            return sent, started
    raise UserError(
        f"{ATTEMPTS} attempts of this functional test have failed: mend what they found, and push again."
    )


def require_tested(spec: Mapping[str, Any], seen: pipeline_follow.Seen) -> None:
    """Pass if all steps ran but those behind the gate, and of those none.

    Raises:
        UserError: a step did not run, or one did that should not.
    """
    before = [
        name for name in pipeline_template.steps(spec) if name in spec["root"]["dag"]["tasks"]
    ]
    states = {step.name: step.state for step in seen.steps}
    missing = [name for name in before if states.get(name) != "succeeded"]
    if missing:
        raise UserError(f"the functional test ended without running {', '.join(missing)}.")
    behind = [name for name in states if name not in before]
    if behind or seen.facts.get(("gate", "decision"), {}).get("passed") is True:
        ran = f"{', '.join(behind)} ran" if behind else "its gate was open"
        raise UserError(
            f"the functional test registers nothing, and {ran}: see gate in level_1_pipeline/pipeline.py."
        )


# ── release ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def release(environment: Environment) -> str:
    """Let events start what is published, start a run for this push if there is none, and give the champion the predictor.

    The request comes before the pointer: it names its version, and whoever is cut off between the two sends it again, which
    starts nothing twice. A build that is overtaken by that of a later push releases nothing.

    Raises:
        UserError: something was refused; the same again goes on from there.
    """
    told, found = publication(environment)
    before = pipeline_version.read_current(environment)
    builds.record_passed(builds.read_digests(), environment)
    if not pipeline_version.is_later(told, before):
        return overtaken(before)
    done = []
    what = event(found)
    attempt = wanted_attempt(found, what, environment)
    is_current = before is not None and before["version"] == told["version"]
    if attempt:
        request_run.publish(
            environment,
            request_run.compose(what, version=found.version, actor="build", attempt=attempt),
        )
        done.append(
            "a run is asked for"
            + (f", attempt {attempt}: the one before failed" if attempt > 1 else "")
        )
    else:
        if not is_current:
            done.append(f"this was trained before, in {run_of(found, what, environment).link}")
        # The run of this push brings the predictor that it was told at its start, perhaps long ago.
        if image_is_new(found, before, environment) or came_of(found, what, environment):
            done += redeployed(deployment.redeploy(environment.registry, found.values["serving"]))
    if not pipeline_version.write_current(environment, told):
        done.append(overtaken(pipeline_version.read_current(environment)))
    elif not is_current:
        done.append(f"version {told['version']} is current")
    return "; ".join(done) or "nothing changed: nothing is started"


def overtaken(current: Mapping[str, Any] | None) -> str:
    """Why a version does not become the current one, in words."""
    told = current or {}
    return (
        f"commit {told.get('commit')}, whose build began later ({told.get('began')}), is current already, so this one does not "
        "become it. If it shall all the same, push again, or type: make images publish release"
    )


def redeployed(outcome: Mapping[str, Any] | None) -> list[str]:
    """What became of the champion with another predictor, in words.

    Raises:
        UserError: another run has changed the champion meanwhile.
    """
    if outcome is None:
        return []
    if outcome["problem"]:
        raise UserError(
            f"the champion has the predictor that it had: {outcome['problem']}. Type the same again, or push again."
        )
    return [f"the champion is served by the new predictor, as version {outcome['version']}"]


def run_of(
    found: Published, what: str, environment: Environment, attempt: int = 1
) -> pipeline_run.Started:
    """The run that an event has, if it was started."""
    identity = Submission(found.spec, {}, what, attempt=attempt).identity
    return pipeline_run.Started(f"{environment.parent}/pipelineJobs/{identity}", new=False)


def wanted_attempt(found: Published, what: str, environment: Environment) -> int:
    """The number of the run that this event wants: 1, or more where those before failed; 0 where one goes on, or has succeeded.

    Raises:
        UserError: too many have failed.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            state = pipeline_follow.look(run_of(found, what, environment, attempt).name).state
        except api.ApiError as error:
            if error.code == 404:
                return attempt
            raise
        if state not in FAILED:
            return 0
    raise UserError(
        f"{ATTEMPTS} runs of this push have failed: mend what they found, and push again."
    )


def came_of(found: Published, what: str, environment: Environment) -> bool:
    """Whether an event's run, or one of its attempts, has made the champion; not where a person has chosen it."""
    registry = open_registry(environment.registry)
    change = registry.last_change()
    if change is None or change["reason"].startswith(MANUAL):
        return False
    champion = registry.version(change["version"])
    identity = run_of(found, what, environment).name.rpartition("/")[2]
    return (
        re.fullmatch(rf"{re.escape(identity)}(-a\d+)?", deployment.origin(champion.run)) is not None
    )


def image_is_new(
    found: Published, current: Mapping[str, Any] | None, environment: Environment
) -> bool:
    """Whether another predictor is current, or none."""
    if current is None:
        return True
    there = pipeline_version.read(
        pipeline_version.templates_folder(environment), current["version"]
    )
    return bool(there.values["serving"]["image"] != found.values["serving"]["image"])


# ── command line ────────────────────────────────────────────────────────────────────────────────────────────────────
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m level_2_cicd.release", description="Publish, try or release what was built."
    )
    parser.add_argument("what", choices=["publish", "test", "release"])
    asked = parser.parse_args()
    settings = load_settings()
    environment = resolve_environment(settings)
    submit_build.require_level_2(environment)
    if asked.what == "publish":
        told = publish(settings, environment)
        PUBLICATION.parent.mkdir(exist_ok=True)
        manifest.write_json(PUBLICATION, told)
        print(json.dumps(told))
    else:
        print(test(settings, environment) if asked.what == "test" else release(environment))


if __name__ == "__main__":
    run_command(main)
