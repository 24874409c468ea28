#!/usr/bin/env bash
# Makes .venv from the versions pinned in tools/requirements.txt; returns at once when it is there.
#
#   bash tools/setup_env.sh              then use .venv/bin/python
#   PYTHON=/path/to/python3.12 bash tools/setup_env.sh
#
# Python 3.12 or 3.13 is looked for in $PYTHON, on PATH, in pyenv and in uv. Package indexes,
# certificates and mirrors are taken from pip's own configuration. An interrupted set-up leaves a
# marker in .venv, and the next call starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
LOCK=tools/requirements.txt
STAMP=$VENV/.pltmoe_installed  # written last: what is installed is what it says
RUNNING=$VENV/.pltmoe_installing
VERSIONS="3.12 3.13" # those for which every pinned package has wheels; preferred first
# Modules that some builds of Python lack, and what needs them.
NEEDS="venv, ensurepip, ssl, ctypes, sqlite3, zlib, bz2, lzma"

say() { printf '[setup] %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 2
}

# What decides the content of .venv. Its scripts hold absolute paths, so the place counts too.
fingerprint() {
    { cat "$LOCK" setup.py && pwd; } | sha256sum | cut -d' ' -f1
}

is_ready() {
    [[ -x $VENV/bin/python && ! -f $RUNNING && $(cat "$STAMP" 2>/dev/null) == "$(fingerprint)" ]]
}

# "3.12" if $1 runs (a pyenv shim may exist and yet fail), nothing otherwise.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' </dev/null 2>/dev/null || true
}

is_supported() { [[ -n $1 && " $VERSIONS " == *" $1 "* ]]; }

# Every place where a Python may be, best first, one path a line.
candidates() {
    local version root
    for version in $VERSIONS; do type -ap "python$version" || true; done
    type -ap python3 python || true
    for version in $VERSIONS; do
        for root in "${PYENV_ROOT:-}" "$(pyenv root 2>/dev/null || true)" "${HOME:-}/.pyenv"; do
            [[ -n $root ]] || continue
            printf '%s\n' "$root/versions/$version"*/bin/python
        done
        uv python find --no-project "$version" 2>/dev/null || true
        printf '%s\n' "${HOME:-}/.local/share/uv/python/cpython-$version"*/bin/python
    done
}

# Sets PYTHON_FOUND, or explains in one line how to get a Python and leaves.
find_python() {
    local candidate version missing seen="" incomplete=""
    if [[ -n ${PYTHON:-} ]]; then
        version=$(version_of "$PYTHON")
        is_supported "$version" ||
            die "PYTHON=$PYTHON is ${version:-not a working Python}; it has to be one of: $VERSIONS"
    fi
    while read -r candidate; do
        [[ -x $candidate ]] || continue
        version=$(version_of "$candidate")
        [[ -n $version && $seen == *" $version"* ]] || seen+=" $version"
        is_supported "$version" || continue
        if missing=$("$candidate" -c "import $NEEDS" 2>&1 </dev/null); then
            PYTHON_FOUND=$candidate
            return
        fi
        incomplete="$candidate lacks a module (${missing##*$'\n'}): apt-get install python$version-venv,"
        incomplete+=" or give another one as PYTHON=..."
    done < <(if [[ -n ${PYTHON:-} ]]; then type -ap "$PYTHON"; else candidates; fi)
    [[ -z $incomplete ]] || die "$incomplete"
    die "needs Python 3.12 or 3.13, found only:${seen:- none}. Get one with: apt-get install" \
        "python3.12-venv, or pyenv install 3.12, or uv python install 3.12; then run this again" \
        "(or name it: PYTHON=/path/to/python3.12)"
}

# One set-up at a time per checkout; the lock goes with this process.
take_turn() {
    command -v flock >/dev/null || return 0
    exec 9<"$LOCK"
    flock -n 9 || {
        say "another set-up of this checkout is running: waiting for it"
        flock 9
    }
}

