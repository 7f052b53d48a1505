//! One-time join tokens: what an operator carries from the cluster to a new host.
//!
//! Text form: `qr1.` + base64url(JSON ‖ first 4 bytes of its SHA-256). The JSON holds the addresses of hosts, the cluster
//! id, the CA certificate's fingerprint and a secret. The checksum tells a token damaged in copying from a wrong one.
//!
//! The cluster stores [`TokenSecret::hash`] only and decides about expiry and use; nothing here knows time.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::TryRngCore as _;
use rand::rngs::OsRng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cert::hex;

const PREFIX: &str = "qr1.";
const CHECKSUM: usize = 4;
const MAX_TEXT: usize = 8 * 1024;
const SECRET: usize = 32;

/// Why a token text is not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The text is no token.
    #[error("this is not a join token: it must begin with \"qr1.\"; make one with `quorate token`")]
    NotAToken,
    /// A token form of a newer release.
    #[error(
        "this join token has the form {0:?}, which this version does not know: install the version of quorate that the cluster runs"
    )]
    UnknownForm(String),
    /// Characters were lost or changed.
    #[error("this join token is damaged ({0}): copy it again, whole and on one line")]
    Damaged(&'static str),
    /// A token that reads well but cannot be used.
    #[error("this join token is not usable ({0}): make a new one")]
    Unusable(String),
    /// No randomness.
    #[error("the system gives no random bytes ({0}): check the kernel's random device")]
    NoRandomness(String),
}

/// The secret of one token. Shown by nothing but [`TokenSecret::reveal`].
#[derive(Clone, PartialEq, Eq)]
pub struct TokenSecret([u8; SECRET]);

impl fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenSecret(..)")
    }
}

impl TokenSecret {
    /// A new random secret.
    ///
    /// # Errors
    /// [`TokenError::NoRandomness`].
    pub fn generate() -> Result<Self, TokenError> {
        let mut bytes = [0; SECRET];
        OsRng
            .try_fill_bytes(&mut bytes)
            .map_err(|e| TokenError::NoRandomness(e.to_string()))?;
        Ok(Self(bytes))
    }

    /// SHA-256 of the secret, lower-case hex: what the cluster stores and compares.
    #[must_use]
    pub fn hash(&self) -> String {
        hex(&Sha256::digest(self.0))
    }

    /// The secret as text, for the join request.
    #[must_use]
    pub fn reveal(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.0)
    }

    /// Reads what [`TokenSecret::reveal`] gave.
    ///
    /// # Errors
    /// [`TokenError::Damaged`].
    pub fn from_revealed(text: &str) -> Result<Self, TokenError> {
        let bytes = URL_SAFE_NO_PAD
            .decode(text)
            .map_err(|_| TokenError::Damaged("its secret is not base64"))?;
        let bytes = bytes
            .try_into()
            .map_err(|_| TokenError::Damaged("its secret has the wrong length"))?;
        Ok(Self(bytes))
    }
}

/// A join token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Where hosts of the cluster listen, as `host:port`.
    pub addresses: Vec<String>,
    /// Cluster id.
    pub cluster: String,
    /// SHA-256 of the CA certificate, lower-case hex.
    pub ca_fingerprint: String,
    /// What proves the right to join, once.
    pub secret: TokenSecret,
}

#[derive(Serialize, Deserialize)]
struct Payload {
    a: Vec<String>,
    c: String,
    f: String,
    s: String,
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let payload = Payload {
            a: self.addresses.clone(),
            c: self.cluster.clone(),
            f: self.ca_fingerprint.clone(),
            s: self.secret.reveal(),
        };
        let mut bytes = serde_json::to_vec(&payload).map_err(|_| fmt::Error)?;
        let sum = Sha256::digest(&bytes);
        bytes.extend_from_slice(&sum[..CHECKSUM]);
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let Some(encoded) = text.strip_prefix(PREFIX) else {
            return Err(not_a_token(text));
        };
        if encoded.len() > MAX_TEXT {
            return Err(TokenError::Damaged("it is too long"));
        }
        let bytes = URL_SAFE_NO_PAD
            .decode(encoded)
            .map_err(|_| TokenError::Damaged("it is not base64url"))?;
        let Some(split) = bytes.len().checked_sub(CHECKSUM) else {
            return Err(TokenError::Damaged("it is too short"));
        };
        let (json, sum) = bytes.split_at(split);
        if Sha256::digest(json)[..CHECKSUM] != *sum {
            return Err(TokenError::Damaged("its checksum does not match"));
        }
        let payload: Payload =
            serde_json::from_slice(json).map_err(|e| TokenError::Unusable(e.to_string()))?;
        payload.check()
    }
}

