/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/*
 * The number that places a flow on its service's ring; `src/flow.rs` computes the same. Never changes.
 * The number that places an address among the doors; `src/linux/doors.rs` computes the same. Each host's own.
 */
#ifndef QUORATE_HASH_H
#define QUORATE_HASH_H

#define HASH_STEP 0x9e3779b97f4a7c15ULL
#define HASH_LAST 0xd6e8feb86659fd93ULL

INLINE __u64 mix(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * HASH_STEP;
	return hash ^ (hash >> 32);
}

INLINE __u32 flow_hash(struct address client, __u64 ports)
{
	return (mix(mix(mix(HASH_STEP, client.high), client.low), ports) * HASH_LAST) >> 32;
}

INLINE __u32 door_hash(__u32 scope, struct address address)
{
	return ((mix(address.low, scope) ^ address.high) * HASH_LAST) >> 32;
}

#endif
