# Every right that anybody has, in one table; the documentation's table is made from the plan. The stack holds none: whoever
# applies it on each push cannot raise its own rights.
locals {
  has_deployer  = contains(keys(module.names.accounts), "deployer")
  has_checker   = contains(keys(module.names.accounts), "checker")
  has_ingestion = contains(keys(module.names.accounts), "ingestion")
  builds_here   = local.chosen.promote_from == ""
  # A private pool of this project; who may use one of another project, its owner grants.
  has_pool = try(split("/", module.names.network.build_pool)[1], "") == local.chosen.project

  own_roles = { for name in ["notifier", "stager"] : "own.${name}" => "${replace(local.chosen.name, "-", "_")}_${name}" }

  # who, which role (own.…: one of those below), on what, and why. `on` is "project", or a kind of resource and which one; `only` is a folder in a bucket.
  grants = concat(
    [
      { who = "trainer", role = "storage.objectViewer", on = "bucket data", why = "reads rows" },
      { who = "trainer", role = "storage.objectUser", on = "bucket pipeline_root", why = "reads the rows of its run, writes checkpoints and the model" },
      { who = "trainer", role = "logging.logWriter", on = "project", why = "writes its log" },

      { who = "pipeline", role = "aiplatform.user", on = "project", why = "sends training jobs, registers and deploys models" },
      { who = "pipeline", role = "logging.logWriter", on = "project", why = "writes its steps' logs" },
      { who = "pipeline", role = "storage.objectUser", on = "bucket pipeline_root", why = "its steps hand artifacts on" },
      { who = "pipeline", role = "storage.objectUser", on = "bucket storage", why = "the registry says which version is the champion" },
      { who = "pipeline", role = "storage.objectViewer", on = "bucket data", why = "reads rows" },
      { who = "pipeline", role = "artifactregistry.reader", on = "repository images", why = "its steps' images" },
      { who = "pipeline", role = "iam.serviceAccountUser", on = "account trainer", why = "training jobs act as the trainer" },
      { who = "pipeline", role = "iam.serviceAccountUser", on = "account predictor", why = "deployed models act as the predictor" },

      { who = "predictor", role = "storage.objectViewer", on = "bucket pipeline_root", why = "fetches its model, which lies where the run wrote it" },
      { who = "predictor", role = "logging.logWriter", on = "project", why = "writes its log" },

      { who = "build", role = "artifactregistry.writer", on = "repository images", why = "sends images" },
      { who = "build", role = "artifactregistry.writer", on = "repository templates", why = "publishes compiled pipelines" },
      { who = "build", role = "logging.logWriter", on = "project", why = "writes its log" },
      { who = "build", role = "storage.objectUser", on = "bucket storage", why = "reads the source, writes the images' digests and the pipeline" },
      { who = "build", role = "storage.objectViewer", on = "bucket pipeline_root", why = "deploys the champion anew, where the predictor alone has changed" },
      { who = "build", role = "storage.objectUser", on = "bucket data", why = "brings the rows that project.yaml names, where they are a sample or a file" },
      { who = "build", role = "own.stager", on = "bucket storage", why = "gcloud looks whether the bucket is there" },
      { who = "build", role = "cloudbuild.builds.editor", on = "project", why = "starts a build for each image that changed" },
      { who = "build", role = "iam.serviceAccountUser", on = "account build", why = "those builds act as itself" },
      { who = "build", role = "iam.serviceAccountTokenCreator", on = "account infra", why = "applies the stack as infra, and only so" },
      { who = "build", role = "aiplatform.user", on = "project", why = "the functional test starts a run and follows it" },
      { who = "build", role = "iam.serviceAccountUser", on = "account pipeline", why = "that run acts as the pipeline" },
      { who = "build", role = "iam.serviceAccountUser", on = "account predictor", why = "a change of the predictor alone is deployed by the build" },
      { who = "build", role = "pubsub.publisher", on = "topic requests", why = "asks for a run when all is published" },

      { who = "infra", role = "storage.objectUser", on = "bucket state", only = "stack/", why = "keeps the stack's state, and not the foundation's" },
      { who = "infra", role = "storage.objectViewer", on = "bucket state", why = "Terraform lists what states there are" },
      { who = "infra", role = "run.developer", on = "project", why = "makes the function, and jobs" },
      { who = "infra", role = "pubsub.editor", on = "project", why = "makes subscriptions, which a topic's own rights do not allow" },
      { who = "infra", role = "cloudscheduler.admin", on = "project", why = "makes the clock" },
      { who = "infra", role = "aiplatform.user", on = "project", why = "makes the endpoint and the metadata store" },
      { who = "infra", role = "monitoring.editor", on = "project", why = "makes dashboards and alerts" },
      { who = "infra", role = "logging.configWriter", on = "project", why = "makes metrics of logs, which alerts look at" },
      { who = "infra", role = "serviceusage.serviceUsageConsumer", on = "project", why = "its calls count against this project" },
      { who = "infra", role = "browser", on = "project", why = "looks up the project's number" },
      { who = "infra", role = "own.notifier", on = "bucket data", why = "lets the bucket tell about new files" },
      { who = "infra", role = "artifactregistry.reader", on = "repository images", why = "names images that are there" },
      { who = "infra", role = "iam.serviceAccountUser", on = "account function", why = "the function acts as it" },
      { who = "infra", role = "iam.serviceAccountUser", on = "account trigger", why = "subscriptions and the clock act as it" },

      { who = "function", role = "aiplatform.user", on = "project", why = "starts runs" },
      { who = "function", role = "iam.serviceAccountUser", on = "account pipeline", why = "runs act as the pipeline" },
      { who = "function", role = "storage.objectViewer", on = "bucket storage", why = "reads published pipelines; that there is none yet is told only to who may list" },
      { who = "function", role = "logging.logWriter", on = "project", why = "writes its log" },

      { who = "trigger", role = "run.invoker", on = "project", why = "delivers events; the function does not exist yet when this is granted" },
    ],
    local.has_deployer ? [
      { who = "deployer", role = "cloudbuild.builds.editor", on = "project", why = "starts a build, and follows it" },
      { who = "deployer", role = "iam.serviceAccountUser", on = "account build", why = "the build acts as build" },
      { who = "deployer", role = "storage.objectUser", on = "bucket storage", only = "builds/source/", why = "sends the source" },
      { who = "deployer", role = "own.stager", on = "bucket storage", why = "gcloud looks whether the bucket is there" },
      { who = "deployer", role = "logging.viewer", on = "project", why = "shows the build's log" },
      { who = "deployer", role = "serviceusage.serviceUsageConsumer", on = "project", why = "its calls count against this project" },
    ] : [],
    local.has_checker ? concat(
      [
        { who = "checker", role = "logging.logWriter", on = "project", why = "writes its log" },
        { who = "checker", role = "artifactregistry.reader", on = "repository images", why = "takes the toolbox" },
        { who = "checker", role = "storage.objectViewer", on = "bucket storage", why = "reads the source, and which images are there" },
        { who = "checker", role = "storage.objectViewer", on = "bucket state", why = "plans: what is there" },
        { who = "checker", role = "own.stager", on = "bucket data", why = "plans: whether the bucket tells about files" },
      ],
      [for service in ["aiplatform", "cloudscheduler", "monitoring", "pubsub", "run"] :
      { who = "checker", role = "${service}.viewer", on = "project", why = "plans: looks, and changes nothing" }],
      [for service in concat(local.chosen.workbench ? ["notebooks.viewer"] : [], local.chosen.data_ingestion == "managed-airflow" ? ["composer.user"] : []) :
      { who = "checker", role = service, on = "project", why = "plans: looks at what was chosen" }],
      [{ who = "checker", role = "browser", on = "project", why = "plans: looks up the project's number" }],
    ) : [],
    local.has_ingestion ? [
      { who = "ingestion", role = "storage.objectUser", on = "bucket data", only = "incoming/", why = "brings new files" },
      { who = "ingestion", role = "logging.logWriter", on = "project", why = "writes its log" },
      { who = "infra", role = "iam.serviceAccountUser", on = "account ingestion", why = "ingestion acts as it" },
    ] : [],
    local.chosen.data_ingestion == "managed-airflow" ? [
      { who = "ingestion", role = "composer.worker", on = "project", why = "Airflow's machines act as it" },
      { who = "infra", role = "composer.admin", on = "project", why = "makes the Airflow environment" },
    ] : [],
    local.chosen.workbench ? [
      { who = "infra", role = "notebooks.admin", on = "project", why = "makes the Workbench instance" },
      { who = "infra", role = "iam.serviceAccountUser", on = "account trainer", why = "that instance acts as the trainer" },
    ] : [],
    local.chosen.private ? [
      { who = "infra", role = "compute.networkUser", on = "project", why = "puts machines into the private network" },
    ] : [],
    [for who in concat(["build"], local.has_deployer ? ["deployer"] : [], local.has_checker ? ["checker"] : []) :
    { who = who, role = "cloudbuild.workerPoolUser", on = "project", why = "starts builds in the private pool" } if local.has_pool],
  )

  # The same, as resources want it.
  granted = {
    for grant in local.grants : "${grant.who} ${grant.role} ${grant.on}" => {
      member = "serviceAccount:${module.names.accounts[grant.who]}"
      role   = startswith(grant.role, "own.") ? "projects/${local.chosen.project}/roles/${local.own_roles[grant.role]}" : "roles/${grant.role}"
      kind   = split(" ", grant.on)[0]
      which  = try(split(" ", grant.on)[1], "")
      only   = try(grant.only, "")
      who    = grant.who
      why    = grant.why
    }
  }

  bucket_names = merge(module.names.buckets, { state = module.names.state_bucket })
  repository_names = {
    images    = module.names.images
    templates = "projects/${local.chosen.project}/locations/${local.chosen.region}/repositories/${module.names.templates}"
  }
}

