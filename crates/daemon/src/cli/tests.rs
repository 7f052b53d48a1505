//! Grammar, pages and judgements of the command line. Golden pages are in `golden/`;
//! `UPDATE_GOLDEN=1` writes them anew.

use super::args::{Cli, Command, Format, HostCommand, VmCommand};
use super::output::{Output, bytes, span};
use super::plan::Then;
use super::wait::{Goal, Standing};
use super::{copies, error::CliError, host, image, manifest, service, show, status, storage, take};
use clap::{CommandFactory as _, Parser as _};
use jiff::tz::TimeZone;
use quorate_api::view::{ClusterView, Explanation};
use quorate_api::{ApiError, ClientError, ErrorCode};
use quorate_types::Millis;
use std::path::Path;

const PLAIN: Output = Output {
    format: Format::Table,
    color: false,
    width: None,
};

/// A cluster that is well: three hosts, four VMs.
fn well() -> ClusterView {
    serde_json::from_str(include_str!("golden/well.json")).unwrap()
}

/// The same with trouble on every layer.
fn trouble() -> ClusterView {
    serde_json::from_str(include_str!("golden/trouble.json")).unwrap()
}

fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src/cli/golden")
        .join(name);
    let text = format!("{text}\n");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, kept, "{name} differs");
}

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn the_grammar_is_sound_and_the_help_names_every_command() {
    Cli::command().debug_assert();
    let help = Cli::command().render_help().to_string();
    for command in Cli::command()
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
    {
        let name = command.get_name();
        assert!(
            help.contains(&format!("\n  {name} ")),
            "`{name}` is not in the help:\n{help}"
        );
    }
    for (group, names) in [
        (
            "vm",
            "list, show, start, stop, migrate, cancel, console, logs",
        ),
        (
            "host",
            "list, show, drain, resume, label, fence, confirm-dead, remove",
        ),
        ("service", "list, show, drain, resume, trace"),
        ("storage", "list, show, copies, keys, take, drill"),
        ("secret", "set, list, delete"),
    ] {
        let command = Cli::command();
        let known: Vec<&str> = command
            .find_subcommand(group)
            .unwrap()
            .get_subcommands()
            .map(clap::Command::get_name)
            .collect();
        assert_eq!(known.join(", "), names);
        assert!(help.contains(names));
    }
}

