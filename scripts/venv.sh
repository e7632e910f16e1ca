# shellcheck shell=bash
# Sourced by the other scripts: puts a Python with torchtitan-tst and the given extra on the PATH.
#
#   . scripts/venv.sh EXTRA
#
# If an environment is active and has the package, it is used as it is. Otherwise the package is
# installed into .venv, and again whenever pyproject.toml changes. PYTHON is the interpreter that
# creates .venv.

_extra=$1
_stamps=(".venv/.installed-$_extra" .venv/.installed-dev) # dev includes demo and eval
[[ $_extra != data ]] || _stamps+=(.venv/.installed-demo) # demo includes data
_is_installed() {
    local stamp
    for stamp in "${_stamps[@]}"; do
        [[ ! $stamp -nt pyproject.toml ]] || return 0
    done
    return 1
}
# Look for TorchTitan and for our package inside it without importing them, which takes seconds.
_has_package() {
    (cd / && python -) <<'END' 2>/dev/null
import sys
from importlib.util import find_spec

upstream = find_spec("torchtitan")
folders = [f"{folder}/experiments" for folder in upstream.submodule_search_locations]
found = [finder.find_spec("torchtitan.experiments.tst", folders) for finder in sys.meta_path]
sys.exit(not (upstream.origin and any(found)))
END
}
if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]] || ! _has_package; then
    if ! _is_installed; then
        mkdir -p .venv
        exec 9>.venv/.lock # one at a time, where several jobs start
        ! command -v flock >/dev/null || flock 9
        if [[ ! -x .venv/bin/python ]]; then
            echo "Creating .venv"
            "${PYTHON:-python3}" -m venv .venv
        fi
        if ! _is_installed; then
            echo "Installing torchtitan-tst[$_extra] into .venv (with torch, this takes some minutes)"
            .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
                --editable ".[$_extra]"
            # like pip, but on all cores; some packages have files that do not compile
            .venv/bin/python -m compileall -qq -j 0 .venv/lib || true
            touch ".venv/.installed-$_extra"
        fi
        exec 9>&-
    fi
    PATH=$PWD/.venv/bin:$PATH
fi
unset _extra _stamps
unset -f _is_installed _has_package
