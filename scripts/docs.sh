#!/usr/bin/env bash
# Build the site of the docs into outputs/site.
#
#   scripts/docs.sh          build it; a warning is an error
#   scripts/docs.sh serve    show it at http://127.0.0.1:8000, and again after each change
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh dev
if ! python -c 'import material, mkdocstrings' 2>/dev/null; then
    echo "Installing the extra docs"
    python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
fi
export NO_MKDOCS_2_WARNING=1 # an advertisement of another builder; mkdocs is pinned below 2
exec mkdocs "${1:-build}" --strict "${@:2}"
