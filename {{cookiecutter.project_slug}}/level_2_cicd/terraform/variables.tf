variable "environment" {
  description = "Which of cloud.environments in project.yaml."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,20}$", var.environment))
    error_message = "environment: small letters, digits and hyphens, as in project.yaml; for example dev."
  }
}

variable "images" {
  description = "Container → its image's address by digest; `make images` writes them. Without the function's, nothing hears events yet."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for image in values(var.images) : can(regex("^[^@\\s]+@sha256:[0-9a-f]{64}$", image))])
    error_message = "images: each is ADDRESS@sha256:… with 64 digits, never a tag; for example {\"trigger_function\": \"europe-west4-docker.pkg.dev/P/N/trigger_function@sha256:…\"}."
  }
}

variable "project_file" {
  description = "Another project.yaml than the project's own, as in a test."
  type        = string
  default     = null

  validation {
    condition     = var.project_file == null || can(yamldecode(file(var.project_file)).cloud)
    error_message = "project_file: a file in the form of project.yaml; for example ../../project.yaml."
  }
}
