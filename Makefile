# make demo: train on the embedded toon faces, then sample with reference pictures (make demo SHORT=1: a minute).
# make test: ruff, mypy and pytest.
# make museum: the field's known bugs, put into this code at run time; each must fail a test.
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
TRAIN := trainer.max_epochs=1 trainer.limit_train_batches=60 optim.decay_steps=60
SAMPLE := --steps 10
HELD_OUT := 64:72
else
HELD_OUT := 64:192
endif

demo: demo-env
	$(PYTHON) train.py configs/toon32.yaml $(TRAIN)
	$(PYTHON) sample.py --ref data/references --factor 4 8 --num-samples 4 --out samples/demo --overwrite $(SAMPLE)
	$(PYTHON) -m benchmarks.high_band --ref 'data/toon:test[$(HELD_OUT)]' $(SAMPLE)
	@echo
	@echo "pictures     samples/demo/grid.png, samples/demo/*_grid.png and runs/toon32/*/grids/"
	@echo "TensorBoard  $(dir $(PYTHON))tensorboard --logdir runs --samples_per_plugin images=1000"

test: test-env
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest

museum: test-env
	$(PYTHON) -m tests.museum

.PHONY: demo test museum demo-env test-env
