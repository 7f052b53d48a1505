//! A site of two hosts, two guests, a client and a switch, each a network namespace. A guest has a network card at each
//! host.

use super::{CLIENT4, CLIENT6, mac, own4, own6, version};
use quorate_balancer::linux::Receivers;
use quorate_balancer::{
    Capacity, Datapath as _, LinuxDatapath, LinuxOptions, ServiceTable, UplinkWanted, Wanted,
};
use quorate_types::service::UplinkMode;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub const WAIT: Duration = Duration::from_secs(30);

/// Different for each site of each process.
fn unique() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    format!("{}-{number}-", std::process::id())
}

/// Namespaces that go with the test.
pub struct Spaces(String);

impl Spaces {
    pub fn new(names: &[&str]) -> Self {
        let spaces = Self(format!("qr-b{}", unique()));
        for name in names {
            super::ip(&format!("netns add {}", spaces.full(name)));
            spaces.ip(name, "link set lo up");
        }
        spaces
    }

    pub fn full(&self, name: &str) -> String {
        format!("{}{name}", self.0)
    }

    pub fn ip(&self, name: &str, arguments: &str) {
        super::ip(&format!("-n {} {arguments}", self.full(name)));
    }

    /// Two interfaces with a cable between them.
    pub fn cable(&self, from: (&str, &str), to: (&str, &str)) {
        let (there, peer) = (self.full(to.0), to.1);
        self.ip(
            from.0,
            &format!(
                "link add {} type veth peer name {peer} netns {there}",
                from.1
            ),
        );
    }

    /// Runs in the namespace, on a thread that ends with it.
    pub fn inside<T: Send>(&self, name: &str, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.full(name));
        std::thread::scope(|scope| {
            let work = move || {
                let file = std::fs::File::open(path).unwrap();
                let kind = rustix::thread::LinkNameSpaceType::Network;
                rustix::thread::move_into_link_name_space(file.as_fd(), Some(kind)).unwrap();
                work()
            };
            scope.spawn(work).join().unwrap()
        })
    }

    /// Runs a future in the namespace.
    pub fn run<T: Send>(&self, name: &str, future: impl Future<Output = T> + Send) -> T {
        self.inside(name, || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(future)
        })
    }
}

impl Drop for Spaces {
    fn drop(&mut self) {
        let output = Command::new("ip").args(["netns", "list"]).output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        for name in text.unwrap_or_default().split_whitespace() {
            if name.starts_with(&self.0) {
                let _ = Command::new("ip").args(["netns", "del", name]).status();
            }
        }
    }
}

/// Sets a feature of an interface of this namespace.
pub fn ethtool(ifname: &str, command: u32, value: u32) {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut data = [command, value];
    // SAFETY: zeros are a value of `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(ifname.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = data.as_mut_ptr().cast();
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&socket);
    // SAFETY: the request and the data it points to live through the call.
    let answer = unsafe { libc::ioctl(descriptor, 0x8946, &raw mut request) };
    assert_eq!(
        answer,
        0,
        "ethtool {ifname}: {}",
        std::io::Error::last_os_error()
    );
}

/// Sends a frame as it is; whether it got out.
pub fn send(ifname: &str, frame: &[u8]) -> bool {
    // SAFETY: a plain system call.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
    assert!(socket >= 0);
    // SAFETY: zeros are a value of `sockaddr_ll`.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    to.sll_ifindex = super::index(ifname).cast_signed();
    let size = u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
    // SAFETY: the frame and the address live through the call, with the sizes told.
    let sent = unsafe {
        libc::sendto(
            socket,
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size,
        )
    };
    // SAFETY: our own descriptor.
    unsafe { libc::close(socket) };
    sent.cast_unsigned() == frame.len()
}

/// A host's datapath, and how to make it again.
pub struct Host {
    pub name: &'static str,
    pub options: LinuxOptions,
    pub datapath: Option<LinuxDatapath>,
}

impl Host {
    pub fn new(spaces: &Spaces, name: &'static str, node: u64) -> Self {
        let options = LinuxOptions {
            node,
            name: format!("wire-{name}-{}", unique()),
            root: PathBuf::from("/sys/fs/bpf/quorate-test"),
            capacity: Capacity {
                flows: 4096,
                pins: 1024,
                clients: 1024,
                ..Capacity::default()
            },
        };
        let mut host = Self {
            name,
            options,
            datapath: None,
        };
        host.restart(spaces);
        host
    }

    pub fn restart(&mut self, spaces: &Spaces) {
        self.datapath = None;
        let options = self.options.clone();
        self.datapath = Some(spaces.run(self.name, LinuxDatapath::new(options)).unwrap());
    }

