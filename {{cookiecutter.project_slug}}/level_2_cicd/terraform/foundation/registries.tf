# Images, by content: a tag is a hash of what went in, and never moves. Compiled pipelines have a repository of their own.
resource "google_artifact_registry_repository" "images" {
  count         = local.existing.images == "" ? 1 : 0
  repository_id = local.chosen.name
  location      = local.chosen.region
  format        = "DOCKER"
  description   = "Images of ${local.chosen.name}"
  kms_key_name  = try(module.names.keys.registry, null)

  docker_config {
    immutable_tags = true
  }

  vulnerability_scanning_config {
    enablement_config = "INHERITED" # from the project, where its API is on
  }

  # What a tag names may be in use: a version of the model, or an environment that it was promoted to.
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
  repository_id = module.names.templates
  location      = local.chosen.region
  format        = "KFP"
  description   = "Compiled pipelines of ${local.chosen.name}"
  kms_key_name  = try(module.names.keys.registry, null)

  depends_on = [google_kms_crypto_key_iam_member.this, google_project_service.this]
}
