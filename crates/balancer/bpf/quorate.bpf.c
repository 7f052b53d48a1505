// SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only
/*
 * The programs of the service datapath:
 *
 *   director        XDP on an uplink: steers packets to services, answers ARP, neighbour discovery and ping
 *   announcements   tcx egress of an uplink: nothing claims a service's address past the lease
 *   edge_from_guest tcx ingress of a tap: guards, replies of members, packets of guests to services
 *   edge_to_guest   tcx egress of a tap: packets of services to their member
 *   measure         XDP, loaded for measurements only: the director on a series of frames
 *   calibrate       XDP, the same: a series of frames that no decision is made about
 *   memory          XDP, the same: reads what the director reads of tables, decides nothing
 */
#include "abi.h"
#include "kernel.h"
#include "maps.h"
#include "lease.h"
#include "hash.h"
#include "parse.h"
#include "checksum.h"
#include "ring.h"
#include "fragments.h"
#include "director.h"
#include "icmp.h"
#include "arp_nd.h"
#include "rewrite.h"
#include "guard.h"
#include "limits.h"
#include "edge.h"

char _license[] SEC("license") = "Dual MIT/GPL";

INLINE int xdp_drop(struct cpu *cpu, enum cause cause)
{
	count(cpu, cause);
	return XDP_DROP;
}

COLD int wire_arp(struct xdp_md *ctx)
{
	struct place place = { ctx->ingress_ifindex, ctx->ingress_ifindex, 1 };
	struct cpu *cpu = this_cpu();

	if (!cpu)
		return XDP_PASS;
	if (answer_arp(cpu, &place, (void *)(long)ctx->data, (void *)(long)ctx->data_end) == ANSWER)
		return XDP_TX;
	return XDP_PASS;
}

COLD int wire_nd(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct place place = { ctx->ingress_ifindex, ctx->ingress_ifindex, 1 };
	struct cpu *cpu = this_cpu();
	struct nd_answer answer, *out;
	struct packet packet;

	if (!cpu || parse(data, end, end - data, &packet) != PARSED || !packet.v6 || !is_icmp(&packet))
		return XDP_PASS;
	if (answer_nd(cpu, &place, data, end, &packet, &answer) != ANSWER)
		return XDP_PASS;
	if (bpf_xdp_adjust_tail(ctx, (int)sizeof(answer) - (int)(end - data)))
		return xdp_drop(cpu, CAUSE_ERROR);
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	out = data;
	if ((void *)(out + 1) > end)
		return XDP_DROP;
	*out = answer;
	return XDP_TX;
}

/* Frames for a service: `virtual` if the destination says so, else only where routers or everybody may send. */
COLD int steer(struct xdp_md *ctx, struct config *config, int virtual)
{
	struct cpu *cpu = this_cpu();
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 scope = ctx->ingress_ifindex, bytes = end - data;
	struct ether *ether = data;
	struct choice choice;
	struct packet packet;
	struct member *member;
	struct vip *vip;
	int cause;

	if (!cpu || !config)
		return XDP_PASS;
	switch (parse(data, end, bytes, &packet)) {
	case PARSED:
		break;
	case NOT_IP:
		return virtual ? xdp_drop(cpu, CAUSE_NO_SERVICE) : XDP_PASS;
	default:
		return virtual ? xdp_drop(cpu, CAUSE_MALFORMED) : XDP_PASS;
	}
	vip = find_vip(scope, packet.destination, packet.v6);
	if (!vip)
		return virtual ? xdp_drop(cpu, CAUSE_NO_SERVICE) : XDP_PASS;
	if ((void *)(ether + 1) > end)
		return XDP_PASS;
	if (!virtual && !(vip->flags & VIP_ROUTED && same_mac(ether->destination, vip->host_mac)) &&
	    !(vip->flags & VIP_MULTICAST && same_mac(ether->destination, vip->told_mac)))
		return XDP_PASS;
	if (!serving(cpu))
		return xdp_drop(cpu, CAUSE_LEASE);
	if (packet.piece == PIECE_LATER) {
		cause = choose_fragment(&packet, scope, &choice);
	} else if (is_icmp(&packet)) {
		if (is_echo(&packet)) {
			if (vip->flags & VIP_MULTICAST && !(vip->flags & VIP_HOLDER))
				return xdp_drop(cpu, CAUSE_ELSEWHERE);
			if (answer_echo(data, end, vip, &packet))
				return xdp_drop(cpu, CAUSE_ICMP);
			count(cpu, CAUSE_ECHO);
			return XDP_TX;
		}
		if (!is_icmp_error(&packet))
			return xdp_drop(cpu, CAUSE_ICMP);
		cause = choose_error(cpu, data, end, vip, &packet, bytes, &choice);
	} else {
		cause = choose(cpu, vip, &packet, bytes, &choice);
		if (packet.piece && !cause)
			remember_fragment(&packet, scope, choice.member, choice.service);
	}
	if (cause)
		return xdp_drop(cpu, cause - 1);
	member = find_member(choice.member);
	if (!member || !member->used)
		return xdp_drop(cpu, CAUSE_NO_MEMBER);
	copy_mac(ether->destination, member->mac);
	if (member->ifindex)
		return XDP_PASS;
	if (vip->flags & VIP_MULTICAST && !virtual)
		return xdp_drop(cpu, CAUSE_ELSEWHERE);
	copy_mac(ether->source, config->director_mac);
	return XDP_TX;
}

