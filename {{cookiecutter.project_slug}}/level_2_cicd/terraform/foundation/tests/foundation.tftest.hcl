# Run `terraform init -backend=false && terraform test` in ..; the providers are mocks, so it needs
# no account.
mock_provider "google" {}
mock_provider "google-beta" {}

variables {
  project_file = "../tests/project.yaml"
  environment  = "dev"
}

run "dev_builds" {
  command = plan

  assert {
    condition = !anytrue([
      for key in keys(google_artifact_registry_repository_iam_member.this) :
      endswith(key, " source")
    ])
    error_message = "dev must not read the images of another environment."
  }
  assert {
    condition     = google_kms_crypto_key.this["storage"].rotation_period == "7776000s"
    error_message = "Keys must rotate."
  }
  assert {
    condition = alltrue([
      for bucket in google_storage_bucket.this : bucket.public_access_prevention == "enforced"
    ])
    error_message = "No bucket may be public."
  }
}

run "prod_copies" {
  command = plan

  variables {
    environment = "prod"
  }

  assert {
    condition = one([
      for key, grant in google_artifact_registry_repository_iam_member.this : grant.role
      if endswith(key, " source")
    ]) == "roles/artifactregistry.reader"
    error_message = "prod must read dev's images and must not write them."
  }
  assert {
    condition = strcontains(
      google_iam_workload_identity_pool_provider.this[0].attribute_condition,
      "environment_protected == 'true'"
    )
    error_message = "Only the CI's protected environment may deploy to prod."
  }
}
