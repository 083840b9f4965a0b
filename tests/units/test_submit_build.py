"""The command lines with which builds are started, and what their failures say."""

import sys

import pytest
from core.errors import UserError
from gcp.environment import resolve_environment
from level_2_cicd import submit_build
from project.settings import load_settings

DEV = "cloud.environments.dev.project=my-project"


@pytest.fixture(autouse=True)
def _chosen(project, monkeypatch):
    monkeypatch.setenv("SET", DEV)


def command(settings):
    environment = resolve_environment(settings)
    return submit_build.submit_command(environment, submit_build.PUSH, {"_A": "1", "_B": ""})


def test_the_source_goes_to_the_projects_own_bucket_and_its_own_account_acts():
    settings = load_settings()
    name = settings.name
    assert command(settings) == [
        "gcloud",
        "builds",
        "submit",
        ".",
        "--config=level_2_cicd/cloudbuild.yaml",
        "--project=my-project",
        f"--region={settings.cloud.region}",
        f"--service-account=projects/my-project/serviceAccounts/{name}-build@my-project.iam.gserviceaccount.com",
        f"--gcs-source-staging-dir=gs://my-project-{name}-storage/builds/source",
        "--substitutions=_A=1,_B=",
    ]


def test_a_private_pool_is_named():
    pool = "projects/p/locations/europe-west4/workerPools/w"
    assert f"--worker-pool={pool}" in command(
        load_settings(f'{DEV} "cloud.environments.dev.existing={{build_pool: {pool}}}"')
    )
    [own] = [
        word
        for word in command(load_settings(f"{DEV} cloud.private=true"))
        if word.startswith("--worker-pool=")
    ]
    assert own.startswith("--worker-pool=projects/my-project/locations/")


def test_a_build_bears_the_codes_version(project, git, monkeypatch):
    settings = load_settings()
    with pytest.raises(UserError, match="COMMIT=1a2b3c"):
        submit_build.push_substitutions(settings, resolve_environment(settings))
    git("init")
    git("commit", "--allow-empty", "--message=first")
    assert (
        len(
            submit_build.push_substitutions(settings, resolve_environment(settings))[
                "_COMMIT"
            ].partition("-")[0]
        )
        == 40
    )
    monkeypatch.setenv("COMMIT", "1a2b")
    assert (
        submit_build.push_substitutions(settings, resolve_environment(settings))["_COMMIT"]
        == "1a2b"
    )


def test_a_program_that_is_not_there_or_fails_is_told(tmp_path):
    with pytest.raises(UserError, match="no-such-program is not installed"):
        submit_build.run(["no-such-program"])
    log = tmp_path / "logs" / "x.log"
    said = "print('more'); print('ERROR: (gcloud.builds.submit) it is off.'); print('end'); raise SystemExit(1)"
    with pytest.raises(UserError, match=r"ERROR: \(gcloud.builds.submit\) it is off. Log: .*x.log"):
        submit_build.run([sys.executable, "-c", said], log)
    page = "print('Logs: https://console.cloud.google.com/cloud-build/builds/1?project=2'); raise SystemExit(1)"
    with pytest.raises(
        UserError,
        match=r"Build: https://console.cloud.google.com/cloud-build/builds/1\?project=2 ",
    ):
        submit_build.run([sys.executable, "-c", page], log)
    log.write_text("")
    assert "no reason given" in submit_build.summarize(log)


def test_a_toolbox_that_is_not_there_is_told():
    with pytest.raises(UserError, match="toolbox"):
        # This copy of the project has no toolbox.sh.
        submit_build.image_substitutions(resolve_environment(load_settings()), None)


def test_a_job_for_the_functional_test_that_is_not_there_is_told_before_anything_is_built(
    monkeypatch,
):
    monkeypatch.setenv("COMMIT", "1a2b")
    monkeypatch.setenv("JOB_SPEC", "l5")
    with pytest.raises(UserError, match="no GPU job 'l5'"):
        submit_build.push_substitutions(load_settings(), resolve_environment(load_settings()))
