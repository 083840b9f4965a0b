#!/bin/sh
# Installs Terraform on a CI machine: get_terraform.sh FOLDER
#
# The version is that of toolbox/Dockerfile; the archive must have the checksum below.
# TERRAFORM_RELEASES: a mirror with the layout of releases.hashicorp.com/terraform.
set -eu
sum=1ce994251c00281d6845f0f268637ba50c0005657eb3cf096b92f753b42ef4dc

if [ ! -d "${1:-}" ]; then
    echo "error: missing folder. Example: $0 /usr/local/bin" >&2
    exit 2
fi
if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "error: requires Linux on x86-64. See developer.hashicorp.com/terraform/install" >&2
    exit 2
fi
version=$(sed -n 's/^ARG TERRAFORM=.*:\([0-9.]*\)$/\1/p' "$(dirname "$0")/toolbox/Dockerfile")
archive=terraform_${version}_linux_amd64.zip
releases=${TERRAFORM_RELEASES:-https://releases.hashicorp.com/terraform}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

if ! curl --fail --silent --show-error --location --output "$folder/$archive" "$releases/$version/$archive"; then
    echo "error: download of $releases/$version/$archive failed." >&2
    echo "In a closed network set TERRAFORM_RELEASES to a mirror." >&2
    exit 2
fi
if ! echo "$sum  $folder/$archive" | sha256sum --check --status; then
    echo "error: $archive: wrong checksum; not installed. If you changed the version in toolbox/Dockerfile," >&2
    echo "update sum in $0 from $releases/$version/terraform_${version}_SHA256SUMS." >&2
    exit 2
fi
python3 -m zipfile --extract "$folder/$archive" "$folder"
install -m 755 "$folder/terraform" "$1/terraform"
echo "Installed Terraform $version in $1."
