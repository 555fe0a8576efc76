# make demo: sample from the bundled models, then train until there are rough faces (make demo SHORT=1: a minute).
# make app: a page in the browser on which one steers samples; ARGS="--ckpt PATH" passes flags to app.py.
# make test: ruff, mypy and the unit tests.
# make test-system: tests of whole processes: signals, kills, torchrun, SLURM, torch.compile, commands.
# make docs: the site, in build/site/index.html, with the examples of docs/examples/ run; a warning is an error.
# make mutants: known bugs of other implementations, put into this code at run time; each must fail a unit test.
# make test-data: that the scripts in data/ draw the embedded images (installs data/tools/requirements.txt).
# make fuzz: ten thousand bad inputs (25 minutes).
# Each makes .venv and installs into it once; PYTHON=... uses another environment.

ifdef PYTHON
demo-env app-env test-env docs-env data-env:
else
PYTHON := .venv/bin/python
demo-env: .venv/installed
app-env: .venv/installed-app
test-env: .venv/installed-test
docs-env: .venv/installed-docs
data-env: .venv/installed-data
endif

PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
PYTEST = $(PYTHON) -m pytest --numprocesses 2

.venv/bin/python:
	python3 -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(PIP) --editable .
	touch $@

.venv/installed-app: pyproject.toml | .venv/bin/python
	$(PIP) --editable '.[app]'
	touch $@ .venv/installed

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(PIP) --editable '.[test]'
	touch $@ .venv/installed .venv/installed-app

.venv/installed-docs: pyproject.toml | .venv/bin/python
	$(PIP) --editable '.[docs]'
	touch $@ .venv/installed

.venv/installed-data: data/tools/requirements.txt | .venv/installed-test
	$(PIP) -r data/tools/requirements.txt
	touch $@

ifdef SHORT
TRAIN := trainer.max_steps=20 grid.every_n_steps=10
SAMPLE := --preset draft
endif

demo: demo-env
	$(PYTHON) sample.py --ckpt toon64 --factor 16 8 4 --num-samples 2 --out samples/demo/toon64 --overwrite $(SAMPLE) \
		--ref data/references/photo_astronaut.png data/references/painting_*.png data/references/scribble_*.png
	$(PYTHON) sample.py --ckpt animals64 --factor 32 16 8 --num-samples 2 --out samples/demo/animals64 --overwrite $(SAMPLE) \
		--ref data/references/photo_cat.png data/references/field_*.png data/references/painting_*re*.png
	$(PYTHON) sample.py --ckpt relief64 --factor 4 --range 1000:500 --out samples/demo/relief64 --overwrite $(SAMPLE) --ref data/maps
	$(PYTHON) train.py configs/toon32.yaml trainer.max_steps=600 trainer.default_root_dir=samples/demo/runs \
		grid.every_n_epochs=0 grid.every_n_steps=100 calibration.images=0 $(TRAIN)
	@echo
	@echo "images       samples/demo/{toon64,animals64,relief64}/grid.png; of the training, from noise to rough faces: samples/demo/runs/toon32/*/grids/"
	@echo "tensorboard  $(dir $(PYTHON))tensorboard --logdir samples/demo/runs --samples_per_plugin images=1000"

app: app-env
	$(PYTHON) app.py $(ARGS)

test: test-env
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTEST) --dist worksteal

test-system: test-env
	$(PYTEST) --dist loadfile tests/system

docs: docs-env
	$(PYTHON) -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/site

mutants: test-env
	$(PYTHON) -m tests.mutation

test-data: data-env
	$(PYTHON) -m pytest data/tools

fuzz: test-env
	$(PYTHON) -m tests.fuzz --count 10000

.PHONY: demo app test test-system docs mutants test-data fuzz demo-env app-env test-env docs-env data-env
