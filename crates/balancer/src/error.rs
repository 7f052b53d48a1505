//! What can go wrong with the service datapath, in words the operator can act on.

/// A failed operation of the datapath.
#[derive(Debug, thiserror::Error)]
pub enum BalancerError {
    /// The kernel lacks what the datapath is made of.
    #[error(
        "this kernel cannot run the service datapath: {reason}; services need Linux 6.6 or newer with BPF, XDP and BTF"
    )]
    Unsupported {
        /// What is missing.
        reason: String,
    },
    /// The process may not load programs.
    #[error(
        "eBPF is not permitted here ({detail}): run the daemon as root, or give it CAP_BPF and CAP_NET_ADMIN"
    )]
    NotPermitted {
        /// What the kernel said.
        detail: String,
    },
    /// The BPF file system cannot be had.
    #[error("{path}: no BPF file system: {detail}; mount it there: `mount -t bpf bpf {path}`")]
    NoBpffs {
        /// Where it should be.
        path: String,
        /// What the kernel said.
        detail: String,
    },
    /// The kernel's verifier refuses a program.
    #[error("program `{program}` is refused by the kernel's verifier: {detail}\n{log}")]
    Verifier {
        /// The program.
        program: String,
        /// What the kernel said.
        detail: String,
        /// The end of the verifier's own account.
        log: String,
    },
    /// A table has no room.
    #[error("table `{table}` is full ({limit} entries): {advice}")]
    Full {
        /// The table.
        table: &'static str,
        /// Its size.
        limit: u64,
        /// What to do about it.
        advice: &'static str,
    },
    /// Something wanted cannot be expressed in the tables.
    #[error("service `{service}`: {reason}")]
    Service {
        /// The service.
        service: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such interface.
    #[error("interface `{ifname}` does not exist on this host")]
    NoInterface {
        /// The interface.
        ifname: String,
    },
    /// No edge is attached to the interface.
    #[error("`{ifname}` has no edge: attach it before it is opened or asked for flows")]
    NoEdge {
        /// The interface.
        ifname: String,
    },
    /// The service is not loaded on this host.
    #[error("service `{service}` is not loaded on this host: apply it first")]
    NotLoaded {
        /// The service.
        service: String,
    },
    /// A program cannot be attached.
    #[error("`{ifname}`: {what} cannot be attached: {detail}")]
    Attach {
        /// The interface.
        ifname: String,
        /// The program's place.
        what: &'static str,
        /// What the kernel said.
        detail: String,
    },
    /// The kernel refused an operation on a map, a link or a file.
    #[error("{operation} of `{object}` failed: {detail}")]
    Kernel {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// What the kernel said.
        detail: String,
    },
    /// A fake datapath was told to fail.
    #[error("fake datapath: {operation} was told to fail")]
    Injected {
        /// What was tried.
        operation: &'static str,
    },
}
