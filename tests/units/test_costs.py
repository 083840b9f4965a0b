"""make cost: the amounts follow from the tables of machines and prices, and from project.yaml. They are reckoned again here."""

import re
import subprocess
import sys

import pytest
from core.errors import UserError
from core.paths import project_root
from level_1_pipeline.vertex import gpu_jobs, machines
from level_1_pipeline.vertex.machines import FEE, MACHINES
from level_2_cicd import costs
from level_2_cicd.costs import PRICES
from project.settings import load_settings

MONTH = 365 * 24 / 12
PLAIN = {
    "region": "europe-west4",
    "data_ingestion": "none",
    "encryption": "google-managed",
    "private": "false",
    "workbench": "false",
    "environments": "{dev: {project: ''}, prod: {project: '', promote_from: dev}}",
    "events": "{}",
    "serve": "{machine: n1-standard-4, replicas: [2, 3], canary_percent: 10}",
    "train.jobs": "[l4]",
}


def settings_with(**changed):
    """This project's settings, with a plain block `cloud` or what is changed in it; `train_jobs` is train.jobs."""
    changed = {name.replace("train_", "train."): value for name, value in changed.items()}
    return load_settings(
        " ".join(f'"cloud.{key}={value}"' for key, value in {**PLAIN, **changed}.items())
    )


def idle(**changed):
    """What an idle month of the first environment costs: what → dollars."""
    settings = settings_with(**changed)
    return {
        cost.what: cost.amount
        for cost in costs.idle(settings, next(iter(settings.cloud.environments.values())))
    }


def run(minutes, job):
    """What a run costs, by what it is for."""
    return {
        cost.what: cost
        for cost in costs.run(settings_with(train_jobs=f"[{job}]"), project_root(), minutes)
    }


def test_a_month_has_so_many_hours():
    assert costs.HOURS == MONTH


# ── a month ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("machine", "fewest", "most", "price"),
    [
        ("n1-standard-4", 2, 3, MACHINES["n1-standard-4"].price),
        ("n1-standard-4", 1, 9, MACHINES["n1-standard-4"].price),
        ("n2-standard-2", 1, 3, MACHINES["n2-standard-4"].price / 2),
        ("e2-highmem-2", 1, 1, MACHINES["e2-highmem-4"].price / 2),
        ("g2-standard-8", 1, 1, MACHINES["g2-standard-8"].price),
    ],
)
def test_the_endpoint_bills_its_fewest_replicas(machine, fewest, most, price):
    found = idle(serve=f"{{machine: {machine}, replicas: [{fewest}, {most}], canary_percent: 10}}")
    assert list(found) == ["endpoint"]
    assert found["endpoint"] == pytest.approx(
        fewest * price * FEE * MONTH, rel=1e-3
    )  # the half of a price is rounded


@pytest.mark.parametrize(
    "machine",
    ["n9-standard-4", "c2-standard-2", "g2-standard-2", "n2-standard-6", "a3-megagpu-8g", ""],
)
def test_a_machine_whose_price_is_not_known_is_one_message(machine):
    serve = f"{{machine: '{machine}', replicas: [1, 1], canary_percent: 10}}"
    with pytest.raises(
        UserError,
        match=rf"cloud\.serve\.machine in project\.yaml: the price of {machine} is not known",
    ):
        costs.report(settings_with(serve=serve), project_root(), 10.0)


def test_what_may_have_been_meant():
    with pytest.raises(UserError, match=r"near it are .*n2-standard-4"):
        costs.hour("n2-standard-44")


@pytest.mark.parametrize(
    ("changed", "what", "amount"),
    [
        ({"encryption": "customer-managed"}, "keys", 6 * PRICES["key version"]),
        ({"data_ingestion": "managed-airflow"}, "Airflow", PRICES["Airflow, small"]),
        ({"private": "true"}, "private network", PRICES["forwarding rule"] * MONTH),
        ({"workbench": "true"}, "Workbench's disks", (150 + 100) * PRICES["disk"]),
        ({"data_ingestion": "scheduled-job"}, "Cloud Scheduler", 0.0),
        ({"events": "{schedule: '0 4 * * 1'}"}, "Cloud Scheduler", 0.0),
    ],
)
def test_what_is_chosen_adds_a_line(changed, what, amount):
    before, after = idle(), idle(**changed)
    assert set(after) - set(before) == {what}
    assert after == {**before, what: pytest.approx(amount)}