COLD int tagged(int virtual)
{
	struct cpu *cpu = this_cpu();

	if (cpu && virtual)
		count(cpu, CAUSE_TAGGED);
	return XDP_PASS;
}

/*
 * The common case, all in registers: TCP or UDP without options, whole, to a service with a door. It reads a door, a
 * slot, a member and a counter: of many services those are one cache line each, but for the members.
 * What is anything else, or wrong, goes the long way (SLOW), which does the same and more.
 */
#define SLOW -1

INLINE int quick(struct xdp_md *ctx, struct config *config, int v6)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 bytes = end - data, header = ETHER + (v6 ? sizeof(struct ipv6) : sizeof(struct ipv4));
	struct ether *ether = data;
	struct udp *ports = data + header;
	struct address client, address;
	struct service_count *counted;
	struct member *member;
	struct door *door;
	struct cpu *cpu;
	__u32 hash, index;
	__u16 port, *slot;
	__u8 protocol;

	if (data + header + sizeof(struct tcp) > end)
		return SLOW;
	if (v6) {
		struct ipv6 *ip = data + ETHER;

		if ((*(__u8 *)ip & 0xf0) != 0x60 || header + bpf_ntohs(ip->length) > bytes)
			return SLOW;
		protocol = ip->next;
		client = ip->source;
		address = ip->destination;
	} else {
		struct ipv4 *ip = data + ETHER;

		if (ip->version_length != 0x45 || ip->fragment & bpf_htons(0x3fff) ||
		    ETHER + bpf_ntohs(ip->length) > bytes)
			return SLOW;
		protocol = ip->protocol;
		client = mapped(ip->source);
		address = mapped(ip->destination);
	}
	door = find_door(config, ctx->ingress_ifindex, address);
	if (!door || !door->slots || (protocol != IP_TCP && protocol != IP_UDP))
		return SLOW;
	port = bpf_ntohs(ports->destination);
	if (!opens(&door->openings[0], protocol, port) && !opens(&door->openings[1], protocol, port) &&
	    !opens(&door->openings[2], protocol, port) && !opens(&door->openings[3], protocol, port) &&
	    !opens(&door->openings[4], protocol, port))
		return SLOW;
	cpu = this_cpu();
	if (!cpu || !serving(cpu))
		return SLOW;
	index = door->service;
	if (door->affinity == AFFINITY_SUBNET) {
		struct service *service = find_service(index);

		if (!service)
			return SLOW;
		client = affine(service, client, v6);
	}
	hash = flow_hash(client, flow_ports(door->affinity, bpf_ntohs(ports->source), port, protocol));
	slot = find_slot(door->ring, door->slots, slot_of(hash, door->slots), PRIMARY);
	if (!slot)
		return SLOW;
	member = find_member(*slot);
	counted = find_count(index);
	if (!member || !member->used || !counted)
		return SLOW;
	counted->packets++;
	counted->bytes += bytes;
	copy_mac(ether->destination, member->mac);
	if (member->ifindex)
		return XDP_PASS;
	copy_mac(ether->source, config->director_mac);
	return XDP_TX;
}

