"""A published pipeline in the fake of Cloud Storage, for tests and benchmarks: as a build publishes it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcp import pipeline_template, pipeline_version
from gcp.environment import Environment, resolve_environment
from level_1_pipeline import compile as pipeline_compiler
from level_1_pipeline import parameters
from level_2_cicd.rehearsal.storage import FakeStorage
from project.settings import load_settings

IMAGES = {name: f"example.com/{name}@sha256:{'0' * 64}" for name in parameters.IMAGES}
VERSION = "0123456789abcdef"
ROWS = "gs://rows/digits.csv"


@dataclass(frozen=True)
class Cloud:
    """An environment of a project, and what the trigger function is told of it, as Terraform tells it."""

    environment: Environment
    variables: dict[str, str]

    @property
    def templates(self) -> str:
        """The folder of what is published."""
        return pipeline_version.templates_folder(self.environment)

    def bucket(self, address: str) -> str:
        """The bucket in a gs:// address."""
        return address.removeprefix("gs://").split("/")[0]


def prepare(project: Path) -> Cloud:
    """Name a Google Cloud project in project.yaml of a generated project; its addresses. The current folder must be it."""
    path = project / "project.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace('dev: {project: ""', 'dev: {project: "my-project"', 1), encoding="utf-8"
    )
    where = resolve_environment(load_settings(""), "dev")
    variables = {
        "PROJECT": where.project,
        "REGION": where.region,
        "PIPELINE_ROOT": where.pipeline_root,
        "TEMPLATES": pipeline_version.templates_folder(where),
        "SERVICE_ACCOUNT": where.account("pipeline"),
        "KMS_KEY": where.key,
        "INCOMING": where.incoming,
        "NETWORK_ATTACHMENT": where.network_attachment,
        "DATA_SOURCE": "",
        "BATCH_WINDOW_MINUTES": "0",
    }
    return Cloud(where, variables)


def compiled(folder: Path) -> dict[str, Any]:
    """The pipeline, compiled for the cloud."""
    path = folder / "pipeline.yaml"
    pipeline_compiler.compile_for_cloud(
        {name: IMAGES[name] for name in parameters.STEP_IMAGES}, path
    )
    return pipeline_template.read(str(path))


def values(cloud: Cloud, csv: str = ROWS) -> dict[str, Any]:
    """The parameters that are published; without rows' address if there is none."""
    every = parameters.for_cloud(load_settings(""), cloud.environment, IMAGES, csv)
    return every if csv else {name: value for name, value in every.items() if name != "csv"}


def publish(
    storage: FakeStorage,
    cloud: Cloud,
    spec: Mapping[str, Any],
    csv: str = ROWS,
    version: str = VERSION,
) -> None:
    """Put a version into the bucket, and make it the current one."""
    root = (
        storage.create_bucket(cloud.bucket(cloud.environment.storage))
        / cloud.templates.split("/", 3)[3]
    )
    (root / version).mkdir(parents=True, exist_ok=True)
    (root / version / "pipeline.json").write_text(json.dumps(spec), encoding="utf-8")
    document = {"labels": {"commit": "1a2b"}, "parameters": values(cloud, csv)}
    (root / version / "parameters.json").write_text(json.dumps(document), encoding="utf-8")
    pointer = dict.fromkeys(pipeline_version.FIELDS, "") | {"version": version}
    (root / pipeline_version.POINTER).write_text(json.dumps(pointer), encoding="utf-8")
