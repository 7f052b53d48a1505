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
failures=
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
        failures="$failures $name"
        tail -n "${TAIL:-120}" "$log/$name.log"
    fi
    counts=$(awk '/^test result:/ { for (i = 1; i <= NF; i++) { if ($(i + 1) ~ /^passed/) p += $i; if ($(i + 1) ~ /^failed/) f += $i; if ($(i + 1) ~ /^ignored/) s += $i } }
        END { if (NR && (p || f)) printf ", %d tests passed, %d failed, %d ignored", p, f, s }' "$log/$name.log")
    echo "stage $name: $verdict in $(($(date +%s) - begun)) s$counts"
    grep -aE '^(MEASURED|SKIPPED|RETRIED)' "$log/$name.log" | sort -u
    return 0
}

# Three hosts with real guests, end to end. Once more if a step was missed, since steps have time limits.
demo() {
    target/debug/quorate lab demo || target/debug/quorate lab demo
}

# Every test of the lab in a process of its own. A test that missed a time limit is run once more, and that is said:
# the limits are those of the product, and the cores are shared with the guests' emulation. What fails for
# any other reason (a lost record, a second copy, a wrong message) has failed.
lab() {
    binary=$(cargo test --locked -p quorate-daemon --test lab --no-run --message-format=json 2>> "$log/lab-build.log" |
        sed -n 's/.*"executable":"\([^"]*lab-[^"]*\)".*/\1/p' | tail -n 1)
    [ -x "$binary" ] || { cat "$log/lab-build.log"; return 1; }
    bad=0
    for test in $("$binary" --list --format terse 2> /dev/null | sed -n 's/: test$//p'); do
        one=$log/lab-$(echo "$test" | tr : _).log
        lab_test "$test" "$one" && continue
        if grep -aqE '^MISSED LIMIT' "$one"; then
            cat "$one"
            echo "RETRIED $test: $(grep -aE '^MISSED LIMIT' "$one" | head -n 1)"
            lab_test "$test" "$one" && continue
        fi
        cat "$one"
        bad=1
    done
    return $bad
}

lab_test() {
    (cd crates/daemon && timeout -k 20 900 "$binary" --test-threads=1 --nocapture --exact "$1") > "$2" 2>&1 || return 1
    cat "$2"
}

qemu_tests() {
    scripts/build-guest.sh &&
        crates/hypervisor/tests/guest/build.sh target/lab/hypervisor-guest \
            "$(find target/lab-cache -maxdepth 1 -name 'linux-image-*cloud-amd64_*.deb' | sort | tail -n 1)" &&
        QUORATE_REQUIRE_QEMU=1 QUORATE_TEST_KERNEL="$PWD/target/lab/hypervisor-guest/vmlinuz" \
            QUORATE_TEST_INITRD="$PWD/target/lab/hypervisor-guest/initrd.gz" \
            cargo test --locked -p quorate-hypervisor --tests --no-fail-fast -- --test-threads=1
}

# Its own tests in release: they look for broken variants in hundreds of seeds.
simulator() {
    cargo run --locked --release -p quorate-sim -- --seeds 2000 &&
        cargo test --locked --release -p quorate-sim --no-fail-fast
}

# Reservations on a real target, from hosts with kernels of their own. Once more, and that is said, if a session of a host
# hung at the target for minutes: LIO, emulated on a busy machine, does that now and then to a host whose requests were
# aborted, and nothing of ours is wrong then. What fails for any other reason has failed.
san_tests() {
    scripts/build-san-guest.sh || return 1
    san_test > "$log/san-first.log" 2>&1 && { cat "$log/san-first.log"; return 0; }
    cat "$log/san-first.log"
    hung=$(grep -aE 'panicked at .*san\.rs' -A 1 "$log/san-first.log" | grep -aE 'did not finish within|no path to the device')
    [ -n "$hung" ] || return 1
    echo "RETRIED san: a session hung at the target: $(echo "$hung" | head -n 1 | cut -c 1-200)"
    san_test
}

san_test() {
    QUORATE_SAN=1 timeout -k 20 900 cargo test --locked -p quorate-san --test san -- --test-threads=1 --nocapture
}

stage packages scripts/install-packages.sh
stage tools make --no-print-directory tools
stage build cargo build --locked --workspace --all-targets
stage verify cargo xtask verify --no-tests
stage guest scripts/build-guest.sh
stage debian scripts/build-debian-guest.sh
stage unit cargo test --locked --workspace --no-fail-fast --exclude quorate-hypervisor --exclude quorate-sim
stage qemu qemu_tests
stage san san_tests
stage sim simulator
stage demo demo
stage lab lab

# What failed is said last, where it is found.
for name in $failures; do
    echo "FAILED stage $name:"
    grep -aE '^(MISSED LIMIT|error(\[|:)|test .*FAILED|.*panicked at |  *(left|right): )' -A 1 "$log/$name.log" | cut -c 1-400 | head -n 40
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
