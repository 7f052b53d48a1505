/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/* Checksums: changed by what changed (RFC 1624), so that one that was wrong stays wrong and the receiver sees it. */
#ifndef QUORATE_CHECKSUM_H
#define QUORATE_CHECKSUM_H

INLINE __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* A checksum field after a 16-bit word under it went from `from` to `to`. */
INLINE __u16 checksum_changed(__u16 checksum, __u16 from, __u16 to)
{
	__u32 sum = (__u16)~checksum;

	sum += (__u16)~from;
	sum += to;
	return ~fold(sum);
}

/* Offset of the checksum in a transport header, 0 if it has none. */
INLINE __u32 checksum_offset(__u8 protocol)
{
	if (protocol == IP_TCP)
		return 16;
	if (protocol == IP_UDP)
		return 6;
	return 0;
}

/*
 * The transport checksum at `at` after an address of the pseudo header changed. `flags` may say that 0 means "none".
 * Works for checksums that the sender left to the hardware too.
 */
INLINE int address_changed(struct __sk_buff *skb, __u32 at, struct address from, struct address to, int v6,
			   __u64 flags)
{
	if (v6) {
		__s64 diff = bpf_csum_diff((__be32 *)&from, 16, (__be32 *)&to, 16, 0);
		int error;

		if (diff < 0)
			return diff;
		error = bpf_l4_csum_replace(skb, at, 0, diff, flags | BPF_F_PSEUDO_HDR | L4_IPV6);
		if (error == -22) /* EINVAL: a kernel older than the flag, which only matters to hardware sums */
			error = bpf_l4_csum_replace(skb, at, 0, diff, flags | BPF_F_PSEUDO_HDR);
		return error;
	}
	return bpf_l4_csum_replace(skb, at, unmapped(from), unmapped(to), flags | BPF_F_PSEUDO_HDR | 4);
}

#endif
