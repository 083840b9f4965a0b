# Where Cloud Build alone is the CI: a pull request is checked by an account that only reads, a push to the main branch is built and deployed, and where images
# are promoted to, somebody approves first.
locals {
  has_triggers = local.chosen.ci == "cloud-build"
  # The same as src/launcher/submit_build.py gives by hand.
  told = {
    _ENVIRONMENT  = local.chosen.environment
    _REGISTRY     = module.names.images_address
    _BASE_IMAGES  = local.chosen.base_images
    _PYTHON_INDEX = local.chosen.python_index
  }
  told_of_push = { _COMMIT = "$COMMIT_SHA", _JOB_SPEC = "", _INFRA_ACCOUNT = module.names.accounts.infra }
  # A trigger takes only what is linked in its own project and region.
  linked = "projects/${local.chosen.project}/locations/${local.chosen.region}/connections/${split("/", local.repository.name)[0]}/repositories/${try(split("/", local.repository.name)[1], "")}"
  # Changes that build nothing.
  ignored = ["**/*.md"]
}

resource "google_cloudbuild_trigger" "pull_request" {
  count           = local.has_triggers && local.builds_here ? 1 : 0
  name            = "${local.chosen.name}-pull-request"
  description     = "Checks a pull request; changes nothing"
  location        = local.chosen.region
  filename        = "level_2_cicd/cloudbuild.pr.yaml"
  service_account = "projects/${local.chosen.project}/serviceAccounts/${module.names.accounts.checker}"
  substitutions   = local.told

  repository_event_config {
    repository = local.linked
    pull_request {
      branch          = "^${local.repository.branch}$"
      comment_control = "COMMENTS_ENABLED_FOR_EXTERNAL_CONTRIBUTORS_ONLY"
    }
  }

  lifecycle {
    precondition {
      condition     = can(regex("^[^/]+/[^/]+$", local.repository.name))
      error_message = "cloud.repository.name in project.yaml must be CONNECTION/NAME of the linked repository, which is linked in each environment's project under the same names; `gcloud builds repositories list --connection=CONNECTION --region=REGION` shows it."
    }
  }

  depends_on = [google_project_service.this, google_service_account.this]
}

resource "google_cloudbuild_trigger" "push" {
  count           = local.has_triggers ? 1 : 0
  name            = "${local.chosen.name}-push"
  description     = "Builds, tests, deploys and trains"
  location        = local.chosen.region
  filename        = "level_2_cicd/cloudbuild.yaml"
  service_account = "projects/${local.chosen.project}/serviceAccounts/${module.names.accounts.build}"
  substitutions   = merge(local.told, local.told_of_push)
  ignored_files   = local.ignored

  repository_event_config {
    repository = local.linked
    push {
      branch = "^${local.repository.branch}$"
    }
  }

  approval_config {
    approval_required = !local.builds_here
  }

  lifecycle {
    precondition {
      condition     = can(regex("^[^/]+/[^/]+$", local.repository.name))
      error_message = "cloud.repository.name in project.yaml must be CONNECTION/NAME of the linked repository, which is linked in each environment's project under the same names; `gcloud builds repositories list --connection=CONNECTION --region=REGION` shows it."
    }
  }

  depends_on = [google_project_service.this, google_service_account.this]
}
