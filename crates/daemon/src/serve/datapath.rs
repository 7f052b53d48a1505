//! The service datapath of this host, and the program that watches BGP speakers.

use quorate_agent::RefusingDatapath;
use quorate_balancer::Datapath;
use quorate_balancer::linux::{LinuxDatapath, LinuxOptions};
use quorate_types::NodeId;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

/// The kernel's, or one that refuses with the reason: a host without it runs VMs all the same.
pub(super) async fn open(dir: &Path, node: NodeId) -> Arc<dyn Datapath> {
    let options = LinuxOptions::new(node, pin_name(dir));
    match LinuxDatapath::new(options).await {
        Ok(datapath) => Arc::new(datapath),
        Err(error) => {
            tracing::warn!(%error, "this host serves no services");
            Arc::new(RefusingDatapath::new(error.to_string()))
        }
    }
}

/// Tells this daemon's pins from those of others on the machine: a number made of its directory (FNV-1a), the same
/// after every restart.
fn pin_name(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in whole.as_os_str().as_encoded_bytes() {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{hash:016x}")
}

/// `quorate bgp-speaker DIRECTORY`: started by the daemon, not by people.
pub(crate) fn watch_speaker(dir: Option<OsString>) -> ExitCode {
    let Some(dir) = dir else {
        eprintln!("error: `quorate bgp-speaker` is started by the daemon");
        return ExitCode::from(2);
    };
    match quorate_network::attract::bgp::watch::run(Path::new(&dir)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}: {error}", Path::new(&dir).display());
            ExitCode::FAILURE
        }
    }
}
