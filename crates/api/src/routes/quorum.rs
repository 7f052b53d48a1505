//! Votes and the witness.

use super::{Api, body_or_default, caller, changed};
use crate::error::{ApiError, ErrorCode};
use crate::quorum::{QuorumChanged, QuorumRequest, QuorumView, WitnessKind};
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::HeaderMap;
use quorate_membership::wanted_voters;
use quorate_state::{Command, WitnessChoice};
use quorate_types::{PoolName, PoolSpec};

/// Who votes, how many failures are survived, what is wrong, and what would be best.
#[utoipa::path(get, path = "/api/v1/quorum", tag = "cluster",
    responses((status = 200, body = QuorumView), (status = "default", body = ApiError)))]
pub(crate) async fn show_quorum(State(api): State<Api>) -> Result<Json<QuorumView>, ApiError> {
    Ok(Json(api.backend.quorum().await?))
}

/// Chooses the witness: none, or one in a pool. A remote witness joins with a token.
#[utoipa::path(put, path = "/api/v1/quorum", tag = "cluster", request_body = QuorumRequest,
    responses((status = 200, body = QuorumChanged), (status = "default", body = ApiError)))]
pub(crate) async fn set_quorum(
    State(api): State<Api>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<QuorumChanged>, ApiError> {
    let request: Option<QuorumRequest> = body_or_default(body)?;
    let bad = |text: &str, hint: &str| ApiError::new(ErrorCode::BadRequest, text).hint(hint);
    let Some(request) = request else {
        return Err(bad("no witness is named", "use `none` or `disk`"));
    };
    if request.disk.is_some() && request.witness != WitnessKind::Disk {
        return Err(bad("only a disk witness is on a disk", "leave `disk` out"));
    }
    let mut notes = Vec::new();
    let witness = match (request.witness, request.pool) {
        (WitnessKind::Disk, Some(pool)) => {
            notes = look_at(&api, &pool, request.disk.as_deref(), request.force).await?;
            WitnessChoice::Disk {
                pool,
                image: request.disk,
            }
        }
        (WitnessKind::Disk, None) => {
            let hint = "`quorate quorum recommend` names one that all hosts share";
            return Err(bad("a disk witness needs a pool", hint));
        }
        (WitnessKind::None, None) => WitnessChoice::None,
        (WitnessKind::None, Some(_)) => {
            return Err(bad("no witness needs no pool", "leave `pool` out"));
        }
        (WitnessKind::Remote, _) => {
            let hint = "make a token with `witness: true`, then `quorate witness join TOKEN` on its machine";
            return Err(bad("a remote witness joins by itself", hint));
        }
    };
    let set = Command::SetWitness { witness };
    let outcome = api.backend.propose(&caller(&headers), set).await?;
    let changed = changed(&outcome);
    let mut consequences = consequences(&api.backend.state(), request.witness);
    consequences.extend(notes);
    Ok(Json(QuorumChanged {
        revision: changed.revision,
        events: changed.events,
        consequences,
    }))
}

/// Looks at the unit for a witness before anything is changed. What `apply` refuses by itself is left to it.
async fn look_at(
    api: &Api,
    pool: &PoolName,
    disk: Option<&str>,
    force: bool,
) -> Result<Vec<String>, ApiError> {
    let state = api.backend.state();
    let Some(object) = state.pools.get(pool) else {
        let known = state.pools.keys().map(PoolName::as_str);
        return Err(ApiError::unknown("pool", pool.as_str(), known));
    };
    let units = matches!(object.spec, PoolSpec::Iscsi(_) | PoolSpec::Block(_));
    let Some(disk) = disk.filter(|disk| units && !state.is_witness_disk(pool, disk)) else {
        return Ok(Vec::new());
    };
    if let Some(vm) = state.disk_user(pool, disk) {
        let text = format!("disk `{disk}` in pool `{pool}` is used by VM `{vm}`");
        let hint = "the witness needs a unit that nobody else uses: name another with `--disk`";
        return Err(ApiError::new(ErrorCode::Conflict, text).hint(hint));
    }
    api.backend.check_witness_disk(pool, disk, force).await
}

fn consequences(state: &quorate_state::State, witness: WitnessKind) -> Vec<String> {
    let hosts = state.hosts.len();
    let max = state.settings().max_voters;
    let (votes, used) = wanted_voters(hosts, witness != WitnessKind::None, max);
    let survives = votes.saturating_sub(votes / 2 + 1);
    let mut all = vec![format!(
        "{hosts} hosts will have {votes} votes{}; so many failures are survived then: {survives}",
        if used { " with the witness" } else { "" }
    )];
    match witness {
        WitnessKind::None if hosts == 2 => all.push(
            "one of the two hosts votes alone: if it fails, or is cut off, the cluster stops until it is back".to_owned(),
        ),
        WitnessKind::Disk if used => all.push(
            "the witness votes once a host has made its log there, in some seconds: `quorate quorum show`".to_owned(),
        ),
        WitnessKind::Disk => all.push(format!(
            "with {hosts} hosts the witness does not vote: it stands by for a host that is silent for long"
        )),
        _ => {}
    }
    all
}
