"""A double of Pub/Sub's topics: it keeps what is published, and delivers nothing by itself.

PUBSUB_EMULATOR_HOST=`host` brings Google's client to it. Where messages must travel there is the emulator of the Cloud SDK.
"""

import base64
import binascii
import json
import re
from typing import Any

from rehearsal.server import ApiError, FakeServer, Request, Response


class FakePubSub(FakeServer):
    """The topics, which are there as soon as something is published to them.

    Attributes:
        messages: what was published, in order: (topic, data, attributes).
    """

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.messages: list[tuple[str, bytes, dict[str, str]]] = []
        self.routes = [("POST", r"/v1/(projects/[^/]+/topics/[^/:]+):publish", "topics.publish", self._publish)]

    @property
    def host(self) -> str:
        """Where it listens, as the client wants it: 127.0.0.1:PORT."""
        return self.address.removeprefix("http://")

    def _publish(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        try:
            body = json.loads(request.body)
            unknown = {*body, *(key for message in body["messages"] for key in message)} - {"messages", "data", "attributes"}
            sent = [
                (base64.b64decode(message.get("data", ""), validate=True), message.get("attributes", {}))
                for message in body["messages"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
            raise ApiError(400, f"Invalid JSON payload received. {error}") from None
        if unknown or not sent or not all(data or attributes for data, attributes in sent):
            raise ApiError(400, f"a message has data or attributes, and nothing else: {', '.join(unknown)}")
        first = len(self.messages) + 1
        self.messages += [(found[1], data, attributes) for data, attributes in sent]
        return [data for data, _ in sent], Response({"messageIds": [str(first + place) for place in range(len(sent))]})
