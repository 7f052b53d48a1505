/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/*
 * Which member gets a packet to a service. The same for frames from the wire (XDP) and from guests (tcx); no state is
 * kept per packet. The caller has found the service's address and moves the frame.
 */
#ifndef QUORATE_DIRECTOR_H
#define QUORATE_DIRECTOR_H

struct choice {
	__u32 service;
	__u32 member;
};

/* The member of a flow. Returns 0, or 1 + the cause why there is none. */
COLD int choose(struct cpu *cpu, struct vip *vip, struct packet *flow, __u32 bytes, struct choice *choice)
{
	struct service_count *counted;
	struct service *service;
	int index;

	if (!cpu || !vip || !flow || !choice)
		return 1 + CAUSE_ERROR;
	index = find_range(vip->ranges, vip->count, flow->protocol, flow->destination_port);
	if (index < 0)
		return 1 + CAUSE_NO_PORT;
	choice->service = index;
	service = find_service(index);
	if (!service || !service->slots)
		return 1 + CAUSE_NO_MEMBER;
	choice->member = NO_MEMBER;
	if (service->flags & SERVICE_PINS) {
		choice->member = find_pin(cpu, index, flow->source, flow->source_port, flow->destination_port,
					  flow->protocol);
		if (choice->member != NO_MEMBER)
			count(cpu, CAUSE_PINNED);
	}
	if (choice->member == NO_MEMBER) {
		choice->member = find_share(service, flow).primary;
	}
	counted = find_count(choice->service);
	if (counted) {
		counted->packets++;
		counted->bytes += bytes;
	}
	return 0;
}

/* As `choose`, for a later piece of a datagram. */
INLINE int choose_fragment(struct packet *packet, __u32 place, struct choice *choice)
{
	struct fragment *fragment = find_fragment(packet, place);

	if (!fragment)
		return 1 + CAUSE_FRAGMENT;
	choice->member = fragment->member;
	choice->service = fragment->service;
	return 0;
}

/* As `choose`, for an ICMP error: the packet that it quotes came from a member, so it is turned round. */
INLINE int choose_error(struct cpu *cpu, void *data, void *end, struct vip *vip, struct packet *packet, __u32 bytes,
			struct choice *choice)
{
	struct packet flow;

	if (parse_quoted(data, end, packet, &flow) || !same_address(flow.source, packet->destination))
		return 1 + CAUSE_ICMP;
	turn(&flow);
	return choose(cpu, vip, &flow, bytes, choice);
}

#endif
