#!/usr/bin/env bash
# Make .venv and put qmpd into it. Usage: setup.sh [EXTRA], where EXTRA is one of pyproject.toml's extras ("dev").
#
# Works with nothing but Python and pip: where the system's venv cannot bring a pip of its own (Debian without
# python3-venv), the pip outside is told to install into the environment. Quiet unless something goes wrong.
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:+[$1]}
python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "qmpd needs Python 3.11 or newer, and '$python' is not; say which with: make PYTHON=/path/to/python3.11" >&2
  exit 1
fi

if ! .venv/bin/python -c '' 2>/dev/null; then
  echo "Creating .venv"
  "$python" -m venv --clear .venv >/dev/null 2>&1 || "$python" -m venv --clear --without-pip .venv
fi

if .venv/bin/python -m pip --version >/dev/null 2>&1; then
  pip=(.venv/bin/python -m pip)
else
  pip=("$python" -m pip --python .venv/bin/python)
fi

echo "Installing qmpd$extra into .venv"
"${pip[@]}" install -qq --no-input --root-user-action=ignore --editable ".$extra"
# An editable install leaves this to the first start, which would take a third of a second longer, every time where
# Python must not write bytecode.
.venv/bin/python -m compileall -q qmpd
