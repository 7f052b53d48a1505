#!/bin/sh
# Everything that must pass, from a clean clone, in stages; one summary line per stage, and one for the run.
# STAGES="verify unit sim" runs only those.
set -u

cd "$(dirname "$0")/.." || exit 1
PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
export PATH
export CARGO_TERM_COLOR=never CARGO_INCREMENTAL=0
passed=0
failed=0
log=target/test-logs
mkdir -p "$log"

stage() {
    name=$1
    shift
    case " ${STAGES:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    begun=$(date +%s)
    echo "stage $name: $*"
    if "$@" > "$log/$name.log" 2>&1; then
        passed=$((passed + 1))
        verdict=ok
    else
        failed=$((failed + 1))
        verdict=FAILED
        tail -n "${TAIL:-120}" "$log/$name.log"
    fi
    counts=$(awk '/^test result:/ { for (i = 1; i <= NF; i++) { if ($(i + 1) ~ /^passed/) p += $i; if ($(i + 1) ~ /^failed/) f += $i; if ($(i + 1) ~ /^ignored/) s += $i } }
        END { if (NR && (p || f)) printf ", %d tests passed, %d failed, %d ignored", p, f, s }' "$log/$name.log")
    echo "stage $name: $verdict in $(($(date +%s) - begun)) s$counts"
    grep -E '^(MEASURED|SKIPPED)' "$log/$name.log" | sort -u
    return 0
}

# Three hosts with real guests, end to end. Once more if a step was missed, since steps have time limits.
demo() {
    target/debug/quorate lab demo || target/debug/quorate lab demo
}

qemu_tests() {
    scripts/build-guest.sh &&
        crates/hypervisor/tests/guest/build.sh target/lab/hypervisor-guest \
            "$(find target/lab-cache -maxdepth 1 -name 'linux-image-*cloud-amd64_*.deb' | sort | tail -n 1)" &&
        QUORATE_REQUIRE_QEMU=1 QUORATE_TEST_KERNEL="$PWD/target/lab/hypervisor-guest/vmlinuz" \
            QUORATE_TEST_INITRD="$PWD/target/lab/hypervisor-guest/initrd.gz" \
            cargo test --locked -p quorate-hypervisor --tests -- --test-threads=1
}

stage packages scripts/install-packages.sh
stage tools make --no-print-directory tools
stage build cargo build --locked --workspace --all-targets
stage verify cargo xtask verify --no-tests
stage guest scripts/build-guest.sh
stage unit cargo test --locked --workspace --exclude quorate-hypervisor
stage qemu qemu_tests
stage sim cargo run --locked --release -p quorate-sim -- --seeds 2000
stage demo demo
# The long end-to-end tests measure against limits and want a quiet machine: `make lab`, or STAGES=lab.
case " ${STAGES:-} " in *" lab "*)
    stage lab cargo test --locked -p quorate-daemon --test lab -- --test-threads=1 --nocapture ;;
esac

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
