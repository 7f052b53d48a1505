//! How hosts of one cluster talk: the cluster's own CA, mutual TLS, peer calls with relays, join tokens
//! and the version handshake.
//!
//! Owns: certificates and keys of hosts, the connections between hosts, the health of each link.
//!
//! What always holds:
//! - A [`Request`] with [`Caller::Peer`] comes from a host whose certificate the cluster's CA issued, or (with
//!   `via` set) was passed on by such a host. A caller without a certificate reaches the join route only.
//! - A call for node N is answered by node N: its certificate carries the node id, so a swapped address is seen.
//! - A connection on which a call timed out is never used again. TCP would double its retransmission timer during an
//!   outage and so add up to the length of the outage once more; a new connection does not.
//! - A request crosses at most one relay.
//! - Every wait, queue, body and number of attempts is bounded.
//!
//! Must not: interpret bodies, decide who is a member, or keep anything durable but the identity file. The CA's key
//! belongs to the replicated state; this crate only computes with it.
//!
//! A relayed request can reach its target twice (a second relay is tried when the first is slow), so each method must be
//! idempotent, as every mutation of the cluster is.

mod ca;
mod cert;
mod client;
mod identity;
mod join;
mod server;
mod socket;
mod tls;
mod token;
mod wire;

pub use ca::{Ca, CaError, CaOptions, HostPublicKey, Subject};
pub use cert::{CertError, CertInfo, fingerprint, renewal_due};
pub use client::{CallError, Direct, LinkState, Options, PeerAddr, Peers};
pub use identity::{Credentials, HostKey, Identity, IdentityError};
pub use join::{JoinError, join};
pub use server::{
    Caller, Handler, Refusal, RefusalReason, Request, Server, ServerError, ServerOptions,
};
pub use token::{JoinToken, TokenError, TokenSecret};
pub use wire::{Hello, MAX_BODY, PROTOCOL, ProtocolRange, RpcStatus};
