# Every target makes the environment it needs first. Variables: VENV, PYTHON (interpreter to start from), TORCH (build of
# torch; see scripts/make_venv.sh), JOBS (test processes), ARGS (passed on: make test ARGS="-k loss").
VENV ?= .venv
JOBS ?= 2
ARGS ?=

VLLM_VENV ?= .venv-vllm

python := $(VENV)/bin/python
installed := $(VENV)/.installed
docs_installed := $(VENV)/.docs_installed
vllm_installed := $(VLLM_VENV)/.installed

.PHONY: help quickstart test check format bench docs notebook venv lock vllm-env test-vllm
help:
	@echo "make quickstart   cold start, GRPO, evaluation and a learning curve on two CPU cores"
	@echo "make test         the whole test suite"
	@echo "make check        ruff (lint, format) and pyright"
	@echo "make bench        every benchmark with its short settings"
	@echo "make format       let ruff rewrite the code"
	@echo "make docs         the documentation as a site in site/"
	@echo "make notebook     execute the notebooks of docs/notebooks again"
	@echo "make vllm-env     an environment with vLLM in $(VLLM_VENV), apart from the other one (docs/vllm.md)"
	@echo "make test-vllm    the tests that need vLLM, there"
	@echo "make venv | lock  the environment in $(VENV) | requirements.lock from what is installed there"

quickstart: $(installed)
	$(python) -m rltrain.train +experiment=quickstart $(ARGS)

test: $(installed)
	$(python) -m pytest --numprocesses $(JOBS) --dist worksteal --timeout 600 $(ARGS)

check: $(installed)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m pyright --pythonpath $(python)

format: $(installed)
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

bench: $(installed)
	$(python) scripts/bench/random_calculation.py --rounds 3
	$(python) scripts/bench/prefix_tree.py --rounds 2
	$(python) -m rltrain.compare.gradients --groups 4 --completions 1024
	$(python) scripts/bench/verifier.py --repeats 1
	$(python) scripts/bench/rollout.py --rounds 3
	$(python) scripts/bench/probes.py --short
	$(python) scripts/bench/continuations.py --completions 2
	$(python) scripts/bench/turns.py --prompts 4 --tokens 64 --turn 16 --repeats 1 --sleep 0.01
	$(python) scripts/bench/logprobs.py --shapes 256,64,4096 --rounds 1
	$(python) scripts/bench/batching.py --rounds 3
	$(python) scripts/bench/step.py --limits 32 --rounds 1 --sides trl trl-fast

docs: $(docs_installed)
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict

$(docs_installed): $(installed)
	$(python) -m pip install --quiet --quiet --constraint $(VENV)/constraints.txt --editable '.[docs]'
	@touch $@

notebook: $(installed)
	$(python) -m pip install --quiet --quiet --constraint $(VENV)/constraints.txt --editable '.[notebook]'
	$(python) scripts/notebook.py $(ARGS)

venv: $(installed)

$(installed): pyproject.toml requirements.lock scripts/make_venv.sh scripts/install_torch.sh
	@scripts/make_venv.sh $(VENV)
	@touch $@

# The build of torch is the installer's choice, so its suffix is left out. The pin of triton is what the CPU build is
# tested with (scripts/install_torch.sh), and a CUDA build would add its libraries, so only an environment with the CPU
# build writes the file.
lock: $(installed) $(docs_installed)
	@$(python) -c 'import torch, sys; sys.exit("+cpu" not in torch.__version__ and "make lock: needs the +cpu build of torch, found " + torch.__version__)'
	$(python) -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock

vllm-env: $(vllm_installed)

$(vllm_installed): requirements-vllm.lock scripts/make_vllm_venv.sh scripts/install_torch.sh
	@scripts/make_vllm_venv.sh $(VLLM_VENV)
	@touch $@

test-vllm: $(vllm_installed)
	$(VLLM_VENV)/bin/python -m pytest -m vllm --timeout 1800 $(ARGS)
