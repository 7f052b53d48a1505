/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/*
 * Datagrams in pieces. The first piece has the ports and is treated like a whole packet; what was decided is kept for
 * the others under the datagram's number. A piece whose first one was not seen has no way to go and is dropped.
 * The director, and each edge for each direction, keeps its own (`place`).
 */
#ifndef QUORATE_FRAGMENTS_H
#define QUORATE_FRAGMENTS_H

INLINE void fragment_key(struct fragment_key *key, struct packet *packet, __u32 place)
{
	key->source = packet->source;
	key->destination = packet->destination;
	key->place = place;
	key->id = packet->fragment_id;
	key->protocol = packet->protocol;
	__builtin_memset(key->zero, 0, sizeof(key->zero));
}

COLD int remember_fragment(struct packet *packet, __u32 place, __u32 member, __u32 service)
{
	struct fragment_key key;
	struct fragment fragment = { member, service };

	if (!packet)
		return 0;
	fragment_key(&key, packet, place);
	bpf_map_update_elem(&fragments, &key, &fragment, BPF_ANY);
	return 0;
}

INLINE struct fragment *find_fragment(struct packet *packet, __u32 place)
{
	struct fragment_key key;

	fragment_key(&key, packet, place);
	return bpf_map_lookup_elem(&fragments, &key);
}

#endif