#[test]
fn commands_are_understood() {
    let cli = parse("quorate vm migrate db --to h2 --wait --timeout 90s -o json").unwrap();
    assert_eq!(cli.global.output, Format::Json);
    let Command::Vm(VmCommand::Migrate {
        name,
        to,
        yes: _,
        wait,
    }) = cli.command
    else {
        panic!("not a migration")
    };
    assert_eq!((name.as_str(), to.unwrap().as_str()), ("db", "h2"));
    assert_eq!((wait.wait, wait.timeout), (true, Millis::secs(90)));
    parse("quorate storage copies show").unwrap();
    parse("quorate storage copies accept db root --host h2 --yes").unwrap();
    assert!(parse("quorate storage copies accept db root").is_err());
    let cli = parse("quorate host confirm-dead h3 --yes").unwrap();
    assert!(matches!(
        cli.command,
        Command::Host(HostCommand::ConfirmDead { yes: true, .. })
    ));
    let cli =
        parse("quorate plan --fail h1,h2 --then-drain h3 --then-fail h4 --then-drain h5").unwrap();
    let Command::Plan(args) = cli.command else {
        panic!("not a plan")
    };
    assert_eq!(args.fail.len(), 2);
    // In the order of the command line.
    let host = |name: &str| name.parse().unwrap();
    let then = [
        Then::Drain(host("h3")),
        Then::Fail(host("h4")),
        Then::Drain(host("h5")),
    ];
    assert_eq!(args.then.0, then);
    for bad in [
        "quorate vm show DB",
        "quorate apply",
        "quorate vm start db --timeout 5",
        "quorate vm start db --timeout 5s",
        "quorate nonsense",
        "quorate join T",
        "quorate plan --balance --drain h1",
        "quorate capacity --failures 0",
        "quorate explain vm db --at soon",
        "quorate image import a.img",
        "quorate image import a.img --to shared",
        "quorate image import a.img --to shared/a --format iso",
        "quorate image resize shared/a big",
        "quorate secret set san-chap word",
        "quorate service drain web",
        "quorate service trace web",
        "quorate service drain web web1 --timeout 5s",
    ] {
        assert!(parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_status_page_of_a_healthy_cluster() {
    golden("well.txt", &status::page(&PLAIN, &well()));
}

#[test]
fn the_status_page_of_a_cluster_in_trouble() {
    golden("trouble.txt", &status::page(&PLAIN, &trouble()));
}

#[test]
fn the_status_page_fits_a_narrow_terminal() {
    let narrow = Output {
        width: Some(70),
        ..PLAIN
    };
    let tables = format!(
        "{}\n\n{}",
        status::hosts(&narrow, &trouble().hosts),
        status::vms(&narrow, &trouble().vms)
    );
    assert!(
        tables.lines().all(|line| line.chars().count() <= 70),
        "{tables}"
    );
    golden("narrow.txt", &tables);
}

#[test]
fn colours_are_only_added_never_needed() {
    let color = Output {
        color: true,
        ..PLAIN
    };
    let page = status::page(&color, &trouble());
    assert!(page.contains("\x1b["));
    let mut plain = String::new();
    let mut rest = page.as_str();
    while let Some(at) = rest.find("\x1b[") {
        plain.push_str(&rest[..at]);
        rest = &rest[at..];
        rest = &rest[rest.find('m').unwrap() + 1..];
    }
    plain.push_str(rest);
    let words = |text: &str| {
        text.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(words(&plain), words(&status::page(&PLAIN, &trouble())));
}

#[test]
fn copies_of_disks_and_what_is_at_stake() {
    let mut view = trouble();
    let copy = |host: &str, in_step, since: u64| {
        serde_json::from_value(serde_json::json!({
            "pool": "safe", "image": "db", "host": host, "in_step": in_step, "since": since,
            "percent": null, "problem": null,
        }))
        .unwrap()
    };
    let vm = &mut view.vms[0];
    let since = 1_700_000_000_000;
    vm.copies = vec![copy("h1", true, since), copy("h2", false, since + 60_000)];
    vm.why = format!(
        "no host can take it; `quorate storage copies accept {} db --host h2`",
        vm.name
    );
    let (h1, h2) = ("h1".parse().unwrap(), "h2".parse().unwrap());
    let text = [
        copies::page(&PLAIN, &view.vms),
        copies::warning(&view.vms[0], "db", &h2),
        copies::warning(&view.vms[0], "db", &h1),
        copies::page(&PLAIN, &view.vms[1..]),
    ];
    golden("copies.txt", &text.join("\n\n"));
}

#[test]
fn an_empty_cluster_says_how_to_go_on() {
    let mut view = well();
    view.vms.clear();
    assert_eq!(
        status::headline(&PLAIN, &view),
        "Cluster lab: all well. 3 hosts, no VMs yet: `quorate apply -f FILE`."
    );
}

#[test]
fn one_object_in_full() {
    let view = trouble();
    let text = [
        show::vm(&PLAIN, &view.vms[0], 1_700_000_100_000),
        show::vm(&PLAIN, &view.vms[3], 1_700_000_100_000),
        show::host(&PLAIN, &view.hosts[0]),
        host::warning(&view.hosts[2]),
    ];
    golden("show.txt", &text.join("\n\n"));
}

#[test]
fn an_explanation_and_events() {
    let explained: Explanation = serde_json::from_str(include_str!("golden/explain.json")).unwrap();
    let mut text = show::explanation(&PLAIN, &explained, &TimeZone::UTC, 1_700_000_100_000);
    for event in &explained.events {
        text.push('\n');
        text.push_str(&show::event(&PLAIN, event, &TimeZone::UTC));
    }
    golden("explain.txt", &text);
}

#[test]
fn pools_and_their_images() {
    let pools: Vec<quorate_api::storage::StorageView> =
        serde_json::from_str(include_str!("golden/storage.json")).unwrap();
    let page = |pool| storage::page(&PLAIN, pool, &TimeZone::UTC, 1_700_000_100_000);
    let text = [
        storage::list(&PLAIN, &pools),
        page(&pools[0]),
        page(&pools[1]),
        storage::images(
            &PLAIN,
            Some(&pools[0].name),
            pools[0].images.as_ref().unwrap(),
        ),
    ];
    golden("storage.txt", &text.join("\n\n"));
}

/// Pools whose units decide by reservations. `make san` compares the drills with those of real ones.
#[test]
fn pools_of_units_with_reservations() {
    let mut pools: Vec<quorate_api::storage::StorageView> =
        serde_json::from_str(include_str!("golden/storage-units.json")).unwrap();
    let page = |pool: &quorate_api::storage::StorageView| {
        storage::page(&PLAIN, pool, &TimeZone::UTC, 1_700_000_100_000)
    };
    let drill = |pool: &quorate_api::storage::StorageView| {
        storage::drill_page(&PLAIN, pool.drill.as_ref().unwrap(), &TimeZone::UTC)
    };
    let mut text = vec![storage::list(&PLAIN, &pools)];
    text.extend(pools.iter().map(page));
    text.extend(pools.iter().map(drill));
    pools[0].drill = None;
    text.push(page(&pools[0]));
    let answers: Vec<quorate_api::storage::TakeAnswer> =
        serde_json::from_str(include_str!("golden/storage-takes.json")).unwrap();
    let pages = answers.iter();
    text.extend(pages.map(|answer| take::page(&PLAIN, &pools[1].name, answer)));
    golden("storage-units.txt", &text.join("\n\n"));
}

#[test]
fn jobs_with_their_progress() {
    let jobs: Vec<quorate_types::ImageJob> =
        serde_json::from_str(include_str!("golden/jobs.json")).unwrap();
    golden("jobs.txt", &image::table(&PLAIN, &jobs, &TimeZone::UTC));
    assert_eq!(
        image::standing(&jobs[0]),
        "copying 48 %, 100 MiB/s, 5.2 s left"
    );
}

#[test]
fn changes_are_shown_briefly_or_in_full() {
    let parse = |text: &str| {
        quorate_manifest::parse(text, "x", &std::collections::BTreeMap::new())
            .unwrap()
            .manifest
    };
    let old = parse("vms: {db: {memory: 1GiB, boot: {kernel: {kernel: /k}}}}");
    let new = parse(
        "vms: {db: {memory: 2GiB, boot: {kernel: {kernel: /k}}}, app: {memory: 1GiB, boot: {kernel: {kernel: /k}}}}",
    );
    let changes = quorate_manifest::diff(&quorate_manifest::Existing::default().with(&old), &new);
    assert_eq!(
        manifest::changes(&PLAIN, &changes, false),
        "+ vm app\n~ vm db\n    memory: 1GiB -> 2GiB"
    );
    assert!(manifest::changes(&PLAIN, &changes, true).contains("+ vm app\n    boot.kernel"));
}

fn standing(goal: &Goal, view: &ClusterView) -> Standing {
    goal.standing(view).remove(0).1
}

#[test]
fn waiting_knows_when_it_is_over() {
    let (well, trouble) = (well(), trouble());
    let name = |name: &str| name.parse().unwrap();
    let wanted = Goal::vm_as_wanted(name("db"));
    assert_eq!(
        standing(&wanted, &well),
        Standing::Done("ready on h1".into())
    );
    let wanted = Goal::vm_as_wanted(name("app"));
    assert!(
        matches!(standing(&wanted, &trouble), Standing::HeldUp { why, .. } if why.contains("waits for db"))
    );
    let moved = |from: &str, to: Option<&str>| Goal::Moved {
        vm: name("db"),
        from: Some(from.parse().unwrap()),
        to: to.map(|to| to.parse().unwrap()),
    };
    assert!(matches!(
        standing(&moved("h2", None), &well),
        Standing::Done(_)
    ));
    assert!(
        matches!(
            standing(&moved("h1", Some("h2")), &well),
            Standing::Failed(_)
        ),
        "the wish is gone and it did not move"
    );
    let mut asked = well.clone();
    asked.vms.iter_mut().for_each(|vm| vm.move_requested = true);
    assert!(matches!(
        standing(&moved("h1", Some("h2")), &asked),
        Standing::Busy(_)
    ));
    assert!(matches!(
        standing(&Goal::Gone(name("nothing")), &well),
        Standing::Done(_)
    ));
    let drained = Goal::Drained("h1".parse().unwrap());
    assert!(
        matches!(standing(&drained, &well), Standing::Failed(_)),
        "it takes VMs"
    );
    let mut draining = well;
    draining.hosts[0].mode = quorate_state::HostMode::Draining;
    assert!(
        matches!(standing(&drained, &draining), Standing::Busy(text) if text.starts_with("2 VMs to go: "))
    );
    draining.hosts[0].mode = quorate_state::HostMode::Maintenance;
    draining.hosts[0].vms.clear();
    assert!(matches!(standing(&drained, &draining), Standing::Done(_)));
}

#[test]
fn exit_statuses_are_as_documented() {
    let refused = |code| CliError::Client(ClientError::Refused(ApiError::new(code, "x"))).status();
    assert_eq!(refused(ErrorCode::InvalidManifest), 2);
    assert_eq!(refused(ErrorCode::NoQuorum), 1);
    assert_eq!(refused(ErrorCode::NotFound), 1);
    assert_eq!(CliError::TimedOut("x".into()).status(), 4);
    let gone = std::io::Error::from(std::io::ErrorKind::NotFound);
    let unreachable = CliError::Client(ClientError::Unreachable {
        path: "/x/api.sock".into(),
        source: gone,
    });
    assert_eq!(unreachable.status(), 3);
    assert!(unreachable.render().contains("is `quorate serve` running"));
}

#[test]
fn numbers_read_well() {
    assert_eq!(bytes(0), "0 B");
    assert_eq!(bytes(128 << 20), "128 MiB");
    assert_eq!(bytes(1536 << 20), "1.5 GiB");
    assert_eq!(span(1850), "1.8 s");
    assert_eq!(span(59_999), "59 s");
    assert_eq!(span(3_600_000), "60 min");
    assert_eq!(span(400_000_000), "4 d");
}

#[test]
fn votes_are_shown_and_a_witness_is_recommended() {
    let read =
        |text: &str| -> quorate_api::quorum::QuorumView { serde_json::from_str(text).unwrap() };
    let bare = read(include_str!("golden/quorum-bare.json"));
    golden("quorum-bare.txt", &super::quorum::page(&PLAIN, &bare));
    golden(
        "quorum-recommend.txt",
        &super::quorum::recommendation(&PLAIN, &bare.recommendation),
    );
    let disk = read(include_str!("golden/quorum-disk.json"));
    golden("quorum-disk.txt", &super::quorum::page(&PLAIN, &disk));
}

#[test]
fn a_disk_witness_needs_a_pool() {
    let cli = parse("quorate quorum set --witness disk --pool shared").unwrap();
    let Command::Quorum(super::args::QuorumCommand::Set { witness, pool, .. }) = cli.command else {
        panic!("not a choice")
    };
    assert_eq!(witness, super::args::WitnessChoice::Disk);
    assert_eq!(pool.unwrap().as_str(), "shared");
    assert!(parse("quorate quorum set --witness disk").is_err());
    assert!(parse("quorate quorum set --witness none").is_ok());
    assert!(parse("quorate quorum set --witness disk --pool san --disk w --force").is_ok());
    assert!(parse("quorate quorum set --witness disk --pool san --force").is_err());
    assert!(parse("quorate quorum set").is_err());
    assert!(parse("quorate witness join T --address 192.0.2.9:7420 --name w1").is_ok());
}

#[test]
fn pages_of_services() {
    let services: Vec<quorate_api::services::ServiceView> =
        serde_json::from_str(include_str!("golden/services.json")).unwrap();
    golden("services.txt", &service::list(&PLAIN, &services));
    let now = 1_760_000_600_000;
    let pages: Vec<String> = services
        .iter()
        .map(|of| service::page(&PLAIN, of, now))
        .collect();
    golden("services-shown.txt", &pages.join("\n\n"));
    assert!(service::list(&PLAIN, &[]).starts_with("No services yet"));
    let traces: Vec<quorate_api::services::TraceView> =
        serde_json::from_str(include_str!("golden/traces.json")).unwrap();
    let traces: Vec<String> = traces
        .iter()
        .map(|answer| service::trace(&PLAIN, answer))
        .collect();
    golden("traces.txt", &traces.join("\n\n"));
}

#[test]
fn limits_and_what_they_refused_are_shown() {
    let mut services: serde_json::Value =
        serde_json::from_str(include_str!("golden/services.json")).unwrap();
    services[0]["spec"]["limits"] =
        serde_json::json!({ "new_per_member": 200, "new_per_client": 20 });
    services[0]["members"][0]["refused"] = 17.into();
    let service = serde_json::from_value(services[0].take()).unwrap();
    let page = service::page(&PLAIN, &service, 1_760_000_600_000);
    for part in [
        "new connections in a second at each member: 200 at most, 20 of one client",
        "17 connections refused by the limits",
    ] {
        assert!(page.contains(part), "{part} is not in\n{page}");
    }
}

#[test]
fn a_service_is_as_wanted_when_all_that_run_serve() {
    let services: serde_json::Value =
        serde_json::from_str(include_str!("golden/services.json")).unwrap();
    let standing = |change: &dyn Fn(&mut serde_json::Value, &mut serde_json::Value)| {
        let mut view = serde_json::to_value(well()).unwrap();
        let mut dns = services[1].clone();
        dns["members"][0]["vm"] = "db".into();
        change(&mut dns, &mut view["vms"]);
        view["services"] = serde_json::Value::Array(vec![dns]);
        let view: ClusterView = serde_json::from_value(view).unwrap();
        service::as_wanted(&view, &"dns".parse().unwrap())
    };
    let held_up = |standing, part: &str| matches!(standing, Standing::HeldUp { why, .. } if why.contains(part));
    let done = "1 of 1 serving, held by every host".to_owned();
    assert_eq!(standing(&|_, _| ()), Standing::Done(done));
    let sick = standing(&|dns, _| {
        dns["members"][0]["state"] = "unhealthy".into();
        dns["members"][0]["why"] = "connection refused".into();
    });
    assert!(held_up(sick, "db: connection refused"));
    let mute = standing(&|dns, _| dns["problems"] = serde_json::json!(["no host answers"]));
    assert!(held_up(mute, "no host answers"));
    let preparing = standing(&|dns, _| dns["preparing"] = 2.into());
    assert!(matches!(preparing, Standing::Busy(text) if text.contains("ring")));
    let stopped = standing(&|dns, vms| {
        dns["members"][0]["state"] = "down".into();
        for vm in vms.as_array_mut().unwrap() {
            vm["power"] = "stopped".into();
        }
    });
    assert!(matches!(stopped, Standing::Done(text) if text.contains("none of its members")));
    let unknown = standing(&|dns, _| dns["name"] = "other".into());
    assert!(matches!(unknown, Standing::Busy(_)));
}

#[test]
fn a_drain_of_a_member_is_told_by_its_connections() {
    let services: serde_json::Value =
        serde_json::from_str(include_str!("golden/services.json")).unwrap();
    let standing = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut view = serde_json::to_value(well()).unwrap();
        view["services"] = services.clone();
        change(&mut view["services"][0]);
        let view: ClusterView = serde_json::from_value(view).unwrap();
        let (web, vm) = ("web".parse().unwrap(), "web2".parse().unwrap());
        service::drained(&view, &web, &vm)
    };
    let busy = |text: &str| Standing::Busy(text.to_owned());
    assert_eq!(standing(&|_| ()), busy("3 connections to go"));
    let in_ring = standing(&|of| of["members"][1]["in_ring"] = true.into());
    assert!(matches!(in_ring, Standing::Busy(text) if text.starts_with("not yet out of the ring")));
    let ended = standing(&|of| {
        of["members"][1]["state"] = "drained".into();
        of["members"][1]["cut"] = 1.into();
    });
    let done = "drained, 1 connection cut at the time-out".to_owned();
    assert_eq!(ended, Standing::Done(done));
    let resumed = standing(&|of| of["members"][1]["state"] = "serving".into());
    assert!(matches!(resumed, Standing::Failed(_)));
    let gone = standing(&|of| of["name"] = "other".into());
    assert!(matches!(gone, Standing::Failed(_)));
}
