/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/*
 * Who has the service's address? On the wire the holder answers, to a guest every host does, both while their lease
 * lasts. A station that claims such an address with another MAC is written down; a guest that does is not heard.
 */
#ifndef QUORATE_ARP_ND_H
#define QUORATE_ARP_ND_H

enum asked {
	NOT_ASKED, /* leave it */
	CLAIMED,   /* somebody claims a service's address */
	ANSWER,    /* send the answer back where the question came from */
};

/* Where a frame came from. */
struct place {
	__u32 scope;
	__u32 ifindex;
	__u32 wire; /* from outside, not from a guest */
};

COLD int claimed(struct cpu *cpu, struct place *place, struct address *address, const __u8 *mac)
{
	struct duplicate_key key = { 0 };
	struct duplicate fresh = { { 0 }, 0, 0, 0, 0, 0 };
	struct duplicate *known;

	if (!cpu || !place || !address || !mac)
		return 0;
	key.scope = place->scope;
	key.address = *address;
	known = bpf_map_lookup_elem(&duplicates, &key);
	fresh.count = known ? known->count + 1 : 1;
	copy_mac(fresh.mac, mac);
	fresh.ifindex = place->ifindex;
	fresh.seen_ns = bpf_ktime_get_boot_ns();
	bpf_map_update_elem(&duplicates, &key, &fresh, BPF_ANY);
	count(cpu, CAUSE_CLAIMED);
	return 0;
}

INLINE int may_answer(struct cpu *cpu, struct place *place, struct vip *vip)
{
	if (place->wire && !(vip->flags & VIP_HOLDER))
		return 0;
	if (!serving(cpu)) {
		count(cpu, CAUSE_LEASE);
		return 0;
	}
	return 1;
}

/* Makes the answer to an ARP request in place. */
INLINE enum asked answer_arp(struct cpu *cpu, struct place *place, void *data, void *end)
{
	struct ether *ether = data;
	struct arp *arp = data + ETHER;
	enum asked asked = NOT_ASKED;
	MAC(asker);
	__u32 target, sender;
	struct vip *vip;

	if ((void *)(arp + 1) > end)
		return NOT_ASKED;
	if (arp->hardware != bpf_htons(1) || arp->protocol != bpf_htons(TYPE_IPV4) || arp->hardware_length != 6 ||
	    arp->protocol_length != 4)
		return NOT_ASKED;
	/* Our own announcements and probes, from here or from another host. */
	if (is_ours(arp->sender_mac, MAC_VIRTUAL))
		return NOT_ASKED;
	copy_mac(asker, arp->sender_mac);
	sender = arp->sender;
	target = arp->target;
	vip = sender ? find_vip(place->scope, mapped(sender), 0) : 0;
	if (vip && !same_mac(asker, vip->told_mac)) {
		struct address address = mapped(sender);

		claimed(cpu, place, &address, asker);
		asked = CLAIMED;
	}
	if (arp->operation != bpf_htons(1))
		return asked;
	vip = find_vip(place->scope, mapped(target), 0);
	if (!vip || !may_answer(cpu, place, vip))
		return asked;
	arp->operation = bpf_htons(2);
	copy_mac(arp->target_mac, asker);
	arp->target = sender;
	copy_mac(arp->sender_mac, vip->told_mac);
	arp->sender = target;
	copy_mac(ether->destination, asker);
	copy_mac(ether->source, vip->virtual_mac);
	count(cpu, CAUSE_ARP);
	return ANSWER;
}

struct nd_answer {
	struct ether ether;
	struct ipv6 ip;
	struct neighbour neighbour;
} __attribute__((packed));

#define ND_SOLICITATION 135
#define ND_ADVERTISEMENT 136
#define ND_SOLICITED 0x40000000
#define ND_OVERRIDE 0x20000000

/* Fills `answer` for a frame whose ICMPv6 header begins at `packet->l4`; the caller puts it in the frame's place. */
INLINE enum asked answer_nd(struct cpu *cpu, struct place *place, void *data, void *end, struct packet *packet,
			    struct nd_answer *answer)
{
	struct ether *ether = data;
	struct ipv6 *ip = data + ETHER;
	struct neighbour *asked = at_offset(data, packet->l4);
	struct {
		struct address source;
		struct address destination;
		__u32 length;
		__u32 next;
		struct neighbour neighbour;
	} sum = { { 0, 0 }, { 0, 0 }, 0, 0, { 0, 0, 0, 0, { 0, 0 }, 0, 0, { 0 } } };
	int nobody = packet->source.high == 0 && packet->source.low == 0;
	enum asked verdict = NOT_ASKED;
	struct vip *vip;

	if ((void *)(ip + 1) > end || (void *)asked + 24 > end || ip->hops != 255)
		return NOT_ASKED;
	if (packet->icmp_type != ND_SOLICITATION && packet->icmp_type != ND_ADVERTISEMENT)
		return NOT_ASKED;
	if (is_ours(ether->source, MAC_VIRTUAL))
		return NOT_ASKED;
	sum.source = asked->target;
	vip = find_vip(place->scope, sum.source, 1);
	if (!vip)
		return NOT_ASKED;
	if (packet->icmp_type == ND_ADVERTISEMENT || nobody) {
		claimed(cpu, place, &sum.source, ether->source);
		verdict = CLAIMED;
	}
	if (packet->icmp_type != ND_SOLICITATION || !may_answer(cpu, place, vip))
		return verdict;
	sum.destination = packet->source;
	copy_mac(answer->ether.destination, ether->source);
	if (nobody) { /* a probe for duplicates: tell all */
		sum.destination.high = 0x2ff; /* ff02::1 */
		sum.destination.low = 1ULL << 56;
		answer->ether.destination[0] = answer->ether.destination[1] = 0x33;
		answer->ether.destination[2] = answer->ether.destination[3] = answer->ether.destination[4] = 0;
		answer->ether.destination[5] = 1;
	}
	copy_mac(answer->ether.source, vip->virtual_mac);
	answer->ether.type = bpf_htons(TYPE_IPV6);
	sum.length = bpf_htonl(sizeof(struct neighbour));
	sum.next = bpf_htonl(IP_ICMP6);
	sum.neighbour.type = ND_ADVERTISEMENT;
	sum.neighbour.flags = bpf_htonl(ND_OVERRIDE | (nobody ? 0 : ND_SOLICITED));
	sum.neighbour.target = sum.source;
	sum.neighbour.option = 2;
	sum.neighbour.option_length = 1;
	copy_mac(sum.neighbour.mac, vip->told_mac);
	sum.neighbour.checksum = ~fold(bpf_csum_diff(0, 0, (__be32 *)&sum, sizeof(sum), 0));
	answer->ip.version_flow = bpf_htonl(0x60000000);
	answer->ip.length = bpf_htons(sizeof(struct neighbour));
	answer->ip.next = IP_ICMP6;
	answer->ip.hops = 255;
	answer->ip.source = sum.source;
	answer->ip.destination = sum.destination;
	answer->neighbour = sum.neighbour;
	count(cpu, CAUSE_ND);
	return ANSWER;
}

#endif
