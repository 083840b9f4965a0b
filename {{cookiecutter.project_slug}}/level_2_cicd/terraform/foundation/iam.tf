# All permissions, in one table; `make grants` prints it. The stack contains none: see ../main.tf.
locals {
  # A private pool of this project; the owner of another project's pool grants its use.
  _has_own_pool = try(split("/", local.names.build_pool)[1], "") == local.project
  _pool_user    = ["cloudbuild.workerPoolUser", "project", "builds in the private pool", "pool"]

  # Roles that are narrower than Google's.
  _custom_roles = {
    for name, role in {
      notifier = [
        "Configures a bucket's notifications; Google's role could also grant permissions",
        ["storage.buckets.get", "storage.buckets.update"],
      ]
      stager = ["Checks that a bucket exists, as gcloud does", ["storage.buckets.get"]]
      } : "own.${name}" => {
      id          = "${replace(local.name, "-", "_")}_${name}"
      path        = "projects/${local.project}/roles/${replace(local.name, "-", "_")}_${name}"
      reason      = role[0]
      permissions = role[1]
    }
  }

  # Account → rows: role (`own.…`: a custom role), resource (a third word limits it to a folder),
  # reason, and the option in _enabled that the row needs, if any.
  _table = {
    trainer = [
      ["storage.objectViewer", "bucket data", "reads the dataset"],
      ["storage.objectUser", "bucket pipeline_root", "reads the split, writes the model"],
      ["logging.logWriter", "project", "writes logs"],
    ]
    pipeline = [
      ["aiplatform.user", "project", "submits training jobs, registers and deploys models"],
      ["logging.logWriter", "project", "writes logs of its steps"],
      ["storage.objectUser", "bucket pipeline_root", "passes artifacts between steps"],
      ["storage.objectUser", "bucket storage", "updates the champion in the registry"],
      ["storage.objectViewer", "bucket data", "reads the dataset"],
      ["artifactregistry.reader", "repository images", "pulls the images of its steps"],
      ["iam.serviceAccountUser", "account trainer", "training jobs run as trainer"],
      ["iam.serviceAccountUser", "account predictor", "deployed models run as predictor"],
    ]
    predictor = [
      ["storage.objectViewer", "bucket pipeline_root", "loads the model, where the run wrote it"],
      ["logging.logWriter", "project", "writes logs"],
    ]
    build = [
      ["artifactregistry.writer", "repository images", "pushes images"],
      ["artifactregistry.writer", "repository templates", "publishes compiled pipelines"],
      ["logging.logWriter", "project", "writes logs"],
      ["storage.objectUser", "bucket storage", "reads the source, writes digests and pipeline"],
      ["storage.objectViewer", "bucket pipeline_root", "redeploys the champion on a new image"],
      ["storage.objectUser", "bucket data", "uploads a dataset from the repository"],
      ["own.stager", "bucket storage", "gcloud checks that the bucket exists"],
      ["cloudbuild.builds.editor", "project", "starts a build for each changed image"],
      ["iam.serviceAccountUser", "account build", "those builds run as build"],
      ["iam.serviceAccountTokenCreator", "account infra", "applies the stack as infra"],
      ["aiplatform.user", "project", "starts and follows the functional test"],
      ["iam.serviceAccountUser", "account pipeline", "the functional test runs as pipeline"],
      ["iam.serviceAccountUser", "account predictor", "a redeployed champion runs as predictor"],
      ["pubsub.publisher", "topic requests", "requests a run after the release"],
      local._pool_user,
      ["storage.objectViewer", "bucket source builds/passed/", "lists tested images", "copies"],
      ["artifactregistry.reader", "repository source", "copies the images that passed", "copies"],
    ]
    infra = [
      ["storage.objectUser", "bucket state stack/", "writes the stack's state only"],
      ["storage.objectViewer", "bucket state", "Terraform lists the states"],
      ["run.developer", "project", "creates the function and jobs"],
      ["pubsub.editor", "project", "creates subscriptions; no narrower role allows it"],
      ["cloudscheduler.admin", "project", "creates schedules"],
      ["aiplatform.user", "project", "creates the endpoint and the metadata store"],
      ["monitoring.editor", "project", "creates dashboards and alerts"],
      ["logging.configWriter", "project", "creates the log alert"],
      ["serviceusage.serviceUsageConsumer", "project", "its API calls use the project's quota"],
      ["browser", "project", "reads the project's metadata"],
      ["own.notifier", "bucket data", "configures the bucket's notifications"],
      ["artifactregistry.reader", "repository images", "resolves images"],
      ["iam.serviceAccountUser", "account function", "the function runs as function"],
      ["iam.serviceAccountUser", "account trigger", "subscriptions and schedules act as trigger"],
      ["iam.serviceAccountUser", "account ingestion", "ingestion runs as ingestion", "ingestion"],
      ["composer.admin", "project", "creates the Airflow environment", "airflow"],
      ["notebooks.admin", "project", "creates the Workbench instance", "workbench"],
      ["iam.serviceAccountUser", "account trainer", "the Workbench runs as trainer", "workbench"],
      ["compute.networkUser", "project", "connects services to the private network", "private"],
    ]
    function = [
      ["aiplatform.user", "project", "starts runs"],
      ["iam.serviceAccountUser", "account pipeline", "runs act as pipeline"],
      # Without list permission, a missing object is reported as 403 instead of 404.
      ["storage.objectViewer", "bucket storage", "reads and lists published pipelines"],
      ["logging.logWriter", "project", "writes logs"],
    ]
    trigger = [
      # On the project, because the stack creates the function later.
      ["run.invoker", "project", "delivers events to the function, starts the ingestion job"],
    ]
    deployer = [
      ["cloudbuild.builds.editor", "project", "starts and follows a build"],
      ["iam.serviceAccountUser", "account build", "the build runs as build"],
      ["storage.objectUser", "bucket storage builds/source/", "uploads the source"],
      ["own.stager", "bucket storage", "gcloud checks that the bucket exists"],
      ["logging.viewer", "project", "shows the build's log"],
      ["serviceusage.serviceUsageConsumer", "project", "its API calls use the project's quota"],
      local._pool_user,
    ]
    checker = concat(
      [
        ["logging.logWriter", "project", "writes logs"],
        ["artifactregistry.reader", "repository images", "pulls the toolbox image"],
        ["storage.objectViewer", "bucket storage", "reads the source and the list of images"],
        ["storage.objectViewer", "bucket state", "plan: reads the state"],
        ["own.stager", "bucket data", "plan: reads the bucket's notifications"],
        ["browser", "project", "plan: reads the project's metadata"],
        ["notebooks.viewer", "project", "plan: reads the Workbench instance", "workbench"],
        ["composer.user", "project", "plan: reads the Airflow environment", "airflow"],
        local._pool_user,
      ],
      [
        for service in ["aiplatform", "cloudscheduler", "monitoring", "pubsub", "run"] :
        ["${service}.viewer", "project", "plan: reads resources"]
      ],
    )
    ingestion = [
      ["storage.objectUser", "bucket data incoming/", "writes new files"],
      ["logging.logWriter", "project", "writes logs"],
      ["composer.worker", "project", "Airflow's workers run as ingestion", "airflow"],
    ]
    # Google's own service accounts ("service agents")
    "storage agent" = [
      ["pubsub.publisher", "topic data", "publishes notifications of the data bucket"],
    ]
    "pubsub agent" = [
      ["pubsub.publisher", "topic dead-letters", "forwards undeliverable messages"],
      ["pubsub.subscriber", "project", "acknowledges the forwarded messages"],
      ["iam.serviceAccountTokenCreator", "account trigger", "calls the function as trigger"],
    ]
    "vertex agent" = [
      ["compute.networkAdmin", "project", "joins the network attachment", "private"],
    ]
  }
  _enabled = {
    pool      = local._has_own_pool
    ingestion = contains(keys(local.names.accounts), "ingestion")
    airflow   = local.airflow
    workbench = local.settings.workbench
    private   = local.settings.private
    copies    = !local.builds_images
  }
  _emails = merge(
    local.names.accounts, { for agent, email in local.agents : "${agent} agent" => email }
  )

  _grants = flatten([
    for account, rows in local._table : [
      for row in rows : {
        who  = account
        role = row[0]
        on   = regex("^\\S+(?: \\S+)?", row[1])
        only = try(regex("^\\S+ \\S+ (\\S+)$", row[1])[0], "")
        why  = row[2]
      } if try(local._enabled[row[3]], true)
    ] if contains(keys(local._emails), account)
  ])
  # Kind of resource → the grants on it, as the resources below need them.
  _grants_on = {
    for kind in ["project", "bucket", "repository", "topic", "account"] : kind => {
      for grant in local._grants : "${grant.who} ${grant.role} ${grant.on}" => {
        member = "serviceAccount:${local._emails[grant.who]}"
        role   = try(local._custom_roles[grant.role].path, "roles/${grant.role}")
        name   = trimspace(trimprefix(grant.on, kind))
        only   = grant.only
      } if startswith(grant.on, kind)
    }
  }
  _repositories_by_name = {
    images    = split("/", local.names.images)
    source    = split("/", local.names.source_images)
    templates = ["", local.project, "", local.region, "", local.names.templates]
  }
}

