# The state, and the three buckets: what runs write, what is published and registered, and the rows. All of them are regional,
# closed to the public, and without rights on single objects.
locals {
  storage_key = try(module.names.keys.storage, null)
  # Days until an overwritten object is removed for good, and until files of these endings are: the rows that each run splits.
  # A run's model stays: a registered version is read from there.
  buckets = {
    pipeline_root = { noncurrent = 7, passing = [".parquet"] }
    storage       = { noncurrent = 30, passing = [".tgz"] } # the sources that builds were sent
    data          = { noncurrent = 90, passing = [] }
  }
}

resource "google_storage_bucket" "this" {
  #checkov:skip=CKV_GCP_62:who reads and writes is in Cloud Audit Logs; access logs would need a bucket of their own
  for_each                    = { for root, rule in local.buckets : root => rule if !contains(local.existing.buckets, root) }
  name                        = module.names.buckets[each.key]
  location                    = local.chosen.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  versioning {
    enabled = true
  }

  dynamic "encryption" {
    for_each = local.storage_key[*]
    content {
      default_kms_key_name = encryption.value
    }
  }

  dynamic "lifecycle_rule" {
    for_each = each.value.passing
    content {
      action {
        type = "Delete"
      }
      condition {
        age            = 90
        matches_suffix = [lifecycle_rule.value]
      }
    }
  }

  lifecycle_rule {
    action {
      type = "Delete"
    }
    condition {
      days_since_noncurrent_time = each.value.noncurrent
      with_state                 = "ARCHIVED"
    }
  }

  lifecycle_rule {
    action {
      type = "AbortIncompleteMultipartUpload"
    }
    condition {
      age = 7
    }
  }

  depends_on = [google_kms_crypto_key_iam_member.this]
}

resource "google_storage_bucket" "state" {
  #checkov:skip=CKV_GCP_62:who reads and writes is in Cloud Audit Logs; access logs would need a bucket of their own
  name                        = module.names.state_bucket
  location                    = local.chosen.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  versioning {
    enabled = true
  }

  dynamic "encryption" {
    for_each = local.storage_key[*]
    content {
      default_kms_key_name = encryption.value
    }
  }

  lifecycle_rule {
    action {
      type = "Delete"
    }
    condition {
      num_newer_versions = 20
      with_state         = "ARCHIVED"
    }
  }

  lifecycle {
    prevent_destroy = true # it holds this very state
  }

  depends_on = [google_kms_crypto_key_iam_member.this]
}
