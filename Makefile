# From a bare Python 3.11: `make quickstart` runs the main job, `make test` the tests, `make check` the static checks.
# Two environments: .venv (transformers 4.57 with optimum-onnx) and .venv-tf5 (transformers 5). Only installing uses the network.
# Another Python goes into another environment: make test-fast PYTHON=python3.12 VENV=.venv-py312

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
JOBS ?= 2
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_EVALUATE_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
PYTEST := -m pytest -n $(JOBS)
COVERAGE := --cov --cov-report=term
QUICKSTART := runs/quickstart
WHEEL_TEST := build/wheel-test
SHORT := $(foreach name,masks pruned small,--set stages.$(name).train.steps=20) --set measure[2].rounds=2
BENCHMARKS := adaptive_kl deployment gpu training_step

.PHONY: help quickstart test test-fast test-tf5 check format hooks docs wheel-test bench clean

help:
	@echo "make quickstart   install, then compress and measure a small GPT-2 offline into $(QUICKSTART)"
	@echo "make test-fast    the tests that are not marked slow"
	@echo "make test         all tests with coverage (transformers 4.57 and optimum)"
	@echo "make test-tf5     all tests on transformers 5"
	@echo "make check        format, lint, types, import floors, documentation"
	@echo "make format       rewrite the sources as 'make check' wants them"
	@echo "make hooks        let git run 'make check' before each commit (needs pre-commit)"
	@echo "make docs         build the documentation site into site/"
	@echo "make wheel-test   install the wheel into an empty environment and run the main job from it"
	@echo "make bench        the comparisons of benchmarks/"
	@echo "make clean        remove environments, caches and runs"

$(VENV): $(VENV)/installed
.venv-tf5: .venv-tf5/installed

$(VENV)/installed: pyproject.toml constraints/optimum.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -c constraints/optimum.txt -e '.[optimum,tensorboard,dev,docs]'
	touch $@

.venv-tf5/installed: pyproject.toml constraints/transformers5.txt
	$(PYTHON) -m venv .venv-tf5
	.venv-tf5/bin/python -m pip install --quiet --upgrade pip
	.venv-tf5/bin/python -m pip install --quiet -c constraints/transformers5.txt -e '.[tensorboard,oracle,dev]'
	touch $@

quickstart: $(VENV)/installed
	$(OFFLINE) $(VENV)/bin/compress-lm run recipes/quickstart/quickstart.yaml --workdir $(QUICKSTART)

test: $(VENV)/installed
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST) $(COVERAGE)

test-fast: $(VENV)/installed
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST) -m "not slow"

test-tf5: .venv-tf5/installed
	$(OFFLINE) OMP_NUM_THREADS=1 .venv-tf5/bin/python $(PYTEST)

check: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(OFFLINE) $(VENV)/bin/python -m pytest -q tests/test_floors.py tests/test_docs.py

format: $(VENV)/installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

hooks: $(VENV)/installed
	pre-commit install

docs: $(VENV)/installed
	$(OFFLINE) NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

wheel-test: $(VENV)/installed
	rm -rf $(WHEEL_TEST)
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEEL_TEST) .
	$(PYTHON) -m venv $(WHEEL_TEST)/venv
	$(WHEEL_TEST)/venv/bin/python -m pip install --quiet -c constraints/optimum.txt $(WHEEL_TEST)/*.whl
	cp -r recipes $(WHEEL_TEST)/recipes
	cd $(WHEEL_TEST) && $(OFFLINE) venv/bin/compress-lm run recipes/quickstart/quickstart.yaml --workdir run $(SHORT)
	cd $(WHEEL_TEST) && $(OFFLINE) venv/bin/python -c "import compress, pathlib; assert 'venv' in pathlib.Path(compress.__file__).parts"

bench: $(VENV)/installed
	code=0; for name in $(BENCHMARKS); do echo "== $$name"; $(OFFLINE) $(VENV)/bin/python benchmarks/$$name.py || code=1; done; exit $$code

clean:
	rm -rf .venv .venv-* build dist runs site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
