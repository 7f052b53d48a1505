// SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only
/*
 * Takes every frame as it comes. A veth hands over what its peer's XDP program sends (XDP_TX) only if it has a program
 * itself; labs and tests put this one at the switch's end of a host's cable. `swallow` ends every frame there, for
 * measurements.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

char _license[] SEC("license") = "Dual MIT/GPL";

SEC("xdp.frags")
int receive(struct xdp_md *ctx)
{
	return XDP_PASS;
}

SEC("xdp.frags")
int swallow(struct xdp_md *ctx)
{
	return XDP_DROP;
}
