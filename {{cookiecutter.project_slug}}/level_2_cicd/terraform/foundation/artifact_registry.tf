# Image tags are content hashes, hence immutable.
resource "google_artifact_registry_repository" "images" {
  count         = local.existing.images == "" ? 1 : 0
  repository_id = local.name
  location      = local.region
  format        = "DOCKER"
  description   = "Images of ${local.name}"
  kms_key_name  = try(local.names.keys.registry, null)

  docker_config {
    immutable_tags = true
  }

  vulnerability_scanning_config {
    enablement_config = "INHERITED" # as in the project's settings
  }

  # Tagged images stay: a model version or another environment may use them.
  cleanup_policies {
    id     = "remove-untagged"
    action = "DELETE"
    condition {
      tag_state  = "UNTAGGED"
      older_than = "2592000s" # 30 days
    }
  }
  cleanup_policies {
    id     = "keep-newest"
    action = "KEEP"
    most_recent_versions {
      keep_count = 10
    }
  }

  depends_on = [google_kms_crypto_key_iam_member.this, google_project_service.this]
}

resource "google_artifact_registry_repository" "templates" {
  repository_id = local.names.templates
  location      = local.region
  format        = "KFP"
  description   = "Compiled pipelines of ${local.name}"
  kms_key_name  = try(local.names.keys.registry, null)

  depends_on = [google_kms_crypto_key_iam_member.this, google_project_service.this]
}
