"""Notifications of the fake of Cloud Storage: publish object events to Pub/Sub."""

import base64
import json
import re
import urllib.request
from typing import Any

from level_2_cicd.rehearsal.server import ApiError, Json, Request, Response, route
from level_2_cicd.rehearsal.transport import timestamp

CONFIGS = "/storage/v1/b/{bucket}/notificationConfigs"
TOPIC = r"//pubsub\.googleapis\.com/projects/[^/]+/topics/[^/]+"


class Notifications:
    """The notification configurations of all buckets: {bucket: {id: configuration}}."""

    def __init__(self, storage: Any, pubsub: str) -> None:
        self.storage, self.pubsub = storage, pubsub.rstrip("/")
        self.configs: dict[str, dict[str, Json]] = {}

    @route("POST", CONFIGS, "notifications.insert")
    def _insert(self, request: Request) -> Json:
        self.storage.bucket(request["bucket"])
        config = request.message = request.json()
        if not re.fullmatch(TOPIC, config.get("topic", "")):
            raise ApiError(400, f"Invalid Google Cloud Pub/Sub topic: {config}", "invalid")
        if config.get("payload_format") not in ("JSON_API_V1", "NONE"):
            raise ApiError(400, "Invalid payload format: use JSON_API_V1 or NONE.", "invalid")
        configs = self.configs.setdefault(request["bucket"], {})
        # One above the largest ID: a number in use must not be assigned twice.
        number = str(max(map(int, configs), default=0) + 1)
        configs[number] = {**config, "kind": "storage#notification", "id": number, "etag": number}
        return configs[number]

    @route("GET", CONFIGS, "notifications.list")
    def _list(self, request: Request) -> Json:
        self.storage.bucket(request["bucket"])
        configs = self.configs.get(request["bucket"], {})
        return {"kind": "storage#notifications", "items": list(configs.values())}

    @route("DELETE", f"{CONFIGS}/{{id}}", "notifications.delete")
    def _delete(self, request: Request) -> Response:
        if self.configs.get(request["bucket"], {}).pop(request["id"], None) is None:
            raise ApiError(404, "Notification not found.", "notFound")
        return Response(b"", 204)

    def send(self, event: str, resource: Json, **attributes: str) -> None:
        """Publish an event about an object: OBJECT_FINALIZE, OBJECT_DELETE or OBJECT_ARCHIVE."""
        for number, config in self.configs.get(resource["bucket"], {}).items():
            # A configuration without event types gets all events.
            if event not in config.get("event_types", [event]):
                continue
            if not resource["name"].startswith(config.get("object_name_prefix", "")):
                continue
            standard = {
                "eventType": event,
                "bucketId": resource["bucket"],
                "objectId": resource["name"],
                "objectGeneration": resource["generation"],
                "eventTime": timestamp(),
                "notificationConfig": (
                    f"projects/_/buckets/{resource['bucket']}/notificationConfigs/{number}"
                ),
                "payloadFormat": config["payload_format"],
            }
            # Custom attributes first, so that they cannot replace the standard ones.
            has_payload = config["payload_format"] == "JSON_API_V1"
            payload = json.dumps(resource).encode() if has_payload else b""
            all_attributes = {**config.get("custom_attributes", {}), **standard, **attributes}
            message = {"data": base64.b64encode(payload).decode(), "attributes": all_attributes}
            self.publish(config["topic"], message)

    def publish(self, topic: str, message: Json) -> None:
        """Publish a message unless no Pub/Sub is configured."""
        if not self.pubsub:
            return
        uri = f"{self.pubsub}/v1/{topic.removeprefix('//pubsub.googleapis.com/')}:publish"
        body = json.dumps({"messages": [message]}).encode()
        request = urllib.request.Request(uri, body, {"Content-Type": "application/json"})
        try:
            # A proxy of the environment cannot reach loopback.
            no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            no_proxy.open(request, timeout=10).close()
        except OSError as error:
            # The object is stored: report the lost event instead of hiding it.
            message_text = f"the object is stored, but the notification to {uri} failed: {error}"
            raise ApiError(500, message_text) from None
