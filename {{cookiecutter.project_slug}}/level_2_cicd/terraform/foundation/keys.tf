# Customer-managed keys: one key ring, and one key per use for the agents of that service only.
# Google never deletes a key ring or its keys: to apply again after a destroy, set
# existing.key_ring and existing.keys in project.yaml.
locals {
  # The service agents: Google's own service accounts, which act for its services.
  agents = {
    for agent, domain in {
      storage     = "gs-project-accounts"
      registry    = "gcp-sa-artifactregistry"
      vertex      = "gcp-sa-aiplatform"
      vertex-code = "gcp-sa-aiplatform-cc"
      pubsub      = "gcp-sa-pubsub"
      run         = "serverless-robot-prod"
      secrets     = "gcp-sa-secretmanager"
      compute     = "compute-system"
      notebooks   = "gcp-sa-notebooks"
      airflow     = "cloudcomposer-accounts"
    } : agent => "service-${local.number}@${domain}.iam.gserviceaccount.com"
  }
  # Key → agents that use it, where not the agent of the same name alone.
  _key_users = {
    vertex  = ["vertex", "vertex-code"]
    compute = ["compute", "notebooks"]
    airflow = ["airflow", "storage"]
  }
  # The owner of another project's key grants its use.
  _key_grants = merge([
    for use, key in local.names.keys : {
      for agent in lookup(local._key_users, use, [use]) :
      "${use} ${agent}" => { key = key, member = "serviceAccount:${local.agents[agent]}" }
    } if split("/", key)[1] == local.project
  ]...)
}

# Google creates agents lazily, and a grant to one that does not exist fails.
resource "google_project_service_identity" "this" {
  for_each = toset(concat(
    ["aiplatform", "artifactregistry", "pubsub", "run", "secretmanager"],
    local.airflow ? ["composer"] : [],
    local.settings.workbench ? ["notebooks"] : [],
  ))
  provider = google-beta
  project  = local.project
  service  = google_project_service.this[each.key].service
}

# Reading this data source creates the agent of Cloud Storage.
data "google_storage_project_service_account" "this" {
  project    = local.project
  depends_on = [google_project_service.this]
}

resource "google_kms_key_ring" "this" {
  count    = local.settings.customer_managed && local.existing.key_ring == "" ? 1 : 0
  name     = local.name
  location = local.region

  depends_on = [google_project_service.this]
}

resource "google_kms_crypto_key" "this" {
  for_each        = setsubtract(keys(local.names.keys), keys(local.existing.keys))
  name            = each.key
  key_ring        = try(google_kms_key_ring.this[0].id, local.existing.key_ring)
  purpose         = "ENCRYPT_DECRYPT"
  rotation_period = "7776000s" # 90 days

  lifecycle {
    prevent_destroy = true # without it the encrypted data is lost
  }
}

resource "google_kms_crypto_key_iam_member" "this" {
  for_each = {
    for name, grant in local._key_grants : name => grant if !endswith(name, "-code")
  }
  crypto_key_id = each.value.key
  role          = "roles/cloudkms.cryptoKeyEncrypterDecrypter"
  member        = each.value.member

  depends_on = [
    google_kms_crypto_key.this, google_project_service_identity.this,
    data.google_storage_project_service_account.this,
  ]
}

# Google creates this agent with the project's first training job and rejects the grant before:
# run `make foundation` again then. It is separate so that nothing else waits for it.
resource "google_kms_crypto_key_iam_member" "custom_code" {
  for_each = {
    for name, grant in local._key_grants : name => grant if endswith(name, "-code")
  }
  crypto_key_id = each.value.key
  role          = "roles/cloudkms.cryptoKeyEncrypterDecrypter"
  member        = each.value.member

  depends_on = [google_kms_crypto_key_iam_member.this]
}
