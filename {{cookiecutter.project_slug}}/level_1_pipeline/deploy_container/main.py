"""Register and serve a saved model, locally or on Google Cloud, or roll back.

The gate is not evaluated here; that is up to the caller. The steps are in gcp.deployment.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core import manifest
from core.errors import UserError, run_command
from gcp import storage
from gcp.deployment import deploy, rollback
from gcp.endpoint import deploy_request, split_traffic
from gcp.model_registry import Serving, open_registry, upload_request
from gcp.pipeline_template import read_json


def preview(serving: Serving, model: Path, run: str, address: str | None) -> str:
    """Return the requests of a deployment as JSON, with placeholders for unknown values."""
    upload = {"models.upload": upload_request(serving, model, run, address)}
    instance = manifest.example(manifest.read(model)["schema"])
    return _json({**upload, **_serving_requests(serving, "VERSION", instance)})


def preview_of_rollback(number: int, serving: Mapping[str, Any]) -> str:
    """Return the requests of a rollback as JSON, without any API call."""
    return _json(_serving_requests(Serving.parse(serving), str(number), "AN EXAMPLE INSTANCE"))


def _json(requests: Mapping[str, Any]) -> str:
    return json.dumps(requests, indent=2, ensure_ascii=False)


def _serving_requests(serving: Serving, version: str, instance: Any) -> dict[str, Any]:
    endpoint = f"{serving.parent}/endpoints/{serving.endpoint}"
    traffic = split_traffic(version, "CHAMPION", serving.canary_percent)
    return {
        "endpoints.deployModel": deploy_request(serving, endpoint, version),
        "endpoints.patch": {
            "endpoint": {"name": endpoint, "traffic_split": traffic},
            "update_mask": "traffic_split",
        },
        "endpoints.predict": {"endpoint": endpoint, "instances": [instance]},
        "models.mergeVersionAliases": {
            "name": f"{serving.model}@{version}",
            "version_aliases": ["champion", "default"],
        },
    }


def parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    command = argparse.ArgumentParser(
        prog="python -m level_1_pipeline.deploy_container.main",
        description="Register a saved model and serve it.",
    )
    add = command.add_argument
    add("--model-dir", help="folder or gs:// address of a saved model")
    add("--metrics", help="the output of trainer.evaluate: JSON, a file or a gs:// address")
    add("--registry", required=True, help="folder or gs:// address of the registry")
    add("--run", default="manual", help="id of the run that trained the model")
    add("--reason", default="deployed manually", help="why it becomes the champion")
    add("--serving", help="in the cloud: endpoint and machine, as JSON or a file")
    add("--rollback", type=int, metavar="VERSION", help="in the cloud: serve this version again")
    add("--dry-run", action="store_true", help="in the cloud: print the requests, send nothing")
    return command


def main() -> None:
    """Deploy or roll back, depending on the options."""
    options = parser().parse_args()
    serving = _read_object(options.serving, "--serving") if options.serving else {}
    run = _deploy if options.rollback is None else _rollback
    outcome = run(options, serving)
    if outcome:
        result = "it is the champion" if outcome["champion"] else outcome["problem"]
        print(f"version {outcome['version']}; {result}")


def _rollback(options: argparse.Namespace, serving: dict[str, Any]) -> dict[str, Any] | None:
    if not options.registry.startswith("gs://"):
        raise UserError(
            "--rollback needs a registry in the cloud. Locally, run"
            f" `make rollback VERSION={options.rollback}`."
        )
    if options.dry_run:
        print(preview_of_rollback(options.rollback, serving))
        return None
    return rollback(options.registry, options.rollback, serving)


def _deploy(options: argparse.Namespace, serving: dict[str, Any]) -> dict[str, Any] | None:
    if not options.model_dir or not options.metrics:
        raise UserError("no model given: add --model-dir and --metrics, or --rollback VERSION.")
    metrics = _read_object(options.metrics, "--metrics")
    registry, run, reason = options.registry, options.run, options.reason
    address = options.model_dir if options.model_dir.startswith("gs://") else None
    with tempfile.TemporaryDirectory() as folder:
        model = storage.fetch(options.model_dir, Path(folder))
        if options.dry_run:
            print(preview(Serving.parse(serving), model, run, address))
            return None
        # Deploying fails if another run changes the champion after this line.
        champion = open_registry(registry).champion_number()
        return deploy(registry, model, metrics, run, reason, champion, serving, address)


def _read_object(value: str, option: str) -> dict[str, Any]:
    document = read_json(value, option)
    if not isinstance(document, dict):
        raise UserError(f"{option} {value}: must be a JSON object.")
    return document


if __name__ == "__main__":
    run_command(main)
