# make pretrain    train a small LLaMA on two CPU cores, minutes; nothing is downloaded but Python packages
# make test        the whole test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NPROC ?= 2
ARGS ?=

.PHONY: pretrain test lint types clean

pretrain: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(NPROC) launch/pretrain.py configs/quickstart.yaml $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info

# A torch that the machine already has, in range (perhaps a CUDA build), is used and not replaced by the pinned one.
$(VENV)/installed: pyproject.toml constraints.txt
	@if $(PYTHON) -c 'import torch; v = tuple(map(int, torch.__version__.split(".")[:2])); exit(not (2, 11) <= v <= (2, 13))' 2>/dev/null; then \
		echo "using the torch that is installed"; \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
		sed '/^torch==/d; /^numpy==/d; /^transformers==/d; /^tokenizers==/d; /^huggingface_hub==/d' constraints.txt > $(VENV)/constraints.txt; \
	else \
		$(PYTHON) -m venv $(VENV); \
		cp constraints.txt $(VENV)/constraints.txt; \
	fi
	@echo "installing into $(VENV), a minute or two"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@
