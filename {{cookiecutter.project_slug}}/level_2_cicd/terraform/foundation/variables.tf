variable "environment" {
  description = "Key of cloud.environments in project.yaml."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,20}$", var.environment))
    error_message = "environment: expected lowercase letters, digits, hyphens; for example dev."
  }
}

variable "project_file" {
  description = "Settings file to read instead of project.yaml, as in a test."
  type        = string
  default     = null

  validation {
    condition     = var.project_file == null || can(yamldecode(file(var.project_file)).cloud)
    error_message = "project_file: expected a file like ../../../project.yaml."
  }
}
