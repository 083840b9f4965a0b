"""The fake of Vertex AI: models, endpoints, traffic, predictions, operations."""

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from google.api_core import exceptions
from google.cloud import aiplatform_v1 as api
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from level_2_cicd.rehearsal import protojson
from level_2_cicd.rehearsal.server import Response
from level_2_cicd.rehearsal.vertex import FakeVertex

from tests.vertex_calls import (
    PLACE,
    RESOURCES,
    client,
    create_endpoint,
    deploy,
    predict,
    send,
    set_traffic,
    traffic_of,
    undeploy,
    upload,
)


@pytest.fixture
def vertex() -> Iterator[FakeVertex]:
    with FakeVertex() as vertex:
        yield vertex


# ── models ──────────────────────────────────────────────────────────────────────────────────


def aliases_of(vertex: FakeVertex, model: str) -> dict[str, set[str]]:
    versions = client(vertex, "Model").list_model_versions(name=model)
    return {version.version_id: set(version.version_aliases) for version in versions}


def test_versions_are_numbered_and_an_alias_is_on_one_version(vertex: FakeVertex) -> None:
    first = upload(vertex, "candidate", labels={"commit": "a1"})
    second = upload(vertex, "candidate", parent=first.model)
    name = first.model
    assert (first.model_version_id, second.model_version_id) == ("1", "2")
    assert first.model == second.model
    assert aliases_of(vertex, name) == {"1": {"default"}, "2": {"candidate"}}

    models = client(vertex, "Model")
    aliases = ["champion", "default", "-candidate"]
    models.merge_version_aliases(name=f"{name}@2", version_aliases=aliases)
    assert aliases_of(vertex, name) == {"1": set(), "2": {"champion", "default"}}
    models.merge_version_aliases(name=f"{name}@1", version_aliases=["champion"])
    assert aliases_of(vertex, name) == {"1": {"champion"}, "2": {"default"}}

    versions = {"": "2", "@1": "1", "@champion": "1", "@default": "2"}
    for suffix, version in versions.items():
        assert models.get_model(name=f"{name}{suffix}").version_id == version
    assert models.get_model(name=f"{name}@1").labels == {"commit": "a1"}
    with pytest.raises(exceptions.NotFound):
        models.get_model(name=f"{name}@candidate")
    request = {"parent": PLACE, "filter": 'display_name="digits"'}
    assert [model.version_id for model in models.list_models(request=request)] == ["2"]


