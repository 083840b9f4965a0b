# Customer-managed keys: one ring, one key for each service, each for that service's agents and nobody else.
# A ring and its keys outlive `terraform destroy`: Google never removes them. To apply again, name the ring as
# `existing.key_ring`, and the keys as `existing.keys`, in project.yaml.
locals {
  # Google's own accounts, which act for its services; the second part of each is the service.
  agents = {
    storage     = "service-${local.number}@gs-project-accounts.iam.gserviceaccount.com"
    registry    = "service-${local.number}@gcp-sa-artifactregistry.iam.gserviceaccount.com"
    vertex      = "service-${local.number}@gcp-sa-aiplatform.iam.gserviceaccount.com"
    vertex-code = "service-${local.number}@gcp-sa-aiplatform-cc.iam.gserviceaccount.com"
    pubsub      = "service-${local.number}@gcp-sa-pubsub.iam.gserviceaccount.com"
    run         = "service-${local.number}@serverless-robot-prod.iam.gserviceaccount.com"
    secrets     = "service-${local.number}@gcp-sa-secretmanager.iam.gserviceaccount.com"
    compute     = "service-${local.number}@compute-system.iam.gserviceaccount.com"
    notebooks   = "service-${local.number}@gcp-sa-notebooks.iam.gserviceaccount.com"
    airflow     = "service-${local.number}@cloudcomposer-accounts.iam.gserviceaccount.com"
  }
  # What a key is for → the agents that need it.
  key_users = {
    storage  = ["storage"]
    registry = ["registry"]
    vertex   = ["vertex", "vertex-code"]
    pubsub   = ["pubsub"]
    run      = ["run"]
    secrets  = ["secrets"]
    compute  = ["compute", "notebooks"]
    airflow  = ["airflow", "storage"]
  }
  made_keys = setsubtract(keys(module.names.keys), local.existing.keys)
  # Keys of other projects are their owners' business. Those of this one are granted, made here or before.
  own_keys = toset([for use, key in module.names.keys : use if split("/", key)[1] == local.chosen.project])
  key_grants = {
    for pair in flatten([for use in local.own_keys : [for agent in local.key_users[use] : { use = use, agent = agent }]]) :
    "${pair.use} ${pair.agent}" => pair
  }
}

# Agents are made lazily, and nothing can be granted to one that is not there yet. Cloud Storage's is made by asking for it.
resource "google_project_service_identity" "this" {
  for_each = toset(concat(
    ["aiplatform", "artifactregistry", "pubsub", "run", "secretmanager"],
    local.chosen.data_ingestion == "managed-airflow" ? ["composer"] : [],
    local.chosen.workbench ? ["notebooks"] : [],
  ))
  provider = google-beta
  project  = local.chosen.project
  service  = google_project_service.this[each.key].service
}

data "google_storage_project_service_account" "this" {
  project    = local.chosen.project
  depends_on = [google_project_service.this]
}

resource "google_kms_key_ring" "this" {
  count    = local.chosen.customer_managed && local.existing.key_ring == "" ? 1 : 0
  name     = local.chosen.name
  location = local.chosen.region

  depends_on = [google_project_service.this]
}

resource "google_kms_crypto_key" "this" {
  for_each        = local.made_keys
  name            = each.key
  key_ring        = local.existing.key_ring == "" ? google_kms_key_ring.this[0].id : local.existing.key_ring
  purpose         = "ENCRYPT_DECRYPT"
  rotation_period = "7776000s" # 90 days

  lifecycle {
    prevent_destroy = true # what it encrypts could never be read again
  }
}

resource "google_kms_crypto_key_iam_member" "this" {
  for_each      = { for name, pair in local.key_grants : name => pair if pair.agent != "vertex-code" }
  crypto_key_id = module.names.keys[each.value.use]
  role          = "roles/cloudkms.cryptoKeyEncrypterDecrypter"
  member        = "serviceAccount:${local.agents[each.value.agent]}"

  depends_on = [google_kms_crypto_key.this, google_project_service_identity.this, data.google_storage_project_service_account.this]
}

# Apart, so that nothing waits for it: Google makes this agent with the project's first training job, and refuses the grant
# before. Then type `make foundation` once more.
resource "google_kms_crypto_key_iam_member" "custom_code" {
  for_each      = { for name, pair in local.key_grants : name => pair if pair.agent == "vertex-code" }
  crypto_key_id = module.names.keys[each.value.use]
  role          = "roles/cloudkms.cryptoKeyEncrypterDecrypter"
  member        = "serviceAccount:${local.agents[each.value.agent]}"

  depends_on = [google_kms_crypto_key.this, google_project_service_identity.this, google_kms_crypto_key_iam_member.this]
}
