/* SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only */
/*
 * What the programs share with the daemon. `src/abi.rs` says the same in Rust, and asserts the sizes.
 *
 * Addresses are 16 octets in network order, IPv4 mapped into IPv6, as two words that are never read as numbers.
 * Ports in tables are numbers (host order). ABI_VERSION grows with every change of a map's key or value.
 */
#ifndef QUORATE_ABI_H
#define QUORATE_ABI_H

#include <linux/types.h>

#define ABI_VERSION 2

#define NO_MEMBER 0xffff
#define MAX_RANGES 32
#define MAX_ALLOWED 8

struct address {
	__u64 high;
	__u64 low;
};

/* Which addresses are a service's: key of `vips4` and `vips6`. */
struct vip4_key {
	__u32 scope; /* interface index of the uplink; of the bridge where there is none */
	__u32 address;
};

struct vip6_key {
	__u32 scope;
	__u32 zero;
	struct address address;
};

struct range {
	__u8 protocol;
	__u8 zero;
	__u16 first;
	__u16 last;
	__u16 service; /* index into `services` */
};

#define VIP_HOLDER 1    /* this host answers for it on the wire */
#define VIP_ROUTED 2    /* routers send to the host's own MAC */
#define VIP_MULTICAST 4 /* every host gets every frame, and serves its own members */

struct vip {
	__u32 count; /* of ranges */
	__u32 flags;
	__u8 virtual_mac[6];
	__u8 told_mac[6]; /* what ARP and neighbour discovery answer */
	__u8 host_mac[6]; /* where routers send to (VIP_ROUTED) */
	__u8 zero[6];
	struct range ranges[MAX_RANGES];
};

#define AFFINITY_NONE 0
#define AFFINITY_CLIENT 1 /* the client's address decides alone */
#define AFFINITY_SUBNET 2 /* the masks say how much of it */

#define SERVICE_PINS 1
#define SERVICE_MULTICAST 2
#define SERVICE_LIMITS 4 /* there is an entry in `limits` */

struct service {
	__u32 id;
	__u32 slots; /* 0: no ring, nobody is steered to */
	__u32 ring;  /* index into `few_rings` if FEW_SLOTS are enough, else into `rings` */
	__u8 affinity;
	__u8 flags;
	__u8 virtual_mac[6];
	__u32 address4;
	__u32 mask4;
	__u32 remember_s; /* a client that comes back so soon finds its old member; 0: not asked for */
	__u32 zero;
	struct address address6;
	struct address mask6;
	__u64 udp_until_ns; /* until then unknown UDP flows get a second chance (after a change of the ring) */
};

/*
 * What a director needs of an address and the first service there, in one cache line. Made of the entries of `vips4`,
 * `vips6` and `services`, which say all: what has no door, or asks for something else, takes the long way. A door is in
 * one of DOOR_PROBES places from the one that its hash names.
 */
#define DOOR_PROBES 4
#define DOOR_OPENINGS 5

struct opening {
	__u16 first;
	__u16 last;
	__u8 protocol; /* 0: none */
	__u8 zero;
};

struct door {
	struct address address;
	__u32 scope;
	__u32 slots; /* 0: no door */
	__u32 ring;
	__u16 service;
	__u8 affinity;
	__u8 zero;
	struct opening openings[DOOR_OPENINGS];
	__u16 zero2;
};

/*
 * Rings: who has a slot now, and who had it before; indexes into `members`. Two sizes, so that the whole ring is one
 * element of an array, found without reading how large it is.
 */
#define SLOTS 65537
#define FEW_SLOTS 4099

struct ring {
	__u16 primary[SLOTS];
	__u16 previous[SLOTS];
};

struct few_ring {
	__u16 primary[FEW_SLOTS];
	__u16 previous[FEW_SLOTS];
};

struct member {
	__u8 mac[6];
	__u16 used;
	__u32 ifindex; /* its tap, if it runs here; else 0 */
};

#define EDGE_OPEN 1
#define EDGE_FORWARD 2
#define GUARD_MAC 16
#define GUARD_ADDRESS 32
#define GUARD_DHCP 64
#define GUARD_ROUTER 128

struct edge {
	__u32 scope;
	__u32 uplink; /* 0: none */
	__u32 bridge;
	__u16 member; /* index into `members`, NO_MEMBER: it serves nothing */
	__u16 flags;
	__u8 mac[6];
	__u16 count;   /* of ranges */
	__u32 address4; /* the guest's own, 0: none */
	__u32 allowed_count;
	struct address address6; /* zero: none */
	struct address allowed[MAX_ALLOWED];
	struct range ranges[MAX_RANGES];
};

/* A flow at an edge. */
struct flow_key {
	__u32 ifindex; /* the tap's */
	__u16 client_port;
	__u16 port;
	struct address client;
	__u8 protocol;
	__u8 zero[7];
};

#define FLOW_OWNED 1
#define FLOW_DIRECT 2 /* the client speaks to the guest's own address */
#define FLOW_SELF 3   /* the guest is the client of a service that it is a member of, and got itself */

