/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/*
 * A ping of a service is answered here, by the host that would steer: that the address answers says that the cluster
 * serves it, not that a member is well.
 */
#ifndef QUORATE_ICMP_H
#define QUORATE_ICMP_H

#define ANSWER_TTL 64

INLINE void swap_macs(struct ether *ether, struct vip *vip)
{
	MAC(asked);

	copy_mac(asked, ether->destination);
	copy_mac(ether->destination, ether->source);
	copy_mac(ether->source, asked[0] & 1 ? vip->virtual_mac : asked);
}

/* Turns an echo request into its reply, in place. Returns 0, or -1 if it cannot be. */
INLINE int answer_echo(void *data, void *end, struct vip *vip, struct packet *packet)
{
	struct ether *ether = data;
	struct icmp *icmp = at_offset(data, packet->l4);

	if ((void *)(ether + 1) > end || (void *)(icmp + 1) > end || packet->piece)
		return -1;
	if (packet->v6) {
		struct ipv6 *ip = data + ETHER;

		if ((void *)(ip + 1) > end || (packet->source.high & 0xff) == 0xff)
			return -1;
		ip->source = packet->destination;
		ip->destination = packet->source;
		ip->hops = ANSWER_TTL;
		icmp->type = 129;
		icmp->checksum = checksum_changed(icmp->checksum, bpf_htons(128 << 8), bpf_htons(129 << 8));
	} else {
		struct ipv4 *ip = data + ETHER;
		__u16 from, to;

		if ((void *)(ip + 1) > end || (unmapped(packet->source) & bpf_htonl(0xe0000000)) == bpf_htonl(0xe0000000))
			return -1;
		ip->source = unmapped(packet->destination);
		ip->destination = unmapped(packet->source);
		from = bpf_htons(ip->ttl << 8 | ip->protocol);
		to = bpf_htons(ANSWER_TTL << 8 | ip->protocol);
		ip->ttl = ANSWER_TTL;
		ip->checksum = checksum_changed(ip->checksum, from, to);
		icmp->type = 0;
		icmp->checksum = checksum_changed(icmp->checksum, bpf_htons(8 << 8), 0);
	}
	swap_macs(ether, vip);
	return 0;
}

#endif
