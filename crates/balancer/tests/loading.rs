//! What the driver says of hosts and inputs that are not as they should be, and how it replaces what it finds.
#![allow(clippy::unwrap_used)]

mod common;

use common::frame::{Frame, SYN};
use common::{CLIENT4, Site, VIP4, own_namespace, permitted, table, version, wanted};
use quorate_balancer::linux::Receivers;
use quorate_balancer::{BalancerError, Capacity, Datapath as _, FlowKey, LinuxDatapath, Pin};
use quorate_types::ServiceName;
use quorate_types::service::{Protocol, ServiceId, UplinkMode};

fn small() -> Capacity {
    Capacity {
        services: 2,
        members: 3,
        pins: 1,
        flows: 256,
        clients: 256,
        ..Capacity::default()
    }
}

#[tokio::test]
async fn a_full_table_stops_what_does_not_fit_and_nothing_else() {
    if !permitted("loading") {
        return;
    }
    own_namespace();
    common::ip("link add br0 type bridge");
    let site = Site::with(small()).await;
    let mut all = wanted(table(vec![version(1, &[1])]));
    let mut second = table(vec![version(4, &[2])]);
    second.id = ServiceId(8);
    second.addresses = vec!["10.0.0.101".parse().unwrap()];
    let other = ServiceName::new("xtra").unwrap();
    all.services.insert(other.clone(), second);
    let applied = site.datapath.apply(&all).await.unwrap();
    assert_eq!(applied.services[&common::service()].active, 1);
    let loaded = &applied.services[&other];
    assert_eq!((loaded.active, loaded.prepared), (0, None));
    let problem = loaded.problem.as_ref().unwrap();
    assert!(
        problem.contains("`services` is full (2 entries)") && problem.contains("capacity"),
        "{problem}"
    );
    // Room again.
    all.services.remove(&common::service());
    assert_eq!(
        site.datapath.apply(&all).await.unwrap().services[&other].problem,
        None
    );
    // Too many members.
    let crowd = wanted(table(vec![version(2, &[1, 2, 3, 4])]));
    let applied = site.datapath.apply(&crowd).await.unwrap();
    let problem = applied.services[&common::service()]
        .problem
        .clone()
        .unwrap();
    assert!(problem.contains("`members` is full"), "{problem}");
    // Pins.
    site.datapath
        .apply(&wanted(table(vec![version(3, &[1])])))
        .await
        .unwrap();
    let pin = |client_port| Pin {
        service: ServiceId(7),
        flow: FlowKey {
            protocol: Protocol::Tcp,
            client: CLIENT4.parse().unwrap(),
            client_port,
            port: 80,
        },
        mac: common::mac(1),
    };
    site.datapath.pin(&[pin(1)]).await.unwrap();
    let error = site.datapath.pin(&[pin(2)]).await.unwrap_err();
    assert!(
        matches!(
            error,
            BalancerError::Full {
                table: "pins",
                limit: 1,
                ..
            }
        ),
        "{error}"
    );
    let mut unknown = pin(3);
    unknown.service = ServiceId(99);
    let error = site.datapath.pin(&[unknown]).await.unwrap_err();
    assert!(matches!(error, BalancerError::NotLoaded { .. }), "{error}");
}

#[tokio::test]
async fn a_service_that_cannot_be_loaded_is_unloaded_and_said_why() {
    if !permitted("loading") {
        return;
    }
    own_namespace();
    common::ip("link add br0 type bridge");
    let site = Site::with(small()).await;
    site.datapath.lease(u64::MAX);
    let good = table(vec![version(1, &[1])]);
    let frame = Frame::tcp(CLIENT4, VIP4, 1000, 80, SYN).build();
    let steered = || {
        site.datapath
            .test_run("director", &frame, 0, 1)
            .unwrap()
            .code
            == 3
    };
    site.datapath.apply(&wanted(good.clone())).await.unwrap();
    assert!(steered());
    let mut many = good.clone();
    many.ports = (1..=33)
        .map(|port| format!("{}", port * 10).parse().unwrap())
        .collect();
    let mut twice = good.clone();
    twice.addresses.push("10.0.0.101".parse().unwrap());
    let mut elsewhere = good.clone();
    elsewhere.network = quorate_types::NetworkName::new("other").unwrap();
    for (bad, words) in [
        (many, "33 port ranges"),
        (twice, "address of a family"),
        (elsewhere, "`other`"),
    ] {
        site.datapath.apply(&wanted(good.clone())).await.unwrap();
        let applied = site.datapath.apply(&wanted(bad)).await.unwrap();
        let loaded = &applied.services[&common::service()];
        let problem = loaded.problem.clone().unwrap();
        assert!(problem.contains(words), "{problem}");
        assert_eq!(loaded.active, 0);
        assert!(!steered(), "{words}");
    }
    // A ring without a member is loaded: nobody gets the packets.
    let applied = site
        .datapath
        .apply(&wanted(table(vec![version(5, &[])])))
        .await
        .unwrap();
    assert_eq!(applied.services[&common::service()].active, 5);
    assert!(!steered());
}

