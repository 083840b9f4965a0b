# Workload identity federation for an external CI: each job authenticates with its own OIDC token,
# without a key. Only the configured branch of the repository is admitted, identified by number,
# because a renamed repository frees its name. Where images are copied, as in prod, only jobs of the
# CI's protected environment of the same name are.
locals {
  _external_ci = local.settings.ci != "cloud-build"
  _id          = local.repository.id
  _branch      = local.repository.branch
  _azure       = local.settings.ci == "azure-devops"
  # Service connections of Azure DevOps created since 2024 have tokens issued by Entra.
  _entra = local._azure && startswith(local.repository.host, "https://login.microsoftonline.com/")

  # Issuer and audiences of the tokens; the claim that identifies the repository and its value;
  # conditions, and further ones where images are copied.
  _ci = {
    github-actions = {
      issuer    = "https://token.actions.githubusercontent.com"
      audiences = null
      claim     = "assertion.repository_id"
      identity  = local._id
      conditions = [
        "assertion.repository_id == '${local._id}'",
        "assertion.ref == 'refs/heads/${local._branch}'",
      ]
      protected = ["assertion.environment == '${var.environment}'"]
    }
    gitlab = {
      issuer    = local.repository.host
      audiences = [local.repository.host]
      claim     = "assertion.project_id"
      identity  = local._id
      conditions = [
        "assertion.project_id == '${local._id}'",
        "assertion.ref == '${local._branch}'", "assertion.ref_type == 'branch'",
      ]
      protected = [
        "assertion.environment == '${var.environment}'",
        "assertion.environment_protected == 'true'",
      ]
    }
    azure-devops = {
      issuer = (
        local._entra ? local.repository.host : "https://vstoken.dev.azure.com/${local._id}"
      )
      audiences = ["api://AzureADTokenExchange"]
      # Entra's whole subject is longer than Google allows.
      claim    = local._entra ? "assertion.sub.extract('/sc/{connection}')" : "assertion.sub"
      identity = local._entra ? local.repository.name : "sc://${local.repository.name}"
      conditions = [
        local._entra ? "assertion.sub.endsWith('/sc/${local.repository.name}')"
        : "assertion.sub == 'sc://${local.repository.name}'"
      ]
      protected = []
    }
    cloud-build = null
  }[local.settings.ci]
}

resource "google_iam_workload_identity_pool" "this" {
  count                     = local._external_ci ? 1 : 0
  workload_identity_pool_id = "${local.name}-ci"
  display_name              = "CI of ${local.name}"

  depends_on = [google_project_service.this]
}

resource "google_iam_workload_identity_pool_provider" "this" {
  #checkov:skip=CKV_GCP_125:the condition has the repository's number, stricter than the name
  count                              = local._external_ci ? 1 : 0
  workload_identity_pool_id          = google_iam_workload_identity_pool.this[0].workload_identity_pool_id
  workload_identity_pool_provider_id = local.settings.ci
  attribute_mapping = {
    "google.subject"       = local._entra ? local._ci.claim : "assertion.sub"
    "attribute.repository" = local._ci.claim
  }
  attribute_condition = join(
    " && ", concat(local._ci.conditions, local.builds_images ? [] : local._ci.protected)
  )

  oidc {
    issuer_uri        = local._ci.issuer
    allowed_audiences = local._ci.audiences
  }

  lifecycle {
    precondition {
      condition = (
        (local._entra || local._id != "") && (!local._azure || local.repository.name != "")
      )
      error_message = <<-EOT
        cloud.repository in project.yaml does not identify the repository that may deploy. Set
        GitHub: id, the output of `gh api repos/OWNER/NAME --jq .id`.
        GitLab: id, the project's number.
        Azure DevOps: host, the service connection's issuer; name, its subject after /sc/. If the
        subject is sc://…: id, the organization's GUID; name, organization/project/connection.
      EOT
    }
  }
}

resource "google_service_account_iam_member" "ci" {
  count              = local._external_ci ? 1 : 0
  service_account_id = local.names.account_ids.deployer
  role               = "roles/iam.workloadIdentityUser"
  member = join("/", [
    "principalSet://iam.googleapis.com/projects", local.number, "locations/global",
    "workloadIdentityPools", google_iam_workload_identity_pool.this[0].workload_identity_pool_id,
    "attribute.repository", local._ci.identity,
  ])

  depends_on = [google_service_account.this]
}
