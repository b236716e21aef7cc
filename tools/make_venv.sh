#!/bin/sh
# Makes a virtual environment: make_venv.sh PYTHON FOLDER
# Debian and Ubuntu ship Python without ensurepip: there `python3 -m venv` needs python3-venv.
set -eu
python=$1
folder=$2

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "moe-infer needs Python 3.10 or newer; $python is $("$python" -V). Give another: make PYTHON=python3.12 ..." >&2
  exit 1
}
[ -x "$folder/bin/pip" ] && exit 0

if ! "$python" -c 'import ensurepip' 2>/dev/null; then
  if "$python" -m virtualenv --version >/dev/null 2>&1; then
    exec "$python" -m virtualenv -q "$folder"
  fi
  package=python3-venv
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing $package, which this Python needs to make virtual environments"
    apt-get update -qq && apt-get install -y -qq "$package"
  else
    echo "this Python cannot make virtual environments: sudo apt-get install $package" >&2
    exit 1
  fi
fi
exec "$python" -m venv "$folder"
