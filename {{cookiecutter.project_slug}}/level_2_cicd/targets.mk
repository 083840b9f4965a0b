# Level 2: Terraform, Cloud Build and events; ENVIRONMENT=prod selects another environment of project.yaml.

.PHONY: foundation
foundation: setup ## One-time setup by an admin: buckets, service accounts, IAM, keys (PLAN=1: plan only; YES=1: no prompt)
	@$(RUN_PYTHON) -m level_2_cicd.infra foundation $(if $(PLAN),--plan) $(if $(YES),--yes)

.PHONY: plan
plan: setup ## Show what `make apply` would change
	@$(RUN_PYTHON) -m level_2_cicd.infra plan

.PHONY: apply
apply: setup ## Apply the stack: endpoint, trigger function, alerts; each push does this (YES=1: no prompt)
	@$(RUN_PYTHON) -m level_2_cicd.infra apply $(if $(YES),--yes)

.PHONY: destroy
destroy: setup ## Undeploy the models and destroy the stack; lists what remains (YES=1: no prompt)
	@$(RUN_PYTHON) -m level_2_cicd.infra destroy $(if $(YES),--yes)

.PHONY: cost
cost: setup ## Estimate the cost of each environment: idle month, run, 1,000 predictions (MINUTES=30 of training)
	@$(RUN_PYTHON) -m level_2_cicd.costs $(if $(MINUTES),--minutes "$$MINUTES")

.PHONY: request
request: setup ## Request a run of the published pipeline: SET="hyperparameters.epochs=50" (VERSION, EVENT, DRY_RUN=1)
	@$(RUN_PYTHON) -m level_2_cicd.request $(if $(EVENT),--event "$$EVENT") \
		$(if $(VERSION),--version "$$VERSION") $(if $(ATTEMPT),--attempt "$$ATTEMPT") $(if $(DRY_RUN),--dry-run)

.PHONY: submit
submit: setup ## Start the build that a push would start, with the files in this folder (DRY_RUN=1 prints the command)
	@$(RUN_PYTHON) -m level_2_cicd.submit_build $(if $(DRY_RUN),--dry-run)

# ── seldom needed ───────────────────────────────────────────────────────────────────────────────
# Release a Terraform lock that a killed apply left: ID=… from its error message (FOUNDATION=1: the foundation's).
.PHONY: unlock
unlock: setup
	@$(if $(ID),,echo 'error: ID is missing: make unlock ID=…, from the error of the blocked apply' >&2; exit 2)
	@$(RUN_PYTHON) -m level_2_cicd.infra unlock --id "$$ID" $(if $(FOUNDATION),--foundation)

# List every IAM role that the foundation grants, to whom and why.
.PHONY: grants
grants: setup
	@$(RUN_PYTHON) -m level_2_cicd.infra grants

# terraform fmt -check and validate; no account needed.
.PHONY: terraform-check
terraform-check: setup
	@$(RUN_PYTHON) -m level_2_cicd.infra check

# Create or update one Cloud Build trigger for each container (DRY_RUN=1 prints the commands).
.PHONY: setup-triggers
setup-triggers: setup
	@$(RUN_PYTHON) -m level_2_cicd.submit_build --triggers $(if $(DRY_RUN),--dry-run)

# ── steps of level_2_cicd/cloudbuild.yaml ───────────────────────────────────────────────────────
# What a pull request must pass.
.PHONY: check
check: lint test gpu-jobs

# Build the image that the build steps run in.
.PHONY: toolbox
toolbox:
	@level_2_cicd/toolbox/toolbox.sh

# Build and push missing images, each in a child build; NAME="train predict" limits them.
.PHONY: images
images: setup
	@$(RUN_PYTHON) -m level_2_cicd.builds $(NAME)

.PHONY: image
image: setup
	@$(RUN_PYTHON) -m level_2_cicd.builds $(NAME) --image "$(IMAGE)" --tag "$(TAG)"

# Store a software bill of materials (SBOM) of each image.
.PHONY: sbom
sbom: setup
	@$(RUN_PYTHON) -m level_2_cicd.sbom

# Compile the pipeline and publish it with its parameters; no event uses it yet.
.PHONY: publish
publish: setup
	@$(RUN_PYTHON) -m level_2_cicd.release publish

# Run the published pipeline once without registering a model; JOB_SPEC=l4: on that machine.
.PHONY: functional-test
functional-test: setup
	@$(RUN_PYTHON) -m level_2_cicd.release test

# Activate the published pipeline and start a run or a redeployment, if anything changed.
.PHONY: release
release: setup
	@$(RUN_PYTHON) -m level_2_cicd.release release
