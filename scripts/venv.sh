# shellcheck shell=bash
# Sourced by the other scripts: puts a Python with torchtitan-tst and the given extra on the PATH.
#
#   . scripts/venv.sh EXTRA
#
# If an environment is active and has the package, it is used as it is. Otherwise the package is
# installed into .venv, and again whenever pyproject.toml changes. PYTHON is the interpreter that
# creates .venv. The extra titan03-dev has TorchTitan 0.3 and an environment of its own,
# .venv-titan03; it needs Python 3.11. All other extras have TorchTitan 0.2.2.

_extra=$1
_venv=.venv _release=0.2. _oldest=10
[[ $_extra != titan03* ]] || _venv=.venv-titan03 _release=0.3. _oldest=11
_stamps=("$_venv/.installed-$_extra" .venv/.installed-dev) # dev includes demo and eval
[[ $_extra != data ]] || _stamps+=(.venv/.installed-demo)  # demo includes data
[[ $_extra != titan03* ]] || _stamps=("$_venv/.installed-$_extra")
_is_installed() {
    local stamp
    for stamp in "${_stamps[@]}"; do
        [[ ! $stamp -nt pyproject.toml ]] || return 0
    done
    return 1
}
# Look for TorchTitan and for our package inside it without importing them, which takes seconds.
_has_package() {
    (cd / && python - $_release) <<'END' 2>/dev/null
import sys
from importlib.metadata import version
from importlib.util import find_spec

upstream = find_spec("torchtitan")
folders = [f"{folder}/experiments" for folder in upstream.submodule_search_locations]
found = [finder.find_spec("torchtitan.experiments.tst", folders) for finder in sys.meta_path]
is_ours = upstream.origin and any(found)
sys.exit(not (is_ours and version("torchtitan").startswith(sys.argv[1])))
END
}
if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]] || ! _has_package; then
    if ! _is_installed; then
        mkdir -p $_venv
        exec 9>$_venv/.lock # one at a time, where several jobs start
        ! command -v flock >/dev/null || flock 9
        if [[ ! -x $_venv/bin/python ]]; then
            if ! "${PYTHON:-python3}" -c "import sys; sys.exit(sys.version_info < (3, $_oldest))"; then
                echo "PYTHON = ${PYTHON:-python3}: $_venv needs Python 3.$_oldest or later; set PYTHON \
to one" >&2
                exit 1
            fi
            echo "Creating $_venv"
            "${PYTHON:-python3}" -m venv $_venv
        fi
        if ! _is_installed; then
            echo "Installing torchtitan-tst[$_extra] into $_venv (with torch, this takes some minutes)"
            $_venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
                --editable ".[$_extra]"
            # like pip, but on all cores; some packages have files that do not compile
            $_venv/bin/python -m compileall -qq -j 0 $_venv/lib || true
            touch "$_venv/.installed-$_extra"
        fi
        exec 9>&-
    fi
    PATH=$PWD/$_venv/bin:$PATH
fi
unset _extra _stamps _venv _release _oldest
unset -f _is_installed _has_package