INLINE int direct(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ether *ether = data;
	struct config *config;
	__u32 zero = 0;
	int virtual;

	if ((void *)(ether + 1) > end)
		return XDP_PASS;
	if (ether->type == bpf_htons(TYPE_ARP))
		return wire_arp(ctx);
	virtual = is_ours(ether->destination, MAC_VIRTUAL);
	if (ether->type == bpf_htons(TYPE_IPV6) && (virtual || ether->destination[0] == 0x33)) {
		struct ipv6 *ip = data + ETHER;
		struct icmp *icmp = (void *)(ip + 1);

		if ((void *)(icmp + 1) <= end && ip->next == IP_ICMP6 &&
		    (icmp->type == ND_SOLICITATION || icmp->type == ND_ADVERTISEMENT))
			return wire_nd(ctx);
	}
	config = bpf_map_lookup_elem(&settings, &zero);
	if (!config || (!virtual && !config->unusual))
		return XDP_PASS;
	if (virtual) {
		int verdict = SLOW;

		if (ether->type == bpf_htons(TYPE_IPV4))
			verdict = quick(ctx, config, 0);
		else if (ether->type == bpf_htons(TYPE_IPV6))
			verdict = quick(ctx, config, 1);
		if (verdict != SLOW)
			return verdict;
	}
	if (ether->type == bpf_htons(TYPE_VLAN) || ether->type == bpf_htons(TYPE_VLAN_OUTER))
		return tagged(virtual);
	return steer(ctx, config, virtual);
}

SEC("xdp")
int director(struct xdp_md *ctx)
{
	return direct(ctx);
}

/* Makes the frame the next one of a series; a program before, or the kernel, may have changed it. */
INLINE struct series *vary(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ether *ether = data;
	__u32 zero = 0, service, number;
	struct series *series = bpf_map_lookup_elem(&measures, &zero);
	struct udp *ports;
	__u16 *checksum;
	__u8 protocol;

	if (!series || data + SERIES_FRAME > end)
		return 0;
	__builtin_memcpy(data, series->frame, SERIES_FRAME);
	if (!series->services)
		return series;
	number = series->number++;
	/* In no order that a cache could foresee. */
	service = bpf_htonl(series->first + number * 0x9e3779b1U % series->services);
	if (ether->type == bpf_htons(TYPE_IPV4)) {
		struct ipv4 *ip = data + ETHER;

		ip->destination = service;
		protocol = ip->protocol;
		ports = (void *)(ip + 1);
	} else {
		struct ipv6 *ip = data + ETHER;

		ip->destination.low = (__u64)service << 32;
		protocol = ip->next;
		ports = (void *)(ip + 1);
	}
	/* Right for the first service, which is the frame's own. */
	checksum = (void *)ports + (protocol == IP_TCP ? 16 : 6);
	*checksum = checksum_changed(*checksum, ports->source, number);
	ports->source = number;
	return series;
}

SEC("xdp")
int measure(struct xdp_md *ctx)
{
	return vary(ctx) ? direct(ctx) : XDP_ABORTED;
}

SEC("xdp")
int calibrate(struct xdp_md *ctx)
{
	struct series *series = vary(ctx);

	return series ? series->verdict : XDP_ABORTED;
}

