#!/bin/sh
# Builds a guest that is a real Debian: target/lab-cache/debian/disk.img.
#
# Debian 12 with nginx and the QEMU guest agent on one ext4 partition, started by GRUB from the disk itself, so that it
# boots from whatever holds the disk. 256 MiB of memory are enough. It answers HTTP on port 80: `/` with a page,
# `/boot-id` with an id of its life, `/big` with 1 MiB. Nobody can log in. Its address is static, 10.77.0.50/24 on its
# first NIC (QUORATE_DEBIAN_ADDRESS=ADDRESS/BITS builds it with another one). Progress is on the serial console, which
# says `quorate: debian guest ready` when nginx runs.
#
# Everything comes from the Debian archive that this machine's own apt sources name (QUORATE_DEBIAN_MIRROR=URI takes
# another one). Runs as root, needs no loop device and no mount but debootstrap's own. Nothing is done when neither this
# script nor the address has changed.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
out="$root/target/lab-cache/debian"
address=${QUORATE_DEBIAN_ADDRESS:-10.77.0.50/24}
size_mib=1024
packages="linux-image-cloud-amd64,initramfs-tools,zstd,systemd-sysv,udev,kmod,acpid,nginx-light,qemu-guest-agent"
mkdir -p "$out"

say() { echo "debian guest: $*"; }
die() {
    say "$*" >&2
    exit 1
}

[ "$(uname -m)" = x86_64 ] || die "only x86_64 hosts can build and run it"

# One builder at a time; the second one finds the work done.
exec 9> "$out/lock"
flock 9

stamp=$({
    sha256sum "$0" | cut -d' ' -f1
    echo "$address"
} | sha256sum | cut -d' ' -f1)
if [ -f "$out/stamp" ] && [ "$(cat "$out/stamp")" = "$stamp" ] && [ -f "$out/disk.img" ]; then
    say "up to date"
    exit 0
fi
rm -f "$out/stamp"

[ "$(id -u)" -eq 0 ] || die "building it needs root (debootstrap): run it with sudo"
for tool in debootstrap grub-mkimage mke2fs sfdisk; do
    command -v "$tool" > /dev/null || die "$tool is missing: run scripts/install-packages.sh"
done
mirror=${QUORATE_DEBIAN_MIRROR:-$("$root/scripts/debian-mirror.sh")}
[ -n "$mirror" ] || die "apt's sources name no Debian archive: set QUORATE_DEBIAN_MIRROR"
proxy=$(apt-config shell proxy Acquire::http::Proxy 2> /dev/null || :)
eval "$proxy"
[ -z "${proxy:-}" ] || export http_proxy="$proxy"

