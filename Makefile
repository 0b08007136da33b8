# Two commands: `make demo` and `make test`. Both set up .venv on the first call and reuse it afterwards.
PYTHON ?= python3
VENV := .venv# not from the environment: `make clean` deletes it
BIN := $(VENV)/bin

.PHONY: demo test release lock clean

# The embedded model also where there is a GPU: the large one is 6 GB to download, and asked for by name.
demo: $(VENV)/ready
	MEDCOT_PROFILE=$${MEDCOT_PROFILE:-tiny} $(BIN)/medcot demo

# Workers of one thread each: on two cores more threads than that stall each other tenfold. The third works while one waits.
test: $(VENV)/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# torch comes first and with its own dependencies, so that pip takes the build it finds for this machine (CPU or CUDA)
# and leaves one that is already there alone. The rest is the locked set with --no-deps: unsloth declares a certifi newer
# than some registries carry, and torchvision, xformers and diffusers, none of which is needed here.
$(VENV)/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": try make PYTHON=python3.12 " + "$(MAKECMDGOALS)")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --progress-bar on torch==2.13.0
	$(BIN)/pip install --progress-bar on --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# The notebooks to import in a browser, in build/release/, ready to be published.
release: $(VENV)/ready
	$(BIN)/medcot kaggle release

# Resolves requirements.lock anew; needs uv (https://docs.astral.sh/uv/).
lock:
	uv pip compile pyproject.toml --extra test --quiet --universal --python-version 3.11 --no-header --no-annotate \
	  --no-emit-package torch -o requirements.lock
	sed -i -E '/^(nvidia-|cuda-|triton|#)|sys_platform == .never./d' requirements.lock

# Leaves outputs/ alone: results are not ours to delete.
clean:
	rm -rf $(VENV) build *.egg-info
