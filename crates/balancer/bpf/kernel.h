/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/*
 * The little that the programs need of the kernel and of protocols, so that nothing but the kernel's exported bpf.h
 * and libbpf's helper declarations is included.
 */
#ifndef QUORATE_KERNEL_H
#define QUORATE_KERNEL_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#define INLINE static __attribute__((always_inline)) inline
#define COLD static __attribute__((noinline))

#ifndef TCX_NEXT
#define TCX_NEXT -1
#define TCX_DROP 2
#endif

/* Newer than the headers of some distributions. */
#define L4_IPV6 (1ULL << 7) /* BPF_F_IPV6 */

#define ETHER 14
#define TYPE_IPV4 0x0800
#define TYPE_ARP 0x0806
#define TYPE_IPV6 0x86dd
#define TYPE_VLAN 0x8100
#define TYPE_VLAN_OUTER 0x88a8

#define IP_ICMP 1
#define IP_TCP 6
#define IP_UDP 17
#define IP_ICMP6 58
#define IP_HOPOPT 0
#define IP_ROUTING 43
#define IP_FRAGMENT 44
#define IP_DESTOPT 60

struct ether {
	__u8 destination[6];
	__u8 source[6];
	__u16 type;
};

struct ipv4 {
	__u8 version_length;
	__u8 tos;
	__u16 length;
	__u16 id;
	__u16 fragment;
	__u8 ttl;
	__u8 protocol;
	__u16 checksum;
	__u32 source;
	__u32 destination;
};

struct ipv6 {
	__u32 version_flow;
	__u16 length;
	__u8 next;
	__u8 hops;
	struct address source;
	struct address destination;
};

struct ipv6_fragment {
	__u8 next;
	__u8 zero;
	__u16 offset;
	__u32 id;
};

struct tcp {
	__u16 source;
	__u16 destination;
	__u32 sequence;
	__u32 acknowledged;
	__u8 offset;
	__u8 flags;
	__u16 window;
	__u16 checksum;
	__u16 urgent;
};

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

struct udp {
	__u16 source;
	__u16 destination;
	__u16 length;
	__u16 checksum;
};

struct icmp {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__u32 rest;
};

struct arp {
	__u16 hardware;
	__u16 protocol;
	__u8 hardware_length;
	__u8 protocol_length;
	__u16 operation;
	__u8 sender_mac[6];
	__u32 sender;
	__u8 target_mac[6];
	__u32 target;
} __attribute__((packed));

/* Neighbour solicitation or advertisement with one link-layer address option. */
struct neighbour {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__u32 flags;
	struct address target;
	__u8 option;
	__u8 option_length;
	__u8 mac[6];
};

/* All MAC addresses are at even offsets; local ones are declared so. */
#define MAC(name) __u8 name[6] __attribute__((aligned(2)))

INLINE void copy_mac(__u8 *to, const __u8 *from)
{
	__u16 *out = (__u16 *)to;
	const __u16 *in = (const __u16 *)from;

	out[0] = in[0];
	out[1] = in[1];
	out[2] = in[2];
}

INLINE int same_mac(const __u8 *left, const __u8 *right)
{
	const __u16 *a = (const __u16 *)left, *b = (const __u16 *)right;

	return ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2])) == 0;
}

/* 02:51 and one of the datapath's letters: V(irtual), D(irector), B(ounced), F(inal), H(eld). */
INLINE int is_ours(const __u8 *mac, __u8 letter)
{
	return mac[0] == 0x02 && mac[1] == 0x51 && mac[2] == letter;
}

#define MAC_VIRTUAL 0x56
#define MAC_DIRECTOR 0x44
#define MAC_BOUNCED 0x42
#define MAC_FINAL 0x46
#define MAC_HELD 0x48

INLINE struct address mapped(__u32 ipv4)
{
	struct address address = { 0, 0xffff0000ULL | (__u64)ipv4 << 32 };
	return address;
}

INLINE int is_mapped(struct address address)
{
	return address.high == 0 && (__u32)address.low == 0xffff0000U;
}

INLINE __u32 unmapped(struct address address)
{
	return address.low >> 32;
}

INLINE int same_address(struct address a, struct address b)
{
	return a.high == b.high && a.low == b.low;
}

#endif
