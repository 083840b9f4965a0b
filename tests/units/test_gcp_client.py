"""Calls of Google's APIs: what is repeated and what is not, what must happen once, and what a person reads when they fail."""

import pytest
import requests
from gcp import client as api
from gcp.client import ApiError
from google.api_core import exceptions
from google.auth.exceptions import DefaultCredentialsError, RefreshError, TransportError
from level_2_cicd.rehearsal.vertex import FakeVertex

JOB = "projects/some-project/locations/europe-west4/customJobs/1"
GPU_QUOTA = "The following quota metrics exceed quota limits: aiplatform.googleapis.com/custom_model_training_nvidia_l4_gpus"
CALL_QUOTA = "Quota exceeded for quota metric 'Requests' and limit 'Requests per minute per region'"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(api, "FIRST_WAIT", 0.001)


@pytest.fixture
def vertex(monkeypatch):
    with FakeVertex() as double:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", double.address + "/")
        yield double


def list_jobs(**options):
    service = api.client("JobService", "europe-west4")
    return api.call(
        service.list_custom_jobs, {"parent": JOB.rsplit("/", 2)[0]}, "listing", **options
    )


class Calls:
    """A client's method that answers in turn with these, and raises those that are errors."""

    def __init__(self, *answers):
        self.answers, self.received = list(answers), []

    def __call__(self, request, timeout, retry):
        self.received.append(timeout)
        return retry(self._answer)() if retry else self._answer()

    def _answer(self):
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


TRANSIENT = [
    exceptions.TooManyRequests("slow down"),
    exceptions.TooManyRequests(CALL_QUOTA),
    exceptions.InternalServerError("oops"),
    exceptions.Unknown("stream removed"),
    exceptions.ServiceUnavailable("later"),
    exceptions.DeadlineExceeded("too slow"),
    requests.exceptions.ConnectionError("refused"),
    requests.exceptions.Timeout("late"),
    requests.exceptions.ChunkedEncodingError("half"),
    TransportError("no route"),
]
LASTING = [
    exceptions.TooManyRequests(GPU_QUOTA),
    exceptions.ResourceExhausted(
        "Resources are insufficient in region: europe-west4. Please try a different region."
    ),
    exceptions.Forbidden("no"),
    exceptions.NotFound("none"),
    exceptions.BadRequest("bad"),
    exceptions.AlreadyExists("there"),
    RefreshError("invalid_grant"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_may_pass_is_repeated(error):
    assert api.call(Calls(error, error, "answer"), {}, "asking") == "answer"


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_will_not_pass_is_told_at_once(error):
    method = Calls(error, "answer")
    with pytest.raises(ApiError, match=r"^asking failed: ") as told:
        api.call(method, {}, "asking")
    assert method.answers == ["answer"]
    assert not told.value.transient


def test_what_must_not_happen_twice_is_tried_once():
    method = Calls(exceptions.ServiceUnavailable("later"), "answer")
    with pytest.raises(ApiError) as told:
        api.call(method, {}, "asking", repeatable=False)
    assert (told.value.code, told.value.transient, method.answers) == (503, True, ["answer"])


def test_retries_end_and_the_last_reason_is_told():
    method = Calls(*[exceptions.ServiceUnavailable("under repair")] * 1000)
    with pytest.raises(ApiError, match="asking failed: under repair") as told:
        api.call(method, {}, "asking", timeout=0.05)
    assert (told.value.code, told.value.transient) == (503, True)
    assert method.received == [0.05]  # a call's own deadline is no longer


def test_each_call_has_a_deadline():
    method = Calls("answer")
    api.call(method, {}, "asking")
    assert method.received == [api.DEADLINE]


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"status": 429}, {"status": 0}, {"status": 0, "done": True}], ids=str
)
def test_faults_over_the_wire(vertex, fault):
    vertex.fail("customJobs.list", times=2, **fault)
    assert list(list_jobs()) == []
    vertex.fail("customJobs.list", **fault)
    with pytest.raises(ApiError):
        list_jobs(repeatable=False)


def test_an_answer_of_the_api_itself_is_told_without_its_address(vertex):
    with pytest.raises(ApiError, match=r"^looking failed: The CustomJob does not exist") as told:
        api.call(api.client("JobService", "europe-west4").get_custom_job, {"name": JOB}, "looking")
    assert told.value.code == 404
    assert "http" not in str(told.value)


def test_without_credentials_the_command_that_gives_them_is_told(monkeypatch):
    def none(*_, **__):
        raise DefaultCredentialsError("none")

    monkeypatch.delenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", raising=False)
    monkeypatch.setattr("google.auth.default", none)
    with pytest.raises(api.UserError, match="gcloud auth application-default login"):
        api.client("JobService", "europe-west4")


# ── once ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def refusal(code, transient=False):
    return ApiError("refused", code, transient)


LOST = refusal(503, transient=True)


