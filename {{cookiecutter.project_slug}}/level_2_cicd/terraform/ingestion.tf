# Optional ingestion of new data into `incoming/`: a scheduled Cloud Run job or Managed Airflow.
locals {
  _has_job = (
    local.settings.data_ingestion == "scheduled-job" && contains(keys(var.images), "data_ingestion")
  )
}

resource "google_cloud_run_v2_job" "ingestion" {
  count               = local._has_job ? 1 : 0
  name                = "${local.name}-ingestion"
  location            = local.region
  deletion_protection = false # stateless

  template {
    template {
      service_account = local.names.accounts.ingestion
      encryption_key  = try(local.names.keys.run, null)
      max_retries     = 2
      timeout         = "3600s"

      containers {
        image = var.images.data_ingestion
        env {
          name  = "INCOMING"
          value = local.incoming
        }
        resources {
          limits = { cpu = "1", memory = "2Gi" }
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
}

resource "google_cloud_scheduler_job" "ingestion" {
  count       = local._has_job ? 1 : 0
  name        = "${local.name}-ingestion"
  region      = local.region
  description = "Starts the ingestion job"
  schedule    = local.settings.events.ingest
  time_zone   = "Etc/UTC"

  http_target {
    http_method = "POST"
    uri         = "https://run.googleapis.com/v2/${google_cloud_run_v2_job.ingestion[0].id}:run"
    oauth_token {
      service_account_email = local.names.accounts.trigger
    }
  }

  retry_config {
    retry_count = 3
  }
}

# Billed around the clock; see `make cost`.
resource "google_composer_environment" "this" {
  count  = local.settings.data_ingestion == "managed-airflow" ? 1 : 0
  name   = local.name
  region = local.region

  config {
    environment_size           = "ENVIRONMENT_SIZE_SMALL"
    enable_private_environment = local.settings.private

    software_config {
      image_version = "composer-3-airflow-3.1.7-build.12"
      env_variables = { INCOMING = local.incoming }
    }

    node_config {
      service_account = local.names.accounts.ingestion
      network         = local.settings.private ? local.names.network : null
      subnetwork      = local.settings.private ? local.names.subnetwork : null
    }

    dynamic "encryption_config" {
      for_each = try(local.names.keys.airflow, null)[*]
      content {
        kms_key_name = encryption_config.value
      }
    }
  }
}
