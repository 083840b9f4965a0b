"""make level1 RUNNER=vertex: the same pipeline in the cloud, with a person's own credentials; and a look at such a run later.

DRY_RUN=1 prints what would be sent: nothing is built, uploaded or started.
"""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core import run_record
from core.paths import project_root
from core.run_record import Story
from gcp import pipeline_follow, pipeline_run, pipeline_template
from gcp.environment import Environment, resolve_environment
from gcp.model_registry import open_registry
from gcp.pipeline_run import Started, Submission
from level_1_pipeline import compile as pipeline_compiler
from level_1_pipeline import containers, parameters
from level_1_pipeline.parameters import IMAGES
from level_1_pipeline.vertex import rows
from level_1_pipeline.vertex import train as vertex_train
from project import git, runs
from project.settings import Settings, load_settings

POLL = 10.0  # seconds between two looks at a run
UNKNOWN = f"@sha256:{64 * '0'}"  # stands for a digest: an image has one when it is pushed


def run(settings: Settings, dry_run: bool) -> None:
    """Build, push, upload, compile, start and follow.

    Raises:
        UserError: something is missing or wrong, or the run failed; says what.
    """
    environment = resolve_environment(settings)
    csv = find_rows(settings)
    this = runs.new()
    # All that can be wrong here is seen before an image is built.
    planned = {name: f"{environment.images}/{name}{UNKNOWN}" for name in IMAGES}
    sent = request(
        settings, environment, planned, rows_address(csv, environment), this.name, this.folder
    )
    if dry_run:
        print(json.dumps(sent, indent=2, ensure_ascii=False))
        return
    vertex_train.check_image(sent["pipelineJob"]["runtimeConfig"]["parameterValues"]["jobs"])
    told = run_record.begin(this.name)
    images = containers.make_all(
        containers.find(project_root(), list(IMAGES)), settings, environment.images
    )
    this.start(settings)
    started = None
    try:
        if not csv.startswith("gs://"):
            rows.upload(environment, Path(csv))
        sent = request(
            settings, environment, images, rows_address(csv, environment), this.name, this.folder
        )
        told.job = f"{environment.parent}/pipelineJobs/{sent['pipelineJobId']}"
        told.write(this.folder)
        started = pipeline_run.submit(sent)
        print(
            f"Run {this.name}: on {settings.data.source}, in {environment.region} of {environment.project}: {started.link}",
            flush=True,
        )
        seen = pipeline_follow.follow(started.name, POLL)
        note(told, seen)
        pipeline_follow.require_success(seen)
    except KeyboardInterrupt:
        if told.job:
            print(
                f"\nThe run goes on. make status RUN={this.name} tells what became of it.",
                flush=True,
            )
        else:
            told.state, told.problem = "interrupted", "it was stopped by hand"
        raise
    except BaseException as error:
        if not started and not getattr(error, "transient", False):
            told.job = None  # it was refused
        if (
            not told.job
        ):  # else its state is noted, or only the connection was lost, and the run may go on
            told.state, told.problem = "failed", str(error) or type(error).__name__
        raise
    finally:
        told.write(this.folder)
    print(run_record.summary(told, open_registry(environment.registry).champion_number(), ""))


def find_rows(settings: Settings) -> str:
    """Where the rows are now: a gs:// address, or a file of this machine, checked.

    Raises:
        UserError: there is no such file, or no such column.
    """
    return (
        settings.data.source
        if settings.data.source.startswith("gs://")
        else str(rows.find(settings))
    )


def rows_address(csv: str, environment: Environment) -> str:
    """Where the rows are for the cloud."""
    return csv if csv.startswith("gs://") else rows.address(environment, Path(csv))


def request(
    settings: Settings,
    environment: Environment,
    images: dict[str, str],
    csv: str,
    name: str,
    folder: Path,
) -> dict[str, Any]:
    """What is sent for this run; the compiled pipeline stays in its folder if that is there.

    Raises:
        UserError: a job, a parameter or the pipeline has a mistake.
    """
    values = {**parameters.for_cloud(settings, environment, images, csv), "run": name}
    spec = compiled(images, folder)
    labels = {
        "commit": git.version(),
        "actor": os.environ.get("USER") or "somebody",
        "project": settings.name,
    }
    asked = Submission(
        spec, values, event=f"by hand {name}", name=f"{settings.name} {name}", labels=labels
    )
    return pipeline_run.request(asked, pipeline_run.target_of(environment))


def compiled(images: dict[str, str], folder: Path) -> dict[str, Any]:
    """The pipeline for the cloud."""
    with tempfile.TemporaryDirectory() as elsewhere:
        path = (folder if folder.is_dir() else Path(elsewhere)) / "pipeline.yaml"
        pipeline_compiler.compile_for_cloud(images, path)
        return pipeline_template.read(str(path))


def note(told: Story, seen: pipeline_follow.Seen) -> None:
    """Put what is seen of a run into its story."""
    told.steps = seen.steps
    told.gate = seen.facts.get(("gate", "decision"))
    told.registered = seen.facts.get(("register", "version"))
    told.problem = seen.problem or None
    if seen.state in pipeline_follow.ENDED:
        told.state = seen.state.lower()


def look_again(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    """A story that was written while its run went on, as it is now.

    Raises:
        ApiError: nobody answers.
    """
    told = Story(**{**document, "steps": []})
    note(told, pipeline_follow.look(str(told.job)))
    told.write(folder)
    return runs.read_json(folder / "story.json")


def story_of(identity: str) -> dict[str, Any]:
    """The story of a run that was started elsewhere, by its id on Vertex AI.

    Raises:
        UserError: there is no such run; project.yaml names no project.
    """
    name = f"{resolve_environment(load_settings()).parent}/pipelineJobs/{identity}"
    seen = pipeline_follow.look(name)
    told = Story(identity, seen.event, seen.began, job=name)
    note(told, seen)
    return asdict(told)


def page(job: str) -> str:
    """A run's page."""
    return Started(job, new=False).link
