# The foundation: APIs, service accounts, IAM, keys, buckets, repositories, topics, network.
# An admin applies it, once and after each change of permissions.
module "config" {
  source       = "../config"
  environment  = var.environment
  project_file = var.project_file
}

data "google_project" "this" {
  project_id = local.project
}

locals {
  settings   = module.config.settings
  names      = module.config.names
  existing   = module.config.existing
  name       = local.settings.name
  project    = local.settings.project
  region     = local.settings.region
  repository = local.settings.repository
  number     = data.google_project.this.number
  airflow    = local.settings.data_ingestion == "managed-airflow"
  # This environment builds images; one with promote_from copies them.
  builds_images = local.settings.promote_from == ""

  _labels = {
    project    = local.name, environment = var.environment
    managed-by = "terraform-foundation"
  }
}