@pytest.mark.parametrize(
    ("aliases", "parent", "fields", "error", "message"),
    [
        ([], f"{PLACE}/models/7", {}, exceptions.NotFound, "models/7"),
        ([], "", {"container_spec": {"health_route": "/h"}}, exceptions.BadRequest, "image_uri"),
        (["1"], "", {}, exceptions.BadRequest, "'1'"),
    ],
)
def test_an_invalid_upload_is_rejected(
    vertex: FakeVertex,
    aliases: list[str],
    parent: str,
    fields: dict[str, Any],
    error: type,
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        upload(vertex, *aliases, parent=parent, **fields)


def test_a_models_id_is_valid_and_unique(vertex: FakeVertex) -> None:
    models, model = client(vertex, "Model"), {"display_name": "x", "artifact_uri": "gs://b/m"}
    request = {"parent": PLACE, "model_id": "digits", "model": model}
    assert models.upload_model(request=request).result().model.endswith("/models/digits")
    with pytest.raises(exceptions.Conflict, match="parent_model"):
        models.upload_model(request=request)
    with pytest.raises(exceptions.BadRequest, match="model_id"):
        models.upload_model(request={**request, "model_id": "7up"})


@pytest.mark.parametrize(
    ("version", "alias", "message"),
    [
        ("", "champion", "a version is required"),
        ("@1", "-default", "`default` cannot be removed"),
        ("@1", "2nd", "'2nd'"),
    ],
)
def test_an_invalid_alias_is_rejected(
    vertex: FakeVertex, version: str, alias: str, message: str
) -> None:
    name = upload(vertex).model
    with pytest.raises(exceptions.BadRequest, match=message):
        client(vertex, "Model").merge_version_aliases(
            name=f"{name}{version}", version_aliases=[alias]
        )
    assert aliases_of(vertex, name) == {"1": {"default"}}


def test_a_version_names_its_deployments(vertex: FakeVertex) -> None:
    name, endpoint = upload(vertex).model, create_endpoint(vertex)
    deployed = deploy(vertex, endpoint, f"{name}@1")
    model = client(vertex, "Model").get_model(name=f"{name}@1")
    assert [ref.deployed_model_id for ref in model.deployed_models] == [deployed]


# ── endpoints ───────────────────────────────────────────────────────────────────────────────


def test_a_canary_from_deployment_to_undeployment_of_the_old(vertex: FakeVertex) -> None:
    endpoint, model = create_endpoint(vertex), upload(vertex, "champion").model
    account = "predictor@digits.iam.gserviceaccount.com"
    old = deploy(vertex, endpoint, f"{model}@champion", {"0": 100}, service_account=account)
    upload(vertex, "candidate", parent=model)
    new = deploy(vertex, endpoint, f"{model}@candidate", {"0": 10, old: 90})
    assert traffic_of(vertex, endpoint) == {old: 90, new: 10}
    with pytest.raises(exceptions.BadRequest, match="still has 90 %"):
        undeploy(vertex, endpoint, old)
    assert dict(set_traffic(vertex, endpoint, {new: 100}).traffic_split) == {new: 100}
    undeploy(vertex, endpoint, old)
    [deployed] = client(vertex, "Endpoint").get_endpoint(name=endpoint).deployed_models
    assert (deployed.id, deployed.model, deployed.model_version_id) == (new, model, "2")
    message = vertex.calls("endpoints.deployModel")[0]
    assert message.deployed_model.service_account == account
    assert message.deployed_model.dedicated_resources == api.DedicatedResources(RESOURCES)
    assert message.traffic_split == {"0": 100}
    undeploy(vertex, endpoint, new)  # the last one may have traffic
    assert traffic_of(vertex, endpoint) == {}


TOO_FEW = {"machine_spec": {"machine_type": "n"}}


@pytest.mark.parametrize(
    ("traffic", "fields", "message"),
    [
        ({"0": 90}, {}, "90 is the sum"),
        ({"0": 50, "7": 50}, {}, "no DeployedModel 7"),
        ({"0": 120, "1": -20}, {"id": "2"}, "sum|no DeployedModel"),
        ({"0": 100}, {"id": "one"}, "'one'"),
        ({"0": 100}, {"dedicated_resources": TOO_FEW}, "min_replica_count"),
        ({"0": 100}, {"dedicated_resources": {**RESOURCES, "min_replica_count": 4}}, "less than"),
        ({"0": 100}, {"dedicated_resources": None}, "is required"),
        ({"0": 100}, {"model": ""}, "model is required"),
    ],
)
def test_an_invalid_deployment_changes_nothing(
    vertex: FakeVertex, traffic: dict[str, int], fields: dict[str, Any], message: str
) -> None:
    endpoint, model = create_endpoint(vertex), upload(vertex).model
    with pytest.raises(exceptions.BadRequest, match=message):
        deploy(vertex, endpoint, **{"model": model, "traffic": traffic, **fields})
    assert not client(vertex, "Endpoint").get_endpoint(name=endpoint).deployed_models


def test_an_existing_id_and_unknown_models_are_rejected(vertex: FakeVertex) -> None:
    endpoint, model = create_endpoint(vertex), upload(vertex).model
    assert deploy(vertex, endpoint, model, {"0": 100}, id="7") == "7"
    with pytest.raises(exceptions.Conflict, match="7 already exists"):
        deploy(vertex, endpoint, model, id="7")
    with pytest.raises(exceptions.NotFound, match="@9"):
        deploy(vertex, endpoint, f"{model}@9")
    with pytest.raises(exceptions.NotFound, match="DeployedModel 8"):
        undeploy(vertex, endpoint, "8")


def test_an_update_with_an_old_etag_or_of_other_fields_is_rejected(vertex: FakeVertex) -> None:
    endpoint, model = create_endpoint(vertex), upload(vertex).model
    first, second = deploy(vertex, endpoint, model, {"0": 100}), deploy(vertex, endpoint, model)
    endpoints = client(vertex, "Endpoint")
    etag = endpoints.get_endpoint(name=endpoint).etag
    assert etag
    set_traffic(vertex, endpoint, {first: 90, second: 10}, etag)
    with pytest.raises(exceptions.Conflict, match="has changed since"):
        set_traffic(vertex, endpoint, {second: 100}, etag)
    assert traffic_of(vertex, endpoint) == {first: 90, second: 10}
    set_traffic(vertex, endpoint, {second: 100})
    assert traffic_of(vertex, endpoint) == {second: 100}
    with pytest.raises(exceptions.BadRequest, match="99 is the sum"):
        set_traffic(vertex, endpoint, {second: 99})
    with pytest.raises(exceptions.BadRequest, match="network cannot be changed"):
        endpoints.update_endpoint(endpoint={"name": endpoint}, update_mask="network")


def test_endpoints_are_found_by_display_name(vertex: FakeVertex) -> None:
    create_endpoint(vertex, "other")
    name = create_endpoint(vertex, "digits")
    request = {"parent": PLACE, "filter": 'display_name="digits"'}
    endpoints = client(vertex, "Endpoint").list_endpoints(request=request)
    assert [endpoint.name for endpoint in endpoints] == [name]


def test_the_traffic_sums_up_after_any_calls() -> None:
    class Calls(RuleBasedStateMachine):
        """Valid and invalid calls in any order; the endpoint must be valid after each."""

        @initialize()
        def start(self) -> None:
            self.name, self.model = create_endpoint(vertex), upload(vertex).model
            self.uri = f"{vertex.address}/v1/{self.name}"

        @property
        def endpoint(self) -> Any:
            return vertex.endpoints.by_name[self.name]

        def split(self, data: st.DataObject, *others: str) -> dict[str, int]:
            known = [*(deployed.id for deployed in self.endpoint.deployed_models), *others, "42"]
            ids, share = st.sampled_from(known), st.sampled_from([0, 10, 50])
            pairs = st.tuples(ids, share, ids)
            valid = pairs.map(lambda p: {p[2]: p[1], p[0]: 100 - (p[1] if p[0] != p[2] else 0)})
            invalid = st.dictionaries(ids, st.sampled_from([0, 10, 50, 90, 100]), max_size=3)
            return data.draw(st.one_of(valid, invalid, st.just({})))

        @rule(data=st.data())
        def deploy(self, data: st.DataObject) -> None:
            resources = {"machineSpec": {"machineType": "n"}, "minReplicaCount": 1}
            deployed = {"model": self.model, "dedicatedResources": resources}
            body = {"deployedModel": deployed, "trafficSplit": self.split(data, "0")}
            send("POST", f"{self.uri}:deployModel", body)

        @precondition(lambda self: self.endpoint.deployed_models)
        @rule(data=st.data())
        def undeploy(self, data: st.DataObject) -> None:
            known = [deployed.id for deployed in self.endpoint.deployed_models]
            identity = data.draw(st.sampled_from([*known, "42"]))
            body = {"deployedModelId": identity, "trafficSplit": self.split(data)}
            send("POST", f"{self.uri}:undeployModel", body)

        @rule(data=st.data())
        def change(self, data: st.DataObject) -> None:
            uri, body = f"{self.uri}?updateMask=trafficSplit", {"trafficSplit": self.split(data)}
            assert send("PATCH", uri, body)[0] in {200, 400}

        @invariant()
        def traffic_is_valid(self) -> None:
            if hasattr(self, "name"):
                traffic = self.endpoint.traffic_split
                assert sum(traffic.values()) in {0, 100}
                assert set(traffic) <= {deployed.id for deployed in self.endpoint.deployed_models}

    with FakeVertex() as vertex:
        limits = settings(max_examples=20, stateful_step_count=20)
        run_state_machine_as_test(Calls, settings=limits)
        calls = ("deployModel", "undeployModel", "patch")
        successes = {call: len(vertex.calls(f"endpoints.{call}")) for call in calls}
        assert min(successes.values()) >= 5, successes


# ── predictions ─────────────────────────────────────────────────────────────────────────────


def test_each_deployed_model_gets_its_share_evenly(vertex: FakeVertex) -> None:
    endpoint, model = create_endpoint(vertex), upload(vertex).model
    old = deploy(vertex, endpoint, model, {"0": 100})
    upload(vertex, parent=model)
    new = deploy(vertex, endpoint, f"{model}@2", {"0": 10, old: 90})
    vertex.predictor = lambda deployed, body: Response(
        {"predictions": [deployed.model_version_id, json.loads(body)]}
    )
    responses = [predict(vertex, endpoint) for _ in range(20)]
    ids = [response.deployed_model_id for response in responses]
    assert [ids[:10].count(new), ids[10:].count(new)] == [1, 1]
    assert ids.count(old) == 18
    sources = {(response.model, response.model_version_id) for response in responses}
    assert sources == {(model, "1"), (model, "2")}
    assert list(responses[0].predictions) == ["1", {"instances": [{"x": 1.0}]}]


def test_raw_predictions_and_errors_of_the_container_pass(vertex: FakeVertex) -> None:
    endpoint = create_endpoint(vertex)
    with pytest.raises(exceptions.BadRequest, match="no deployed model with traffic"):
        predict(vertex, endpoint)
    deployed = deploy(vertex, endpoint, upload(vertex).model, {"0": 100})
    with pytest.raises(exceptions.MethodNotImplemented, match=r"FakeVertex\.predictor"):
        predict(vertex, endpoint)
    vertex.predictor = lambda deployed, body: Response(body[::-1])
    # Google's client wraps the body when it uses REST.
    request = urllib.request.Request(f"{vertex.address}/v1/{endpoint}:rawPredict", b"abc")
    with urllib.request.urlopen(request) as response:
        assert response.read() == b"cba"
        assert response.headers["X-Vertex-AI-Deployed-Model-Id"] == deployed
    assert vertex.calls("endpoints.rawPredict") == [b"abc"]
    error = {"error": "instance 0: x is missing"}
    vertex.predictor = lambda deployed, body: Response(error, 400)
    with pytest.raises(exceptions.BadRequest, match="instance 0: x is missing"):
        predict(vertex, endpoint)


# ── operations ──────────────────────────────────────────────────────────────────────────────


def test_a_slow_operation_takes_that_many_polls(vertex: FakeVertex) -> None:
    vertex.slow_operations = 1
    endpoints = client(vertex, "Endpoint")
    operation = endpoints.create_endpoint(parent=PLACE, endpoint={"display_name": "slow"})
    assert list(endpoints.list_endpoints(parent=PLACE)) == []
    assert operation.result().display_name == "slow"
    assert len(vertex.calls("operations.get")) == 2


def test_pending_operations_are_listed_and_can_be_cancelled(
    vertex: FakeVertex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protojson, "PAGE", 1)
    endpoint, model = create_endpoint(vertex), upload(vertex).model
    vertex.slow_operations = 1
    endpoints = client(vertex, "Endpoint")
    deployed = {"id": "7", "model": model, "dedicated_resources": RESOURCES}
    request = {"endpoint": endpoint, "deployed_model": deployed}
    operation = endpoints.deploy_model(request=request)
    with pytest.raises(exceptions.Conflict, match="7 is being deployed"):
        endpoints.deploy_model(request=request)
    first = endpoints.list_operations({"name": endpoint})
    query = {"name": endpoint, "page_token": first.next_page_token}
    second = endpoints.list_operations(query)
    operations = [*first.operations, *second.operations]
    assert operations[-1].name == operation.operation.name
    assert [one.done for one in operations] == [True, False]
    assert not second.next_page_token
    endpoints.cancel_operation({"name": operation.operation.name})
    with pytest.raises(exceptions.Cancelled, match="cancelled"):
        operation.result()
    vertex.slow_operations = 0
    assert not endpoints.get_endpoint(name=endpoint).deployed_models
    assert endpoints.deploy_model(request=request).result().deployed_model.id == "7"


def test_an_operation_fails_if_the_endpoint_has_changed(vertex: FakeVertex) -> None:
    endpoint, model = create_endpoint(vertex), upload(vertex).model
    deploy(vertex, endpoint, model, {"0": 100})
    new = deploy(vertex, endpoint, model)
    vertex.slow_operations = 1
    request = {"endpoint": endpoint, "deployed_model_id": new}
    operation = client(vertex, "Endpoint").undeploy_model(request=request)
    set_traffic(vertex, endpoint, {new: 100})
    with pytest.raises(exceptions.GoogleAPICallError, match="still has 100 %"):
        operation.result()
    assert traffic_of(vertex, endpoint) == {new: 100}
