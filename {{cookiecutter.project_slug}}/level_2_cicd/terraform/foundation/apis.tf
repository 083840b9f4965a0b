# The APIs that this project calls. They stay on when the foundation is destroyed: others may call them too.
locals {
  apis = toset(concat(
    [
      "aiplatform", "artifactregistry", "cloudbuild", "cloudresourcemanager", "cloudscheduler", "compute", "containeranalysis",
      "containerscanning", "iam", "iamcredentials", "logging", "monitoring", "pubsub", "run", "secretmanager", "serviceusage",
      "storage", "sts",
    ],
    local.chosen.customer_managed ? ["cloudkms"] : [],
    local.chosen.data_ingestion == "managed-airflow" ? ["composer"] : [],
    local.chosen.workbench ? ["notebooks"] : [],
    local.chosen.private ? ["dns", "servicedirectory", "servicenetworking"] : [],
    local.chosen.budget > 0 ? ["billingbudgets"] : [],
  ))
}

resource "google_project_service" "this" {
  for_each           = local.apis
  service            = "${each.key}.googleapis.com"
  disable_on_destroy = false
}
