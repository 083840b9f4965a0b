# The function that starts runs: a Cloud Run service with an image of this project, by digest.
# Only Pub/Sub calls it, as the service account `trigger`.
locals {
  has_function = contains(keys(var.images), "trigger_function")
}

resource "google_cloud_run_v2_service" "trigger" {
  count               = local.has_function ? 1 : 0
  name                = "${local.name}-trigger"
  location            = local.region
  description         = "Starts one run for each event"
  ingress             = "INGRESS_TRAFFIC_INTERNAL_ONLY" # includes Pub/Sub of this project
  deletion_protection = false                           # stateless

  template {
    service_account                  = local.names.accounts.function
    encryption_key                   = try(local.names.keys.run, null)
    timeout                          = "120s"
    max_instance_request_concurrency = 8

    scaling {
      min_instance_count = 0
      max_instance_count = 4
    }

    containers {
      image = var.images.trigger_function

      resources {
        limits            = { cpu = "1", memory = "1Gi" }
        cpu_idle          = true
        startup_cpu_boost = true
      }

      dynamic "env" {
        for_each = {
          PROJECT              = local.project
          REGION               = local.region
          PIPELINE_ROOT        = "gs://${local.names.buckets.pipeline_root}"
          TEMPLATES            = "gs://${local.names.buckets.storage}/templates/train-and-register"
          SERVICE_ACCOUNT      = local.names.accounts.pipeline
          KMS_KEY              = try(local.names.keys.vertex, "")
          INCOMING             = local.incoming
          NETWORK_ATTACHMENT   = local.names.network_attachment
          DATA_SOURCE          = local.settings.data_source
          BATCH_WINDOW_MINUTES = tostring(local.settings.events.batch_window_minutes)
        }
        content {
          name  = env.key
          value = env.value
        }
      }
    }

    dynamic "vpc_access" {
      for_each = local.settings.private ? [1] : []
      content {
        egress = "ALL_TRAFFIC"
        network_interfaces {
          network    = local.names.network
          subnetwork = local.names.subnetwork
        }
      }
    }
  }
}