@pytest.mark.parametrize(
    ("ingestion", "keys", "made"),
    [
        ("none", "{}", 6),
        ("managed-airflow", "{}", 7),
        ("none", "{storage: KEY, vertex: KEY}", 4),
        ("managed-airflow", "{storage: KEY, airflow: KEY}", 5),
        ("none", "{airflow: KEY}", 6),  # without Airflow there is none of its keys to be made
    ],
)
def test_keys_that_are_there_already_are_not_paid(ingestion, keys, made):
    key = "projects/p/locations/europe-west4/keyRings/theirs/cryptoKeys/one"
    existing = f"{{dev: {{project: '', existing: {{keys: {keys.replace('KEY', key)}}}}}}}"
    found = idle(encryption="customer-managed", data_ingestion=ingestion, environments=existing)
    assert found["keys"] == pytest.approx(made * PRICES["key version"])


def test_the_workbenchs_disks_have_a_key_of_their_own():
    with_it = idle(encryption="customer-managed", workbench="true", data_ingestion="none")
    assert with_it["keys"] == pytest.approx(7 * PRICES["key version"])


def test_a_network_that_is_there_already_is_not_paid():
    existing = "{dev: {project: '', existing: {network: projects/p/global/networks/theirs}}}"
    assert idle(private="true", environments=existing) == idle()


def test_the_disks_of_the_workbench_are_those_of_terraform():
    """They stand in its file, and the machine too."""
    text = (project_root() / "level_2_cicd" / "terraform" / "workbench.tf").read_text(
        encoding="utf-8"
    )
    machine, size = costs.WORKBENCH
    assert sum(map(int, re.findall(r"disk_size_gb\s*= (\d+)", text))) == size
    assert re.findall(r'machine_type\s*= "(.+)"', text) == [machine]


# ── a run ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("minutes", [1.0, 10.0, 90.0])
@pytest.mark.parametrize(
    ("job", "machine", "count", "more"),
    [
        ("cpu", None, 1, 0.0),
        ("l4", None, 1, 0.0),
        ("l4-two-nodes", None, 2, 0.0),
        ("h100x8", "a3-highgpu-8g", 1, 0.0),
        ("t4", None, 1, machines.GPUS["NVIDIA_TESLA_T4"].price),
    ],
)
def test_a_training_costs_its_machines_for_its_minutes(job, machine, count, more, minutes):
    """The count of machines and of GPUs is reckoned from the job's file."""
    pools = gpu_jobs.load(job, project_root())["workerPoolSpecs"]
    assert sum(pool["replicaCount"] for pool in pools) == count
    specs = {
        pool["machineSpec"]["machineType"]: pool["machineSpec"].get("acceleratorCount", 0)
        for pool in pools
    }
    [(found, gpus)] = specs.items()
    assert machine in (None, found)
    cost = run(minutes, job)["training"]
    assert cost.amount == pytest.approx(
        count * (MACHINES[found].price + gpus * more) * FEE * minutes / 60
    )
    assert cost.sign == ""
    assert cost.note.startswith(f"{minutes:g} minutes of '{job}'")
    assert "spare capacity" not in cost.note


def test_each_pool_counts_with_all_its_machines(monkeypatch):
    large = {
        "machineType": "n1-standard-8",
        "acceleratorType": "NVIDIA_TESLA_T4",
        "acceleratorCount": 2,
    }
    pools = [
        {"machineSpec": large, "replicaCount": 1},
        {"machineSpec": {"machineType": "n1-standard-4"}, "replicaCount": 3},
    ]
    monkeypatch.setattr(gpu_jobs, "resolve", lambda *_: {"workerPoolSpecs": pools})
    alone = MACHINES["n1-standard-8"].price + 2 * machines.GPUS["NVIDIA_TESLA_T4"].price
    together = (alone + 3 * MACHINES["n1-standard-4"].price) * FEE
    assert run(60.0, "l4")["training"].amount == pytest.approx(together)


def test_the_rest_of_a_run():
    found = run(10.0, "l4")
    assert list(found) == ["pipeline", "steps", "training"]
    assert found["pipeline"].amount == PRICES["run"]
    assert found["steps"].amount == pytest.approx(
        4 * 3 / 60 * MACHINES["e2-standard-4"].price * FEE
    )


