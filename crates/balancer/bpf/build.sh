#!/bin/sh
# Builds the programs: bpf/quorate.bpf.o, which is committed, and notes what it was built from and with.
# `build.sh --check` builds elsewhere and compares: with another clang than noted there is nothing to compare.
set -eu

cd "$(dirname "$0")"
object=quorate.bpf.o
note=quorate.bpf.note

compile() {
    # Paths of this machine must not get into the object.
    clang -O2 -g -target bpf -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter -Wno-sign-compare \
        -fdebug-compilation-dir=. -ffile-prefix-map="$PWD"=. -isystem "/usr/include/$(uname -m)-linux-gnu" \
        -c quorate.bpf.c -o "$1"
    llvm-strip -g "$1"
}

describe() {
    echo "clang $(clang -dumpversion)"
    echo "sources $(cat ./*.h ./*.c | sha256sum | cut -d ' ' -f 1)"
}

if [ "${1:-}" != --check ]; then
    compile "$object"
    describe > "$note"
    exit 0
fi

# Without a compiler: at least that the object was built from these sources.
if ! command -v clang > /dev/null || ! command -v llvm-strip > /dev/null || [ ! -e /usr/include/bpf/bpf_helpers.h ]; then
    if [ "$(sed -n 's/^sources //p' "$note")" != "$(cat ./*.h ./*.c | sha256sum | cut -d ' ' -f 1)" ]; then
        echo "bpf: the sources changed and $object did not: run crates/balancer/bpf/build.sh where clang is"
        exit 1
    fi
    echo "bpf: clang, llvm-strip or libbpf-dev is missing: only that the sources are those of $object was checked"
    exit 0
fi
fresh=$(mktemp)
trap 'rm -f "$fresh"' EXIT
compile "$fresh"
if [ "$(sed -n 's/^sources //p' "$note")" != "$(describe | sed -n 's/^sources //p')" ]; then
    echo "bpf: the sources changed and $object did not: run crates/balancer/bpf/build.sh"
    exit 1
fi
if [ "$(sed -n 1p "$note")" != "clang $(clang -dumpversion)" ]; then
    echo "bpf: built with $(sed -n 1p "$note"), here is clang $(clang -dumpversion): the sources compile; not compared"
    exit 0
fi
instructions() {
    llvm-objdump -d -r --no-show-raw-insn "$1" | sed 1,3d
}
if [ "$(instructions "$fresh" | sha256sum)" != "$(instructions "$object" | sha256sum)" ]; then
    echo "bpf: $object is not what these sources build to: run crates/balancer/bpf/build.sh"
    exit 1
fi
echo "bpf: $object is what these sources build to"
