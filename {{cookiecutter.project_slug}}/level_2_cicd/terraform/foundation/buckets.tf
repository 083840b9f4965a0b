# Regional, versioned buckets without public access and without object ACLs.
locals {
  # Suffixes of files deleted after 90 days; and how long replaced and deleted objects stay, in days
  # or newer versions. Models stay: a registered version is loaded from where its run wrote it.
  _buckets = {
    pipeline_root = { expire = [".parquet"], days = 7, versions = null } # the splits of runs
    storage       = { expire = [".tgz"], days = 30, versions = null }    # sources of builds
    data          = { expire = [], days = 90, versions = null }
    state         = { expire = [], days = null, versions = 20 }
  }
}

resource "google_storage_bucket" "this" {
  #checkov:skip=CKV_GCP_62:Cloud Audit Logs record access; access logs would need another bucket
  for_each = {
    for root, rules in local._buckets : root => rules if !can(local.existing.buckets[root])
  }
  name                        = local.names.buckets[each.key]
  location                    = local.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  versioning {
    enabled = true
  }

  dynamic "encryption" {
    for_each = try(local.names.keys.storage, null)[*]
    content {
      default_kms_key_name = encryption.value
    }
  }

  dynamic "lifecycle_rule" {
    for_each = each.value.expire
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
      days_since_noncurrent_time = each.value.days
      num_newer_versions         = each.value.versions
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

  lifecycle {
    prevent_destroy = true # data, models, and the state of this configuration
  }

  depends_on = [google_kms_crypto_key_iam_member.this]
}
