# Who is told what: a run that failed, an endpoint that answers badly or slowly, messages that nobody could deliver, a function
# that breaks. Budgets are the foundation's.
locals {
  endpoint = "resource.type = \"aiplatform.googleapis.com/Endpoint\" AND resource.labels.endpoint_id = \"${google_vertex_ai_endpoint.this.name}\""
  online   = "aiplatform.googleapis.com/prediction/online"

  # What a number must not exceed, for so many seconds; each is one alert.
  alerts = {
    "error rate" = {
      filter      = "${local.endpoint} AND metric.type = \"${local.online}/response_count\" AND metric.labels.response_code = monitoring.regex.full_match(\"5..\")"
      denominator = "${local.endpoint} AND metric.type = \"${local.online}/response_count\""
      aligner     = "ALIGN_RATE", reducer = "REDUCE_SUM", above = 0.01, seconds = 300
      advice      = "More than 1 % of the requests to the endpoint fail. `make status RUNNER=vertex` names the champion; `make rollback RUNNER=vertex VERSION=N` goes back to an older version."
    }
    "latency" = {
      filter      = "${local.endpoint} AND metric.type = \"${local.online}/prediction_latencies\""
      denominator = null
      aligner     = "ALIGN_PERCENTILE_95", reducer = "REDUCE_MAX", above = 1000, seconds = 300
      advice      = "One request in twenty takes longer than a second. More replicas: cloud.serve.replicas in project.yaml; a larger machine: cloud.serve.machine."
    }
    "dead letters" = {
      filter      = "resource.type = \"pubsub_subscription\" AND resource.labels.subscription_id = \"${google_pubsub_subscription.dead_letters.name}\" AND metric.type = \"pubsub.googleapis.com/subscription/num_undelivered_messages\""
      denominator = null
      aligner     = "ALIGN_MAX", reducer = "REDUCE_MAX", above = 0, seconds = 0
      advice      = "A request or a file's event was refused for good. gcloud pubsub subscriptions pull ${local.chosen.name}-dead-letters --project=${local.chosen.project} shows it; the function's log says why."
    }
    "function" = {
      filter      = "resource.type = \"cloud_run_revision\" AND resource.labels.service_name = \"${local.chosen.name}-trigger\" AND metric.type = \"run.googleapis.com/request_count\" AND metric.labels.response_code_class = \"5xx\""
      denominator = null
      aligner     = "ALIGN_RATE", reducer = "REDUCE_SUM", above = 0.05, seconds = 600
      advice      = "The function that starts runs answers with errors. Pub/Sub delivers again, so nothing is lost yet; its log says what is wrong."
    }
  }
}

resource "google_monitoring_alert_policy" "number" {
  for_each              = local.alerts
  display_name          = "${local.chosen.name} ${local.chosen.environment}: ${each.key}"
  combiner              = "OR"
  notification_channels = local.channels
  severity              = "ERROR"

  conditions {
    display_name = each.key
    condition_threshold {
      filter             = each.value.filter
      denominator_filter = each.value.denominator
      comparison         = "COMPARISON_GT"
      threshold_value    = each.value.above
      duration           = "${each.value.seconds}s"

      aggregations {
        alignment_period     = "300s"
        per_series_aligner   = each.value.aligner
        cross_series_reducer = each.value.reducer
      }

      dynamic "denominator_aggregations" {
        for_each = each.value.denominator[*]
        content {
          alignment_period     = "300s"
          per_series_aligner   = each.value.aligner
          cross_series_reducer = each.value.reducer
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
  display_name          = "${local.chosen.name} ${local.chosen.environment}: run failed"
  combiner              = "OR"
  notification_channels = local.channels
  severity              = "ERROR"

  conditions {
    display_name = "run failed"
    condition_matched_log {
      filter = "resource.type=\"aiplatform.googleapis.com/PipelineJob\" AND jsonPayload.state=\"PIPELINE_STATE_FAILED\""
    }
  }

  alert_strategy {
    notification_rate_limit {
      period = "3600s"
    }
  }

  documentation {
    content   = "A run of the pipeline failed; the champion is what it was. `make status RUN=ID` tells its story, and ID stands in the log entry."
    mime_type = "text/markdown"
  }
}

resource "google_monitoring_dashboard" "this" {
  dashboard_json = jsonencode({
    displayName = "${local.chosen.name} ${local.chosen.environment}"
    mosaicLayout = {
      columns = 12
      tiles = [
        for index, chart in [
          { title = "Predictions each second", filter = "${local.endpoint} AND metric.type = \"${local.online}/prediction_count\"", aligner = "ALIGN_RATE", reducer = "REDUCE_SUM" },
          { title = "Errors each second", filter = local.alerts["error rate"].filter, aligner = "ALIGN_RATE", reducer = "REDUCE_SUM" },
          { title = "Latency, 95 %, milliseconds", filter = local.alerts["latency"].filter, aligner = "ALIGN_PERCENTILE_95", reducer = "REDUCE_MAX" },
          { title = "Replicas", filter = "${local.endpoint} AND metric.type = \"${local.online}/replicas\"", aligner = "ALIGN_MEAN", reducer = "REDUCE_SUM" },
          { title = "Events that wait", filter = "resource.type = \"pubsub_subscription\" AND metric.type = \"pubsub.googleapis.com/subscription/num_undelivered_messages\"", aligner = "ALIGN_MAX", reducer = "REDUCE_SUM" },
          { title = "Runs of the pipeline, seconds", filter = "resource.type = \"aiplatform.googleapis.com/PipelineJob\" AND metric.type = \"aiplatform.googleapis.com/pipelinejob/duration\"", aligner = "ALIGN_MAX", reducer = "REDUCE_MAX" },
          ] : merge(index % 2 == 0 ? {} : { xPos = 6 }, index < 2 ? {} : { yPos = floor(index / 2) * 4 }, { # the API leaves out zeros
            width                                = 6
            height                               = 4
            widget = {
              title = chart.title
              xyChart = {
                dataSets = [{
                  plotType = "LINE"
                  timeSeriesQuery = {
                    timeSeriesFilter = {
                      filter = chart.filter
                      aggregation = {
                        alignmentPeriod    = "300s"
                        perSeriesAligner   = chart.aligner
                        crossSeriesReducer = chart.reducer
                      }
                    }
                  }
                }]
              }
            }
        })
      ]
    }
  })
}