def test_spare_capacity_is_marked_as_what_may_differ():
    full = run(60.0, "l4-spot")["training"]
    [pool] = gpu_jobs.load("l4-spot", project_root())["workerPoolSpecs"]
    assert full.amount == pytest.approx(MACHINES[pool["machineSpec"]["machineType"]].price * FEE)
    assert full.sign == "<"  # the price on Spot is not known, but it is less
    known = run(60.0, "h100-spot")["training"]
    [pool] = gpu_jobs.load("h100-spot", project_root())["workerPoolSpecs"]
    assert known.amount == pytest.approx(MACHINES[pool["machineSpec"]["machineType"]].spot * FEE)
    assert known.sign == "≈"
    assert all("spare capacity, whose price changes daily" in cost.note for cost in (full, known))


def test_a_price_that_nobody_knows_makes_the_sum_unknown(monkeypatch):
    unknown = machines.Machine("g2-standard-8", {"NVIDIA_L4": (1,)}, None, disks=("pd-ssd",))
    monkeypatch.setitem(MACHINES, "g2-standard-8", unknown)
    said = costs.report(settings_with(train_jobs="[l4]"), project_root(), 10.0)
    assert re.search(
        r"^  training +\?   10 minutes of 'l4'.*; its price is not known here$", said, re.M
    )
    assert re.search(r"^  together +\?$", said, re.M)
    assert "nan" not in said


def test_the_first_job_is_the_one_that_counts():
    assert run(10.0, "cpu, l4")["training"] == run(10.0, "cpu")["training"]
    with pytest.raises(UserError, match="there is no GPU job 'l5'"):
        run(10.0, "l5")


# ── predictions ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_predictions_are_a_share_of_the_endpoint():
    each = 2 * MACHINES["n1-standard-4"].price * FEE / 3600  # a second of both replicas
    found = {cost.what: cost.amount for cost in costs.predictions(settings_with())}
    assert found == {
        f"at {rate} each second": pytest.approx(1000 / rate * each) for rate in (1, 10, 100)
    }


# ── the report ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_report_adds_up():
    """Each block's lines make its sum, to the cent, and each environment has a block."""
    changed = {
        "encryption": "customer-managed",
        "private": "true",
        "workbench": "true",
        "data_ingestion": "managed-airflow",
    }
    said = costs.report(settings_with(**changed), project_root(), 10.0)
    blocks = [block for block in said.split("\n\n") if "together" in block]
    assert [block.split(":")[0].split(",")[0] for block in blocks] == [
        "dev",
        "prod",
        "one run of the pipeline",
    ]
    for block in blocks:
        *parts, total = [
            float(number.replace(",", ""))
            for number in re.findall(r"^  .+? (\d[\d,]*\.\d+)(?:   .*)?$", block, re.M)
        ]
        assert len(parts) == block.count("\n") - 1
        assert sum(parts) == pytest.approx(total, abs=0.02)


def test_a_sum_is_as_uncertain_as_its_parts():
    def signs(job):
        said = costs.report(settings_with(train_jobs=f"[{job}]"), project_root(), 10.0)
        return re.findall(r"^  together +(?:([<≈]) )?", said, re.M)[-1]

    assert [signs(job) for job in ("l4", "l4-spot", "h100-spot")] == ["≈", "<", "≈"]


def test_a_sum_of_one_is_left_out():
    said = costs.report(settings_with(), project_root(), 10.0)
    assert "together" not in said.split("\n\n")[0]


def test_the_region_of_the_prices_is_told():
    assert "Those of europe-west4 may differ." in costs.report(
        settings_with(), project_root(), 10.0
    )
    assert "may differ" not in costs.report(
        settings_with(region="us-central1"), project_root(), 10.0
    )


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────
def command(*words):
    """What make calls."""
    return subprocess.run(
        [sys.executable, "-m", "level_2_cicd.costs", *words],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


@pytest.fixture
def here(monkeypatch):
    """The project's folder, and a training job that it has."""
    monkeypatch.setenv("SET", "cloud.train.jobs=[cpu]")


def test_minutes(here):
    assert "10 minutes of 'cpu'" in command().stdout
    assert "30 minutes of 'cpu'" in command("--minutes", "30").stdout


@pytest.mark.parametrize("minutes", ["0", "x", "nan", "-5", ""])
def test_minutes_that_are_none(here, minutes):
    done = command(f"--minutes={minutes}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: MINUTES={minutes}: how many? For example: MINUTES=30\n"
