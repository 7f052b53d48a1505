/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/* From a packet to the service it is for, and from a flow to its slot's members. */
#ifndef QUORATE_RING_H
#define QUORATE_RING_H

struct share {
	__u32 primary;
	__u32 previous;
};

INLINE struct vip *find_vip(__u32 scope, struct address address, int v6)
{
	if (v6) {
		struct vip6_key key = { scope, 0, address };
		return bpf_map_lookup_elem(&vips6, &key);
	}
	struct vip4_key key = { scope, unmapped(address) };
	return bpf_map_lookup_elem(&vips4, &key);
}

/* The index of the service that has this port, or -1. */
COLD int find_range(struct range *ranges, __u32 count, __u8 protocol, __u16 port)
{
	__u32 i;

	if (!ranges)
		return -1;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_RANGES; i++) {
		if (i >= count)
			break;
		if (ranges[i].protocol == protocol && ranges[i].first <= port && port <= ranges[i].last)
			return ranges[i].service;
	}
	return -1;
}

INLINE int opens(struct opening *opening, __u8 protocol, __u16 port)
{
	return opening->protocol == protocol && opening->first <= port && port <= opening->last;
}

INLINE struct door *find_door(struct config *config, __u32 scope, struct address address)
{
	__u32 i, at = (__u64)door_hash(scope, address) * config->doors >> 32;

#pragma clang loop unroll(disable)
	for (i = 0; i < DOOR_PROBES; i++, at++) {
		struct door *door = bpf_map_lookup_elem(&doors, &at);

		if (!door || (door->scope == scope && same_address(door->address, address)))
			return door;
	}
	return 0;
}

INLINE struct service *find_service(__u32 index)
{
	return bpf_map_lookup_elem(&services, &index);
}

INLINE struct service_count *find_count(__u32 service)
{
	__u32 index = service / COUNTED;
	struct service_counts *counted = bpf_map_lookup_elem(&counts, &index);

	return counted ? &counted->of[service % COUNTED] : 0;
}

INLINE struct member *find_member(__u32 index)
{
	return bpf_map_lookup_elem(&members, &index);
}

/* What of a client counts for the service. */
INLINE struct address affine(struct service *service, struct address client, int v6)
{
	if (service->affinity == AFFINITY_SUBNET) {
		if (v6) {
			client.high &= service->mask6.high;
			client.low &= service->mask6.low;
		} else {
			client = mapped(unmapped(client) & service->mask4);
		}
	}
	return client;
}

INLINE __u64 flow_ports(__u8 affinity, __u16 client_port, __u16 port, __u8 protocol)
{
	return affinity != AFFINITY_NONE ? 0 : (__u64)client_port | (__u64)port << 16 | (__u64)protocol << 32;
}

/* The slot of a flow, by its hash. */
INLINE __u32 slot_of(__u32 hash, __u32 slots)
{
	return (__u64)hash * slots >> 32;
}

#define PRIMARY 0
#define PREVIOUS 1

/* The member that a slot belongs to, or did before; 0 if there is no such ring. */
INLINE __u16 *find_slot(__u32 ring, __u32 slots, __u32 slot, int previous)
{
	__u32 zero = 0;
	void *table;

	if (slots <= FEW_SLOTS) {
		struct few_ring *few;

		table = bpf_map_lookup_elem(&few_rings, &ring);
		if (!table)
			return 0;
		few = bpf_map_lookup_elem(table, &zero);
		if (!few || slot >= FEW_SLOTS)
			return 0;
		return previous ? &few->previous[slot] : &few->primary[slot];
	}
	struct ring *all;

	table = bpf_map_lookup_elem(&rings, &ring);
	if (!table)
		return 0;
	all = bpf_map_lookup_elem(table, &zero);
	if (!all || slot >= SLOTS)
		return 0;
	return previous ? &all->previous[slot] : &all->primary[slot];
}

/*
 * The primary member of a slot, and the previous one in the upper half; NO_MEMBER for each if there is no such ring.
 * Not static: the verifier looks at it once, instead of at each call with all that comes after.
 */
__attribute__((noinline)) __u32 both_of(__u32 ring, __u32 slots, __u32 slot)
{
	__u16 *primary = find_slot(ring, slots, slot, PRIMARY);
	__u16 *previous = find_slot(ring, slots, slot, PREVIOUS);

	return primary && previous ? *primary | (__u32)*previous << 16 : NO_MEMBER | (__u32)NO_MEMBER << 16;
}

/* The members of a flow's slot. */
INLINE struct share find_share(struct service *service, struct packet *flow)
{
	__u64 ports = flow_ports(service->affinity, flow->source_port, flow->destination_port, flow->protocol);
	__u32 hash = flow_hash(affine(service, flow->source, flow->v6), ports);
	__u32 both = both_of(service->ring, service->slots, slot_of(hash, service->slots));
	struct share share = { both & 0xffff, both >> 16 };

	return share;
}

/* The member that a pin names, or NO_MEMBER. */
INLINE __u32 find_pin(struct cpu *cpu, __u32 service, struct address client, __u16 client_port, __u16 port,
		      __u8 protocol)
{
	struct pin_key key = { service, client_port, port, client, protocol, { 0 } };
	struct pin *pin = bpf_map_lookup_elem(&pins, &key);
	__u32 now = second(cpu);

	if (!pin)
		return NO_MEMBER;
	if (pin->seen != now)
		pin->seen = now;
	return pin->member;
}

#endif
