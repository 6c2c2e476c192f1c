# From a bare Python 3.11: `make quickstart` runs the main job, `make test` the tests, `make check` everything static.
# Two environments: .venv (transformers 4.57 with optimum-onnx) and .venv-tf5 (transformers 5). Only installing uses the network.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS ?= 2
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_EVALUATE_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
PYTEST := -m pytest -n $(JOBS)
QUICKSTART := runs/quickstart
BENCHMARKS := adaptive_kl deployment gpu training_step

.PHONY: help quickstart test test-tf5 check format bench clean

help:
	@echo "make quickstart   install, then compress and measure a small GPT-2 offline into $(QUICKSTART)"
	@echo "make test         the whole test suite (transformers 4.57 and optimum)"
	@echo "make test-tf5     the same suite on transformers 5"
	@echo "make check        format, lint, types, import floors, documentation"
	@echo "make format       rewrite the sources as 'make check' wants them"
	@echo "make bench        the comparisons of benchmarks/"
	@echo "make clean        remove environments, caches and runs"

.venv: .venv/installed
.venv-tf5: .venv-tf5/installed

.venv/installed: pyproject.toml constraints/optimum.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -c constraints/optimum.txt -e '.[optimum,tensorboard,dev]'
	touch $@

.venv-tf5/installed: pyproject.toml constraints/transformers5.txt
	$(PYTHON) -m venv .venv-tf5
	.venv-tf5/bin/python -m pip install --quiet --upgrade pip
	.venv-tf5/bin/python -m pip install --quiet -c constraints/transformers5.txt -e '.[tensorboard,oracle,dev]'
	touch $@

quickstart: .venv/installed
	$(OFFLINE) .venv/bin/compress-lm run recipes/quickstart/quickstart.yaml --workdir $(QUICKSTART)

test: .venv/installed
	$(OFFLINE) OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST)

test-tf5: .venv-tf5/installed
	$(OFFLINE) OMP_NUM_THREADS=1 .venv-tf5/bin/python $(PYTEST)

check: .venv/installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	$(OFFLINE) .venv/bin/python -m pytest -q tests/test_floors.py tests/test_docs.py

format: .venv/installed
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: .venv/installed
	code=0; for name in $(BENCHMARKS); do echo "== $$name"; $(OFFLINE) .venv/bin/python benchmarks/$$name.py || code=1; done; exit $$code

clean:
	rm -rf .venv .venv-tf5 build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
