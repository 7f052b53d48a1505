//! The command line's grammar.

use super::plan::Thens;
use super::when::When;
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use quorate_types::{
    HostName, LabelName, Millis, NetworkName, PoolName, RuleName, ServiceName, VmName,
};
use std::path::PathBuf;

/// Where the daemon keeps its state unless told otherwise.
pub(crate) const DEFAULT_DIR: &str = "/var/lib/quorate";

/// Help of `quorate` itself, with the commands in groups. A test holds it against the grammar.
const TEMPLATE: &str = "\
{about}.

{usage-heading} {usage}

\x1b[1mLook\x1b[0m
  status       The cluster on one page; --watch keeps it up to date
  events       What happened; --follow goes on
  explain      Why a VM is where it is, or was
  plan         What would happen if a host failed, were drained, ...
  capacity     How many failures are survived, and how
  state        save: keep what decisions rest on, for questions later
  quorum       show, recommend, set: votes, and what they survive

\x1b[1mChange\x1b[0m
  apply        Make what a manifest says hold
  diff         What an apply would change
  delete       Forget a VM, pool, network, rule or service
  vm           list, show, start, stop, migrate, cancel, console, logs
  host         list, show, drain, resume, label, fence, confirm-dead, remove
  service      list, show, drain, resume, trace: addresses over many VMs
  storage      list, show, copies, keys, take, drill: pools, their images, who may write a LUN
  image        list, import, export, clone, resize, snapshot, delete, jobs
  secret       set, list, delete: passwords that pools name

\x1b[1mSet up\x1b[0m
  init         Make a cluster with this host as its first
  token        Make a join token for another host
  join         Make this host a member of a cluster
  witness      join, serve: a third vote on any machine, for two hosts
  import       A manifest from another cluster manager's configuration
  serve        Run this host's daemon
  lab          A whole cluster on one machine, to play with
  completion   Completion script for a shell

\x1b[1mOptions\x1b[0m
{options}

\x1b[1mExit status\x1b[0m
  0  done                     3  the daemon cannot be reached
  1  failed or refused        4  timed out while waiting
  2  wrong usage or bad input

`quorate COMMAND --help` says more about each command.
";

/// Keeps virtual machines running on a cluster of hosts.
#[derive(Debug, Parser)]
#[command(name = "quorate", bin_name = "quorate", version, help_template = TEMPLATE)]
#[command(
    disable_help_subcommand = true,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Directory of this host's state and of the daemon's socket.
    #[arg(long, global = true, env = "QUORATE_DIR", default_value = DEFAULT_DIR, value_name = "DIR", hide_env_values = true, display_order = 900)]
    pub(crate) dir: PathBuf,
    /// How results are printed.
    #[arg(long, short, global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT", display_order = 901)]
    pub(crate) output: Format,
    /// No colours (also: the variable NO_COLOR).
    #[arg(long, global = true, display_order = 902)]
    pub(crate) no_color: bool,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    // No doc comments: with them the help of every command is twice as long.
    Table,
    Json,
    Yaml,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The cluster on one page.
    Status(StatusArgs),
    /// What happened.
    Events(EventsArgs),
    /// Why a VM is where it is.
    #[command(subcommand)]
    Explain(ExplainCommand),
    /// What would happen if a host failed, were drained, if a manifest were applied. Changes nothing.
    Plan(PlanArgs),
    /// How many failures the cluster survives: a restart plan for each host, and what breaks it.
    Capacity(CapacityArgs),
    /// What decisions rest on, as a file.
    #[command(subcommand)]
    State(StateCommand),
    /// Votes: who has one, how many failures are survived, which witness helps.
    #[command(subcommand)]
    Quorum(QuorumCommand),
    /// Make what a manifest says hold: all of it or nothing.
    Apply(ApplyArgs),
    /// What an apply would change.
    Diff(DiffArgs),
    /// Forget a VM, pool, network, rule or service. Disk images stay.
    #[command(subcommand)]
    Delete(DeleteCommand),
    /// Virtual machines.
    #[command(subcommand)]
    Vm(VmCommand),
    /// Hosts.
    #[command(subcommand)]
    Host(HostCommand),
    /// Services: one address over many VMs.
    #[command(subcommand)]
    Service(super::service::ServiceCommand),
    /// Storage pools: who reaches them, what they can prove, their images.
    #[command(subcommand)]
    Storage(super::storage::StorageCommand),
    /// Disk images: in, out, copies, more room, snapshots.
    #[command(subcommand)]
    Image(super::image::ImageCommand),
    /// Passwords that pools name: of targets, of arrays.
    #[command(subcommand)]
    Secret(super::secret::SecretCommand),
    /// A manifest from another cluster manager's configuration.
    #[command(subcommand)]
    Import(super::import::ImportCommand),
    /// Make a cluster with this host as its first.
    Init(InitArgs),
    /// Join tokens.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Make this host a member of a cluster.
    Join(JoinArgs),
    /// A third vote without a host behind it, on any machine. It runs no VM and counts as no host.
    #[command(subcommand)]
    Witness(WitnessCommand),
    /// Run this host's daemon.
    Serve,
    /// A whole cluster on one machine, to play with.
    Lab(quorate_lab::cli::LabArgs),
    /// Completion script for a shell.
    Completion {
        /// The shell.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Manual pages, one file for each command.
    #[command(hide = true)]
    Man {
        /// Directory for the pages; absent: the first page on standard output.
        #[arg(long, value_name = "DIR")]
        to: Option<PathBuf>,
    },
    /// Tools that the lab runs inside its namespaces.
    #[command(subcommand, hide = true)]
    LabTool(quorate_lab::cli::ToolCommand),
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Keep it up to date until Ctrl-C.
    #[arg(long, short)]
    pub(crate) watch: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Go on with what happens until Ctrl-C.
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Only this many of the newest to begin with.
    #[arg(long, short = 'n', default_value_t = 50, value_name = "COUNT")]
    pub(crate) lines: usize,
    /// Only events about this, such as `vm/db` or `host/h1`.
    #[arg(long, value_name = "SUBJECT")]
    pub(crate) about: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ExplainCommand {
    /// A VM: its state, the latest decisions with their reasons, what it waits for.
    Vm {
        /// Which.
        name: VmName,
        /// Where it was then, and why: `2026-03-01 14:30`, `14:30`, or `20m` ago.
        #[arg(long, value_name = "TIME")]
        at: Option<When>,
        #[command(flatten)]
        saved: SavedArgs,
    },
}

/// Ask a saved state instead of the cluster.
#[derive(Debug, Clone, Args)]
pub(crate) struct SavedArgs {
    /// Ask a file that `quorate state save` made instead of the cluster.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) state: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// These hosts fail, all at once. Can be given more than once.
    #[arg(long, value_name = "HOST", value_delimiter = ',')]
    pub(crate) fail: Vec<HostName>,
    /// These hosts are drained.
    #[arg(long, value_name = "HOST", value_delimiter = ',')]
    pub(crate) drain: Vec<HostName>,
    /// This manifest is applied, before anything else.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) apply: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) then: Thens,
    #[command(flatten)]
    pub(crate) cib: super::cib::CibArgs,
    /// Which live migrations would even out load.
    #[arg(long, conflicts_with_all = ["fail", "drain", "apply", "then_fail", "then_drain"])]
    pub(crate) balance: bool,
    /// With the reason of every action and the hosts that were looked at.
    #[arg(long, short)]
    pub(crate) verbose: bool,
    #[command(flatten)]
    pub(crate) saved: SavedArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CapacityArgs {
    /// Look at up to so many failures at once; absent: as far as it is cheap.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=8))]
    pub(crate) failures: Option<u32>,
    /// Hosts with the same value of this label fail together. Labels that rules go by, and those called
    /// rack, row, room, ..., are looked at anyway.
    #[arg(long, value_name = "LABEL")]
    pub(crate) domain: Option<LabelName>,
    #[command(flatten)]
    pub(crate) saved: SavedArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum StateCommand {
    /// Write state and the leader's picture to a file, without secrets: `quorate plan --state FILE` asks it.
    Save {
        /// The file; `-` writes to standard output.
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
}

/// A manifest file.
#[derive(Debug, Args)]
pub(crate) struct FileArgs {
    /// The manifest, YAML or JSON; `-` reads standard input. `${NAME}` in it is replaced from the environment.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) file: PathBuf,
}

/// How long to wait.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct WaitArgs {
    /// Wait until it is done, with progress.
    #[arg(long, short)]
    pub(crate) wait: bool,
    /// Give up waiting (not the work) after this long.
    #[arg(long, default_value = "5m", value_name = "TIME", requires = "wait")]
    pub(crate) timeout: Millis,
}

#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    #[command(flatten)]
    pub(crate) file: FileArgs,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    #[command(flatten)]
    pub(crate) file: FileArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeleteCommand {
    /// Stop a VM, then forget it.
    Vm {
        /// Which.
        name: VmName,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Forget a pool that no VM uses.
    Pool {
        /// Which.
        name: PoolName,
    },
    /// Forget a network that no VM uses.
    Network {
        /// Which.
        name: NetworkName,
    },
    /// Forget a placement rule.
    Rule {
        /// Which.
        name: RuleName,
    },
    /// Forget a service; its connections end.
    Service {
        /// Which.
        name: ServiceName,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// All VMs.
    List,
    /// One VM in full.
    Show {
        /// Which.
        name: VmName,
    },
    /// Keep a VM running from now on.
    Start {
        /// Which.
        name: VmName,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Shut a VM down and keep it stopped.
    Stop {
        /// Which.
        name: VmName,
        /// Power it off at once instead of asking the guest.
        #[arg(long)]
        hard: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Move a VM to another host while it runs.
    Migrate {
        /// Which.
        name: VmName,
        /// To this host; absent: wherever it fits best.
        #[arg(long, value_name = "HOST")]
        to: Option<HostName>,
        /// Do not ask where it can only move by being stopped and others need it.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Take a move back: the VM goes on where it is.
    Cancel {
        /// Which.
        name: VmName,
    },
    /// Connect to a VM's serial console. Ctrl-] ends the connection.
    Console {
        /// Which.
        name: VmName,
    },
    /// Output of a VM's serial console.
    Logs {
        /// Which.
        name: VmName,
        /// Go on with what comes until Ctrl-C.
        #[arg(long, short)]
        follow: bool,
        /// Last lines to begin with.
        #[arg(long, short = 'n', default_value_t = 100, value_name = "COUNT")]
        lines: u32,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// All hosts.
    List,
    /// One host in full.
    Show {
        /// Which.
        name: HostName,
    },
    /// Move all VMs away, without stopping them, and take no new ones.
    Drain {
        /// Which.
        name: HostName,
        /// Do not ask where a VM that others need can only move by being stopped.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Take VMs again.
    Resume {
        /// Which.
        name: HostName,
    },
    /// Set labels (`rack=r1`) or remove them (`rack-`); rules and VMs go by them.
    Label {
        /// Which.
        name: HostName,
        /// `LABEL=VALUE` or `LABEL-`.
        #[arg(required = true, value_name = "LABEL=VALUE")]
        labels: Vec<String>,
    },
    /// Cut a host's power with its fence devices.
    Fence {
        /// Which.
        name: HostName,
    },
    /// Say that a host is dead, so that its VMs start elsewhere.
    ConfirmDead {
        /// Which.
        name: HostName,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Forget a host that owns nothing.
    Remove {
        /// Which.
        name: HostName,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum QuorumCommand {
    /// Who votes, how many failures are survived now, and what is wrong.
    Show,
    /// Which witness would be best for the hosts at hand, and why.
    Recommend,
    /// Choose the witness.
    Set {
        /// Which: `disk` in a pool that all hosts share, `remote` on a third machine, or `none`.
        #[arg(long, value_enum, value_name = "KIND")]
        witness: WitnessChoice,
        /// The pool for a disk witness.
        #[arg(long, value_name = "POOL", required_if_eq("witness", "disk"))]
        pool: Option<PoolName>,
        /// The LUN or device for it, in a pool of the kind `iscsi` or `block`: at least 512 MiB, for the witness alone.
        #[arg(long, value_name = "NAME", requires = "pool")]
        disk: Option<String>,
        /// Take the LUN or device even if there are data on it; they are lost.
        #[arg(long, requires = "disk")]
        force: bool,
    },
}

/// Kinds of witnesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum WitnessChoice {
    /// A voter whose log lies in a pool; whichever host holds the pool's lease runs it.
    Disk,
    /// A voter on a third machine; prints the command that joins it.
    Remote,
    /// No witness.
    None,
}

#[derive(Debug, Subcommand)]
pub(crate) enum WitnessCommand {
    /// Make this machine the witness of a cluster.
    Join(WitnessJoinArgs),
    /// Run the witness.
    Serve,
}

#[derive(Debug, Args)]
pub(crate) struct WitnessJoinArgs {
    /// The token that `quorate quorum set --witness remote` printed on a host of the cluster; `-` reads it
    /// from standard input, where no process list shows it.
    #[arg(env = "QUORATE_TOKEN", hide_env_values = true)]
    pub(crate) token: String,
    /// Name of the witness; absent: this machine's host name.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<HostName>,
    /// Address and port where the hosts reach it, such as 192.0.2.13:7420.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) address: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token that lets one host join.
    Create {
        /// Valid for this long.
        #[arg(long, default_value = "1h", value_name = "TIME")]
        ttl: Millis,
    },
}

/// Timing of the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Profile {
    /// Lease of 2 s: rides out network outages of 1.5 s.
    Default,
    /// Lease of 1 s: recovers a second earlier, freezes guests at outages above 0.6 s.
    Fast,
}

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Name of the cluster, for people.
    #[arg(long, default_value = "quorate", value_name = "NAME")]
    pub(crate) name: String,
    /// Name of this host; absent: its host name.
    #[arg(long, value_name = "HOST")]
    pub(crate) host: Option<HostName>,
    /// Address and port where the other hosts reach this one, such as 192.0.2.11:7420.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) address: String,
    /// Timing of the lease.
    #[arg(long, value_enum, default_value_t = Profile::Default)]
    pub(crate) profile: Profile,
    /// Settings of the cluster: a manifest with a `cluster:` section and nothing else.
    #[arg(long, value_name = "FILE", conflicts_with = "profile")]
    pub(crate) settings: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct JoinArgs {
    /// The token that `quorate token create` printed on a host of the cluster; `-` reads it from
    /// standard input, where no process list shows it.
    #[arg(env = "QUORATE_TOKEN", hide_env_values = true)]
    pub(crate) token: String,
    /// Name of this host; absent: its host name.
    #[arg(long, value_name = "HOST")]
    pub(crate) host: Option<HostName>,
    /// Address and port where the other hosts reach this one, such as 192.0.2.12:7420.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) address: String,
}
