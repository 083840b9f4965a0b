resource "google_project_service" "this" {
  for_each = toset(concat(
    [
      "aiplatform", "artifactregistry", "cloudbuild", "cloudresourcemanager", "cloudscheduler",
      "compute", "containeranalysis", "containerscanning", "iam", "iamcredentials", "logging",
      "monitoring", "pubsub", "run", "secretmanager", "serviceusage", "storage", "sts",
    ],
    local.settings.customer_managed ? ["cloudkms"] : [],
    local.airflow ? ["composer"] : [],
    local.settings.workbench ? ["notebooks"] : [],
    local.settings.private ? ["dns", "servicedirectory", "servicenetworking"] : [],
    local.settings.budget.monthly > 0 ? ["billingbudgets"] : [],
  ))
  service            = "${each.key}.googleapis.com"
  disable_on_destroy = false # other users of the project may need them
}