SEC("xdp")
int memory(struct xdp_md *ctx)
{
	struct series *series = vary(ctx);
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ether *ether = data;
	struct ipv4 *ip = data + ETHER;
	struct ipv6 *ip6 = data + ETHER;
	struct service_count *counted;
	struct config *config;
	struct member *member;
	struct door *door;
	__u32 zero = 0, index;
	__u16 *slot;

	config = bpf_map_lookup_elem(&settings, &zero);
	if (!series || !config || data + SERIES_FRAME > end)
		return XDP_ABORTED;
	door = find_door(config, ctx->ingress_ifindex,
			 ether->type == bpf_htons(TYPE_IPV4) ? mapped(ip->destination) : ip6->destination);
	if (!door)
		return XDP_ABORTED;
	index = door->service;
	slot = find_slot(door->ring, door->slots, slot_of(mix(series->number, 1), door->slots), PRIMARY);
	counted = find_count(index);
	if (!slot || !counted)
		return XDP_ABORTED;
	member = find_member(*slot);
	counted->packets++;
	return member && member->used ? series->verdict : XDP_ABORTED;
}

/* The frame's head in one piece. */
INLINE int pull(struct __sk_buff *skb)
{
	__u32 want = skb->len < 192 ? skb->len : 192;

	if ((void *)(long)skb->data + want > (void *)(long)skb->data_end)
		return bpf_skb_pull_data(skb, want);
	return 0;
}

SEC("classifier")
int announcements(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ether *ether = data;
	struct cpu *cpu;

	if ((void *)(ether + 1) > end || !is_ours(ether->source, MAC_VIRTUAL))
		return TCX_NEXT;
	cpu = this_cpu();
	if (cpu && serving(cpu))
		return TCX_NEXT;
	if (cpu)
		count(cpu, CAUSE_LEASE);
	return TCX_DROP;
}

COLD int guest_arp(struct __sk_buff *skb, struct edge *edge)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct cpu *cpu = this_cpu();
	struct place place = { 0 };

	if (!cpu || !edge)
		return TCX_NEXT;
	place.scope = edge->scope;
	place.ifindex = skb->ifindex;
	if (guard_arp(edge, data, end))
		return offends(cpu, skb->ifindex, CAUSE_SPOOFED);
	switch (answer_arp(cpu, &place, data, end)) {
	case ANSWER:
		return bpf_redirect(skb->ifindex, 0);
	case CLAIMED:
		return TCX_DROP;
	default:
		return TCX_NEXT;
	}
}

COLD int guest_nd(struct __sk_buff *skb, struct edge *edge)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct cpu *cpu = this_cpu();
	struct place place = { 0 };
	struct nd_answer answer;
	struct packet packet;

	if (!cpu || !edge || parse(data, end, skb->len, &packet) != PARSED || !packet.v6 || !is_icmp(&packet))
		return TCX_NEXT;
	place.scope = edge->scope;
	place.ifindex = skb->ifindex;
	switch (answer_nd(cpu, &place, data, end, &packet, &answer)) {
	case ANSWER:
		if (bpf_skb_change_tail(skb, sizeof(answer), 0) ||
		    bpf_skb_store_bytes(skb, 0, &answer, sizeof(answer), 0))
			return dropped(cpu, CAUSE_ERROR);
		return bpf_redirect(skb->ifindex, 0);
	case CLAIMED:
		return TCX_DROP;
	default:
		return TCX_NEXT;
	}
}

