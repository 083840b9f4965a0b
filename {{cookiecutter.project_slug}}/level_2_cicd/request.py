"""Asks for a run of the published pipeline, through Pub/Sub: the trigger function starts it, as its own service account.

python -m level_2_cicd.request [--event WORDS] [--set hyperparameters.epochs=50]            make request does it

The parameters are compared with what is published before anything is sent. SET may hold several KEY=VALUE, as in every command.
PUBSUB_EMULATOR_HOST names another server than Google's; no credentials are looked for then.
"""

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.errors import UserError, run_command
from core.paths import project_root
from gcp import pipeline_template, pipeline_version
from gcp.client import NO_CREDENTIALS
from gcp.environment import Environment, resolve_environment
from level_2_cicd.trigger_function_container import request as request_message
from project.settings import load_settings

SCHEMA = Path("level_2_cicd/trigger_function_container/request.avsc")


def fields() -> dict[str, type]:
    """The fields of a request; see request_message."""
    return request_message.read_fields(project_root() / SCHEMA)


def compose(
    event: str,
    parameters: Mapping[str, Any] | None = None,
    version: str = "",
    actor: str = "",
    attempt: int = 1,
) -> dict[str, Any]:
    """A request.

    Args:
        event: what happened; the same words never start two runs.
        parameters: put over the published ones; a key may go into a mapping: hyperparameters.epochs.
        version: a published version; otherwise the one that is current when the request arrives.
        actor: who asks; otherwise this process's user.
    """
    return {
        "event": event,
        "version": version,
        "parameters": json.dumps(parameters or {}, ensure_ascii=False),
        "actor": actor or os.environ.get("USER") or "somebody",
        "attempt": attempt,
    }


def publish(environment: Environment, message: Mapping[str, Any]) -> str:
    """Send a request; returns the id that Pub/Sub gave it.

    It may be repeated: what was sent twice starts one run.

    Raises:
        ApiError: it was refused, or nobody answers.
        UserError: a field is wrong, or there are no credentials.
    """
    data = request_message.encode(message, fields())
    from gcp import client as api

    topic = environment.topic("requests")
    try:
        answered = api.call(
            _client().publish,
            {"topic": topic, "messages": [{"data": data}]},
            f"asking for a run, at {topic}",
        )
    except api.ApiError as error:
        if error.code != 404:
            raise
        raise UserError(
            f"there is no topic {topic}. Terraform makes it: make foundation ENVIRONMENT={environment.environment}"
        ) from None
    return str(answered.message_ids[0])


def _client() -> Any:
    """A client of Pub/Sub.

    Raises:
        UserError: there are no credentials.
    """
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import DefaultCredentialsError
    from google.pubsub_v1 import PublisherClient

    emulator = os.environ.get("PUBSUB_EMULATOR_HOST", "")
    if emulator:
        transport = PublisherClient.get_transport_class("rest")
        return PublisherClient(
            transport=transport(
                host=emulator, url_scheme="http", credentials=AnonymousCredentials()
            )
        )
    try:
        return PublisherClient()
    except DefaultCredentialsError:
        raise UserError(NO_CREDENTIALS) from None


def by_hand() -> str:
    """An event that nobody else has: who asks, and when."""
    return (
        f"by hand {os.environ.get('USER') or 'somebody'} {datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
    )


def assignments() -> list[str]:
    """KEY=VALUE of the SET variable.

    Raises:
        UserError: it cannot be read.
    """
    text = os.environ.get("SET", "")
    try:
        return shlex.split(text)  # as in project.settings, which would put them over project.yaml
    except ValueError as error:
        raise UserError(f"SET: {text!r} cannot be read: {error}.") from None


def options() -> argparse.ArgumentParser:
    """What can be asked."""
    parser = argparse.ArgumentParser(
        prog="python -m level_2_cicd.request",
        description="Ask for a run of the published pipeline.",
    )
    add = parser.add_argument
    add(
        "--event",
        default="",
        help="what happened; the same words never start two runs; otherwise you, now",
    )
    add("--version", default="", help="a published version; otherwise the current one")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter, over the published ones; after SET's",
    )
    add("--actor", default="", help="who asks; otherwise you")
    add("--attempt", type=int, default=1, help="2 and more: run the same event once again")
    add("--environment", help="of project.yaml; otherwise the first one")
    add("--dry-run", action="store_true", help="check, print what would be sent, and send nothing")
    return parser


def main() -> None:
    """Check, and ask."""
    asked = options().parse_args()
    environment = resolve_environment(
        load_settings(""), asked.environment
    )  # SET is for the run, and not for project.yaml
    if environment.by_hand:
        raise UserError(
            f"environment {environment.environment} is one that you made by hand (bucket in project.yaml): no function listens there. "
            "`make level1 RUNNER=vertex` starts a run."
        )
    found = pipeline_version.read(pipeline_version.templates_folder(environment), asked.version)
    changes = dict(
        pipeline_template.assigned(found.spec, text) for text in [*assignments(), *asked.set]
    )
    request_message.values(found, changes)
    message = compose(asked.event or by_hand(), changes, asked.version, asked.actor, asked.attempt)
    request_message.check(message, fields())
    if asked.dry_run:
        print(json.dumps(message, indent=2, ensure_ascii=False))
        return
    identity = publish(environment, message)
    print(
        f"asked for a run of version {found.version}: message {identity} on {environment.topic('requests')}, event '{message['event']}'"
    )


if __name__ == "__main__":
    run_command(main)
