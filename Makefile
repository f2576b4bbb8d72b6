# make demo: fetches a model, exports it, fits a patch, and shows what the patch keeps of the prompt and what it saves.
#            MODEL=smollm2-135m-instruct takes a smaller model and another prompt.
# make report: writes a page about the demo's patch.
# make test: runs every test.
# make test-edge: runs the tests of the edge half again, without the host half and with the oldest ONNX Runtime.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EDGE_VENV := .venv-edge
EDGE_BIN := $(EDGE_VENV)/bin
OLDEST_RUNTIME := onnxruntime==1.24.1
MODEL ?= gemma-3-270m
BUILD := build/demo/$(MODEL)

# What each model of the demo is asked: the prompt, inputs without answers to fit on, and held-out inputs with answers.
PROMPT/gemma-3-270m := benchmarks/tasks/events.prompt.txt
QUERIES/gemma-3-270m := benchmarks/tasks/events.calibration.txt
HELD_OUT/gemma-3-270m := benchmarks/tasks/events.held-out.jsonl
PROMPT/smollm2-135m-instruct := demo/sheet.txt
QUERIES/smollm2-135m-instruct := demo/sheet-queries.txt
HELD_OUT/smollm2-135m-instruct := demo/sheet-held-out.jsonl
PROMPT := $(PROMPT/$(MODEL))
QUERIES := $(QUERIES/$(MODEL))
HELD_OUT := $(HELD_OUT/$(MODEL))
$(if $(PROMPT),,$(error the demo has no prompt for MODEL=$(MODEL); it has one for gemma-3-270m and smollm2-135m-instruct))

.PHONY: demo report test test-edge lint clean
.DELETE_ON_ERROR:

demo: $(BUILD)/model/patch_slots.json $(BUILD)/patch.safetensors
	$(BIN)/python demo/edge.py $(BUILD)/model $(BUILD)/patch.safetensors $(PROMPT) $(HELD_OUT)

report: $(BUILD)/report.html
	@echo $(BUILD)/report.html

test: $(VENV)/.installed
	$(BIN)/pytest

test-edge: $(EDGE_VENV)/.installed
	$(EDGE_BIN)/python -c "import sys, importlib.util as u; \
	    sys.exit(', '.join(n for n in ('torch', 'transformers', 'onnx', 'optimum') if u.find_spec(n)) or None)"
	$(EDGE_BIN)/python -m pytest runtime_tests/runtime

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build $(VENV) $(EDGE_VENV)

# torch is installed first and with its exact version, so that no other package installs another build of it.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,export,report,test]'
	touch $@

$(EDGE_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(EDGE_VENV)
	$(EDGE_BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,test-edge]' $(OLDEST_RUNTIME)
	touch $@

# `fetch` prints the folder. If it made the folder before, it finds it again.
$(BUILD)/source: $(VENV)/.installed
	mkdir -p $(BUILD)
	$(BIN)/tp-export fetch $(MODEL) > $@

$(BUILD)/model/patch_slots.json: | $(BUILD)/source
	$(BIN)/tp-export model "$$(cat $(BUILD)/source)" $(BUILD)/model --overwrite

# The answers of the few-shot task end with their line. A command substitution drops a newline at its end, so x follows.
$(BUILD)/patch.safetensors: $(PROMPT) $(QUERIES) $(HELD_OUT) | $(BUILD)/source
	nl="$$(printf '\nx')"; $(BIN)/tp-export patch "$$(cat $(BUILD)/source)" $@ --prompt-file $(PROMPT) \
	    --queries $(QUERIES) --held-out $(HELD_OUT) --holdout 20 --samples 1 $(if $(filter gemma%,$(MODEL)),--stop "$${nl%x}")

$(BUILD)/report.html: $(BUILD)/patch.safetensors $(BUILD)/model/patch_slots.json
	$(BIN)/tp-export report "$$(cat $(BUILD)/source)" $(BUILD)/patch.safetensors --prompt-file $(PROMPT) \
	    --queries $(HELD_OUT) --calibration $(QUERIES) --runtime $(BUILD)/model --frontier 64,192 -o $@
