# terraform init -backend=false && terraform test, in this folder's parent; providers are made up, so it needs no account.
mock_provider "google" {}
mock_provider "google-beta" {}

variables {
  project_file = "../tests/project.yaml"
  environment  = "dev"
}

run "dev_builds" {
  command = plan

  assert {
    condition     = length(google_artifact_registry_repository_iam_member.source) == 0
    error_message = "dev builds its own images."
  }
  assert {
    condition     = google_kms_crypto_key.this["storage"].rotation_period == "7776000s"
    error_message = "Keys must rotate."
  }
  assert {
    condition     = alltrue([for bucket in google_storage_bucket.this : bucket.public_access_prevention == "enforced"])
    error_message = "No bucket may be public."
  }
}

run "prod_promotes" {
  command = plan

  variables {
    environment = "prod"
  }

  assert {
    condition     = google_artifact_registry_repository_iam_member.source[0].role == "roles/artifactregistry.reader"
    error_message = "prod reads dev's images, and no more."
  }
  assert {
    condition     = strcontains(google_iam_workload_identity_pool_provider.this[0].attribute_condition, "environment_protected == 'true'")
    error_message = "Only the CI's protected environment may deploy to prod."
  }
}