resource "google_project_iam_member" "this" {
  for_each = { for key, grant in local.granted : key => grant if grant.kind == "project" }
  project  = local.chosen.project
  role     = each.value.role
  member   = each.value.member

  depends_on = [google_service_account.this, google_project_iam_custom_role.this]
}

resource "google_storage_bucket_iam_member" "this" {
  for_each = { for key, grant in local.granted : key => grant if grant.kind == "bucket" }
  bucket   = local.bucket_names[each.value.which]
  role     = each.value.role
  member   = each.value.member

  dynamic "condition" {
    for_each = compact([each.value.only])
    content {
      title      = "only-${replace(trimsuffix(condition.value, "/"), "/", "-")}"
      expression = "resource.name.startsWith(\"projects/_/buckets/${local.bucket_names[each.value.which]}/objects/${condition.value}\")"
    }
  }

  depends_on = [google_service_account.this, google_storage_bucket.this, google_storage_bucket.state, google_project_iam_custom_role.this]
}

resource "google_artifact_registry_repository_iam_member" "this" {
  for_each   = { for key, grant in local.granted : key => grant if grant.kind == "repository" }
  project    = split("/", local.repository_names[each.value.which])[1]
  location   = split("/", local.repository_names[each.value.which])[3]
  repository = split("/", local.repository_names[each.value.which])[5]
  role       = each.value.role
  member     = each.value.member

  depends_on = [google_service_account.this, google_artifact_registry_repository.images, google_artifact_registry_repository.templates]
}

