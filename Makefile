# `make demo` runs the main job on the built-in sample, `make sweep` compares the pruners on it, `make test` runs the
# linter and the tests, `make test-gpu` the tests that need a GPU, `make bench` all measurements of
# docs/performance.md, `make compare` all accuracies of docs/comparison.md. Each sets up .venv by itself, once.

PYTHON ?= python3
BIN := .venv/bin

FASHION_MNIST ?= /usr/share/datasets/fashion-mnist

.PHONY: demo sweep test test-gpu bench compare clean

demo: .venv/run
	$(BIN)/python main.py --pruner lamp --sparsity 0.65

# Two processes of one thread each share the work. Stopped and started again, it goes on where it was.
sweep: .venv/run
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2 sweep.py --device cpu \
		--pruners lamp glob unif unifplus erk --sparsities 0.65 0.8 0.9 0.95 --finetune-epochs 1 --seeds 0 1 2

# Two tests at a time, of one thread each.
test: .venv/dev
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

# One at a time, since they share the GPU.
test-gpu: .venv/dev
	$(BIN)/python -m pytest -m gpu

bench: .venv/dev
	$(BIN)/python benchmarks/run.py

# Hours. Two processes share the work; stopped and started again, it goes on where it was. Debian's package
# dataset-fashion-mnist has the four official files; FASHION_MNIST=FOLDER says where they are otherwise.
compare: .venv/run
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2 benchmarks/compare.py $(FASHION_MNIST)

.venv/run: requirements.txt constraints.txt
	@echo "Setting up .venv with requirements.txt: the first time this takes some minutes and over 5 GB of disk."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/run
	@echo "Adding requirements-dev.txt to .venv."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv output
