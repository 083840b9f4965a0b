# Triggers for projects whose only CI is Cloud Build. A pull request runs as a read-only account; a
# push to the branch builds and deploys, after an approval where images are copied, as in prod.
locals {
  _build_triggers = local.settings.ci == "cloud-build"
  # Repository links are per project and region; project.yaml has CONNECTION/NAME.
  _linked_repository = join("/", [
    "projects", local.project, "locations", local.region, "connections",
    split("/", local.repository.name)[0],
    "repositories", try(split("/", local.repository.name)[1], ""),
  ])
  # The same as those of level_2_cicd/submit_build.py.
  _substitutions = {
    _ENVIRONMENT  = var.environment
    _REGISTRY     = local.names.image_prefix
    _BASE_IMAGES  = local.settings.mirrors.base_images
    _PYTHON_INDEX = local.settings.mirrors.python_index
  }
}

resource "google_cloudbuild_trigger" "pull_request" {
  count           = local._build_triggers && local.builds_images ? 1 : 0
  name            = "${local.name}-pull-request"
  description     = "Checks a pull request, read-only"
  location        = local.region
  filename        = "level_2_cicd/cloudbuild.pr.yaml"
  service_account = local.names.account_ids.checker
  substitutions   = local._substitutions

  repository_event_config {
    repository = local._linked_repository
    pull_request {
      branch          = "^${local.repository.branch}$"
      comment_control = "COMMENTS_ENABLED_FOR_EXTERNAL_CONTRIBUTORS_ONLY"
    }
  }

  depends_on = [google_project_service.this, google_service_account.this]
}

resource "google_cloudbuild_trigger" "push" {
  count           = local._build_triggers ? 1 : 0
  name            = "${local.name}-push"
  description     = "Builds, tests, deploys and trains"
  location        = local.region
  filename        = "level_2_cicd/cloudbuild.yaml"
  service_account = local.names.account_ids.build
  ignored_files   = ["**/*.md"]
  substitutions = merge(local._substitutions, {
    _COMMIT = "$COMMIT_SHA", _JOB_SPEC = "", _INFRA_ACCOUNT = local.names.accounts.infra
  })

  repository_event_config {
    repository = local._linked_repository
    push {
      branch = "^${local.repository.branch}$"
    }
  }

  approval_config {
    approval_required = !local.builds_images
  }

  lifecycle {
    precondition {
      condition     = can(regex("^[^/]+/[^/]+$", local.repository.name))
      error_message = <<-EOT
        cloud.repository.name in project.yaml: expected CONNECTION/NAME of the repository linked in
        each environment's project; to list them, run
        `gcloud builds repositories list --connection=CONNECTION --region=REGION`.
      EOT
    }
  }

  depends_on = [google_project_service.this, google_service_account.this]
}
