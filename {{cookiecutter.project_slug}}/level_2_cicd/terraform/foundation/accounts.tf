# One account for each actor. Nobody has a key file: those in the cloud are attached, the CI's comes by workload identity.
locals {
  purposes = {
    trainer   = "Trains on a rented machine"
    pipeline  = "Runs the pipeline's steps, registers and deploys"
    build     = "Builds images, publishes pipelines"
    infra     = "Applies the stack on each push"
    function  = "Starts a run when something happened"
    trigger   = "Delivers events to the function"
    checker   = "Checks pull requests, and only reads"
    deployer  = "The CI: starts builds"
    predictor = "Serves a model"
    ingestion = "Brings new data"
  }
}

resource "google_service_account" "this" {
  for_each     = setsubtract(keys(module.names.accounts), local.existing.accounts)
  account_id   = "${local.chosen.name}-${each.key}"
  display_name = "${local.chosen.name}: ${each.key}"
  description  = local.purposes[each.key]

  depends_on = [google_project_service.this]
}
