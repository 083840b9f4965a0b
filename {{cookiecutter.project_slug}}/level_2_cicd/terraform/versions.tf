# google-beta only for resources that google lacks.
terraform {
  required_version = ">= 1.9"
  required_providers {
    google      = { source = "hashicorp/google", version = ">= 6.50, < 8" }
    google-beta = { source = "hashicorp/google-beta", version = ">= 6.50, < 8" }
  }
  # `make plan` and `make apply` pass the bucket, which the foundation creates.
  backend "gcs" {}
}

provider "google" {
  project        = local.project
  region         = local.region
  default_labels = local._labels
}

provider "google-beta" {
  project        = local.project
  region         = local.region
  default_labels = local._labels
}
