# Event sources of the function: requests, object notifications of the data bucket, and a schedule.
# Pub/Sub retries each message; one that the function rejects for good goes to the dead letters.
resource "google_pubsub_subscription" "push" {
  # Topic → maximum delivery attempts. 30 take about four hours: longer than an outage or the time
  # before the first release. A file waiting for its batch window (batch_window_minutes) needs more.
  for_each = local.has_function ? {
    requests = 30
    data     = local.settings.events.batch_window_minutes > 0 ? 100 : 30
  } : {}
  name                 = "${local.name}-${each.key}"
  topic                = local.names.topics[each.key]
  ack_deadline_seconds = 120

  push_config {
    push_endpoint = google_cloud_run_v2_service.trigger[0].uri
    oidc_token {
      service_account_email = local.names.accounts.trigger
      audience              = google_cloud_run_v2_service.trigger[0].uri
    }
  }

  retry_policy {
    minimum_backoff = "10s"
    maximum_backoff = "600s"
  }

  dead_letter_policy {
    dead_letter_topic     = local.names.topics["dead-letters"]
    max_delivery_attempts = each.value
  }

  expiration_policy {
    ttl = "" # never
  }
}

resource "google_pubsub_subscription" "dead_letters" {
  name                       = "${local.name}-dead-letters"
  topic                      = local.names.topics["dead-letters"]
  message_retention_duration = "604800s" # 7 days
  ack_deadline_seconds       = 60

  expiration_policy {
    ttl = ""
  }
}

resource "google_storage_notification" "data" {
  bucket             = local.names.buckets.data
  topic              = local.names.topics.data
  payload_format     = "JSON_API_V1"
  event_types        = ["OBJECT_FINALIZE", "OBJECT_ARCHIVE", "OBJECT_DELETE"]
  object_name_prefix = "incoming/"
}

resource "google_cloud_scheduler_job" "schedule" {
  count       = local.settings.events.schedule == "" ? 0 : 1
  name        = "${local.name}-schedule"
  region      = local.region
  description = "Requests a run on schedule"
  schedule    = local.settings.events.schedule
  time_zone   = "Etc/UTC"

  pubsub_target {
    topic_name = local.names.topics.requests
    # Every message is the same; the function adds the time.
    data = base64encode(jsonencode({
      event = "schedule", version = "", parameters = "{}", actor = "schedule", attempt = 1
    }))
  }

  retry_config {
    retry_count = 3
  }
}
