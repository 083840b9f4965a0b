# The metadata of all runs, created before the first run because its key cannot change later.
# Vertex AI creates it on first use: set existing.metadata_store if the project has it already.
resource "google_vertex_ai_metadata_store" "this" {
  count       = module.config.existing.metadata_store ? 0 : 1
  provider    = google-beta
  name        = "default"
  region      = local.region
  description = "Runs of ${local.name}"

  dynamic "encryption_spec" {
    for_each = try(local.names.keys.vertex, null)[*]
    content {
      kms_key_name = encryption_spec.value
    }
  }
}

resource "google_vertex_ai_endpoint" "this" {
  #checkov:skip=CKV2_GCP_33:requires IAM permission; private mode resolves Google's APIs internally
  name         = local.names.endpoint
  display_name = local.name
  description  = "Serves the champion model"
  location     = local.region
  region       = local.region

  dynamic "encryption_spec" {
    for_each = try(local.names.keys.vertex, null)[*]
    content {
      kms_key_name = encryption_spec.value
    }
  }

  lifecycle {
    # The pipeline deploys models and splits the traffic.
    ignore_changes = [traffic_split]
  }
}
