//! `image`: work on disk images. A job runs in the daemon; the command watches it.

use super::Context;
use super::error::CliError;
use super::output::{Output, Tone, bytes, cell, say, span, trimmed};
use super::show::time;
use super::storage;
use clap::{Subcommand, ValueHint};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::tz::TimeZone;
use quorate_api::storage::StorageView;
use quorate_api::{Client, ClientError};
use quorate_types::{
    ByteSize, FileFormat, ImageJob, ImageRef, ImageSnapshot, ImageTask, JobState, PoolName,
};
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time between two looks at a job.
const LOOK: Duration = Duration::from_millis(200);
/// Time between two lines where standard error is no terminal.
const LINE: Duration = Duration::from_secs(2);
/// How long a daemon may be away while its job is watched.
const AWAY: Duration = Duration::from_secs(60);

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Images and units of all pools, or of one, and who uses them.
    List {
        /// Only of this pool.
        pool: Option<PoolName>,
    },
    /// Make an image of a file (raw, qcow2, vmdk, vhdx, vdi, vpc), or write it to a unit of a SAN.
    Import {
        /// The file, on this host. Its format is found out.
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// The new image, or the unit.
        #[arg(long, value_name = "POOL/IMAGE")]
        to: ImageRef,
        /// Layout of the new image: raw or qcow2.
        #[arg(long, value_parser = format, value_name = "FORMAT")]
        format: Option<FileFormat>,
        /// Size of the new disk, if it shall be larger than the file's.
        #[arg(long, value_name = "SIZE")]
        size: Option<ByteSize>,
        /// Overwrite a unit that holds data; take a file whose partitions end beyond it.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        how: How,
    },
    /// Write an image to a file of this host.
    Export {
        /// The image.
        #[arg(value_name = "POOL/IMAGE")]
        from: ImageRef,
        /// The file.
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        to: PathBuf,
        /// Its layout: raw, qcow2, vmdk, vhdx, vdi or vpc.
        #[arg(long, value_parser = format, value_name = "FORMAT")]
        format: Option<FileFormat>,
        #[command(flatten)]
        how: How,
    },
    /// Copy an image that no running VM uses.
    Clone {
        /// The image.
        #[arg(value_name = "POOL/IMAGE")]
        from: ImageRef,
        /// The new image, or the unit.
        #[arg(long, value_name = "POOL/IMAGE")]
        to: ImageRef,
        /// Layout of the new image; absent: as the source.
        #[arg(long, value_parser = format, value_name = "FORMAT")]
        format: Option<FileFormat>,
        /// Overwrite a unit that holds data.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        how: How,
    },
    /// Give an image more room; a VM that runs from it sees that at once.
    Resize {
        /// The image.
        #[arg(value_name = "POOL/IMAGE")]
        image: ImageRef,
        /// New size, such as 20GiB.
        size: ByteSize,
    },
    /// Snapshots inside qcow2 images.
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Delete an image that no VM names.
    Delete {
        /// The image.
        #[arg(value_name = "POOL/IMAGE")]
        image: ImageRef,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Jobs of all hosts: what is under way, what is done, what failed.
    Jobs,
    /// Watch a job.
    Watch {
        /// Which.
        id: String,
    },
    /// Take a job back, or remove what a failed one had copied.
    Cancel {
        /// Which.
        id: String,
    },
}

/// How a copy is made.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct How {
    /// Most bytes in a second, such as 100MiB.
    #[arg(long, value_name = "SIZE")]
    limit: Option<ByteSize>,
    /// Do not watch it: print the job's name and return.
    #[arg(long)]
    detach: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Keep an image's content of this moment. A VM that runs is quiesced by its guest agent.
    Create {
        /// The image.
        #[arg(value_name = "POOL/IMAGE")]
        image: ImageRef,
        /// Name of the snapshot.
        name: String,
    },
    /// The snapshots of an image.
    List {
        /// The image.
        #[arg(value_name = "POOL/IMAGE")]
        image: ImageRef,
    },
    /// Forget a snapshot.
    Delete {
        /// The image.
        #[arg(value_name = "POOL/IMAGE")]
        image: ImageRef,
        /// Name of the snapshot.
        name: String,
    },
    /// Bring an image back to a snapshot; what came later is lost. Its VM must be stopped.
    Revert {
        /// The image.
        #[arg(value_name = "POOL/IMAGE")]
        image: ImageRef,
        /// Name of the snapshot.
        name: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
}

