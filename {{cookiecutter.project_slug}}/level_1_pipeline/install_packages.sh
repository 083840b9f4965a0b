#!/bin/sh
# Used while an image is built: puts locked packages into /opt/venv.     install_packages.sh LOCK…
#
# Where they come from is no part of the image: level_1_pipeline/containers.py hands PIP_* and UV_* variables, and a network's own
# certificates, to the build as secrets.
set -eu

# shellcheck disable=SC1091  # it is there only while an image is built
if [ -s /run/secrets/index ]; then . /run/secrets/index; fi
if [ -s /run/secrets/certificates ]; then
    # Beside those that the image knows: not every host is a network's own.
    cat /run/secrets/certificates /etc/ssl/certs/ca-certificates.crt >/tmp/certificates.pem
    export SSL_CERT_FILE=/tmp/certificates.pem PIP_CERT=/tmp/certificates.pem
fi
export UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_NO_PROGRESS=1 UV_SYSTEM_CERTS=1

python3 -m venv /tmp/uv
/tmp/uv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement uv.txt
uv=/tmp/uv/bin/uv
"$uv" venv --quiet --python python3 /opt/venv
export VIRTUAL_ENV=/opt/venv

locks="" torch=""
for lock in "$@"; do
    if [ "$lock" = torch.txt ]; then torch=$lock; else locks="$locks $lock"; fi
done
# A mirror serves its own build of torch; elsewhere TORCH says which: cpu, or a CUDA version such as cu130.
backend="--torch-backend ${TORCH:-cpu}"
if [ -n "${UV_FIND_LINKS:-}${UV_INDEX:-}${UV_DEFAULT_INDEX:-}" ]; then backend=""; fi
# shellcheck disable=SC2086  # lists of words
"$uv" pip sync --quiet $backend $locks $torch
if [ -n "$torch" ]; then
    # A CUDA build brings packages that the lock does not hold, because they differ by machine.
    # shellcheck disable=SC2086
    "$uv" pip install --quiet $backend --requirement "$torch"
fi