resource "google_pubsub_topic_iam_member" "this" {
  for_each = { for key, grant in local.granted : key => grant if grant.kind == "topic" }
  topic    = google_pubsub_topic.this[each.value.which].id
  role     = each.value.role
  member   = each.value.member

  depends_on = [google_service_account.this]
}

resource "google_service_account_iam_member" "this" {
  for_each           = { for key, grant in local.granted : key => grant if grant.kind == "account" }
  service_account_id = "projects/${split(".", split("@", module.names.accounts[each.value.which])[1])[0]}/serviceAccounts/${module.names.accounts[each.value.which]}"
  role               = each.value.role
  member             = each.value.member

  depends_on = [google_service_account.this]
}

# ── roles of a few permissions, where Google's own allow more ───────────────────────────────────────────────────────────
resource "google_project_iam_custom_role" "this" {
  for_each = {
    notifier = { permissions = ["storage.buckets.get", "storage.buckets.update"], about = "lets a bucket tell about its files; Google's own role for it could also grant rights" }
    stager   = { permissions = ["storage.buckets.get"], about = "looks whether a bucket is there, as gcloud does before it sends a source" }
  }
  role_id     = local.own_roles["own.${each.key}"]
  title       = "${local.chosen.name}: ${each.key}"
  description = each.value.about
  permissions = each.value.permissions
}

