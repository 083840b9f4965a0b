# How new data come into the folder `incoming`, by choice: a container that the clock starts, or Airflow by Google. Who wants
# neither has nothing of this.
locals {
  has_job     = local.chosen.data_ingestion == "scheduled-job" && contains(keys(var.images), "data_ingestion")
  has_airflow = local.chosen.data_ingestion == "managed-airflow"
}

resource "google_cloud_run_v2_job" "ingestion" {
  count               = local.has_job ? 1 : 0
  name                = "${local.chosen.name}-ingestion"
  location            = local.chosen.region
  deletion_protection = false # it keeps nothing

  template {
    template {
      service_account = module.names.accounts.ingestion
      encryption_key  = try(local.keys.run, null)
      max_retries     = 2
      timeout         = "3600s"

      containers {
        image = var.images.data_ingestion
        env {
          name  = "INCOMING"
          value = "gs://${module.names.buckets.data}/${trimsuffix(local.incoming, "/")}"
        }
        resources {
          limits = { cpu = "1", memory = "2Gi" }
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
}

resource "google_cloud_scheduler_job" "ingestion" {
  count       = local.has_job ? 1 : 0
  name        = "${local.chosen.name}-ingestion"
  region      = local.chosen.region
  description = "Starts the container that brings new data"
  schedule    = local.chosen.ingest
  time_zone   = "Etc/UTC"

  http_target {
    http_method = "POST"
    uri         = "https://run.googleapis.com/v2/${google_cloud_run_v2_job.ingestion[0].id}:run"
    oauth_token {
      service_account_email = module.names.accounts.trigger
    }
  }

  retry_config {
    retry_count = 3
  }
}

# It bills day and night; see `make cost`.
resource "google_composer_environment" "this" {
  count  = local.has_airflow ? 1 : 0
  name   = local.chosen.name
  region = local.chosen.region

  config {
    environment_size           = "ENVIRONMENT_SIZE_SMALL"
    enable_private_environment = local.chosen.private

    software_config {
      image_version = "composer-3-airflow-3.1.7-build.12"
      env_variables = { INCOMING = "gs://${module.names.buckets.data}/${trimsuffix(local.incoming, "/")}" }
    }

    node_config {
      service_account = module.names.accounts.ingestion
      network         = local.chosen.private ? module.names.network.network : null
      subnetwork      = local.chosen.private ? module.names.network.subnetwork : null
    }

    dynamic "encryption_config" {
      for_each = try(local.keys.airflow, null)[*]
      content {
        kms_key_name = encryption_config.value
      }
    }
  }
}
