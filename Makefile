# make demo: sample from the models that come with the project, then train one epoch (make demo SHORT=1: a minute).
# make test: ruff, mypy and pytest.
# make mutants: the field's known bugs, put into this code at run time; each must fail a test.
# All make .venv and install into it once; PYTHON=... uses an environment made elsewhere.

ifdef PYTHON
demo-env test-env:
else
PYTHON := .venv/bin/python
demo-env: .venv/installed
test-env: .venv/installed-test
endif

.venv/bin/python:
	python3 -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-test: pyproject.toml data/requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' -r data/requirements.txt
	touch $@ .venv/installed

ifdef SHORT
TRAIN := trainer.limit_train_batches=20 optim.decay_steps=20
SAMPLE := --preset draft
endif

demo: demo-env
	$(PYTHON) sample.py --ckpt toon64 --factor 16 8 4 --num-samples 2 --out samples/demo/toon64 --overwrite $(SAMPLE) \
		--ref data/references/photo_astronaut.png data/references/painting_*.png data/references/scribble_*.png
	$(PYTHON) sample.py --ckpt animals64 --factor 32 16 8 --num-samples 2 --out samples/demo/animals64 --overwrite $(SAMPLE) \
		--ref data/references/photo_cat.png data/references/field_*.png data/references/painting_*re*.png
	$(PYTHON) train.py configs/toon32.yaml trainer.max_epochs=1 trainer.default_root_dir=samples/demo/runs $(TRAIN)
	@echo
	@echo "pictures     samples/demo/toon64/grid.png, samples/demo/animals64/grid.png; of the epoch, after which it still draws noise: samples/demo/runs/toon32/*/grids/"
	@echo "TensorBoard  $(dir $(PYTHON))tensorboard --logdir samples/demo/runs --samples_per_plugin images=1000"

test: test-env
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile

mutants: test-env
	$(PYTHON) -m tests.mutation

.PHONY: demo test mutants demo-env test-env
