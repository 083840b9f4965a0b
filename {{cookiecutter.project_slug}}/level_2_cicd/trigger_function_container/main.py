"""What functions-framework serves: each message that Pub/Sub delivers comes to `handle`. The code is level_2_cicd.trigger_function_container.events."""

import os
import sys
from pathlib import Path

import flask
import functions_framework

from core.errors import UserError
from level_2_cicd.trigger_function_container import events

try:
    FUNCTION = events.Function.make(os.environ, Path(__file__).with_name("request.avsc"))
except UserError as error:
    sys.exit(f"error: {error}")


@functions_framework.http
def handle(request: flask.Request) -> tuple[str, int]:
    """Answer one delivery."""
    return FUNCTION.answer(request.method, request.get_data())
