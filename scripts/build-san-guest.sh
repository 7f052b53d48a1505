#!/bin/sh
# Builds the SAN's guest: target/lab/san/vmlinuz and target/lab/san/initrd.img, for a LIO target and for hosts with the
# kernel's iSCSI initiator; and target/lab/san/tools, with libiscsi's own test tool.
#
# The kernel is the lab guest's. open-iscsi, its libraries and libiscsi are downloaded (never installed) with apt into
# target/lab-cache/san. Nothing is done when the input has not changed.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
cache="$root/target/lab-cache"
debs="$cache/san"
out="$root/target/lab/san"
build="$root/target/guest-build"
triple=x86_64-unknown-linux-gnu
cargo=$(command -v cargo || echo "${CARGO_HOME:-$HOME/.cargo}/bin/cargo")

say() { echo "san: $*"; }
die() {
    say "$*" >&2
    exit 1
}

# Brings the kernel, and the program that packs an initramfs.
"$root/scripts/build-guest.sh"
mkdir -p "$debs" "$out"
exec 9> "$cache/lock"
flock 9
kernel_deb=${QUORATE_GUEST_KERNEL_DEB:-$(find "$cache" -maxdepth 1 -name 'linux-image-*cloud-amd64_*.deb' | sort | tail -n 1)}
pack="$build/$triple/release/quorate-guest-init"
[ -x "$pack" ] || {
    rm -f "$root/target/lab/guest/stamp"
    flock -u 9
    "$root/scripts/build-guest.sh"
    flock 9
}

# Everything that iscsid and iscsiadm link, the C library too, so that the machine's own release does not matter.
initiator="open-iscsi libopeniscsiusr libisns0 libkmod2 libmount1 libblkid1 libsystemd0 libssl3 libc6 libselinux1
    libpcre2-8-0 liblzma5 libzstd1 liblz4-1 libgcrypt20 libgpg-error0 libcap2"
tester="libiscsi-bin libiscsi7 libcunit1 libibverbs1 librdmacm1 libnl-3-200 libnl-route-3-200"
have() { [ -n "$(find "$debs" -maxdepth 1 -name "$1_*.deb" | head -n 1)" ]; }
missing=
for package in $initiator $tester; do have "$package" || missing="$missing $package"; done
if [ -n "$missing" ]; then
    command -v apt-get >/dev/null 2>&1 || die "no apt-get: put the packages of Debian 12 into $debs:$missing"
    say "downloading$missing"
    # shellcheck disable=SC2086 # a list of words
    (cd "$debs" && apt-get download -q -o APT::Sandbox::User=root $missing) > "$cache/san.log" 2>&1 ||
        { [ "$(id -u)" -eq 0 ] && apt-get update -q && cd "$debs" && apt-get download -q -o APT::Sandbox::User=root $missing; } >> "$cache/san.log" 2>&1 ||
        { cat "$cache/san.log" >&2; die "cannot download$missing: run 'apt-get update' and try again"; }
fi

# In load order.
base="drivers/virtio/virtio_ring drivers/virtio/virtio drivers/virtio/virtio_pci_legacy_dev
    drivers/virtio/virtio_pci_modern_dev drivers/virtio/virtio_pci drivers/block/virtio_blk net/core/failover
    drivers/net/net_failover drivers/net/virtio_net drivers/char/hw_random/virtio-rng drivers/scsi/scsi_common
    drivers/scsi/scsi_mod"
target="fs/configfs/configfs drivers/target/target_core_mod drivers/target/target_core_iblock
    drivers/target/iscsi/iscsi_target_mod"
host="drivers/scsi/sd_mod drivers/scsi/sg drivers/scsi/scsi_transport_iscsi drivers/scsi/libiscsi
    drivers/scsi/libiscsi_tcp drivers/scsi/iscsi_tcp"

