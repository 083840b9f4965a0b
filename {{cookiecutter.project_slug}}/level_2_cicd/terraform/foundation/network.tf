# Private mode: a network without external IP addresses. Google's APIs are reachable at an internal
# address (Private Service Connect), Vertex AI connects through a network attachment, and builds run
# in a peered private pool. Base images, Python packages and providers come from cloud.mirrors.
locals {
  _makes_network    = local.settings.private && local.existing.network == ""
  _makes_subnetwork = local.settings.private && local.existing.subnetwork == ""
  _makes_pool       = local.settings.private && local.existing.build_pool == ""
  _network          = local._makes_network ? google_compute_network.this[0].id : local.names.network
  _subnetwork = (
    local._makes_subnetwork ? google_compute_subnetwork.this[0].id : local.names.subnetwork
  )
}

resource "google_compute_network" "this" {
  count                   = local._makes_network ? 1 : 0
  name                    = local.name
  auto_create_subnetworks = false

  depends_on = [google_project_service.this]
}

resource "google_compute_subnetwork" "this" {
  count                    = local._makes_subnetwork ? 1 : 0
  name                     = local.name
  network                  = local._network
  region                   = local.region
  ip_cidr_range            = "10.10.0.0/20"
  private_ip_google_access = true

  log_config {
    aggregation_interval = "INTERVAL_10_MIN"
    flow_sampling        = 0.1
    metadata             = "EXCLUDE_ALL_METADATA"
  }
}

resource "google_compute_firewall" "inside" {
  count         = local._makes_network ? 1 : 0
  name          = "${local.name}-inside"
  network       = google_compute_network.this[0].id
  description   = "Traffic between the machines of a training job"
  direction     = "INGRESS"
  source_ranges = ["10.10.0.0/20"]

  allow {
    protocol = "tcp"
    ports    = ["1024-65535"]
  }
}

resource "google_compute_global_address" "apis" {
  count        = local._makes_network ? 1 : 0
  name         = "${local.name}-apis"
  network      = google_compute_network.this[0].id
  purpose      = "PRIVATE_SERVICE_CONNECT"
  address_type = "INTERNAL"
  address      = "10.10.16.2"
}

resource "google_compute_global_forwarding_rule" "apis" {
  count                 = local._makes_network ? 1 : 0
  name                  = substr("apis${replace(local.name, "-", "")}", 0, 20) # at most 20
  network               = google_compute_network.this[0].id
  ip_address            = google_compute_global_address.apis[0].id
  load_balancing_scheme = ""
  target                = "all-apis"
}

resource "google_dns_managed_zone" "apis" {
  for_each   = local._makes_network ? toset(["googleapis.com", "pkg.dev", "run.app"]) : []
  name       = "${local.name}-${replace(each.key, ".", "-")}"
  dns_name   = "${each.key}."
  visibility = "private"

  private_visibility_config {
    networks {
      network_url = local._network
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

# Gives Vertex AI's machines for training and pipelines an address in the subnetwork.
resource "google_compute_network_attachment" "this" {
  count                 = local.settings.private ? 1 : 0
  name                  = local.name
  region                = local.region
  connection_preference = "ACCEPT_MANUAL"
  subnetworks           = [local._subnetwork]

  lifecycle {
    ignore_changes = [producer_accept_lists] # Vertex AI adds itself
  }
}

resource "google_compute_global_address" "builds" {
  count         = local._makes_pool ? 1 : 0
  name          = "${local.name}-builds"
  network       = local._network
  purpose       = "VPC_PEERING"
  address_type  = "INTERNAL"
  prefix_length = 24
}

resource "google_service_networking_connection" "builds" {
  count                   = local._makes_pool ? 1 : 0
  network                 = local._network
  service                 = "servicenetworking.googleapis.com"
  reserved_peering_ranges = [google_compute_global_address.builds[0].name]

  depends_on = [google_project_service.this]
}

resource "google_cloudbuild_worker_pool" "this" {
  count    = local._makes_pool ? 1 : 0
  name     = local.name
  location = local.region

  worker_config {
    machine_type   = "e2-standard-4"
    disk_size_gb   = 200
    no_external_ip = true
  }

  network_config {
    peered_network = local._network
  }

  depends_on = [google_service_networking_connection.builds]
}
