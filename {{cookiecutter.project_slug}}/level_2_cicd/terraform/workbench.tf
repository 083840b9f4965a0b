# A machine with Jupyter in the cloud, by choice. It stops by itself after an hour in which nobody does anything; its disks bill on.
resource "google_workbench_instance" "this" {
  #checkov:skip=CKV2_GCP_28:it has no external address where cloud.private says so
  count    = local.chosen.workbench ? 1 : 0
  name     = "${local.chosen.name}-workbench"
  location = "${local.chosen.region}-b"

  gce_setup {
    machine_type         = "e2-standard-4"
    disable_public_ip    = local.chosen.private
    enable_ip_forwarding = false

    service_accounts {
      email = module.names.accounts.trainer
    }

    shielded_instance_config {
      enable_secure_boot          = true
      enable_vtpm                 = true
      enable_integrity_monitoring = true
    }

    boot_disk {
      disk_type       = "PD_BALANCED"
      disk_size_gb    = 150
      disk_encryption = contains(keys(local.keys), "compute") ? "CMEK" : "GMEK"
      kms_key         = try(local.keys.compute, null)
    }

    data_disks {
      disk_type       = "PD_BALANCED"
      disk_size_gb    = 100
      disk_encryption = contains(keys(local.keys), "compute") ? "CMEK" : "GMEK"
      kms_key         = try(local.keys.compute, null)
    }

    dynamic "network_interfaces" {
      for_each = local.chosen.private ? [1] : []
      content {
        network = module.names.network.network
        subnet  = module.names.network.subnetwork
      }
    }

    metadata = {
      idle-timeout-seconds = "3600"
    }
  }
}
