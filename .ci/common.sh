# shellcheck shell=bash
# Functions of `.ci/run` and `.ci/nightly`: fresh virtual environments by README's test command, one for each Python.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
data=${JAX_SELFTRAIN_DATA:-../shared/data} # tests that need real data are skipped without it
if [[ -d $data ]]; then
  JAX_SELFTRAIN_DATA=$(cd "$data" && pwd)
  export JAX_SELFTRAIN_DATA
fi
unset PYTHONDONTWRITEBYTECODE # tests start many processes: each would compile its imports again
export PIP_COMPILE=0          # most of the installed files are never imported

# Compiled programs (tests/conftest.py), types and pip's wheels are kept between runs; a cache that has grown too large
# starts anew.
cache=${XDG_CACHE_HOME:-$HOME/.cache}/jax_selftrain
if [[ -d $cache && $(du -sm "$cache" | cut -f 1) -gt 8192 ]]; then rm -rf "$cache"; fi
export MYPY_CACHE_DIR=$cache/mypy RUFF_CACHE_DIR=$cache/ruff

test_command=$(grep -m 1 -E '^python3 -m venv .* && \.venv/bin/pytest$' README.md)
install_command=${test_command% && .venv/bin/pytest}
work=$(mktemp -d)
trap 'wait; rm -rf "$work" & disown' EXIT # half a minute, which nothing waits for

copy_for() { # a clean copy of the tree in $work/VERSION, with `python3` being that Python
  local version=$1
  shopt -s nullglob
  for candidate in "python$version" python3 "$HOME"/.pyenv/versions/"$version"*/bin/python; do
    if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
      mkdir -p "$work/$version" "$work/bin-$version"
      ln -s "$("$candidate" -c 'import sys; print(sys.executable)')" "$work/bin-$version/python3"
      git ls-files -z | xargs -0 cp --parents -t "$work/$version"
      return
    fi
  done
  echo "Python $version is needed" >&2
  exit 1
}

install_for() { # README's install command in the copy for a version
  (cd "$work/$1" && PATH="$work/bin-$1:$PATH" bash -c "$install_command")
}

run_in() { # a command in the copy for a version; prints the seconds since the start
  local status=0
  (cd "$work/$1" && shift && "$@") || status=$?
  echo "$SECONDS s: Python $*"
  return "$status"
}
