# google-beta only for resources that google lacks.
terraform {
  required_version = ">= 1.9"
  required_providers {
    google      = { source = "hashicorp/google", version = ">= 6.50, < 8" }
    google-beta = { source = "hashicorp/google-beta", version = ">= 6.50, < 8" }
  }
  # `make foundation` creates the bucket with the rest, then moves the state there.
  backend "gcs" {}
}

provider "google" {
  project        = local.project
  region         = local.region
  default_labels = local._labels
}

# Budgets belong to the billing account, so their API needs an explicit quota project.
provider "google" {
  alias                 = "billing"
  project               = local.project
  billing_project       = local.project
  user_project_override = true
}

provider "google-beta" {
  project        = local.project
  region         = local.region
  default_labels = local._labels
}
