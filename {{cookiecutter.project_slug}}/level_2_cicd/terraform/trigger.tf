# The function that starts a run when something happened. It is a service of Cloud Run that runs our own image, by digest: what
# was tested is what runs. Only Pub/Sub calls it, with the trigger's identity.
locals {
  has_function = contains(keys(var.images), "trigger_function")
}

resource "google_cloud_run_v2_service" "trigger" {
  count               = local.has_function ? 1 : 0
  name                = "${local.chosen.name}-trigger"
  location            = local.chosen.region
  description         = "Starts one run for each event"
  ingress             = "INGRESS_TRAFFIC_INTERNAL_ONLY" # Pub/Sub of this project counts as internal
  deletion_protection = false                           # it keeps nothing

  template {
    service_account                  = module.names.accounts.function
    encryption_key                   = try(local.keys.run, null)
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
          PROJECT            = local.chosen.project
          REGION             = local.chosen.region
          PIPELINE_ROOT      = "gs://${module.names.buckets.pipeline_root}"
          TEMPLATES          = local.templates
          SERVICE_ACCOUNT    = module.names.accounts.pipeline
          KMS_KEY            = try(local.keys.vertex, "")
          INCOMING           = "gs://${module.names.buckets.data}/${trimsuffix(local.incoming, "/")}"
          NETWORK_ATTACHMENT = module.names.network.attachment
          DATA_SOURCE        = module.names.chosen.data_source
          FOLD_MINUTES       = tostring(local.chosen.fold_minutes)
        }
        content {
          name  = env.key
          value = env.value
        }
      }
    }

    dynamic "vpc_access" {
      for_each = local.chosen.private ? [1] : []
      content {
        egress = "ALL_TRAFFIC"
        network_interfaces {
          network    = module.names.network.network
          subnetwork = module.names.network.subnetwork
        }
      }
    }
  }
}
