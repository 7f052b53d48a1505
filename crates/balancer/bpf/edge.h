/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/*
 * The member's side, at its tap: the service's address becomes the guest's own and back. What an edge knows of flows
 * repairs itself: a reply of the guest is proof that the guest knows the flow.
 *
 *   packet of an unknown flow, not the first one:
 *     straight from a director   this is the primary: on to the previous member; else: on to the primary
 *     sent on once (bounced)     TCP: to the guest, whose reset is true; UDP: back to the primary, for good (final)
 *     final                      to the guest
 */
#ifndef QUORATE_EDGE_H
#define QUORATE_EDGE_H

INLINE void flow_key(struct flow_key *key, __u32 ifindex, struct address client, __u16 client_port, __u16 port,
		     __u8 protocol)
{
	key->ifindex = ifindex;
	key->client_port = client_port;
	key->port = port;
	key->client = client;
	key->protocol = protocol;
	__builtin_memset(key->zero, 0, sizeof(key->zero));
}

INLINE void touch(struct flow *flow, __u32 now, __u8 bits)
{
	if (flow->seen != now)
		flow->seen = now;
	if ((flow->bits & bits) != bits)
		flow->bits |= bits;
}

INLINE void know(struct flow_key *key, __u32 now, __u32 service, __u8 kind, __u8 bits)
{
	struct flow flow = { now, service, kind, bits };

	bpf_map_update_elem(&flows, key, &flow, BPF_ANY);
}

INLINE __u8 bits_of(__u8 tcp_flags, __u8 fin)
{
	return (tcp_flags & TCP_FIN ? fin : 0) | (tcp_flags & TCP_RST ? FLOW_RESET : 0);
}

INLINE struct address service_address(struct service *service, int v6)
{
	return v6 ? service->address6 : mapped(service->address4);
}

INLINE struct address guest_address(struct edge *edge, int v6)
{
	return v6 ? edge->address6 : mapped(edge->address4);
}

INLINE struct pair_count *pair_of(__u32 ifindex, __u32 service)
{
	struct pair_key key = { ifindex, service };

	return bpf_map_lookup_elem(&pairs, &key);
}

/* Whether the client was here within the service's time. */
INLINE int remembers(__u32 ifindex, __u32 index, struct service *service, struct address client, int v6, __u32 now)
{
	struct client_key key = { ifindex, index, affine(service, client, v6) };
	__u32 *seen = bpf_map_lookup_elem(&clients, &key);

	return seen && now - *seen <= service->remember_s;
}

INLINE void remember(__u32 ifindex, __u32 index, struct service *service, struct address client, int v6, __u32 now)
{
	struct client_key key = { ifindex, index, affine(service, client, v6) };
	__u32 *seen = bpf_map_lookup_elem(&clients, &key);

	if (!seen)
		bpf_map_update_elem(&clients, &key, &now, BPF_ANY);
	else if (*seen != now)
		*seen = now;
}

#define HOP_DIRECT 0
#define HOP_BOUNCED 1
#define HOP_FINAL 2

/* Who should get a packet of a flow unknown here: NO_MEMBER for the guest itself. */
INLINE __u32 second_chance(struct edge *edge, struct service *service, struct packet *flow, int hop, int tcp)
{
	struct share share;

	if (hop == HOP_FINAL)
		return NO_MEMBER;
	share = find_share(service, flow);
	if (hop == HOP_BOUNCED)
		return tcp || share.primary == edge->member ? NO_MEMBER : share.primary;
	return share.primary == edge->member ? share.previous : share.primary;
}

/* Sends a frame to another member, by way of the bridge. */
INLINE int bounce(struct __sk_buff *skb, struct cpu *cpu, struct edge *edge, __u32 target, int hop)
{
	__u32 zero = 0;
	struct config *config = bpf_map_lookup_elem(&settings, &zero);
	struct member *member = find_member(target);

	if (!member || !member->used || !config) {
		count(cpu, CAUSE_NO_MEMBER);
		return TCX_DROP;
	}
	if (set_macs(skb, member->mac, hop == HOP_BOUNCED ? config->final_mac : config->bounced_mac)) {
		count(cpu, CAUSE_ERROR);
		return TCX_DROP;
	}
	count(cpu, hop == HOP_BOUNCED ? CAUSE_RETURNED : CAUSE_BOUNCED);
	return bpf_redirect(edge->bridge, 0);
}

