/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/*
 * From a frame to what decisions need. Reads only what lies between `data` and `end`; every length that a header
 * claims is checked against the frame's. Bounded: at most four IPv6 extension headers are walked.
 */
#ifndef QUORATE_PARSE_H
#define QUORATE_PARSE_H

#define MAX_EXTENSIONS 4

#define PIECE_FIRST 1 /* the first of several fragments: it has the ports */
#define PIECE_LATER 2 /* another one: it has none */

struct packet {
	struct address source;
	struct address destination;
	__u32 fragment_id;
	__u16 l4;          /* offset of the header after IP */
	__u16 source_port; /* host order; of ICMP: 0 */
	__u16 destination_port;
	__u8 protocol;
	__u8 piece;
	__u8 v6;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
};

enum parsed {
	PARSED,
	NOT_IP,
	MALFORMED,
};

/* `data + offset`, in bounds that the verifier can follow. No header that we read begins later. */
INLINE void *at_offset(void *data, __u32 offset)
{
	offset &= 1023;
	asm volatile("" : "+r"(offset));
	return data + offset;
}

INLINE enum parsed parse_l4(void *data, void *end, struct packet *packet)
{
	void *at = at_offset(data, packet->l4);

	packet->source_port = 0;
	packet->destination_port = 0;
	packet->tcp_flags = 0;
	packet->icmp_type = 0;
	packet->icmp_code = 0;
	if (packet->piece == PIECE_LATER)
		return PARSED;
	if (packet->protocol == IP_TCP) {
		struct tcp *tcp = at;

		if ((void *)(tcp + 1) > end)
			return MALFORMED;
		packet->source_port = bpf_ntohs(tcp->source);
		packet->destination_port = bpf_ntohs(tcp->destination);
		packet->tcp_flags = tcp->flags;
	} else if (packet->protocol == IP_UDP) {
		struct udp *udp = at;

		if ((void *)(udp + 1) > end)
			return MALFORMED;
		packet->source_port = bpf_ntohs(udp->source);
		packet->destination_port = bpf_ntohs(udp->destination);
	} else if (packet->protocol == (packet->v6 ? IP_ICMP6 : IP_ICMP)) {
		struct icmp *icmp = at;

		if ((void *)(icmp + 1) > end)
			return MALFORMED;
		packet->icmp_type = icmp->type;
		packet->icmp_code = icmp->code;
	}
	return PARSED;
}

INLINE enum parsed parse_ipv4(void *data, void *end, __u32 frame, struct packet *packet)
{
	struct ipv4 *ip = data + ETHER;
	__u32 header, length;
	__u16 fragment;

	if ((void *)(ip + 1) > end)
		return MALFORMED;
	header = (ip->version_length & 15) * 4;
	length = bpf_ntohs(ip->length);
	if (ip->version_length >> 4 != 4 || header < sizeof(*ip) || length < header || ETHER + length > frame)
		return MALFORMED;
	packet->v6 = 0;
	packet->source = mapped(ip->source);
	packet->destination = mapped(ip->destination);
	packet->protocol = ip->protocol;
	packet->l4 = ETHER + header;
	packet->fragment_id = ip->id;
	fragment = bpf_ntohs(ip->fragment);
	packet->piece = fragment & 0x1fff ? PIECE_LATER : fragment & 0x2000 ? PIECE_FIRST : 0;
	return parse_l4(data, end, packet);
}

