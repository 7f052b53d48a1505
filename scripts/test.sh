#!/bin/sh
# Everything that must pass, from a clean clone, in stages; one summary line per stage, and one for the run.
# STAGES="verify unit sim" runs only those.
set -u

cd "$(dirname "$0")/.." || exit 1
PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
export PATH
export CARGO_TERM_COLOR=never CARGO_INCREMENTAL=0
# The random tests try the same cases in every run here, so that a run judges the change and not the draw; they try others
# by `make quick`, or with another seed.
export PROPTEST_RNG_SEED="${PROPTEST_RNG_SEED:-1}"
passed=0
failed=0
failures=
listed=
log=target/test-logs
mkdir -p "$log"

# Whether a stage is asked for.
wanted() {
    case " ${STAGES:-$1} " in *" $1 "*) ;; *) return 1 ;; esac
}

# Runs a stage; its verdict and its seconds go into a file.
run() {
    name=$1
    shift
    begun=$(date +%s)
    verdict=FAILED
    "$@" > "$log/$name.log" 2>&1 && verdict=ok
    echo "$verdict $(($(date +%s) - begun))" > "$log/$name.verdict"
}

# Says how a stage went.
tell() {
    name=$1
    seconds=
    read -r verdict seconds < "$log/$name.verdict" || verdict=FAILED
    if [ "$verdict" = ok ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        failures="$failures $name"
        tail -n "${TAIL:-120}" "$log/$name.log"
    fi
    counts=$(awk '/^test result:/ { for (i = 1; i <= NF; i++) { if ($(i + 1) ~ /^passed/) p += $i; if ($(i + 1) ~ /^failed/) f += $i; if ($(i + 1) ~ /^ignored/) s += $i } }
        END { if (NR && (p || f)) printf ", %d tests passed, %d failed, %d ignored", p, f, s }' "$log/$name.log")
    echo "stage $name: $verdict in ${seconds:-?} s$counts"
    grep -aE '^(MEASURED|SKIPPED|RETRIED)' "$log/$name.log" | sort -u
    return 0
}

stage() {
    wanted "$1" || return 0
    echo "stage $1: $(shift; echo "$*")"
    run "$@"
    tell "$1"
}

# What only compiles runs beside the stages that mostly wait, of the scheduler's class that gets what others leave; what is
# tested then is not disturbed. Nothing of it runs beside the tour and the lab, which have time limits: see `join`.
aside() {
    for name in tools verify; do
        rm -f "$log/$name.verdict"
        wanted $name && echo "stage $name: beside the others"
    done
    idle="nice -n 19"
    chrt -i 0 true 2> /dev/null && idle="chrt -i 0 $idle"
    # shellcheck disable=SC2086 # a command's words
    (
        wanted tools && run tools $idle make --no-print-directory tools
        wanted verify && run verify $idle cargo xtask verify --no-tests
        wanted sim && $idle cargo test --locked --release -p quorate-sim --no-run > "$log/sim-build.log" 2>&1
        exit 0
    ) &
    aside=$!
}

# The lab's tests want a program of their own making, which takes the place of the unit tests': so not beside those.
aside_lab() {
    lab_build=
    wanted lab || return 0
    # shellcheck disable=SC2086 # a command's words
    $idle cargo test --locked -p quorate-daemon --test lab --no-run > "$log/lab-build.log" 2>&1 &
    lab_build=$!
}

# Waits for what runs beside, and says how it went.
join() {
    # shellcheck disable=SC2086 # one, or two
    wait "$aside" $lab_build
    for name in tools verify; do
        wanted $name && tell $name
    done
}

# Builds everything, and lists the binaries of the tests with the folders that they want to run in. They are run without
# cargo then, which would wait for its own lock while something else is compiled.
build() {
    cargo build --locked --workspace --all-targets && list_tests
}

list_tests() {
    cargo test --locked --workspace --no-run --message-format=json > "$log/tests.json" || return 1
    sed -n 's/.*"manifest_path":"\([^"]*\)\/Cargo.toml".*"profile":{[^}]*"test":true}.*"executable":"\([^"]*\)".*/\1 \2/p' \
        "$log/tests.json" > "$log/tests"
    [ -s "$log/tests" ] && listed=yes
}

# Runs the listed test binaries whose folder fits (or, with `!`, does not fit) an expression; all of them, also after one failed.
tests() {
    pattern=$1
    shift
    [ -n "$listed" ] || list_tests || return 1
    case $pattern in
    !*) grep -vE "^[^ ]*/(${pattern#!}) " "$log/tests" ;;
    *) grep -E "^[^ ]*/($pattern) " "$log/tests" ;;
    esac > "$log/tests.now"
    bad=0
    while read -r folder binary; do
        echo "     Running $binary"
        (cd "$folder" && timeout -k 20 900 "$binary" "$@" < /dev/null) || {
            echo "error: $binary failed ($?)"
            bad=1
        }
    done < "$log/tests.now"
    [ -s "$log/tests.now" ] && return $bad
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
        (
            export QUORATE_REQUIRE_QEMU=1 QUORATE_TEST_KERNEL="$PWD/target/lab/hypervisor-guest/vmlinuz"
            export QUORATE_TEST_INITRD="$PWD/target/lab/hypervisor-guest/initrd.gz"
            tests crates/hypervisor --test-threads=1
        )
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
    (
        export QUORATE_SAN=1
        tests crates/san --test-threads=1 --nocapture
    )
}

stage packages scripts/install-packages.sh
stage build build
aside
stage guest scripts/build-guest.sh
stage debian scripts/build-debian-guest.sh
stage unit tests '!crates/hypervisor|sim'
aside_lab
stage qemu qemu_tests
stage san san_tests
join
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
