# `make demo` and `make test` need Python 3.10, 3.11 or 3.12 with venv, and nothing else. The first of them to run makes
# the environment .venv; PYTHON chooses the interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

# One thread trains a network this small as fast as two, and leaves a core to the data.
demo: $(VENV)/installed
	$(BIN)/basicsr prepare sample
	OMP_NUM_THREADS=1 $(BIN)/basicsr train -opt options/demo_x2.yml
	$(BIN)/basicsr test -opt options/demo_x2.yml --compare
	$(BIN)/basicsr upscale "$$($(BIN)/python -c 'import skimage; print(*skimage.__path__)')/data/rocket.jpg" \
	    -o results/demo_x2/upscaled --format png --network demo_x2

test: $(VENV)/installed
	$(BIN)/python -m pytest

# mypy reads the package as it is installed, from a copy: it does not follow an editable install.
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build && $(BIN)/python setup.py --quiet build_py && $(BIN)/mypy build/lib/attnsr build/lib/basicsr_command.py

$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@# A pip older than 23.1, as Python 3.10 brings it, cannot build BasicSR's release.
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build src/attnsr.egg-info datasets/sample experiments/demo_x2 results/demo_x2 tb_logger/demo_x2
