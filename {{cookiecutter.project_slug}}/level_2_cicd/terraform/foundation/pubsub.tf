# Topics: requests for runs, object notifications of the data bucket, and undeliverable messages.
# The stack creates their subscriptions.
resource "google_pubsub_schema" "request" {
  name       = "${local.name}-request"
  type       = "AVRO"
  definition = file("${path.module}/../../trigger_function_container/request.avsc")

  depends_on = [google_project_service.this]
}

resource "google_pubsub_topic" "this" {
  for_each                   = local.names.topics
  name                       = basename(each.value)
  kms_key_name               = try(local.names.keys.pubsub, null)
  message_retention_duration = "604800s" # 7 days

  message_storage_policy {
    allowed_persistence_regions = [local.region]
  }

  dynamic "schema_settings" {
    for_each = each.key == "requests" ? [google_pubsub_schema.request.id] : []
    content {
      schema   = schema_settings.value
      encoding = "JSON"
    }
  }

  depends_on = [google_kms_crypto_key_iam_member.this]
}