#define FLOW_FIN_IN 1
#define FLOW_FIN_OUT 2
#define FLOW_RESET 4

struct flow {
	__u32 seen; /* CLOCK_BOOTTIME in units of 2^30 ns */
	__u16 service;
	__u8 kind;
	__u8 bits;
};

struct pin_key {
	__u32 service;
	__u16 client_port;
	__u16 port;
	struct address client;
	__u8 protocol;
	__u8 zero[7];
};

struct pin {
	__u32 seen;
	__u16 member;
	__u16 zero;
};

/* A client at an edge, for services that remember clients. */
struct client_key {
	__u32 ifindex;
	__u32 service;
	struct address client;
};

/* A datagram in pieces: the first piece has the ports, the others follow it. `place` is a tap's index at an edge. */
struct fragment_key {
	struct address source;
	struct address destination;
	__u32 place;
	__u32 id;
	__u8 protocol;
	__u8 zero[7];
};

struct fragment {
	__u16 member;
	__u16 service;
};

struct duplicate_key {
	__u32 scope;
	__u32 zero;
	struct address address;
};

struct duplicate {
	__u8 mac[6];
	__u16 zero;
	__u32 ifindex;
	__u32 zero2;
	__u64 seen_ns;
	__u64 count;
};

struct service_count {
	__u64 packets;
	__u64 bytes;
};

/* Of services in a row: each element of a table by CPU is reached by a pointer of its own, so there are few. */
#define COUNTED 64

struct service_counts {
	struct service_count of[COUNTED];
};

struct pair_key {
	__u32 ifindex;
	__u32 service;
};

struct pair_count {
	__u64 packets_in;
	__u64 bytes_in;
	__u64 packets_out;
	__u64 bytes_out;
	__u64 flows;
};

/* Nanoseconds between two flows that begin at a member: of all clients, and of one; 0: any number may. */
struct limit {
	__u64 member_ns;
	__u64 client_ns;
};

/* A member's pace in a service with limits. */
struct pace {
	__u64 due_ns;  /* CLOCK_BOOTTIME; see limits.h */
	__u64 refused; /* flows */
};

/* Frames that a guest was kept from sending, by tap. */
struct offence {
	__u64 spoofed;
	__u64 dhcp;
	__u64 router;
};

/* What became of frames. Names are in `src/abi.rs`. */
enum cause {
	CAUSE_LEASE,       /* dropped: this host may not serve now */
	CAUSE_MALFORMED,   /* dropped: truncated or contradictory headers to a service */
	CAUSE_NO_SERVICE,  /* dropped: to a virtual MAC, but no service of ours */
	CAUSE_NO_PORT,     /* dropped: not a port or protocol of the service */
	CAUSE_NO_MEMBER,   /* dropped: the service has no member */
	CAUSE_ELSEWHERE,   /* dropped: every host got it, and another one has the member (multicast) */
	CAUSE_FRAGMENT,    /* dropped: a later piece whose first one was not seen */
	CAUSE_ICMP,        /* dropped: ICMP to a service that means nothing to it */
	CAUSE_SPOOFED,     /* dropped: a guest used another's address, or a datapath's */
	CAUSE_DHCP,        /* dropped: a guest answered as a DHCP server */
	CAUSE_ROUTER,      /* dropped: a guest announced itself as a router */
	CAUSE_CLAIMED,     /* a foreign station claims a service's address */
	CAUSE_ARP,         /* answered: ARP */
	CAUSE_ND,          /* answered: neighbour discovery */
	CAUSE_ECHO,        /* answered: ping */
	CAUSE_BOUNCED,     /* sent on to the member that may know the flow */
	CAUSE_RETURNED,    /* sent back as final */
	CAUSE_FORWARDED,   /* sent after a guest that has left */
	CAUSE_STRAGGLER,   /* dropped: for a guest that has left, and sent after it already */
	CAUSE_PINNED,      /* steered by a pin */
	CAUSE_SELF,        /* a member calls its own service and got itself */
	CAUSE_TAGGED,      /* passed: VLAN tag, so another network's */
	CAUSE_ERROR,       /* dropped: the kernel refused a rewrite */
	CAUSE_LIMITED,     /* dropped: a flow that begins past the service's limits */
	CAUSES,
};

struct cpu {
	__u64 tick;     /* when the clock was read last */
	__u64 now_ns;   /* CLOCK_BOOTTIME then */
	__u32 serving;  /* whether the lease held then */
	__u32 zero;
	__u64 causes[32];
};

#define SERIES_FRAME 96

/* What measurements run on: every frame is made this one again, and varied if there are `services`. */
struct series {
	__u32 first;    /* the service's address counts from here on */
	__u32 services; /* in turn, with another client port each time; 0: the frame stays as it is */
	__u32 number;   /* of frames so far */
	__u32 verdict;  /* of `calibrate` */
	__u64 frame[SERIES_FRAME / 8];
};

struct config {
	__u8 director_mac[6];
	__u8 bounced_mac[6];
	__u8 final_mac[6];
	__u8 unusual; /* some service is routed or multicast */
	__u8 zero;
	__u32 doors;  /* places that a hash may name */
};

#endif
