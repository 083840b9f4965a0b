# Settings and resource names of one environment, derived from project.yaml. Creates no resources.
# A test compares the names with those of src/gcp/environment.py.

variable "environment" {
  description = "Key of cloud.environments in project.yaml, such as dev."
  type        = string
}

variable "project_file" {
  description = "Settings file to read instead of project.yaml, as in a test."
  type        = string
  default     = null
}

locals {
  _file = yamldecode(file(coalesce(var.project_file, "${path.module}/../../../project.yaml")))
  _path = "cloud.environments.${var.environment}"
  # Every allowed key and its default, as in class Cloud of src/project/settings.py.
  _cloud_defaults = {
    region  = "", ci = "", repository = {}, data_ingestion = "none", encryption = "google-managed"
    private = false, environments = {}, train = {}, serve = {}, events = {}, workbench = false
    budget  = {}, alerts = "", mirrors = {}
  }
  _environment_defaults = { project = "", bucket = "", promote_from = "", existing = {} }
  _existing_defaults = {
    network = "", subnetwork = "", build_pool = "", key_ring = "", keys = {}, images = ""
    buckets = {}, accounts = {}, metadata_store = false
  }
  _cloud = merge(local._cloud_defaults, local._file.cloud)
  _environment = merge(
    local._environment_defaults, try(local._cloud.environments[var.environment], {})
  )
  _existing = merge(local._existing_defaults, local._environment.existing)
  _unknown_keys = flatten([
    for path, blocks in {
      "cloud"                   = [local._cloud, local._cloud_defaults]
      (local._path)             = [local._environment, local._environment_defaults]
      "${local._path}.existing" = [local._existing, local._existing_defaults]
    } : [for key in setsubtract(keys(blocks[0]), keys(blocks[1])) : "${path}.${key}"]
  ])

  _names        = join(", ", keys(local._cloud.environments))
  _promote_from = local._environment.promote_from
  _name         = local._file.name
  _project      = local._environment.project
  _location     = "projects/${local._project}/locations/${local._cloud.region}"
  _region       = "projects/${local._project}/regions/${local._cloud.region}"
  _data_source  = try(local._file.data.source, "")
  _images = coalesce(
    local._existing.images, "${local._location}/repositories/${local._name}"
  )
  _key_ring       = coalesce(local._existing.key_ring, "${local._location}/keyRings/${local._name}")
  _source         = try(local._cloud.environments[local._promote_from], {})
  _source_project = try(local._source.project, "")

  _accounts = {
    for actor in concat(
      ["trainer", "pipeline", "build", "infra", "function", "trigger", "predictor"],
      local._cloud.ci == "cloud-build" ? ["checker"] : ["deployer"],
      local._cloud.data_ingestion == "none" ? [] : ["ingestion"],
    ) :
    actor => try(
      local._existing.accounts[actor],
      "${local._name}-${actor}@${local._project}.iam.gserviceaccount.com",
    )
  }

  # Message → whether it applies.
  _errors = {
    "unknown environment '${var.environment}'; project.yaml has ${local._names}" = (
      !can(local._cloud.environments[var.environment])
    )
    "${local._path}.project is empty; `gcloud projects list` shows the IDs of your projects" = (
      local._project == "" && can(local._cloud.environments[var.environment])
    )
    "cloud.environments.${local._promote_from}.project is empty, but images come from there" = (
      local._promote_from != "" && local._source_project == ""
    )
    "invalid name '${local._name}': must not start with gcp- or goog or contain google" = (
      can(regex("^(gcp-|goog)|google", local._name))
    )
    "unknown key: ${join(", ", local._unknown_keys)}; see `make doctor LEVEL=2`" = (
      length(local._unknown_keys) > 0
    )
    "cloud.events.batch_window_minutes > 0 requires a data.source in a bucket (gs://…)" = (
      try(local._cloud.events.batch_window_minutes, 0) != 0 && !startswith(local._data_source, "gs://")
    )
    "${local._path}.bucket must be empty: at level 2 Terraform creates the buckets" = (
      local._environment.bucket != ""
    )
  }
}

