"""Helpers for the Terraform tests: copies of the configurations, plans as JSON, combinations of settings."""

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PROJECTS = {"dev": "my-project-dev", "prod": "my-project-prod"}
DIGEST = f"@sha256:{64 * '0'}"
IMAGES = {
    name: f"europe-west4-docker.pkg.dev/my-project-dev/digit-reader/{name}{DIGEST}"
    for name in ("trigger_function", "data_ingestion")
}
REPOSITORY = {
    "github-actions": {"name": "owner/name", "id": "12345"},
    "gitlab": {"name": "group/name", "id": "67890"},
    "azure-devops": {
        "name": "organisation/project/connection",
        "id": "01234567-89ab-cdef-0123-456789abcdef",
    },
    "cloud-build": {"name": "connection/repository"},
}
EXISTING = {
    "network": "projects/shared/global/networks/theirs",
    "subnetwork": "projects/shared/regions/europe-west4/subnetworks/theirs",
    "build_pool": "projects/shared/locations/europe-west4/workerPools/theirs",
    "key_ring": "projects/shared/locations/europe-west4/keyRings/theirs",
    "keys": {
        "storage": "projects/shared/locations/europe-west4/keyRings/theirs/cryptoKeys/buckets"
    },
    "images": "projects/my-project-dev/locations/europe-west4/repositories/theirs",
    "buckets": {"data": "their-data"},
    "accounts": {"trainer": "their-trainer@my-project-dev.iam.gserviceaccount.com"},
}
FACTORS: dict[str, list[Any]] = {
    "environment": ["dev", "prod"],
    "encryption": ["google-managed", "customer-managed"],
    "ci": list(REPOSITORY),
    "data_ingestion": ["scheduled-job", "managed-airflow", "none"],
    "private": [False, True],
    "existing": [False, True],
    "more": [False, True],  # a schedule, a budget, a Workbench instance, batched files
}


def pairwise(factors: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Return a few combinations that cover every pair of values of two factors."""
    names = list(factors)
    combinations = [
        dict(zip(names, values, strict=True)) for values in itertools.product(*factors.values())
    ]
    missing = {pair for case in combinations for pair in _pairs(case)}
    selection = []
    while missing:
        best = max(combinations, key=lambda case: len(missing & set(_pairs(case))))
        missing -= set(_pairs(best))
        selection.append(best)
    return selection


def _pairs(case: Mapping[str, Any]) -> Iterator[Any]:
    return itertools.combinations(case.items(), 2)


def settings_of(base: Mapping[str, Any], case: Mapping[str, Any]) -> dict[str, Any]:
    """Return project.yaml for a combination."""
    document: dict[str, Any] = json.loads(json.dumps(base))
    cloud = document["cloud"]
    for key in ("encryption", "ci", "data_ingestion", "private"):
        cloud[key] = case[key]
    cloud["region"] = "europe-west4"
    cloud["repository"] = {**REPOSITORY[case["ci"]], "branch": "main"}
    cloud["environments"] = {
        "dev": {"project": PROJECTS["dev"]},
        "prod": {"project": PROJECTS["prod"], "promote_from": "dev"},
    }
    if case["existing"]:
        cloud["environments"][case["environment"]]["existing"] = EXISTING
    if case["more"]:
        cloud["events"] = {"schedule": "0 4 * * 1", "batch_window_minutes": 30}
        cloud["budget"] = {"monthly": 100, "billing_account": "01ABCD-23EF45-678901"}
        cloud["workbench"] = True
        document["data"]["source"] = "gs://rows/all.csv"
    return document


@dataclass(frozen=True)
class Configuration:
    """An initialised copy of one of the two configurations, with local state."""

    folder: Path

    @classmethod
    def of(cls, project: Path, copy: Path, part: str, version: str = "") -> "Configuration":
        """Copy a project's configuration: a lock file of the fake providers must not reach the project.

        Args:
            part: "" or "foundation".
            version: version constraint of the providers; "": unchanged.
        """
        shutil.copytree(
            project / "level_2_cicd",
            copy / "level_2_cicd",
            ignore=shutil.ignore_patterns("rehearsal", ".terraform*"),
        )
        shutil.copy(project / "project.yaml", copy)
        configuration = cls(copy / "level_2_cicd" / "terraform" / part)
        (configuration.folder / "local_override.tf").write_text(
            'terraform {\n  backend "local" {}\n}\n', encoding="utf-8"
        )
        if version:
            versions = configuration.folder / "versions.tf"
            text = versions.read_text(encoding="utf-8")
            assert text.count('">= 6.50, < 8"') == 2
            versions.write_text(text.replace(">= 6.50, < 8", version), encoding="utf-8")
        configuration.run("init", "-input=false")
        return configuration

    def run(self, *words: str, fails: bool = False) -> str:
        """Run Terraform and return its output."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("TF_VAR_")
        }
        plain = [] if words[0] == "providers" else ["-no-color"]  # which lacks that option
        done = subprocess.run(
            ["terraform", words[0], *plain, *words[1:]],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    def plan(
        self, environment: str, document: Mapping[str, Any], images: Mapping[str, str] | None = None
    ) -> "Plan":
        """Plan one environment of a project.yaml."""
        self.run(
            "plan",
            "-input=false",
            "-lock=false",
            "-out=plan.bin",
            *self.variables(environment, document, images),
        )
        return Plan(json.loads(self.run("show", "-json", "plan.bin")))

    def variables(
        self, environment: str, document: Mapping[str, Any], images: Mapping[str, str] | None = None
    ) -> list[str]:
        """Return the command line options of the variables."""
        path = self.folder / "planned.yaml"
        path.write_text(json.dumps(document), encoding="utf-8")  # JSON is YAML too
        options = [f"-var=environment={environment}", "-var=project_file=./planned.yaml"]
        return options if images is None else [*options, f"-var=images={json.dumps(images)}"]


@dataclass(frozen=True)
class Plan:
    """The output of `terraform show -json`."""

    document: dict[str, Any]

    @property
    def resources(self) -> list[dict[str, Any]]:
        """The planned resources: address, type, index, known values."""
        return list(_managed(self.document["planned_values"]["root_module"]))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The values of all resources of a type."""
        return [resource["values"] for resource in self.resources if resource["type"] == kind]

    def types(self) -> set[str]:
        """The types of the planned resources."""
        return {resource["type"] for resource in self.resources}

    def output(self, name: str) -> Any:
        """The planned value of an output."""
        return self.document["planned_values"]["outputs"][name]["value"]


def _managed(module: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for resource in module.get("resources", []):
        if resource["mode"] == "managed":
            yield resource
    for child in module.get("child_modules", []):
        yield from _managed(child)


def read_settings(project: Path) -> dict[str, Any]:
    """Read a project's project.yaml."""
    document: dict[str, Any] = yaml.safe_load(
        (project / "project.yaml").read_text(encoding="utf-8")
    )
    return document
