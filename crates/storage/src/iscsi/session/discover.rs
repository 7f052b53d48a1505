//! Asking a portal for its targets: a session of its own, which ends with the answer (`SendTargets`, RFC 7143, appendix C).

use super::{IscsiError, LUNS_MAX, Peer, Session, random_isid};
use crate::iscsi::pdu::{Found, Pdu, keys, op, targets};

/// What it may mean that a portal closes a discovery session at once.
fn without_targets(error: IscsiError) -> IscsiError {
    match error {
        IscsiError::Protocol { target, detail } if detail.starts_with("the connection broke") => {
            let detail = format!(
                "{detail} (tgtd does that as long as it has no target: make the first one)"
            );
            IscsiError::Protocol { target, detail }
        }
        other => other,
    }
}

/// The targets behind a portal.
///
/// # Errors
/// [`IscsiError`].
pub async fn discover(peer: &Peer) -> Result<Vec<Found>, IscsiError> {
    // An account is one at a target. LIO, offered it for a look, takes it and knows it not.
    let anybody = Peer {
        login: None,
        ..peer.clone()
    };
    let mut session = match Session::login(&anybody, None, random_isid()).await {
        Err(IscsiError::Authentication { .. }) if peer.login.is_some() => {
            Session::login(peer, None, random_isid()).await?
        }
        done => done.map_err(without_targets)?,
    };
    let mut request = Pdu::new(op::TEXT | op::IMMEDIATE, 0x80);
    request.set_u32(20, u32::MAX);
    request.data = keys(&[("SendTargets", "All")]);
    let mut text = Vec::new();
    for _ in 0..LUNS_MAX {
        let answer = session.exchange(request, "listing the targets").await?;
        if answer.opcode() != op::TEXT_RESPONSE {
            return Err(session.unexpected(&answer));
        }
        text.extend_from_slice(&answer.data);
        if answer.flags() & 0x80 != 0 {
            break;
        }
        request = Pdu::new(op::TEXT | op::IMMEDIATE, 0x80);
        request.set_u32(20, answer.u32(20));
    }
    session.logout().await;
    Ok(targets(&text))
}