resource "google_project_iam_member" "this" {
  for_each = local._grants_on.project
  project  = local.project
  role     = each.value.role
  member   = each.value.member

  depends_on = [
    google_service_account.this, google_project_iam_custom_role.this,
    google_project_service_identity.this,
  ]
}

resource "google_storage_bucket_iam_member" "this" {
  for_each = local._grants_on.bucket
  bucket   = local.names.buckets[each.value.name]
  role     = each.value.role
  member   = each.value.member

  dynamic "condition" {
    for_each = compact([each.value.only])
    content {
      title = "only-${replace(trimsuffix(condition.value, "/"), "/", "-")}"
      expression = format(
        "resource.name.startsWith(\"projects/_/buckets/%s/objects/%s\")",
        local.names.buckets[each.value.name], condition.value
      )
    }
  }

  depends_on = [
    google_service_account.this, google_project_iam_custom_role.this,
    google_storage_bucket.this,
  ]
}

resource "google_artifact_registry_repository_iam_member" "this" {
  for_each   = local._grants_on.repository
  project    = local._repositories_by_name[each.value.name][1]
  location   = local._repositories_by_name[each.value.name][3]
  repository = local._repositories_by_name[each.value.name][5]
  role       = each.value.role
  member     = each.value.member

  depends_on = [
    google_service_account.this, google_artifact_registry_repository.images,
    google_artifact_registry_repository.templates,
  ]
}

resource "google_pubsub_topic_iam_member" "this" {
  for_each = local._grants_on.topic
  topic    = google_pubsub_topic.this[each.value.name].id
  role     = each.value.role
  member   = each.value.member

  depends_on = [
    google_service_account.this, google_project_service_identity.this,
    data.google_storage_project_service_account.this,
  ]
}

resource "google_service_account_iam_member" "this" {
  for_each           = local._grants_on.account
  service_account_id = local.names.account_ids[each.value.name]
  role               = each.value.role
  member             = each.value.member

  depends_on = [google_service_account.this, google_project_service_identity.this]
}

resource "google_project_iam_custom_role" "this" {
  for_each    = local._custom_roles
  role_id     = each.value.id
  title       = "${local.name}: ${trimprefix(each.key, "own.")}"
  description = each.value.reason
  permissions = each.value.permissions
}
