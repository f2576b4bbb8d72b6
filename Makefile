# make demo: from nothing to a model that changes its behaviour by a switched-on file.  make test: every test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := build/demo
BASE := smollm2-135m-instruct

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(BUILD)/model/patch_slots.json $(BUILD)/pirate.safetensors
	$(BIN)/python demo/edge.py $(BUILD)/model $(BUILD)/pirate.safetensors demo/pirate.txt

test: $(VENV)/.installed
	$(BIN)/pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build $(VENV)

# torch first and by its exact version, so that nothing pulls in another build of it.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,export,report,test]'
	touch $@

# `fetch` prints the folder; what it made once it finds again.
$(BUILD)/source: $(VENV)/.installed
	mkdir -p $(BUILD)
	$(BIN)/tp-export fetch $(BASE) > $@

$(BUILD)/model/patch_slots.json: | $(BUILD)/source
	$(BIN)/tp-export model "$$(cat $(BUILD)/source)" $(BUILD)/model --overwrite

$(BUILD)/pirate.safetensors: demo/pirate.txt demo/held-out.txt | $(BUILD)/source
	$(BIN)/tp-export patch "$$(cat $(BUILD)/source)" $@ --prompt-file demo/pirate.txt --held-out demo/held-out.txt --limit 48
