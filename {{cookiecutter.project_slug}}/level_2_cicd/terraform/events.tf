# What the function hears: requests (a push, a person, the clock) and files that came, changed or went. A message is delivered
# again until the function has answered; what it refuses for good ends among the dead letters, where it is kept for a week.
locals {
  # A file that waits for its window to close is delivered again and again; see cloud.events.fold_minutes.
  # Otherwise thirty attempts are some four hours: an outage of Google's, or a first push that is not released yet, may take as long.
  attempts = { requests = 30, data = local.chosen.fold_minutes > 0 ? 100 : 30 }
}

resource "google_pubsub_subscription" "push" {
  for_each             = local.has_function ? local.attempts : {}
  name                 = "${local.chosen.name}-${each.key}"
  topic                = module.names.topics[each.key]
  ack_deadline_seconds = 120

  push_config {
    push_endpoint = google_cloud_run_v2_service.trigger[0].uri
    oidc_token {
      service_account_email = module.names.accounts.trigger
      audience              = google_cloud_run_v2_service.trigger[0].uri
    }
  }

  retry_policy {
    minimum_backoff = "10s"
    maximum_backoff = "600s"
  }

  dead_letter_policy {
    dead_letter_topic     = module.names.topics["dead-letters"]
    max_delivery_attempts = each.value
  }

  expiration_policy {
    ttl = "" # never, however long nothing happens
  }
}

resource "google_pubsub_subscription" "dead_letters" {
  name                       = "${local.chosen.name}-dead-letters"
  topic                      = module.names.topics["dead-letters"]
  message_retention_duration = "604800s" # 7 days
  ack_deadline_seconds       = 60

  expiration_policy {
    ttl = ""
  }
}

resource "google_storage_notification" "data" {
  bucket             = module.names.buckets.data
  topic              = module.names.topics.data
  payload_format     = "JSON_API_V1"
  event_types        = ["OBJECT_FINALIZE", "OBJECT_ARCHIVE", "OBJECT_DELETE"]
  object_name_prefix = local.incoming
}

resource "google_cloud_scheduler_job" "schedule" {
  count       = local.chosen.schedule == "" ? 0 : 1
  name        = "${local.chosen.name}-schedule"
  region      = local.chosen.region
  description = "Asks for a run by the clock"
  schedule    = local.chosen.schedule
  time_zone   = "Etc/UTC"

  pubsub_target {
    topic_name = module.names.topics.requests
    # The function adds the time: a message of the clock is always the same.
    data = base64encode(jsonencode({ event = "schedule", version = "", parameters = "{}", actor = "schedule", attempt = 1 }))
  }

  retry_config {
    retry_count = 3
  }
}
