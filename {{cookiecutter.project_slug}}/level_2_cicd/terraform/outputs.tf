output "endpoint" {
  description = "The endpoint, as inference clients take it: --endpoint."
  value       = "projects/${local.chosen.project}/locations/${local.chosen.region}/endpoints/${google_vertex_ai_endpoint.this.name}"
}

output "trigger" {
  description = "The function's address; empty until its image was built once."
  value       = one(google_cloud_run_v2_service.trigger[*].uri)
}

output "dashboard" {
  description = "The dashboard's page."
  value       = "https://console.cloud.google.com/monitoring/dashboards/builder/${reverse(split("/", google_monitoring_dashboard.this.id))[0]}?project=${local.chosen.project}"
}
