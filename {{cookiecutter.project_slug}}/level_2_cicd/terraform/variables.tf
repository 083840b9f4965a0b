variable "environment" {
  description = "Key of cloud.environments in project.yaml."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,20}$", var.environment))
    error_message = "environment: expected lowercase letters, digits, hyphens; for example dev."
  }
}

variable "images" {
  description = "Container → image by digest, from `make images`; empty before the first build."
  type        = map(string)
  default     = {}

  validation {
    condition = alltrue([
      for image in values(var.images) : can(regex("^[^@\\s]+@sha256:[0-9a-f]{64}$", image))
    ])
    error_message = <<-EOT
      images: expected IMAGE@sha256:… with 64 digits, never a tag; for example
      {"trigger_function": "europe-west4-docker.pkg.dev/P/N/trigger_function@sha256:…"}.
    EOT
  }
}

variable "project_file" {
  description = "Settings file to read instead of project.yaml, as in a test."
  type        = string
  default     = null

  validation {
    condition     = var.project_file == null || can(yamldecode(file(var.project_file)).cloud)
    error_message = "project_file: expected a file like ../../project.yaml."
  }
}
