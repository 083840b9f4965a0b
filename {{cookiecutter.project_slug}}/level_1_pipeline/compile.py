"""Compile the pipeline and check the result before a run."""

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from google.protobuf import json_format
from kfp import compiler
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec

from core.errors import UserError
from core.paths import project_root
from level_1_pipeline.parameters import STEP_IMAGES

DIGEST = r"[^\s@]+@sha256:[0-9a-f]{64}"


def load_definition() -> ModuleType:
    """Return level_1_pipeline/pipeline.py of the current project as a module."""
    # Loaded by path: no image contains the definition.
    path = project_root() / "level_1_pipeline" / "pipeline.py"
    spec = importlib.util.spec_from_file_location("pipeline", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be loaded.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_pipeline(pipeline: Any, path: Path) -> PipelineSpec:
    """Write the compiled pipeline to `path` and check it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pipeline, str(path))
    return check(path)


def compile_for_cloud(images: Mapping[str, str], path: Path) -> PipelineSpec:
    """Compile for Vertex AI, where the train step is a custom training job.

    `images` maps container (train, deploy, vertex_train) to image address by digest.
    """
    # A tag can move; with a digest a later run uses the same image.
    for name in STEP_IMAGES:
        if not re.fullmatch(DIGEST, images.get(name, "")):
            raise UserError(
                f"the image of {name}_container is '{images.get(name, '')}'; expected "
                "ADDRESS@sha256:… (64 digits). `make containers PUSH=1` prints them."
            )
    arguments = {f"{name}_image": images[name] for name in STEP_IMAGES}
    return compile_pipeline(load_definition().make_pipeline(**arguments), path)


def check(path: Path) -> PipelineSpec:
    """Parse a compiled pipeline strictly; reject features that do not run locally."""
    # kfp writes the platform spec as a second YAML document.
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    if len(documents) > 1:
        platforms = ", ".join(documents[1].get("platforms", {"unknown": None}))
        raise UserError(
            f"{path.name} has a platform spec for {platforms}: the pipeline would run only there. "
            "Remove what needs it (a workspace, a secret or a volume of Kubernetes)."
        )
    try:
        spec = json_format.Parse(json.dumps(documents[0]), PipelineSpec())
    except json_format.ParseError as error:
        raise UserError(f"{path.name} is not a valid pipeline: {error}") from None
    for name, component in spec.components.items():
        _check_conditions(name, component.dag.tasks)
    _check_conditions(spec.pipeline_info.name, spec.root.dag.tasks)
    return spec


def _check_conditions(component: str, tasks: Any) -> None:
    """Reject conditions on a named output."""
    # kfp's local runner silently skips such a branch, and the run still succeeds.
    for task in tasks.values():
        for parameter in task.inputs.parameters.values():
            output = parameter.task_output_parameter
            key = output.output_parameter_key
            channel = f"pipelinechannel--{output.producer_task}-{key}"
            if channel in task.trigger_policy.condition and key != "Output":
                raise UserError(
                    f"{component}: the condition of '{task.task_info.name}' rests on the output "
                    f"'{key}' of step '{output.producer_task}'. Let that step return one unnamed "
                    "value, such as `-> bool`, and use that."
                )
