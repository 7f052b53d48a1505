#!/bin/sh
# Builds the programs: bpf/*.bpf.o, which are committed, and notes what they were built from and with.
# `build.sh --check` builds elsewhere and compares: with another clang than noted there is nothing to compare.
set -eu

cd "$(dirname "$0")"
programs="quorate receive refused"
note=build.note

compile() {
    # Paths of this machine must not get into the object.
    clang -O2 -g -target bpf -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter -Wno-sign-compare \
        -fdebug-compilation-dir=. -ffile-prefix-map="$PWD"=. -isystem "/usr/include/$(uname -m)-linux-gnu" \
        -c "$1.bpf.c" -o "$2"
    llvm-strip -g "$2"
}

sources() {
    cat ./*.h ./*.c | sha256sum | cut -d ' ' -f 1
}

instructions() {
    llvm-objdump -d -r --no-show-raw-insn "$1" | sed 1,3d | sha256sum
}

if [ "${1:-}" != --check ]; then
    for program in $programs; do
        compile "$program" "$program.bpf.o"
    done
    { echo "clang $(clang -dumpversion)"; echo "sources $(sources)"; } > "$note"
    exit 0
fi

if [ "$(sed -n 's/^sources //p' "$note")" != "$(sources)" ]; then
    echo "bpf: the sources changed and the objects did not: run crates/balancer/bpf/build.sh where clang is"
    exit 1
fi
if ! command -v clang > /dev/null || ! command -v llvm-strip > /dev/null || [ ! -e /usr/include/bpf/bpf_helpers.h ]; then
    echo "bpf: clang, llvm-strip or libbpf-dev is missing: only that the sources are those of the objects was checked"
    exit 0
fi
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
for program in $programs; do
    compile "$program" "$fresh/$program.bpf.o"
    if [ "$(sed -n 1p "$note")" != "clang $(clang -dumpversion)" ]; then
        echo "bpf: built with $(sed -n 1p "$note"), here is $(clang -dumpversion): $program compiles; not compared"
    elif [ "$(instructions "$fresh/$program.bpf.o")" != "$(instructions "$program.bpf.o")" ]; then
        echo "bpf: $program.bpf.o is not what these sources build to: run crates/balancer/bpf/build.sh"
        exit 1
    fi
done
echo "bpf: the objects are built from these sources"
