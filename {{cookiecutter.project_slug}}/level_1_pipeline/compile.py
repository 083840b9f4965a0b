"""Compiles the pipeline, and checks what comes out before anything runs it."""

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
    """level_1_pipeline/pipeline.py as a module."""
    path = project_root() / "level_1_pipeline" / "pipeline.py"
    spec = importlib.util.spec_from_file_location("pipeline", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be loaded.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_pipeline(pipeline: Any, path: Path) -> PipelineSpec:
    """Write the compiled pipeline to `path`, and check it.

    Raises:
        UserError: see `check`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pipeline, str(path))
    return check(path)


def compile_for_cloud(images: Mapping[str, str], path: Path) -> PipelineSpec:
    """The same pipeline for Vertex AI: its train step rents a machine.

    Args:
        images: container (train, deploy, vertex_train) → its image's address by digest, so that what runs tomorrow is
            what was built today.
        path: the file to write, YAML.

    Raises:
        UserError: an image is missing, or named by a tag; see also `check`.
    """
    from level_1_pipeline import vertex_step

    for name in STEP_IMAGES:
        if not re.fullmatch(DIGEST, images.get(name, "")):
            raise UserError(
                f"the image of {name}_container is '{images.get(name, '')}': it must be ADDRESS@sha256:… (64 digits). "
                "`make containers PUSH=1` prints them."
            )
    train_step = vertex_step.component(images["vertex_train"])
    definition = load_definition()
    pipeline = definition.make_pipeline(
        train_image=images["train"], deploy_image=images["deploy"], train_step=train_step
    )
    return compile_pipeline(pipeline, path)


def check(path: Path) -> PipelineSpec:
    """Parse a compiled pipeline strictly.

    Raises:
        UserError: it has a field that the format does not know, needs a platform of its own, or has a condition that
            would silently never be true on this machine.
    """
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    if len(documents) > 1:
        platforms = ", ".join(documents[1].get("platforms", {"unknown": None}))
        raise UserError(
            f"{path.name} has a second document, a platform spec for {platforms}: this pipeline would run there only. "
            "Remove what needs it (a workspace, a secret or a volume of Kubernetes)."
        )
    try:
        spec = json_format.Parse(json.dumps(documents[0]), PipelineSpec())
    except json_format.ParseError as error:
        raise UserError(f"{path.name} is not a pipeline: {error}") from None
    for name, component in spec.components.items():
        _check_conditions(name, component.dag.tasks)
    _check_conditions(spec.pipeline_info.name, spec.root.dag.tasks)
    return spec


def _check_conditions(where: str, tasks: Any) -> None:
    """A condition on a named output is never true when kfp runs it locally, and the run still succeeds."""
    for task in tasks.values():
        if not task.trigger_policy.condition:
            continue
        for parameter in task.inputs.parameters.values():
            output = parameter.task_output_parameter
            name = f"pipelinechannel--{output.producer_task}-{output.output_parameter_key}"
            if name in task.trigger_policy.condition and output.output_parameter_key != "Output":
                raise UserError(
                    f"{where}: the condition of '{task.task_info.name}' rests on the output '{output.output_parameter_key}' "
                    f"of step '{output.producer_task}'. Let that step return one unnamed value, such as `-> bool`, and use that."
                )