fn format(text: &str) -> Result<FileFormat, String> {
    use FileFormat::{Qcow2, Raw, Vdi, Vhdx, Vmdk, Vpc};
    let all = [Raw, Qcow2, Vmdk, Vhdx, Vdi, Vpc];
    let found = all.into_iter().find(|format| format.as_str() == text);
    found.ok_or_else(|| "it is none of raw, qcow2, vmdk, vhdx, vdi, vpc".to_owned())
}

pub(crate) async fn run(context: &Context, command: ImageCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        ImageCommand::List { pool } => list(context, pool).await,
        ImageCommand::Jobs => {
            let jobs: Vec<ImageJob> = client.get("/api/v1/images/jobs").await?;
            let zone = TimeZone::system();
            context.output.print(&jobs, |out| table(out, &jobs, &zone))
        }
        ImageCommand::Watch { id } => {
            let job: ImageJob = client.get(&format!("/api/v1/images/jobs/{id}")).await?;
            watch(context, job).await
        }
        ImageCommand::Cancel { id } => {
            let path = format!("/api/v1/images/jobs/{id}");
            let job: ImageJob = client.delete(&path).await?;
            context.output.print(&job, |_| match job.state.is_over() {
                true => format!("Job {} is over; nothing of it is left half made.", job.id),
                false => format!("Job {} is being taken back.", job.id),
            })
        }
        ImageCommand::Snapshot(SnapshotCommand::List { image }) => {
            let path = format!("/api/v1/images/snapshots?image={}", escaped(&image));
            let listed: Vec<ImageSnapshot> = client.get(&path).await?;
            let zone = TimeZone::system();
            context
                .output
                .print(&listed, |out| snapshots(out, &listed, &zone))
        }
        command => {
            let (task, detach) = task(command)?;
            let job: ImageJob = client.post("/api/v1/images/jobs", &task).await?;
            match detach {
                true => context.output.print(&job, |_| job.id.clone()),
                false => watch(context, job).await,
            }
        }
    }
}

/// Asks where it is to ask, and says what is to be done.
fn task(command: ImageCommand) -> Result<(ImageTask, bool), CliError> {
    let quick = |task| Ok((task, false));
    match command {
        ImageCommand::Import {
            file,
            to,
            format,
            size,
            force,
            how,
        } => Ok((
            ImageTask::Import {
                file: absolute(&file)?,
                to,
                format,
                size,
                force,
                limit: how.limit,
            },
            how.detach,
        )),
        ImageCommand::Export {
            from,
            to,
            format,
            how,
        } => Ok((
            ImageTask::Export {
                from,
                file: absolute(&to)?,
                format,
                limit: how.limit,
            },
            how.detach,
        )),
        ImageCommand::Clone {
            from,
            to,
            format,
            force,
            how,
        } => Ok((
            ImageTask::Clone {
                from,
                to,
                format,
                force,
                limit: how.limit,
            },
            how.detach,
        )),
        ImageCommand::Resize { image, size } => quick(ImageTask::Resize { image, size }),
        ImageCommand::Delete { image, yes } => {
            if !yes {
                let question = format!("{image} and everything in it will be gone for good.");
                ask(&question, "its name", &image.to_string(), "delete")?;
            }
            quick(ImageTask::Delete { image })
        }
        ImageCommand::Snapshot(SnapshotCommand::Create { image, name }) => {
            quick(ImageTask::SnapshotCreate { image, name })
        }
        ImageCommand::Snapshot(SnapshotCommand::Delete { image, name }) => {
            quick(ImageTask::SnapshotDelete { image, name })
        }
        ImageCommand::Snapshot(SnapshotCommand::Revert { image, name, yes }) => {
            if !yes {
                let question =
                    format!("What was written to {image} since the snapshot {name} will be lost.");
                ask(&question, "the snapshot's name", &name, "revert")?;
            }
            quick(ImageTask::SnapshotRevert { image, name })
        }
        _ => Err(CliError::Usage("not a task".to_owned())),
    }
}

