//! Attractors: how packets for a service's address find the cluster.
//!
//! ```text
//! arp    one host holds the address: it answers with the service's virtual MAC (the datapath does), and this module
//!        announces that MAC, at take-over and again and again, so that switches and neighbours know the port
//! bgp    every host announces the address to routers, through BIRD or FRR
//! igmp   the address has a multicast MAC; every host is a member of its group, so that switches that snoop deliver to
//!        hosts of the cluster only
//! ```
//! Owns: the announcements' frames and times ([`arp`]), the speakers' configuration and the process that ends a speaker
//! when the lease ends ([`bgp`]), group memberships ([`igmp`]). Always holds: nothing is said for an address without a
//! lease, also while the daemon hangs: announcements pass the datapath's own lease check, and a speaker is watched by a
//! process of its own. Must not: decide who holds an address.

pub mod arp;
pub mod bgp;
pub mod igmp;
