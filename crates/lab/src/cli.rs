//! `quorate lab ...` and the hidden `quorate lab-tool ...`.
//!
//! The daemon wires [`LabArgs`] and [`ToolCommand`] into its own command line.

use crate::faults::Link;
use crate::fence_agent::{self, Bmc};
use crate::lab::{Lab, LabStatus};
use crate::san::cli::SanCommand;
use crate::san::{self, KeepSanArgs, keep};
use crate::site::{DEFAULT_ROOT, DEFAULT_SITE, Networks, SAN, SiteSpec};
use crate::supervisor::protocol::{Power, Request, Who};
use crate::supervisor::{SuperviseArgs, supervise};
use crate::switch::SwitchSettings;
use crate::tools::{acks, capture, http, impostor, load, pinger, status};
use crate::{demo, guest};
use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use comfy_table::{Table, presets};
use std::path::PathBuf;
use std::process::ExitCode;

/// A lab: a whole cluster on this machine, for trying things out. Needs root.
#[derive(Debug, Args)]
pub struct LabArgs {
    /// Name of the lab; several can be up at the same time.
    #[arg(long, default_value = DEFAULT_SITE, global = true)]
    pub site: String,
    /// Where labs keep their files.
    #[arg(long, default_value = DEFAULT_ROOT, global = true, hide = true)]
    pub root: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub command: LabCommand,
}

