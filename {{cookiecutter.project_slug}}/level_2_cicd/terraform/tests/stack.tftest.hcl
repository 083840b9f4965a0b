# terraform init -backend=false && terraform test, in this folder's parent; providers are made up, so it needs no account.
mock_provider "google" {}
mock_provider "google-beta" {}

variables {
  project_file = "./tests/project.yaml"
  environment  = "dev"
}

run "without_images" {
  command = plan

  assert {
    condition     = length(google_cloud_run_v2_service.trigger) == 0 && length(google_pubsub_subscription.push) == 0
    error_message = "Before the first images there is no function, and nothing that calls it."
  }
  assert {
    condition     = google_vertex_ai_endpoint.this.encryption_spec[0].kms_key_name == "projects/my-project-dev/locations/europe-west4/keyRings/digit-reader/cryptoKeys/vertex"
    error_message = "The endpoint must have Vertex AI's key."
  }
}

run "with_images" {
  command = plan

  variables {
    images = { trigger_function = "europe-west4-docker.pkg.dev/p/n/trigger_function@sha256:0000000000000000000000000000000000000000000000000000000000000000" }
  }

  assert {
    condition     = google_cloud_run_v2_service.trigger[0].ingress == "INGRESS_TRAFFIC_INTERNAL_ONLY"
    error_message = "The function must not be open to the internet."
  }
  assert {
    condition     = google_pubsub_subscription.push["data"].dead_letter_policy[0].max_delivery_attempts == 100
    error_message = "A file that waits for its window to close is delivered many times."
  }
  assert {
    condition     = jsondecode(base64decode(google_cloud_scheduler_job.schedule[0].pubsub_target[0].data)).event == "schedule"
    error_message = "The clock must ask for a run."
  }
}

run "a_tag_is_no_digest" {
  command = plan

  variables {
    images = { trigger_function = "europe-west4-docker.pkg.dev/p/n/trigger_function:latest" }
  }

  expect_failures = [var.images]
}

run "an_environment_has_a_plain_name" {
  command = plan

  variables {
    environment = "Dev!"
  }

  expect_failures = [var.environment]
}