fn absolute(path: &Path) -> Result<String, CliError> {
    let whole = std::path::absolute(path)?;
    let text = whole.into_os_string().into_string();
    text.map_err(|_| CliError::Usage(format!("{} is no name in UTF-8", path.display())))
}

/// For a query.
fn escaped(image: &ImageRef) -> String {
    let text = image.to_string();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    text.bytes()
        .map(|byte| match plain(byte) {
            true => char::from(byte).to_string(),
            false => format!("%{byte:02X}"),
        })
        .collect()
}

pub(crate) fn ask(question: &str, what: &str, word: &str, verb: &str) -> Result<(), CliError> {
    if !std::io::stdin().is_terminal() {
        return Err(CliError::Usage(format!(
            "{verb} asks before it acts, and standard input is no terminal: give --yes if you are certain"
        )));
    }
    let mut out = std::io::stderr();
    write!(out, "{question}\n\nType {what} to confirm: ")?;
    out.flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    match answer.trim() == word {
        true => Ok(()),
        false => Err(CliError::Failed(
            "not confirmed; nothing was done".to_owned(),
        )),
    }
}

async fn list(context: &Context, pool: Option<PoolName>) -> Result<(), CliError> {
    let client = &context.client;
    let names: Vec<PoolName> = match pool {
        Some(pool) => vec![pool],
        None => {
            let pools: Vec<StorageView> = client.get("/api/v1/pools").await?;
            pools.into_iter().map(|pool| pool.name).collect()
        }
    };
    let mut pools = Vec::new();
    for name in names {
        let pool: StorageView = client.get(&format!("/api/v1/pools/{name}")).await?;
        pools.push(pool);
    }
    context.output.print(&pools, |out| {
        let mut parts = Vec::new();
        for pool in &pools {
            match (&pool.images, &pool.images_problem) {
                (Some(images), _) if images.is_empty() => {
                    parts.push(format!("Pool {} has no images.", pool.name));
                }
                (Some(images), _) => parts.push(storage::images(out, Some(&pool.name), images)),
                (None, problem) => {
                    let why = problem.as_deref().unwrap_or("nobody answered");
                    let text = format!("Pool {} cannot be looked into: {why}", pool.name);
                    parts.push(out.paint(Tone::Bad, &text));
                }
            }
        }
        match parts.is_empty() {
            true => {
                "No pools yet: define one under `pools:` and `quorate apply -f FILE`.".to_owned()
            }
            false => parts.join("\n\n"),
        }
    })
}

fn snapshots(out: &Output, listed: &[ImageSnapshot], zone: &TimeZone) -> String {
    if listed.is_empty() {
        return "No snapshots.".to_owned();
    }
    let mut table = out.table(&["SNAPSHOT", "MADE"]);
    for snapshot in listed {
        let made = time(snapshot.at, zone);
        table.add_row([cell(&snapshot.name, Tone::Bold), cell(made, Tone::Plain)]);
    }
    trimmed(&table)
}

/// Jobs as a table.
pub(crate) fn table(out: &Output, jobs: &[ImageJob], zone: &TimeZone) -> String {
    if jobs.is_empty() {
        return "No jobs.".to_owned();
    }
    let mut table = out.table(&["JOB", "STATE", "ASKED", "WHAT", "NOTE"]);
    for job in jobs {
        let (state, tone) = match job.state {
            JobState::Queued => ("waiting".to_owned(), Tone::Dim),
            JobState::Running => (standing(job), Tone::Busy),
            JobState::Done => ("done".to_owned(), Tone::Good),
            JobState::Cancelled => ("cancelled".to_owned(), Tone::Dim),
            JobState::Failed => ("FAILED".to_owned(), Tone::Bad),
        };
        let mut note = job.error.clone().unwrap_or_else(|| job.notes.join("; "));
        if job.resumable {
            note.push_str("; the same command goes on where it stopped");
        }
        table.add_row([
            cell(&job.id, Tone::Bold),
            cell(state, tone),
            cell(time(job.asked, zone), Tone::Dim),
            cell(&job.task, Tone::Plain),
            cell(note, Tone::Dim),
        ]);
    }
    trimmed(&table)
}

