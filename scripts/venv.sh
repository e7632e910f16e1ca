# shellcheck shell=bash
# Sourced by the other scripts: puts a Python with torchtitan-tst and the given extra on the PATH.
#
#   . scripts/venv.sh EXTRA
#
# An environment that is active and has the package is left alone. Otherwise .venv is created and
# filled, and again whenever pyproject.toml changes. PYTHON names the interpreter to create it with.

_extra=$1
_stamp=.venv/.installed-$_extra
if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]] ||
    ! python -c "import torchtitan.experiments.tst" 2>/dev/null; then
    if [[ ! -x .venv/bin/python ]]; then
        echo "Creating .venv"
        "${PYTHON:-python3}" -m venv .venv
    fi
    if [[ ! "$_stamp" -nt pyproject.toml ]]; then
        echo "Installing torchtitan-tst[$_extra] into .venv (torch comes with it: some minutes)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$_extra]"
        touch "$_stamp"
    fi
    PATH=$PWD/.venv/bin:$PATH
fi
unset _extra _stamp
