output "endpoint" {
  description = "Resource name of the endpoint, for the option --endpoint of the inference clients."
  value = join("/", [
    "projects", local.project, "locations", local.region,
    "endpoints", google_vertex_ai_endpoint.this.name,
  ])
}

output "trigger" {
  description = "URL of the function; null until its image has been built."
  value       = one(google_cloud_run_v2_service.trigger[*].uri)
}

output "dashboard" {
  description = "Console page of the dashboard."
  value = format(
    "https://console.cloud.google.com/monitoring/dashboards/builder/%s?project=%s",
    basename(google_monitoring_dashboard.this.id), local.project
  )
}
