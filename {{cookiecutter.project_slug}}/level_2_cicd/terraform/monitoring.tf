# Alerts and a dashboard. The budget is in foundation/, because it belongs to the billing account.
locals {
  _endpoint = join(" AND ", [
    "resource.type = 'aiplatform.googleapis.com/Endpoint'",
    "resource.labels.endpoint_id = '${google_vertex_ai_endpoint.this.name}'",
  ])
  _online      = "metric.type = 'aiplatform.googleapis.com/prediction/online"
  _queue       = "resource.type = 'pubsub_subscription'"
  _undelivered = "metric.type = 'pubsub.googleapis.com/subscription/num_undelivered_messages'"
  _dead_letters = join("", [
    "resource.labels.subscription_id = '", google_pubsub_subscription.dead_letters.name, "'"
  ])

  # Aligner, reducer, and the clauses of a filter.
  _series = {
    predictions = ["RATE", "SUM", local._endpoint, "${local._online}/prediction_count'"]
    responses   = ["RATE", "SUM", local._endpoint, "${local._online}/response_count'"]
    latency = [
      "PERCENTILE_95", "MAX", local._endpoint, "${local._online}/prediction_latencies'"
    ]
    replicas     = ["MEAN", "SUM", local._endpoint, "${local._online}/replicas'"]
    queue        = ["MAX", "SUM", local._queue, local._undelivered]
    dead_letters = ["MAX", "MAX", local._queue, local._dead_letters, local._undelivered]
    errors = [
      "RATE", "SUM", local._endpoint, "${local._online}/response_count'",
      "metric.labels.response_code = monitoring.regex.full_match('5..')",
    ]
    function_errors = [
      "RATE", "SUM", "resource.type = 'cloud_run_revision'",
      "resource.labels.service_name = '${local.name}-trigger'",
      "metric.type = 'run.googleapis.com/request_count'",
      "metric.labels.response_code_class = '5xx'",
    ]
    run_duration = [
      "MAX", "MAX", "resource.type = 'aiplatform.googleapis.com/PipelineJob'",
      "metric.type = 'aiplatform.googleapis.com/pipelinejob/duration'",
    ]
  }
  # Filters need double quotes, which the table above writes as single ones to be readable.
  _filters = {
    for name, series in local._series :
    name => replace(join(" AND ", slice(series, 2, length(series))), "'", "\"")
  }

  _alerts = {
    "error rate" = {
      series = "errors", denominator = "responses", threshold = 0.01, seconds = 300
      advice = <<-EOT
        More than 1 % of the requests to the endpoint fail. `make status RUNNER=vertex` shows the
        champion; `make rollback RUNNER=vertex VERSION=N` returns to an older version.
      EOT
    }
    "latency" = {
      series = "latency", denominator = null, threshold = 1000, seconds = 300
      advice = <<-EOT
        5 % of the requests take longer than a second. In project.yaml, add replicas
        (cloud.serve.replicas) or choose a larger machine (cloud.serve.machine).
      EOT
    }
    "dead letters" = {
      series = "dead_letters", denominator = null, threshold = 0, seconds = 0
      advice = <<-EOT
        The function rejected a request or file event permanently; its log has the reason. Message:
        `gcloud pubsub subscriptions pull ${local.name}-dead-letters --project=${local.project}`
      EOT
    }
    "function" = {
      series = "function_errors", denominator = null, threshold = 0.05, seconds = 600
      advice = <<-EOT
        The function that starts runs returns errors; its log has the reason. Pub/Sub retries, so
        no event is lost yet.
      EOT
    }
  }

  _charts = [
    ["Predictions per second", "predictions"], ["Errors per second", "errors"],
    ["Latency, 95th percentile, ms", "latency"], ["Replicas", "replicas"],
    ["Undelivered events", "queue"], ["Pipeline run duration, s", "run_duration"],
  ]
}

# Created by the foundation, whose budget uses it too.
data "google_monitoring_notification_channel" "email" {
  display_name = "${local.name} alerts"
  type         = "email"
}

resource "google_monitoring_alert_policy" "metric" {
  for_each              = local._alerts
  display_name          = "${local.title}: ${each.key}"
  combiner              = "OR"
  notification_channels = [data.google_monitoring_notification_channel.email.name]
  severity              = "ERROR"

  conditions {
    display_name = each.key
    condition_threshold {
      filter             = local._filters[each.value.series]
      denominator_filter = try(local._filters[each.value.denominator], null)
      comparison         = "COMPARISON_GT"
      threshold_value    = each.value.threshold
      duration           = "${each.value.seconds}s"

      aggregations {
        alignment_period     = "300s"
        per_series_aligner   = "ALIGN_${local._series[each.value.series][0]}"
        cross_series_reducer = "REDUCE_${local._series[each.value.series][1]}"
      }

      dynamic "denominator_aggregations" {
        for_each = each.value.denominator[*]
        content {
          alignment_period     = "300s"
          per_series_aligner   = "ALIGN_${local._series[denominator_aggregations.value][0]}"
          cross_series_reducer = "REDUCE_${local._series[denominator_aggregations.value][1]}"
        }
      }

      trigger {
        count = 1
      }
    }
  }

  documentation {
    content   = each.value.advice
    mime_type = "text/markdown"
  }
}

resource "google_monitoring_alert_policy" "run_failed" {
  display_name          = "${local.title}: run failed"
  combiner              = "OR"
  notification_channels = [data.google_monitoring_notification_channel.email.name]
  severity              = "ERROR"

  conditions {
    display_name = "run failed"
    condition_matched_log {
      filter = join(" AND ", [
        "resource.type=\"aiplatform.googleapis.com/PipelineJob\"",
        "jsonPayload.state=\"PIPELINE_STATE_FAILED\"",
      ])
    }
  }

  alert_strategy {
    notification_rate_limit {
      period = "3600s"
    }
  }

  documentation {
    content   = "The champion is unchanged. `make status RUN=ID` shows the steps; the ID is logged."
    mime_type = "text/markdown"
  }
}

resource "google_monitoring_dashboard" "this" {
  dashboard_json = jsonencode({
    displayName = local.title
    mosaicLayout = {
      columns = 12
      # The API omits zero positions; if they were set, each plan would show a change.
      tiles = [for index, chart in local._charts : merge(
        index % 2 == 0 ? {} : { xPos = 6 }, index < 2 ? {} : { yPos = floor(index / 2) * 4 }, {
          width = 6, height = 4, widget = {
            title = chart[0]
            xyChart = {
              dataSets = [{
                plotType = "LINE"
                timeSeriesQuery = {
                  timeSeriesFilter = {
                    filter = local._filters[chart[1]]
                    aggregation = {
                      alignmentPeriod    = "300s"
                      perSeriesAligner   = "ALIGN_${local._series[chart[1]][0]}"
                      crossSeriesReducer = "REDUCE_${local._series[chart[1]][1]}"
                    }
                  }
                }
              }]
            }
          }
      })]
    }
  })
}
