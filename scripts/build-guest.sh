#!/bin/sh
# Builds the lab guest: target/lab/guest/vmlinuz and target/lab/guest/initrd.img.
#
# The kernel is Debian's cloud kernel, downloaded (never installed) with apt into target/lab-cache. The initramfs
# holds our static init program, busybox and the virtio modules. Same input, same bytes; nothing is done when the
# input has not changed. QUORATE_GUEST_KERNEL_DEB=FILE takes a kernel package that is already there.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
cache="$root/target/lab-cache"
out="$root/target/lab/guest"
build="$root/target/guest-build"
triple=x86_64-unknown-linux-gnu
cargo=$(command -v cargo || echo "${CARGO_HOME:-$HOME/.cargo}/bin/cargo")
mkdir -p "$cache" "$out"

say() { echo "guest: $*"; }
die() {
    say "$*" >&2
    exit 1
}

[ "$(uname -m)" = x86_64 ] || die "only x86_64 hosts can build and run the lab guest"

# One builder at a time; the second one finds the work done.
exec 9> "$cache/lock"
flock 9

find_kernel() {
    kernel_deb=${QUORATE_GUEST_KERNEL_DEB:-}
    [ -z "$kernel_deb" ] || return 0
    kernel_deb=$(find "$cache" -maxdepth 1 -name 'linux-image-*cloud-amd64_*.deb' | sort | tail -n 1)
    [ -z "$kernel_deb" ] || return 0
    command -v apt-get >/dev/null 2>&1 ||
        die "no apt-get: set QUORATE_GUEST_KERNEL_DEB to a linux-image-*-cloud-amd64 package of Debian"
    package=$(kernel_package)
    if [ -z "$package" ] && [ "$(id -u)" -eq 0 ]; then
        apt-get update -q
        package=$(kernel_package)
    fi
    [ -n "$package" ] ||
        die "apt knows no linux-image-cloud-amd64: run 'apt-get update', or set QUORATE_GUEST_KERNEL_DEB"
    say "downloading $package"
    (cd "$cache" && apt-get download -q -o APT::Sandbox::User=root "$package") ||
        die "cannot download $package: run 'apt-get update' and try again"
    kernel_deb=$(find "$cache" -maxdepth 1 -name 'linux-image-*cloud-amd64_*.deb' | sort | tail -n 1)
}

# The versioned package that the meta package depends on.
kernel_package() {
    apt-cache depends linux-image-cloud-amd64 2>/dev/null |
        sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1
}

find_kernel
busybox=$(command -v busybox) || die "busybox is missing: run scripts/install-packages.sh"

# In load order. virtio_ring comes before virtio: in Debian's kernel virtio needs symbols of the ring.
modules="drivers/virtio/virtio_ring drivers/virtio/virtio drivers/virtio/virtio_pci_legacy_dev
    drivers/virtio/virtio_pci_modern_dev drivers/virtio/virtio_pci drivers/virtio/virtio_mmio
    drivers/block/virtio_blk net/core/failover drivers/net/net_failover drivers/net/virtio_net
    drivers/char/virtio_console drivers/char/hw_random/virtio-rng drivers/input/evdev drivers/acpi/button"

stamp=$({
    cd "$root"
    find crates/guest/src -type f | sort | xargs sha256sum
    # Of the workspace's files, only what reaches the guest.
    sha256sum crates/guest/Cargo.toml scripts/build-guest.sh "$busybox" "$kernel_deb" | cut -d' ' -f1
    grep -A1 -E '^name = "(rustix|linux-raw-sys|bitflags|serde|serde_core|serde_json|itoa|memchr)"$' Cargo.lock
    "$cargo" --version
} | sha256sum | cut -d' ' -f1)
if [ -f "$out/stamp" ] && [ "$(cat "$out/stamp")" = "$stamp" ] &&
    [ -f "$out/vmlinuz" ] && [ -f "$out/initrd.img" ]; then
    say "up to date"
    exit 0
fi
rm -f "$out/stamp"

say "compiling the init program"
# Its own target directory: the static build must not wait for, or disturb, the other one.
CARGO_TARGET_DIR="$build" RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=$root=." \
CARGO_PROFILE_RELEASE_OPT_LEVEL=s CARGO_PROFILE_RELEASE_PANIC=abort CARGO_PROFILE_RELEASE_STRIP=symbols \
CARGO_PROFILE_RELEASE_DEBUG=none CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1 \
    "$cargo" build --quiet --locked --release --target "$triple" -p quorate-guest --bin quorate-guest-init
init="$build/$triple/release/quorate-guest-init"

say "unpacking $(basename "$kernel_deb")"
work="$cache/kernel"
rm -rf "$work"
mkdir -p "$work"
dpkg-deb --fsys-tarfile "$kernel_deb" |
    tar -x -C "$work" --wildcards './boot/vmlinuz-*' './lib/modules/*/kernel/drivers/*' './lib/modules/*/kernel/net/core/*'
tree=$(echo "$work"/lib/modules/*)

set -- init="$init" bin/busybox="$busybox"
: > "$cache/order"
for module in $modules; do
    file="$tree/kernel/$module.ko"
    # What is not there is built into that kernel.
    [ -f "$file" ] || continue
    basename "$file" >> "$cache/order"
    set -- "$@" "modules/$(basename "$file")=$file"
done
[ -s "$cache/order" ] || die "no modules found in $kernel_deb"
set -- "$@" "modules/order=$cache/order"

"$init" pack "$out/initrd.img.new" "$@"
cp "$work"/boot/vmlinuz-* "$out/vmlinuz.new"
mv "$out/vmlinuz.new" "$out/vmlinuz"
mv "$out/initrd.img.new" "$out/initrd.img"
rm -rf "$work"
echo "$stamp" > "$out/stamp"
say "built $out (initrd.img $(($(stat -c %s "$out/initrd.img") / 1024)) KiB)"
