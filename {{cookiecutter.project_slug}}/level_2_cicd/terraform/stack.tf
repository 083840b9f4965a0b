# The stack: what each push may change. It is applied as the account `infra`, and holds no right and no key: those are the
# foundation's, which a person applies. So a push cannot give itself more than it has; a test over the plan proves it.
module "names" {
  source       = "./names"
  environment  = var.environment
  project_file = var.project_file
}

data "google_project" "this" {
  project_id = module.names.chosen.project
}

locals {
  chosen = module.names.chosen
  keys   = module.names.keys
  labels = { project = local.chosen.name, environment = local.chosen.environment, managed-by = "terraform" }
  number = data.google_project.this.number

  # The template's folder, below which `current.json` names the pipeline that runs: see launcher.kfp_publish.
  templates = "gs://${module.names.buckets.storage}/templates/train-and-register"
  incoming  = "incoming/"

  channels = [data.google_monitoring_notification_channel.email.name]
}

data "google_monitoring_notification_channel" "email" {
  display_name = "${local.chosen.name} alerts"
  type         = "email"
}

# What Vertex AI notes of runs. It must be there before the first run: its key cannot be changed afterwards.
# Where Vertex AI was used before, it is there already: existing.metadata_store.
resource "google_vertex_ai_metadata_store" "this" {
  count       = module.names.existing.metadata_store ? 0 : 1
  provider    = google-beta
  name        = "default"
  region      = local.chosen.region
  description = "Runs of ${local.chosen.name}"

  dynamic "encryption_spec" {
    for_each = try(local.keys.vertex, null)[*]
    content {
      kms_key_name = encryption_spec.value
    }
  }
}

# What is deployed to it, and who gets how many requests, is the pipeline's business.
resource "google_vertex_ai_endpoint" "this" {
  #checkov:skip=CKV2_GCP_33:only who has rights is answered; in the private mode it is reached at the network's own address for Google's APIs
  name         = module.names.endpoint
  display_name = local.chosen.name
  description  = "Answers with the champion"
  location     = local.chosen.region
  region       = local.chosen.region

  dynamic "encryption_spec" {
    for_each = try(local.keys.vertex, null)[*]
    content {
      kms_key_name = encryption_spec.value
    }
  }

  lifecycle {
    ignore_changes = [traffic_split]
  }
}
