# Level 1: pipeline, model registry and server on this machine; RUNNER=vertex and `train` use Google Cloud.
PORT ?= 8080

.PHONY: level1
level1: setup ## Run the pipeline: preprocess, train, evaluate, gate, register (RUNNER=docker or RUNNER=vertex)
	@$(RUN_PYTHON) -m level_1_pipeline.run

.PHONY: containers
containers: setup ## Build the images whose inputs changed: all, or NAME="train predict" (PUSH=1 pushes them)
	@$(RUN_PYTHON) -m level_1_pipeline.containers $(NAME) $(if $(PUSH),--push)

.PHONY: status
status: setup ## Show the champion and the last runs; RUN=ID shows one run
	@$(RUN_PYTHON) -m level_1_pipeline.status $(if $(RUN),--run "$$RUN")

.PHONY: rollback
rollback: setup ## Make another version the champion: VERSION=1 (DRY_RUN=1 with RUNNER=vertex prints the requests)
	@$(if $(VERSION),,echo 'error: VERSION is missing, for example make rollback VERSION=1; make status lists them' >&2; exit 2)
	@$(RUN_PYTHON) -m level_1_pipeline.status --rollback "$$VERSION"

.PHONY: serve
serve: setup ## Serve the champion on this machine, PORT=8080; a new champion is loaded automatically
	@$(RUN_PYTHON) -m predictor.server --registry registry --port "$(PORT)"

# Build the code as a wheel and an sdist in dist/, to predict in another program.
.PHONY: package
package: setup
	@$(RUN_PYTHON) -m build --quiet --no-isolation --outdir dist .

# ── Google Cloud with your own credentials ──────────────────────────────────────────────────────
.PHONY: gpu-jobs
gpu-jobs: setup ## List the machines for training jobs, with prices (MINUTES=30); `make gpu-job JOB=l4` prints one
	@$(RUN_PYTHON) -m level_1_pipeline.vertex.gpu_jobs $(if $(MINUTES),--minutes "$$MINUTES")

# Print one job as `gcloud ai custom-jobs create --config=` takes it: JOB=l4.
.PHONY: gpu-job
gpu-job: setup
	@$(if $(JOB),,echo 'error: JOB is missing, for example make gpu-job JOB=l4; make gpu-jobs lists them' >&2; exit 2)
	@$(RUN_PYTHON) -m level_1_pipeline.vertex.gpu_jobs "$$JOB"

.PHONY: train
train: setup ## Run a custom training job: JOB=l4, or those of project.yaml in order (DRY_RUN=1 prints the request)
	@$(RUN_PYTHON) -m level_1_pipeline.vertex.train $(if $(JOB),--job "$$JOB") $(if $(DRY_RUN),--dry-run)
