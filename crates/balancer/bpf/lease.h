/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/*
 * Counting, and whether this host may serve now.
 *
 * The lease counts on CLOCK_BOOTTIME, which also runs while the host sleeps; reading it costs 40 ns a packet. So each
 * CPU reads it once per timer tick (1 to 4 ms on the kernels that distributions build) and remembers the verdict.
 */
#ifndef QUORATE_LEASE_H
#define QUORATE_LEASE_H

INLINE struct cpu *this_cpu(void)
{
	__u32 zero = 0;
	return bpf_map_lookup_elem(&cpus, &zero);
}

INLINE void count(struct cpu *cpu, enum cause cause)
{
	cpu->causes[cause & 31]++;
}

/* Reads the clock if a tick has passed. */
INLINE int serving(struct cpu *cpu)
{
	__u64 tick = bpf_jiffies64();

	if (cpu->tick != tick) {
		__u32 zero = 0;
		__u64 *deadline = bpf_map_lookup_elem(&lease, &zero);
		__u64 now = bpf_ktime_get_boot_ns();

		cpu->tick = tick;
		cpu->now_ns = now;
		cpu->serving = deadline && now < *deadline;
	}
	return cpu->serving;
}

INLINE __u32 second(struct cpu *cpu)
{
	return cpu->now_ns >> 30;
}

#endif
