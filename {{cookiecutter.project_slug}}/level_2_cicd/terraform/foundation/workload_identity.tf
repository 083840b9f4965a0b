# The CI proves who it is with a token of its own for each job, so there is no key to lose. The repository is known by a number
# that nobody can take over by renaming, and only a push to its main branch gets in; where images are promoted to, only from the
# CI's protected environment of the same name.
locals {
  repository = local.chosen.repository
  promoted   = !local.builds_here
  entra      = local.chosen.ci == "azure-devops" && startswith(local.repository.host, "https://login.microsoftonline.com/")

  identity = {
    github-actions = {
      issuer    = "https://token.actions.githubusercontent.com"
      audiences = null
      mapping   = { "google.subject" = "assertion.sub", "attribute.repository" = "assertion.repository_id" }
      condition = join(" && ", concat(
        ["assertion.repository_id == '${local.repository.id}'", "assertion.ref == 'refs/heads/${local.repository.branch}'"],
        local.promoted ? ["assertion.environment == '${local.chosen.environment}'"] : [],
      ))
    }
    gitlab = {
      issuer    = local.repository.host
      audiences = [local.repository.host]
      mapping   = { "google.subject" = "assertion.sub", "attribute.repository" = "assertion.project_id" }
      condition = join(" && ", concat(
        [
          "assertion.project_id == '${local.repository.id}'", "assertion.ref == '${local.repository.branch}'",
          "assertion.ref_type == 'branch'",
        ],
        local.promoted ? ["assertion.environment == '${local.chosen.environment}'", "assertion.environment_protected == 'true'"] : [],
      ))
    }
    # A service connection made since 2024 has a token of Entra; an older one of Azure DevOps itself.
    azure-devops = local.entra ? {
      issuer    = local.repository.host
      audiences = ["api://AzureADTokenExchange"]
      mapping = {
        "google.subject"       = "assertion.sub.extract('/sc/{connection}')" # the whole is longer than Google takes
        "attribute.repository" = "assertion.sub.extract('/sc/{connection}')"
      }
      condition = "assertion.sub.endsWith('/sc/${local.repository.name}')"
      } : {
      issuer    = "https://vstoken.dev.azure.com/${local.repository.id}"
      audiences = ["api://AzureADTokenExchange"]
      mapping   = { "google.subject" = "assertion.sub", "attribute.repository" = "assertion.sub" }
      condition = "assertion.sub == 'sc://${local.repository.name}'"
    }
  }
  # What the CI's identity is called in Google Cloud: the repository's number, or the service connection.
  known_as     = local.chosen.ci != "azure-devops" ? local.repository.id : local.entra ? local.repository.name : "sc://${local.repository.name}"
  has_identity = contains(keys(local.identity), local.chosen.ci)
}

resource "google_iam_workload_identity_pool" "this" {
  count                     = local.has_identity ? 1 : 0
  workload_identity_pool_id = "${local.chosen.name}-ci"
  display_name              = "CI of ${local.chosen.name}"

  depends_on = [google_project_service.this]
}

resource "google_iam_workload_identity_pool_provider" "this" {
  #checkov:skip=CKV_GCP_125:the condition names the repository by its number, which is stricter than the name that this check looks for
  count                              = local.has_identity ? 1 : 0
  workload_identity_pool_id          = google_iam_workload_identity_pool.this[0].workload_identity_pool_id
  workload_identity_pool_provider_id = local.chosen.ci
  attribute_mapping                  = local.identity[local.chosen.ci].mapping
  attribute_condition                = local.identity[local.chosen.ci].condition

  oidc {
    issuer_uri        = local.identity[local.chosen.ci].issuer
    allowed_audiences = local.identity[local.chosen.ci].audiences
  }

  lifecycle {
    precondition {
      condition     = local.chosen.ci == "azure-devops" ? local.repository.name != "" && (local.entra || local.repository.id != "") : local.repository.id != ""
      error_message = "cloud.repository in project.yaml does not say whose pushes may deploy. GitHub: id is what `gh api repos/OWNER/NAME --jq .id` prints. GitLab: id is the project's number. Azure DevOps: host is the issuer and name the end of the subject identifier, behind /sc/, that the service connection shows; or, where that is sc://…, id is the organisation's GUID and name is organisation/project/service-connection."
    }
  }
}

resource "google_service_account_iam_member" "ci" {
  count              = local.has_identity ? 1 : 0
  service_account_id = "projects/${split(".", split("@", module.names.accounts.deployer)[1])[0]}/serviceAccounts/${module.names.accounts.deployer}"
  role               = "roles/iam.workloadIdentityUser"
  member = format(
    "principalSet://iam.googleapis.com/projects/%s/locations/global/workloadIdentityPools/%s/attribute.repository/%s",
    local.number,
    google_iam_workload_identity_pool.this[0].workload_identity_pool_id,
    local.known_as,
  )

  depends_on = [google_service_account.this]
}
