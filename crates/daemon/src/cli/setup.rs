//! `init`, `join` and `man`.

use super::args::{Cli, InitArgs, JoinArgs, Profile};
use super::error::CliError;
use super::output::say;
use super::{Context, manifest};
use clap::CommandFactory as _;
use quorate_api::{ApiError, ClientError};
use quorate_types::{ClusterSettings, HostName, LeaseTimings, Manifest};
use std::path::Path;

pub(crate) fn host_name(given: Option<HostName>) -> Result<HostName, CliError> {
    if let Some(name) = given {
        return Ok(name);
    }
    let own = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let short = own.split('.').next().unwrap_or_default().to_lowercase();
    short.parse().map_err(|error| {
        CliError::Usage(format!(
            "this host's own name cannot be used: {error}; give one with --host"
        ))
    })
}

pub(crate) async fn init(context: &Context, args: InitArgs) -> Result<(), CliError> {
    let host = host_name(args.host)?;
    let settings = match &args.settings {
        Some(path) => read_settings(path)?,
        None => ClusterSettings {
            lease: match args.profile {
                Profile::Default => LeaseTimings::default(),
                Profile::Fast => LeaseTimings::FAST,
            },
            ..ClusterSettings::default()
        },
    };
    let dir = &context.dir;
    crate::serve::init(dir, &args.name, host.clone(), &args.address, settings).await?;
    let dir = at(dir);
    say(&format!(
        "Cluster {} made, with {host} as its first host.\n\nNow run the daemon:\n  quorate{dir} serve\nand, once it runs, let other hosts in:\n  quorate{dir} token create",
        args.name
    ))
}

/// Settings from a manifest that holds nothing else.
fn read_settings(path: &Path) -> Result<ClusterSettings, CliError> {
    let request = manifest::request(path)?;
    let existing = quorate_manifest::Existing::default();
    let parsed =
        quorate_manifest::load(&request.text, &request.file, &request.variables, &existing);
    let manifest = parsed
        .map_err(|bad| ClientError::from(ApiError::manifest(bad)))?
        .manifest;
    let only_settings = Manifest {
        cluster: manifest.cluster.clone(),
        ..Manifest::default()
    };
    if manifest != only_settings {
        return Err(CliError::Usage(format!(
            "{} holds more than a `cluster:` section: `quorate apply` the rest once the cluster runs",
            path.display()
        )));
    }
    Ok(manifest.cluster.unwrap_or_default())
}

pub(crate) async fn join(context: &Context, args: JoinArgs) -> Result<(), CliError> {
    let host = host_name(args.host)?;
    let token = token(args.token)?;
    let node = crate::serve::join(&context.dir, &token, host, &args.address).await?;
    say(&format!(
        "{} is now a host of cluster {}.\n\nNow run the daemon:\n  quorate{} serve",
        node.host,
        node.cluster_name,
        at(&context.dir)
    ))
}

/// The token as given, or from standard input.
pub(crate) fn token(given: String) -> Result<String, CliError> {
    let mut token = given;
    if token == "-" {
        token.clear();
        std::io::stdin().read_line(&mut token)?;
    }
    Ok(token.trim().to_owned())
}

/// ` --dir DIR`, where it is not the usual one.
fn at(dir: &Path) -> String {
    if dir == Path::new(super::args::DEFAULT_DIR) {
        String::new()
    } else {
        format!(" --dir {}", dir.display())
    }
}

pub(crate) fn man(to: Option<&Path>) -> Result<(), CliError> {
    match to {
        Some(dir) => clap_mangen::generate_to(Cli::command(), dir)?,
        None => clap_mangen::Man::new(Cli::command()).render(&mut std::io::stdout())?,
    }
    Ok(())
}
