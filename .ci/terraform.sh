# shellcheck shell=bash
# Terraform's providers for machines that do not reach their registry: source it. Where the registry answers, nothing of it is
# used. The stand-in checks a configuration against the providers' own schemas, and makes up every answer.
mirror=../shared/terraform-google-mirror

registry_answers() {
    timeout 20 python3 -c 'import urllib.request; urllib.request.urlopen("https://registry.terraform.io/.well-known/terraform.json")' 2>/dev/null
}

make_mirror() {
    local work="$PWD/build/terraform-mirror"
    python3 -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$mirror/requirements.txt"
    "$work/venv/bin/python" "$mirror/terraform_google_mirror.py" --dir "$work/mirror" >/dev/null
    export TF_CLI_CONFIG_FILE="$work/mirror/terraformrc"
}

if ! command -v terraform >/dev/null; then
    echo "error: terraform is missing; https://developer.hashicorp.com/terraform/install" >&2
    exit 2
fi
if [ -d "$mirror" ] && ! registry_answers; then
    echo "Making a stand-in for Terraform's providers …"
    make_mirror
fi