output "settings" {
  description = "The settings that Terraform needs, with defaults filled in."
  value = merge(local._cloud, {
    name             = local._name
    project          = local._project
    environment      = var.environment
    promote_from     = local._promote_from
    customer_managed = local._cloud.encryption == "customer-managed"
    data_source      = startswith(local._data_source, "gs://") ? local._data_source : ""
    events = merge(
      { schedule = "", ingest = "0 3 * * *", batch_window_minutes = 0 }, local._cloud.events
    )
    budget  = merge({ monthly = 0, billing_account = "" }, local._cloud.budget)
    mirrors = merge({ base_images = "", python_index = "" }, local._cloud.mirrors)
    repository = merge({ name = "", id = "", branch = "main" }, local._cloud.repository, {
      host = try(coalesce(local._cloud.repository.host), "https://gitlab.com")
    })
  })

  precondition {
    condition = !anytrue(values(local._errors))
    error_message = join("\n", [
      for message, applies in local._errors : "project.yaml: ${message}." if applies
    ])
  }
}

output "names" {
  description = "Names and IDs of the environment's resources, created here or existing."
  value = {
    accounts = local._accounts # actor → e-mail address
    account_ids = {
      for actor, email in local._accounts :
      actor => "projects/${regex("@([^.]+)", email)[0]}/serviceAccounts/${email}"
    }
    buckets = merge({
      for root, suffix in { pipeline_root = "pipelines", storage = "storage", data = "data" } :
      root => try(local._existing.buckets[root], "${local._project}-${local._name}-${suffix}")
      }, {
      state = "${local._project}-${local._name}-terraform"
      # Of the environment whose images run here, if any.
      source = try(
        local._source.existing.buckets.storage, "${local._source_project}-${local._name}-storage"
      )
    })
    images = local._images
    image_prefix = join("/", [
      "${split("/", local._images)[3]}-docker.pkg.dev",
      split("/", local._images)[1], split("/", local._images)[5],
    ])
    templates = "${local._name}-templates" # the repository of compiled pipelines
    topics = {
      for topic in ["requests", "data", "dead-letters"] :
      topic => "projects/${local._project}/topics/${local._name}-${topic}"
    }
    # Vertex AI accepts endpoint IDs of at most ten digits.
    endpoint = tostring(1000000000 + parseint(substr(sha256(local._name), 0, 7), 16))
    key_ring = local._key_ring
    # Use → key ID; empty with Google-managed keys.
    keys = {
      for use in concat(
        ["storage", "registry", "vertex", "pubsub", "run", "secrets"],
        local._cloud.data_ingestion == "managed-airflow" ? ["airflow"] : [],
        local._cloud.workbench ? ["compute"] : [],
      ) : use => try(local._existing.keys[use], "${local._key_ring}/cryptoKeys/${use}")
      if local._cloud.encryption == "customer-managed"
    }
    network = coalesce(
      local._existing.network, "projects/${local._project}/global/networks/${local._name}"
    )
    subnetwork = coalesce(
      local._existing.subnetwork, "${local._region}/subnetworks/${local._name}"
    )
    network_attachment = (
      local._cloud.private ? "${local._region}/networkAttachments/${local._name}" : ""
    )
    build_pool = (
      local._cloud.private && local._existing.build_pool == ""
      ? "${local._location}/workerPools/${local._name}" : local._existing.build_pool
    )
    source_images = try(coalesce(local._source.existing.images), join("/", [
      "projects", local._source_project, "locations", local._cloud.region,
      "repositories", local._name,
    ]))
  }
}

output "existing" {
  description = "Resources that exist already and are not created, as in project.yaml."
  value       = local._existing
}
