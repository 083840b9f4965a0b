# One service account per actor, without key files: Google Cloud attaches them to what runs there,
# an external CI uses workload identity federation.
locals {
  _purposes = {
    trainer   = "Runs training jobs"
    pipeline  = "Runs pipeline steps, registers and deploys models"
    build     = "Builds images, publishes pipelines"
    infra     = "Applies the stack on each push"
    function  = "Starts a run for each event"
    trigger   = "Delivers events to the function"
    checker   = "Checks pull requests, read-only"
    deployer  = "Starts builds from the CI"
    predictor = "Serves a model"
    ingestion = "Ingests new data"
  }
}

resource "google_service_account" "this" {
  for_each     = setsubtract(keys(local.names.accounts), keys(local.existing.accounts))
  account_id   = "${local.name}-${each.key}"
  display_name = "${local.name}: ${each.key}"
  description  = local._purposes[each.key]

  depends_on = [google_project_service.this]
}
