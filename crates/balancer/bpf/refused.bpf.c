// SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only
/* For a test only: no kernel accepts it, because it reads a packet without looking where that ends. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

char _license[] SEC("license") = "Dual MIT/GPL";

SEC("xdp")
int refused(struct xdp_md *ctx)
{
	return *(__u32 *)(long)ctx->data;
}
