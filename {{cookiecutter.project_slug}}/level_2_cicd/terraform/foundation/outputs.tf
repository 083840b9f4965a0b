output "ci_variables" {
  description = "What the CI is told, for this environment."
  value = local.has_identity ? {
    GCP_WORKLOAD_IDENTITY_PROVIDER = google_iam_workload_identity_pool_provider.this[0].name
    GCP_DEPLOYER                   = module.names.accounts.deployer
  } : {}
}

output "grants" {
  description = "Every right that was given: who, which role, on what, and why."
  value       = [for grant in local.grants : { who = grant.who, role = grant.role, on = grant.on, only = try(grant.only, ""), why = grant.why }]
}

output "state_bucket" {
  description = "The bucket of Terraform's state."
  value       = google_storage_bucket.state.name
}
