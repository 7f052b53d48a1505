/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/* From a packet to the service it is for, and from a flow to its slot. */
#ifndef QUORATE_RING_H
#define QUORATE_RING_H

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

INLINE struct service *find_service(__u32 index)
{
	return bpf_map_lookup_elem(&services, &index);
}

INLINE struct member *find_member(__u32 index)
{
	return bpf_map_lookup_elem(&members, &index);
}

/* What of a client counts for the service. */
INLINE struct address affine(struct service *service, struct address client, int v6)
{
	if (service->affinity != AFFINITY_NONE) {
		if (v6) {
			client.high &= service->mask6.high;
			client.low &= service->mask6.low;
		} else {
			client = mapped(unmapped(client) & service->mask4);
		}
	}
	return client;
}

INLINE struct slot *find_slot(struct service *service, struct address client, __u16 client_port, __u16 port,
			      __u8 protocol, int v6)
{
	__u64 ports = service->affinity != AFFINITY_NONE ? 0
		: (__u64)client_port | (__u64)port << 16 | (__u64)protocol << 32;
	__u32 hash = flow_hash(affine(service, client, v6), ports);
	__u32 slot = (__u64)hash * service->slots >> 32;
	__u32 ring = service->ring;
	void *table = bpf_map_lookup_elem(&rings, &ring);

	if (!table)
		return 0;
	return bpf_map_lookup_elem(table, &slot);
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