/* A guest's packet to a service. */
COLD int guest_to_service(struct __sk_buff *skb, struct edge *edge, struct packet *packet, int virtual)
{
	struct cpu *cpu = this_cpu();
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ether *ether = data;
	struct choice choice;
	struct member *member;
	struct vip *vip;
	int cause;

	if (!cpu || !edge || !packet || (void *)(ether + 1) > end)
		return TCX_NEXT;
	vip = find_vip(edge->scope, packet->destination, packet->v6);
	if (!vip)
		return virtual ? dropped(cpu, CAUSE_NO_SERVICE) : TCX_NEXT;
	if (!virtual && !(vip->flags & VIP_MULTICAST && same_mac(ether->destination, vip->told_mac)))
		return TCX_NEXT;
	if (!serving(cpu))
		return dropped(cpu, CAUSE_LEASE);
	if (packet->piece == PIECE_LATER) {
		cause = choose_fragment(packet, skb->ifindex, &choice);
	} else if (is_icmp(packet)) {
		if (is_echo(packet)) {
			if (answer_echo(data, end, vip, packet))
				return dropped(cpu, CAUSE_ICMP);
			count(cpu, CAUSE_ECHO);
			return bpf_redirect(skb->ifindex, 0);
		}
		if (!is_icmp_error(packet))
			return dropped(cpu, CAUSE_ICMP);
		cause = choose_error(cpu, data, end, vip, packet, skb->len, &choice);
	} else {
		cause = choose(cpu, vip, packet, skb->len, &choice);
		if (packet->piece && !cause)
			remember_fragment(packet, skb->ifindex, choice.member, choice.service);
	}
	if (cause)
		return dropped(cpu, cause - 1);
	if (choice.member == edge->member) {
		if (checksum_offset(packet->protocol) && !packet->piece) {
			struct flow_key key;

			flow_key(&key, skb->ifindex, packet->destination, packet->source_port, packet->destination_port,
				 packet->protocol);
			know(&key, second(cpu), choice.service, FLOW_SELF, 0);
			return self_call(skb, cpu, edge, packet, vip->virtual_mac);
		}
		return dropped(cpu, CAUSE_FRAGMENT);
	}
	member = find_member(choice.member);
	if (!member || !member->used)
		return dropped(cpu, CAUSE_NO_MEMBER);
	if (bpf_skb_store_bytes(skb, 0, member->mac, 6, 0))
		return dropped(cpu, CAUSE_ERROR);
	return TCX_NEXT;
}

INLINE int from_guest(struct __sk_buff *skb, struct cpu *cpu, struct edge *edge)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ether *ether = data;
	struct packet packet;
	MAC(asked);
	int virtual, verdict;

	if ((void *)(ether + 1) > end)
		return TCX_NEXT;
	if (guard_mac(edge, ether))
		return offends(cpu, skb->ifindex, CAUSE_SPOOFED);
	if (skb->vlan_present)
		return TCX_NEXT;
	if (ether->type == bpf_htons(TYPE_ARP))
		return guest_arp(skb, edge);
	copy_mac(asked, ether->destination);
	virtual = is_ours(asked, MAC_VIRTUAL);
	switch (parse(data, end, skb->len, &packet)) {
	case PARSED:
		break;
	case NOT_IP:
		return virtual ? dropped(cpu, CAUSE_NO_SERVICE) : TCX_NEXT;
	default:
		return virtual ? dropped(cpu, CAUSE_MALFORMED) : TCX_NEXT;
	}
	if (guard_address(edge, &packet))
		return offends(cpu, skb->ifindex, CAUSE_SPOOFED);
	if (guard_dhcp(edge, &packet))
		return offends(cpu, skb->ifindex, CAUSE_DHCP);
	if (guard_router(edge, &packet))
		return offends(cpu, skb->ifindex, CAUSE_ROUTER);
	if (packet.v6 && is_icmp(&packet) &&
	    (packet.icmp_type == ND_SOLICITATION || packet.icmp_type == ND_ADVERTISEMENT))
		return guest_nd(skb, edge);
	if (edge->member != NO_MEMBER && (virtual || !(asked[0] & 1)) &&
	    same_address(packet.source, guest_address(edge, packet.v6))) {
		verdict = known_from_guest(skb, edge, &packet, virtual ? asked : 0);
		if (verdict != NO_REPLY)
			return verdict;
	}
	if (!virtual && !(asked[0] & 1))
		return TCX_NEXT;
	return guest_to_service(skb, edge, &packet, virtual);
}

SEC("classifier")
int edge_from_guest(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct edge *edge = bpf_map_lookup_elem(&edges, &ifindex);
	struct cpu *cpu = this_cpu();

	if (!edge || !cpu || pull(skb))
		return TCX_NEXT;
	return from_guest(skb, cpu, edge);
}

SEC("classifier")
int edge_to_guest(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct edge *edge = bpf_map_lookup_elem(&edges, &ifindex);
	struct cpu *cpu = this_cpu();

	if (!edge || !cpu || (edge->member == NO_MEMBER && !(edge->flags & EDGE_FORWARD)) || pull(skb))
		return TCX_NEXT;
	return to_guest(skb, cpu, edge);
}
