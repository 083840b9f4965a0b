"""What a push does once its images are there: publish, try, release. Each may be repeated after any failure.

python -m launcher.push publish      make publish: the pipeline and its parameters, with the images by digest; nothing uses it yet
python -m launcher.push test         make functional-test: a short run of what is published; the champion stays
python -m launcher.push release      make release: from now on events start it, and so does this push, if anything changed

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

from launcher import (
    api,
    cloud_images,
    command_line,
    deploy,
    gpu_jobs,
    kfp_follow,
    kfp_publish,
    kfp_submit,
    kfp_template,
    machines,
    published,
    request_run,
    rows,
    submit_build,
)
from launcher.kfp_submit import Submission
from launcher.published import Published
from project import cloud, manifest, settings, storage
from project.cloud import Place
from project.errors import UserError, run_command
from project.registry import BY_HAND, open_registry
from project.settings import Settings

PUBLICATION = Path("build/publication.json")
BEGAN = Path("build/began")  # in a build, the first step writes it
EPOCHS = 2  # of the functional test
ATTEMPTS = 100  # of the same functional test, or of the same push, over all builds
FAILED = {"FAILED", "CANCELLED"}  # states of a run that may be attempted again
POLL = 10.0  # seconds between two looks at its run
ENOUGH = "cpu"  # the job of the functional test where all of project.yaml's would wait for a machine


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
        raise UserError(f"there are no rows at {csv}. Put them there, or name others as data.source in {settings.FILE}.")
    return f"{csv}#{generation}"


def event(found: Published) -> str:
    """What has happened when this is pushed: the same words where nothing changed that a training depends on."""
    return f"push {content(found.spec, found.values)} {data(found.values['csv'])}"


# ── publish ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def publish(chosen: Settings, place: Place) -> dict[str, Any]:
    """Publish the pipeline; what is current already is not published again under another commit.

    Returns:
        What kfp_publish.publish does, the commit, and when the build began: a slower build of an older commit publishes later.

    Raises:
        UserError: an image, the rows or the pipeline are not right, or something was refused.
    """
    csv = chosen.data.source
    if not csv.startswith("gs://"):
        csv = rows.upload(place, rows.find(chosen))
    commit = kfp_publish.version_of_code(submit_build.commit(), needed=True)
    images = cloud_images.read()
    made = kfp_publish.make(chosen, place, images, csv, commit)
    current = kfp_publish.read_current(place)
    began = BEGAN.read_text(encoding="utf-8").strip() if BEGAN.is_file() else datetime.now(UTC).isoformat(timespec="seconds")
    if current and is_same(made, published.read(kfp_publish.templates_folder(place), current["version"])):
        return {**current, "began": began}
    return {**kfp_publish.publish(made, place, templates(place), commit), "commit": commit, "began": began}


def templates(place: Place) -> str:
    """The registry of templates; TEMPLATE_REGISTRY names another one, as in a rehearsal."""
    return os.environ.get("TEMPLATE_REGISTRY") or place.templates


def is_same(made: kfp_publish.Publication, there: Published) -> bool:
    """Whether it differs from what is published in nothing but the commit."""
    values, _ = kfp_template.read_parameters(made.values.decode())
    return bool(yaml.safe_load(made.pipeline) == there.spec and values == there.values)


def publication(place: Place) -> tuple[dict[str, Any], Published]:
    """What `publish` has published, as it told it and as it is.

    Raises:
        UserError: it has not.
    """
    if not PUBLICATION.is_file():
        raise UserError(f"there is no {PUBLICATION}. Type first: make images publish")
    told = command_line.read_json(str(PUBLICATION), str(PUBLICATION))
    return told, published.read(kfp_publish.templates_folder(place), told["version"])


# ── functional test ─────────────────────────────────────────────────────────────────────────────────────────────────
def jobs_of_test(chosen: Settings, place: Place, train_image: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The jobs that the functional test may rent, by name and as the pipeline takes them: a build waits for no machine.

    JOB_SPEC names one, or several with blanks between them; otherwise those of project.yaml that do not wait, or else processors.

    Raises:
        UserError: there is no such job, or it waits.
    """
    root = settings.project_root()
    asked = os.environ.get("JOB_SPEC", "").split()
    names = asked or chosen.cloud.train.jobs
    found = {name: gpu_jobs.resolve(name, root, place, train_image) for name in names}
    quick = {name: job for name, job in found.items() if job.get("scheduling", {}).get("strategy") != machines.FLEX_START}
    if asked and quick != found:
        waiting = ", ".join(name for name in found if name not in quick)
        raise UserError(f"JOB_SPEC: {waiting} waits for a machine, perhaps for a day, and a build does not. Name another job.")
    quick = quick or {ENOUGH: gpu_jobs.resolve(ENOUGH, root, place, train_image)}
    return list(quick), list(quick.values())


