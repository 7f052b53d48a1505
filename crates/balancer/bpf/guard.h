/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/* What a guest may not send. */
#ifndef QUORATE_GUARD_H
#define QUORATE_GUARD_H

/* The datapath's own addresses are nobody's; the guest's own is checked where the network wants it. */
INLINE int guard_mac(struct edge *edge, struct ether *ether)
{
	if (ether->source[0] == 0x02 && ether->source[1] == 0x51 &&
	    (ether->source[2] == MAC_VIRTUAL || ether->source[2] == MAC_DIRECTOR || ether->source[2] == MAC_BOUNCED ||
	     ether->source[2] == MAC_FINAL || ether->source[2] == MAC_HELD))
		return 1;
	return edge->flags & GUARD_MAC && !same_mac(ether->source, edge->mac);
}

INLINE int allowed(struct edge *edge, struct address address)
{
	__u32 i;

#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_ALLOWED; i++) {
		if (i >= edge->allowed_count)
			break;
		if (same_address(edge->allowed[i], address))
			return 1;
	}
	return 0;
}

INLINE int guard_arp(struct edge *edge, void *data, void *end)
{
	struct arp *arp = data + ETHER;

	if ((void *)(arp + 1) > end)
		return 0;
	if (edge->flags & GUARD_MAC && !same_mac(arp->sender_mac, edge->mac))
		return 1;
	return edge->flags & GUARD_ADDRESS && arp->sender && !allowed(edge, mapped(arp->sender));
}

INLINE int guard_address(struct edge *edge, struct packet *packet)
{
	if (!(edge->flags & GUARD_ADDRESS))
		return 0;
	if (packet->v6) {
		if (packet->source.high == 0 && packet->source.low == 0)
			return 0;
		if ((packet->source.high & 0xc0ff) == 0x80fe) /* fe80::/10 */
			return 0;
	} else if (unmapped(packet->source) == 0) {
		return 0;
	}
	return !allowed(edge, packet->source);
}

INLINE int guard_dhcp(struct edge *edge, struct packet *packet)
{
	return edge->flags & GUARD_DHCP && packet->protocol == IP_UDP && packet->piece != PIECE_LATER &&
	       packet->source_port == (packet->v6 ? 547 : 67);
}

INLINE int guard_router(struct edge *edge, struct packet *packet)
{
	return edge->flags & GUARD_ROUTER && packet->v6 && is_icmp(packet) &&
	       (packet->icmp_type == 134 || packet->icmp_type == 137);
}

#endif
