# Optional Jupyter instance. It stops after an idle hour; its disks are billed until it is deleted.
resource "google_workbench_instance" "this" {
  #checkov:skip=CKV2_GCP_28:no external address when cloud.private is true
  count    = local.settings.workbench ? 1 : 0
  name     = "${local.name}-workbench"
  location = "${local.region}-b"

  gce_setup {
    machine_type         = "e2-standard-4"
    disable_public_ip    = local.settings.private
    enable_ip_forwarding = false

    service_accounts {
      email = local.names.accounts.trainer
    }

    shielded_instance_config {
      enable_secure_boot          = true
      enable_vtpm                 = true
      enable_integrity_monitoring = true
    }

    boot_disk {
      disk_type       = "PD_BALANCED"
      disk_size_gb    = 150
      disk_encryption = contains(keys(local.names.keys), "compute") ? "CMEK" : "GMEK"
      kms_key         = try(local.names.keys.compute, null)
    }

    data_disks {
      disk_type       = "PD_BALANCED"
      disk_size_gb    = 100
      disk_encryption = contains(keys(local.names.keys), "compute") ? "CMEK" : "GMEK"
      kms_key         = try(local.names.keys.compute, null)
    }

    dynamic "network_interfaces" {
      for_each = local.settings.private ? [1] : []
      content {
        network = local.names.network
        subnet  = local.names.subnetwork
      }
    }

    metadata = {
      idle-timeout-seconds = "3600"
    }
  }
}
