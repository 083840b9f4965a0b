# shellcheck shell=bash
# A Docker engine, a base image and a registry for machines that lack them: source it. Where an engine answers and the
# image can be pulled, nothing of it is used.
#
# The engine and the registry are Debian's. The base image is made of Debian's packages (debootstrap), and answers to the
# name that base_image.txt gives.

docker_home="$PWD/build/docker"
started=()
# shellcheck disable=SC2154  # the loop in the trap assigns it
trap 'for process in "${started[@]}"; do kill "$process" 2>/dev/null || true; done' EXIT
base_image=$(cut -d@ -f1 '{{cookiecutter.project_slug}}/level_1_pipeline/base_image.txt')

install() {
    if dpkg -s "$@" >/dev/null 2>&1; then return; fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

start_engine() {
    # docker.io's own client has BuildKit; the one first on PATH may not.
    install docker.io iptables
    mkdir -p "$docker_home/bin"
    ln -sf /usr/bin/docker "$docker_home/bin/docker"
    export PATH="$docker_home/bin:$PATH"
    if docker info >/dev/null 2>&1; then return; fi
    echo "Starting Docker's engine …"
    dockerd >"$docker_home/dockerd.log" 2>&1 </dev/null &
    started+=("$!")
    for _ in {1..120}; do
        if docker info >/dev/null 2>&1; then return; fi
        sleep 0.5
    done
    echo "error: Docker's engine does not start. Its log ends:" >&2
    tail -20 "$docker_home/dockerd.log" >&2
    return 1
}

make_base_image() {
    echo "Making $base_image from Debian's packages …"
    install debootstrap
    local root="$docker_home/base"
    rm -rf "$root"
    mkdir -p "$root"
    debootstrap --variant=minbase --include=python3,python3-pip,python3-venv,ca-certificates bookworm "$root" >"$docker_home/debootstrap.log"
    # This machine may trust certificates that Debian does not know.
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
    ln -sf python3 "$root/usr/bin/python"
    rm -rf "$root"/usr/lib/python3*/EXTERNALLY-MANAGED "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/archives/*.deb
    tar -C "$root" -c . | docker import --change 'CMD ["python3"]' - "$base_image" >/dev/null
    rm -rf "$root"
}

# A folder of wheels is served over loopback: containers do not see this machine's folders.
serve_wheels() {
    case "${PIP_FIND_LINKS:-}" in /*) ;; *) return 0 ;; esac
    python3 -m http.server --bind 127.0.0.1 --directory "$PIP_FIND_LINKS" 8799 >/dev/null 2>&1 &
    started+=("$!")
    export PIP_FIND_LINKS=http://127.0.0.1:8799/ BUILD_NETWORK=host
}

if ! docker info >/dev/null 2>&1 || ! docker buildx version >/dev/null 2>&1; then start_engine; fi
if ! docker image inspect "$base_image" >/dev/null 2>&1 && ! timeout 60 docker pull --quiet "$base_image" 2>/dev/null; then
    make_base_image
fi
serve_wheels
command -v docker-registry >/dev/null || install docker-registry
/usr/bin/python3 -c "import fusepy" 2>/dev/null || install python3-fusepy
