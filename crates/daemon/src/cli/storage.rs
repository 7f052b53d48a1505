//! `storage`: pools in full. Pages are pure: data in, text out.

use super::Context;
use super::copies::{self, CopiesCommand};
use super::error::CliError;
use super::output::{Output, Tone, bytes, cell, span, trimmed};
use super::reservation::{self, DeviceArgs};
use super::show::{facts, time};
use super::take::{self, TakeArgs};
use clap::{Args, Subcommand, ValueHint};
use jiff::tz::TimeZone;
use quorate_api::storage::{
    DrillRequest, DrillView, ImageState, ImageView, StorageHostView, StorageView,
};
use quorate_types::{Opener, PoolName, PoolSpec};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum StorageCommand {
    /// All pools: kind, space, who reaches them, what they can prove.
    List,
    /// One pool in full, with its images as a host sees them now.
    Show {
        /// Which.
        name: PoolName,
    },
    /// Copies of disks of the hosts' own pools: show them, or decide which one counts.
    #[command(subcommand)]
    Copies(CopiesCommand),
    /// The SCSI-3 reservation keys on a LUN of this host's kernel: who may write it. Changes nothing.
    Keys(DeviceArgs),
    /// Take a unit of a pool from strangers whose reservations are on it: shows who they are; with --force the next start of
    /// its VM pushes those out, and no others.
    Take(TakeArgs),
    /// Try whether a pool's SAN shuts an initiator out when told; or, of a scratch LUN of this host's
    /// kernel, which proof its reservations can give. Data stays as it is.
    Drill(DrillArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DrillArgs {
    /// The pool whose SAN is tried.
    #[arg(required_unless_present = "device")]
    pool: Option<PoolName>,
    /// The unit of the pool that it is tried on; absent: the first disk of any VM. Where units decide by reservations, one
    /// that no VM has.
    #[arg(long, requires = "pool")]
    image: Option<String>,
    /// Instead of a pool a block device of this host: its reservations are tried. One that somebody is registered on
    /// is refused.
    #[arg(long, value_hint = ValueHint::FilePath, conflicts_with = "pool")]
    device: Option<PathBuf>,
}

pub(crate) async fn run(context: &Context, command: StorageCommand) -> Result<(), CliError> {
    match command {
        StorageCommand::Copies(command) => copies::run(context, command).await,
        StorageCommand::Keys(args) => reservation::keys(&context.output, &args).await,
        StorageCommand::Drill(args) => drill(context, args).await,
        StorageCommand::Take(args) => take::run(context, args).await,
        StorageCommand::List => {
            let pools: Vec<StorageView> = context.client.get("/api/v1/pools").await?;
            context.output.print(&pools, |out| list(out, &pools))
        }
        StorageCommand::Show { name } => {
            let path = format!("/api/v1/pools/{name}");
            let pool: StorageView = context.client.get(&path).await?;
            let zone = TimeZone::system();
            context
                .output
                .print(&pool, |out| page(out, &pool, &zone, super::now_ms()))
        }
    }
}

async fn drill(context: &Context, args: DrillArgs) -> Result<(), CliError> {
    let Some(pool) = args.pool else {
        let device = DeviceArgs::of(args.device.unwrap_or_default());
        return reservation::drill(&context.output, &device).await;
    };
    let path = format!("/api/v1/pools/{pool}/drill");
    let request = DrillRequest { image: args.image };
    let drill: DrillView = context.client.post(&path, &request).await?;
    let zone = TimeZone::system();
    context
        .output
        .print(&drill, |out| drill_page(out, &drill, &zone))?;
    match drill.passed {
        true => Ok(()),
        false => Err(CliError::Failed(format!(
            "the drill of pool {pool} failed: {}",
            drill
                .steps
                .last()
                .map_or("nothing was tried", String::as_str)
        ))),
    }
}

pub(crate) fn list(out: &Output, pools: &[StorageView]) -> String {
    if pools.is_empty() {
        return "No pools yet: define one under `pools:` and `quorate apply -f FILE`.".to_owned();
    }
    let mut table = out.table(&[
        "POOL",
        "KIND",
        "HOSTS",
        "FREE",
        "LATENCY",
        "CUT PROOF",
        "VMS",
    ]);
    for pool in pools {
        let up = pool.hosts.iter().filter(|host| host.usable == Some(true));
        let (up, all) = (up.count(), pool.hosts.len());
        let tone = match up {
            _ if up == all => Tone::Good,
            0 => Tone::Bad,
            _ => Tone::Warn,
        };
        let space = match (pool.free, pool.total) {
            (Some(free), Some(total)) => format!("{} of {}", bytes(free), bytes(total)),
            _ => "-".to_owned(),
        };
        let latency = pool.hosts.iter().filter_map(|host| host.latency_us).max();
        let proof = match (&pool.fence.by, pool.cuts.is_empty()) {
            (Some(by), true) => cell(by, Tone::Good),
            (Some(by), false) => cell(format!("{by}, {} cut", pool.cuts.len()), Tone::Warn),
            (None, _) => cell("none", Tone::Dim),
        };
        table.add_row([
            cell(&pool.name, Tone::Bold),
            cell(&pool.kind, Tone::Plain),
            cell(format!("{up} of {all}"), tone),
            cell(space, Tone::Plain),
            cell(latency.map_or("-".to_owned(), micros), Tone::Plain),
            proof,
            cell(pool.vms.len(), Tone::Plain),
        ]);
    }
    trimmed(&table)
}

pub(crate) fn page(out: &Output, pool: &StorageView, zone: &TimeZone, now: u64) -> String {
    let space = match (pool.free, pool.total) {
        (Some(free), Some(total)) => format!("{} free of {}", bytes(free), bytes(total)),
        _ => String::new(),
    };
    let secrets = pool.secrets.iter().map(|secret| match secret.known {
        true => secret.name.to_string(),
        false => format!(
            "{} (not set: `quorate secret set {}`)",
            secret.name, secret.name
        ),
    });
    let secrets = secrets.collect::<Vec<_>>().join(", ");
    let mut lines = vec![("kind", pool.kind.clone())];
    lines.extend(place(&pool.spec));
    lines.extend([
        ("secrets", secrets),
        ("space", space),
        ("cut proof", proof(out, pool)),
        ("recovery", pool.fence.meaning.clone()),
    ]);
    if pool.fence.proof.is_some() {
        lines.push((
            "drill",
            match &pool.drill {
                Some(drill) => drill_page(out, drill, zone),
                None => {
                    let units = pool.fence.by.as_deref() == Some("reservation");
                    let scratch = if units { " --image SCRATCH" } else { "" };
                    format!(
                        "not made yet: `quorate storage drill {}{scratch}`",
                        pool.name
                    )
                }
            },
        ));
    }
    let mut parts = vec![facts(out, &format!("Pool {}", pool.name), &lines)];
    parts.push(out.paint(Tone::Bold, "Hosts"));
    for host in &pool.hosts {
        parts.push(host_line(out, host, now));
    }
    if !pool.cuts.is_empty() {
        parts.push(out.paint(Tone::Bold, "Shut out at the SAN"));
    }
    for cut in &pool.cuts {
        let at = cut
            .at
            .map_or_else(String::new, |at| format!(" since {}", time(at, zone)));
        let text = format!("{}{at} (revision {})", cut.host, cut.revision);
        parts.push(format!("  {}", out.paint(Tone::Warn, &text)));
    }
    parts.extend(take::section(out, pool, zone));
    match (&pool.images, &pool.images_problem) {
        (Some(found), _) if found.is_empty() => parts.push("No images.".to_owned()),
        (Some(found), _) => parts.push(images(out, None, found)),
        (None, Some(problem)) => {
            let text = format!("Its images cannot be seen: {problem}");
            parts.push(out.paint(Tone::Bad, &text));
        }
        (None, None) => {}
    }
    parts.join("\n")
}

/// What came of a drill.
pub(crate) fn drill_page(out: &Output, drill: &DrillView, zone: &TimeZone) -> String {
    let verdict = match drill.passed {
        true => out.paint(Tone::Good, "passed"),
        false => out.paint(Tone::Bad, "failed"),
    };
    let mut lines = vec![format!(
        "{verdict} on {} at {}",
        drill.image,
        time(drill.at, zone)
    )];
    lines.extend(drill.steps.iter().map(|step| format!("  {step}")));
    lines.join("\n")
}

fn proof(out: &Output, pool: &StorageView) -> String {
    match (&pool.fence.proof, &pool.fence.by) {
        (Some(proof), Some(by)) => out.paint(Tone::Good, &format!("{proof}, by {by}")),
        (Some(proof), None) => out.paint(Tone::Good, proof),
        (None, _) => out.paint(Tone::Warn, "none"),
    }
}

fn resync(mib_per_s: u64) -> String {
    match mib_per_s {
        0 => "as fast as it goes".to_owned(),
        speed => format!("{speed} MiB/s"),
    }
}

/// Where the pool is.
fn place(spec: &PoolSpec) -> Vec<(&'static str, String)> {
    match spec {
        PoolSpec::Directory { path, .. } => vec![("path", path.clone())],
        PoolSpec::Iscsi(pool) => {
            let portals: Vec<String> = pool.portals().collect();
            let user = pool.chap.as_ref().map(|chap| chap.user.clone());
            let opener = match pool.opened_by {
                Opener::Qemu => "QEMU",
                Opener::Kernel => "the host's kernel (open-iscsi)",
            };
            vec![
                ("portals", portals.join(", ")),
                ("targets", format!("{}:NAME", pool.target)),
                ("chap user", user.unwrap_or_default()),
                ("opened by", opener.to_owned()),
            ]
        }
        PoolSpec::Block(pool) => vec![
            ("path", pool.path.clone()),
            (
                "reservations",
                if pool.reservations { "yes" } else { "no" }.to_owned(),
            ),
        ],
        PoolSpec::Rbd(pool) => vec![
            ("ceph pool", pool.ceph_pool.clone()),
            ("ceph user", pool.user.clone()),
        ],
        PoolSpec::Local(pool) => vec![("path on each host", pool.path.clone())],
        PoolSpec::Mirrored(pool) => vec![
            ("path on each host", pool.path.clone()),
            ("resync", resync(pool.resync_mib_per_s)),
        ],
    }
}

fn host_line(out: &Output, host: &StorageHostView, now: u64) -> String {
    let since = host.since.map_or_else(String::new, |since| {
        format!(" for {}", span(now.saturating_sub(since.0)))
    });
    let (mark, tone, text) = match host.usable {
        Some(true) => {
            let latency = host
                .latency_us
                .map(|latency| format!(", {}", micros(latency)));
            let text = format!("reaches it{since}{}", latency.unwrap_or_default());
            ("✓", Tone::Good, text)
        }
        Some(false) => {
            let why = host
                .problem
                .clone()
                .unwrap_or_else(|| "it cannot be used".to_owned());
            ("✗", Tone::Bad, format!("cannot use it{since}: {why}"))
        }
        None => ("?", Tone::Dim, "not heard".to_owned()),
    };
    format!("  {} {} {text}", out.paint(tone, mark), host.host)
}

/// `0.4 ms`, `12 ms`.
fn micros(micros: u64) -> String {
    match micros {
        0..10_000 => format!("{}.{} ms", micros / 1000, micros % 1000 / 100),
        _ => format!("{} ms", micros / 1000),
    }
}

/// Images as a table; `pool` is the first column where it is given.
pub(crate) fn images(out: &Output, pool: Option<&PoolName>, images: &[ImageView]) -> String {
    let mut table = out.table(&["IMAGE", "SIZE", "TAKES", "FORMAT", "STATE", "VMS"]);
    for image in images {
        let name = match pool {
            Some(pool) => format!("{pool}/{}", image.image),
            None => image.image.clone(),
        };
        let (state, tone) = match image.state {
            ImageState::Used => ("used", Tone::Good),
            ImageState::Unused => ("unused", Tone::Dim),
            ImageState::Missing => ("MISSING", Tone::Bad),
            ImageState::Planned => ("made at first start", Tone::Busy),
            ImageState::Broken => ("BROKEN", Tone::Bad),
        };
        let state = match &image.problem {
            Some(problem) => format!("{state}: {problem}"),
            None => state.to_owned(),
        };
        let size = |of: Option<u64>| of.map_or("-".to_owned(), bytes);
        let vms: Vec<&str> = image.vms.iter().map(|vm| vm.as_str()).collect();
        table.add_row([
            cell(name, Tone::Bold),
            cell(size(image.size), Tone::Plain),
            cell(size(image.allocated), Tone::Plain),
            cell(image.format.as_deref().unwrap_or("-"), Tone::Plain),
            cell(state, tone),
            cell(
                if vms.is_empty() {
                    "-".to_owned()
                } else {
                    vms.join(" ")
                },
                Tone::Plain,
            ),
        ]);
    }
    trimmed(&table)
}
