#!/usr/bin/env bash
# Sets up a virtual environment and runs every check: lint, format, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install -q --disable-pip-version-check torch==2.13.0 -e '.[dev]'
# a browser for the page of `rcc report`, where one can be had: without one that test is skipped
if [ -z "${CHROMIUM:-}" ] && [ "$(id -u)" = 0 ] && ! command -v chromium chromium-browser google-chrome >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update && apt-get install -y --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1 ||
    echo "Chromium could not be installed: the page of rcc report is not tested in a browser" >&2
fi
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/mypy
export OMP_WAIT_POLICY=passive  # threads that spin while they wait cost minutes where tests share cores
.venv/bin/pytest -n auto --dist loadfile "$@"
