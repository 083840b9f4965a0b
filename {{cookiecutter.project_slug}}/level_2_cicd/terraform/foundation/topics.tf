# Who wants a run says so in `requests`; Cloud Storage tells in `data` what happened to files; what cannot be delivered goes to
# `dead-letters`. The subscriptions are the stack's.
resource "google_pubsub_schema" "request" {
  name       = "${local.chosen.name}-request"
  type       = "AVRO"
  definition = file("${path.module}/../../trigger_function_container/request.avsc")

  depends_on = [google_project_service.this]
}

resource "google_pubsub_topic" "this" {
  for_each                   = module.names.topics
  name                       = split("/", each.value)[3]
  kms_key_name               = try(module.names.keys.pubsub, null)
  message_retention_duration = "604800s" # 7 days

  message_storage_policy {
    allowed_persistence_regions = [local.chosen.region]
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
