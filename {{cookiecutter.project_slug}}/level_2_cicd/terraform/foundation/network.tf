# The private mode: one network whose machines have no external address. Google's APIs are reached at an address within it
# (Private Service Connect), Vertex AI reaches in through an attachment, and builds run in a pool that is peered with it.
# What comes from the internet otherwise (base images, Python packages, providers) comes from mirrors: cloud.mirrors.
locals {
  makes_network    = local.chosen.private && local.existing.network == ""
  makes_subnetwork = local.chosen.private && local.existing.subnetwork == ""
  makes_pool       = local.chosen.private && local.existing.build_pool == ""
  network          = local.makes_network ? google_compute_network.this[0].id : module.names.network.network
  subnetwork       = local.makes_subnetwork ? google_compute_subnetwork.this[0].id : module.names.network.subnetwork
}

resource "google_compute_network" "this" {
  count                   = local.makes_network ? 1 : 0
  name                    = local.chosen.name
  auto_create_subnetworks = false

  depends_on = [google_project_service.this]
}

resource "google_compute_subnetwork" "this" {
  count                    = local.makes_subnetwork ? 1 : 0
  name                     = local.chosen.name
  network                  = local.network
  region                   = local.chosen.region
  ip_cidr_range            = "10.10.0.0/20"
  private_ip_google_access = true

  log_config {
    aggregation_interval = "INTERVAL_10_MIN"
    flow_sampling        = 0.1
    metadata             = "EXCLUDE_ALL_METADATA"
  }
}

resource "google_compute_firewall" "inside" {
  count         = local.makes_network ? 1 : 0
  name          = "${local.chosen.name}-inside"
  network       = local.network
  description   = "Machines of one training job talk to each other; nothing else comes in"
  direction     = "INGRESS"
  source_ranges = ["10.10.0.0/20"]

  allow {
    protocol = "tcp"
    ports    = ["1024-65535"]
  }
}

resource "google_compute_global_address" "apis" {
  count        = local.makes_network ? 1 : 0
  name         = "${local.chosen.name}-apis"
  network      = local.network
  purpose      = "PRIVATE_SERVICE_CONNECT"
  address_type = "INTERNAL"
  address      = "10.10.16.2"
}

resource "google_compute_global_forwarding_rule" "apis" {
  count                 = local.makes_network ? 1 : 0
  name                  = substr("apis${replace(local.chosen.name, "-", "")}", 0, 20) # letters and digits, 20 at most
  network               = local.network
  ip_address            = google_compute_global_address.apis[0].id
  load_balancing_scheme = ""
  target                = "all-apis"
}

resource "google_dns_managed_zone" "apis" {
  for_each   = local.makes_network ? toset(["googleapis.com", "pkg.dev", "run.app"]) : []
  name       = "${local.chosen.name}-${replace(each.key, ".", "-")}"
  dns_name   = "${each.key}."
  visibility = "private"

  private_visibility_config {
    networks {
      network_url = local.network
    }
  }

  depends_on = [google_project_service.this]
}

resource "google_dns_record_set" "apis" {
  for_each     = google_dns_managed_zone.apis
  managed_zone = each.value.name
  name         = "*.${each.value.dns_name}"
  type         = "A"
  ttl          = 300
  rrdatas      = [google_compute_global_address.apis[0].address]
}

# Vertex AI's own machines for training and pipelines get an address in the subnetwork.
resource "google_compute_network_attachment" "this" {
  count                 = local.chosen.private ? 1 : 0
  name                  = local.chosen.name
  region                = local.chosen.region
  connection_preference = "ACCEPT_MANUAL"
  subnetworks           = [local.subnetwork]

  lifecycle {
    ignore_changes = [producer_accept_lists] # Vertex AI enters itself
  }
}

# It enters itself there, for which Google asks for this role.
resource "google_project_iam_member" "network_attachment" {
  #checkov:skip=CKV_GCP_42:it is the role that Google names for its own agent, and that agent alone gets it, in the private mode
  count   = local.chosen.private ? 1 : 0
  project = local.chosen.project
  role    = "roles/compute.networkAdmin"
  member  = "serviceAccount:${local.agents.vertex}"

  depends_on = [google_project_service_identity.this]
}

resource "google_compute_global_address" "builds" {
  count         = local.makes_pool ? 1 : 0
  name          = "${local.chosen.name}-builds"
  network       = local.network
  purpose       = "VPC_PEERING"
  address_type  = "INTERNAL"
  prefix_length = 24
}

resource "google_service_networking_connection" "builds" {
  count                   = local.makes_pool ? 1 : 0
  network                 = local.network
  service                 = "servicenetworking.googleapis.com"
  reserved_peering_ranges = [google_compute_global_address.builds[0].name]

  depends_on = [google_project_service.this]
}

resource "google_cloudbuild_worker_pool" "this" {
  count    = local.makes_pool ? 1 : 0
  name     = local.chosen.name
  location = local.chosen.region

  worker_config {
    machine_type   = "e2-standard-4"
    disk_size_gb   = 200
    no_external_ip = true
  }

  network_config {
    peered_network = local.network
  }

  depends_on = [google_service_networking_connection.builds]
}
