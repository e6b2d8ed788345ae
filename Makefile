PYTHON ?= python3
BIN := .venv/bin

#: Where pip takes torch and torchvision from. PyPI's wheels bring 5 GB of CUDA; a laptop does without:
#:     make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

FASHION_MNIST ?= /usr/share/datasets/fashion-mnist

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c tests/constraints.txt
# Two at a time, of one thread each; waiting threads leave the cores to others.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest
TWO := -n 2 --dist worksteal

.PHONY: help demo sweep quick lint test test-gpu bench compare real-size clean

help:
	@echo "make demo      prunes, evaluates and finetunes the built-in sample      under a minute"
	@echo "make sweep     compares five pruners on the sample, in one picture      about ten minutes"
	@echo "make quick     linter, types and the tests that are not slow            two minutes"
	@echo "make test      linter, types and all tests                              a quarter of an hour"
	@echo "make test-gpu  tests and speed on a CUDA GPU, in output/gpu.md          not measured; needs one"
	@echo "make bench     measures docs/performance.md                             half an hour"
	@echo "make compare   measures docs/comparison.md                              hours; needs Fashion-MNIST"
	@echo "make real-size the same with a pretrained ViT-Small on photographs         a day; needs both"
	@echo "make clean     removes .venv and output"
	@echo
	@echo "Times are for two CPU cores. The first target that is made sets up .venv: some minutes, the network,"
	@echo "and over 5 GB of disk; less with TORCH_INDEX=https://download.pytorch.org/whl/cpu."

demo: .venv/run
	$(BIN)/python main.py --pruner lamp --sparsity 0.65

# Two processes of one thread each share the work. Stopped and started again, it resumes.
sweep: .venv/run
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2 sweep.py --device cpu \
		--pruners lamp glob unif unifplus erk --sparsities 0.65 0.8 0.9 0.95 --finetune-epochs 1 --seeds 0 1 2

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/codespell
	$(BIN)/mypy

quick: lint
	$(PYTEST) $(TWO) -m "not slow and not gpu"

test: lint
	$(PYTEST) $(TWO)

# One test at a time, since they share the GPU. output/gpu.md then has what they said, and the speed of this GPU.
test-gpu: .venv/dev
	@mkdir -p output
	$(BIN)/python -m pytest -m gpu | tee output/gpu.md
	$(BIN)/python benchmarks/gpu.py

bench: .venv/dev
	$(BIN)/python benchmarks/run.py

# Two processes share the work. Stopped and started again, it resumes. Debian's package dataset-fashion-mnist has the
# four official files; FASHION_MNIST=FOLDER names another place.
compare: .venv/run
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2 benchmarks/compare.py $(FASHION_MNIST)

# The same for a larger model. benchmarks/real_size.py says where the weights and the photographs come from:
#     make real-size BACKBONE=vit_s_focus.onnx CIFAR=CIFAR-10-images
real-size: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2 benchmarks/real_size.py $(BACKBONE) $(CIFAR)

.venv/run: requirements.txt tests/constraints.txt
	@echo "Setting up .venv with requirements.txt: the first time this takes some minutes."
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(PIP) --no-deps --index-url $(TORCH_INDEX) torch torchvision)
	$(PIP) -r requirements.txt
	@touch $@

.venv/dev: tests/requirements.txt .venv/run
	@echo "Adding tests/requirements.txt to .venv."
	$(PIP) -r tests/requirements.txt
	@touch $@

clean:
	rm -rf .venv output
