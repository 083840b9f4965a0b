#!/bin/sh
# Puts Terraform into a folder, where a CI's machine has none:     get_terraform.sh FOLDER
#
# The version is that of the toolbox (its Dockerfile names it), and the archive is taken with the right sum only.
# TERRAFORM_RELEASES is where to get it from in a closed network; its layout is that of releases.hashicorp.com/terraform.
set -eu
sum=1ce994251c00281d6845f0f268637ba50c0005657eb3cf096b92f753b42ef4dc

if [ ! -d "${1:-}" ]; then
    echo "error: which folder? For example: $0 /usr/local/bin" >&2
    exit 2
fi
if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "error: this is for Linux on x86-64. Elsewhere: developer.hashicorp.com/terraform/install" >&2
    exit 2
fi
version=$(sed -n 's/^ARG TERRAFORM=.*:\([0-9.]*\)$/\1/p' "$(dirname "$0")/toolbox/Dockerfile")
archive=terraform_${version}_linux_amd64.zip
releases=${TERRAFORM_RELEASES:-https://releases.hashicorp.com/terraform}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

if ! curl --fail --silent --show-error --location --output "$folder/$archive" "$releases/$version/$archive"; then
    echo "error: $releases/$version/$archive cannot be had. In a closed network set TERRAFORM_RELEASES." >&2
    exit 2
fi
if ! echo "$sum  $folder/$archive" | sha256sum --check --status; then
    echo "error: $archive is not the archive whose sum is written in $0. It was not unpacked. If you changed the version" >&2
    echo "in toolbox/Dockerfile, write its sum there: $releases/$version/terraform_${version}_SHA256SUMS lists it." >&2
    exit 2
fi
python3 -m zipfile --extract "$folder/$archive" "$folder"
install -m 755 "$folder/terraform" "$1/terraform"
echo "Terraform $version is in $1."
