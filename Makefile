# Two environments, made by the same recipe from pyproject.toml and constraints.txt: .venv to work in, and .venv-test for
# the tests, always from scratch and with nothing by hand, so that a dependency nobody wrote down fails there.
PYTHON ?= python3
BUILD_TOOLS := setuptools wheel cmake ninja pybind11
NATIVE := setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/bindings/* csrc/cpu/* csrc/cuda/*.* csrc/cuda/host/*)
COMMA := ,
RECIPE := pyproject.toml constraints.txt $(NATIVE)

# torch goes in first and alone, so that nothing else can ask for another build of it.
define make_environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(BUILD_TOOLS)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[$(2)]'
	touch $(1)/.made
endef

.PHONY: install demo test slow test-all lint docs wheel bench clean

install: .venv/.made

.venv/.made: $(RECIPE)
	$(call make_environment,.venv,test$(COMMA)lint)

.venv-test/.made: $(RECIPE)
	rm -rf .venv-test
	$(call make_environment,.venv-test,test$(COMMA)lint)

demo: install
	.venv/bin/python -m fillm.rank --out runs/demo --overwrite

# A file's tests stay in one process, which makes what they share once.
test: .venv-test/.made
	.venv-test/bin/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

slow: .venv-test/.made
	.venv-test/bin/python -m pytest -m slow -n auto --maxprocesses 2 --dist loadfile --timeout 900

test-all: .venv-test/.made
	.venv-test/bin/python -m pytest

lint: .venv-test/.made
	.venv-test/bin/python -m ruff check .
	.venv-test/bin/python -m ruff format --check .

# The site lands in build/site. An environment of its own: nothing of the package is imported, so torch is not needed.
docs: .venv-docs/.made
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet

.venv-docs/.made: constraints.txt
	rm -rf .venv-docs
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  'mkdocs>=1.6,<2' 'mkdocs-material>=9.6' 'mkdocstrings[python]>=0.29' ruff  # ruff wraps signatures
	touch .venv-docs/.made

# dist/: an sdist, and the wheel built from it. A wheel belongs to this Python and C++ library; the version is fillm.__version__.
wheel: install
	.venv/bin/python -m build --no-isolation --outdir dist

bench: install
	.venv/bin/python -m pytest benchmarks/kernels -o python_files='bench_*.py' -o python_functions='bench_*' --benchmark-only
	.venv/bin/python -m benchmarks.end_to_end.bench_rank

clean:
	rm -rf build dist *.egg-info .venv-test .venv-docs kernels/fillm_kernels/_C.* kernels/fillm_kernels/_CUDA.*
