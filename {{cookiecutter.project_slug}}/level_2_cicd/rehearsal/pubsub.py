"""Fake of Pub/Sub's topics: store published messages without delivering them.

PUBSUB_EMULATOR_HOST=`host` sends Google's client here. See pubsub_emulator.py for delivery.
"""

import base64
from typing import Any

from level_2_cicd.rehearsal.server import ApiError, FakeServer, Json, Request, route


class FakePubSub(FakeServer):
    """The topics; the first message to a topic creates it.

    Attributes:
        messages: published messages in order: (topic, data, attributes).
    """

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.messages: list[tuple[str, bytes, dict[str, str]]] = []

    @route("POST", r"/v1/(?P<topic>projects/[^/]+/topics/[^/:]+):publish", "topics.publish")
    def _publish(self, request: Request) -> Json:
        body: Any = request.json()
        try:
            fields = {*body, *(field for message in body["messages"] for field in message)}
            # Strict base64: by default, Python drops invalid characters.
            messages = [
                (base64.b64decode(one.get("data", ""), validate=True), one.get("attributes", {}))
                for one in body["messages"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ApiError(400, f"Invalid JSON payload received. {error}") from None
        # Pub/Sub rejects a message without data and attributes.
        unknown = ", ".join(fields - {"messages", "data", "attributes"})
        if unknown or not messages or not all(data or attributes for data, attributes in messages):
            raise ApiError(400, f"a message has data or attributes, nothing else; got {unknown}")
        first = len(self.messages) + 1
        self.messages += [(request["topic"], data, attributes) for data, attributes in messages]
        request.message = [data for data, _ in messages]
        return {"messageIds": [str(first + index) for index in range(len(messages))]}
