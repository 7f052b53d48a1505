#!/bin/sh
# Installs what Quorate's build and lab need from Debian's (or Ubuntu's) own archive. Quick when all is present.
#
# QEMU: Quorate freezes guests by making their disks inactive, which needs QEMU 10 (older ones work, with
# guests killed instead of frozen). On Debian 12 that comes from bookworm-backports, taken from the same
# mirror that the machine already uses.
set -eu

plain="busybox-static ca-certificates ethtool gcc iproute2 kmod libc6-dev make nftables pkg-config procps tgt util-linux"
# Speakers of BGP, for services that routers are told of.
plain="$plain bird2 frr"
# To build the eBPF programs again and compare (without them only their sources are), and a bench's opponent.
plain="$plain clang haproxy libbpf-dev llvm"
# For the lab's Debian guest.
plain="$plain debian-archive-keyring debootstrap e2fsprogs fdisk grub-common grub-pc-bin"
qemu="qemu-system-x86 qemu-utils qemu-block-extra"

say() { echo "packages: $*"; }

installed() {
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

missing() {
    for package in "$@"; do
        installed "$package" || printf '%s ' "$package"
    done
}

check_rust() {
    if [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ] || command -v cargo >/dev/null 2>&1; then
        return 0
    fi
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$0")/../Cargo.toml")
    say "cargo is missing. Quorate needs Rust ${wanted:-stable} or newer; get it with rustup (package rustup of"
    say "Debian 13 and newer: 'apt-get install rustup && rustup default stable', or see the Rust project's install"
    say "page), then run this again."
    exit 1
}

if ! command -v dpkg-query >/dev/null 2>&1; then
    say "this is no Debian or Ubuntu; install by hand what these packages hold: $plain $qemu"
    check_rust
    exit 0
fi

codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
backports=
[ "$codename" = bookworm ] && backports="-t bookworm-backports"

need=$(missing $plain)
need_qemu=$(missing $qemu)
# Debian 12's own QEMU may be there already.
if [ -z "$need_qemu" ] && [ -n "$backports" ] &&
    dpkg --compare-versions "$(dpkg-query -W -f='${Version}' qemu-system-x86)" lt 1:10; then
    need_qemu=$qemu
fi
if [ -z "$need$need_qemu" ]; then
    check_rust
    say "all present"
    exit 0
fi

if [ "$(id -u)" -ne 0 ]; then
    say "missing; run as root:"
    say "  $0"
    say "which runs: apt-get install --no-install-recommends $need${need_qemu:+; apt-get install --no-install-recommends $backports $need_qemu}"
    exit 1
fi

if [ -n "$need_qemu" ] && [ -n "$backports" ] &&
    ! grep -rqs bookworm-backports /etc/apt/sources.list /etc/apt/sources.list.d; then
    uri=$("$(dirname "$0")/debian-mirror.sh")
    if [ -n "$uri" ]; then
        say "enabling bookworm-backports from $uri"
        keyring=/usr/share/keyrings/debian-archive-keyring.gpg
        {
            echo "Types: deb"
            echo "URIs: $uri"
            echo "Suites: bookworm-backports"
            echo "Components: main"
            [ ! -f "$keyring" ] || echo "Signed-By: $keyring"
        } > /etc/apt/sources.list.d/quorate-backports.sources
    else
        say "no Debian mirror found in apt's sources; taking QEMU from the release itself"
        backports=
    fi
fi

export DEBIAN_FRONTEND=noninteractive
say "installing: $need$need_qemu"
apt-get update -q
# Daemons of packages that Quorate starts by itself where it needs them: the packages' own would serve the whole machine.
quiet=
for service in tgt bird frr haproxy; do
    case " $need" in *" $service "* | *" ${service}2 "*) quiet="$quiet $service" ;; esac
done
# shellcheck disable=SC2086 # lists of words
[ -z "$need" ] || apt-get install -q -y --no-install-recommends $need
for service in $quiet; do
    if [ -d /run/systemd/system ]; then
        say "switching off the service $service that a package has brought (Quorate starts its own)"
        systemctl disable --now -q "$service"
    else
        systemctl disable -q "$service" 2>/dev/null || :
    fi
done
# shellcheck disable=SC2086
[ -z "$need_qemu" ] || apt-get install -q -y --no-install-recommends $backports $need_qemu
check_rust
say "done"
