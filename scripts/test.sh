#!/usr/bin/env bash
# Sets up a virtual environment and runs every check: lint, format, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install -q --disable-pip-version-check --no-compile torch==2.13.0 -e '.[dev]'  # what is used is compiled then
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/mypy
.venv/bin/lint-imports
export OMP_WAIT_POLICY=passive  # threads that spin while they wait cost minutes where tests share cores
.venv/bin/pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
