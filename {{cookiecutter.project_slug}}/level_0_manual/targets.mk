# Level 0: four notebooks on this machine.

.PHONY: notebook
notebook: setup ## Open the notebooks in Jupyter; saving a notebook also writes its module
	@# Jupyter must start at the project's root: below it, it saves the notebook alone.
	@$(VENV)/bin/jupyter lab --ServerApp.root_dir="$(CURDIR)" \
		--LabApp.default_url=/lab/tree/level_0_manual/data.ipynb

.PHONY: level0
level0: setup ## Run the four notebooks: reports and a model in runs/ID/ (SET="hyperparameters.epochs=50")
	@$(RUN_PYTHON) -m level_0_manual.run

.PHONY: runs
runs: setup ## List the runs, best first
	@$(RUN_PYTHON) -m project.runs

.PHONY: predict
predict: setup ## Predict with the server or the newest model: ROW=3 (test row), ROW='{"age": 41}', CSV=new.csv, RUN=ID
	@$(RUN_PYTHON) -m level_0_manual.predict --port "$(PORT)" \
		$(if $(RUN),--run "$$RUN") $(if $(ROW),--row "$$ROW") $(if $(CSV),--csv "$$CSV")

.PHONY: sync
sync: setup ## Synchronize notebooks and modules; FROM=notebook or FROM=module decides when both have changed
	@$(RUN_PYTHON) -m level_0_manual.notebooks sync $(if $(FROM),--from "$$FROM") $(if $(PAIR),"$$PAIR")

# Remove the outputs from the notebooks; the pre-commit hook does this too.
.PHONY: strip
strip: setup
	@$(VENV)/bin/nbstripout --keep-id level_0_manual/*.ipynb