work="$out/work"
tree="$work/root"
log="$out/build.log"
rm -rf --one-file-system "$work"
mkdir -p "$work"
# Whatever goes wrong, no mount of debootstrap's stays behind, and nothing half-built is taken for an image.
cleanup() {
    for mounted in proc sys dev/pts dev; do
        umount -l "$tree/$mounted" 2> /dev/null || :
    done
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT

say "debootstrap (a few minutes; its output is in $log)"
mkdir -p "$out/packages"
debootstrap --variant=minbase --cache-dir="$out/packages" --include="$packages" bookworm "$tree" "$mirror" > "$log" 2>&1 ||
    die "debootstrap failed; the end of $log: $(tail -n 3 "$log")"

in_tree() { DEBIAN_FRONTEND=noninteractive LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot "$tree" "$@" >> "$log" 2>&1; }
put() {
    mkdir -p "$(dirname "$tree/$1")"
    cat > "$tree/$1"
}

say "configuration"
put etc/hostname << 'EOF'
debian
EOF
put etc/hosts << 'EOF'
127.0.0.1 localhost debian
EOF
put etc/fstab << 'EOF'
LABEL=quorate-root / ext4 errors=remount-ro 0 1
EOF
# The same machine in every copy, so that its first boot is like any other.
put etc/machine-id << 'EOF'
6b7d2c1e9f304a58b1c4d0e2a7f86935
EOF
put etc/systemd/network/lan.network << EOF
[Match]
Name=eth0
[Network]
Address=$address
LinkLocalAddressing=no
EOF
put etc/systemd/journald.conf.d/lab.conf << 'EOF'
[Journal]
Storage=volatile
RuntimeMaxUse=4M
EOF
put etc/nginx/nginx.conf << 'EOF'
user www-data;
worker_processes 1;
pid /run/nginx.pid;
error_log /var/log/nginx/error.log;
events {
    worker_connections 128;
}
http {
    include mime.types;
    access_log off;
    server {
        listen 80 default_server;
        root /var/www/html;
        location = /boot-id {
            alias /run/boot-id;
        }
    }
}
EOF
put var/www/html/index.html << 'EOF'
<!doctype html><title>debian</title><p>A Debian guest of the lab.
EOF
head -c 1048576 /dev/zero | tr '\0' q | put var/www/html/big
put etc/systemd/system/nginx.service.d/lab.conf << 'EOF'
[Unit]
Wants=network.target
After=network.target
[Service]
ExecStartPre=/bin/sh -c 'cat /proc/sys/kernel/random/boot_id > /run/boot-id'
EOF
put etc/systemd/system/lab-ready.service << 'EOF'
[Unit]
Description=Say on the console that nginx runs
After=nginx.service systemd-networkd.service
Requires=nginx.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'echo "quorate: debian guest ready" > /dev/console'
[Install]
WantedBy=multi-user.target
EOF
# Only what a disk needs: the whole set of drivers takes an emulated guest many seconds to unpack.
put etc/initramfs-tools/conf.d/lab << 'EOF'
MODULES=list
COMPRESS=zstd
EOF
put etc/initramfs-tools/modules << 'EOF'
virtio_pci
virtio_blk
virtio_scsi
sd_mod
ext4
EOF
# The power button, as the hypervisor presses it; there is no login manager that would listen.
put etc/acpi/events/power << 'EOF'
event=button/power.*
action=/usr/bin/systemctl poweroff
EOF
# An emulated machine needs seconds to find out that it has none of these.
put etc/modprobe.d/lab.conf << 'EOF'
blacklist kvm
blacklist kvm_amd
blacklist kvm_intel
blacklist powernow_k8
blacklist acpi_cpufreq
blacklist psmouse
blacklist pcspkr
EOF
in_tree passwd --lock root
in_tree systemctl enable systemd-networkd.service nginx.service acpid.service lab-ready.service
in_tree systemctl mask getty.target systemd-logind.service serial-getty@ttyS0.service getty@tty1.service \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
    fstrim.timer systemd-firstboot.service systemd-networkd-wait-online.service dev-hugepages.mount \
    sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount sys-kernel-config.mount \
    systemd-pstore.service systemd-update-utmp.service systemd-update-utmp-runlevel.service acpid.path
in_tree update-initramfs -u -k all || die "update-initramfs failed, see $log"
in_tree nginx -t || die "nginx refuses its configuration, see $log"
kernel=$(cd "$tree/boot" && echo vmlinuz-*)
initrd=$(cd "$tree/boot" && echo initrd.img-*)
[ -f "$tree/boot/$kernel" ] && [ -f "$tree/boot/$initrd" ] || die "no kernel in the image, see $log"
put boot/grub/grub.cfg << EOF
serial --unit=0 --speed=115200
terminal_output serial
linux /boot/$kernel root=LABEL=quorate-root ro console=ttyS0 net.ifnames=0 quiet panic=5
initrd /boot/$initrd
boot
EOF
# The archive's address stays out of the image, and what nobody reads too.
: > "$tree/etc/apt/sources.list"
rm -rf "$tree"/var/cache/apt/* "$tree"/var/lib/apt/lists/* "$tree"/var/log/* "$tree"/usr/share/doc/* \
    "$tree"/usr/share/man/* "$tree"/usr/share/locale/* "$tree"/var/cache/debconf/*-old
mkdir -p "$tree/var/log/nginx" "$tree/var/log/journal"
rmdir "$tree/var/log/journal"

say "disk"
image="$out/disk.img.new"
rm -f "$image"
truncate -s "${size_mib}M" "$image"
# One partition after the first MiB; GRUB's core lies in the gap before it.
echo "label: dos
label-id: 0x51554f52
start=2048, type=83, bootable" | sfdisk --quiet "$image" >> "$log" 2>&1
fs_bytes=$(((size_mib - 1) * 1024 * 1024))
E2FSPROGS_FAKE_TIME=1735689600 mke2fs -q -t ext4 -L quorate-root -U 6f1d2a64-0f0b-4ad1-8a0e-51554f524154 \
    -E "offset=1048576,hash_seed=6f1d2a64-0f0b-4ad1-8a0e-51554f524154,root_owner=0:0" -m 1 \
    -d "$tree" "$image" "$((fs_bytes / 1024))k" >> "$log" 2>&1 || die "mke2fs failed, see $log"
# What `grub-install` would do, without a device: boot code into the first sector (its table stays), the core after it.
core="$work/core.img"
grub-mkimage -O i386-pc -o "$core" -p '(hd0,msdos1)/boot/grub' \
    biosdisk part_msdos ext2 normal configfile linux serial terminal boot
[ "$(stat -c %s "$core")" -lt $((2047 * 512)) ] || die "GRUB's core does not fit before the partition"
dd if=/usr/lib/grub/i386-pc/boot.img of="$image" bs=440 count=1 conv=notrunc status=none
dd if="$core" of="$image" bs=512 seek=1 conv=notrunc status=none

mv "$image" "$out/disk.img"
echo "$stamp" > "$out/stamp"
say "built $out/disk.img ($(du -m "$out/disk.img" | cut -f1) MiB of $size_mib used)"
