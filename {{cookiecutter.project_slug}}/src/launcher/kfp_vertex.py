"""make level1 RUNNER=vertex: the same pipeline in the cloud, with a person's own credentials; and a look at such a run later.

DRY_RUN=1 prints what would be sent: nothing is built, uploaded or started.
"""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher import containers, kfp_compile, kfp_follow, kfp_submit, kfp_template, parameters, rows, story, vertex_by_hand
from launcher.kfp_submit import Started, Submission
from launcher.parameters import IMAGES
from launcher.story import Story
from project import cloud, git, runs, settings
from project.cloud import Place
from project.registry import open_registry
from project.settings import Settings

POLL = 10.0  # seconds between two looks at a run
UNKNOWN = f"@sha256:{64 * '0'}"  # stands for a digest: an image has one when it is pushed


def run(chosen: Settings, dry_run: bool) -> None:
    """Build, push, upload, compile, start and follow.

    Raises:
        UserError: something is missing or wrong, or the run failed; says what.
    """
    place = cloud.place(chosen)
    csv = find_rows(chosen)
    this = runs.new()
    # All that can be wrong here is seen before an image is built.
    planned = {name: f"{place.images}/{name}{UNKNOWN}" for name in IMAGES}
    sent = request(chosen, place, planned, rows_address(csv, place), this.name, this.folder)
    if dry_run:
        print(json.dumps(sent, indent=2, ensure_ascii=False))
        return
    vertex_by_hand.check_image(sent["pipelineJob"]["runtimeConfig"]["parameterValues"]["jobs"])
    told = story.begin(this.name)
    images = containers.make_all(containers.find(settings.project_root(), list(IMAGES)), chosen, place.images)
    this.start(chosen)
    started = None
    try:
        if not csv.startswith("gs://"):
            rows.upload(place, Path(csv))
        sent = request(chosen, place, images, rows_address(csv, place), this.name, this.folder)
        told.job = f"{place.parent}/pipelineJobs/{sent['pipelineJobId']}"
        told.write(this.folder)
        started = kfp_submit.submit(sent)
        print(f"Run {this.name}: on {chosen.data.source}, in {place.region} of {place.project}: {started.link}", flush=True)
        seen = kfp_follow.follow(started.name, POLL)
        note(told, seen)
        kfp_follow.require_success(seen)
    except KeyboardInterrupt:
        if told.job:
            print(f"\nThe run goes on. make status RUN={this.name} tells what became of it.", flush=True)
        else:
            told.state, told.problem = "interrupted", "it was stopped by hand"
        raise
    except BaseException as error:
        if not started and not getattr(error, "transient", False):
            told.job = None  # it was refused
        if not told.job:  # else its state is noted, or only the connection was lost, and the run may go on
            told.state, told.problem = "failed", str(error) or type(error).__name__
        raise
    finally:
        told.write(this.folder)
    print(story.summary(told, open_registry(place.registry).champion_number(), ""))


def find_rows(chosen: Settings) -> str:
    """Where the rows are now: a gs:// address, or a file of this machine, checked.

    Raises:
        UserError: there is no such file, or no such column.
    """
    return chosen.data.source if chosen.data.source.startswith("gs://") else str(rows.find(chosen))


def rows_address(csv: str, place: Place) -> str:
    """Where the rows are for the cloud."""
    return csv if csv.startswith("gs://") else rows.address(place, Path(csv))


def request(chosen: Settings, place: Place, images: dict[str, str], csv: str, name: str, folder: Path) -> dict[str, Any]:
    """What is sent for this run; the compiled pipeline stays in its folder if that is there.

    Raises:
        UserError: a job, a parameter or the pipeline has a mistake.
    """
    values = {**parameters.for_cloud(chosen, place, images, csv), "run": name}
    spec = compiled(images, folder)
    labels = {"commit": git.version(), "actor": os.environ.get("USER") or "somebody", "project": chosen.name}
    asked = Submission(spec, values, event=f"by hand {name}", name=f"{chosen.name} {name}", labels=labels)
    return kfp_submit.request(asked, kfp_submit.target_of(place))


def compiled(images: dict[str, str], folder: Path) -> dict[str, Any]:
    """The pipeline for the cloud."""
    with tempfile.TemporaryDirectory() as elsewhere:
        path = (folder if folder.is_dir() else Path(elsewhere)) / "pipeline.yaml"
        kfp_compile.compile_for_cloud(images, path)
        return kfp_template.read(str(path))


def note(told: Story, seen: kfp_follow.Seen) -> None:
    """Put what is seen of a run into its story."""
    told.steps = seen.steps
    told.gate = seen.facts.get(("gate", "decision"))
    told.registered = seen.facts.get(("register", "version"))
    told.problem = seen.problem or None
    if seen.state in kfp_follow.ENDED:
        told.state = seen.state.lower()


def look_again(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    """A story that was written while its run went on, as it is now.

    Raises:
        ApiError: nobody answers.
    """
    told = Story(**{**document, "steps": []})
    note(told, kfp_follow.look(str(told.job)))
    told.write(folder)
    return runs.read_json(folder / "story.json")


def story_of(identity: str) -> dict[str, Any]:
    """The story of a run that was started elsewhere, by its id on Vertex AI.

    Raises:
        UserError: there is no such run; project.yaml names no project.
    """
    name = f"{cloud.place(settings.load()).parent}/pipelineJobs/{identity}"
    seen = kfp_follow.look(name)
    told = Story(identity, seen.event, seen.began, job=name)
    note(told, seen)
    return asdict(told)


def page(job: str) -> str:
    """A run's page."""
    return Started(job, new=False).link
