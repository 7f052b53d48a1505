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
    let witness = match (request.witness, request.pool) {
        (WitnessKind::Disk, Some(pool)) => WitnessChoice::Disk { pool },
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
    Ok(Json(QuorumChanged {
        revision: changed.revision,
        events: changed.events,
        consequences: consequences(&api.backend.state(), request.witness),
    }))
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
            "the witness votes once a host has made its log in the pool, in some seconds: `quorate quorum show`".to_owned(),
        ),
        WitnessKind::Disk => all.push(format!(
            "with {hosts} hosts the witness does not vote: it stands by for a host that is silent for long"
        )),
        _ => {}
    }
    all
}
