# The stack: everything that a push may change, applied by the service account `infra`.
# IAM and keys are in foundation/, which an admin applies, so a push cannot extend its own
# permissions; a test of the plan checks this.
module "config" {
  source       = "./config"
  environment  = var.environment
  project_file = var.project_file
}

locals {
  settings = module.config.settings
  names    = module.config.names
  name     = local.settings.name
  project  = local.settings.project
  region   = local.settings.region
  incoming = "gs://${local.names.buckets.data}/incoming"
  title    = "${local.name} ${var.environment}"

  _labels = {
    project    = local.name, environment = var.environment
    managed-by = "terraform"
  }
}
