//! `service`: how services stand, drains of members, which member a client gets. Pages are pure: data in, text out.

use super::Context;
use super::args::WaitArgs;
use super::error::CliError;
use super::output::{Output, Tone, cell, count, span, trimmed};
use super::show::facts;
use super::vm::finish;
use super::wait::{Goal, Standing};
use clap::{Args, Subcommand, ValueEnum};
use quorate_api::services::{DirectorView, MemberState, MemberView, ServiceView, TraceView};
use quorate_api::view::{Changed, ClusterView};
use quorate_types::service::{AffinityKind, Limits};
use quorate_types::spec::Power;
use quorate_types::{ServiceName, VmName};

#[derive(Debug, Subcommand)]
pub(crate) enum ServiceCommand {
    /// All services: address, members that serve, who answers for the address.
    List,
    /// One service in full: its members and every host's director.
    Show {
        /// Which.
        name: ServiceName,
    },
    /// Give a member no new connections and let the old ones end, at most for the service's `drain_timeout`.
    Drain {
        /// The service.
        service: ServiceName,
        /// Its member.
        member: VmName,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Give a drained member connections again.
    Resume {
        /// The service.
        service: ServiceName,
        /// Its member.
        member: VmName,
    },
    /// Which member serves a client, and why.
    Trace(TraceArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TraceArgs {
    /// The service.
    service: ServiceName,
    /// The client: `10.0.0.1:4711`, `[fd00::1]:4711`, or its address alone where its port does not matter.
    #[arg(value_name = "CLIENT[:PORT]")]
    client: String,
    /// The service's port that it connects to; absent: the first one.
    #[arg(long)]
    port: Option<u16>,
    /// TCP or UDP, where the port has both.
    #[arg(long)]
    protocol: Option<ProtocolArg>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ProtocolArg {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

pub(crate) async fn run(context: &Context, command: ServiceCommand) -> Result<(), CliError> {
    let client = &context.client;
    let nothing = serde_json::json!({});
    match command {
        ServiceCommand::List => {
            let services: Vec<ServiceView> = client.get("/api/v1/services").await?;
            context.output.print(&services, |out| list(out, &services))
        }
        ServiceCommand::Show { name } => {
            let service: ServiceView = client.get(&format!("/api/v1/services/{name}")).await?;
            context
                .output
                .print(&service, |out| page(out, &service, super::now_ms()))
        }
        ServiceCommand::Drain {
            service,
            member,
            wait,
        } => {
            let path = format!("/api/v1/services/{service}/members/{member}/drain");
            let changed: Changed = client.post(&path, &nothing).await?;
            let goal = Goal::MemberDrained {
                service,
                vm: member,
            };
            finish(context, &changed, wait, goal).await
        }
        ServiceCommand::Resume { service, member } => {
            let path = format!("/api/v1/services/{service}/members/{member}/resume");
            let changed: Changed = client.post(&path, &nothing).await?;
            context.changed(&changed)
        }
        ServiceCommand::Trace(args) => {
            let answer: TraceView = client.get(&trace_path(&args)).await?;
            context.output.print(&answer, |out| trace(out, &answer))
        }
    }
}

fn trace_path(args: &TraceArgs) -> String {
    // What stands in an address needs no escape but these.
    let client = args.client.replace('[', "%5B").replace(']', "%5D");
    let plain = |c: char| c.is_ascii_alphanumeric() || "%:.".contains(c);
    let client: String = client.chars().filter(|c| plain(*c)).collect();
    let mut path = format!("/api/v1/services/{}/trace?client={client}", args.service);
    if let Some(port) = args.port {
        path.push_str(&format!("&port={port}"));
    }
    match args.protocol {
        Some(ProtocolArg::Tcp) => path.push_str("&protocol=tcp"),
        Some(ProtocolArg::Udp) => path.push_str("&protocol=udp"),
        None => {}
    }
    path
}

/// How a service stands whose definition was applied.
pub(crate) fn as_wanted(view: &ClusterView, name: &ServiceName) -> Standing {
    let Some(service) = view.services.iter().find(|of| of.name == *name) else {
        return Standing::Busy("not seen yet".to_owned());
    };
    let to_run = |member: &&MemberView| {
        let vm = view.vms.iter().find(|vm| vm.name == member.vm);
        vm.is_some_and(|vm| vm.power == Power::Running)
    };
    let members: Vec<&MemberView> = service.members.iter().filter(to_run).collect();
    if members.is_empty() {
        return Standing::Done("nobody serves it: none of its members is to run".to_owned());
    }
    if members.iter().any(|one| one.state == MemberState::Unknown) {
        return Standing::Busy("no leader answers".to_owned());
    }
    let serving = serving(service).0;
    let behind = members.iter().find(|member| {
        !matches!(
            member.state,
            MemberState::Serving
                | MemberState::Moving
                | MemberState::Draining
                | MemberState::Drained
        )
    });
    if let Some(member) = behind {
        let why = member.why.as_deref().unwrap_or("it does not serve yet");
        return Standing::HeldUp {
            state: format!("{serving} serving"),
            why: format!("{}: {why}", member.vm),
        };
    }
    if !service.problems.is_empty() {
        return Standing::HeldUp {
            state: "waiting".to_owned(),
            why: service.problems.join("; "),
        };
    }
    if service.epoch == 0 || service.preparing.is_some() {
        return Standing::Busy("its ring is being prepared".to_owned());
    }
    Standing::Done(format!("{serving} serving, held by {}", held_by(service)))
}

/// How a member that is being drained stands.
pub(crate) fn drained(view: &ClusterView, service: &ServiceName, vm: &VmName) -> Standing {
    let Some(of) = view.services.iter().find(|of| of.name == *service) else {
        return Standing::Failed("the service is gone".to_owned());
    };
    let Some(member) = of.members.iter().find(|member| member.vm == *vm) else {
        return Standing::Failed(format!("it is not a member of {service} any more"));
    };
    match member.state {
        MemberState::Drained => Standing::Done(match member.cut {
            None | Some(0) => "drained, no connection was cut".to_owned(),
            Some(cut) => format!("drained, {} cut at the time-out", count_of(cut)),
        }),
        MemberState::Draining if member.in_ring => {
            let why = member.why.clone().unwrap_or_default();
            Standing::Busy(format!("not yet out of the ring: {why}"))
        }
        MemberState::Draining => Standing::Busy(match member.flows {
            Some(flows) => format!("{} to go", count_of(flows)),
            None => "its connections end".to_owned(),
        }),
        MemberState::Unknown => Standing::Busy("no leader answers".to_owned()),
        _ => Standing::Failed("somebody resumed it".to_owned()),
    }
}

fn count_of(number: u64) -> String {
    count(usize::try_from(number).unwrap_or(usize::MAX), "connection")
}

/// All services.
pub(crate) fn list(out: &Output, services: &[ServiceView]) -> String {
    if services.is_empty() {
        return "No services yet: define one under `services:` and `quorate apply -f FILE`.".into();
    }
    let notes = services.iter().any(|service| !service.problems.is_empty());
    table(out, services, notes)
}

/// `notes`: with what is wrong.
pub(crate) fn table(out: &Output, services: &[ServiceView], notes: bool) -> String {
    let mut headings = vec!["SERVICE", "ADDRESS", "PORTS", "SERVING", "RING", "HELD BY"];
    if notes {
        headings.push("NOTE");
    }
    let mut table = out.table(&headings);
    for service in services {
        let (serving, tone) = serving(service);
        let ports: Vec<String> = service.spec.ports.iter().map(ToString::to_string).collect();
        let mut row = vec![
            cell(&service.name, Tone::Bold),
            cell(addresses(service), Tone::Plain),
            cell(ports.join(" "), Tone::Plain),
            cell(serving, tone),
            cell(ring(service), Tone::Plain),
            cell(held_by(service), Tone::Plain),
        ];
        if notes {
            row.push(cell(service.problems.join("; "), Tone::Warn));
        }
        table.add_row(row);
    }
    trimmed(&table)
}

fn addresses(service: &ServiceView) -> String {
    let all = service.spec.addresses();
    let all: Vec<String> = all.iter().map(ToString::to_string).collect();
    all.join(" ")
}

fn serving(service: &ServiceView) -> (String, Tone) {
    let serves =
        |member: &&MemberView| matches!(member.state, MemberState::Serving | MemberState::Moving);
    let (now, all) = (
        service.members.iter().filter(serves).count(),
        service.members.len(),
    );
    let unknown = service
        .members
        .iter()
        .any(|member| member.state == MemberState::Unknown);
    let tone = match now {
        _ if unknown => Tone::Dim,
        0 => Tone::Bad,
        _ if now == all => Tone::Good,
        _ => Tone::Warn,
    };
    match unknown {
        true => (format!("? of {all}"), tone),
        false => (format!("{now} of {all}"), tone),
    }
}

fn ring(service: &ServiceView) -> String {
    match (service.epoch, service.preparing) {
        (0, None) => "-".to_owned(),
        (epoch, None) => epoch.to_string(),
        (epoch, Some(next)) => format!("{epoch} > {next}"),
    }
}

fn held_by(service: &ServiceView) -> String {
    match &service.holder {
        Some(holder) => match &holder.leaving {
            Some(leaving) => format!("{leaving} > {}", holder.host),
            None => holder.host.to_string(),
        },
        None if service.spec.attractor.has_holder() => "nobody".to_owned(),
        None => "every host".to_owned(),
    }
}

/// One service in full.
pub(crate) fn page(out: &Output, service: &ServiceView, now: u64) -> String {
    let spec = &service.spec;
    let ports: Vec<String> = spec.ports.iter().map(ToString::to_string).collect();
    let affinity = match spec.affinity.kind {
        AffinityKind::None => "none: each connection by itself".to_owned(),
        AffinityKind::Source => "source: all connections of a client to one member".to_owned(),
        AffinityKind::Subnet => format!(
            "subnet: clients of one /{} (IPv6 /{}) to one member",
            spec.affinity.prefix, spec.affinity.prefix6
        ),
    };
    let timeout = spec.affinity.timeout;
    let affinity = match timeout {
        Some(timeout) => format!("{affinity}, remembered for {timeout}"),
        None => affinity,
    };
    let health = spec.health.as_ref().map(|health| {
        let port = spec
            .health_port()
            .map_or_else(String::new, |port| format!(" on port {port}"));
        let kind = format!("{:?}", health.kind).to_lowercase();
        format!(
            "{kind}{port} every {}, up after {} good, down after {} bad",
            health.interval, health.rise, health.fall
        )
    });
    let held = match &service.holder {
        Some(holder) => format!(
            "{} for {}",
            held_by(service),
            span(now.saturating_sub(holder.since.0))
        ),
        None => held_by(service),
    };
    let mut lines = vec![
        ("address", addresses(service)),
        ("ports", ports.join(", ")),
        ("network", spec.network.to_string()),
        ("attractor", spec.attractor.to_string()),
        ("virtual MAC", service.virtual_mac.clone()),
        ("held by", held),
        (
            "ring",
            format!("{} ({} slots)", ring(service), service.slots),
        ),
        ("affinity", affinity),
        (
            "health",
            health.unwrap_or_else(|| "its VM runs and is ready".to_owned()),
        ),
        (
            "drain",
            format!("connections are kept for {} at most", spec.drain_timeout),
        ),
    ];
    if !spec.limits.is_none() {
        lines.push(("limits", limits(spec.limits)));
    }
    let mut parts = vec![facts(out, &format!("Service {}", service.name), &lines)];
    for problem in &service.problems {
        parts.push(format!("  {} {problem}", out.paint(Tone::Warn, "!")));
    }
    parts.push(out.paint(Tone::Bold, "Members"));
    if service.members.is_empty() {
        parts.push("  none".to_owned());
    }
    parts.extend(
        service
            .members
            .iter()
            .map(|member| member_line(out, member, now)),
    );
    parts.push(out.paint(Tone::Bold, "Directors"));
    parts.extend(
        service
            .directors
            .iter()
            .map(|of| director_line(out, service, of)),
    );
    parts.join("\n")
}

fn limits(limits: Limits) -> String {
    let all = limits.new_per_member.map(|rate| format!("{rate} at most"));
    let one = limits
        .new_per_client
        .map(|rate| format!("{rate} of one client"));
    let parts: Vec<String> = all.into_iter().chain(one).collect();
    format!(
        "new connections in a second at each member: {}",
        parts.join(", ")
    )
}

fn member_state(member: &MemberView) -> (&'static str, Tone) {
    match member.state {
        MemberState::Serving => ("serving", Tone::Good),
        MemberState::Moving => ("serving, moving", Tone::Busy),
        MemberState::Fallback => ("in the ring for want of better", Tone::Bad),
        MemberState::Draining => ("draining", Tone::Busy),
        MemberState::Drained => ("drained", Tone::Dim),
        MemberState::Unhealthy => ("UNHEALTHY", Tone::Bad),
        MemberState::Down => ("down", Tone::Bad),
        MemberState::Joining => ("joining", Tone::Busy),
        MemberState::Unknown => ("unknown", Tone::Dim),
    }
}

fn member_line(out: &Output, member: &MemberView, now: u64) -> String {
    let (state, tone) = member_state(member);
    let mut notes = Vec::new();
    if let Some(host) = &member.host {
        notes.push(format!("on {host}"));
    }
    notes.extend(member.addresses.first().cloned());
    if member.weight != 1 {
        notes.push(format!("weight {}", member.weight));
    }
    if let Some(since) = member.draining_since {
        notes.push(format!("for {}", span(now.saturating_sub(since.0))));
    }
    if let Some(flows) = member.flows {
        notes.push(format!("{} to go", count_of(flows)));
    }
    if let Some(refused) = member.refused {
        notes.push(format!("{} refused by the limits", count_of(refused)));
    }
    if let Some(cut) = member.cut.filter(|cut| *cut > 0) {
        notes.push(format!("{} cut", count_of(cut)));
    }
    notes.extend(member.why.clone());
    format!(
        "  {:<12} {} {}",
        member.vm,
        out.paint(tone, state),
        out.paint(Tone::Dim, &format!("({})", notes.join(", ")))
    )
}

fn director_line(out: &Output, service: &ServiceView, of: &DirectorView) -> String {
    let (mark, tone, text) = match (of.active, &of.problem) {
        (_, Some(problem)) => ("✗", Tone::Bad, problem.clone()),
        (None, None) => ("?", Tone::Dim, "does not steer".to_owned()),
        (Some(epoch), None) => {
            let mut text = format!("steers by ring {epoch}");
            if let Some(next) = of.prepared.filter(|next| *next > epoch) {
                text.push_str(&format!(", holds ring {next}"));
            }
            match of.uplink.as_deref() {
                Some("driver") => text.push_str(", in the network driver"),
                Some("generic") => text.push_str(", in the kernel's generic hook (slower)"),
                Some("none") => text.push_str(", no uplink"),
                Some(problem) => text.push_str(&format!(", uplink: {problem}")),
                None => {}
            }
            if of.holding {
                text.push_str(", answers for the address");
            }
            let tone = match epoch == service.epoch {
                true => Tone::Good,
                false => Tone::Busy,
            };
            ("✓", tone, text)
        }
    };
    format!("  {} {} {text}", out.paint(tone, mark), of.host)
}

/// Which member a client gets.
pub(crate) fn trace(out: &Output, answer: &TraceView) -> String {
    let client = match answer.client_port {
        Some(port) => std::net::SocketAddr::new(answer.client, port).to_string(),
        None => answer.client.to_string(),
    };
    let to = format!(
        "{} port {}/{}",
        answer.service, answer.port, answer.protocol
    );
    let verdict = match (&answer.member, &answer.host) {
        (Some(member), Some(host)) => out.paint(Tone::Good, &format!("{member} on {host}")),
        (Some(member), None) => out.paint(Tone::Warn, &format!("{member}, which no host runs")),
        (None, _) => out.paint(Tone::Bad, "nobody"),
    };
    let mut lines = vec![format!("{client} to {to}: {verdict}")];
    lines.extend(answer.why.iter().map(|step| format!("  {step}")));
    lines.join("\n")
}
