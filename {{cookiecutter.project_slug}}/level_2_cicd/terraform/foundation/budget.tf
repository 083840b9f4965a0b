# Who hears when something breaks or costs; and an amount each month whose use is told. It stops nothing. It stands here and not
# in the stack: a budget belongs to the billing account, where whoever applies the stack on each push has no rights.
resource "google_monitoring_notification_channel" "email" {
  display_name = "${local.chosen.name} alerts"
  type         = "email"
  labels       = { email_address = local.chosen.alerts }

  depends_on = [google_project_service.this]
}

resource "google_billing_budget" "this" {
  provider        = google.billing
  count           = local.chosen.budget > 0 ? 1 : 0
  billing_account = local.chosen.billing
  display_name    = "${local.chosen.name} ${local.chosen.environment}"

  budget_filter {
    projects = ["projects/${local.number}"]
  }

  amount {
    specified_amount {
      units = tostring(local.chosen.budget)
    }
  }

  dynamic "threshold_rules" {
    for_each = [0.5, 0.9, 1.0]
    content {
      threshold_percent = threshold_rules.value
    }
  }

  all_updates_rule {
    monitoring_notification_channels = [google_monitoring_notification_channel.email.id]
  }
}
