"""Runs a compiled pipeline on this machine: python -m level_1_pipeline.kfp_local PIPELINE.yaml ARGUMENTS.json ROOT [DOCKER]

kfp prints all that its steps print; level_1_pipeline.run starts this, reads that, and tells a person what matters.
"""

import json
import sys
from pathlib import Path
from typing import Any

from kfp import components, local


def docker_runner(options: dict[str, Any]) -> local.DockerRunner:
    """Every step as a container; `options` are those of level_1_pipeline.kfp_docker."""
    from docker.types import DeviceRequest, Mount

    mounts = [
        Mount(path, path, type="bind", read_only=read_only)
        for path, read_only in options.pop("mounts").items()
    ]
    gpus = [DeviceRequest(count=-1, capabilities=[["gpu"]])] if options.pop("gpus") else []
    return local.DockerRunner(mounts=mounts, device_requests=gpus, **options)


def main() -> None:
    """Run every step as a process of its own in this environment, or, if its options are given as JSON, as a container."""
    pipeline, arguments, root, *docker = sys.argv[1:]
    runner = (
        docker_runner(json.loads(docker[0])) if docker else local.SubprocessRunner(use_venv=False)
    )
    local.init(runner, pipeline_root=root, raise_on_error=True)
    components.load_component_from_file(pipeline)(
        **json.loads(Path(arguments).read_text(encoding="utf-8"))
    )


if __name__ == "__main__":
    main()