class World:
    """Something that may be there, and attempts to make it: each is (is it made?, the error that is answered)."""

    def __init__(self, *attempts, there=()):
        self.there, self.attempts, self.asked = list(there), list(attempts), 0

    def find(self):
        self.asked += 1
        return self.there[0] if self.there else None

    def create(self):
        made, error = self.attempts.pop(0)
        if made:
            self.there.append("made")
        if error:
            raise error
        return "made"


@pytest.mark.parametrize(
    ("world", "answer"),
    [
        (World(there=["found"]), "found"),
        (World((True, None)), "made"),
        (World((True, LOST)), "made"),  # the answer was lost
        (World((False, LOST), (True, None)), "made"),
        (World((False, LOST), (True, LOST)), "made"),
        (World((True, refusal(409))), "made"),  # another process was quicker
    ],
)
def test_what_must_not_be_made_twice_is_made_once(world, answer):
    assert api.get_or_create(world.find, world.create) == answer
    assert len(world.there) == 1
    assert world.attempts == []


def test_a_refusal_is_told_and_not_repeated():
    world = World((False, refusal(403)), (True, None))
    with pytest.raises(ApiError):
        api.get_or_create(world.find, world.create)
    assert (world.there, world.asked) == ([], 1)


def test_the_time_that_looking_takes_is_no_attempt(monkeypatch):
    """It may have waited for the end of what was there before."""
    clock = [0.0]
    monkeypatch.setattr(api.time, "monotonic", lambda: clock[0])

    class Slow(World):
        def find(self):
            clock[0] += api.RETRY_TIMEOUT + 1 if self.asked == 0 else 0
            return super().find()

    assert (
        api.get_or_create((world := Slow((False, LOST), (True, None))).find, world.create) == "made"
    )


def test_attempts_end(monkeypatch):
    monkeypatch.setattr(api, "RETRY_TIMEOUT", 0.0)
    world = World(*[(False, LOST)] * 3)
    with pytest.raises(ApiError):
        api.get_or_create(world.find, world.create)
    assert len(world.attempts) == 2


# ── long operations ─────────────────────────────────────────────────────────────────────────────────────────────────
class Operation:
    """One that ends with this."""

    def __init__(self, ending):
        self.ending = ending

    def result(self, timeout, retry):
        assert timeout == api.OPERATION_TIMEOUT
        return Calls(self.ending)(None, None, retry)


def test_a_long_operation_is_waited_for():
    assert api.wait_for_operation(Operation("result"), "deploying") == "result"


def test_what_failed_on_googles_side_is_not_tried_again():
    with pytest.raises(ApiError, match=r"^deploying failed: ") as told:
        api.wait_for_operation(
            Operation(exceptions.Aborted("model server never became ready")), "deploying"
        )
    assert not told.value.transient


# ── what a person reads ─────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            exceptions.Forbidden(
                "Vertex AI API has not been used in project 1 before or it is disabled"
            ),
            "gcloud services enable",
        ),
        (
            exceptions.Forbidden("You do not have permission iam.serviceAccounts.actAs on it"),
            "add-iam-policy",
        ),
        (
            exceptions.Forbidden("Permission 'aiplatform.customJobs.create' denied"),
            "roles/aiplatform.user",
        ),
        (
            exceptions.Forbidden("Permission denied on Cloud KMS cryptoKey"),
            "without access",
        ),
        (
            exceptions.Unauthorized("Request had invalid authentication credentials"),
            "gcloud auth application-default login",
        ),
        (RefreshError("invalid_grant: Bad Request"), "gcloud auth application-default login"),
        (exceptions.NotFound("The specified bucket does not exist"), "level_1_pipeline/README.md"),
        (
            exceptions.BadRequest("Image europe-docker.pkg.dev/p/r/train@sha256:1 not found"),
            "make containers PUSH=1",
        ),
        (
            exceptions.BadRequest("Unsupported region: location is not supported"),
            "cloud.region in project.yaml",
        ),
        (exceptions.TooManyRequests(GPU_QUOTA), "a quota is used up"),
        (
            exceptions.ResourceExhausted("The zone does not have enough resources available"),
            "make gpu-jobs",
        ),
        (exceptions.ServiceUnavailable("later"), "nothing is started twice"),
        (requests.exceptions.ConnectionError("Name or service not known"), "check the network"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_is_one_line_that_says_what_to_do(error, advice):
    told = str(api.explain(error, "starting the job"))
    assert told.startswith("starting the job failed: ")
    assert advice.lower() in told.lower()
    assert "\n" not in told


def test_a_long_answer_is_cut_and_lines_are_joined():
    told = str(api.explain(exceptions.BadRequest("line\n" * 500), "asking"))
    assert told.startswith("asking failed: line line")
    assert len(told) < api.LONGEST_MESSAGE + 100


def test_labels_are_made_to_fit():
    wanted = {
        "Commit": "ABC-dirty",
        "actor": "Ada.Lovelace@example.com",
        "1st": "é",
        "run": "x" * 100,
        "empty": "",
    }
    assert api.labels(wanted) == {
        "commit": "abc-dirty",
        "actor": "ada-lovelace-example-com",
        "run": "x" * 63,
    }
