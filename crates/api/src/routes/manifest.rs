//! Manifests: parsed and checked here, so that every error points into the operator's file.

use super::{Api, bytes, caller, json};
use crate::error::{ApiError, ErrorCode};
use crate::questions::{self, Admitted};
use crate::view::{Applied, ManifestRequest};
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::HeaderMap;
use quorate_manifest::{Existing, ParsedManifest, diff, load};
use quorate_state::{Command, State as ClusterState};
use quorate_types::{AdmissionMode, ClusterSettings};
use std::sync::Arc;

/// How often an apply is tried again when the configuration changed meanwhile.
const ATTEMPTS: usize = 3;

/// Makes what the manifest says hold: all of it or nothing.
#[utoipa::path(post, path = "/api/v1/manifest/apply", tag = "manifest", request_body = ManifestRequest,
    responses((status = 200, body = Applied), (status = "default", body = ApiError)))]
pub(crate) async fn apply_manifest(
    State(api): State<Api>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Applied>, ApiError> {
    let request: ManifestRequest = json(&bytes(body)?)?;
    let mut attempt = 1;
    loop {
        let state = newest(&api).await?;
        let (parsed, mut applied) = compare(&request, &state)?;
        if applied.changes.is_empty() {
            return Ok(Json(applied));
        }
        let command = Command::ApplyManifest {
            base: Some(request.base.unwrap_or(state.revision)),
            manifest: parsed.manifest.clone(),
        };
        match judged(&api, &command).await? {
            Admitted::Yes => {}
            Admitted::Warned(warnings) => applied.warnings = warnings,
            Admitted::No(short) => return Err(questions::refused(&short, &parsed, &state)),
        }
        match api.backend.propose(&caller(&headers), command).await {
            Ok(outcome) => {
                applied.revision = outcome.revision;
                return Ok(Json(applied));
            }
            Err(error)
                if error.code == ErrorCode::Stale
                    && request.base.is_none()
                    && attempt < ATTEMPTS =>
            {
                attempt += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

/// What an apply would change.
#[utoipa::path(post, path = "/api/v1/manifest/diff", tag = "manifest", request_body = ManifestRequest,
    responses((status = 200, body = Applied), (status = "default", body = ApiError)))]
pub(crate) async fn diff_manifest(
    State(api): State<Api>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Applied>, ApiError> {
    let request: ManifestRequest = json(&bytes(body)?)?;
    let state = match newest(&api).await {
        Err(error) if matches!(error.code, ErrorCode::NoQuorum | ErrorCode::Unreachable) => {
            api.backend.state()
        }
        other => other?,
    };
    let (parsed, mut applied) = compare(&request, &state)?;
    if applied.changes.is_empty() {
        return Ok(Json(applied));
    }
    let command = Command::ApplyManifest {
        base: None,
        manifest: parsed.manifest.clone(),
    };
    match judged(&api, &command).await {
        Ok(Admitted::No(short)) => {
            applied.warnings.push(questions::too_little(&short).message);
        }
        Ok(Admitted::Warned(warnings)) => applied.warnings = warnings,
        // The difference is told without it.
        Ok(Admitted::Yes) | Err(_) => {}
    }
    Ok(Json(applied))
}

/// What admission control says of a command. Where it has no say nobody is asked.
pub(crate) async fn judged(api: &Api, command: &Command) -> Result<Admitted, ApiError> {
    let state = api.backend.state();
    let mode = |settings: &ClusterSettings| settings.admission.mode;
    let new = match command {
        Command::ApplyManifest { manifest, .. } => manifest.cluster.as_ref().map(mode),
        _ => None,
    };
    let mode = new.unwrap_or_else(|| mode(&state.settings()));
    let warns = matches!(command, Command::ApplyManifest { .. });
    if mode == AdmissionMode::Off || (mode == AdmissionMode::Warn && !warns) {
        return Ok(Admitted::Yes);
    }
    let snapshot = match api.backend.snapshot().await {
        Ok(snapshot) => snapshot,
        // A warning is not worth a refusal.
        Err(_) if mode == AdmissionMode::Warn => return Ok(Admitted::Yes),
        Err(error) => return Err(error),
    };
    if !snapshot.seen.settled {
        return match mode {
            AdmissionMode::Refuse => Err(ApiError::new(
                ErrorCode::Busy,
                "the leader is new and has not heard all hosts yet, so it cannot tell whether there is room",
            )
            .hint("try again in a few seconds")),
            _ => Ok(Admitted::Yes),
        };
    }
    let command = command.clone();
    super::aside(move || questions::admit(&snapshot, &command)).await
}

/// The JSON schema of a manifest, for editors.
#[utoipa::path(get, path = "/api/v1/manifest/schema", tag = "manifest", responses((status = 200)))]
pub(crate) async fn manifest_schema() -> Json<serde_json::Value> {
    Json(quorate_manifest::json_schema())
}

/// The state here, at least as new as the leader's when this was called.
async fn newest(api: &Api) -> Result<Arc<ClusterState>, ApiError> {
    let view = api.backend.view().await?;
    if !view.cluster.quorate {
        return Err(ApiError::no_quorum());
    }
    let within = api.limits.catch_up;
    api.backend
        .applied_at_least(view.cluster.revision, within)
        .await
}

pub(crate) fn existing(state: &ClusterState) -> Existing {
    Existing {
        cluster: state.settings(),
        hosts: state.hosts.keys().cloned().collect(),
        host_specs: state
            .hosts
            .iter()
            .map(|(name, host)| (name.clone(), host.spec.clone()))
            .collect(),
        networks: specs(&state.networks),
        pools: specs(&state.pools),
        vms: state
            .vms
            .iter()
            .map(|(name, vm)| (name.clone(), vm.spec.clone()))
            .collect(),
        rules: specs(&state.rules),
        services: state
            .services
            .iter()
            .map(|(name, service)| (name.clone(), service.spec.clone()))
            .collect(),
        reserved: state
            .witness_disk()
            .map(|(identity, ..)| (identity, "the disk witness's".to_owned()))
            .into_iter()
            .collect(),
    }
}

fn specs<K: Ord + Clone, V: Clone>(
    objects: &std::collections::BTreeMap<K, quorate_state::Object<V>>,
) -> std::collections::BTreeMap<K, V> {
    objects
        .iter()
        .map(|(name, object)| (name.clone(), object.spec.clone()))
        .collect()
}

fn compare(
    request: &ManifestRequest,
    state: &ClusterState,
) -> Result<(ParsedManifest, Applied), ApiError> {
    let existing = existing(state);
    let parsed = load(&request.text, &request.file, &request.variables, &existing)
        .map_err(ApiError::manifest)?;
    let applied = Applied {
        revision: state.revision,
        changes: diff(&existing, &parsed.manifest),
        vms: parsed.manifest.vms.keys().cloned().collect(),
        services: parsed.manifest.services.keys().cloned().collect(),
        warnings: Vec::new(),
    };
    Ok((parsed, applied))
}
