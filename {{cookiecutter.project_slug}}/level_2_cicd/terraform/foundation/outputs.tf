output "ci_variables" {
  description = "Variables that the CI of this environment needs; empty for Cloud Build."
  value = local._external_ci ? {
    GCP_WORKLOAD_IDENTITY_PROVIDER = google_iam_workload_identity_pool_provider.this[0].name
    GCP_DEPLOYER                   = local.names.accounts.deployer
  } : {}
}

output "grants" {
  description = "All IAM grants to service accounts: account, role, resource, reason."
  value       = local._grants
}
