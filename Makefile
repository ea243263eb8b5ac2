# make pretrain    train a small LLaMA on two CPU cores, minutes; nothing is downloaded but Python packages
# make test        the quick tests, all but those marked slow: before every change
# make test-all    all tests: what .ci/run runs
# make docs        the pages of docs/ that follow from docstrings and records
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
NPROC ?= 2
ARGS ?=

.PHONY: pretrain test test-all lint types docs clean

pretrain: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) torch.distributed.run --nproc-per-node $(NPROC) launch/pretrain.py configs/quickstart.yaml $(ARGS)

test: $(VENV)/installed
	$(RUN) pytest -n auto --dist loadfile -m "not slow" $(ARGS)

test-all: $(VENV)/installed
	$(RUN) pytest -n auto --dist loadfile $(ARGS)

lint: $(VENV)/installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/installed
	$(RUN) mypy

docs: $(VENV)/installed
	$(VENV)/bin/python docs/generate.py

clean:
	rm -rf $(VENV) build *.egg-info

IN_RANGE := import torch; v = tuple(map(int, torch.__version__.split(".")[:2])); exit(not (2, 11) <= v <= (2, 13))
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))
NAMES := from importlib.metadata import distributions as d; print(*{f"^{x.name}==" for x in d()}, sep="\n")

# A torch in range that $(PYTHON) already has, perhaps a CUDA build, is used with all that is beside it, and only what
# is missing gets installed; otherwise everything is, at the pinned versions.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV), a minute or two"
	@$(PYTHON) -m venv --clear $(VENV)
	@cp constraints.txt $(VENV)/constraints.txt
	@if $(PYTHON) -c '$(IN_RANGE)' 2>/dev/null; then \
		echo "using the torch of $(PYTHON)"; \
		$(PYTHON) -c '$(PACKAGES)' > $$($(VENV)/bin/python -c '$(PACKAGES)')/inherited.pth; \
		$(PYTHON) -c '$(NAMES)' > $(VENV)/inherited.txt; \
		grep -vi -f $(VENV)/inherited.txt constraints.txt > $(VENV)/constraints.txt; \
	fi
	@$(RUN) pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@