impl Payload {
    fn check(self) -> Result<JoinToken, TokenError> {
        let unusable = |reason: String| Err(TokenError::Unusable(reason));
        if self.a.is_empty() {
            return unusable("it holds no address".to_owned());
        }
        if let Some(bad) = self.a.iter().find(|a| !has_port(a)) {
            return unusable(format!("address {bad:?} has no port"));
        }
        if self.c.is_empty() {
            return unusable("it holds no cluster id".to_owned());
        }
        let digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        if self.f.len() != 64 || !self.f.bytes().all(digit) {
            return unusable("its CA fingerprint is not a SHA-256".to_owned());
        }
        Ok(JoinToken {
            addresses: self.a,
            cluster: self.c,
            ca_fingerprint: self.f,
            secret: TokenSecret::from_revealed(&self.s)?,
        })
    }
}

fn has_port(address: &str) -> bool {
    address
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0))
}

fn not_a_token(text: &str) -> TokenError {
    let form = text.split_once('.').map_or("", |(form, _)| form);
    let number = form.strip_prefix("qr").unwrap_or("");
    if !number.is_empty() && number.len() <= 4 && number.bytes().all(|b| b.is_ascii_digit()) {
        TokenError::UnknownForm(form.to_owned())
    } else {
        TokenError::NotAToken
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            addresses: vec!["10.0.0.1:7400".into(), "[fd00::1]:7400".into()],
            cluster: "c1".into(),
            ca_fingerprint: "ab".repeat(32),
            secret: TokenSecret::generate().unwrap(),
        }
    }

    fn encode(json: &str) -> String {
        let mut bytes = json.as_bytes().to_vec();
        let sum = Sha256::digest(&bytes);
        bytes.extend_from_slice(&sum[..CHECKSUM]);
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }

    #[test]
    fn a_token_reads_back() {
        let token = token();
        let text = token.to_string();
        assert!(text.starts_with("qr1."));
        assert_eq!(format!("  {text}\n").parse::<JoinToken>().unwrap(), token);
        let secret = TokenSecret::from_revealed(&token.secret.reveal()).unwrap();
        assert_eq!(secret.hash(), token.secret.hash());
        assert_eq!(secret.hash().len(), 64);
        assert!(!format!("{token:?}").contains(&token.secret.reveal()));
    }

    #[test]
    fn every_changed_character_is_seen() {
        let text = token().to_string();
        for at in PREFIX.len()..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let damaged = String::from_utf8(bytes).unwrap();
            let result = damaged.parse::<JoinToken>();
            assert!(matches!(result, Err(TokenError::Damaged(_))), "at {at}");
        }
        for end in [5, 8, text.len() / 2, text.len() - 1] {
            let result = text[..end].parse::<JoinToken>();
            assert!(matches!(result, Err(TokenError::Damaged(_))), "to {end}");
        }
    }

    #[test]
    fn other_texts_get_their_own_errors() {
        assert_eq!("hello".parse::<JoinToken>(), Err(TokenError::NotAToken));
        assert_eq!("".parse::<JoinToken>(), Err(TokenError::NotAToken));
        assert_eq!(
            "qr2.abc".parse::<JoinToken>(),
            Err(TokenError::UnknownForm("qr2".into()))
        );
        let secret = token().secret.reveal();
        let print = "0".repeat(64);
        for (json, word) in [
            (
                format!(r#"{{"a":[],"c":"c","f":"{print}","s":"{secret}"}}"#),
                "address",
            ),
            (
                format!(r#"{{"a":["h"],"c":"c","f":"{print}","s":"{secret}"}}"#),
                "port",
            ),
            (
                format!(r#"{{"a":["h:1"],"c":"","f":"{print}","s":"{secret}"}}"#),
                "cluster",
            ),
            (
                format!(r#"{{"a":["h:1"],"c":"c","f":"00","s":"{secret}"}}"#),
                "fingerprint",
            ),
            (r#"{"a":["h:1"]}"#.to_owned(), "missing field"),
        ] {
            let error = encode(&json).parse::<JoinToken>().unwrap_err();
            assert!(matches!(error, TokenError::Unusable(_)), "{error}");
            assert!(error.to_string().contains(word), "{error}");
        }
        let short = encode(&format!(
            r#"{{"a":["h:1"],"c":"c","f":"{print}","s":"AAAA"}}"#
        ));
        assert!(matches!(
            short.parse::<JoinToken>(),
            Err(TokenError::Damaged(_))
        ));
    }
}