/// `copying 42 %, 118 MiB/s, 12 s left`.
pub(crate) fn standing(job: &ImageJob) -> String {
    if job.total == 0 {
        return job.phase.clone();
    }
    let percent = u128::from(job.done) * 100 / u128::from(job.total);
    let mut text = format!("{} {percent} %", job.phase);
    if let Some(left) = (job.total - job.done.min(job.total))
        .saturating_mul(1000)
        .checked_div(job.per_second)
    {
        let rate = bytes(job.per_second);
        text.push_str(&format!(", {rate}/s, {} left", span(left)));
    }
    text
}

/// Watches a job to its end, also over a restart of the daemon.
async fn watch(context: &Context, mut job: ImageJob) -> Result<(), CliError> {
    let mut shown = Shown::new(context);
    let begun = Instant::now();
    while !job.state.is_over() {
        shown.tell(&job)?;
        tokio::time::sleep(LOOK).await;
        job = look(&context.client, &job.id).await?;
    }
    shown.end(&job)?;
    if let JobState::Failed | JobState::Cancelled = job.state {
        let mut text = job.error.unwrap_or_else(|| "it was taken back".to_owned());
        if job.resumable {
            text.push_str("\n  help: the same command goes on where this one stopped");
        }
        return Err(CliError::Failed(text));
    }
    if !context.output.is_table() {
        return Ok(());
    }
    for note in &job.notes {
        say(&format!("note: {note}"))?;
    }
    if job.resumed_at > 0 {
        say(&format!("It went on after {}.", bytes(job.resumed_at)))?;
    }
    if let Some(sum) = &job.sha256 {
        say(&format!("SHA-256 {sum}, verified"))?;
    }
    let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    say(&format!("Done: {} ({}).", job.task, span(took)))
}

async fn look(client: &Client, id: &str) -> Result<ImageJob, CliError> {
    let path = format!("/api/v1/images/jobs/{id}");
    let until = Instant::now() + AWAY;
    loop {
        match client.get::<ImageJob>(&path).await {
            // It may be restarting; the job goes on with it.
            Err(ClientError::Unreachable { .. } | ClientError::Broken(_))
                if Instant::now() < until =>
            {
                tokio::time::sleep(LOOK).await;
            }
            other => return Ok(other?),
        }
    }
}

/// Progress: a bar on a terminal, lines elsewhere, JSON lines for programs.
struct Shown {
    bar: Option<ProgressBar>,
    json: bool,
    last: Option<(Instant, String)>,
}

impl Shown {
    fn new(context: &Context) -> Self {
        let table = context.output.is_table();
        let terminal = std::io::stderr().is_terminal() && table;
        Self {
            bar: terminal.then(bar),
            json: !table,
            last: None,
        }
    }

    fn tell(&mut self, job: &ImageJob) -> Result<(), CliError> {
        let text = match job.state {
            JobState::Queued => "waiting for another job".to_owned(),
            _ => standing(job),
        };
        if let Some(bar) = &self.bar {
            bar.set_length(job.total);
            bar.set_position(job.done);
            bar.set_message(text);
            return Ok(());
        }
        let due = match &self.last {
            Some((at, before)) => at.elapsed() >= LINE && *before != text,
            None => true,
        };
        if due {
            match self.json {
                true => line(job)?,
                // Standard error is gone: there is nobody to tell.
                false => drop(writeln!(std::io::stderr(), "{}: {text}", job.id)),
            }
            self.last = Some((Instant::now(), text));
        }
        Ok(())
    }

    fn end(self, job: &ImageJob) -> Result<(), CliError> {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
        if self.json { line(job) } else { Ok(()) }
    }
}

fn line(job: &ImageJob) -> Result<(), CliError> {
    let text = serde_json::to_string(job).map_err(|error| CliError::Failed(error.to_string()))?;
    say(&text)
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("[{bar:30}] {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}