/* The guest has left: what still comes goes out of the uplink, once. */
INLINE int follow(struct __sk_buff *skb, struct cpu *cpu, struct edge *edge, struct ether *ether)
{
	__u32 zero = 0;
	struct config *config = bpf_map_lookup_elem(&settings, &zero);

	if (!config || !edge->uplink || !same_mac(ether->destination, edge->mac) || is_ours(ether->source, MAC_BOUNCED) ||
	    is_ours(ether->source, MAC_FINAL) || is_ours(ether->source, MAC_HELD)) {
		count(cpu, CAUSE_STRAGGLER);
		return TCX_DROP;
	}
	if (bpf_skb_store_bytes(skb, 6, config->bounced_mac, 6, 0)) {
		count(cpu, CAUSE_ERROR);
		return TCX_DROP;
	}
	count(cpu, CAUSE_FORWARDED);
	return bpf_redirect(edge->uplink, 0);
}

INLINE int dropped(struct cpu *cpu, enum cause cause)
{
	count(cpu, cause);
	return TCX_DROP;
}

/* A client speaks to the guest's own address at a port of a service: replies stay as they are. */
INLINE void know_direct(struct __sk_buff *skb, struct cpu *cpu, struct edge *edge, struct packet *packet)
{
	struct flow_key key;
	struct flow *flow;
	int begins = packet->protocol == IP_TCP && (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;

	if (find_range(edge->ranges, edge->count, packet->protocol, packet->destination_port) < 0)
		return;
	flow_key(&key, skb->ifindex, packet->source, packet->source_port, packet->destination_port, packet->protocol);
	flow = bpf_map_lookup_elem(&flows, &key);
	if (!flow || (flow->kind == FLOW_OWNED && begins))
		know(&key, second(cpu), 0, FLOW_DIRECT, 0);
	else if (flow->kind == FLOW_DIRECT)
		touch(flow, second(cpu), bits_of(packet->tcp_flags, FLOW_FIN_IN));
}

/* To the guest: an ICMP error about a packet that a member sent. */
COLD int error_to_guest(struct __sk_buff *skb, struct edge *edge, struct vip *vip, struct packet *packet, int hop)
{
	struct cpu *cpu = this_cpu();
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct packet flow;
	struct address own;
	struct service *service;
	struct flow_key key;
	struct flow *known;
	__u32 target;
	int index;

	if (!cpu || !edge || !vip || !packet)
		return TCX_NEXT;
	if (!is_icmp_error(packet) || parse_quoted(data, end, packet, &flow) ||
	    !same_address(flow.source, packet->destination))
		return dropped(cpu, CAUSE_ICMP);
	turn(&flow);
	index = find_range(vip->ranges, vip->count, flow.protocol, flow.destination_port);
	if (index < 0)
		return dropped(cpu, CAUSE_NO_PORT);
	service = find_service(index);
	if (!service)
		return dropped(cpu, CAUSE_NO_PORT);
	flow_key(&key, skb->ifindex, flow.source, flow.source_port, flow.destination_port, flow.protocol);
	known = bpf_map_lookup_elem(&flows, &key);
	if (!known || known->kind != FLOW_OWNED) {
		target = second_chance(edge, service, &flow, hop, 1);
		if (target != NO_MEMBER)
			return bounce(skb, cpu, edge, target, hop);
	}
	own = guest_address(edge, packet->v6);
	if (rewrite_quoted(skb, packet, 1, packet->destination, own) ||
	    rewrite_address(skb, 0, packet->destination, own, packet->v6, packet->v6 ? IP_ICMP6 : 0,
			    0))
		return dropped(cpu, CAUSE_ERROR);
	return TCX_NEXT;
}

/* To the guest: a whole packet or the first piece of one, to a port of a service. */
COLD int flow_to_guest(struct __sk_buff *skb, struct edge *edge, struct vip *vip, struct packet *packet, int hop)
{
	struct cpu *cpu = this_cpu();
	struct pair_count *pair;
	struct service *service;
	struct flow_key key;
	struct flow *flow;
	__u32 now, target = NO_MEMBER;
	int index, tcp, begins, known;

	if (!cpu || !edge || !vip || !packet)
		return TCX_NEXT;
	index = find_range(vip->ranges, vip->count, packet->protocol, packet->destination_port);
	tcp = packet->protocol == IP_TCP;
	begins = tcp && (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	if (index < 0)
		return dropped(cpu, CAUSE_NO_PORT);
	service = find_service(index);
	if (!service)
		return dropped(cpu, CAUSE_NO_PORT);
	now = second(cpu);
	flow_key(&key, skb->ifindex, packet->source, packet->source_port, packet->destination_port, packet->protocol);
	flow = bpf_map_lookup_elem(&flows, &key);
	known = flow && flow->kind == FLOW_OWNED && flow->service == (__u16)index;
	if (!known) {
		if (begins) {
			if (service->remember_s &&
			    !remembers(skb->ifindex, index, service, packet->source, packet->v6, now))
				target = second_chance(edge, service, packet, hop, 0);
		} else if (tcp || cpu->now_ns < service->udp_until_ns) {
			target = second_chance(edge, service, packet, hop, tcp);
		}
		if (target != NO_MEMBER) {
			if (packet->piece)
				remember_fragment(packet, skb->ifindex, target, index);
			return bounce(skb, cpu, edge, target, hop);
		}
	}
	/* One that is closing and begins again is another one; one that begins twice was not heard the first time. */
	if (service->flags & SERVICE_LIMITS && (begins ? !known || flow->bits : !tcp && !known) &&
	    too_many(cpu, skb->ifindex, index, packet))
		return dropped(cpu, CAUSE_LIMITED);
	if (packet->piece)
		remember_fragment(packet, skb->ifindex, edge->member, index);
	pair = pair_of(skb->ifindex, index);
	if (pair) {
		pair->packets_in++;
		pair->bytes_in += skb->len;
	}
	if (known && !begins) {
		touch(flow, now, bits_of(packet->tcp_flags, FLOW_FIN_IN));
	} else if (begins || !tcp) {
		/* A packet in the middle of a connection that nobody knows is no proof; the guest's reply will be. */
		know(&key, now, index, FLOW_OWNED, 0);
		if (pair && !known)
			pair->flows++;
	}
	if (service->remember_s && (known || begins))
		remember(skb->ifindex, index, service, packet->source, packet->v6, now);
	if (rewrite_address(skb, 0, packet->destination, guest_address(edge, packet->v6), packet->v6, packet->protocol,
			    packet->l4))
		return dropped(cpu, CAUSE_ERROR);
	return TCX_NEXT;
}

INLINE int to_guest(struct __sk_buff *skb, struct cpu *cpu, struct edge *edge)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ether *ether = data;
	struct packet packet;
	struct vip *vip;
	int hop;

	if ((void *)(ether + 1) > end)
		return TCX_NEXT;
	if (edge->flags & EDGE_FORWARD)
		return follow(skb, cpu, edge, ether);
	/* It came to the guest's edge at its last host, which has made of it what the guest is to see. */
	if (is_ours(ether->source, MAC_HELD))
		return TCX_NEXT;
	if (edge->member == NO_MEMBER || skb->vlan_present || !same_mac(ether->destination, edge->mac))
		return TCX_NEXT;
	if (parse(data, end, skb->len, &packet) != PARSED)
		return TCX_NEXT;
	if (same_address(packet.destination, guest_address(edge, packet.v6))) {
		if (packet.piece != PIECE_LATER && checksum_offset(packet.protocol)) {
			serving(cpu);
			know_direct(skb, cpu, edge, &packet);
		}
		return TCX_NEXT;
	}
	vip = find_vip(edge->scope, packet.destination, packet.v6);
	if (!vip)
		return TCX_NEXT;
	if (!serving(cpu))
		return dropped(cpu, CAUSE_LEASE);
	hop = is_ours(ether->source, MAC_BOUNCED) ? HOP_BOUNCED : is_ours(ether->source, MAC_FINAL) ? HOP_FINAL : 0;
	if (packet.piece == PIECE_LATER) {
		struct fragment *fragment = find_fragment(&packet, skb->ifindex);

		if (!fragment)
			return dropped(cpu, CAUSE_FRAGMENT);
		if (fragment->member != edge->member)
			return bounce(skb, cpu, edge, fragment->member, hop);
		if (rewrite_address(skb, 0, packet.destination, guest_address(edge, packet.v6), packet.v6, 0, 0))
			return dropped(cpu, CAUSE_ERROR);
		return TCX_NEXT;
	}
	if (is_icmp(&packet))
		return error_to_guest(skb, edge, vip, &packet, hop);
	return flow_to_guest(skb, edge, vip, &packet, hop);
}

/* From the guest: a reply of a service's flow. */
COLD int reply(struct __sk_buff *skb, struct packet *packet, __u32 index)
{
	struct cpu *cpu = this_cpu();
	struct service *service = find_service(index);
	struct pair_count *pair;

	if (!cpu || !packet)
		return TCX_NEXT;
	if (!serving(cpu))
		return dropped(cpu, CAUSE_LEASE);
	if (!service)
		return TCX_NEXT;
	if (packet->piece == PIECE_FIRST)
		remember_fragment(packet, ~skb->ifindex, 0, index);
	pair = pair_of(skb->ifindex, index);
	if (pair) {
		pair->packets_out++;
		pair->bytes_out += skb->len;
	}
	if (rewrite_address(skb, 1, packet->source, service_address(service, packet->v6), packet->v6,
			    packet->piece == PIECE_LATER ? 0 : packet->protocol, packet->l4))
		return dropped(cpu, CAUSE_ERROR);
	return TCX_NEXT;
}

/* Client and server are the same guest: addresses change places and the frame goes back to its tap. */
INLINE int self_call(struct __sk_buff *skb, struct cpu *cpu, struct edge *edge, struct packet *packet,
		     const __u8 *virtual_mac)
{
	if (!serving(cpu))
		return dropped(cpu, CAUSE_LEASE);
	if (swap_addresses(skb, packet) || set_macs(skb, edge->mac, virtual_mac))
		return dropped(cpu, CAUSE_ERROR);
	count(cpu, CAUSE_SELF);
	return bpf_redirect(skb->ifindex, 0);
}

/* From the guest: the error that it sends about a packet of a service's flow. */
COLD int error_from_guest(struct __sk_buff *skb, struct packet *packet)
{
	struct cpu *cpu = this_cpu();
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct service *service;
	struct packet quoted;
	struct flow_key key;
	struct flow *flow;
	struct address to;

	if (!cpu || !packet || !is_icmp_error(packet) || parse_quoted(data, end, packet, &quoted))
		return TCX_NEXT;
	if (!same_address(quoted.destination, packet->source))
		return TCX_NEXT;
	flow_key(&key, skb->ifindex, quoted.source, quoted.source_port, quoted.destination_port, quoted.protocol);
	flow = bpf_map_lookup_elem(&flows, &key);
	if (!flow || flow->kind != FLOW_OWNED)
		return TCX_NEXT;
	if (!serving(cpu))
		return dropped(cpu, CAUSE_LEASE);
	service = find_service(flow->service);
	if (!service)
		return TCX_NEXT;
	to = service_address(service, packet->v6);
	if (rewrite_quoted(skb, packet, 0, packet->source, to) ||
	    rewrite_address(skb, 1, packet->source, to, packet->v6, 0, 0))
		return dropped(cpu, CAUSE_ERROR);
	return TCX_NEXT;
}

INLINE int is_unicast(struct ether *ether)
{
	return !(ether->destination[0] & 1);
}

#define NO_REPLY 100

/* From the guest: a verdict if the packet belongs to a flow that the edge knows or must be a reply; else NO_REPLY. */
COLD int known_from_guest(struct __sk_buff *skb, struct edge *edge, struct packet *packet, const __u8 *virtual_mac)
{
	struct cpu *cpu = this_cpu();
	struct flow_key key;
	struct flow *flow;
	__u32 now;
	int index;

	if (!cpu || !edge || !packet)
		return TCX_NEXT;
	if (packet->piece == PIECE_LATER) {
		struct fragment *fragment = find_fragment(packet, ~skb->ifindex);

		return fragment ? reply(skb, packet, fragment->service) : NO_REPLY;
	}
	if (is_icmp(packet))
		return virtual_mac ? NO_REPLY : error_from_guest(skb, packet);
	if (!checksum_offset(packet->protocol))
		return NO_REPLY;
	serving(cpu);
	now = second(cpu);
	flow_key(&key, skb->ifindex, packet->destination, packet->destination_port, packet->source_port,
		 packet->protocol);
	flow = bpf_map_lookup_elem(&flows, &key);
	if (flow) {
		touch(flow, now, bits_of(packet->tcp_flags, FLOW_FIN_OUT));
		if (flow->kind == FLOW_OWNED)
			return reply(skb, packet, flow->service);
		if (flow->kind == FLOW_SELF && virtual_mac)
			return self_call(skb, cpu, edge, packet, virtual_mac);
		return NO_REPLY;
	}
	if (virtual_mac)
		return NO_REPLY;
	index = find_range(edge->ranges, edge->count, packet->protocol, packet->source_port);
	if (index < 0)
		return NO_REPLY;
	if (packet->protocol == IP_TCP && (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN) {
		know(&key, now, 0, FLOW_DIRECT, 0); /* it calls somebody from that port */
		return NO_REPLY;
	}
	if (!(packet->tcp_flags & TCP_RST))
		know(&key, now, index, FLOW_OWNED, bits_of(packet->tcp_flags, FLOW_FIN_OUT));
	return reply(skb, packet, index);
}

#endif
