/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/* Changes of addresses in frames of taps, with all checksums that cover them. Each returns 0 or an error. */
#ifndef QUORATE_REWRITE_H
#define QUORATE_REWRITE_H

#define IPV4_CHECKSUM (ETHER + 10)
#define IPV4_SOURCE (ETHER + 12)
#define IPV4_DESTINATION (ETHER + 16)
#define IPV6_SOURCE (ETHER + 8)
#define IPV6_DESTINATION (ETHER + 24)

/* One address of the IP header, and the transport checksum where this frame has one (`l4` not 0). */
INLINE int rewrite_address(struct __sk_buff *skb, int source, struct address from, struct address to, int v6,
			   __u8 protocol, __u32 l4)
{
	__u32 sum = checksum_offset(protocol);
	int error = 0;

	if (l4 && sum)
		error = address_changed(skb, l4 + sum, from, to, v6, protocol == IP_UDP ? BPF_F_MARK_MANGLED_0 : 0);
	if (error)
		return error;
	if (v6)
		return bpf_skb_store_bytes(skb, source ? IPV6_SOURCE : IPV6_DESTINATION, &to, 16, 0);
	__u32 new = unmapped(to);
	error = bpf_l3_csum_replace(skb, IPV4_CHECKSUM, unmapped(from), new, 4);
	if (error)
		return error;
	return bpf_skb_store_bytes(skb, source ? IPV4_SOURCE : IPV4_DESTINATION, &new, 4, 0);
}

/*
 * The same address once more in the packet that an ICMP error quotes. IPv4: the quoted header's own checksum makes up
 * for the address, so the ICMP checksum stays. IPv6: the ICMP checksum covers both addresses, outside and quoted.
 */
INLINE int rewrite_quoted(struct __sk_buff *skb, struct packet *packet, int source, struct address from,
			  struct address to)
{
	__u32 icmp = packet->l4, quoted = icmp + sizeof(struct icmp);
	int error;

	if (packet->v6) {
		error = address_changed(skb, icmp + 2, from, to, 1, 0);
		if (error)
			return error;
		error = address_changed(skb, icmp + 2, from, to, 1, 0);
		if (error)
			return error;
		return bpf_skb_store_bytes(skb, quoted + (source ? 8 : 24), &to, 16, 0);
	}
	__u32 new = unmapped(to);
	error = bpf_l3_csum_replace(skb, quoted + 10, unmapped(from), new, 4);
	if (error)
		return error;
	return bpf_skb_store_bytes(skb, quoted + (source ? 12 : 16), &new, 4, 0);
}

/* Source and destination change places: no checksum changes. */
INLINE int swap_addresses(struct __sk_buff *skb, struct packet *packet)
{
	int error;

	if (packet->v6) {
		error = bpf_skb_store_bytes(skb, IPV6_SOURCE, &packet->destination, 16, 0);
		return error ? error : bpf_skb_store_bytes(skb, IPV6_DESTINATION, &packet->source, 16, 0);
	}
	__u32 source = unmapped(packet->destination), destination = unmapped(packet->source);
	error = bpf_skb_store_bytes(skb, IPV4_SOURCE, &source, 4, 0);
	return error ? error : bpf_skb_store_bytes(skb, IPV4_DESTINATION, &destination, 4, 0);
}

INLINE int set_macs(struct __sk_buff *skb, const __u8 *destination, const __u8 *source)
{
	int error = bpf_skb_store_bytes(skb, 0, destination, 6, 0);

	return error ? error : bpf_skb_store_bytes(skb, 6, source, 6, 0);
}

#endif
