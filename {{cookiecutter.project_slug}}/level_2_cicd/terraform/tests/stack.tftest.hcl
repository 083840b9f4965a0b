# Run `terraform init -backend=false && terraform test` in ..; the providers are mocks, so it needs
# no account.
mock_provider "google" {}
mock_provider "google-beta" {}

variables {
  project_file = "./tests/project.yaml"
  environment  = "dev"
}

run "without_images" {
  command = plan

  assert {
    condition = (
      length(google_cloud_run_v2_service.trigger) == 0
      && length(google_pubsub_subscription.push) == 0
    )
    error_message = "Without an image there is neither a function nor a push subscription."
  }
  assert {
    condition = (
      google_vertex_ai_endpoint.this.encryption_spec[0].kms_key_name
      == "projects/my-project-dev/locations/europe-west4/keyRings/digit-reader/cryptoKeys/vertex"
    )
    error_message = "The endpoint must use the key for Vertex AI."
  }
}

run "with_images" {
  command = plan

  variables {
    images = { trigger_function = "registry/trigger_function@sha256:${format("%064d", 0)}" }
  }

  assert {
    condition     = endswith(google_cloud_run_v2_service.trigger[0].ingress, "INTERNAL_ONLY")
    error_message = "The function must not be reachable from the internet."
  }
  assert {
    condition = (
      google_pubsub_subscription.push["data"].dead_letter_policy[0].max_delivery_attempts == 100
    )
    error_message = "A file that waits for its batch window needs many delivery attempts."
  }
  assert {
    condition = jsondecode(base64decode(
      google_cloud_scheduler_job.schedule[0].pubsub_target[0].data
    )).event == "schedule"
    error_message = "The schedule must request a run."
  }
}

run "image_with_tag" {
  command = plan

  variables {
    images = { trigger_function = "registry/trigger_function:latest" }
  }

  expect_failures = [var.images]
}

run "invalid_environment" {
  command = plan

  variables {
    environment = "Dev!"
  }

  expect_failures = [var.environment]
}