def test(chosen: Settings, place: Place) -> str:
    """Run what is published, with few epochs, to the gate; a run of the same that has succeeded is not repeated.

    Returns:
        What was found, in words.

    Raises:
        UserError: it fails.
    """
    _, found = publication(place)
    image = found.values["jobs"][0]["workerPoolSpecs"][0]["containerSpec"]["imageUri"]
    names, jobs = jobs_of_test(chosen, place, image)
    short = {**found.values["hyperparameters"], "epochs": min(EPOCHS, int(found.values["hyperparameters"]["epochs"]))}
    values = {**found.values, "hyperparameters": short, "jobs": jobs, "register": False}
    what = f"functional test {content(found.spec, found.values)} {data(found.values['csv'])} {' '.join(names)}"
    sent, started = start(found, values, what, place)
    name = f"{sent['parent']}/pipelineJobs/{sent['pipelineJobId']}"
    print(f"functional test: {'started' if started.new else 'goes on with'} {started.link}", flush=True)
    seen = kfp_follow.follow(name, float(os.environ.get("POLL") or POLL))
    kfp_follow.require_success(seen)
    require_tested(found.spec, seen)
    reason = seen.facts.get(("gate", "decision"), {}).get("reason", "no reason is told")
    return f"the functional test succeeded. The gate: {reason}"


def start(found: Published, values: Mapping[str, Any], what: str, place: Place) -> tuple[dict[str, Any], kfp_submit.Started]:
    """Start the functional test, or find the run of an earlier build that still counts: it goes on, or has succeeded."""
    target = kfp_submit.target_of(place)
    labels = {**found.labels, "purpose": "functional-test"}
    for attempt in range(1, ATTEMPTS + 1):
        asked = Submission(found.spec, values, what, found.address, attempt, f"{place.name} functional test", labels)
        sent = kfp_submit.request(asked, target)
        started = kfp_submit.submit(sent)
        if started.new or kfp_follow.look(started.name).state not in FAILED:
            return sent, started
    raise UserError(f"{ATTEMPTS} attempts of this functional test have failed: mend what they found, and push again.")


def require_tested(spec: Mapping[str, Any], seen: kfp_follow.Seen) -> None:
    """Pass if all steps ran but those behind the gate, and of those none.

    Raises:
        UserError: a step did not run, or one did that should not.
    """
    before = [name for name in kfp_template.steps(spec) if name in spec["root"]["dag"]["tasks"]]
    states = {step.name: step.state for step in seen.steps}
    missing = [name for name in before if states.get(name) != "succeeded"]
    if missing:
        raise UserError(f"the functional test ended without running {', '.join(missing)}.")
    behind = [name for name in states if name not in before]
    if behind or seen.facts.get(("gate", "decision"), {}).get("passed") is True:
        ran = f"{', '.join(behind)} ran" if behind else "its gate was open"
        raise UserError(f"the functional test registers nothing, and {ran}: see gate in level_1_pipeline/pipeline.py.")


