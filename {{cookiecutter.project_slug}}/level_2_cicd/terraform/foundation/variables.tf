variable "environment" {
  description = "Which of cloud.environments in project.yaml."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,20}$", var.environment))
    error_message = "environment: small letters, digits and hyphens, as in project.yaml; for example dev."
  }
}

variable "project_file" {
  description = "Another project.yaml than the project's own, as in a test."
  type        = string
  default     = null

  validation {
    condition     = var.project_file == null || can(yamldecode(file(var.project_file)).cloud)
    error_message = "project_file: a file in the form of project.yaml; for example ../../../project.yaml."
  }
}