    pub fn get(&self) -> &LinuxDatapath {
        self.datapath.as_ref().unwrap()
    }

    pub fn apply(&self, spaces: &Spaces, holder: bool) {
        let mut table = super::table(vec![version(1, &[1, 2])]);
        table.holder = holder;
        self.load(spaces, table);
    }

    /// Loads the service as it is in this table.
    pub fn load(&self, spaces: &Spaces, table: ServiceTable) {
        let applied = spaces
            .run(self.name, self.get().apply(&wanted(table)))
            .unwrap();
        assert_eq!(applied.services[&super::service()].problem, None);
        assert_eq!(applied.uplinks[&super::network()], UplinkMode::Driver);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(datapath) = &self.datapath {
            let _ = datapath.remove();
        }
        let _ = std::fs::remove_dir(&self.options.root);
    }
}

fn wanted(table: ServiceTable) -> Wanted {
    let uplink = UplinkWanted {
        bridge: "br0".to_owned(),
        uplink: Some("u0".to_owned()),
    };
    Wanted {
        networks: [(super::network(), uplink)].into(),
        services: [(super::service(), table)].into(),
    }
}

/// Ports of the switch that take what directors send, as a cable would.
pub fn receivers(spaces: &Spaces) -> Receivers {
    spaces.inside("sw", || Receivers::attach(&["s1", "s2"]).unwrap())
}

/// Switch `sw`, hosts `h1` and `h2`, client `c`, guests `g1` (at h1) and `g2` (at h2), both with a card at each host.
pub fn build(spaces: &Spaces) {
    spaces.ip("sw", "link add sw0 type bridge");
    spaces.ip("sw", "link set sw0 up");
    for (name, port) in [("h1", "s1"), ("h2", "s2"), ("c", "sc")] {
        let own = if name == "c" { "eth0" } else { "u0" };
        spaces.cable((name, own), ("sw", port));
        // ETHTOOL_STXCSUM: whole checksums.
        spaces.inside(name, || ethtool(own, 0x17, 0));
        spaces.ip("sw", &format!("link set {port} master sw0 up"));
        spaces.ip(name, &format!("link set {own} up"));
    }
    spaces.ip("c", &format!("addr add {CLIENT4}/24 dev eth0"));
    spaces.ip("c", &format!("addr add {CLIENT6}/64 dev eth0 nodad"));
    for host in ["h1", "h2"] {
        spaces.ip(host, "link add br0 type bridge");
        spaces.ip(host, "link set br0 up");
        spaces.ip(host, "link set u0 master br0");
        for n in [1, 2] {
            let (guest, card) = (format!("g{n}"), format!("at-{host}"));
            spaces.cable((host, &format!("qt-{n}")), (&guest, &card));
            spaces.ip(
                &guest,
                &format!(
                    "link set {card} address {}",
                    quorate_balancer::mac::text(mac(n))
                ),
            );
            spaces.ip(host, &format!("link set qt-{n} master br0 up"));
        }
    }
    for n in [1, 2] {
        let guest = format!("g{n}");
        spaces.inside(&guest, || {
            std::fs::write("/proc/sys/net/ipv4/conf/all/arp_notify", "1").unwrap()
        });
        arrive(spaces, n, if n == 1 { "h1" } else { "h2" });
    }
}

/// The guest's address and link are at this host from now on; it says so.
pub fn arrive(spaces: &Spaces, n: u8, host: &str) {
    let guest = format!("g{n}");
    spaces.ip(&guest, &format!("addr add {}/24 dev at-{host}", own4(n)));
    spaces.ip(&guest, &format!("link set at-{host} up"));
    // It goes by itself with the link.
    spaces.ip(
        &guest,
        &format!("addr add {}/64 dev at-{host} nodad", own6(n)),
    );
}

pub fn leave(spaces: &Spaces, n: u8, host: &str) {
    let guest = format!("g{n}");
    spaces.ip(&guest, &format!("link set at-{host} down"));
    spaces.ip(&guest, &format!("addr del {}/24 dev at-{host}", own4(n)));
}

/// Says who it is, then echoes, on port 80 of a guest; ends with the process.
pub fn serve(spaces: &Spaces, n: u8) {
    let listener = spaces.inside(&format!("g{n}"), || TcpListener::bind("[::]:80").unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut buffer = [0; 1024];
                if stream.write_all(&[n]).is_err() {
                    return;
                }
                while let Ok(size) = stream.read(&mut buffer) {
                    if size == 0 || stream.write_all(&buffer[..size]).is_err() {
                        return;
                    }
                }
            });
        }
    });
}
