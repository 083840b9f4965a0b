"""What a push sets going, by kind of change, and how much of its steps runs side by side.

cloudbuild.yaml's own steps are run on this machine, against doubles of Google's services; lint and test are the real ones.
Docker's builds and Terraform are left out, and setup, because the environment is there: in the cloud these take minutes, which
lengthens both sides. Builds are those that Cloud Build was asked for, pushes the images that the registry then got, runs the
trainings that the trigger function started. The critical path is the longest way through the graph, by the measured seconds.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.bench import generated
from tests.bench.report import Figure
from tests.push import Cloud, edit, effect, make_champion, running

NEEDS_GCLOUD = True

# Kind of change → the file, a text in it, and what takes its place; and how many images and runs it should make.
CHANGES = {
    "documentation": ("README.md", "#", "# Read me:", 0, 0),
    "project.yaml's threshold": ("project.yaml", "threshold: 0.95", "threshold: 0.9", 0, 1),
    "the pipeline": (
        "level_1_pipeline/pipeline.py",
        'description="preprocess',
        'description="first preprocess',
        0,
        1,
    ),
    "training code": ("src/trainer/model.py", "import", "# another model\nimport", 1, 1),
    "the predictor": ("src/predictor/server.py", "import", "# another answer\nimport", 1, 0),
}


def measure(small: bool) -> Iterator[Figure]:
    """Builds, pushes and runs; the critical path over the sum."""
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        (folder / "generated").mkdir()
        project = generated.project(folder / "generated")
        with running(folder, Path(shutil.copytree(project, folder / "project")), patch) as cloud:
            yield from of_changes(cloud, small)
        with running(
            folder / "again", Path(shutil.copytree(project, folder / "again" / "project")), patch
        ) as cloud:
            yield from of_the_graph(cloud, small)


def of_changes(cloud: Cloud, small: bool) -> Iterator[Figure]:
    """One push after the other; each begins where the one before it ended."""
    first = effect(cloud)
    yield Figure(
        "first push into an empty project: builds",
        len(first.builds),
        "builds",
        note=f"{first.runs} run",
    )
    make_champion(cloud)
    for kind in list(CHANGES)[: 1 if small else None]:
        path, old, new, images, runs = CHANGES[kind]
        edit(cloud.project / path, old, new)
        seen = effect(cloud)
        note = f"{seen.runs} run" + (", the champion served anew" if seen.redeployed else "")
        yield Figure(f"{kind}: builds", len(seen.builds), "builds", f"≤ {images}", note)
        yield Figure(f"{kind}: pushes", len(seen.pushed), "images", f"≤ {images}")
        yield Figure(f"{kind}: trainings", seen.runs, "runs", f"≤ {runs}")


def of_the_graph(cloud: Cloud, small: bool) -> Iterator[Figure]:
    """A first push with lint and test."""
    timed = "make $0 || true"  # what they find is not measured
    real = {} if small else {name: ["sh", "-c", timed, name] for name in ("lint", "test")}
    outcome = cloud.push(instead=real)
    if outcome.status != "SUCCESS":
        raise RuntimeError(outcome.failures())
    total = sum(step.seconds for step in outcome.steps)
    slow = ", ".join(
        f"{step.name} {step.seconds:.0f}" for step in outcome.steps if step.seconds >= 1
    )
    yield Figure("all steps, one after the other", total, "s", note=slow)
    yield Figure(
        "critical path, over that",
        outcome.critical / total,
        "×",
        note="lower where image builds, which are left out here, run beside the tests",
    )
