"""Base class of the collections of Vertex AI's resources: names, get and list."""

from typing import Any, ClassVar

from google.cloud.aiplatform_v1 import types

from level_2_cicd.rehearsal.protojson import as_json, canonical, list_page, now, parse_query
from level_2_cicd.rehearsal.server import ApiError, Json, Request, route

ONE = "/{id}"


class Collection:
    """The resources of one kind, by name; subclasses add and override calls."""

    plural: ClassVar[str]
    kind: ClassVar[Any]

    def __init__(self, vertex: Any) -> None:
        self.vertex = vertex
        self.by_name: dict[str, Any] = {}

    def name(self, request: Request, identity: str = "") -> str:
        """Return the resource name of a request's path, or with `identity` of a new resource."""
        # With the project's number, so that a project's ID and number mean the same resource.
        return f"{canonical(request['parent'])}/{self.plural}/{identity or request['id']}"

    def not_found(self, name: str) -> ApiError:
        """Return the error for an unknown name."""
        return ApiError(404, f"The {self.kind.__name__} does not exist: {name}")

    def check_new(self, name: str, hint: str = "") -> None:
        """Reject an existing name."""
        if name in self.by_name:
            raise ApiError(409, f"The {self.kind.__name__} {name} already exists{hint}")

    def find(self, request: Request) -> Any:
        """Return the message of the resource named by a request's path."""
        name = self.name(request)
        if name not in self.by_name:
            raise self.not_found(name)
        return self.by_name[name]

    def in_location(self, request: Request) -> list[Any]:
        """Return the messages in the location of a request's path."""
        prefix = f"{canonical(request['parent'])}/"
        return [message for name, message in self.by_name.items() if name.startswith(prefix)]

    def request_type(self, verb: str, plural: str = "") -> Any:
        """Return the type of a call's request message."""
        return getattr(types, f"{verb}{self.kind.__name__}{plural}Request")

    def view(self, message: Any) -> Json:
        """Convert a message to the response of a call."""
        return as_json(message)

    def touch(self, message: Any) -> Any:
        """Set the update time and a new etag."""
        message.update_time, message.etag = now(), self.vertex.new_id()
        return message

    def look(self, request: Request) -> None:
        """Advance time: poll all operations."""
        # Clients that poll the resource, not its operation, must see it progress too.
        self.vertex.tick()

    @route("GET", "", "list")
    def list_all(self, request: Request) -> Json:
        query = parse_query(self.request_type("List", "s"), request, parent=request["parent"])
        request.message = query
        return list_page(self.in_location(request), query, self.plural)

    @route("GET", ONE, "get")
    def get(self, request: Request) -> Json:
        self.look(request)
        name = self.name(request)  # a model's name includes the version in the path
        request.message = parse_query(self.request_type("Get"), request, name=name)
        return self.view(self.find(request))
