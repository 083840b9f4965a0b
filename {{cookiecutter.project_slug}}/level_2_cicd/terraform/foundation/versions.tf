# google-beta only where google lacks the resource. A lock file is made by `terraform init` on your machine; commit it then.
terraform {
  required_version = ">= 1.9"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 6.50, < 8"
    }
    google-beta = {
      source  = "hashicorp/google-beta"
      version = ">= 6.50, < 8"
    }
  }
  # The bucket is named by `make foundation`, which makes it with the rest, and then moves the state there.
  backend "gcs" {}
}

provider "google" {
  project        = module.names.chosen.project
  region         = module.names.chosen.region
  default_labels = local.labels
}

# Budgets are asked of the billing account, and want to know which project pays for the question.
provider "google" {
  alias                 = "billing"
  project               = module.names.chosen.project
  billing_project       = module.names.chosen.project
  user_project_override = true
}

provider "google-beta" {
  project        = module.names.chosen.project
  region         = module.names.chosen.region
  default_labels = local.labels
}

module "names" {
  source       = "../names"
  environment  = var.environment
  project_file = var.project_file
}

data "google_project" "this" {
  project_id = module.names.chosen.project
}

locals {
  chosen   = module.names.chosen
  existing = module.names.existing
  labels   = { project = local.chosen.name, environment = local.chosen.environment, managed-by = "terraform-foundation" }
  number   = data.google_project.this.number
}
