/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/*
 * For the switch's end of a cable: lets everything pass. A virtual cable delivers what a program at its other end
 * sends back (XDP_TX) only to an end that has a program too.
 * pass.bpf.o: clang -O2 -target bpf -mcpu=v3 -c pass.bpf.c -o pass.bpf.o
 */
__attribute__((section("xdp"), used)) int pass(void *context)
{
	(void)context;
	return 2; /* XDP_PASS */
}

char _license[] __attribute__((section("license"), used)) = "Dual MIT/GPL";
