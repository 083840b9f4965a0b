"""A double of what surrounds the services: which APIs are on, quotas, repositories, buckets' properties, who may do what.

One project, `Platform("my-project")`. It begins as a new project does: nothing is on, nothing is there, nothing is allowed;
a test fills the attributes. Service Usage, Artifact Registry, IAM, Resource Manager and the buckets of Cloud Storage.
"""

import json
import re
from typing import Any

from rehearsal.server import ApiError, FakeServer, Request, Response

NUMBER = "123456789012"


class FakeProject(FakeServer):
    """One project's surroundings.

    Attributes:
        services: the APIs that are on, such as "storage.googleapis.com".
        quotas: the limit of a metric in a region, such as {("custom_model_training_nvidia_l4_gpus", "europe-west4"): 1};
            the region "" is for all that are not named.
        repositories: location and name → format, such as {("europe-west4", "digit-reader"): "DOCKER"}.
        buckets: name → location, in capitals as the API gives it.
        objects: those that are there, as BUCKET/NAME.
        accounts: e-mail addresses of the service accounts that exist.
        permissions: (what, permission) that the caller has; `what` is "project", a bucket's or repository's name, or an
            account's e-mail address.
    """

    def __init__(self, project: str, port: int = 0) -> None:
        super().__init__(port)
        self.project = project
        self.services: set[str] = set()
        self.quotas: dict[tuple[str, str], int] = {}
        self.repositories: dict[tuple[str, str], str] = {}
        self.buckets: dict[str, str] = {}
        self.objects: set[str] = set()
        self.accounts: set[str] = set()
        self.permissions: set[tuple[str, str]] = set()
        ours = rf"projects/(?:{re.escape(project)}|{NUMBER})"
        repository = rf"/v1/{ours}/locations/([^/]+)/repositories/([^/:]+)"
        metric = rf"/v1beta1/{ours}/services/([^/]+)/consumerQuotaMetrics/([^/]+)/([^/]+)"
        account = r"/v1/projects/(?:-|[^/]+)/serviceAccounts/([^/:]+):testIamPermissions"
        self.routes += [
            ("GET", rf"/v1/{ours}/services:batchGet", "services.batchGet", self._services),
            ("GET", metric, "consumerQuotaMetrics.get", self._quota),
            ("GET", repository, "repositories.get", self._repository),
            ("POST", rf"{repository}:testIamPermissions", "repositories.testIamPermissions", self._repository_permissions),
            ("GET", r"/storage/v1/b/([^/]+)", "buckets.get", self._bucket),
            ("GET", r"/storage/v1/b/([^/]+)/o/(.+)", "objects.get", self._object),
            ("GET", r"/storage/v1/b/([^/]+)/iam/testPermissions", "buckets.testIamPermissions", self._bucket_permissions),
            ("POST", account, "serviceAccounts.testIamPermissions", self._account_permissions),
            ("POST", rf"/v1/{ours}:testIamPermissions", "projects.testIamPermissions", self._project_permissions),
        ]

    def _services(self, request: Request, _: re.Match[str]) -> tuple[Any, Response]:
        names = request.repeated.get("names", [])
        if not 0 < len(names) <= 30:
            raise ApiError(400, "names: from 1 to 30 services")
        found = []
        for name in names:
            known = re.fullmatch(rf"projects/(?:{re.escape(self.project)}|{NUMBER})/services/([a-z.]+\.googleapis\.com)", name)
            if not known:
                raise ApiError(400, f"names: {name} is no service of this project")
            state = "ENABLED" if known[1] in self.services else "DISABLED"
            found.append({"name": f"projects/{NUMBER}/services/{known[1]}", "parent": f"projects/{NUMBER}", "state": state})
        return names, Response({"services": found})

    def _quota(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        service, named, metric = found.groups()
        limits = {region: limit for (name, region), limit in self.quotas.items() if name == metric}
        if named != service or not limits:
            raise ApiError(404, f"Quota metric {named}/{metric} of {service} not found")
        # Numbers of 64 bits are texts in JSON; the least specific bucket comes first.
        buckets = [
            {"effectiveLimit": str(limit), **({"dimensions": {"region": region}} if region else {})}
            for region, limit in sorted(limits.items())
        ]
        limit = {"metric": f"{named}/{metric}", "unit": "1/{project}/{region}", "quotaBuckets": buckets}
        return None, Response({"metric": f"{named}/{metric}", "consumerQuotaLimits": [limit]})

    def _repository(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        location, name = found.groups()
        if (location, name) not in self.repositories:
            raise ApiError(404, f"Repository {name} not found in {location}")
        path = f"projects/{self.project}/locations/{location}/repositories/{name}"
        return None, Response({"name": path, "format": self.repositories[location, name]})

    def _repository_permissions(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._repository(request, found)
        return self._allowed(found[2], _wanted(request))

    def _bucket(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        name = found[1]
        if name not in self.buckets:
            raise ApiError(404, "The specified bucket does not exist.")
        return None, Response({"name": name, "location": self.buckets[name], "projectNumber": NUMBER})

    def _object(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._bucket(request, found)
        bucket, name = found.groups()
        if f"{bucket}/{name}" not in self.objects:
            raise ApiError(404, f"No such object: {bucket}/{name}")
        return None, Response({"bucket": bucket, "name": name})

    def _bucket_permissions(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._bucket(request, found)
        wanted = request.repeated.get("permissions", [])
        if not wanted:
            raise ApiError(400, "permissions: is missing")
        return self._allowed(found[1], wanted)

    def _account_permissions(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        if found[1] not in self.accounts:
            raise ApiError(404, f"Unknown service account: {found[1]}")
        return self._allowed(found[1], _wanted(request))

    def _project_permissions(self, request: Request, _: re.Match[str]) -> tuple[Any, Response]:
        return self._allowed("project", _wanted(request))

    def _allowed(self, what: str, wanted: list[str]) -> tuple[Any, Response]:
        """Which of the wanted permissions the caller has; the field is left out when it has none, as Google does."""
        has = [permission for permission in wanted if (what, permission) in self.permissions]
        return wanted, Response({"permissions": has} if has else {})


def _wanted(request: Request) -> list[str]:
    """The body of a question about permissions."""
    try:
        body = json.loads(request.body)
    except ValueError:
        raise ApiError(400, "Invalid JSON payload received.") from None
    wanted = body.get("permissions") if isinstance(body, dict) and set(body) == {"permissions"} else None
    if (
        not isinstance(wanted, list)
        or not wanted
        or not all(re.fullmatch(r"[a-zA-Z]+(\.[a-zA-Z]+)+", str(name)) for name in wanted)
    ):
        raise ApiError(400, f"Invalid value at 'permissions': {request.body.decode(errors='replace')}")
    return wanted
