//! Announcing addresses of services to routers: through BIRD 2 or FRR's bgpd, run by Quorate with a configuration of its
//! own.
//!
//! ```text
//! daemon --config.json, deadline--> watcher (a process of its own) --starts, reloads, KILLS--> bird / bgpd --BGP--> router
//! ```
//! Always holds: the configuration is generated as a whole and belongs to Quorate; the speaker learns nothing from its
//! neighbours and puts nothing into the kernel's routing table; the watcher ends it [`MARGIN`] before the lease that
//! the daemon last wrote down runs out, so a daemon that hangs or is dead announces nothing for longer than it may. A
//! speaker that ends closes its sessions, and the routers forget the routes at once. When the whole machine stops, BGP's
//! hold time or BFD ends them.
//!
//! Must not: touch a BIRD or FRR that the machine runs for something else. Two speakers cannot share port 179 of one
//! address: a machine that needs both lets its own daemon listen elsewhere.

pub mod bird;
pub mod frr;
pub mod watch;

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// How long before the end of the lease a speaker is ended.
pub const MARGIN: Duration = Duration::from_millis(150);

/// Which program speaks BGP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Program {
    /// BIRD 2.
    #[default]
    Bird,
    /// FRR's bgpd, alone.
    Frr,
}

/// All that one host announces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Speaker {
    /// What speaks.
    pub program: Program,
    /// This host's BGP identifier: an IPv4 address of its own.
    pub router_id: Ipv4Addr,
    /// Sessions, in order.
    pub sessions: Vec<Session>,
    /// Addresses that are announced, as /32 and /128.
    pub routes: BTreeSet<IpAddr>,
}

/// A session with a router.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Session {
    /// The router.
    pub neighbor: IpAddr,
    /// Its autonomous system.
    pub remote_as: u32,
    /// This host's.
    pub local_as: u32,
    /// A neighbour that is silent for so long is gone, in seconds; 3 or more.
    pub hold_s: u16,
    /// Finds a dead neighbour within a second.
    pub bfd: bool,
}

/// Why a speaker cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BgpError {
    /// No router.
    #[error("no router to speak to: give the network `bgp: {{neighbors: [...]}}`")]
    NoSession,
    /// bgpd needs another daemon for BFD.
    #[error(
        "BFD with FRR needs its bfdd, which Quorate does not run: use `daemon: bird`, or leave `bfd` out"
    )]
    FrrBfd,
    /// bgpd is in one system.
    #[error(
        "FRR's bgpd speaks for one autonomous system only, here {first} and {other}: use `daemon: bird`"
    )]
    FrrSystems {
        /// The first.
        first: u32,
        /// Another.
        other: u32,
    },
    /// A hold time that BGP does not allow.
    #[error("a hold time of {0} s is not allowed: 3 s or more")]
    HoldTime(u16),
}

impl Speaker {
    /// Whether the program can do that.
    ///
    /// # Errors
    /// [`BgpError`]
    pub fn check(&self) -> Result<(), BgpError> {
        let first = self.sessions.first().ok_or(BgpError::NoSession)?;
        if let Some(short) = self.sessions.iter().find(|session| session.hold_s < 3) {
            return Err(BgpError::HoldTime(short.hold_s));
        }
        if self.program == Program::Bird {
            return Ok(());
        }
        if self.sessions.iter().any(|session| session.bfd) {
            return Err(BgpError::FrrBfd);
        }
        let mut others = self.sessions.iter().map(|session| session.local_as);
        match others.find(|other| *other != first.local_as) {
            Some(other) => Err(BgpError::FrrSystems {
                first: first.local_as,
                other,
            }),
            None => Ok(()),
        }
    }

    /// The program's configuration.
    #[must_use]
    pub fn config(&self) -> String {
        match self.program {
            Program::Bird => bird::config(self),
            Program::Frr => frr::config(self),
        }
    }

    fn routes_of(&self, v4: bool) -> impl Iterator<Item = String> {
        let length = if v4 { 32 } else { 128 };
        let family = self
            .routes
            .iter()
            .filter(move |route| route.is_ipv4() == v4);
        family.map(move |route| format!("{route}/{length}"))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    pub(crate) fn speaker(program: Program) -> Speaker {
        let session = |neighbor: &str| Session {
            neighbor: neighbor.parse().unwrap(),
            remote_as: 65000,
            local_as: 65001,
            hold_s: 3,
            bfd: false,
        };
        Speaker {
            program,
            router_id: Ipv4Addr::new(10, 77, 0, 1),
            sessions: vec![session("10.77.0.250"), session("fd77::250")],
            routes: ["10.77.0.200", "10.77.0.201", "fd77::200"]
                .iter()
                .map(|text| text.parse().unwrap())
                .collect(),
        }
    }

    #[test]
    fn what_a_program_cannot_do_is_said() {
        let mut one = speaker(Program::Frr);
        assert_eq!(one.check(), Ok(()));
        one.sessions[1].bfd = true;
        assert_eq!(one.check(), Err(BgpError::FrrBfd));
        one.program = Program::Bird;
        assert_eq!(one.check(), Ok(()));
        one.sessions[1].bfd = false;
        one.sessions[1].local_as = 65002;
        assert_eq!(one.check(), Ok(()));
        one.program = Program::Frr;
        assert!(one.check().unwrap_err().to_string().contains("65002"));
        one.sessions[0].hold_s = 1;
        assert_eq!(one.check(), Err(BgpError::HoldTime(1)));
        one.sessions.clear();
        assert_eq!(one.check(), Err(BgpError::NoSession));
    }
}
