#!/bin/sh
# Provides the image of the build steps as `toolbox` in the local Docker.
#
#   toolbox.sh                                                     builds it if missing
#   toolbox.sh [--no-push] REGISTRY [BASE_IMAGES [PYTHON_INDEX]]   pulls it, or builds and pushes it
#   toolbox.sh --name REGISTRY                                     prints its name in the registry
#
# BASE_IMAGES and PYTHON_INDEX are cloud.mirrors of project.yaml. The tag is a hash of the inputs, so
# it is rebuilt only when they change. Needs docker and a shell only.
set -eu
cd "$(dirname "$0")/../.."

what="get"
case "${1:-}" in
    --no-push) what=keep && shift ;;
    --name) what=name && shift ;;
    -*)
        echo "error: $1: unknown option; expected --no-push or --name." >&2
        exit 2
        ;;
esac
registry=${1:-} mirror=${2:-} index=${3:-}
# First step of a build: of two builds, the one that began later wins (level_2_cicd/release.py).
if [ -n "$registry" ] && [ "$what" = get ]; then mkdir -p build && date -u +%Y-%m-%dT%H:%M:%S+00:00 >build/began; fi
folder=level_2_cicd/toolbox base=level_1_pipeline/base_image.txt
inputs="$base $folder/Dockerfile level_1_pipeline/install_packages.sh requirements/launcher.txt requirements/uv.txt"
# shellcheck disable=SC2086  # word splitting is intended
tag=$(sha256sum $inputs | sha256sum | cut -c 1-16)
name=${registry:+$registry/}toolbox:$tag
if [ "$what" = name ]; then
    if [ -z "$registry" ]; then echo "error: --name: missing REGISTRY" >&2 && exit 2; fi
    echo "$name"
    exit
fi

if ! docker info >/dev/null 2>&1; then
    echo "error: Docker is not running. Start Docker Desktop, or run: sudo systemctl start docker" >&2
    exit 2
fi

build() {
    echo "toolbox: building $name …"
    secrets=$(mktemp)
    trap 'rm -f "$secrets"' EXIT
    for variable in ${index:+PIP_INDEX_URL UV_DEFAULT_INDEX}; do echo "export $variable='$index'" >>"$secrets"; done
    # Locally, pip's variables name the package index, as for the other images.
    for variable in PIP_INDEX_URL PIP_FIND_LINKS HTTPS_PROXY HTTP_PROXY NO_PROXY; do
        eval "value=\${$variable:-}"
        if [ -z "$value" ]; then continue; fi
        echo "export $variable='$value'" >>"$secrets"
        case $variable in
            PIP_INDEX_URL) echo "export UV_DEFAULT_INDEX='$value'" >>"$secrets" ;;
            PIP_FIND_LINKS) echo "export UV_FIND_LINKS='$value'" >>"$secrets" ;;
        esac
    done
    DOCKER_BUILDKIT=1 docker build --progress=plain --file "$folder/Dockerfile" --tag "$name" \
        --build-arg "BASE=${mirror:+$mirror/}$(cat "$base")" --build-arg "MIRROR=${mirror:+$mirror/}" \
        --secret "id=index,src=$secrets" ${BUILD_NETWORK:+"--network=$BUILD_NETWORK"} .
}

if [ -n "$registry" ] && docker pull --quiet "$name" 2>/dev/null; then
    echo "toolbox: pulled from the registry"
else
    if [ -z "$(docker image ls --quiet "$name")" ]; then build; fi
    if [ -n "$registry" ] && [ "$what" = get ]; then
        # Another build may have pushed it meanwhile, and tags are immutable.
        docker push --quiet "$name" || docker pull --quiet "$name"
    fi
fi
docker tag "$name" toolbox
