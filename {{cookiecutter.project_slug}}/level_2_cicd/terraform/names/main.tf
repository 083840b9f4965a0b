# What project.yaml says of one environment, and the names that follow from it: the same as src/project/cloud.py has, which
# a test compares. It makes nothing.

variable "environment" {
  description = "Which of cloud.environments in project.yaml, such as dev."
  type        = string
}

variable "project_file" {
  description = "Another project.yaml than the project's own, as in a test."
  type        = string
  default     = null
}

locals {
  file   = coalesce(var.project_file, "${path.module}/../../../project.yaml")
  chosen = yamldecode(file(local.file))
  cloud  = local.chosen.cloud
  name   = local.chosen.name
  region = local.cloud.region
  where  = try(local.cloud.environments[var.environment], {})

  project      = try(local.where.project, "")
  existing     = try(local.where.existing, {})
  promote_from = try(local.where.promote_from, "")
  source       = try(local.cloud.environments[local.promote_from], {})

  customer_managed = local.cloud.encryption == "customer-managed"
  private          = try(local.cloud.private, false)
  workbench        = try(local.cloud.workbench, false)
  airflow          = local.cloud.data_ingestion == "managed-airflow"

  # Actor → the account's e-mail address.
  actors = concat(
    ["trainer", "pipeline", "build", "infra", "function", "trigger", "predictor"],
    local.cloud.ci == "cloud-build" ? ["checker"] : ["deployer"],
    local.cloud.data_ingestion == "none" ? [] : ["ingestion"],
  )
  accounts = {
    for actor in local.actors : actor => try(local.existing.accounts[actor], "${local.name}-${actor}@${local.project}.iam.gserviceaccount.com")
  }

  buckets = {
    for root, suffix in { pipeline_root = "pipelines", storage = "storage", data = "data" } :
    root => try(local.existing.buckets[root], "${local.project}-${local.name}-${suffix}")
  }

  images = coalesce(
    try(local.existing.images, ""), "projects/${local.project}/locations/${local.region}/repositories/${local.name}"
  )
  images_of_source = local.promote_from == "" ? "" : coalesce(
    try(local.source.existing.images, ""), "projects/${try(local.source.project, "")}/locations/${local.region}/repositories/${local.name}"
  )

  topics = { for kind in ["requests", "data", "dead-letters"] : kind => "projects/${local.project}/topics/${local.name}-${kind}" }

  # What customer-managed keys are for → the key; nothing where Google's own are used.
  key_ring = coalesce(
    try(local.existing.key_ring, ""), "projects/${local.project}/locations/${local.region}/keyRings/${local.name}"
  )
  keys = {
    for use in concat(["storage", "registry", "vertex", "pubsub", "run", "secrets"], local.airflow ? ["airflow"] : [], local.workbench ? ["compute"] : []) :
    use => try(local.existing.keys[use], "${local.key_ring}/cryptoKeys/${use}") if local.customer_managed
  }

  known = {
    cloud = [
      "region", "ci", "repository", "data_ingestion", "encryption", "private", "environments", "train", "serve", "events",
      "workbench", "budget", "alerts", "mirrors",
    ]
    environment = ["project", "bucket", "promote_from", "existing"]
    existing    = ["network", "subnetwork", "build_pool", "key_ring", "keys", "images", "buckets", "accounts", "metadata_store"]
  }
  unknown = concat(
    [for key in setsubtract(keys(local.cloud), local.known.cloud) : "cloud.${key}"],
    [for key in setsubtract(keys(local.where), local.known.environment) : "cloud.environments.${var.environment}.${key}"],
    [for key in setsubtract(keys(local.existing), local.known.existing) : "cloud.environments.${var.environment}.existing.${key}"],
  )
}

