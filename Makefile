# Everything happens in .venv, which tools/setup.py makes and keeps; a second call installs nothing.
VENV := .venv
# the one that .venv was made with, and at first python3; `make setup PYTHON=python3.12` chooses another
PYTHON ?= $(shell test -x $(VENV)/bin/python && echo $(VENV)/bin/python || echo python3)
ARGS ?=

# A sourced ROS would mix with the one in .venv: these targets do not see it.
ifneq ($(AMENT_PREFIX_PATH)$(_ROS_WHEELS_BOOTSTRAP_COMPLETE),)
unexport LD_LIBRARY_PATH PYTHONPATH CMAKE_PREFIX_PATH PKG_CONFIG_PATH
endif
unexport AMENT_PREFIX_PATH COLCON_PREFIX_PATH ROS_DISTRO ROS_VERSION ROS_PYTHON_VERSION RMW_IMPLEMENTATION
unexport _ROS_WHEELS_BOOTSTRAP_COMPLETE

# OpenMP's threads must not spin where several processes share few cores (docs/log.md)
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test acceptance lint clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

setup:  ## make .venv with everything: PyTorch, ROS 2, our messages, the test tools
	@$(PYTHON) tools/setup.py test

demo:  ## six cameras of a synthetic street through the real node over ROS 2; pictures and numbers in out/demo
	@$(PYTHON) tools/setup.py run
	$(VENV)/bin/occflow demo $(ARGS)

lint: setup  ## ruff
	$(VENV)/bin/ruff check .

# Most tests compute: one process a core, each with one thread, ends sooner than one process with all threads. Those that
# talk over DDS wait for each other in real time: they come after, file by file, each file in a process of its own, since
# what a process once opened in the middleware stays until it ends. 5 = none was picked.
PYTEST := $(VENV)/bin/python -m pytest
test: setup lint  ## ruff and the whole test suite; ARGS="-k words" picks some
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(PYTEST) -m "not dds and not big" -n auto --dist worksteal $(ARGS) || [ $$? = 5 ]
	failed=0; for file in $$(grep -rl --include='test_*.py' 'mark\.dds' test | sort); do \
		$(PYTEST) -m "dds and not big" $$file $(ARGS) || [ $$? = 5 ] || failed=1; done; exit $$failed

acceptance: setup  ## what the README promises, measured beside the best public code: a table, about 20 minutes; ARGS="--only 1,3" picks some
	PYTHONPATH=test $(VENV)/bin/python -m acceptance.run $(ARGS)

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) $(VENV).old out build install log *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
