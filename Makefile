# make demo: the model answers the four dialogs of example_chat_completion.py.
# make test: the tests.   make check: format and lint.   make clean: forget the virtual environment.
# make docs: the reference, from the docstrings, in docs/reference/index.html; a warning is an error.
# make bench: tokens/s beside Transformers and llama.cpp, if that is there: BENCH="--shape llama-3.1-8b" and the like.
#
# Everything is installed into .venv here, once. PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# By path: a folder named llama in the current directory would else hide the package.
EDITABLE := --config-settings editable_mode=compat
TORCH := $(shell grep ^torch== constraints.txt)

# What the reference has pages of, besides `llama` itself.
REFERENCE := llama llama.generation llama.options llama.keywords llama.datasets llama.rejection_sampling \
	llama.tokenizer llama.tokenizer.chat_template llama.decoding.answering llama.decoding.scoring llama.model

.PHONY: demo test check docs bench clean

demo: $(VENV)/.runtime
	$(VENV)/bin/python example_chat_completion.py

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n auto --dist worksteal

check: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

docs: $(VENV)/.dev
	$(VENV)/bin/python -W error::UserWarning -m pdoc --docformat google --no-show-source -o docs/reference $(REFERENCE)

bench: $(VENV)/.dev
	$(VENV)/bin/python -m benchmarks.decode $(BENCH)

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "Python 3.10 or newer is needed, and $(PYTHON) is not one. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Could not make a virtual environment. On Debian: sudo apt install python3-venv"; exit 1; }

# Without an NVIDIA card the CUDA build of PyTorch is gigabytes for nothing: take a CPU build, from pip's find-links if
# there is one, else from PyTorch's index. Where neither works, the next line takes PyPI's.
$(VENV)/.runtime: setup.py constraints.txt | $(VENV)/bin/python
	@echo "Installing PyTorch and the package into $(VENV), once"
	@[ "$$(uname)" != Linux ] || command -v nvidia-smi >/dev/null || $(PIP) install -q --no-deps --no-index $(TORCH) 2>/dev/null || \
	  $(PIP) install -q --no-deps --index-url https://download.pytorch.org/whl/cpu $(TORCH) || true
	@$(PIP) install -q -c constraints.txt $(EDITABLE) -e '.[llama2,hf,templates]'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@$(PIP) install -q -c constraints.txt $(EDITABLE) -e '.[llama2,hf,templates,test,dev]'
	@touch $@
