# Sourced by the other scripts: makes ./.venv with what the project needs, and mosquitto where it may.
# Idempotent: does nothing when pyproject.toml and constraints.txt have not changed since.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "edgetrain needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2
  exit 1
}

install_mosquitto() {
  PATH="$PATH:/usr/sbin:/usr/local/sbin"
  command -v mosquitto >/dev/null 2>&1 && return
  local sudo=""
  if command -v apt-get >/dev/null 2>&1; then
    if [ "$(id -u)" != 0 ]; then
      sudo -n true 2>/dev/null && sudo="sudo -n" || sudo="none"
    fi
    if [ "$sudo" != none ]; then
      say "installing the mosquitto broker"
      # The package would start a system service on port 1883: we start our own brokers, on loopback, when needed.
      if { $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
        apt-get install -y -qq --no-install-recommends mosquitto; } >/tmp/edgetrain-apt.log 2>&1; then
        return
      fi
    fi
  fi
  say "mosquitto is not here and could not be installed: the embedded broker will be used"
}

# make_venv DIR EXTRAS: a virtual environment with the package, editable, and those extras.
make_venv() {
  local venv=$1 extras=$2 stamp
  stamp="$extras $(cat pyproject.toml constraints.txt scripts/_env.sh | sha256sum | cut -d' ' -f1)"
  [ "$(cat "$venv/.edgetrain-stamp" 2>/dev/null)" = "$stamp" ] && return
  say "preparing $venv (a few minutes the first time)"
  [ -x "$venv/bin/python" ] || "$(find_python)" -m venv "$venv"
  "$venv/bin/python" -m pip install -qq --upgrade "pip>=24" "setuptools>=77"
  if [[ $extras == *dev* || $extras == *demo* || $extras == *export* ]] && ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    install_torch "$venv"
  fi
  "$venv/bin/python" -m pip install -qq -c constraints.txt --no-build-isolation -e ".[$extras]" || return
  echo "$stamp" >"$venv/.edgetrain-stamp"
}

# A second environment for the runtime `ort-training`, whose package owns the module name `onnxruntime` too.
# Its last release has wheels for x86-64 and Python up to 3.12; elsewhere this fails, with the reason.
make_training_venv() {
  make_venv .venv-ort-training ort-training,test &&
    .venv-ort-training/bin/python -c 'from onnxruntime.capi._pybind_state import GradientGraphBuilder' 2>/dev/null &&
    return
  say "onnxruntime-training has no package for this machine: the runtime ort-training is left out"
  return 1
}

# The CPU build of torch, never the CUDA one by accident.
install_torch() {
  local venv=$1 version
  version=$(sed -n 's/^torch==//p' constraints.txt)
  if [ "$(uname -s)" != Linux ] || [ -n "${EDGETRAIN_ANY_TORCH:-}" ]; then
    "$venv/bin/python" -m pip install -qq "torch==$version"
  elif ! "$venv/bin/python" -m pip install -qq "torch==$version+cpu"; then
    say "pip found no CPU build of torch $version. Point pip at PyTorch's CPU package index"
    say "(PyTorch's \"Get started\" page prints its address; set PIP_EXTRA_INDEX_URL to it), or set"
    say "EDGETRAIN_ANY_TORCH=1 to take the default build, which may be several GB of CUDA libraries."
    exit 1
  fi
}
