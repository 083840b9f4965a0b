# The recipient of alerts and budget notifications, and the budget, which stops nothing.
# It is not in the stack: `infra` has no permissions on the billing account.
resource "google_monitoring_notification_channel" "email" {
  display_name = "${local.name} alerts"
  type         = "email"
  labels       = { email_address = local.settings.alerts }

  depends_on = [google_project_service.this]
}

resource "google_billing_budget" "this" {
  provider        = google.billing
  count           = local.settings.budget.monthly > 0 ? 1 : 0
  billing_account = local.settings.budget.billing_account
  display_name    = "${local.name} ${var.environment}"

  budget_filter {
    projects = ["projects/${local.number}"]
  }

  amount {
    specified_amount {
      units = tostring(local.settings.budget.monthly)
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
