#!/bin/sh
# Measures what README names. Each measurement prints a table and writes $QUORATE_BENCH_DIR/NAME.json.
# BENCH="consensus planner" runs only those. QUORATE_ROUNDS=50 makes the rounds of storage, mirrored and quorum as many.
set -u

cd "$(dirname "$0")/.." || exit 1
PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
QUORATE_BENCH_DIR=${QUORATE_BENCH_DIR:-$PWD/target/bench}
export PATH QUORATE_BENCH_DIR
failed=0

bench() {
    name=$1
    shift
    case " ${BENCH:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    echo "bench $name: $*"
    "$@" || { echo "bench $name: FAILED"; failed=1; }
}

# In release, as a user runs it. What is only a measurement is ignored otherwise.
lab() {
    cargo test --quiet --locked --release -p quorate-daemon --test lab -- --test-threads=1 --nocapture --include-ignored "$@"
}

bench planner cargo run --quiet --locked --release -p quorate-planner-bench -- measure
bench questions cargo run --quiet --locked --release -p quorate-planner-bench -- questions
bench consensus cargo test --quiet --locked --release -p quorate-consensus --test throughput -- --ignored --nocapture
bench services cargo test --quiet --locked --release -p quorate-balancer --test speed -- --ignored --nocapture --test-threads=1
bench services cargo bench --quiet --locked -p quorate-bench --bench ring
bench failover lab t01_failover
bench migration lab a_blackout_is_hardly_longer
bench storage lab t17_storage_cut t23_many_luns
bench mirrored lab t16_mirrored
bench quorum lab t14_two_hosts
bench memory lab t11_memory
bench drain lab t13_chain
ls -l "$QUORATE_BENCH_DIR"/*.json
exit $failed
