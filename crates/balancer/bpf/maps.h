/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/* The maps. Sizes are for tests; the daemon sets those that grow with the cluster when it loads the object. */
#ifndef QUORATE_MAPS_H
#define QUORATE_MAPS_H

#define MAP(name_, type_, key_, value_, size_) \
	struct { \
		__uint(type, type_); \
		__type(key, key_); \
		__type(value, value_); \
		__uint(max_entries, size_); \
		__uint(pinning, LIBBPF_PIN_BY_NAME); \
	} name_ SEC(".maps")

#define SPARSE_MAP(name_, type_, key_, value_, size_) \
	struct { \
		__uint(type, type_); \
		__type(key, key_); \
		__type(value, value_); \
		__uint(max_entries, size_); \
		__uint(pinning, LIBBPF_PIN_BY_NAME); \
		__uint(map_flags, BPF_F_NO_PREALLOC); \
	} name_ SEC(".maps")

MAP(settings, BPF_MAP_TYPE_ARRAY, __u32, struct config, 1);
MAP(lease, BPF_MAP_TYPE_ARRAY, __u32, __u64, 1);
MAP(cpus, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct cpu, 1);
SPARSE_MAP(vips4, BPF_MAP_TYPE_HASH, struct vip4_key, struct vip, 1024);
SPARSE_MAP(vips6, BPF_MAP_TYPE_HASH, struct vip6_key, struct vip, 1024);
MAP(services, BPF_MAP_TYPE_ARRAY, __u32, struct service, 1024);
MAP(counts, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct service_counts, 16);
MAP(members, BPF_MAP_TYPE_ARRAY, __u32, struct member, 4096);
SPARSE_MAP(edges, BPF_MAP_TYPE_HASH, __u32, struct edge, 1024);
MAP(flows, BPF_MAP_TYPE_LRU_HASH, struct flow_key, struct flow, 65536);
SPARSE_MAP(pins, BPF_MAP_TYPE_HASH, struct pin_key, struct pin, 65536);
MAP(clients, BPF_MAP_TYPE_LRU_HASH, struct client_key, __u32, 16384);
MAP(fragments, BPF_MAP_TYPE_LRU_HASH, struct fragment_key, struct fragment, 4096);
MAP(duplicates, BPF_MAP_TYPE_LRU_HASH, struct duplicate_key, struct duplicate, 256);
SPARSE_MAP(pairs, BPF_MAP_TYPE_PERCPU_HASH, struct pair_key, struct pair_count, 16384);
MAP(limits, BPF_MAP_TYPE_ARRAY, __u32, struct limit, 1024);
SPARSE_MAP(paces, BPF_MAP_TYPE_HASH, struct pair_key, struct pace, 16384);
MAP(client_paces, BPF_MAP_TYPE_LRU_HASH, struct client_key, __u64, 16384);
SPARSE_MAP(offences, BPF_MAP_TYPE_HASH, __u32, struct offence, 1024);

MAP(measures, BPF_MAP_TYPE_ARRAY, __u32, struct series, 1);

/* Nobody maps it into memory: the flag puts its first element, and so every door, at the begin of a cache line. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct door);
	__uint(max_entries, 1024);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__uint(map_flags, BPF_F_MMAPABLE);
} doors SEC(".maps");

#define RINGS(name_, ring_) \
	struct name_##_inner { \
		__uint(type, BPF_MAP_TYPE_ARRAY); \
		__uint(key_size, sizeof(__u32)); \
		__uint(value_size, sizeof(struct ring_)); \
		__uint(max_entries, 1); \
	}; \
	struct { \
		__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS); \
		__uint(max_entries, 1024); \
		__uint(pinning, LIBBPF_PIN_BY_NAME); \
		__type(key, __u32); \
		__type(value, __u32); \
		__array(values, struct name_##_inner); \
	} name_ SEC(".maps")

RINGS(rings, ring);
RINGS(few_rings, few_ring);

#endif
