#!/usr/bin/env bash
# Makes .venv with the packages of pyproject.toml; a call when nothing changed takes a moment.
#
#   scripts/setup.sh [EXTRA,EXTRA...]   make or update .venv with these extras (default: test,serve)
#   scripts/setup.sh --find-python      only print the interpreter that it would use
#
# The extras are pyproject.toml's, and `compile` (for `dsv3 compile`: 0.7 GB, nobody else needs it):
# XLA's GPU compiler, put into .venv/compile-ahead and not among the other packages, because JAX
# would start it in every process, and complain of the CUDA libraries that are not there.
#
# A stamp inside .venv, written last, says what it was made from: a set-up that was interrupted, or
# a .venv that was copied or moved, has no valid stamp and is made anew. Exit code 2, and one line
# that says what to do, when there is no usable interpreter.
set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH
# Of jaxlib's own version comes the compiler; these are what its PTX is assembled with.
cuda_tools="nvidia-cuda-nvcc==13.5.37 nvidia-nvvm==13.5.37 nvidia-cuda-nvdisasm==13.5.37"
case "${BASH_SOURCE[0]}" in
*/*) cd "${BASH_SOURCE[0]%/*}/.." ;;
*) cd .. ;;
esac

# Run by a candidate: prints its own path (of what is behind a shim or a venv) if it will do, that
# is: a CPython for which all dependencies have wheels, able to make a venv with pip in it (Debian
# keeps ensurepip in a package of its own).
probe='
import sys, sysconfig
usable = (3, 12) <= sys.version_info[:2] <= (3, 14) and sys.maxsize > 2**32
if not usable or sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(1)
import ensurepip, ssl, venv
print(sys._base_executable)
'

# Run by the finished .venv: shows that the packages work, and leaves their bytecode compiled, also
# where PYTHONDONTWRITEBYTECODE is set and every later start would else take 3 seconds more.
first_use='
import importlib.util
for name in ("beartype", "hypothesis", "pytest", "fastapi"):  # of the extras test and serve
    if importlib.util.find_spec(name):
        importlib.import_module(name)
import grain, matplotlib.pyplot, orbax.checkpoint, pyarrow.parquet, rich.progress
import safetensors.numpy, tensorboardX, tokenizers
import flax.nnx, jax
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
'

# Prints the real path of the interpreter $1; fails if it does not run or is not usable.
usable_python() {
    local path
    path="$("$1" -c "$probe" 2>/dev/null </dev/null)" && [ -x "$path" ] && echo "$path"
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.14 \
        "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python; do
        usable_python "$candidate" && return
    done
    if command -v uv >/dev/null; then
        # From / and outside any venv, so that uv answers with an interpreter, not with a venv's.
        candidate="$(
            cd / && unset VIRTUAL_ENV && uv python install 3.13 >&2 && uv python find 3.13
        )" && usable_python "$candidate" && return
    fi
    echo "setup: no Python 3.12 to 3.14 with venv and pip among python3, python3.13, python3.12," \
        "python3.14, pyenv's versions and uv's download: install one (pyenv install 3.13, or" \
        "Debian's python3 and python3-venv) or put uv on PATH, and run make setup again" >&2
    return 2
}

# Prints the extras without `compile`, which is not one of the package.
package_extras() {
    local extra kept=""
    for extra in ${extras//,/ }; do
        [ "$extra" = compile ] || kept="${kept:+$kept,}$extra"
    done
    echo "${kept:+[$kept]}"
}

pip_install() {
    .venv/bin/python -m pip install ${quiet:+"$quiet"} --disable-pip-version-check --no-input \
        --no-compile "$@" && return
    echo "setup: pip could not install the packages (its reason is above); run make setup again" >&2
    exit 1
}

# Without their dependencies: cuDNN, NCCL and the rest are 4 GB, and only a GPU calls them.
install_compiler() {
    local version
    version="$(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("jaxlib"))')"
    rm -rf .venv/compile-ahead
    # shellcheck disable=SC2086 # the tools are several words
    pip_install --no-deps --target .venv/compile-ahead "jax-cuda13-pjrt==$version" \
        "jax-cuda13-plugin==$version" $cuda_tools
}

if [ "${1:-}" = --find-python ]; then
    find_python
    exit
fi
extras="${1:-test,serve}"
stamp=.venv/setup-complete
# Of pyproject.toml only what comes before the tools' settings can change the packages.
made_from="$(sed '/^\[tool\.pytest/q' pyproject.toml | cat - scripts/setup.sh | cksum) $(pwd -P)"

# Prints the extras of a .venv that is complete, made from these files in this place, and runs.
installed_extras() {
    local from="" installed=""
    [ ! -f "$stamp" ] || { read -r from && read -r installed; } <"$stamp" || return 0
    if [ "$from" = "$made_from" ] && .venv/bin/python -c '' 2>/dev/null; then echo "$installed"; fi
}

is_current() {
    local extra
    for extra in ${extras//,/ }; do
        [[ ",$installed," = *",$extra,"* ]] || return
    done
}

installed="$(installed_extras)"
is_current && exit
if command -v flock >/dev/null; then
    exec 9<scripts/setup.sh
    flock 9 || true # a file system without locks: two set-ups at once are then the user's to avoid
    installed="$(installed_extras)"
    is_current && exit
fi

started=$SECONDS
rm -f "$stamp"
if [ -n "$installed" ]; then
    extras="$installed,$extras"
else
    python="$(find_python)"
    rm -rf .venv
    echo "setup: making .venv with $("$python" --version) and installing: 450 MB, 1 to 5 minutes"
    "$python" -m venv .venv
fi
if [ -t 1 ]; then quiet=""; else quiet="-qq"; fi
# Compiling the bytecode of every file takes as long as installing; below, of what is used.
pip_install --editable ".$(package_extras)"
if [[ ",$extras," = *,compile,* ]]; then install_compiler; fi
if ! JAX_PLATFORMS=cpu PYTHONDONTWRITEBYTECODE="" .venv/bin/python -c "$first_use" >/dev/null; then
    echo "setup: the installed packages do not run (see above): rm -r .venv, run it again" >&2
    exit 1
fi
printf '%s\n' "$made_from" "$extras" >"$stamp"
echo "setup: .venv is ready ($((SECONDS - started)) s)"
