//! Ends of cables between namespaces that take what a director sends.
//!
//! A veth keeps what its peer's XDP program sends (XDP_TX) in a queue that nothing empties, unless it has an XDP program
//! itself. Between machines there is no such thing: this is for labs and tests.

use aya::programs::{Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};

use super::object::{chain, errno, kernel};
use crate::BalancerError;

static OBJECT: &[u8] = aya::include_bytes_aligned!("../../bpf/receive.bpf.o");

/// Keeps the programs at their interfaces as long as it lives.
pub struct Receivers {
    _ebpf: Ebpf,
}

impl Receivers {
    /// Puts a program that takes every frame at each interface of this thread's network namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attach(ifnames: &[&str]) -> Result<Self, BalancerError> {
        Self::with("receive", ifnames)
    }

    /// Puts a program that ends every frame at each interface: for measurements.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn swallow(ifnames: &[&str]) -> Result<Self, BalancerError> {
        Self::with("swallow", ifnames)
    }

    fn with(name: &'static str, ifnames: &[&str]) -> Result<Self, BalancerError> {
        let mut ebpf = EbpfLoader::new()
            .load(OBJECT)
            .map_err(kernel("loading", "receive.bpf.o"))?;
        let missing = || BalancerError::Kernel {
            operation: "finding",
            object: format!("program `{name}`"),
            detail: "the object does not have it".to_owned(),
        };
        let program: &mut Xdp = ebpf
            .program_mut(name)
            .ok_or_else(missing)?
            .try_into()
            .map_err(kernel("finding", name))?;
        program.load().map_err(kernel("loading", name))?;
        for ifname in ifnames {
            program.attach(ifname, XdpMode::Driver).map_err(|error| {
                let detail = match errno(&error) {
                    Some(libc::EOPNOTSUPP) => "it is no veth".to_owned(),
                    _ => chain(&error),
                };
                BalancerError::Attach {
                    ifname: (*ifname).to_owned(),
                    what: "the receiver",
                    detail,
                }
            })?;
        }
        Ok(Self { _ebpf: ebpf })
    }
}