#[tokio::test]
async fn uplinks_are_driven_generic_or_said_to_be_missing() {
    if !permitted("loading") {
        return;
    }
    own_namespace();
    common::ip("link add br0 type bridge");
    common::ip("link add u.0 type veth peer name p0");
    let site = Site::with(small()).await;
    let mode = |uplink: Option<&'static str>, bridge: &'static str| {
        let mut all = wanted(table(vec![version(1, &[1])]));
        let network = all.networks.get_mut(&common::network()).unwrap();
        network.uplink = uplink.map(str::to_owned);
        network.bridge = bridge.to_owned();
        let datapath = &site.datapath;
        async move { datapath.apply(&all).await.unwrap().uplinks[&common::network()].clone() }
    };
    let problem = |mode| match mode {
        UplinkMode::Problem(text) => text,
        other => panic!("{other:?}"),
    };
    assert_eq!(mode(Some("u.0"), "br0").await, UplinkMode::Driver);
    assert_eq!(mode(Some("lo"), "br0").await, UplinkMode::Generic);
    // The first one was let go.
    let taken = Receivers::attach(&["u.0"]).unwrap();
    let text = problem(mode(Some("u.0"), "br0").await);
    assert!(text.contains("another program is attached there"), "{text}");
    drop(taken);
    assert_eq!(mode(Some("u.0"), "br0").await, UplinkMode::Driver);
    assert_eq!(mode(None, "br0").await, UplinkMode::None);
    let text = problem(mode(Some("eth9"), "br0").await);
    assert!(text.contains("uplink `eth9` does not exist"), "{text}");
    let text = problem(mode(None, "br9").await);
    assert!(text.contains("bridge `br9` does not exist"), "{text}");
    // An interface that is made anew gets a program of its own.
    assert_eq!(mode(Some("u.0"), "br0").await, UplinkMode::Driver);
    common::ip("link del u.0");
    common::ip("link add u.0 type veth peer name p0");
    assert_eq!(mode(Some("u.0"), "br0").await, UplinkMode::Driver);
    let error = site
        .datapath
        .attach_edge(&common::edge(1))
        .await
        .unwrap_err();
    assert!(
        matches!(error, BalancerError::NoInterface { .. }),
        "{error}"
    );
    let error = site.datapath.open_edge("qt-1").await.unwrap_err();
    assert!(matches!(error, BalancerError::NoEdge { .. }), "{error}");
    site.datapath.close_edge("qt-1", true).await.unwrap();
    site.datapath.detach_edge("qt-1").await.unwrap();
}

#[tokio::test]
async fn a_later_process_replaces_programs_in_place_and_forgets_old_maps() {
    if !permitted("loading") {
        return;
    }
    own_namespace();
    common::ip("link add br0 type bridge");
    common::ip("link add u0 type veth peer name p0");
    let site = Site::with(small()).await;
    let mut all = wanted(table(vec![version(1, &[1])]));
    all.networks.get_mut(&common::network()).unwrap().uplink = Some("u0".to_owned());
    site.datapath.apply(&all).await.unwrap();
    site.datapath.lease(12_345);
    let program = || {
        let output = std::process::Command::new("ip")
            .args(["-d", "link", "show", "u0"])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let id = text
            .split("prog/xdp id ")
            .nth(1)
            .map(|rest| rest.split(' ').next().unwrap().to_owned());
        id.unwrap_or_else(|| panic!("no program: {text}"))
    };
    let before = program();
    let root = site.options.root.join(&site.options.name);
    std::fs::create_dir(root.join("maps-0")).unwrap();
    let again = LinuxDatapath::new(site.options.clone()).await.unwrap();
    assert_eq!(program(), before, "nothing changes until it is told");
    let applied = again.apply(&all).await.unwrap();
    assert_eq!(applied.services[&common::service()].problem, None);
    assert_ne!(program(), before);
    assert!(!root.join("maps-0").exists());
    // Rings that nobody changed are not made again in the same process.
    assert_eq!(again.apply(&all).await.unwrap(), applied);
}

#[tokio::test]
async fn tables_taken_over_keep_their_size() {
    if !permitted("loading") {
        return;
    }
    own_namespace();
    common::ip("link add br0 type bridge");
    let site = Site::with(small()).await;
    let mut options = site.options.clone();
    options.capacity = Capacity::default();
    let again = LinuxDatapath::new(options).await.unwrap();
    let crowd = wanted(table(vec![version(2, &[1, 2, 3, 4])]));
    let applied = again.apply(&crowd).await.unwrap();
    let problem = applied.services[&common::service()]
        .problem
        .clone()
        .unwrap();
    assert!(
        problem.contains("`members` is full (3 entries)"),
        "{problem}"
    );
}

#[test]
fn the_object_was_built_from_its_sources() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/bpf/build.sh");
    let output = std::process::Command::new(script)
        .arg("--check")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