/// What to do with a lab.
#[derive(Debug, Subcommand)]
pub enum LabCommand {
    /// Bring up hosts, a switch and a client, and form a cluster.
    Up {
        /// Number of hosts, 1 to 9.
        #[arg(long, default_value_t = 3)]
        hosts: u32,
        /// One network for cluster traffic and guests.
        #[arg(long)]
        single_network: bool,
        /// With a SAN (iSCSI) on a network of its own.
        #[arg(long)]
        san: bool,
        /// Only the machines: the hosts stay off, no cluster is formed.
        #[arg(long)]
        bare: bool,
        /// Cluster settings for `quorate init`.
        #[arg(long)]
        settings: Option<PathBuf>,
        /// Another daemon than this program.
        #[arg(long, hide = true)]
        daemon: Option<PathBuf>,
        /// Start a host again this many milliseconds after its watchdog ended it.
        #[arg(long)]
        reboot_after_ms: Option<u64>,
    },
    /// Take it down and remove everything, whatever state it is in.
    Down {
        /// All labs.
        #[arg(long)]
        all: bool,
    },
    /// Hosts, power, processes, cut cables.
    Status,
    /// Run a command on a host (h1, h2, ..., client or san), for example `exec h1 quorate status`.
    Exec {
        /// The host, `client` or `san`.
        host: String,
        /// The command; a shell when absent.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Cut the power of a host (all of its processes end at one instant) or of the SAN.
    Kill {
        /// The host, or `san`.
        host: String,
        /// Only these processes; the power stays on.
        #[arg(long, value_enum, default_value_t)]
        only: Who,
    },
    /// Power a host or the SAN on.
    Start {
        /// The host, or `san`.
        host: String,
    },
    /// Cut the cable between two parts (hosts, client or san); with one, cut it from everything.
    Cut {
        /// One end; `cut h1 san` cuts the host's path to the SAN.
        from: String,
        /// The other end; absent: everything else.
        to: Option<String>,
        /// Which network.
        #[arg(long, value_enum, default_value_t)]
        network: Link,
        /// Only frames from the first to the second.
        #[arg(long, requires = "to")]
        one_way: bool,
        /// Lose 30 % of the frames instead of all.
        #[arg(long, conflicts_with_all = ["to", "one_way"])]
        lossy: bool,
    },
    /// Limit how much the cables of a part (host or san) carry, each way.
    Slow {
        /// The host, or `san`.
        part: String,
        /// Which network; `slow h1 --network san` slows the host's path to the SAN.
        #[arg(long, value_enum, default_value_t)]
        network: Link,
        /// Kilobits per second; at 512 a write of 4 KiB to the SAN takes about 70 ms.
        #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(8..))]
        kbit_per_s: u32,
    },
    /// Set up a network of the switch: without options as it is at first.
    Switch {
        /// Which network: lan, mgmt or san.
        #[arg(default_value = "lan")]
        network: String,
        /// How long it remembers on which port an address is.
        #[arg(long, default_value_t = 300)]
        ageing_s: u32,
        /// It delivers multicast only to ports that asked for it.
        #[arg(long)]
        snooping: bool,
        /// It asks who wants multicast.
        #[arg(long)]
        querier: bool,
    },
    /// Mend all cables.
    Heal,
    /// LUNs of the lab's SAN and who may use them.
    #[command(subcommand)]
    San(SanCommand),
    /// Stop processes of a host, or the SAN (SIGSTOP).
    Pause {
        /// The host, or `san`.
        host: String,
        /// Which.
        #[arg(long, value_enum, default_value_t)]
        only: Who,
    },
    /// Let paused processes go on.
    Resume {
        /// The host, or `san`.
        host: String,
        /// Which.
        #[arg(long, value_enum, default_value_t)]
        only: Who,
    },
    /// Restart a host's daemon; its guests must not notice.
    RestartDaemon {
        /// The host.
        host: String,
        /// With SIGKILL.
        #[arg(long)]
        hard: bool,
    },
    /// Make a host's power switch (as the fence agent sees it) slow, unreachable or lying; without options: healthy.
    Bmc {
        /// The host.
        host: String,
        /// Every action takes this much longer.
        #[arg(long, default_value_t = 0)]
        delay_ms: u64,
        /// It never answers.
        #[arg(long)]
        unreachable: bool,
        /// It says that it has switched off and has not.
        #[arg(long)]
        ignores_off: bool,
    },
    /// Judge the disk image, or the LUN, of a lab guest: lost, torn or doubly written records.
    Verify {
        /// A raw image; `lun:NAME` for a LUN of the lab's SAN.
        image: PathBuf,
    },
    /// The tour: migrate, drain, kill, cut and restart, each with a measurement.
    Demo(demo::DemoArgs),
}

/// Programs that the lab starts; not for users.
#[derive(Debug, Subcommand)]
pub enum ToolCommand {
    /// The stand-in for a host's hardware.
    Supervise(SuperviseArgs),
    /// The SAN.
    KeepSan(KeepSanArgs),
    /// `fence_lab`.
    FenceAgent,
    /// Measures blackouts.
    Pinger(pinger::PingerArgs),
    /// Holds connections to a service and judges them.
    Load(load::LoadArgs),
    /// Notes who speaks with virtual MAC addresses of services.
    Capture(capture::CaptureArgs),
    /// Claims an address that is not its own.
    Impostor(impostor::ImpostorArgs),
    /// Records acknowledgements.
    Acks(acks::AcksArgs),
    /// Asks a guest's web server for a page.
    Visitor(http::HttpArgs),
    /// Asks a guest how it is.
    GuestStatus(status::StatusArgs),
}

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// Runs `quorate lab-tool`.
pub fn run_tool(command: &ToolCommand) -> Result<ExitCode> {
    match command {
        ToolCommand::Supervise(args) => supervise(args)?,
        ToolCommand::KeepSan(args) => keep(args)?,
        ToolCommand::FenceAgent => return Ok(fence_agent::run(std::io::stdin()).into()),
        ToolCommand::Pinger(args) => {
            let report = pinger::run(args).context("cannot ping")?;
            println!("{}", serde_json::to_string(&report)?);
        }
        ToolCommand::Visitor(args) => println!("{}", serde_json::to_string(&http::run(args))?),
        ToolCommand::Load(args) => {
            let report = load::run(args).context("cannot hold connections")?;
            println!("{}", serde_json::to_string(&report)?);
        }
        ToolCommand::Capture(args) => {
            let report = capture::run(args).context("cannot capture")?;
            println!("{}", serde_json::to_string(&report)?);
        }
        ToolCommand::Impostor(args) => {
            let report = impostor::run(args).context("cannot claim the address")?;
            println!("{}", serde_json::to_string(&report)?);
        }
        ToolCommand::GuestStatus(args) => {
            println!(
                "{}",
                status::run(args).context("the guest does not answer")?
            );
        }
        ToolCommand::Acks(args) => println!("{}", serde_json::to_string(&acks::run(args))?),
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs `quorate lab`.
pub fn run(args: &LabArgs, output: Output) -> Result<ExitCode> {
    match &args.command {
        LabCommand::Up { .. } => up(args, output)?,
        LabCommand::Down { all } => down(args, *all)?,
        LabCommand::Verify { image } => return verify(args, image, output),
        LabCommand::San(command) => {
            san::cli::run(&Lab::open(&args.root, &args.site)?, command, output)?;
        }
        LabCommand::Demo(demo) => return demo::run(demo),
        LabCommand::Exec { host, command } => return exec(args, host, command),
        other => {
            let lab = Lab::open(&args.root, &args.site)?;
            act(&lab, other)?;
            if matches!(other, LabCommand::Status) {
                show(&lab.status()?, output)?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn up(args: &LabArgs, output: Output) -> Result<()> {
    let LabCommand::Up {
        hosts,
        single_network,
        san,
        bare,
        settings,
        daemon,
        reboot_after_ms,
    } = &args.command
    else {
        return Ok(());
    };
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut spec = SiteSpec::new(&program);
    spec.site.clone_from(&args.site);
    spec.root.clone_from(&args.root);
    spec.hosts = *hosts;
    spec.san = *san;
    spec.reboot_after_ms = *reboot_after_ms;
    if let Some(path) = daemon {
        spec.daemon = vec![path.to_string_lossy().into_owned()];
    }
    if *single_network {
        spec.networks = Networks::Single;
    }
    let (root, site) = (args.root.clone(), args.site.clone());
    let already = crate::site::Site::load(&root, &site).is_ok();
    let _cleanup = crate::on_interrupt(move || {
        if !already {
            let _ = Lab::remove(&root, &site);
        }
    });
    let lab = Lab::up(spec)?;
    if !bare {
        lab.form_cluster(&args.site, settings.as_deref()).with_context(|| {
            format!(
                "the machines are up, the cluster is not; look into {}, then `quorate lab down`",
                lab.site().dir.display()
            )
        })?;
    }
    show(&lab.status()?, output)
}

fn down(args: &LabArgs, all: bool) -> Result<()> {
    if !rustix::process::getuid().is_root() {
        return Err(crate::LabError::NotRoot.into());
    }
    let names = if all {
        Lab::all(&args.root)
    } else {
        vec![args.site.clone()]
    };
    for name in names {
        Lab::remove(&args.root, &name)?;
    }
    Ok(())
}

fn act(lab: &Lab, command: &LabCommand) -> Result<()> {
    match command {
        LabCommand::Kill { host, .. } if host == SAN => lab.san()?.kill()?,
        LabCommand::Start { host } if host == SAN => lab.san()?.start()?,
        LabCommand::Pause { host, .. } if host == SAN => lab.san()?.pause()?,
        LabCommand::Resume { host, .. } if host == SAN => lab.san()?.resume()?,
        LabCommand::Slow {
            part,
            network,
            kbit_per_s,
        } => lab.slow(part, *network, *kbit_per_s)?,
        LabCommand::Kill {
            host,
            only: Who::All,
        } => drop(lab.kill(host)?),
        LabCommand::Kill { host, only } => drop(lab.ask(host, &Request::Kill { who: *only })?),
        LabCommand::Start { host } => drop(lab.start(host)?),
        LabCommand::Cut {
            from,
            to: Some(to),
            network,
            one_way,
            ..
        } => {
            lab.cut(from, to, *network, *one_way)?;
        }
        LabCommand::Cut {
            from,
            network,
            lossy: true,
            ..
        } => lab.make_lossy(from, *network)?,
        LabCommand::Cut { from, network, .. } => lab.isolate(from, *network)?,
        LabCommand::Heal => lab.heal()?,
        LabCommand::Switch {
            network,
            ageing_s,
            snooping,
            querier,
        } => lab.set_switch(
            network,
            SwitchSettings {
                ageing_s: *ageing_s,
                snooping: *snooping,
                querier: *querier,
            },
        )?,
        LabCommand::Pause { host, only } => drop(lab.pause(host, *only)?),
        LabCommand::Resume { host, only } => drop(lab.resume(host, *only)?),
        LabCommand::RestartDaemon { host, hard } => drop(lab.restart_daemon(host, *hard)?),
        LabCommand::Bmc {
            host,
            delay_ms,
            unreachable,
            ignores_off,
        } => {
            let bmc = Bmc {
                delay_ms: *delay_ms,
                unreachable: *unreachable,
                ignores_off: *ignores_off,
            };
            bmc.set(lab.site(), host)?;
        }
        _ => {}
    }
    Ok(())
}

fn exec(args: &LabArgs, host: &str, command: &[String]) -> Result<ExitCode> {
    let lab = Lab::open(&args.root, &args.site)?;
    lab.site().check_part(host)?;
    let path = format!(
        "{}:{}",
        lab.site().bin_dir().display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let shell = [std::env::var("SHELL").unwrap_or_else(|_| "sh".to_owned())];
    let (program, rest) = if command.is_empty() {
        (&shell[0], &[][..])
    } else {
        (&command[0], &command[1..])
    };
    let status = lab
        .command(host, program)
        .args(rest)
        .env("PATH", path)
        .status()
        .context("cannot run nsenter: install the lab's packages with `make deps`")?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}

fn verify(args: &LabArgs, image: &std::path::Path, output: Output) -> Result<ExitCode> {
    let lun = image.to_str().and_then(|name| name.strip_prefix("lun:"));
    let verdict = match lun {
        Some(name) => {
            Lab::open(&args.root, &args.site)?.judge_lun(name, &acks::AckReport::default())?
        }
        None => guest::judge(image, &acks::AckReport::default())?,
    };
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&verdict)?),
        Output::Table => {
            println!(
                "guest {}: records {} to {}, {} boots",
                verdict.name,
                verdict.first,
                verdict.last,
                verdict.boots.len()
            );
            for finding in &verdict.findings {
                println!("  {finding}");
            }
        }
    }
    if !verdict.good() {
        bail!("{} findings in {}", verdict.findings.len(), image.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn show(status: &LabStatus, output: Output) -> Result<()> {
    if output == Output::Json {
        println!("{}", serde_json::to_string_pretty(status)?);
        return Ok(());
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header([
        "HOST", "POWER", "ADDRESS", "DAEMON", "GUESTS", "PAUSED", "WATCHDOG",
    ]);
    for host in &status.hosts {
        let Some(now) = &host.status else {
            let error = host.error.as_deref().unwrap_or("unknown");
            table.add_row([host.name.as_str(), error]);
            continue;
        };
        let power = match now.power {
            Power::On => "on",
            Power::Off => "off",
            Power::Dead => "dead",
        };
        table.add_row([
            host.name.clone(),
            power.to_owned(),
            host.address.clone(),
            now.daemon_pid.map_or("-".to_owned(), |pid| pid.to_string()),
            now.guests.to_string(),
            now.paused.to_string(),
            now.watchdog_ms
                .map_or("not armed".to_owned(), |limit| format!("{limit} ms")),
        ]);
    }
    println!("{table}");
    if let Some(san) = &status.san {
        println!("{}", san::cli::summary(san));
    }
    for cut in &status.cuts {
        println!("cut: {} -> {} on {}", cut.from, cut.to, cut.network);
    }
    for (network, part) in &status.slow {
        println!("slow: {part} on {network}");
    }
    println!("files: {}", status.dir);
    Ok(())
}