stamp=$({
    cd "$root"
    find crates/san/src crates/san/guest crates/storage/src crates/types/src crates/guest/src -type f | sort | xargs sha256sum
    sha256sum crates/san/Cargo.toml scripts/build-san-guest.sh "$kernel_deb" "$debs"/*.deb | cut -d' ' -f1
    "$cargo" --version
} | sha256sum | cut -d' ' -f1)
if [ -f "$out/stamp" ] && [ "$(cat "$out/stamp")" = "$stamp" ] && [ -f "$out/initrd.img" ]; then
    say "up to date"
    exit 0
fi
rm -f "$out/stamp"

say "compiling the host program"
CARGO_TARGET_DIR="$build" RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=$root=." \
CARGO_PROFILE_RELEASE_OPT_LEVEL=s CARGO_PROFILE_RELEASE_PANIC=abort CARGO_PROFILE_RELEASE_STRIP=symbols \
CARGO_PROFILE_RELEASE_DEBUG=none CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1 \
    "$cargo" build --quiet --locked --release --target "$triple" -p quorate-san --bin quorate-san-host

work="$cache/san-work"
rm -rf "$work" "$out/tools"
mkdir -p "$work/kernel" "$work/initiator" "$work/tester" "$out/tools"
unpack() {
    into=$1
    shift
    for package in "$@"; do
        dpkg-deb --fsys-tarfile "$(find "$debs" -maxdepth 1 -name "${package}_*.deb" | sort | tail -n 1)" | tar -x -C "$into"
    done
}
# shellcheck disable=SC2086 # lists of words
unpack "$work/initiator" $initiator
# shellcheck disable=SC2086
unpack "$work/tester" $tester
dpkg-deb --fsys-tarfile "$kernel_deb" | tar -x -C "$work/kernel" ./boot ./lib/modules
tree=$(echo "$work"/kernel/lib/modules/*)

set -- init=crates/san/guest/init bin/busybox="$(command -v busybox)" \
    bin/quorate-san-host="$build/$triple/release/quorate-san-host" \
    bin/iscsid="$work/initiator/sbin/iscsid" bin/iscsiadm="$work/initiator/sbin/iscsiadm" \
    etc/iscsi/iscsid.conf=crates/san/guest/iscsid.conf
cd "$root"
for group in base target host; do
    : > "$work/order.$group"
    eval "list=\$$group"
    # shellcheck disable=SC2154 # set by eval
    for module in $list; do
        file="$tree/kernel/$module.ko"
        # What is not there is built into that kernel.
        [ -f "$file" ] || continue
        basename "$file" >> "$work/order.$group"
        set -- "$@" "modules/$(basename "$file")=$file"
    done
    [ -s "$work/order.$group" ] || die "no $group modules found in $kernel_deb"
    set -- "$@" "modules/order.$group=$work/order.$group"
done

# Exactly the libraries that the two programs need, under the names they ask for.
libraries="$work/initiator/lib/$(uname -m)-linux-gnu:$work/initiator/usr/lib/$(uname -m)-linux-gnu"
loader="$work/initiator/lib64/ld-linux-x86-64.so.2"
[ -e "$loader" ] || loader="$work/initiator/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
set -- "$@" "lib64/ld-linux-x86-64.so.2=$loader"
for library in $(for program in iscsid iscsiadm; do
    "$loader" --library-path "$libraries" --list "$work/initiator/sbin/$program"
done | sed -n 's/.* => \(\/[^ ]*\) .*/\1/p' | sort -u); do
    case $library in "$work"/*) ;; *) die "$library comes from this machine, not from a package" ;; esac
    set -- "$@" "lib/$(basename "$library")=$library"
done

"$pack" pack "$out/initrd.img.new" "$@"
cp "$work"/kernel/boot/vmlinuz-* "$out/vmlinuz"
mv "$out/initrd.img.new" "$out/initrd.img"
cp "$work/tester/usr/bin/iscsi-test-cu" "$out/tools/"
find "$work/tester" -name '*.so.*' -exec cp -L {} "$out/tools/" \;
rm -rf "$work"
echo "$stamp" > "$out/stamp"
say "built $out (initrd.img $(($(stat -c %s "$out/initrd.img") / 1024)) KiB)"
