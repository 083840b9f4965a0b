"""The fake of Artifact Registry's repositories of compiled pipelines."""

import hashlib
import re
from pathlib import Path

import pytest
import requests
from kfp import compiler, dsl
from kfp.registry import RegistryClient
from level_2_cicd.rehearsal.kfp_templates import FakeTemplateRegistry

HOSTS = r"https://(artifactregistry\.googleapis\.com|europe-west4-kfp\.pkg\.dev)"


def compiled(folder: Path, default: int) -> Path:
    """A pipeline whose parameter has this default."""

    @dsl.component(base_image="python:3.11-slim")
    def same(number: int) -> int:
        return number

    @dsl.pipeline(name="one-step")
    def one_step(number: int = default) -> None:
        same(number=number)

    compiler.Compiler().compile(one_step, str(folder / f"{default}.yaml"))
    return folder / f"{default}.yaml"


def test_kfps_client_uploads_and_downloads(tmp_path: Path) -> None:
    first, second = compiled(tmp_path, 1), compiled(tmp_path, 2)
    with FakeTemplateRegistry() as registry:
        auth = requests.auth.HTTPBasicAuth("", "")
        client = RegistryClient("https://europe-west4-kfp.pkg.dev/p/r", auth=auth)
        for key, value in client._config.items():
            client._config[key] = re.sub(HOSTS, registry.address, value)
        name, version = client.upload_pipeline(
            str(first), tags=["v1", "latest"], extra_headers={"description": "first"}
        )
        digest = hashlib.sha256(first.read_bytes()).hexdigest()
        assert (name, version) == ("one-step", f"sha256:{digest}")
        # The same content is the same version.
        assert client.upload_pipeline(str(first)) == (name, version)
        _, newer = client.upload_pipeline(str(second), tags="latest")
        package = "projects/p/locations/europe-west4/repositories/r/packages/one-step"
        resource = client.get_version(name, version)
        assert resource["name"] == f"{package}/versions/{version}"
        assert resource["description"] == "first"
        assert [tag["name"] for tag in resource["relatedTags"]] == [f"{package}/tags/v1"]
        downloads = [({"tag": "v1"}, first), ({"tag": "latest"}, second)]
        for source, content in [*downloads, ({"version": newer}, second)]:
            client.download_pipeline(name, **source, file_name=str(tmp_path / "back"))
            assert (tmp_path / "back").read_bytes() == content.read_bytes()
        for call in (client.get_version, client.download_pipeline):
            with pytest.raises(requests.HTTPError, match="404"):
                call(name, "sha256:0")
        uploads = registry.calls("templates.upload")
        assert [upload["tags"] for upload in uploads] == [["v1", "latest"], [], ["latest"]]


@pytest.mark.parametrize(
    "content", ["", "a: 1", "[", "pipelineInfo: {}", "pipelineInfo: {name: x}\nroot: {dagg: {}}"]
)
def test_an_invalid_pipeline_is_rejected(content: str) -> None:
    with FakeTemplateRegistry() as registry:
        files = {"content": content}
        response = requests.post(f"{registry.address}/p/r", files=files, timeout=10)
        assert response.status_code == 400
        assert registry.packages == {}
