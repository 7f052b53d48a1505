//! What the tests of the kernel's side share: a network namespace of a test's own, a datapath in it, frames.
#![allow(dead_code, unsafe_code, unreachable_pub)]

pub mod frame;
pub mod site;

use quorate_balancer::{
    Capacity, EdgeSpec, Guard, LinuxDatapath, LinuxOptions, ServiceTable, UplinkWanted, Wanted,
};
use quorate_types::service::{Affinity, Attractor, RingMember, RingVersion, ServiceId};
use quorate_types::{NetworkName, ServiceName, VmName};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

pub const CLIENT_MAC: [u8; 6] = [2, 0xc1, 0, 0, 0, 1];
pub const VIP4: &str = "10.0.0.100";
pub const VIP6: &str = "fd00::100";
pub const CLIENT4: &str = "10.0.0.1";
pub const CLIENT6: &str = "fd00::1";

/// MAC of test member number `n`.
pub fn mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 1, n]
}

pub fn own4(n: u8) -> String {
    format!("10.0.0.{}", 10 + n)
}

pub fn own6(n: u8) -> String {
    format!("fd00::{:x}", 16 + u16::from(n))
}

/// Whether eBPF and namespaces are permitted; says that the test is skipped if not.
pub fn permitted(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root || Command::new("ip").arg("-V").output().is_err() {
        println!("SKIPPED {test}: needs root, iproute2 and a kernel with eBPF");
        return false;
    }
    true
}

/// Runs `ip` in this thread's namespace.
pub fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Moves this thread, and threads that it makes, into a network namespace of its own.
pub fn own_namespace() {
    // SAFETY: concerns this thread's namespaces only.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
    ip("link set lo up");
}

/// Makes a pair of interfaces, of which the first stands for the tap of member number `n`.
pub fn tap(n: u8) {
    ip(&format!("link add qt-{n} type veth peer name qg-{n}"));
}

/// Index of an interface here.
pub fn index(name: &str) -> u32 {
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: a terminated string.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

pub fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap()
}

/// A datapath below a pin folder that is removed with it.
pub struct Site {
    pub datapath: LinuxDatapath,
    pub options: LinuxOptions,
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

impl Site {
    pub async fn new() -> Self {
        Self::with(Capacity {
            flows: 4096,
            pins: 1024,
            clients: 1024,
            ..Capacity::default()
        })
        .await
    }

    pub async fn with(capacity: Capacity) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let options = LinuxOptions {
            node: 1,
            name: format!("test-{}-{number}", std::process::id()),
            root: PathBuf::from("/sys/fs/bpf/quorate-test"),
            capacity,
        };
        let datapath = LinuxDatapath::new(options.clone()).await.unwrap();
        Self { datapath, options }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = self.datapath.remove();
        let _ = std::fs::remove_dir(&self.options.root);
    }
}

pub fn network() -> NetworkName {
    NetworkName::new("lan").unwrap()
}

pub fn service() -> ServiceName {
    ServiceName::new("web").unwrap()
}

/// Members by their numbers.
pub fn version(epoch: u64, members: &[u8]) -> RingVersion {
    let members = members.iter().map(|n| RingMember {
        vm: VmName::new(format!("vm{n}")).unwrap(),
        mac: mac(*n),
        weight: 1,
    });
    RingVersion {
        epoch,
        members: members.collect(),
        ..RingVersion::default()
    }
}

/// A service at [`VIP4`] and [`VIP6`] with ports 80, 5000-5010/udp and 53/udp.
pub fn table(history: Vec<RingVersion>) -> ServiceTable {
    ServiceTable {
        id: ServiceId(7),
        network: network(),
        addresses: vec![VIP4.parse().unwrap(), VIP6.parse().unwrap()],
        ports: ["80", "5000-5010/udp", "53/udp"]
            .map(|text| text.parse().unwrap())
            .to_vec(),
        affinity: Affinity::default(),
        slots: 4_099,
        history,
        next: None,
        holder: true,
        attractor: Attractor::Arp,
        limits: Default::default(),
    }
}

/// With bridge `br0` and the loopback interface as the uplink: XDP programs are tested there.
pub fn wanted(table: ServiceTable) -> Wanted {
    let uplink = UplinkWanted {
        bridge: "br0".to_owned(),
        uplink: Some("lo".to_owned()),
    };
    Wanted {
        networks: [(network(), uplink)].into(),
        services: [(service(), table)].into(),
    }
}

/// The edge of member number `n`, at tap `qt-N`.
pub fn edge(n: u8) -> EdgeSpec {
    EdgeSpec {
        ifname: format!("qt-{n}"),
        network: network(),
        vm: VmName::new(format!("vm{n}")).unwrap(),
        mac: mac(n),
        addresses: vec![own4(n).parse().unwrap(), own6(n).parse().unwrap()],
        guard: Guard::default(),
    }
}