# ── release ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def release(place: Place) -> str:
    """Let events start what is published, start a run for this push if there is none, and give the champion the predictor.

    The request comes before the pointer: it names its version, and whoever is cut off between the two sends it again, which
    starts nothing twice. A build that is overtaken by that of a later push releases nothing.

    Raises:
        UserError: something was refused; the same again goes on from there.
    """
    told, found = publication(place)
    before = kfp_publish.read_current(place)
    cloud_images.note_passed(cloud_images.read(), place)
    if not published.is_later(told, before):
        return overtaken(before)
    done = []
    what = event(found)
    attempt = wanted_attempt(found, what, place)
    is_current = before is not None and before["version"] == told["version"]
    if attempt:
        request_run.publish(place, request_run.compose(what, version=found.version, actor="build", attempt=attempt))
        done.append("a run is asked for" + (f", attempt {attempt}: the one before failed" if attempt > 1 else ""))
    else:
        if not is_current:
            done.append(f"this was trained before, in {run_of(found, what, place).link}")
        # The run of this push brings the predictor that it was told at its start, perhaps long ago.
        if image_is_new(found, before, place) or came_of(found, what, place):
            done += redeployed(deploy.redeploy(place.registry, found.values["serving"]))
    if not kfp_publish.write_current(place, told):
        done.append(overtaken(kfp_publish.read_current(place)))
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
        raise UserError(f"the champion has the predictor that it had: {outcome['problem']}. Type the same again, or push again.")
    return [f"the champion is served by the new predictor, as version {outcome['version']}"]


def run_of(found: Published, what: str, place: Place, attempt: int = 1) -> kfp_submit.Started:
    """The run that an event has, if it was started."""
    identity = Submission(found.spec, {}, what, attempt=attempt).identity
    return kfp_submit.Started(f"{place.parent}/pipelineJobs/{identity}", new=False)


def wanted_attempt(found: Published, what: str, place: Place) -> int:
    """The number of the run that this event wants: 1, or more where those before failed; 0 where one goes on, or has succeeded.

    Raises:
        UserError: too many have failed.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            state = kfp_follow.look(run_of(found, what, place, attempt).name).state
        except api.ApiError as error:
            if error.code == 404:
                return attempt
            raise
        if state not in FAILED:
            return 0
    raise UserError(f"{ATTEMPTS} runs of this push have failed: mend what they found, and push again.")


def came_of(found: Published, what: str, place: Place) -> bool:
    """Whether an event's run, or one of its attempts, has made the champion; not where a person has chosen it."""
    registry = open_registry(place.registry)
    change = registry.last_change()
    if change is None or change["reason"].startswith(BY_HAND):
        return False
    champion = registry.version(change["version"])
    identity = run_of(found, what, place).name.rpartition("/")[2]
    return re.fullmatch(rf"{re.escape(identity)}(-a\d+)?", deploy.origin(champion.run)) is not None


def image_is_new(found: Published, current: Mapping[str, Any] | None, place: Place) -> bool:
    """Whether another predictor is current, or none."""
    if current is None:
        return True
    there = published.read(kfp_publish.templates_folder(place), current["version"])
    return bool(there.values["serving"]["image"] != found.values["serving"]["image"])


# ── command line ────────────────────────────────────────────────────────────────────────────────────────────────────
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m launcher.push", description="Publish, try or release what was built.")
    parser.add_argument("what", choices=["publish", "test", "release"])
    asked = parser.parse_args()
    chosen = settings.load()
    place = cloud.place(chosen)
    submit_build.level_2(place)
    if asked.what == "publish":
        told = publish(chosen, place)
        PUBLICATION.parent.mkdir(exist_ok=True)
        manifest.write_json(PUBLICATION, told)
        print(json.dumps(told))
    else:
        print(test(chosen, place) if asked.what == "test" else release(place))


if __name__ == "__main__":
    run_command(main)
