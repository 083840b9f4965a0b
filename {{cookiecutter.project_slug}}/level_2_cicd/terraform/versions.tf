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
  # The bucket is the foundation's; `make plan` and `make apply` name it.
  backend "gcs" {}
}

provider "google" {
  project        = local.chosen.project
  region         = local.chosen.region
  default_labels = local.labels
}

provider "google-beta" {
  project        = local.chosen.project
  region         = local.chosen.region
  default_labels = local.labels
}
