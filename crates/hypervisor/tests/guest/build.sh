#!/bin/sh
# Builds the small guest of the QEMU tests: a kernel and an initramfs with busybox.
# usage: build.sh OUT_DIR KERNEL_DEB     (Debian's linux-image-*-cloud-amd64; needs busybox-static)
# Afterwards: export QUORATE_TEST_KERNEL=OUT_DIR/vmlinuz QUORATE_TEST_INITRD=OUT_DIR/initrd.gz
set -eu
out=$1 deb=$2
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
dpkg-deb -x "$deb" "$work/deb"
cp "$work"/deb/boot/vmlinuz-* "$out/vmlinuz"
root=$work/root
mkdir -p "$root/bin" "$root/proc" "$root/sys" "$root/dev" "$root/tmp" "$root/modules" "$root/etc/acpi/PWRF"
cp "$(command -v busybox)" "$root/bin/busybox"
cp "$here/init" "$root/init"
printf '#!/bin/busybox sh\necho GUEST-POWEROFF >/dev/console\nexec /bin/busybox poweroff -f\n' >"$root/etc/acpi/PWRF/00000080"
chmod +x "$root/init" "$root/etc/acpi/PWRF/00000080"
for module in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_mmio virtio_blk button evdev pvpanic pvpanic-pci; do
    find "$work/deb/lib/modules" -name "$module.ko" -exec cp {} "$root/modules/" \;
done
(cd "$root" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) >"$out/initrd.gz"
