# One target a chore; every target sets up .venv first and does so only once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two pytest workers with one thread each beat one worker with two: small tensors spend their time waiting at barriers.
# In the order of collection: files with few long tests, such as the compilations, would else come last, on one worker.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
RUN ?= demo/run
STEPS ?= 1,2,4,8,16,32
GPU_RECORDS ?= bench/records
BENCH_KERNELS = $(BIN)/adrec bench kernels --cuda-graph --out $(GPU_RECORDS)/kernels-gpu.jsonl
BENCH_ENGINES = $(BIN)/adrec bench kernels --engines --out $(GPU_RECORDS)/engines-gpu.jsonl

.PHONY: demo test test-slow lint bench gpu gpu-found gpu-targets gpu-tests gpu-suites gpu-sanitizer clean

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/adrec demo --out demo --overwrite

test: $(STAMP)
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/adrec bench tradeoff $(RUN) --steps $(STEPS) --out $(RUN)/tradeoff.jsonl
	$(BIN)/adrec bench report $(RUN)/tradeoff.jsonl --out $(RUN)/report

# Most important first, for a machine that is lent for a quarter of an hour; `make -k gpu` goes on after a failure.
gpu: gpu-targets gpu-tests gpu-suites gpu-sanitizer

gpu-found: $(STAMP)
	$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make gpu needs a GPU that torch can use')"

# What docs/kernels.md names as a target. Every row also holds how near its results are to those of the twin or engine.
gpu-targets: gpu-found
	$(BENCH_KERNELS) --kernel score_topk --shape "ten million" --dtype bf16
	$(BENCH_KERNELS) --kernel denoise_last --shape paper --append
	$(BIN)/adrec kernels roofline --kernel '[ds]*' --shape "paper,ten million" --records $(GPU_RECORDS)/kernels-gpu.jsonl
	$(BENCH_ENGINES) --batch-sizes 512 --steps 32 --items 12000

gpu-tests: gpu-found
	$(BIN)/python -m pytest tests/kernels tests/engines tests/models tests/training tests/export

gpu-suites: gpu-found
	$(BENCH_KERNELS) --shape "paper,ten million" --append
	$(BIN)/adrec kernels roofline --shape "paper,ten million" --records $(GPU_RECORDS)/kernels-gpu.jsonl
	$(BENCH_ENGINES) --append

gpu-sanitizer: gpu-found
	@if command -v compute-sanitizer >/dev/null; then \
	  compute-sanitizer --error-exitcode 1 $(BIN)/python -m pytest tests/kernels -m "not slow" -k "not compile and not opcheck"; \
	else echo "compute-sanitizer is not installed: memory errors were not looked for"; fi

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
