//! Real TCP over a switch and two hosts, each a network namespace: director, edges, a move of a member between hosts,
//! a restart of a daemon, a take-over of the address. A guest is a namespace with a network card at each host.
#![allow(clippy::unwrap_used, unsafe_code)]

mod common;

use common::frame::arp;
use common::{CLIENT4, VIP4, edge, mac, own4, permitted, version};
use quorate_balancer::linux::Receivers;
use quorate_balancer::{
    Capacity, Datapath as _, LinuxDatapath, LinuxOptions, ServiceTable, UplinkWanted, Wanted,
};
use quorate_types::service::UplinkMode;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(30);
const VIRTUAL: [u8; 6] = [2, 0x51, 0x56, 0, 0, 7];

/// Namespaces that go with the test.
struct Spaces(String);

impl Spaces {
    fn new(names: &[&str]) -> Self {
        let spaces = Self(format!("qr-b{}-", std::process::id()));
        for name in names {
            common::ip(&format!("netns add {}", spaces.full(name)));
            spaces.ip(name, "link set lo up");
        }
        spaces
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.0)
    }

    fn ip(&self, name: &str, arguments: &str) {
        common::ip(&format!("-n {} {arguments}", self.full(name)));
    }

    /// Two interfaces with a cable between them.
    fn cable(&self, from: (&str, &str), to: (&str, &str)) {
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
    fn inside<T: Send>(&self, name: &str, work: impl FnOnce() -> T + Send) -> T {
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
    fn run<T: Send>(&self, name: &str, future: impl Future<Output = T> + Send) -> T {
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
fn ethtool(ifname: &str, command: u32, value: u32) {
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
fn send(ifname: &str, frame: &[u8]) -> bool {
    // SAFETY: a plain system call.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
    assert!(socket >= 0);
    // SAFETY: zeros are a value of `sockaddr_ll`.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    to.sll_ifindex = common::index(ifname).cast_signed();
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
struct Host {
    name: &'static str,
    options: LinuxOptions,
    datapath: Option<LinuxDatapath>,
}

impl Host {
    fn new(spaces: &Spaces, name: &'static str, node: u64) -> Self {
        let options = LinuxOptions {
            node,
            name: format!("wire-{name}-{}", std::process::id()),
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

    fn restart(&mut self, spaces: &Spaces) {
        self.datapath = None;
        let options = self.options.clone();
        self.datapath = Some(spaces.run(self.name, LinuxDatapath::new(options)).unwrap());
    }

    fn get(&self) -> &LinuxDatapath {
        self.datapath.as_ref().unwrap()
    }

    fn apply(&self, spaces: &Spaces, holder: bool) {
        let applied = spaces
            .run(self.name, self.get().apply(&wanted(holder)))
            .unwrap();
        assert_eq!(applied.services[&common::service()].problem, None);
        assert_eq!(applied.uplinks[&common::network()], UplinkMode::Driver);
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

fn wanted(holder: bool) -> Wanted {
    let uplink = UplinkWanted {
        bridge: "br0".to_owned(),
        uplink: Some("u0".to_owned()),
    };
    let mut table: ServiceTable = common::table(vec![version(1, &[1, 2])]);
    table.holder = holder;
    Wanted {
        networks: [(common::network(), uplink)].into(),
        services: [(common::service(), table)].into(),
    }
}

/// Ports of the switch that take what directors send, as a cable would.
fn receivers(spaces: &Spaces) -> Receivers {
    spaces.inside("sw", || Receivers::attach(&["s1", "s2"]).unwrap())
}

/// Switch `sw`, hosts `h1` and `h2`, client `c`, guests `g1` (at h1) and `g2` (at h2), both with a card at each host.
fn build(spaces: &Spaces) {
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
fn arrive(spaces: &Spaces, n: u8, host: &str) {
    let guest = format!("g{n}");
    spaces.ip(&guest, &format!("addr add {}/24 dev at-{host}", own4(n)));
    spaces.ip(&guest, &format!("link set at-{host} up"));
}

fn leave(spaces: &Spaces, n: u8, host: &str) {
    let guest = format!("g{n}");
    spaces.ip(&guest, &format!("link set at-{host} down"));
    spaces.ip(&guest, &format!("addr del {}/24 dev at-{host}", own4(n)));
}

/// Says who it is, then echoes, on port 80 of a guest; ends with the process.
fn serve(spaces: &Spaces, n: u8) {
    let listener = spaces.inside(&format!("g{n}"), || {
        TcpListener::bind("0.0.0.0:80").unwrap()
    });
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

/// A connection that counts.
struct Connection {
    stream: TcpStream,
    member: u8,
    count: u64,
}

impl Connection {
    fn open() -> Self {
        let address = format!("{VIP4}:80").parse().unwrap();
        let mut stream = TcpStream::connect_timeout(&address, WAIT).unwrap();
        stream.set_read_timeout(Some(WAIT)).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut member = [0];
        stream.read_exact(&mut member).unwrap();
        Self {
            stream,
            member: member[0],
            count: 0,
        }
    }

    fn echo(&mut self) {
        self.count += 1;
        let mut back = [0; 8];
        self.stream.write_all(&self.count.to_be_bytes()).unwrap();
        self.stream.read_exact(&mut back).unwrap();
        assert_eq!(u64::from_be_bytes(back), self.count);
    }
}

#[test]
fn connections_survive_moves_restarts_and_a_take_over() {
    if !permitted("wire") {
        return;
    }
    let spaces = Spaces::new(&["sw", "h1", "h2", "c", "g1", "g2"]);
    build(&spaces);
    let _receivers = receivers(&spaces);
    let mut first = Host::new(&spaces, "h1", 1);
    let second = Host::new(&spaces, "h2", 2);
    for (host, holder) in [(&first, true), (&second, false)] {
        host.apply(&spaces, holder);
        host.get().lease(u64::MAX);
    }
    spaces.run("h1", first.get().attach_edge(&edge(1))).unwrap();
    spaces.run("h1", first.get().open_edge("qt-1")).unwrap();
    spaces
        .run("h2", second.get().attach_edge(&edge(2)))
        .unwrap();
    spaces.run("h2", second.get().open_edge("qt-2")).unwrap();
    serve(&spaces, 1);
    serve(&spaces, 2);
    let mut connections: Vec<Connection> =
        spaces.inside("c", || (0..24).map(|_| Connection::open()).collect());
    for n in [1, 2] {
        let have = connections.iter().filter(|one| one.member == n).count();
        assert!(have > 0, "member {n} serves nobody");
    }
    let all = |connections: &mut Vec<Connection>| connections.iter_mut().for_each(Connection::echo);
    all(&mut connections);

    // Traffic goes on while member 1 moves and the first host's daemon restarts.
    let stop = Arc::new(AtomicBool::new(false));
    let mut moving = connections.split_off(12);
    let traffic = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            while !stop.load(Ordering::Relaxed) {
                moving.iter_mut().for_each(Connection::echo);
            }
            moving
        }
    });
    spaces
        .run("h2", second.get().attach_edge(&edge(1)))
        .unwrap();
    leave(&spaces, 1, "h1");
    let flows = spaces.run("h1", first.get().flows("qt-1")).unwrap();
    assert!(!flows.is_empty());
    spaces
        .run("h2", second.get().put_flows("qt-1", &flows))
        .unwrap();
    spaces
        .run("h1", first.get().close_edge("qt-1", true))
        .unwrap();
    spaces.run("h2", second.get().open_edge("qt-1")).unwrap();
    arrive(&spaces, 1, "h2");
    all(&mut connections);
    spaces.run("h1", first.get().detach_edge("qt-1")).unwrap();
    first.restart(&spaces);
    all(&mut connections);
    first.apply(&spaces, true);
    stop.store(true, Ordering::Relaxed);
    connections.extend(traffic.join().unwrap());
    all(&mut connections);

    // The first host loses its lease: it is silent, whoever asks.
    first.get().lease(0);
    let address = format!("{VIP4}:80").parse().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let short = Duration::from_millis(300);
    assert!(
        spaces
            .inside("c", || TcpStream::connect_timeout(&address, short))
            .is_err()
    );
    // The second one takes the address over and says so.
    second.apply(&spaces, true);
    assert!(spaces.inside("h2", || send("u0", &arp(2, VIRTUAL, VIP4, VIP4))));
    all(&mut connections);
    let before = spaces.run("h2", second.get().counters()).unwrap();
    let steered = before.services[&common::service()].steered;
    assert!(steered >= 24, "{before:?}");
    // What the silent host announces does not get out.
    assert!(!spaces.inside("h1", || send("u0", &arp(2, VIRTUAL, VIP4, VIP4))));
    all(&mut connections);
    let after = spaces.run("h2", second.get().counters()).unwrap();
    assert!(after.services[&common::service()].steered >= steered + 24);
}