COLD enum parsed parse_ipv6(void *data, void *end, __u32 frame, struct packet *packet)
{
	struct ipv6 *ip = data + ETHER;
	__u32 at = ETHER + sizeof(*ip);
	__u8 next;
	int i;

	if ((void *)(ip + 1) > end)
		return MALFORMED;
	if ((ip->version_flow & bpf_htonl(0xf0000000)) != bpf_htonl(0x60000000))
		return MALFORMED;
	if (ETHER + sizeof(*ip) + bpf_ntohs(ip->length) > frame)
		return MALFORMED;
	packet->v6 = 1;
	packet->source = ip->source;
	packet->destination = ip->destination;
	packet->piece = 0;
	packet->fragment_id = 0;
	next = ip->next;
#pragma clang loop unroll(full)
	for (i = 0; i < MAX_EXTENSIONS; i++) {
		if (next == IP_FRAGMENT) {
			struct ipv6_fragment *fragment = at_offset(data, at);
			__u16 offset;

			if ((void *)(fragment + 1) > end || packet->piece)
				return MALFORMED;
			offset = bpf_ntohs(fragment->offset);
			packet->piece = offset & 0xfff8 ? PIECE_LATER : offset & 1 ? PIECE_FIRST : 0;
			packet->fragment_id = fragment->id;
			next = fragment->next;
			at += sizeof(*fragment);
			if (packet->piece == PIECE_LATER)
				break;
		} else if (next == IP_HOPOPT || next == IP_ROUTING || next == IP_DESTOPT) {
			__u8 *option = at_offset(data, at);

			if ((void *)(option + 8) > end)
				return MALFORMED;
			next = option[0];
			at += (option[1] & 15) * 8 + 8;
			if (option[1] > 15)
				return MALFORMED;
		} else {
			break;
		}
	}
	packet->protocol = next;
	packet->l4 = at;
	return parse_l4(data, end, packet);
}

/* `frame` is the frame's whole length, of which `data` to `end` can be read. */
INLINE enum parsed parse(void *data, void *end, __u32 frame, struct packet *packet)
{
	struct ether *ether = data;

	if ((void *)(ether + 1) > end)
		return NOT_IP;
	if (ether->type == bpf_htons(TYPE_IPV4))
		return parse_ipv4(data, end, frame, packet);
	if (ether->type == bpf_htons(TYPE_IPV6))
		return parse_ipv6(data, end, frame, packet);
	return NOT_IP;
}

/* Source and destination change places: the flow that a quoted packet is the answer of. */
INLINE void turn(struct packet *packet)
{
	struct address address = packet->source;
	__u16 port = packet->source_port;

	packet->source = packet->destination;
	packet->destination = address;
	packet->source_port = packet->destination_port;
	packet->destination_port = port;
}

INLINE int is_icmp(struct packet *packet)
{
	return packet->piece != PIECE_LATER && packet->protocol == (packet->v6 ? IP_ICMP6 : IP_ICMP);
}

/* Whether an ICMP message quotes the packet that it complains about. */
INLINE int is_icmp_error(struct packet *packet)
{
	if (packet->v6)
		return packet->icmp_type >= 1 && packet->icmp_type <= 4;
	return packet->icmp_type == 3 || packet->icmp_type == 11 || packet->icmp_type == 12;
}

INLINE int is_echo(struct packet *packet)
{
	return packet->icmp_type == (packet->v6 ? 128 : 8);
}

/*
 * Parses the packet that an ICMP error quotes. Offsets in `quoted` are the frame's; only the ports are read of its
 * transport header. Returns 0 if it is TCP or UDP with ports.
 */
COLD int parse_quoted(void *data, void *end, struct packet *packet, struct packet *quoted)
{
	__u32 at = packet->l4;
	__u16 *ports;

	at += sizeof(struct icmp);
	if (packet->v6) {
		struct ipv6 *ip = at_offset(data, at);

		if ((void *)(ip + 1) > end)
			return -1;
		quoted->source = ip->source;
		quoted->destination = ip->destination;
		quoted->protocol = ip->next;
		at += sizeof(*ip);
	} else {
		struct ipv4 *ip = at_offset(data, at);
		__u32 header;

		if ((void *)(ip + 1) > end)
			return -1;
		header = (ip->version_length & 15) * 4;
		if (header < sizeof(*ip) || ip->fragment & bpf_htons(0x1fff))
			return -1;
		quoted->source = mapped(ip->source);
		quoted->destination = mapped(ip->destination);
		quoted->protocol = ip->protocol;
		at += header;
	}
	if (quoted->protocol != IP_TCP && quoted->protocol != IP_UDP)
		return -1;
	ports = at_offset(data, at);
	if ((void *)(ports + 2) > end)
		return -1;
	quoted->source_port = bpf_ntohs(ports[0]);
	quoted->destination_port = bpf_ntohs(ports[1]);
	quoted->l4 = at;
	quoted->v6 = packet->v6;
	quoted->piece = 0;
	quoted->tcp_flags = 0;
	quoted->fragment_id = 0;
	return 0;
}

#endif
