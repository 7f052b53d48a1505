/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/*
 * How many flows may begin at a member, and what a guest was kept from sending.
 *
 * A pace is one word: when the next flow would be due if all came evenly. A second's worth may come at once; then one
 * comes when another has become due. Nothing is counted down when a flow ends, so nothing can be counted wrongly.
 */
#ifndef QUORATE_LIMITS_H
#define QUORATE_LIMITS_H

#define SECOND 1000000000ULL

/* Takes one flow of a pace; 0: it is too early for one more. */
INLINE int take(__u64 *due, __u64 now, __u64 every)
{
	int i;

#pragma clang loop unroll(full)
	for (i = 0; i < 3; i++) {
		__u64 old = *(volatile __u64 *)due;
		__u64 from = old > now ? old : now;

		if (from + every > now + SECOND)
			return 0;
		if (__sync_val_compare_and_swap(due, old, from + every) == old)
			return 1;
	}
	/* Other CPUs took it each time. One flow more than the limit is better than one lost for nothing. */
	return 1;
}

/* Whose pace a client shares: an IPv4 address has one, and so has an IPv6 /64, of which one machine has them all. */
INLINE struct address client_of(struct packet *packet)
{
	struct address client = packet->source;

	if (packet->v6)
		client.low = 0;
	return client;
}

/* Whether a flow that begins at this tap is one too many. */
COLD int too_many(struct cpu *cpu, __u32 ifindex, __u32 index, struct packet *packet)
{
	struct pair_key pair = { ifindex, index };
	struct client_key key = { ifindex, index, { 0 } };
	struct limit *limit = bpf_map_lookup_elem(&limits, &index);
	struct pace *pace = bpf_map_lookup_elem(&paces, &pair);
	__u64 *due;

	if (!cpu || !packet || !limit)
		return 0;
	if (limit->client_ns) {
		key.client = client_of(packet);
		due = bpf_map_lookup_elem(&client_paces, &key);
		if (!due) {
			__u64 first = cpu->now_ns + limit->client_ns;

			bpf_map_update_elem(&client_paces, &key, &first, BPF_ANY);
		} else if (!take(due, cpu->now_ns, limit->client_ns)) {
			goto refuse;
		}
	}
	if (!limit->member_ns || !pace || take(&pace->due_ns, cpu->now_ns, limit->member_ns))
		return 0;
refuse:
	if (pace)
		__sync_fetch_and_add(&pace->refused, 1);
	return 1;
}

/* A frame that the guest may not send: counted for its tap too. */
INLINE int offends(struct cpu *cpu, __u32 ifindex, enum cause cause)
{
	struct offence *offence = bpf_map_lookup_elem(&offences, &ifindex);

	count(cpu, cause);
	if (offence)
		__sync_fetch_and_add(cause == CAUSE_DHCP ? &offence->dhcp
						    : cause == CAUSE_ROUTER ? &offence->router : &offence->spoofed, 1);
	return TCX_DROP;
}

#endif