output "chosen" {
  description = "The block `cloud` of project.yaml, with what may be left out there."
  value = {
    name           = local.name
    project        = local.project
    region         = local.region
    environment    = var.environment
    ci             = local.cloud.ci
    data_ingestion = local.cloud.data_ingestion
    alerts         = local.cloud.alerts
    private        = local.private
    workbench      = local.workbench
    schedule       = try(local.cloud.events.schedule, "")
    data_source    = startswith(try(local.chosen.data.source, ""), "gs://") ? local.chosen.data.source : ""
    ingest         = try(local.cloud.events.ingest, "0 3 * * *")
    fold_minutes   = try(local.cloud.events.fold_minutes, 0)
    budget         = try(local.cloud.budget.monthly, 0)
    billing        = try(local.cloud.budget.billing_account, "")
    repository = {
      name   = try(local.cloud.repository.name, "")
      id     = try(local.cloud.repository.id, "")
      host   = try(coalesce(local.cloud.repository.host), "https://gitlab.com")
      branch = try(local.cloud.repository.branch, "main")
    }
    base_images      = try(local.cloud.mirrors.base_images, "")
    python_index     = try(local.cloud.mirrors.python_index, "")
    promote_from     = local.promote_from
    customer_managed = local.customer_managed
  }

  precondition {
    condition     = contains(keys(local.cloud.environments), var.environment)
    error_message = "project.yaml has no environment '${var.environment}': there are ${join(", ", keys(local.cloud.environments))}. For example: make plan ENVIRONMENT=${keys(local.cloud.environments)[0]}"
  }
  precondition {
    condition     = local.project != "" || !contains(keys(local.cloud.environments), var.environment)
    error_message = "cloud.environments.${var.environment}.project in project.yaml is empty. Write the id of your Google Cloud project there; `gcloud projects list` shows those that you have."
  }
  precondition {
    condition     = !can(regex("^(gcp-|goog)|google", local.name))
    error_message = "name in project.yaml is '${local.name}': Google takes no names that begin with gcp- or goog, or hold google."
  }
  precondition {
    condition     = length(local.unknown) == 0
    error_message = "project.yaml: there is no such key: ${join(", ", local.unknown)}. make doctor LEVEL=2 says which one is meant."
  }
  precondition {
    condition     = try(local.cloud.events.fold_minutes, 0) == 0 || startswith(try(local.chosen.data.source, ""), "gs://")
    error_message = "cloud.events.fold_minutes in project.yaml: files can be gathered where each run trains on data.source in a bucket (gs://…). Write 0, or name such a source."
  }
  precondition {
    condition     = try(local.where.bucket, "") == ""
    error_message = "cloud.environments.${var.environment}.bucket in project.yaml names a bucket that was made by hand (level 1). Empty it: at level 2 Terraform makes three."
  }
}

output "accounts" {
  description = "Actor → its account's e-mail address."
  value       = local.accounts
}

output "buckets" {
  description = "pipeline_root, storage, data → the bucket's name."
  value       = local.buckets
}

output "images" {
  description = "The id of the repository of images."
  value       = local.images
}

output "images_address" {
  description = "The same as an image's name begins."
  value       = "${split("/", local.images)[3]}-docker.pkg.dev/${split("/", local.images)[1]}/${split("/", local.images)[5]}"
}

output "source" {
  description = "The environment whose images are run here, if there is one: its project's id, and the id of its repository of images."
  value = {
    project = try(local.source.project, "")
    images  = local.images_of_source
    storage = try(local.source.existing.buckets.storage, "${try(local.source.project, "")}-${local.name}-storage")
  }
}

output "templates" {
  description = "The name of the repository of compiled pipelines."
  value       = "${local.name}-templates"
}

output "topics" {
  description = "requests, data, dead-letters → the topic's id."
  value       = local.topics
}

output "key_ring" {
  description = "The id of the key ring."
  value       = local.key_ring
}

output "keys" {
  description = "storage, registry, vertex, pubsub, run, secrets, airflow, compute → the key's id; empty where Google's own keys are used."
  value       = local.keys
}

output "existing" {
  description = "What is there already and is not made: see class Existing in src/project/settings.py."
  value = {
    network        = try(local.existing.network, "")
    subnetwork     = try(local.existing.subnetwork, "")
    build_pool     = try(local.existing.build_pool, "")
    key_ring       = try(local.existing.key_ring, "")
    images         = try(local.existing.images, "")
    metadata_store = try(local.existing.metadata_store, false)
    keys           = keys(try(local.existing.keys, {}))
    buckets        = keys(try(local.existing.buckets, {}))
    accounts       = keys(try(local.existing.accounts, {}))
  }
}

output "state_bucket" {
  description = "The bucket of Terraform's state."
  value       = "${local.project}-${local.name}-terraform"
}

output "endpoint" {
  description = "The endpoint's number, which Google wants to be one of at most ten digits."
  value       = tostring(1000000000 + parseint(substr(sha256(local.name), 0, 7), 16))
}

output "network" {
  description = "Of the private mode: ids of the network, its subnetwork, the pool that builds, and where Vertex AI reaches in."
  value = local.private ? {
    network    = coalesce(try(local.existing.network, ""), "projects/${local.project}/global/networks/${local.name}")
    subnetwork = coalesce(try(local.existing.subnetwork, ""), "projects/${local.project}/regions/${local.region}/subnetworks/${local.name}")
    build_pool = coalesce(try(local.existing.build_pool, ""), "projects/${local.project}/locations/${local.region}/workerPools/${local.name}")
    attachment = "projects/${local.project}/regions/${local.region}/networkAttachments/${local.name}"
  } : { network = "", subnetwork = "", build_pool = try(local.existing.build_pool, ""), attachment = "" }
}