# ── Google's own accounts ───────────────────────────────────────────────────────────────────────────────────────────────
# Cloud Storage tells about files; Pub/Sub gives up on messages, and calls the function with the trigger's identity.
resource "google_pubsub_topic_iam_member" "notifications" {
  topic  = google_pubsub_topic.this["data"].id
  role   = "roles/pubsub.publisher"
  member = "serviceAccount:${local.agents.storage}"

  depends_on = [data.google_storage_project_service_account.this]
}

resource "google_pubsub_topic_iam_member" "dead_letters" {
  topic  = google_pubsub_topic.this["dead-letters"].id
  role   = "roles/pubsub.publisher"
  member = "serviceAccount:${local.agents.pubsub}"

  depends_on = [google_project_service_identity.this]
}

resource "google_project_iam_member" "dead_letters" {
  project = local.chosen.project
  role    = "roles/pubsub.subscriber" # of subscriptions that the stack makes later
  member  = "serviceAccount:${local.agents.pubsub}"

  depends_on = [google_project_service_identity.this]
}

resource "google_service_account_iam_member" "push" {
  service_account_id = "projects/${split(".", split("@", module.names.accounts.trigger)[1])[0]}/serviceAccounts/${module.names.accounts.trigger}"
  role               = "roles/iam.serviceAccountTokenCreator"
  member             = "serviceAccount:${local.agents.pubsub}"

  depends_on = [google_service_account.this, google_project_service_identity.this]
}

# ── the environment whose images are run here ───────────────────────────────────────────────────────────────────────────
# Its images can be read, and not written. Whoever applies this needs the right to grant there.
resource "google_storage_bucket_iam_member" "source" {
  count  = local.builds_here ? 0 : 1
  bucket = module.names.source.storage
  role   = "roles/storage.objectViewer"
  member = "serviceAccount:${module.names.accounts.build}"

  condition {
    title      = "only-what-has-passed"
    expression = "resource.name.startsWith(\"projects/_/buckets/${module.names.source.storage}/objects/builds/passed/\")"
  }

  depends_on = [google_service_account.this]
}

resource "google_artifact_registry_repository_iam_member" "source" {
  count      = local.builds_here ? 0 : 1
  project    = split("/", module.names.source.images)[1]
  location   = split("/", module.names.source.images)[3]
  repository = split("/", module.names.source.images)[5]
  role       = "roles/artifactregistry.reader"
  member     = "serviceAccount:${module.names.accounts.build}"

  lifecycle {
    precondition {
      condition     = module.names.source.project != ""
      error_message = "cloud.environments.${local.chosen.promote_from}.project in project.yaml is empty, and ${local.chosen.environment} runs its images. Write its id there first."
    }
  }

  depends_on = [google_service_account.this]
}
