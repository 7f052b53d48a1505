//! BIRD and FRR as speakers against a router (BIRD), each test in two network namespaces: an address is learnt while
//! the lease lasts, and lost before the router's own patience would lose it. Needs root and the packages `bird2` and
//! `frr`; without them the tests say so and pass, because they cannot say anything.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use quorate_network::attract::bgp::watch::{Desk, boot_ns, run};
use quorate_network::attract::bgp::{Program, Session, Speaker, frr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(30);
/// Much longer than the test waits for a route to go: it must not go by the router's patience.
const HOLD_S: u16 = 60;

#[allow(unsafe_code)]
mod netns {
    /// Moves the calling thread, and those it starts, into a new network namespace.
    pub(super) fn enter_new() -> std::io::Result<()> {
        // SAFETY: only NEWNET is unshared, never the table of file descriptors.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET)? };
        Ok(())
    }
}

fn ip(args: &str) {
    let output = Command::new("ip").args(args.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {args}: {output:?}");
}

/// The router, in a namespace of its own.
struct Router {
    space: String,
    dir: std::path::PathBuf,
    bird: Child,
}

impl Router {
    fn start(dir: &Path) -> Self {
        let space = format!("qr-bgp{}", std::process::id());
        ip(&format!("netns add {space}"));
        ip(&format!(
            "link add up0 type veth peer name peer0 netns {space}"
        ));
        ip("addr add 10.99.0.1/24 dev up0");
        ip("link set up0 up");
        ip("link set lo up");
        ip(&format!("-n {space} addr add 10.99.0.254/24 dev peer0"));
        ip(&format!("-n {space} link set peer0 up"));
        let config = "router id 10.99.0.254;\nlog stderr all;\nprotocol device { }\n\
             protocol bgp hosts {\n  local as 65000;\n  neighbor range 10.99.0.0/24 as 65001;\n  \
             dynamic name \"host\";\n  ipv4 { import all; export none; };\n}\n";
        std::fs::write(dir.join("router.conf"), config).unwrap();
        let bird = Command::new("ip")
            .args(["netns", "exec", &space, "bird", "-f", "-c"])
            .arg(dir.join("router.conf"))
            .arg("-s")
            .arg(dir.join("router.ctl"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            space,
            dir: dir.to_owned(),
            bird,
        }
    }

    fn routes(&self) -> String {
        let output = Command::new("birdc")
            .arg("-s")
            .arg(self.dir.join("router.ctl"))
            .args(["show", "route"])
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn wait(&self, what: &str, good: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + SOON;
        loop {
            let routes = self.routes();
            if good(&routes) {
                return;
            }
            let log = std::fs::read_to_string(self.dir.join("desk/speaker.log"));
            assert!(
                Instant::now() < deadline,
                "{what}: {routes}\nthe speaker says: {}",
                log.unwrap_or_default()
            );
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let _ = self.bird.kill();
        let _ = self.bird.wait();
        let _ = Command::new("ip")
            .args(["netns", "del", &self.space])
            .status();
    }
}

fn speaker(program: Program, routes: &[&str]) -> Speaker {
    Speaker {
        program,
        router_id: [10, 99, 0, 1].into(),
        sessions: vec![Session {
            neighbor: [10, 99, 0, 254].into(),
            remote_as: 65000,
            local_as: 65001,
            hold_s: HOLD_S,
            bfd: false,
        }],
        routes: routes.iter().map(|text| text.parse().unwrap()).collect(),
    }
}

fn from_now(span: Duration) -> u64 {
    boot_ns() + u64::try_from(span.as_nanos()).unwrap()
}

fn learns_and_loses(program: Program, dir: &Path) {
    let router = Router::start(dir);
    let desk = Desk::open(&dir.join("desk")).unwrap();
    let (first, second) = ("10.99.1.200", "10.99.1.201");
    desk.set(Some(&speaker(program, &[first]))).unwrap();
    desk.lease(from_now(Duration::from_secs(600))).unwrap();
    let path = dir.join("desk");
    let watcher = std::thread::spawn(move || run(&path));
    router.wait("an address is learnt", |routes| {
        routes.contains("10.99.1.200/32")
    });
    // Another one comes, without the first being lost.
    desk.set(Some(&speaker(program, &[first, second]))).unwrap();
    router.wait("two addresses", |routes| routes.contains("10.99.1.201/32"));
    assert!(router.routes().contains("10.99.1.200/32"));
    desk.set(Some(&speaker(program, &[second]))).unwrap();
    router.wait("one is withdrawn", |routes| {
        !routes.contains("10.99.1.200/32")
    });
    assert!(router.routes().contains("10.99.1.201/32"));
    // The daemon hangs: nobody writes a new deadline.
    let left = Duration::from_millis(600);
    let end = Instant::now() + left;
    desk.lease(from_now(left)).unwrap();
    router.wait("all is withdrawn", |routes| !routes.contains("/32"));
    println!(
        "MEASURED {program:?}: withdrawn {} ms after the end of the lease (negative: before)",
        i128::try_from(Instant::now().saturating_duration_since(end).as_millis()).unwrap()
            - i128::try_from(end.saturating_duration_since(Instant::now()).as_millis()).unwrap()
    );
    assert!(end.elapsed() < Duration::from_secs(u64::from(HOLD_S) / 4));
    // It is back.
    desk.lease(from_now(Duration::from_secs(600))).unwrap();
    router.wait("an address is back", |routes| {
        routes.contains("10.99.1.201/32")
    });
    desk.set(None).unwrap();
    watcher.join().unwrap().unwrap();
    router.wait("nothing is left", |routes| !routes.contains("/32"));
}

fn in_namespace(program: Program, binary: &'static str) {
    let there = |name: &str| {
        let found = Command::new(name).arg("--version").output();
        found.is_ok_and(|output| output.status.success())
    };
    if !rustix::process::geteuid().is_root() || !there("bird") || !there(binary) {
        eprintln!("skipped: needs root, bird2 and {binary}");
        return;
    }
    let name = format!("quorate-bgp-{}-{binary:?}", std::process::id()).replace(['/', '"'], "-");
    let dir = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&dir).unwrap();
    let place = dir.clone();
    let thread = std::thread::spawn(move || {
        netns::enter_new().unwrap();
        learns_and_loses(program, &place);
    });
    let result = thread.join();
    let _ = std::fs::remove_dir_all(dir);
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn addresses_come_and_go_with_the_lease() {
    in_namespace(Program::Bird, "bird");
    in_namespace(Program::Frr, frr::BGPD);
}
