//! The service datapath of this host, and the program that watches BGP speakers.

use quorate_agent::RefusingDatapath;
use quorate_balancer::Datapath;
use quorate_types::NodeId;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

/// The kernel's, or one that refuses with the reason: a host without it runs VMs all the same.
pub(super) async fn open(dir: &Path, node: NodeId) -> Arc<dyn Datapath> {
    let _ = (dir, node);
    let reason = "not built in";
    tracing::warn!(reason, "this host serves no services");
    Arc::new(RefusingDatapath::new(reason))
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
