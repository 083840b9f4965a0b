"""Fake of one project's administration: enabled APIs, quotas, repositories, buckets, permissions.

Service Usage, Artifact Registry, IAM, Resource Manager, and the buckets of Cloud Storage. A new
FakeProject("my-project") has nothing; tests fill its attributes.
"""

import re

from level_2_cicd.rehearsal.server import ApiError, FakeServer, Json, Request, route

NUMBER = "123456789012"
PROJECT = "projects/OWN"  # by id or number
REPOSITORY = f"/v1/{PROJECT}/locations/{{location}}/repositories/{{repository}}"
BUCKET = "/storage/v1/b/{bucket}"
PERMISSION = r"[a-zA-Z]+(\.[a-zA-Z]+)+"


class FakeProject(FakeServer):
    """One project.

    Attributes:
        services: enabled APIs, such as "storage.googleapis.com".
        quotas: limits by metric and region, such as {("custom_model_training_nvidia_l4_gpus",
            "europe-west4"): 1}; the region "" is the default.
        repositories: formats by location and name: {("europe-west4", "digit-reader"): "DOCKER"}.
        buckets: locations by name, in upper case as in the API.
        objects: existing ones, as BUCKET/NAME.
        accounts: e-mail addresses of existing service accounts.
        permissions: the caller's: (resource, permission); the resource is "project", the name of a
            bucket or repository, or an account's e-mail address.
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
        # Only this project exists: other ids match no route.
        own = rf"projects/(?:{re.escape(project)}|{NUMBER})"
        self.routes = [
            (method, path.replace(PROJECT, own), call, handler)
            for method, path, call, handler in self.routes
        ]

    @route("GET", f"/v1/{PROJECT}/services:batchGet", "services.batchGet")
    def _services(self, request: Request) -> Json:
        names = request.message = request.repeated.get("names", [])
        # The limit of the real API: callers must split longer lists.
        if not 0 < len(names) <= 30:
            raise ApiError(400, f"names: got {len(names)} services, expected 1 to 30")
        parent, services = f"projects/{NUMBER}", []
        for name in names:
            project, _, service = name.removeprefix("projects/").partition("/services/")
            valid = re.fullmatch(r"[a-z.]+\.googleapis\.com", service)
            if not valid or project not in (self.project, NUMBER):
                raise ApiError(400, f"names: {name} is not a service of this project")
            state = "ENABLED" if service in self.services else "DISABLED"
            full_name = f"{parent}/services/{service}"
            services.append({"name": full_name, "parent": parent, "state": state})
        return {"services": services}

    @route(
        "GET",
        f"/v1beta1/{PROJECT}/services/{{service}}/consumerQuotaMetrics/{{owner}}/{{metric}}",
        "consumerQuotaMetrics.get",
    )
    def _quota(self, request: Request) -> Json:
        metric = f"{request['owner']}/{request['metric']}"
        limits = [
            (region, limit)
            for (name, region), limit in self.quotas.items()
            if name == request["metric"]
        ]
        if request["owner"] != request["service"] or not limits:
            raise ApiError(404, f"Quota metric {metric} of {request['service']} not found")
        # Protobuf's JSON writes 64-bit integers as strings; the default limit comes first.
        buckets = [
            {"effectiveLimit": str(limit)} | ({"dimensions": {"region": region}} if region else {})
            for region, limit in sorted(limits)
        ]
        limit = {"metric": metric, "unit": "1/{project}/{region}", "quotaBuckets": buckets}
        return {"metric": metric, "consumerQuotaLimits": [limit]}

    @route("GET", REPOSITORY, "repositories.get")
    def _repository(self, request: Request) -> Json:
        location, name = request["location"], request["repository"]
        if (location, name) not in self.repositories:
            raise ApiError(404, f"Repository {name} not found in {location}")
        path = f"projects/{self.project}/locations/{location}/repositories/{name}"
        return {"name": path, "format": self.repositories[location, name]}

    @route("POST", f"{REPOSITORY}:testIamPermissions", "repositories.testIamPermissions")
    def _repository_permissions(self, request: Request) -> Json:
        self._repository(request)  # 404 if it does not exist
        return self.granted(request, request["repository"])

    @route("GET", BUCKET, "buckets.get")
    def _bucket(self, request: Request) -> Json:
        name = request["bucket"]
        if name not in self.buckets:
            raise ApiError(404, "The specified bucket does not exist.")
        return {"name": name, "location": self.buckets[name], "projectNumber": NUMBER}

    @route("GET", f"{BUCKET}/o/{{object=**}}", "objects.get")
    def _object(self, request: Request) -> Json:
        self._bucket(request)
        bucket, name = request["bucket"], request["object"]
        if f"{bucket}/{name}" not in self.objects:
            raise ApiError(404, f"No such object: {bucket}/{name}")
        return {"bucket": bucket, "name": name}

    @route("GET", f"{BUCKET}/iam/testPermissions", "buckets.testIamPermissions")
    def _bucket_permissions(self, request: Request) -> Json:
        self._bucket(request)  # 404 if it does not exist
        return self.granted(request, request["bucket"])

    @route(
        "POST",
        "/v1/projects/[^/]+/serviceAccounts/{account}:testIamPermissions",
        "serviceAccounts.testIamPermissions",
    )
    def _account_permissions(self, request: Request) -> Json:
        if request["account"] not in self.accounts:
            raise ApiError(404, f"Unknown service account: {request['account']}")
        return self.granted(request, request["account"])

    @route("POST", f"/v1/{PROJECT}:testIamPermissions", "projects.testIamPermissions")
    def _project_permissions(self, request: Request) -> Json:
        return self.granted(request, "project")

    def granted(self, request: Request, resource: str) -> Json:
        """Return the requested permissions that the caller has."""
        # Cloud Storage takes the permissions in the query, the other APIs in the body.
        if request.method == "GET":
            names = request.repeated.get("permissions", [])
        else:
            body = request.json()
            names = body["permissions"] if set(body) == {"permissions"} else []
        if not names or not all(re.fullmatch(PERMISSION, str(name)) for name in names):
            text = request.body.decode(errors="replace")
            raise ApiError(400, f"Invalid value at 'permissions': {text}")
        request.message = names
        granted = [name for name in names if (resource, name) in self.permissions]
        return {"permissions": granted} if granted else {}  # Google's JSON omits empty lists