# Makes $VENV unless a usable one is there (of ours: rebuilt when broken; of others: left alone).
make_venv() {
    local version ours=no
    [[ ! -f $STAMP && ! -f $RUNNING ]] || ours=yes
    if [[ -d $VENV ]]; then
        version=$(version_of "$VENV/bin/python")
        if is_supported "$version" && [[ ! -f $RUNNING ]]; then
            say "updating $VENV (Python $version)"
            return
        fi
        [[ $ours == yes ]] ||
            die "$VENV is there but has no Python of $VERSIONS (it has: ${version:-none that works}):" \
                "move it away, then run this again"
        say "$VENV is not complete: making it anew"
    fi
    find_python
    rm -rf "$VENV"
    say "making $VENV with $PYTHON_FOUND ($(version_of "$PYTHON_FOUND"))"
    mkdir "$VENV"
    touch "$RUNNING"
    "$PYTHON_FOUND" -m venv "$VENV"
}

# uv does not read pip's configuration: hand it on as UV_* variables, unless they are set.
pip_settings_for_uv() {
    "$VENV/bin/python" -m pip config list | "$VENV/bin/python" -c '
import ast, os, shlex, sys
VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "), "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","), "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "), "proxy": ("ALL_PROXY", " "),
}
settings = {}
for line in sys.stdin:
    key, _, value = line.partition("=")
    scope, _, name = key.rpartition(".")
    # A variable of the environment wins over a file, as in pip.
    if name in VARIABLES and (name not in settings or scope == ":env:"):
        settings[name] = ast.literal_eval(value.strip())
for name, value in settings.items():
    variable, separator = VARIABLES[name]
    if variable not in os.environ:
        print(f"export {variable}={shlex.quote(separator.join(value.split()))}")
'
}

# Runs a command; where the output is no terminal (and so shows no progress bar), says now and then
# how far it is.
with_progress() {
    local ticker="" status=0 ticks=0
    if [[ ! -t 2 ]]; then
        while sleep 1 && kill -0 $$; do # short sleeps: none outlives the command for long
            ((++ticks % 15)) ||
                say "... ${SECONDS} s, $VENV has $(du -sm "$VENV" 2>/dev/null | cut -f1) MB"
        done 9>&- &
        ticker=$!
    fi
    "$@" || status=$?
    [[ -z $ticker ]] || { kill "$ticker" && wait "$ticker"; } 2>/dev/null || true
    return $status
}

# retry WHAT COMMAND...: three times, for a network with hiccups.
retry() {
    local what=$1 try
    shift
    for try in 1 2 3; do
        with_progress "$@" && return
        say "$what failed (try $try of 3)"
        sleep $((try * 3))
    done
    return 1
}

install_uv() {
    local pin
    pin=$(grep '^uv==' "$LOCK")
    [[ $("$VENV/bin/uv" --version 2>/dev/null) == "uv ${pin#uv==}"* ]] ||
        retry "installing $pin" "$VENV/bin/python" -m pip install -q "$pin"
}

install_with_uv() (
    eval "$(pip_settings_for_uv)"
    export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300}
    # Like pip: the best version of all indexes, not all versions of the first index; and compiled,
    # for where each process would else do it again (PYTHONDONTWRITEBYTECODE, read-only disks).
    retry "uv" "$VENV/bin/uv" pip install --python "$VENV/bin/python" --compile-bytecode \
        --index-strategy unsafe-best-match -c "$LOCK" -b "$LOCK" -e '.[test,eval,deepspeed]'
)

install_with_pip() {
    retry "pip" "$VENV/bin/python" -m pip install -c "$LOCK" -e '.[test,eval,deepspeed]'
}

main() {
    local free_mb
    ! is_ready || return 0
    take_turn
    ! is_ready || return 0 # another one did it meanwhile
    free_mb=$(df -Pm . | awk 'NR == 2 { print $4 }')
    ((free_mb > 7000)) || say "only $free_mb MB are free here; about 6000 are needed"
    make_venv
    rm -f "$STAMP"
    touch "$RUNNING"
    say "installing the pinned versions (about 2 GB to fetch the first time)"
    if ! { install_uv && install_with_uv; }; then
        say "uv could not install them: trying pip, which is slower"
        install_with_pip || die "the packages could not be installed: see the messages above"
    fi
    rm -f "$RUNNING"
    fingerprint >"$STAMP"
    say "$VENV is ready after ${SECONDS} s"
}

# Sourced (by its test), it only defines the functions.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main; fi
